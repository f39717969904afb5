"""The converter from end to end: every layout in, every layout out, bit for bit; what a user may do wrong or interrupt."""

import errno
import functools
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

import convert_torch_weights
from magref_jax import checkpoint, pipeline
from magref_jax.config import load_model_config
from magref_jax.convert import conversion
from magref_jax.convert.tensor_files import StoredTensor
from tests import torch_folders

SETTINGS = [word for setting in torch_folders.SETTINGS for word in ("--set", setting)]
# The layout that a source comes back as, and what a diffusers or ComfyUI source does not say of itself.
KINDS = {"official": ("wan", []), "diffusers": ("diffusers", []), "comfy": ("comfy", SETTINGS)}


@pytest.fixture(autouse=True)
def shapes_once(monkeypatch):
    """Tracing four networks for their shapes costs more than converting them at this size."""
    monkeypatch.setattr(pipeline, "abstract_params", SHAPES)


SHAPES = functools.cache(pipeline.abstract_params)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Each kind of source as float32, and the tensors in it."""
    root = tmp_path_factory.mktemp("sources")
    return {kind: (root / kind, write(root / kind)) for kind, write in torch_folders.WRITERS.items()}


def run(*words) -> None:
    convert_torch_weights.main([str(word) for word in words])


def fails(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def stored(folder: pathlib.Path, network: str) -> dict[str, np.ndarray]:
    return {path: store.read().result() for path, store in checkpoint.open_params(folder / network).items()}


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """All tensors below a folder. Networks share no name but those that are told apart by their folder or file."""
    tensors = {}
    for file in folder.rglob("*.safetensors"):
        for name, tensor in safetensors.torch.load_file(file).items():
            tensors[file.parent.name, file.name.partition("-0")[0], name] = tensor
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_bitwise(kind, dtype, tmp_path, capsys):
    made = torch_folders.WRITERS[kind](tmp_path / "source", dtype)
    to, settings = KINDS[kind]
    run(tmp_path / "source", tmp_path / "model", "--verify", *settings)
    run(tmp_path / "model", tmp_path / "back", "--to", to)

    assert "every file is as it was written" in capsys.readouterr().out
    assert load_model_config(tmp_path / "model").dit.num_heads == 2
    files = {path.relative_to(tmp_path / "back").as_posix() for path in (tmp_path / "back").rglob("*.safetensors")}
    assert len(files) == 4
    kept = 0
    for network, tensors in made.items():
        stem = {
            "official": {name: file.removesuffix(".pth") for name, file in torch_folders.WAN_FILES.items()},
            "diffusers": torch_folders.HF_FILES,
            "comfy": {
                "dit": "diffusion_models/back",
                "vae": "vae/back_vae",
                "text_encoder": "text_encoders/back_umt5",
                "image_encoder": "clip_vision/back_clip_vision",
            },
        }[kind][network]
        back = safetensors.torch.load_file(tmp_path / "back" / f"{stem}.safetensors")
        prefix = "vision_model." if (kind, network) == ("comfy", "image_encoder") else ""
        for name, tensor in back.items():
            expected = tensors[name.removeprefix(prefix)]
            assert tensor.dtype == dtype
            assert tensor.shape == expected.shape
            if tensor.any():  # what our CLIP leaves out is written as zeros
                assert torch.equal(tensor, expected), name
                kept += 1
            else:
                assert network == "image_encoder"
        missing = set(tensors) - {name.removeprefix(prefix) for name in back}
        assert missing <= {"textual.token_embedding.weight", "log_scale"}
    names = sum(len(tensors) for tensors in made.values())
    left_out = len(torch_folders.image_encoder_unused(torch_folders.CONFIG.image_encoder, "wan"))
    if kind == "official":
        assert kept == names - left_out - 2


@pytest.mark.parametrize("kind", ["diffusers", "comfy"])
def test_every_layout_of_the_same_weights_gives_the_same_model(kind, sources, tmp_path):
    run(sources["official"][0], tmp_path / "model")
    run(tmp_path / "model", tmp_path / "other", "--to", KINDS[kind][0])
    run(tmp_path / "other", tmp_path / "again", *SETTINGS)
    for network in checkpoint.NETWORKS:
        assert contents(tmp_path / "again" / network) == contents(tmp_path / "model" / network)


def test_large_networks_are_cut_into_files_with_an_index(sources, tmp_path, monkeypatch):
    run(sources["official"][0], tmp_path / "model", "--only", "dit")
    target = conversion.dataclasses.replace(convert_torch_weights.export.TARGETS["wan"]["dit"], max_bytes=20_000)
    monkeypatch.setitem(convert_torch_weights.export.TARGETS["wan"], "dit", target)
    run(tmp_path / "model", tmp_path / "back", "--to", "wan")

    index = json.loads((tmp_path / "back" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in sources["official"][1]["dit"].values())
    run(tmp_path / "back", tmp_path / "again", "--only", "dit")
    assert contents(tmp_path / "again" / "dit") == contents(tmp_path / "model" / "dit")


def test_dtypes_are_those_of_the_file_or_what_was_asked_for(sources, tmp_path):
    source, made = sources["official"]
    run(source, tmp_path / "kept")
    run(source, tmp_path / "half", "--dtype", "bfloat16")
    kept, half = stored(tmp_path / "kept", "dit"), stored(tmp_path / "half", "dit")
    assert {array.dtype for array in kept.values()} == {np.dtype(np.float32)}
    narrow = {path for path, array in half.items() if array.dtype == ml_dtypes.bfloat16}
    assert narrow == {path for path in half if path.endswith("kernel") and not path.startswith(("time_", "head/"))}
    for path in half.keys() - narrow:  # what the networks compute in float32 keeps every bit
        np.testing.assert_array_equal(half[path], kept[path], err_msg=path)
    # torch rounds to nearest even, and so do we.
    expected = made["dit"]["blocks.1.ffn.0.weight"].to(torch.bfloat16).float().numpy().T
    np.testing.assert_array_equal(half["blocks/feed_forward/up/kernel"][1].astype(np.float32), expected)
    assert {array.dtype for array in stored(tmp_path / "half", "vae").values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--dtype", "bfloat16"), ["bfloat16", "float32", "bfloat16", "bfloat16"]),
        (("--dtype", "float32"), ["float32"] * 4),
        (("--dtype", "float32", "--set", "dit.dtype=bfloat16"), ["bfloat16", "float32", "float32", "float32"]),
        (("--dtype", "float32", "--only", "dit"), ["float32", "float32", "bfloat16", "bfloat16"]),
    ],
)
def test_what_is_stored_in_a_dtype_because_it_was_asked_for_computes_in_it(sources, tmp_path, options, expected):
    run(sources["official"][0], tmp_path / "model", *options)
    config = load_model_config(tmp_path / "model")
    assert [getattr(config, name).dtype for name in checkpoint.NETWORKS] == expected


def test_files_of_mixed_dtypes_and_scaled_8_bit_floats(tmp_path):
    tensors = torch_folders.tensors("dit", "wan")
    scales = {}
    for number, name in enumerate(sorted(tensors)):
        if "attn." in name and name.endswith("weight") and tensors[name].ndim == 2:
            scale = torch.tensor(0.25 + number / 100)
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
            scales[name.removesuffix("weight") + "scale_weight"] = scale
        elif "ffn" in name:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn if name.endswith("weight") else torch.float16)
        elif "norm" in name:
            tensors[name] = tensors[name].to(torch.bfloat16)
    file = tmp_path / "magref_fp8.safetensors"
    marker = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in (tensors | scales | marker).items()}
    safetensors.torch.save_file(prefixed, file)
    run(file, tmp_path / "model", *SETTINGS)
    run(file, tmp_path / "wide", *SETTINGS, "--dtype", "float32")

    params, wide = stored(tmp_path / "model", "dit"), stored(tmp_path / "wide", "dit")
    query = tensors["blocks.1.self_attn.q.weight"].float() * scales["blocks.1.self_attn.q.scale_weight"]
    np.testing.assert_array_equal(wide["blocks/self_attention/query/kernel"][1], query.numpy().T)
    rounded = query.to(torch.bfloat16).float().numpy().T
    np.testing.assert_array_equal(params["blocks/self_attention/query/kernel"][1].astype(np.float32), rounded)
    assert params["blocks/feed_forward/up/kernel"].dtype == ml_dtypes.bfloat16
    up = tensors["blocks.0.ffn.0.weight"].float().numpy().T
    np.testing.assert_array_equal(params["blocks/feed_forward/up/kernel"][0].astype(np.float32), up)
    assert params["blocks/feed_forward/up/bias"].dtype == np.float32  # of float16, which bfloat16 would round
    assert params["blocks/self_attention/query_norm/scale"].dtype == ml_dtypes.bfloat16
    assert params["text_in/kernel"].dtype == np.float32


def test_a_model_is_completed_one_network_at_a_time(sources, tmp_path, capsys):
    source = sources["official"][0]
    run(source, tmp_path / "whole")
    run(source / torch_folders.WAN_FILES["vae"], tmp_path / "model")
    assert "not in SOURCE: dit, text_encoder, image_encoder" in capsys.readouterr().out
    added = {"README.md": b"ours", ".cache/x": b"x"}
    for name, content in added.items():
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    run(source, tmp_path / "model", "--only", "dit,text_encoder,image_encoder")
    assert contents(tmp_path / "model") == contents(tmp_path / "whole") | added
    capsys.readouterr()
    run(tmp_path / "model", "--verify")
    assert sorted(capsys.readouterr().out.splitlines()[:-1]) == [
        "not of the model: .cache/x",
        "not of the model: README.md",
    ]
    assert "holds vae already" in fails(capsys, source, tmp_path / "model", "--only", "vae")


def test_text_to_video_needs_no_canvas(tmp_path):
    names = torch_folders.tensors("dit", "wan")
    image = ("img_emb.", "k_img", "v_img")
    tensors = {name: tensor for name, tensor in names.items() if not any(part in name for part in image)}
    tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"][:, :16].contiguous()
    safetensors.torch.save_file(tensors, tmp_path / "t2v.safetensors")
    run(tmp_path / "t2v.safetensors", tmp_path / "model", *SETTINGS)
    config = load_model_config(tmp_path / "model")
    assert (config.dit.in_channels, config.dit.image_dim, config.image_encoder, config.drop_frames) == (
        16,
        None,
        None,
        0,
    )


def test_resume_keeps_what_is_finished_and_ends_with_the_same_bytes(sources, tmp_path, capsys, monkeypatch):
    source, out = sources["official"][0], tmp_path / "model"
    run(source, tmp_path / "whole")
    partial = tmp_path / ".model.partial"
    read = StoredTensor.read
    seen: list[str] = []

    def read_until(last: str):
        def read_or_stop(tensor: StoredTensor) -> np.ndarray:
            seen.append(tensor.name)
            if tensor.name == last:
                raise KeyboardInterrupt
            return read(tensor)

        return read_or_stop

    # Cut off in the middle of the DiT, then of the text encoder, then not at all.
    for resume, last in (
        ([], "blocks.1.ffn.0.weight"),
        (["--resume"], "blocks.1.ffn.fc1.weight"),
        (["--resume"], "no tensor"),
    ):
        assert not out.exists()
        journals = [line for file in partial.glob(".*.written") for line in file.read_text().splitlines()]
        done = {line.partition("\t")[2] for line in journals}
        seen.clear()
        monkeypatch.setattr(StoredTensor, "read", read_until(last))
        if last == "no tensor":
            assert "go on with it by --resume" in fails(capsys, source, out)
            assert "begun with another source" in fails(capsys, source, out, "--resume", "--dtype", "bfloat16")
            assert (partial / "dit").is_dir()
            run(source, out, *resume)
        else:
            with pytest.raises(SystemExit) as stopped:
                run(source, out, *resume)
            assert stopped.value.code == 130
            assert f"{partial} keeps what is finished; --resume goes on with it" in capsys.readouterr().out
        if resume:
            assert len(done) > 5
            assert not done & set(seen)
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".model*"))


def test_dry_run_says_what_would_happen_and_writes_nothing(sources, tmp_path, capsys):
    run(sources["diffusers"][0], tmp_path / "model", "--dry_run")
    out = capsys.readouterr().out
    sizes = {network: sum(t.numel() for t in tensors.values()) for network, tensors in sources["diffusers"][1].items()}
    assert f"{sizes['dit']:,}" in out
    assert f"{sizes['vae']:,}" in out
    assert "tokenizer: " in out
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_told_before_writing(sources, tmp_path, capsys, monkeypatch):
    usage = conversion.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "1.00" not in (error := fails(capsys, sources["official"][0], tmp_path / "model"))
    assert "are free" in error
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "out"], "SOURCE nowhere does not exist"),
        (["owner/name", "out"], "pin a revision: owner/name@COMMIT"),
        (["{source}"], "OUT is missing"),
        (["{source}", "out", "--only", "clip"], "--only clip: choose from dit, vae, text_encoder, image_encoder"),
        (["{source}", "out", "--set", "image_encoder.heads=4"], "unknown name 'heads'"),
        (["{source}", "out", "--set", "image_encoder"], "must be FIELD=VALUE"),
        (["{source}", "out", "--set", "dit.num_heads=5"], "does not split into num_heads=5"),
        (
            ["{source}", "out", "--set", "dit.num_layers=3"],
            "'blocks.2.modulation' is missing: expected shape (1, 6, 24)",
        ),
        (["{source}/google", "out"], "holds no weights; expected safetensors"),
        (["{source}", "{source}"], "is no model folder; give another name"),
        (["{source}", "out", "--to", "wan"], "must be a model folder or the file of a LoRA"),
        (["gs://bucket/weights", "out"], "SOURCE gs://bucket/weights: gs:// cannot be read or written"),
        (["{source}", "gs://bucket/model"], "OUT gs:/bucket/model: gs:// cannot be read or written"),
        (["{source}", "{source}/config.json/model"], "config.json is a file, not a folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_costs_nothing(words, message, sources, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *(word.format(source=sources["official"][0]) for word in words))
    assert list(tmp_path.iterdir()) == []


def test_repositories_of_the_hub_are_pinned_and_bring_no_code(sources, tmp_path, monkeypatch):
    asked = {}

    def download(repository, **options):
        asked[repository] = options
        return str(sources["comfy"][0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    commit = "0123456789abcdef0123456789abcdef01234567"
    run(f"owner/name@{commit}", tmp_path / "model", "--only", "vae")
    assert asked["owner/name"]["revision"] == commit
    assert not any(pattern.endswith((".py", "*")) for pattern in asked["owner/name"]["allow_patterns"])


def test_the_tokenizer_goes_both_ways_inside_the_text_encoder_of_comfyui(tmp_path, capsys):
    """Its loader makes its tokenizer of a tensor of bytes in that file."""
    pieces = bytes(range(256)) * 3
    content = torch_folders.tensors("text_encoder", "hf")
    content["spiece_model"] = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
    safetensors.torch.save_file(content, tmp_path / "umt5.safetensors")
    run(tmp_path / "umt5.safetensors", tmp_path / "model")
    assert "tokenizer: spiece.model among the tensors of the text encoder" in capsys.readouterr().out
    assert (tmp_path / "model" / "tokenizer" / "spiece.model").read_bytes() == pieces
    run(tmp_path / "model", tmp_path / "back", "--to", "comfy")
    back = safetensors.torch.load_file(tmp_path / "back" / "text_encoders" / "back_umt5.safetensors")
    assert back["spiece_model"].dtype == torch.uint8
    assert back["spiece_model"].numpy().tobytes() == pieces
    assert torch.equal(
        back["encoder.block.1.layer.1.DenseReluDense.wo.weight"],
        content["encoder.block.1.layer.1.DenseReluDense.wo.weight"],
    )

    # The tokenizer of a source is kept as it is, and that of OUT is, too.
    (tmp_path / "source" / "tokenizer").mkdir(parents=True)
    (tmp_path / "umt5.safetensors").rename(tmp_path / "source" / "umt5.safetensors")
    (tmp_path / "source" / "tokenizer" / "spiece.model").write_bytes(b"its own")
    (tmp_path / "source" / "tokenizer" / "tokenizer.json").write_text("{}")
    run(tmp_path / "source", tmp_path / "whole")
    assert contents(tmp_path / "whole" / "tokenizer") == {"spiece.model": b"its own", "tokenizer.json": b"{}"}
    safetensors.torch.save_file(torch_folders.tensors("vae", "wan"), tmp_path / "vae.safetensors")
    (tmp_path / "vae" / "tokenizer").mkdir(parents=True)
    (tmp_path / "vae.safetensors").rename(tmp_path / "vae" / "vae.safetensors")
    (tmp_path / "vae" / "tokenizer" / "tokenizer.json").write_text("{}")
    run(tmp_path / "vae", tmp_path / "steps")
    (tmp_path / "source" / "umt5.safetensors").rename(tmp_path / "umt5.safetensors")
    run(tmp_path / "umt5.safetensors", tmp_path / "steps")
    assert contents(tmp_path / "steps" / "tokenizer") == {"spiece.model": pieces, "tokenizer.json": b"{}"}
    capsys.readouterr()
    run(tmp_path / "vae", tmp_path / "without")
    plain = torch_folders.tensors("text_encoder", "hf")
    safetensors.torch.save_file(plain, tmp_path / "plain.safetensors")
    run(tmp_path / "plain.safetensors", tmp_path / "without")
    run(tmp_path / "without", tmp_path / "other", "--to", "comfy")
    assert "spiece.model does not exist: ComfyUI will not turn prompts into tokens" in capsys.readouterr().out
    assert set(safetensors.torch.load_file(tmp_path / "other" / "text_encoders" / "other_umt5.safetensors")) == set(
        plain
    )


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_an_export_that_stops_leaves_nothing(error, sources, tmp_path, capsys, monkeypatch):
    run(sources["comfy"][0], tmp_path / "model", "--only", "vae,text_encoder")

    def stop(*arguments):
        raise error

    monkeypatch.setattr(convert_torch_weights.export, "torch_sources", stop)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "model", tmp_path / "back", "--to", "wan")
    assert stopped.value.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert "Traceback" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_fills_up_is_told_and_the_rest_goes_on(sources, tmp_path, capsys, monkeypatch):
    write, count = checkpoint.ParamsWriter.write, itertools.count()

    def fill(writer, *arguments):
        if next(count) == 30:
            # As tensorstore says it.
            raise ValueError(
                "RESOURCE_EXHAUSTED: Error writing \"a/0.0\" [source locations='...'] No space left on device"
            )
        write(writer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ParamsWriter, "write", fill)
        error = fails(capsys, sources["comfy"][0], tmp_path / "model", "--only", "vae")
    assert re.search(r"convert_torch_weights.py: .*vae could not be written: No space left on device\.\n$", error)
    assert not (tmp_path / "model").exists()
    run(sources["comfy"][0], tmp_path / "model", "--only", "vae", "--resume")
    run(sources["comfy"][0], tmp_path / "whole", "--only", "vae")
    assert contents(tmp_path / "model") == contents(tmp_path / "whole")


def test_values_that_are_no_numbers_are_named(sources, tmp_path, capsys):
    tensors = dict(sources["comfy"][1]["vae"])
    tensors["decoder.conv1.bias"] = torch.full_like(tensors["decoder.conv1.bias"], torch.nan)
    safetensors.torch.save_file(tensors, tmp_path / "vae.safetensors")
    run(tmp_path / "vae.safetensors", tmp_path / "model")
    assert "warning: vae: 'decoder.conv1.bias' has values that are infinite or no numbers" in capsys.readouterr().out


def test_values_that_are_no_numbers_are_named_after_a_resume_too(sources, tmp_path, capsys, monkeypatch):
    shutil.copytree(sources["comfy"][0], tmp_path / "source")
    tensors = dict(sources["comfy"][1]["vae"])
    tensors["decoder.conv1.bias"] = torch.full_like(tensors["decoder.conv1.bias"], torch.inf)
    safetensors.torch.save_file(tensors, tmp_path / "source" / torch_folders.COMFY["vae"][2])
    convert_network = conversion.convert_network
    with monkeypatch.context() as patch:
        patch.setattr(
            conversion,
            "convert_network",
            lambda part, *rest: convert_network(part, *rest) if part.network.name == "vae" else 1 / 0,
        )
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "source", tmp_path / "model", "--only", "vae,text_encoder")
    assert (tmp_path / ".model.partial" / "vae").is_dir()
    capsys.readouterr()
    run(tmp_path / "source", tmp_path / "model", "--only", "vae,text_encoder", "--resume")
    assert "warning: vae: 'decoder.conv1.bias' has values" in capsys.readouterr().out


def test_verify_names_a_damaged_file(sources, tmp_path, capsys):
    run(sources["comfy"][0], tmp_path / "model", "--only", "vae")
    run(tmp_path / "model", "--verify")
    file = max((tmp_path / "model" / "vae").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    assert f"{file.relative_to(tmp_path / 'model').as_posix()} is damaged" in fails(
        capsys, tmp_path / "model", "--verify"
    )
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"has {len(content) - 1} bytes, expected {len(content)}"):
        checkpoint.restore_model(tmp_path / "model", {}, verify=False)  # sizes are compared even so


def test_sampling_and_safetensors_need_no_torch(sources, tmp_path):
    shutil.copy(sources["comfy"][0] / torch_folders.COMFY["vae"][2], tmp_path / "vae.safetensors")
    code = (
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name == 'torch' else find(name, *rest))\n"
        "import magref_jax.pipeline, sample, convert_torch_weights\n"
        f"convert_torch_weights.main([{str(tmp_path / 'vae.safetensors')!r}, {str(tmp_path / 'model')!r}])\n"
        "assert 'torch' not in __import__('sys').modules\n"
        "sample.main(['--help'])\n"
    )
    root = pathlib.Path(convert_torch_weights.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--prompt" in done.stdout
    assert (tmp_path / "model" / "vae").is_dir()


def test_a_lora_is_given_the_names_of_other_programs(tmp_path, capsys):
    rng = np.random.default_rng(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(torch.bfloat16)

    kohya = {
        "lora_unet_blocks_1_cross_attn_k_img.lora_down.weight": random(4, 24),
        "lora_unet_blocks_1_cross_attn_k_img.lora_up.weight": random(24, 4),
        "lora_unet_blocks_1_cross_attn_k_img.alpha": torch.tensor(2.0, dtype=torch.bfloat16),
    }
    safetensors.torch.save_file(kohya, tmp_path / "lora.safetensors")
    dit = torch_folders.CONFIG.dit
    fields = ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len", "image_dim", "freq_dim")
    settings = [word for field in fields for word in ("--set", f"dit.{field}={getattr(dit, field)}")]
    run(tmp_path / "lora.safetensors", tmp_path / "original.safetensors", "--to", "comfy", *settings)
    assert "3 of 3 keys matched" in capsys.readouterr().out
    name = "diffusion_model.blocks.1.cross_attn.k_img"
    original = safetensors.torch.load_file(tmp_path / "original.safetensors")
    assert set(original) == {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"}
    assert torch.equal(original[f"{name}.lora_up.weight"], kohya["lora_unet_blocks_1_cross_attn_k_img.lora_up.weight"])
    run(tmp_path / "original.safetensors", tmp_path / "back.safetensors", "--to", "wan", *settings)
    back = safetensors.torch.load_file(tmp_path / "back.safetensors")
    assert back.keys() == kohya.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in kohya.items())
    run(tmp_path / "lora.safetensors", tmp_path / "peft.safetensors", "--to", "diffusers", *settings)
    assert "transformer.blocks.1.attn2.add_k_proj.lora_A.weight" in safetensors.torch.load_file(
        tmp_path / "peft.safetensors"
    )
    # The folder of PEFT: alpha, which lies beside the tensors there, goes with them.
    (tmp_path / "adapter").mkdir()
    peft = {f"base_model.model.blocks.0.self_attn.q.lora_{half}.weight": random(8, 24) for half in "A"}
    peft |= {name.replace("_A", "_B"): tensor.T.contiguous() for name, tensor in peft.items()}
    safetensors.torch.save_file(peft, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"lora_alpha": 32, "r": 8}')
    run(tmp_path / "adapter", tmp_path / "kohya.safetensors", "--to", "wan", *settings)
    assert "alpha/rank 4 from adapter_config.json" in capsys.readouterr().out
    assert safetensors.torch.load_file(tmp_path / "kohya.safetensors")["lora_unet_blocks_0_self_attn_q.alpha"] == 32
    error = fails(capsys, tmp_path / "lora.safetensors", tmp_path / "other.safetensors", "--to", "wan")
    assert "expected (4, 5120)" in error or "expected ('rank', 5120)" in error
    assert not (tmp_path / "other.safetensors").exists()
