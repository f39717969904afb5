"""Model folders: what is written comes back, and what is damaged or does not fit is refused by name."""

import dataclasses
import functools
import itertools
import json
import math
import mmap
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from magref_jax import checkpoint, pipeline
from magref_jax.config import DiTConfig, ModelConfig
from magref_jax.data.emoji_tokenizer import build_tokenizer
from magref_jax.sharding import make_mesh
from tests.tiny_model import WORDS

ROOT = pathlib.Path(__file__).parents[1]

CONFIG = ModelConfig(dit=DiTConfig(dim=24, num_heads=2, image_dim=None), image_encoder=None)
PARAMS = {
    "dit": {"up": {"kernel": jnp.arange(12.0).reshape(3, 4) / 7}, "scale": jnp.ones(5)},
    "vae": {"conv": {"kernel": jnp.full((2, 2), 1 / 3)}},
}


def abstract(params=PARAMS):
    return jax.eval_shape(lambda: params)


@pytest.fixture
def folder(tmp_path):
    checkpoint.save_model(
        tmp_path / "model",
        CONFIG,
        PARAMS,
        write_tokenizer=lambda path: (path.mkdir(), (path / "words").write_text("a")),
    )
    return tmp_path / "model"


def test_a_model_folder_comes_back_bitwise(folder):
    config, params = checkpoint.restore_model(folder, abstract())
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert sorted(path.name for path in folder.iterdir()) == ["MANIFEST.json", "config.json", "dit", "tokenizer", "vae"]


def test_parameters_come_back_in_the_dtype_they_were_stored_in(tmp_path):
    checkpoint.save_params(tmp_path / "dit", PARAMS["dit"], "bfloat16")
    params = checkpoint.restore_params(tmp_path / "dit", abstract()["dit"])  # asks for float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.bfloat16.dtype}
    # 8 bits of mantissa, rounded to nearest.
    np.testing.assert_allclose(
        np.asarray(params["up"]["kernel"], np.float32), PARAMS["dit"]["up"]["kernel"], rtol=2**-8
    )


def test_parameters_come_to_the_first_device_from_wherever_they_were_written(tmp_path):
    sharding = NamedSharding(make_mesh("fsdp=4,tensor=2"), P(None, "fsdp"))
    placed = {"kernel": jax.device_put(PARAMS["dit"]["up"]["kernel"], sharding)}
    checkpoint.save_params(tmp_path / "net", placed)
    params = checkpoint.restore_params(tmp_path / "net", jax.eval_shape(lambda: {"kernel": jnp.zeros((3, 4))}))
    assert params["kernel"].devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(params["kernel"], PARAMS["dit"]["up"]["kernel"])


def test_parameters_come_to_the_devices_that_are_asked_for(folder):
    sharding = NamedSharding(make_mesh("data=8"), P(None, None))
    target = {"conv": {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32, sharding=sharding)}}
    params = checkpoint.restore_params(folder / "vae", target)
    assert params["conv"]["kernel"].sharding == sharding


def test_saving_one_network_leaves_the_others(folder):
    changed = {"conv": {"kernel": jnp.zeros((2, 2))}}
    checkpoint.save_model(folder, CONFIG, {"vae": changed})
    _, params = checkpoint.restore_model(folder, abstract())
    np.testing.assert_array_equal(params["vae"]["conv"]["kernel"], 0)
    np.testing.assert_array_equal(params["dit"]["scale"], 1)


def test_an_interrupted_save_does_not_stop_the_next_one(folder):
    (folder / ".dit.new").mkdir()
    (folder / ".dit.new" / "half").write_text("")
    checkpoint.save_model(folder, CONFIG, {"dit": PARAMS["dit"]})
    checkpoint.restore_model(folder, abstract())


def test_one_flipped_bit_is_found_and_the_file_named(folder):
    path = max((folder / "dit").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.relative_to(folder).as_posix()} is damaged"):
        checkpoint.restore_model(folder, abstract())


ADDED = (
    ".DS_Store",
    ".gitattributes",
    "README.md",
    ".cache/huggingface/x.metadata",
    "dit/.DS_Store",
    "tokenizer/._words",
)


def test_files_that_are_added_are_no_damage(folder):
    for name in ADDED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    assert sorted(checkpoint.verify_manifest(folder)) == sorted(ADDED)
    config, params = checkpoint.restore_model(folder, abstract())
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    # Nor do they become a part of the model when something else of it is written.
    checkpoint.save_model(folder, CONFIG, {"vae": PARAMS["vae"]})
    assert sorted(checkpoint.verify_manifest(folder)) == sorted(ADDED)


@pytest.mark.parametrize("change", ["missing", "truncated", "longer", "changed"])
def test_files_of_the_model_that_differ_are_damage_whatever_is_added(folder, change):
    (folder / "README.md").write_text("x")
    path = folder / "tokenizer" / "words"
    path.write_bytes({"missing": b"", "truncated": b"", "longer": b"ab", "changed": b"b"}[change])
    message = {
        "missing": "tokenizer/words is missing",
        "truncated": "tokenizer/words has 0 bytes, expected 1",
        "longer": "tokenizer/words has 2 bytes, expected 1",
        "changed": "tokenizer/words is damaged",
    }[change]
    if change == "missing":
        path.unlink()
    with pytest.raises(ValueError, match=f"MANIFEST.json: {message}.$"):
        checkpoint.restore_model(folder, abstract())


def test_a_missing_manifest_is_named(folder):
    (folder / "MANIFEST.json").unlink()
    with pytest.raises(FileNotFoundError, match="is not a model folder: it has no MANIFEST.json"):
        checkpoint.restore_model(folder, abstract())


def test_a_missing_network_is_named(folder):
    shutil.rmtree(folder / "vae")
    checkpoint.write_manifest(folder)
    with pytest.raises(FileNotFoundError, match=r"vae does not exist"):
        checkpoint.restore_model(folder, abstract())


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"scale": jnp.ones(5)}, r"\['up'\]\['kernel'\] is unknown"),
        (PARAMS["dit"] | {"bias": jnp.ones(2)}, r"\['bias'\] is missing"),
        (PARAMS["dit"] | {"scale": jnp.ones(6)}, r"\['scale'\] has shape \(5,\), expected \(6,\)"),
    ],
)
def test_parameters_that_do_not_fit_are_named(folder, expected, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.restore_params(folder / "dit", abstract(expected))


def test_an_unknown_network_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"unknown networks \['clip'\]"):
        checkpoint.save_model(tmp_path / "model", CONFIG, {"clip": PARAMS["vae"]})
    assert not (tmp_path / "model").exists()


def test_a_config_survives_its_file(tmp_path):
    config = dataclasses.replace(
        CONFIG, sampling=dataclasses.replace(CONFIG.sampling, negative_prompt='模糊 "blurred"')
    )
    checkpoint.save_model(tmp_path / "model", config, {})
    restored, _ = checkpoint.restore_model(tmp_path / "model", {})
    assert restored == config
    assert hash(restored) == hash(config)  # it is a static argument of compiled programs


SHAPES = {"blocks/up/kernel": (3, 300, 260), "scale": (5,), "step": ()}
ABSTRACT = {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in SHAPES.items()}


def pieces() -> list[tuple[str, np.ndarray, int | None]]:
    """What a converter writes: layers of a stacked parameter, transposed in memory; whole small ones."""
    rng = np.random.default_rng(0)
    layers = [("blocks/up/kernel", rng.standard_normal((260, 300)).astype(np.float32).T, layer) for layer in range(3)]
    return [*layers, ("scale", np.arange(5, dtype=np.float32), None), ("step", np.float32(7).reshape(()), None)]


def write_pieces(folder, order):
    writer = checkpoint.ParamsWriter(folder, ABSTRACT, lambda path: path.startswith("blocks/"))
    for path, array, layer in (pieces()[index] for index in order):
        assert not folder.exists()
        writer.write(path, array, layer)
    writer.finish()


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parameters_written_piece_by_piece_are_read_like_any_others(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 50_000)
    write_pieces(tmp_path / "dit", range(5))
    write_pieces(tmp_path / "again", [4, 2, 0, 3, 1])
    assert files(tmp_path / "dit") == files(tmp_path / "again")
    assert max(len(content) for content in files(tmp_path / "dit").values()) < 50_100

    # Each device of a mesh gets its part.
    sharding = NamedSharding(make_mesh("fsdp=4,tensor=2"), P(None, "fsdp", "tensor"))
    target = jax.eval_shape(
        lambda: {"blocks": {"up": {"kernel": jnp.zeros((3, 300, 260))}}, "scale": jnp.ones(5), "step": 0.0}
    )
    target["blocks"]["up"]["kernel"] = jax.ShapeDtypeStruct((3, 300, 260), jnp.bfloat16, sharding=sharding)
    params = checkpoint.restore_params(tmp_path / "dit", target)
    assert params["blocks"]["up"]["kernel"].sharding == sharding
    stores = checkpoint.open_params(tmp_path / "dit")
    for path, array, layer in pieces():
        expected = np.ascontiguousarray(array).astype(jnp.bfloat16.dtype)
        leaf = params["blocks"]["up"]["kernel"] if layer is not None else params[path]
        np.testing.assert_array_equal(np.asarray(leaf if layer is None else leaf[layer]), expected)
        stored = stores[path] if layer is None else stores[path][layer]
        np.testing.assert_array_equal(stored.read().result(), expected)


def test_what_save_params_wrote_can_be_read_in_parts(tmp_path):
    checkpoint.save_params(tmp_path / "dit", PARAMS["dit"])
    stores = checkpoint.open_params(tmp_path / "dit")
    assert sorted(stores) == ["scale", "up/kernel"]
    np.testing.assert_array_equal(stores["up/kernel"][1].read().result(), PARAMS["dit"]["up"]["kernel"][1])


def test_an_unfinished_writer_is_continued_or_forgotten(tmp_path):
    def start(keep):
        return checkpoint.ParamsWriter(tmp_path / "dit", ABSTRACT, lambda path: path.startswith("blocks/"), keep=keep)

    first, *rest = pieces()
    start(keep=False).write(*first)
    (tmp_path / ".dit.new" / "blocks.up.kernel" / "0.0.0.__lock").write_text("")  # of a process that was killed
    writer = start(keep=True)
    for piece in rest:
        writer.write(*piece)
    writer.finish()
    write_pieces(tmp_path / "whole", range(5))
    assert files(tmp_path / "dit") == files(tmp_path / "whole")

    start(keep=False).write(*first)
    writer = start(keep=False)
    with pytest.raises(FileNotFoundError, match="does not exist or is unfinished"):
        checkpoint.open_params(tmp_path / ".dit.new")


def test_sizes_are_compared_even_where_contents_are_not(folder):
    path = max((folder / "dit").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"has {len(content) - 1} bytes, expected {len(content)}"):
        checkpoint.restore_model(folder, abstract(), verify=False)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    checkpoint.verify_manifest(folder, contents=False)
    (folder / "MANIFEST.json").write_text("[1]")
    with pytest.raises(ValueError, match="MANIFEST.json is damaged"):
        checkpoint.verify_manifest(folder)


def random_values(names):
    """Parameters of 4 MiB."""
    rng = np.random.default_rng(0)
    return {f"blocks/{name}": rng.random((4, 512, 512), np.float32) for name in names}


def write_large(folder, names="abcdef"):
    """Writes `random_values` in chunks."""
    values = random_values(names)
    writer = checkpoint.ParamsWriter(folder, values, lambda path: True)
    for path, array in values.items():
        for layer, part in enumerate(array):
            writer.write(path, part, layer)
    writer.finish()
    return values


def target(values, sharding):
    leaves = {path.removeprefix("blocks/"): array for path, array in values.items()}
    return {
        "blocks": {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding) for name, array in leaves.items()
        }
    }


def bytes_read() -> int:
    """Of files, by this process."""
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])


def put_apart(device_put, value, device):
    """To memory that tracemalloc does not see, as that of an accelerator.

    On CPU, an array may be the NumPy array that it was made of, and a copy by JAX lets go of it when its thread comes to it.
    """
    copy = np.frombuffer(mmap.mmap(-1, value.nbytes), value.dtype).reshape(value.shape)
    copy[...] = value
    return device_put(copy, device)


@pytest.mark.parametrize("written_by", ["converter", "orbax"])
def test_a_restore_has_one_large_parameter_at_a_time_on_the_host(tmp_path, monkeypatch, written_by):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 2**16)
    values = write_large(tmp_path / "dit")
    if written_by == "orbax":
        checkpoint.save_params(tmp_path / "dit", {"blocks": {path[7:]: array for path, array in values.items()}})
        chunks = [store.chunk_layout.read_chunk.shape for store in checkpoint.open_params(tmp_path / "dit").values()]
        assert max(4 * math.prod(chunk) for chunk in chunks) <= 2**16
    monkeypatch.setattr(jax, "device_put", functools.partial(put_apart, jax.device_put))
    abstract = target(values, NamedSharding(make_mesh("fsdp=4,tensor=2"), P(None, "fsdp", "tensor")))
    checkpoint.stored_params(tmp_path / "dit", abstract)  # imports what it needs
    tracemalloc.start()  # sees what NumPy and Python allocate, but not the arrays of JAX
    try:
        params = checkpoint.restore_params(tmp_path / "dit", abstract)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(array.nbytes for array in values.values()) == 6 * 2**22
    assert peak < 1.3 * 2**22  # one parameter, and a chunk of it
    for path, array in values.items():
        np.testing.assert_array_equal(params["blocks"][path[7:]], array)


@pytest.mark.parametrize(
    ("spec", "cut"),
    [
        ("fsdp=8", P(None, "fsdp")),
        ("data=8", P()),
        ("data=2,fsdp=4", P(None, "fsdp")),
        ("context=8", P(None, None, "context")),
    ],
)
def test_each_chunk_is_read_once_for_all_devices_of_a_process(tmp_path, monkeypatch, spec, cut):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 2**18)  # 256 x 256: of four devices along fsdp, of all along data
    values = write_large(tmp_path / "dit", "ab")
    size = sum(len(content) for content in files(tmp_path / "dit").values())
    abstract = target(values, NamedSharding(make_mesh(spec), cut))
    before = bytes_read()
    params = checkpoint.restore_params(tmp_path / "dit", abstract)
    assert bytes_read() - before < 1.1 * size
    np.testing.assert_array_equal(params["blocks"]["b"], values["blocks/b"])


def start(script: str, *arguments: object, devices: int = 8) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


ONE_OF_TWO = """
import pathlib, sys
import jax
from magref_jax import checkpoint, distributed

distributed.initialise(sys.argv[1], 2, int(sys.argv[2]))
from jax.sharding import NamedSharding, PartitionSpec as P
from magref_jax.sharding import make_mesh
from tests import test_checkpoint as tests

values, folder = tests.random_values("ab"), pathlib.Path(sys.argv[3])
abstract = tests.target(values, NamedSharding(make_mesh("fsdp=8"), P(None, "fsdp")))
before = tests.bytes_read()
params = checkpoint.restore_params(folder, abstract)
read = tests.bytes_read() - before
for shard in params["blocks"]["b"].addressable_shards:
    assert (shard.data == values["blocks/b"][shard.index]).all()
print(read)
"""


@pytest.mark.slow
def test_a_process_reads_what_its_own_devices_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 2**18)
    write_large(tmp_path / "dit", "ab")
    size = sum(len(content) for content in files(tmp_path / "dit").values())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [start(ONE_OF_TWO, address, index, tmp_path / "dit", devices=4) for index in range(2)]
    read = [int(process.communicate(timeout=300)[0].splitlines()[-1]) for process in processes]
    print(f"\nof {size} bytes, two processes read {read}")
    assert max(read) < 0.55 * size


LOAD = """
import json, pathlib, sys
import jax, numpy as np
from magref_jax import pipeline
from magref_jax.sharding import make_mesh

folder, mesh, keep = pathlib.Path(sys.argv[1]), make_mesh(sys.argv[2]), sys.argv[3] == "keep"
sent = 0
if not keep:
    # As where devices have memory of their own: what has been sent there is on the host no more.
    def device_put(array, device):
        global sent
        sent += array.nbytes
        return np.empty(0, array.dtype)

    jax.device_put = device_put
    jax.make_array_from_single_device_arrays = lambda shape, _, arrays: jax.ShapeDtypeStruct(shape, arrays[0].dtype)
params = pipeline.load(folder, mesh, verify=False).params
shards = [shard.data for leaf in jax.tree.leaves(params) if keep for shard in leaf.addressable_shards]
held = {shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}
status = dict(line.split(":") for line in open("/proc/self/status"))
print(json.dumps({"peak": int(status["VmHWM"].split()[0]) * 1024, "held": sum(held.values()), "sent": sent}))
"""


def write_released(folder: pathlib.Path, config: ModelConfig) -> None:
    """A model folder with random parameters in which all chunks of a parameter are one file with many names."""
    rng = np.random.default_rng(0)
    for network, params in pipeline.abstract_params(config).items():
        abstract = {
            "/".join(key.key for key in path): jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
            for path, leaf in jax.tree.leaves_with_path(params)
        }
        checkpoint.ParamsWriter(folder / network, abstract, lambda path: path.startswith("blocks/")).finish()
        for path, store in checkpoint.open_params(folder / network).items():
            chunk = store.chunk_layout.read_chunk.shape
            values = np.frombuffer(rng.bytes(2 * math.prod(chunk)), jnp.bfloat16.dtype).reshape(chunk)
            writable = tensorstore.open(store.spec(), open=True, write=True).result()
            first = tuple(slice(0, min(sizes)) for sizes in zip(chunk, store.shape, strict=True))
            writable[first].write(values[first]).result()
            name, *others = (
                ".".join(map(str, numbers))
                for numbers in itertools.product(*(range(-(-n // c)) for n, c in zip(store.shape, chunk, strict=True)))
            )
            for other in others:
                os.link(*(folder / network / path.replace("/", ".") / file for file in (name, other)))
    build_tokenizer(WORDS, folder / "tokenizer", text_len=config.dit.text_len)
    (folder / "config.json").write_text(config.to_json())
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    (folder / "MANIFEST.json").write_text(json.dumps({name: {"bytes": size} for name, size in sizes.items()}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dit_layers", "text_layers", "arrays"),
    # All of it to devices with memory of their own; and what fits into the memory of a small machine, to those of the CPU.
    [(40, 24, "drop"), (4, 1, "keep")],
)
def test_the_rss_of_loading_14b_onto_eight_devices(tmp_path, dit_layers, text_layers, arrays):
    config = dataclasses.replace(
        ModelConfig(),
        dit=dataclasses.replace(ModelConfig().dit, num_layers=dit_layers),
        text_encoder=dataclasses.replace(ModelConfig().text_encoder, num_layers=text_layers),
    )
    write_released(tmp_path / "model", config)
    output, _ = start(LOAD, tmp_path / "model", "fsdp=8", arrays).communicate(timeout=3000)
    found = json.loads(output.splitlines()[-1])
    placed = jax.tree.leaves(pipeline.place_params(make_mesh("fsdp=8"), pipeline.abstract_params(config)))
    in_total = sum(2 * 8 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in placed)
    largest = max(2 * leaf.size for leaf in placed)
    print(
        f"\n{in_total / 1e9:.1f} GB on the devices, largest parameter {largest / 1e9:.2f} GB: peak memory of the host "
        f"{found['peak'] / 1e9:.2f} GB, without the arrays on the CPU's devices {(found['peak'] - found['held']) / 1e9:.2f} GB"
    )
    assert found["sent"] == (in_total if arrays == "drop" else 0)
    assert found["peak"] - found["held"] < 1.3 * largest + 2e9
