"""Model folders: what is written comes back, and what is damaged or does not fit is refused by name."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from magref_jax import checkpoint
from magref_jax.config import DiTConfig, ModelConfig
from magref_jax.sharding import make_mesh

CONFIG = ModelConfig(dit=DiTConfig(dim=24, num_heads=2), image_encoder=None)
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


def test_missing_and_unknown_files_are_named(folder):
    (folder / "tokenizer" / "words").rename(folder / "tokenizer" / "other")
    with pytest.raises(ValueError, match=r"tokenizer/words is missing; tokenizer/other is not in the manifest"):
        checkpoint.restore_model(folder, abstract())
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
    monkeypatch.setattr(checkpoint.ParamsWriter, "CHUNK_BYTES", 50_000)
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
