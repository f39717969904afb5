"""Merged weights against torch, through five spellings of one LoRA; and what diffusers makes of the files we write."""

import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, safe_open, save_file

from magref_jax.config import DiTConfig
from magref_jax.convert.dit import dit_rules
from magref_jax.convert.lora import Lora, apply_loras, read_lora, write_lora
from magref_jax.convert.rules import convert, to_torch, torch_shapes
from magref_jax.models.dit import DiT
from tests.parity.torch_random import random_tensors

pytestmark = pytest.mark.parity

CONFIG = DiTConfig(
    dim=16,
    ffn_dim=24,
    num_heads=2,
    num_layers=2,
    in_channels=12,
    out_channels=5,
    text_dim=20,
    text_len=6,
    image_dim=28,
    freq_dim=8,
)
ATTENTION = [f"{kind}_attn.{name}" for kind in ("self", "cross") for name in "qkvo"]
BLOCK_LINEARS = [*ATTENTION, "cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"]
OTHER_LINEARS = ["text_embedding.0", "time_embedding.2", "time_projection.1", "img_emb.proj.3", "head.head"]

Tensors = dict[str, torch.Tensor]


@functools.cache
def abstract_params() -> Any:
    inputs = (1, 1, 2, 2, CONFIG.in_channels), (1,), (1, CONFIG.text_len, CONFIG.text_dim), (1, 1, CONFIG.image_dim)
    shapes = jax.eval_shape(DiT(CONFIG).init, jax.random.key(0), *(jnp.zeros(shape) for shape in inputs))["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)


@functools.cache
def base() -> Tensors:
    tensors = random_tensors(torch_shapes(dit_rules(CONFIG), abstract_params()), seed=1)
    return {name: torch.from_numpy(tensor).bfloat16() for name, tensor in tensors.items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


@functools.cache
def params() -> Any:
    return convert(dit_rules(CONFIG), {name: to_numpy(tensor) for name, tensor in base().items()}, abstract_params())


def merged(*loras: tuple[Lora, float]) -> dict[str, np.ndarray]:
    """By their original names."""
    return to_torch(dit_rules(CONFIG), apply_loras(params(), loras))


def bfloat16_steps(actual: np.ndarray, expected: torch.Tensor) -> np.ndarray:
    """How many bfloat16 numbers lie between, plus one."""
    assert actual.dtype == ml_dtypes.bfloat16
    assert actual.shape == tuple(expected.shape)

    def rank(array: np.ndarray) -> np.ndarray:
        bits = array.view(np.int16).astype(np.int32)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    return np.abs(rank(actual) - rank(to_numpy(expected)))


def check(actual: Mapping[str, np.ndarray], expected: Mapping[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert bfloat16_steps(actual[name], tensor).max() <= 1, name


RANK, ALPHA = 4, 2.0  # a power of two, so that the scaled bias of a PEFT pair is the same number


def make_lora(seed: int) -> tuple[Tensors, Tensors]:
    """Modules' down and up, and what is added to whole tensors, all by their original names."""
    generator = torch.Generator().manual_seed(seed)

    def randn(shape: torch.Size | tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return (0.5 * torch.randn(tuple(shape), generator=generator)).to(dtype)

    modules = [f"blocks.{layer}.{name}" for layer in range(2) for name in BLOCK_LINEARS]
    pairs: Tensors = {}
    for module in [*modules, *OTHER_LINEARS, "patch_embedding"]:
        out, *fan_in = base()[f"{module}.weight"].shape
        pairs[f"{module}.down"] = randn((RANK, *fan_in))
        pairs[f"{module}.up"] = randn((out, RANK, *(1 for _ in fan_in[1:])))
    whole = ["blocks.0.norm3.weight", "blocks.1.norm3.bias", "blocks.1.cross_attn.norm_k_img.weight", "head.modulation"]
    whole += ["blocks.0.modulation", "blocks.1.modulation", "blocks.0.ffn.2.weight", "patch_embedding.weight"]
    whole += ["blocks.0.self_attn.q.bias", "blocks.1.ffn.0.bias", "head.head.bias"]
    return pairs, {name: randn(base()[name].shape, torch.float32) for name in whole}


def torch_delta(pairs: Tensors, whole: Tensors, scale: float = ALPHA / RANK) -> Tensors:
    delta = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in base().items()}
    for module in {name.rpartition(".")[0] for name in pairs}:
        down, up = (pairs[f"{module}.{end}"].float().flatten(1) for end in ("down", "up"))
        delta[f"{module}.weight"] += scale * (up @ down).reshape(delta[f"{module}.weight"].shape)
    for name, tensor in whole.items():
        delta[name] += tensor
    return delta


def torch_merge(*deltas: tuple[Tensors, float]) -> Tensors:
    return {
        name: (tensor.float() + sum(strength * delta[name] for delta, strength in deltas)).bfloat16()
        for name, tensor in base().items()
    }


def diffusers_name(name: str) -> str:
    (converted,) = convert_wan_transformer_to_diffusers({name: 0})
    return converted


SUFFIXES = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}


def spell(
    pairs: Tensors, whole: Tensors, prefix: str, ends: tuple[str, str], dot: str = ".", renamed: bool = False
) -> Tensors:
    def key(module: str) -> str:
        module = diffusers_name(f"{module}.weight").removesuffix(".weight") if renamed else module
        return prefix + module.replace(".", dot)

    ends_by_half = dict(zip(("down", "up"), ends, strict=True))
    spelled = {}
    for name, tensor in pairs.items():
        module, _, half = name.rpartition(".")
        spelled[f"{key(module)}.{ends_by_half[half]}.weight"] = tensor
    for name, tensor in whole.items():
        module, _, leaf = name.rpartition(".")
        # The two names of a module's modulation are of one module, but for that of the head.
        module = module if leaf == "modulation" else key(module).removeprefix(prefix)
        spelled[f"{prefix}{module.replace('.', dot)}.{SUFFIXES[leaf]}"] = tensor
    return spelled


def with_alphas(spelled: Tensors) -> Tensors:
    """Each module's alpha beside its pair."""
    modules = {name.partition(".lora_")[0] for name in spelled if ".lora_" in name}
    return spelled | {f"{module}.alpha": torch.tensor(ALPHA, dtype=torch.bfloat16) for module in modules}


def with_lora_bias(spelled: Tensors) -> Tensors:
    """Differences of biases as PEFT has them, which is before the scaling."""
    return {
        name.replace(".diff_b", ".lora_B.bias") if is_bias else name: tensor * (RANK / ALPHA) if is_bias else tensor
        for name, tensor in spelled.items()
        for is_bias in [name.endswith(".diff_b") and "norm" not in name]
    }


def spellings(pairs: Tensors, whole: Tensors) -> dict[str, tuple[Tensors, dict[str, str]]]:
    metadata = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "text_encoder.lora_alpha": 9}
    return {
        "kohya": (with_alphas(spell(pairs, whole, "lora_unet_", ("lora_down", "lora_up"), "_")), {}),
        "videox": (with_alphas(spell(pairs, whole, "lora_unet__", ("lora_down", "lora_up"), "_")), {}),
        "diffusers": (
            # The head's modulation has no module in diffusers.
            with_lora_bias(spell(pairs, whole, "transformer.", ("lora_A", "lora_B"), renamed=True)),
            {"lora_adapter_metadata": json.dumps(metadata)},
        ),
        "original": (with_alphas(spell(pairs, whole, "diffusion_model.", ("lora_down", "lora_up"))), {}),
        "peft": (
            with_alphas(spell(pairs, whole, "base_model.model.", ("lora_A.default", "lora_B.default"))),
            {},
        ),
    }


def save(path: pathlib.Path, tensors: Tensors, metadata: dict[str, str]) -> pathlib.Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata or None)
    return path


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lora]:
    folder = tmp_path_factory.mktemp("loras")
    loras = {}
    for name, (tensors, metadata) in spellings(*make_lora(seed=2)).items():
        path = save(folder / f"{name}.safetensors", tensors, metadata)
        loras[name] = read_lora(path, CONFIG, abstract_params())
        assert (loras[name].matched, loras[name].unmatched) == (len(tensors), ())
    return loras


def test_five_spellings_merge_as_torch_does(five):
    expected = torch_merge((torch_delta(*make_lora(seed=2)), 1.0))
    changed = {name for name, tensor in expected.items() if not torch.equal(tensor, base()[name])}
    assert len(changed) == 2 * len(BLOCK_LINEARS) + len(OTHER_LINEARS) + 1 + 9
    results = {name: merged((lora, 1.0)) for name, lora in five.items()}
    for result in results.values():
        check(result, expected)
    for name in expected:
        assert len({result[name].tobytes() for result in results.values()}) == 1, name


def test_strength_and_two_loras_merge_as_torch_does(five, tmp_path):
    second = make_lora(seed=3)
    path = save(tmp_path / "second.safetensors", *spellings(*second)["diffusers"])
    lora = read_lora(path, CONFIG, abstract_params())
    first = torch_delta(*make_lora(seed=2))
    check(merged((five["kohya"], 0.5)), torch_merge((first, 0.5)))
    check(merged((five["original"], 0.5), (lora, -1.25)), torch_merge((first, 0.5), (torch_delta(*second), -1.25)))


def test_without_alpha_nothing_is_scaled(tmp_path):
    pairs, _ = make_lora(seed=2)
    path = save(tmp_path / "a.safetensors", spell(pairs, {}, "diffusion_model.", ("lora_A", "lora_B")), {})
    check(merged((read_lora(path, CONFIG, abstract_params()), 1.0)), torch_merge((torch_delta(pairs, {}, 1.0), 1.0)))


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
def test_an_adapter_of_peft_merges_as_torch_does(tmp_path, suffix):
    """With ranks and alphas by module, alpha/√rank, and biases; alpha is beside the tensors and nowhere else."""
    pairs, _ = make_lora(seed=4)
    pairs["blocks.1.ffn.0.down"], pairs["blocks.1.ffn.0.up"] = (
        pairs["blocks.1.ffn.0.down"][:2].clone(),
        pairs["blocks.1.ffn.0.up"][:, :2].clone(),
    )
    bias = 0.5 * torch.randn(16, generator=torch.Generator().manual_seed(5))
    tensors = spell(pairs, {}, "base_model.model.", ("lora_A", "lora_B"))
    tensors["base_model.model.blocks.0.self_attn.q.lora_B.bias"] = bias
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "use_rslora": True, "lora_bias": True}
    config |= {"rank_pattern": {"blocks.1.ffn.0": 2}, "alpha_pattern": {"^blocks.0.self_attn.q": 5, "k_img": 7}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = tmp_path / f"adapter_model.{suffix}"
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    (save_file if suffix == "safetensors" else torch.save)(tensors, path)

    expected = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in base().items()}
    for module in {name.rpartition(".")[0] for name in pairs}:
        alpha = 5 if module == "blocks.0.self_attn.q" else 7 if module.endswith("k_img") else 3
        rank = 2 if module == "blocks.1.ffn.0" else RANK
        down, up = (pairs[f"{module}.{end}"].float().flatten(1) for end in ("down", "up"))
        weight = f"{module}.weight"
        expected[weight] += (alpha / rank**0.5) * (up @ down).reshape(expected[weight].shape)
    expected["blocks.0.self_attn.q.bias"] += 5 / RANK**0.5 * bias
    lora = read_lora(path, CONFIG, abstract_params())
    assert (lora.file, lora.matched) == (path.name, len(tensors))
    check(merged((lora, 1.0)), torch_merge((expected, 1.0)))


@pytest.mark.parametrize("layers", [(), ("state_dict",), ("model", "lora")])
def test_a_number_is_an_alpha_too_and_what_lies_beside_the_dictionary_is_left_out(tmp_path, layers):
    pairs, _ = make_lora(seed=8)
    content: Any = spell(pairs, {}, "", ("lora_A", "lora_B"))
    content |= {f"{name.partition('.lora_')[0]}.alpha": 2.0 for name in content}
    for layer in layers:
        content = {layer: content, "step": 7, "optimizer": {"state": {0: torch.ones(3)}, "lr": 0.1}}
    torch.save(content, tmp_path / "a.pt")
    lora = read_lora(tmp_path / "a.pt", CONFIG, abstract_params())
    check(merged((lora, 1.0)), torch_merge((torch_delta(pairs, {}, 2.0 / RANK), 1.0)))
    if layers:
        torch.save(content | {"ema": content[layers[-1]]}, tmp_path / "b.pt")
        with pytest.raises(ValueError, match=r"holds several, under ema.*; save the one that is meant by itself"):
            read_lora(tmp_path / "b.pt", CONFIG, abstract_params())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_values_of_other_dtypes_mean_what_torch_reads_in_them(tmp_path, dtype):
    pairs, whole = ({name: tensor.to(dtype) for name, tensor in part.items()} for part in make_lora(seed=6))
    tensors = with_alphas(spell(pairs, whole, "diffusion_model.", ("lora_down", "lora_up")))
    lora = read_lora(save(tmp_path / "a.safetensors", tensors, {}), CONFIG, abstract_params())
    whole = {name: tensor.float() for name, tensor in whole.items()}
    check(merged((lora, 1.0)), torch_merge((torch_delta(pairs, whole), 1.0)))


def test_pairs_with_and_without_alpha_in_one_file_merge_as_diffusers_does(tmp_path):
    """What diffusers computes of such a file: its own scale for who has an alpha, 1 for who has none."""
    pairs, _ = make_lora(seed=7)
    pairs = {name: tensor.float() for name, tensor in pairs.items() if name.startswith("blocks.")}
    tensors = spell(pairs, {}, "diffusion_model.", ("lora_A", "lora_B"))
    for index, name in enumerate(("blocks.0.self_attn.q", "blocks.1.cross_attn.v_img", "blocks.1.ffn.2")):
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(index + 1)  # whole numbers, as some trainers have them
    path = save(tmp_path / "a.safetensors", tensors, {})
    lora = read_lora(path, CONFIG, abstract_params())
    assert lora.report.endswith("; alpha/rank 0.25 to 0.75 from its keys; pairs without alpha, not scaled: 21")
    ones = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), abstract_params())
    ours = to_torch(dit_rules(CONFIG, "hf"), apply_loras(ones, [(lora, 1.0)]))
    for name, delta in diffusers_delta(path).items():
        np.testing.assert_allclose(ours[name], delta.numpy(), rtol=0, atol=1e-5, err_msg=name)


def diffusers_delta(path: pathlib.Path) -> Tensors:
    """What diffusers and PEFT add, by diffusers' names."""
    tensors = load_file(path)
    config = {"lora_alpha": None}
    if any(name.startswith("diffusion_model.") for name in tensors):
        tensors = lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers(tensors)
    elif any(name.startswith("lora_unet_") for name in tensors):
        tensors = lora_conversion_utils._convert_musubi_wan_lora_to_diffusers(tensors)
    else:
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["lora_adapter_metadata"])
        config = {name.removeprefix("transformer."): value for name, value in config.items()}
        assert set(config["target_modules"]) == {name[len("transformer.") :].partition(".lora_")[0] for name in tensors}
        assert config["lora_bias"] == any(name.endswith("lora_B.bias") for name in tensors)
    assert all("lora" in name for name in tensors)  # or diffusers refuses the file
    deltas = {}
    for name, down in tensors.items():
        if not name.endswith("lora_A.weight"):
            continue
        module = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
        base_name = name.removesuffix(".lora_A.weight")
        up, rank = tensors[f"{base_name}.lora_B.weight"], down.shape[0]
        scale = 1.0
        if config["lora_alpha"] is not None:
            assert rank == find_pattern(config["rank_pattern"], module, config["r"])
            scale = find_pattern(config["alpha_pattern"], module, config["lora_alpha"]) / rank
        deltas[f"{module}.weight"] = scale * (up.float() @ down.float())
        if f"{base_name}.lora_B.bias" in tensors:
            deltas[f"{module}.bias"] = scale * tensors[f"{base_name}.lora_B.bias"].float()
    return deltas


def find_pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """As PEFT looks a module up."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


@pytest.mark.parametrize("family", ["kohya", "original", "peft"])
def test_diffusers_reads_what_we_write(five, tmp_path, family):
    pairs, whole = make_lora(seed=2)
    # What diffusers' readers of all three families know.
    pairs = {name: tensor for name, tensor in pairs.items() if name.startswith("blocks.")}
    # One pair of another rank and so of another scale.
    pairs["blocks.1.self_attn.k.down"], pairs["blocks.1.self_attn.k.up"] = (
        pairs["blocks.1.self_attn.k.down"][:3].clone(),
        pairs["blocks.1.self_attn.k.up"][:, :3].clone(),
    )
    biases = {name: tensor for name, tensor in whole.items() if name.startswith("blocks.") and name.endswith("bias")}
    biases = {} if family == "kohya" else {name: tensor for name, tensor in biases.items() if "norm" not in name}
    tensors = with_alphas(spell(pairs, biases, "diffusion_model.", ("lora_down", "lora_up")))
    tensors["diffusion_model.blocks.0.ffn.2.alpha"] = torch.tensor(0.7)
    lora = read_lora(save(tmp_path / "in.safetensors", tensors, {}), CONFIG, abstract_params())

    write_lora(tmp_path / "out.safetensors", lora, family)

    theirs = diffusers_delta(tmp_path / "out.safetensors")
    ones = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), abstract_params())
    ours = to_torch(dit_rules(CONFIG, "hf"), apply_loras(ones, [(lora, 1.0)]))
    assert theirs.keys() == {name for name, array in ours.items() if array.any()}
    for name, delta in theirs.items():
        # diffusers scales `down` in its own dtype, bfloat16, for two of the families.
        tolerance = 1e-6 if family == "peft" else 0.02
        np.testing.assert_allclose(ours[name], delta.float().numpy(), rtol=0, atol=tolerance, err_msg=name)
