"""Checkpoints as people hold them: other names, other files and other precisions of the same weights give the same model.

What is expected is the conversion of the plain files, and torch's own arithmetic where values are scaled.
"""

import enum
import functools
import json
import pathlib
import pickle
import re
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint

import convert_torch_weights
from magref_jax import checkpoint, pipeline
from magref_jax.convert import sources
from tests.torch_folders import COMFY, HF_CONFIGS, SETTINGS, Tensors, save_sharded, tensors

OPTIONS = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture(autouse=True)
def shapes_once(monkeypatch):
    """Tracing four networks for their shapes costs more than converting them at this size."""
    monkeypatch.setattr(pipeline, "abstract_params", SHAPES)


SHAPES = functools.cache(pipeline.abstract_params)


def run(*words) -> None:
    convert_torch_weights.main([str(word) for word in words])


def fails(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    _, name, message = error.rpartition("convert_torch_weights.py: ")  # a progress bar may stand before it
    assert name
    return message


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {path: store.read().result() for path, store in checkpoint.open_params(folder).items()}


def made(network: str, seed: int = 0) -> Tensors:
    """Of the names that single files have."""
    return tensors(network, COMFY[network][0], seed=seed)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Callable[[str], dict[str, bytes]]:
    """What the plain file of a network is converted to."""

    @functools.cache
    def convert(network: str) -> dict[str, bytes]:
        folder = tmp_path_factory.mktemp(network)
        safetensors.torch.save_file(made(network), folder / "plain.safetensors")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "abstract_params", SHAPES)
            run(folder / "plain.safetensors", folder / "model", *(OPTIONS if network == "dit" else ()))
        return contents(folder / "model" / network)

    return convert


# Names


def everywhere(wrapper: str, name: str) -> str:
    """FSDP and activation checkpoints wrap the blocks too."""
    return re.sub(r"^(blocks\.\d+\.)?", lambda found: f"{wrapper}{found[0]}{wrapper if found[0] else ''}", name)


WRAPPED: dict[str, tuple[Callable[[str], str], str]] = {
    **{
        prefix: (functools.partial(str.__add__, prefix), prefix)
        for prefix in (
            "_orig_mod.",
            "module._orig_mod.",
            "pipe.dit.",
            "transformer.",
            "diffusion_model.model.",
            "model.model.",
        )
    },
    "fsdp": (functools.partial(everywhere, "_fsdp_wrapped_module."), "_fsdp_wrapped_module"),
    "checkpointed": (
        lambda name: re.sub(r"^(blocks\.\d+)\.", r"\1._checkpoint_wrapped_module.", name),
        "_checkpoint_wrapped_module",
    ),
    "all": (
        lambda name: "module._orig_mod." + everywhere("_fsdp_wrapped_module._checkpoint_wrapped_module.", name),
        "module._orig_mod._fsdp_wrapped_module._checkpoint_wrapped_module",
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_of_training_frameworks_are_taken_off(name, plain, tmp_path, capsys):
    wrap, said = WRAPPED[name]
    safetensors.torch.save_file({wrap(key): t for key, t in made("dit").items()}, tmp_path / "dit.safetensors")
    run(tmp_path / "dit.safetensors", tmp_path / "model", *OPTIONS)
    assert contents(tmp_path / "model" / "dit") == plain("dit")
    plan = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("dit: names are taken without")
    )
    assert all(part in plan for part in said.rstrip(".").split("."))


def test_one_name_in_two_wrappers_is_refused(tmp_path, capsys):
    content = made("dit")
    content["blocks.0._orig_mod.ffn.0.bias"] = content["blocks.0.ffn.0.bias"].clone()
    safetensors.torch.save_file(content, tmp_path / "dit.safetensors")
    assert "are one name in different wrappers" in fails(capsys, tmp_path / "dit.safetensors", tmp_path / "model")


def test_a_checkpoint_of_all_networks_is_split(plain, tmp_path):
    # As ComfyUI saves them, and with what it saves beside the weights.
    prefixes = {
        "dit": "model.diffusion_model.",
        "vae": "vae.",
        "text_encoder": "text_encoders.umt5xxl.transformer.",
        "image_encoder": "clip_vision.vision_model.",
    }
    content = {prefix + name: t for network, prefix in prefixes.items() for name, t in made(network).items()}
    content["text_encoders.umt5xxl.logit_scale"] = torch.tensor(4.6)
    content["text_encoders.spiece_model"] = torch.tensor(list(b"pieces"), dtype=torch.uint8)
    content["clip_vision.visual_projection.weight"] = torch.ones(3, 160)
    for number, (old, new) in enumerate([("", ""), ("vae.", "first_stage_model.")]):
        file = tmp_path / f"all_{number}.safetensors"
        renamed = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in content.items()}
        safetensors.torch.save_file(renamed, file)
        run(file, tmp_path / f"model_{number}", *OPTIONS)
        for network in prefixes:
            assert contents(tmp_path / f"model_{number}" / network) == plain(network)
        assert (tmp_path / f"model_{number}" / "tokenizer" / "spiece.model").read_bytes() == b"pieces"


# Files


def save_bin_shards(folder: pathlib.Path, content: Tensors) -> None:
    names = sorted(content)
    files = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for number, file in enumerate(files):
        torch.save({name: content[name] for name in names[number::2]}, folder / file)
    weight_map = {name: files[index % 2] for index, name in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_variant_shards(folder: pathlib.Path, content: Tensors, old: bool) -> None:
    """Names that diffusers has for half precision, before and since 2024."""
    save_sharded(folder / "model", content)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / "model.safetensors.index.json").unlink()
    for file in set(index["weight_map"].values()):
        number = file.removeprefix("model-").removesuffix(".safetensors")
        new = f"model.fp16-{number}.safetensors" if old else f"model-{number}.fp16.safetensors"
        (folder / file).rename(folder / new)
        index["weight_map"] = {name: new if f == file else f for name, f in index["weight_map"].items()}
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps(index))


def save_distributed(folder: pathlib.Path, content: dict) -> None:
    torch.distributed.checkpoint.save(content, checkpoint_id=folder, no_dist=True)


FILES: dict[str, Callable[[pathlib.Path, Tensors], object]] = {
    **{
        suffix: lambda folder, content, suffix=suffix: torch.save(content, folder / f"dit{suffix}")
        for suffix in (".pth", ".pt", ".ckpt", ".bin")
    },
    "bin_shards": save_bin_shards,
    "fp16_shards": functools.partial(save_variant_shards, old=True),
    "fp16_shards_new": functools.partial(save_variant_shards, old=False),
    "fp16": lambda folder, content: safetensors.torch.save_file(content, folder / "model.fp16.safetensors"),
    "distributed": save_distributed,
    "distributed_with_optimizer": lambda folder, content: save_distributed(
        folder,
        {
            "model": {f"_orig_mod.{name}": tensor for name, tensor in content.items()},
            "optim": {"state": {name: {"exp_avg": torch.zeros_like(tensor)} for name, tensor in content.items()}},
            "step": 7,
        },
    ),
    "lightning": lambda folder, content: torch.save(
        {
            "state_dict": {f"model.{name}": tensor for name, tensor in content.items()},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
            "global_step": 3,
        },
        folder / "last.ckpt",
    ),
    "with_optimizer": lambda folder, content: torch.save(
        {
            "model": content,
            "optimizer": {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(2)}}, "param_groups": [{}]},
            "step": torch.tensor(3),
        },
        folder / "dit.pth",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_other_files_of_the_same_weights(kind, plain, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    FILES[kind](folder, made("dit"))
    for stranger in (".DS_Store", "._model.safetensors", "._model.safetensors.index.json"):
        (folder / stranger).write_bytes(b"\x00\x05\x16\x07")
    for stranger in ("optimizer.bin", "training_args.bin", "README.md", "thumbs.db"):
        (folder / stranger).write_bytes(b"something else")
    (folder / ".cache").mkdir()
    run(folder, tmp_path / "model", *OPTIONS)
    assert contents(tmp_path / "model" / "dit") == plain("dit")


def test_the_full_weights_are_taken_where_halves_lie_beside_them(plain, tmp_path, capsys):
    folder = tmp_path / "source"
    folder.mkdir()
    half = {name: tensor.half() for name, tensor in made("dit").items()}
    save_variant_shards(folder, half, old=True)
    torch.save(half, folder / "pytorch_model.bin")
    save_sharded(folder / "model", made("dit"))
    run(folder, tmp_path / "model", *OPTIONS)
    assert contents(tmp_path / "model" / "dit") == plain("dit")
    out = capsys.readouterr().out
    assert re.search(r"left out: .*model\.fp16-00001-of-00002\.safetensors: the same weights as .*model-00001", out)
    assert re.search(r"left out: .*pytorch_model\.bin: the same weights as", out)


def test_a_missing_index_is_named_as_it_is_called(tmp_path, capsys):
    save_variant_shards(tmp_path, made("dit"), old=True)
    (tmp_path / "model.safetensors.index.fp16.json").unlink()
    assert "model.safetensors.index.fp16.json, which says what is in which, is missing" in fails(
        capsys, tmp_path, tmp_path / "model"
    )


def touch(path: str):
    class Command:
        def __reduce__(self):
            return pathlib.Path.touch, (pathlib.Path(path),)

    return Command()


def test_the_description_of_a_distributed_checkpoint_runs_nothing(tmp_path, capsys):
    save_distributed(tmp_path / "source", made("dit"))
    metadata = pickle.loads((tmp_path / "source" / ".metadata").read_bytes())
    good = pickle.dumps(metadata)
    metadata.planner_data = touch(str(tmp_path / "ran"))
    (tmp_path / "source" / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "was not loaded" in fails(capsys, tmp_path / "source", tmp_path / "model")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "source" / ".metadata").write_bytes(good)
    file = tmp_path / "source" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    assert "__0_0.distcp is cut off" in fails(capsys, tmp_path / "source", tmp_path / "model")
    file.unlink()
    assert "__0_0.distcp, which is missing" in fails(capsys, tmp_path / "source", tmp_path / "model")
    assert not (tmp_path / "model").exists()


class _Pickler(pickle.Pickler):
    """Pickles values of one kind as attributes: members of enumerations, as Python 3.11.2 does, or paths, as nothing does."""

    def __init__(self, file, kind):
        super().__init__(file)
        self.kind = kind

    def reducer_override(self, value):
        if isinstance(value, self.kind):
            return getattr, (type(value), "name" if isinstance(value, pathlib.PurePath) else value.name)
        return NotImplemented


@pytest.mark.parametrize(("kind", "is_read"), [(enum.Enum, True), (pathlib.PurePath, False)])
def test_attributes_in_the_description_are_members_of_enumerations_alone(tmp_path, capsys, kind, is_read):
    save_distributed(tmp_path / "source", made("dit"))
    metadata = pickle.loads((tmp_path / "source" / ".metadata").read_bytes())
    metadata.storage_meta.checkpoint_id = pathlib.Path("elsewhere")
    with (tmp_path / "source" / ".metadata").open("wb") as file:
        _Pickler(file, kind).dump(metadata)
    command = tmp_path / "source", tmp_path / "model", "--dry_run"
    if is_read:
        run(*command, *OPTIONS)
        assert "dit" in capsys.readouterr().out
    else:
        assert "it asks for 'name' of" in fails(capsys, *command)


# Several sets of weights

SETS: dict[str, tuple[tuple[str, ...], str, str]] = {  # the keys in a file, what is asked for, what is taken
    "model": (("model",), "", "model"),
    "state_dict": (("state_dict",), "", "state_dict"),
    "module": (("module",), "", "module"),
    "ema": (("ema",), "", "ema"),
    "generator": (("generator", "critic"), "", "generator"),
    "generator_ema": (("generator", "generator_ema", "critic"), "", "generator_ema"),
    "ema_first": (("model", "ema"), "", "ema"),
    "asked_model": (("model", "ema"), "model", "model"),
    "asked_critic": (("generator", "generator_ema", "critic"), "critic", "critic"),
}


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", SETS)
def test_the_set_of_weights_is_found_and_said(name, flat, plain, tmp_path, capsys):
    keys, asked, taken = SETS[name]
    content = {key: made("dit", seed=0 if key == taken else 1 + number) for number, key in enumerate(keys)}
    if flat:
        named = {f"{key}.{name}": tensor for key, held in content.items() for name, tensor in held.items()}
        safetensors.torch.save_file(named, tmp_path / "dit.safetensors")
    else:
        torch.save({**content, "step": 12, "config": {"lr": 1e-4}}, tmp_path / "dit.pth")
    file = tmp_path / ("dit.safetensors" if flat else "dit.pth")
    run(file, tmp_path / "model", *OPTIONS, *(["--set", f"source.key={asked}"] if asked else []))
    assert contents(tmp_path / "model" / "dit") == plain("dit")
    out = capsys.readouterr().out
    others = sorted(set(keys) - {taken})
    average = ", the moving average," if "ema" in taken else ""
    assert not others or f"dit: {taken}{average} is taken, not {', '.join(others)}; --set source.key=KEY" in out
    assert bool(others or average) == (f"dit: {taken}{average} is taken" in out)


@pytest.mark.parametrize(
    ("keys", "asked", "message"),
    [
        (("critic",), None, "dit lies under a key that is unknown here: critic. Choose one by --set source.key=KEY"),
        (("model", "student"), None, "dit lies under these keys: model, student. Choose one by"),
        (
            ("model", "ema"),
            "generator",
            "--set source.key=generator: no weights lie under this key; there are ema, model",
        ),
    ],
)
def test_a_set_that_cannot_be_told_is_asked_for(keys, asked, message, tmp_path, capsys):
    torch.save({key: made("dit") for key in keys}, tmp_path / "dit.pth")
    words = ["--set", f"source.key={asked}"] if asked else []
    assert message in fails(capsys, tmp_path / "dit.pth", tmp_path / "model", *OPTIONS, *words)
    assert not (tmp_path / "model").exists()


def test_another_set_of_weights_is_another_conversion(tmp_path, capsys, monkeypatch):
    torch.save({"model": made("vae"), "ema": made("vae", seed=1)}, tmp_path / "vae.pth")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ParamsWriter, "finish", lambda writer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "vae.pth", tmp_path / "model")
    words = (tmp_path / "vae.pth", tmp_path / "model", "--resume")
    assert "begun with another source" in fails(capsys, *words, "--set", "source.key=model")
    run(*words)


# 8-bit floats


def row_scales(weight: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, len(weight))


def block_scales(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = (-(-size // 128) for size in weight.shape)
    return torch.linspace(0.5, 1.5, rows * columns).reshape(rows, columns)


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What torch multiplies with, element by element."""
    if scale.numel() == 1:
        return scale.reshape(()).expand(shape)
    if len(scale) == shape[0]:
        return scale.reshape(len(scale), -1).repeat_interleave(shape[1] // (scale.numel() // len(scale)), dim=1)
    return torch.kron(scale, torch.ones(128, 128))[: shape[0], : shape[1]]


SCALES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tensor": lambda weight: torch.tensor(0.37),
    "tensor_of_one": lambda weight: torch.tensor([0.37]),
    "tensor_in_bfloat16": lambda weight: torch.tensor(0.37, dtype=torch.bfloat16),
    "rows": row_scales,
    "rows_and_1": lambda weight: row_scales(weight)[:, None],
    "blocks_of_rows": lambda weight: torch.linspace(0.5, 1.5, 4 * len(weight)).reshape(-1, 4, 1),
    "blocks": block_scales,
}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("suffix", sources.SCALES)
def test_scaled_8_bit_floats_are_those_of_torch(suffix, dtype, tmp_path):
    # A tower of 160 channels: wider than a block of 128, and no multiple of it.
    content = made("image_encoder")
    expected: Tensors = {}
    content |= {f"{prefix}scaled_fp8": torch.zeros(2).to(dtype) for prefix in ("", "encoder.")}
    modules = [name.removesuffix(".weight") for name in content if re.fullmatch(r".*(_proj|fc1)\.weight", name)]
    for number, module in enumerate(modules):
        weight = (content[f"{module}.weight"] * 8).to(dtype)
        scale = list(SCALES.values())[number % (1 + len(SCALES))] if number % (1 + len(SCALES)) < len(SCALES) else None
        content[f"{module}.weight"] = weight
        expected[module] = weight.float()  # without a scale, beside scaled ones
        if scale is not None:
            content[module + suffix] = scale(weight)
            content[f"{module}.scale_input"] = torch.tensor(3.0)
            expected[module] = weight.float() * spread(scale(weight).float(), weight.shape)
    assert len(modules) > len(SCALES)
    safetensors.torch.save_file(content, tmp_path / "clip.safetensors")
    run(tmp_path / "clip.safetensors", tmp_path / "model", "--dtype", "float32")
    params = stored(tmp_path / "model" / "image_encoder")
    ours = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    compared = 0
    for module, values in expected.items():
        _, _, layer, part, own = module.split(".")
        if layer == "2":  # the block that our tower ends before
            continue
        path = f"blocks/self_attention/{ours[own]}" if part == "self_attn" else "blocks/feed_forward/up"
        np.testing.assert_array_equal(params[f"{path}/kernel"][int(layer)], values.numpy().T, err_msg=module)
        compared += 1
    assert compared > len(SCALES)


# What is known and not supported


def with_tensor(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda content: content | {name: torch.ones(shape)}


def widened(channels: int, image: bool = True, out: int = 16) -> Callable[[Tensors], Tensors]:
    def change(content: Tensors) -> Tensors:
        content = {name: t for name, t in content.items() if image or not re.search("img", name)}
        content["patch_embedding.weight"] = torch.ones(24, channels, 1, 2, 2)
        return content | {"head.head.weight": torch.ones(4 * out, 24), "head.head.bias": torch.ones(4 * out)}

    return change


FOREIGN: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "flf2v": ("dit", with_tensor("img_emb.emb_pos", 1, 514, 28), "a first and a last frame"),
    "vace": ("dit", with_tensor("vace_blocks.0.before_proj.weight", 24, 24), "VACE"),
    "vace_module": ("dit", lambda content: {"vace_patch_embedding.weight": torch.ones(24, 96, 1, 2, 2)}, "VACE"),
    "fun_control": ("dit", widened(48), "Fun-Control"),
    "fun_control_2.2": ("dit", widened(52, image=False), "Fun-Control"),
    "fun_reference": ("dit", with_tensor("ref_conv.weight", 24, 16, 2, 2), "Fun-Control"),
    "fun_camera": ("dit", with_tensor("control_adapter.conv.weight", 24, 24, 2, 2), "camera"),
    "animate": ("dit", with_tensor("face_adapter.fuser_blocks.0.k_norm.weight", 24), "Wan-Animate"),
    "s2v": ("dit", with_tensor("casual_audio_encoder.encoder.final_linear.weight", 24, 24), "S2V"),
    "humo": ("dit", with_tensor("blocks.0.audio_cross_attn.k.weight", 24, 24), "sound"),
    "ti2v_5b": ("dit", widened(48, image=False, out=48), "TI2V 5B"),
    "i2v_half": ("dit", widened(36, image=False), "half of a model"),
    "vae_48": (
        "vae",
        lambda content: {
            "encoder.conv1.weight": torch.ones(4, 12, 3, 3, 3),
            "encoder.downsamples.0.downsamples.0.residual.0.gamma": torch.ones(4, 1, 1, 1),
        },
        "48 latent channels",
    ),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model._orig_mod."], ids=["plain", "wrapped"])
@pytest.mark.parametrize("name", FOREIGN)
def test_models_that_are_not_supported_are_named(name, prefix, tmp_path, capsys):
    network, change, what = FOREIGN[name]
    content = {prefix + key: tensor.clone() for key, tensor in change(made(network)).items()}
    safetensors.torch.save_file(content, tmp_path / "file.safetensors")
    error = fails(capsys, tmp_path / "file.safetensors", tmp_path / "out" / "model", *OPTIONS)
    assert what in error
    assert "Not supported; nothing was written" in error
    assert not (tmp_path / "out").exists()


HALVES = (
    "wan2.2_t2v_high_noise_14B.safetensors",
    "Wan2_2-T2V-A14B-LOW_bf16.safetensors",
    "high_noise_model/model.safetensors",
    "transformer_2/model.safetensors",
)


@pytest.mark.parametrize("name", HALVES)
def test_half_of_a_pair_is_named(name, tmp_path, capsys):
    content = widened(16, image=False)(made("dit"))
    file = tmp_path / "source" / name
    file.parent.mkdir(parents=True)
    safetensors.torch.save_file(content, file)
    for source in (file, tmp_path / "source"):
        assert "half of a model" in fails(capsys, source, tmp_path / "model", *OPTIONS)
    file = file.rename(tmp_path / "source" / "low.safetensors")
    run(file, tmp_path / "model", *OPTIONS)


def test_a_pipeline_of_two_transformers_is_named_and_its_vae_taken(plain, tmp_path, capsys):
    source = tmp_path / "source"
    for folder in ("transformer", "transformer_2", "vae"):
        (source / folder).mkdir(parents=True)
        network = "vae" if folder == "vae" else "dit"
        safetensors.torch.save_file(made(network), source / folder / "diffusion_pytorch_model.safetensors")
    index = {"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9}
    index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
    (source / "model_index.json").write_text(json.dumps(index))
    for path in (source, source / "transformer"):
        assert "Wan 2.2, two transformers" in fails(capsys, path, tmp_path / "model", *OPTIONS)
    assert not (tmp_path / "model").exists()
    run(source, tmp_path / "model", "--only", "vae")
    assert contents(tmp_path / "model" / "vae") == plain("vae")
    # Wan 2.1 in the same version of diffusers.
    (source / "model_index.json").write_text(json.dumps({"boundary_ratio": None, "transformer_2": [None, None]}))
    run(source / "transformer", tmp_path / "one", *OPTIONS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wan2.1-i2v-14b-Q8_0.gguf", "the gguf package"),
        ("mp_rank_00_model_states.pt", "python zero_to_fp32.py . WEIGHTS --safe_serialization"),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "python zero_to_fp32.py"),
        ("zero_pp_rank_3_mp_rank_00_model_states.pt", "python zero_to_fp32.py"),
    ],
)
def test_other_formats_are_named_with_what_turns_them_into_safetensors(name, message, tmp_path, capsys):
    file = tmp_path / "source" / "global_step100" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGUF")
    for source in (file, file.parent, tmp_path / "source"):
        assert message in fails(capsys, source, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    # Beside weights they are strangers.
    safetensors.torch.save_file(made("vae"), tmp_path / "source" / "vae.safetensors")
    run(tmp_path / "source", tmp_path / "model")
    assert f"left out: {file} is" in capsys.readouterr().out


def test_config_of_diffusers_is_read_for_its_own_network_alone(tmp_path):
    """In a file of several networks, config.json is that of one of them."""
    content = {f"transformer.{name}": t for name, t in tensors("dit", "hf").items()}
    content |= {f"vae.{name}": t for name, t in tensors("vae", "hf").items()}
    safetensors.torch.save_file(content, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIGS["dit"]))
    found = sources.read_source(tmp_path).networks
    assert found["dit"].config["num_heads"] == 2
    assert found["dit"].config["text_len"] == 16
    assert found["vae"].config["base_dim"] == 4
