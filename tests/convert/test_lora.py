"""LoRA files without torch: every spelling back and forth with all bits, meshes, memory, and what is refused by name."""

import functools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

import sample
from magref_jax import pipeline
from magref_jax.config import DiTConfig
from magref_jax.convert import lora as lora_module
from magref_jax.convert.dit import dit_rules
from magref_jax.convert.lora import apply_loras, read_lora, split_strength, write_lora
from magref_jax.convert.rules import torch_shapes
from magref_jax.convert.tensor_files import read_safetensors, write_safetensors
from magref_jax.models.dit import DiT
from magref_jax.sharding import DIT_PARAM_SPECS, make_mesh, param_shardings
from tests.tiny_model import CONFIG as TINY
from tests.tiny_model import model_folder  # noqa: F401

CONFIG = DiTConfig(
    dim=16,
    ffn_dim=24,
    num_heads=2,
    num_layers=3,
    in_channels=12,
    out_channels=4,
    text_dim=8,
    text_len=6,
    image_dim=12,
    freq_dim=8,
)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@functools.cache
def abstract_params(config: DiTConfig = CONFIG) -> Any:
    latents = jnp.zeros((1, 1, 2, 2, config.in_channels))
    text, image = jnp.zeros((1, config.text_len, config.text_dim)), jnp.zeros((1, 1, config.image_dim or 1))
    inputs = latents, jnp.zeros((1,)), text, None if config.image_dim is None else image
    return jax.eval_shape(DiT(config).init, jax.random.key(0), *inputs)["params"]


def random(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def random_params(dtype: Any = BFLOAT16) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(random(*leaf.shape, dtype=dtype)), abstract_params())


LORA_DOWN, LORA_A = ("lora_down", "lora_up"), ("lora_A", "lora_B")


def pair(
    name: str, out: int, fan_in: int, rank: int = 2, dtype: Any = np.float32, ends: tuple[str, str] = LORA_DOWN
) -> dict[str, np.ndarray]:
    matrices = random(rank, fan_in, dtype=dtype), random(out, rank, dtype=dtype)
    return {f"{name}.{end}.weight": matrix for end, matrix in zip(ends, matrices, strict=True)}


def save(path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None):
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_safetensors(path, specs, tensors.__getitem__, metadata)
    return path


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in read_safetensors(path).items()}


def read(tmp_path: pathlib.Path, tensors: Mapping[str, np.ndarray], config: DiTConfig = CONFIG, **metadata: str):
    return read_lora(save(tmp_path / "in.safetensors", tensors, metadata), config, abstract_params(config))


def flat(params: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep="/")


def same_bits(one: Any, other: Any) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


KOHYA = {
    **pair("lora_unet_blocks_0_self_attn_q", 16, 16, dtype=np.float16),
    "lora_unet_blocks_0_self_attn_q.alpha": np.float16(3.0).reshape(()),
    **pair("lora_unet_blocks_2_cross_attn_k_img", 16, 16, rank=3, dtype=BFLOAT16),
    "lora_unet_blocks_2_cross_attn_k_img.alpha": np.ones((1,), np.float32),
    **pair("lora_unet_blocks_1_ffn_0", 24, 16),
    "lora_unet_blocks_1_ffn_0.alpha": np.float32(0.3).reshape(()),
}
PEFT = {
    **pair("transformer.blocks.0.attn1.to_q", 16, 16, dtype=np.float16, ends=LORA_A),
    **pair("transformer.blocks.2.attn2.add_k_proj", 16, 16, rank=3, dtype=BFLOAT16, ends=LORA_A),
    "transformer.blocks.2.attn2.add_k_proj.lora_B.bias": random(16, dtype=BFLOAT16),
    **pair("transformer.blocks.1.ffn.net.0.proj", 24, 16, ends=LORA_A),
    **pair("transformer.condition_embedder.text_embedder.linear_1", 16, 8, ends=LORA_A),
}
ORIGINAL = {
    **pair("diffusion_model.blocks.0.self_attn.q", 16, 16, dtype=np.float16),
    **pair("diffusion_model.blocks.2.cross_attn.k_img", 16, 16, rank=3, dtype=BFLOAT16),
    "diffusion_model.blocks.2.cross_attn.k_img.alpha": np.asarray(5.0, BFLOAT16),
    "diffusion_model.blocks.2.cross_attn.k_img.diff_b": random(16),
    "diffusion_model.blocks.1.ffn.2.diff": random(16, 24, dtype=ml_dtypes.float8_e4m3fn),
    "diffusion_model.blocks.1.diff_m": random(1, 6, 16),
    "diffusion_model.blocks.0.norm3.diff": random(16, dtype=np.float16),
    "diffusion_model.blocks.0.norm3.diff_b": random(16),
    "diffusion_model.patch_embedding.diff": random(16, 12, 1, 2, 2),
    "diffusion_model.patch_embedding.lora_down.weight": random(2, 12, 1, 2, 2),
    "diffusion_model.patch_embedding.lora_up.weight": random(16, 2, 1, 1, 1),
    "diffusion_model.head.diff_m": random(1, 2, 16),
}
FILES = {"kohya": KOHYA, "peft": PEFT, "original": ORIGINAL}


@pytest.mark.parametrize("family", FILES)
def test_in_and_out_gives_every_bit_back(tmp_path, family):
    lora = read(tmp_path, FILES[family])
    assert (lora.matched, lora.unmatched, lora.skipped) == (len(FILES[family]), (), ())
    write_lora(tmp_path / "out.safetensors", lora, family)
    back = load(tmp_path / "out.safetensors")
    assert back.keys() == FILES[family].keys()
    assert all(same_bits(back[name], tensor) for name, tensor in FILES[family].items())


def test_through_all_families_and_back_gives_every_bit_back(tmp_path):
    path = save(tmp_path / "in.safetensors", KOHYA)
    for family in ("original", "peft", "kohya"):
        lora = read_lora(path, CONFIG, abstract_params())
        path = tmp_path / f"{family}.safetensors"
        write_lora(path, lora, family)
    back = load(path)
    assert back.keys() == KOHYA.keys()
    for name, tensor in KOHYA.items():
        if name.endswith(".alpha"):  # a number in the header of a PEFT file, so that its shape is gone
            assert float(back[name]) == float(tensor.item())
        else:
            assert same_bits(back[name], tensor)


def test_each_spelling_of_a_name_means_one_parameter():
    config = DiTConfig()
    for layout in ("wan", "hf"):
        names = [rule.torch_pattern for rule in dit_rules(config, layout) if rule.flax_paths]
        assert len({name.replace(".", "_") for name in names}) == len(names)
    slots = lora_module._slots(CONFIG, abstract_params())
    by_layout = [
        {name.replace(".", "_"): rule.flax_path for rule in dit_rules(CONFIG, layout) for name in [rule.torch_pattern]}
        for layout in ("wan", "hf")
    ]
    assert all(by_layout[0][name] == by_layout[1][name] for name in by_layout[0].keys() & by_layout[1].keys())
    # One slot per torch tensor of the model, whatever it is called.
    assert len({(slot.path, slot.layer) for slot in slots.values()}) == len(
        torch_shapes(dit_rules(CONFIG), abstract_params())
    )


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_blocks_1_cross_attn_o",
        "lora_unet__blocks_1_cross_attn_o",
        "lycoris_blocks_1_cross_attn_o",
        "diffusion_model.blocks.1.cross_attn.o",
        "model.diffusion_model.blocks.1.cross_attn.o",
        "base_model.model.blocks.1.cross_attn.o",
        "base_model.model.blocks.1.attn2.to_out.0",
        "pipe.dit.blocks.1.cross_attn.o",
        "transformer.blocks.1.attn2.to_out.0",
        "blocks.1.cross_attn.o",
        "blocks.1.attn2.to_out.0",
        "base_model.model.diffusion_model.blocks.1.cross_attn.o",
        "base_model.model.transformer.blocks.1.attn2.to_out.0",
        "transformer.base_model.model.blocks.1.attn2.to_out.0",
        "model.blocks.1.cross_attn.o",
        "module._orig_mod.blocks.1.cross_attn.o",
        "base_model.model._orig_mod.blocks.1.cross_attn.o",
        "lora_unet__orig_mod_blocks_1_cross_attn_o",
        "_fsdp_wrapped_module.blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module.cross_attn.o",
        "lora_transformer_blocks_1_attn2_to_out_0",
    ],
)
@pytest.mark.parametrize(
    "ends",
    [LORA_DOWN, LORA_A, ("lora_A.new-style", "lora_B.new-style"), ("lora.down", "lora.up")],
)
def test_prefixes_and_endings(tmp_path, key, ends):
    lora = read(tmp_path, pair(key, 16, 16, ends=ends))
    (delta,) = lora.deltas
    assert (delta.path, delta.layer) == ("blocks/cross_attention/out/kernel", 1)


@pytest.mark.parametrize(
    ("key", "path", "layer"),
    [
        ("diffusion_model.blocks.1.diff_m", "blocks/modulation", 1),
        ("lora_unet_blocks_1.diff_m", "blocks/modulation", 1),
        ("blocks.1.modulation.diff", "blocks/modulation", 1),
        ("transformer.blocks.1.scale_shift_table.diff", "blocks/modulation", 1),
        ("diffusion_model.head.diff_m", "head/modulation", None),
        ("transformer.scale_shift_table.diff", "head/modulation", None),
    ],
)
def test_spellings_of_a_modulation(tmp_path, key, path, layer):
    (delta,) = read(tmp_path, {key: random(1, 2 if layer is None else 6, 16)}).deltas
    assert (delta.path, delta.layer) == (path, layer)


def test_untouched_parameters_are_the_same_objects_and_the_given_ones_stay(tmp_path):
    params = random_params()
    before = {path: np.asarray(leaf).tobytes() for path, leaf in flat(params).items()}
    merged = flat(apply_loras(params, [(read(tmp_path, ORIGINAL), 1.0)]))
    changed = {path for path, leaf in flat(params).items() if merged[path] is not leaf}
    assert changed == {
        "blocks/self_attention/query/kernel",
        "blocks/cross_attention/key_image/kernel",
        "blocks/cross_attention/key_image/bias",
        "blocks/feed_forward/down/kernel",
        "blocks/modulation",
        "blocks/cross_attention_norm/scale",
        "blocks/cross_attention_norm/bias",
        "patch_embedding/kernel",
        "head/modulation",
    }
    assert {path: np.asarray(leaf).tobytes() for path, leaf in flat(params).items()} == before
    query = merged["blocks/self_attention/query/kernel"]
    assert query.dtype == BFLOAT16
    assert not same_bits(query[0], flat(params)["blocks/self_attention/query/kernel"][0])
    assert same_bits(query[1:], flat(params)["blocks/self_attention/query/kernel"][1:])


def test_strength_zero_leaves_every_bit(tmp_path):
    params = jax.tree.map(lambda leaf: leaf * -0.0, random_params())
    merged = apply_loras(params, [(read(tmp_path, ORIGINAL), 0.0)])
    assert all(jax.tree.leaves(jax.tree.map(same_bits, params, merged)))


def test_donated_parameters_are_consumed_and_the_result_is_the_same(tmp_path):
    lora = read(tmp_path, KOHYA)
    expected = apply_loras(random_params(), [(lora, 1.0)])
    params = random_params()
    merged = apply_loras(params, [(lora, 1.0)], donate=True)
    assert all(jax.tree.leaves(jax.tree.map(same_bits, expected, merged)))
    assert flat(params)["blocks/self_attention/query/kernel"].is_deleted()
    assert not flat(params)["blocks/self_attention/key/kernel"].is_deleted()


def test_several_loras_are_summed_before_the_one_rounding(tmp_path):
    up = {"blocks.0.self_attn.q.diff": np.full((16, 16), 2.0**-9, np.float32)}
    one = jax.tree.map(jnp.ones_like, random_params())
    half = read(tmp_path, up)
    # 2^-9 is a quarter of the distance to the next bfloat16 above 1, so that either alone would be rounded away.
    for loras, expected in (
        ([(half, 1.0)], 1.0),
        ([(half, 1.0), (half, 2.0)], 1 + 2.0**-7),
        ([(half, 3.0)], 1 + 2.0**-7),
    ):
        merged = flat(apply_loras(one, loras))["blocks/self_attention/query/kernel"]
        np.testing.assert_array_equal(np.asarray(merged[0], np.float32), expected)


@pytest.mark.parametrize("donate", [False, True])
def test_a_mesh_gives_the_same_bits_and_keeps_its_places(tmp_path, donate):
    tensors = {name: tensor for name, tensor in ORIGINAL.items() if "patch" not in name and "norm" not in name}
    loras = [(read(tmp_path, tensors), 0.7), (read(tmp_path, KOHYA), -1.5)]
    expected = apply_loras(random_params(), loras)
    shardings = param_shardings(make_mesh("fsdp=2,tensor=4"), abstract_params(), DIT_PARAM_SPECS)
    params = jax.device_put(random_params(), shardings)
    merged = apply_loras(params, loras, donate=donate)
    assert all(jax.tree.leaves(jax.tree.map(same_bits, expected, merged)))
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, merged, shardings)))


def test_memory_is_that_of_one_layer():
    layers, width = 32, 128
    _, add = lora_module._compiled(None)
    arguments = np.int32(0), np.zeros((width, 4), np.float32), np.zeros((4, width), np.float32), None
    leaf = jax.ShapeDtypeStruct((layers, width, width), jnp.uint16)
    memory = add.lower(leaf, jnp.dtype(jnp.bfloat16), *arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 2 * layers * width * width
    assert memory.temp_size_in_bytes <= 4 * 4 * width * width


def test_layers_of_different_rank_share_one_program(tmp_path):
    tensors = {}
    for layer in range(3):
        tensors |= pair(f"blocks.{layer}.self_attn.v", 16, 16, rank=layer + 1)
    lora = read(tmp_path, tensors)
    _, add = lora_module._compiled(None)
    add.clear_cache()
    merged = flat(apply_loras(random_params(np.float32), [(lora, 1.0)]))["blocks/self_attention/value/kernel"]
    assert add._cache_size() == 1
    for layer in range(3):
        down, up = (tensors[f"blocks.{layer}.self_attn.v.{name}.weight"] for name in ("lora_down", "lora_up"))
        base = random(3, 16, 16)[layer]
        np.testing.assert_allclose(merged[layer], base + (up @ down).T, rtol=0, atol=1e-5)


def adapter_metadata(**values: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in values.items()})}


@pytest.mark.parametrize(
    ("metadata", "alpha"),
    [
        ({}, 1.0),
        (adapter_metadata(lora_alpha=8, r=2), 4.0),
        (adapter_metadata(lora_alpha=8, alpha_pattern={"blocks.0.attn1.to_q": 1}), 0.5),
        (adapter_metadata(lora_alpha=8, alpha_pattern={"^blocks.0.attn1.to_q": 1}), 0.5),
        (adapter_metadata(lora_alpha=8, alpha_pattern={"to_k": 1}), 4.0),
        (adapter_metadata(lora_alpha=8, alpha_pattern={"to_q": 3}), 1.5),
        (adapter_metadata(lora_alpha=8, use_rslora=True), 8 / math.sqrt(2)),
        ({"format": "pt"}, 1.0),
    ],
)
def test_alpha_in_the_header_of_a_diffusers_file(tmp_path, metadata, alpha):
    lora = read(tmp_path, pair("transformer.blocks.0.attn1.to_q", 16, 16, ends=LORA_A), **metadata)
    assert lora.deltas[0].value.scale == pytest.approx(alpha, rel=1e-7)


def adapter(folder: pathlib.Path, config: Any, tensors: Mapping[str, np.ndarray], name: str = "adapter_model"):
    """A folder as PEFT's save_pretrained leaves it."""
    folder.mkdir()
    text = config if isinstance(config, str) else json.dumps({"peft_type": "LORA"} | config)
    (folder / "adapter_config.json").write_text(text)
    return save(folder / f"{name}.safetensors", tensors)


# Three modules of ranks 2, 3 and 2, as PEFT would name them, and what it scales each by.
ADAPTER = {
    **pair("base_model.model.blocks.0.self_attn.q", 16, 16, ends=LORA_A),
    **pair("base_model.model.blocks.1.self_attn.q", 16, 16, rank=3, ends=LORA_A),
    **pair("base_model.model.blocks.2.ffn.0", 24, 16, ends=LORA_A),
}
RANKS = {"r": 2, "rank_pattern": {"blocks.1.self_attn.q": 3}}


@pytest.mark.parametrize(
    ("config", "scales", "said"),
    [
        ({"lora_alpha": 32} | RANKS, [16, 32 / 3, 16], "alpha/rank 10.67 to 16 from adapter_config.json"),
        ({"lora_alpha": 4}, [2, 4 / 3, 2], "from adapter_config.json"),  # older releases say less
        (
            {"lora_alpha": 8, "alpha_pattern": {"self_attn.q": 3, r"^blocks\.2\.ffn\.0": 1}} | RANKS,
            [1.5, 1.0, 0.5],
            "alpha/rank 0.5 to 1.5",
        ),
        ({"lora_alpha": 8, "use_rslora": True} | RANKS, [8 / 2**0.5, 8 / 3**0.5, 8 / 2**0.5], "4.619 to 5.657"),
        # What changes nothing of a linear layer, or of a merge.
        (
            {"lora_alpha": 6, "fan_in_fan_out": True, "bias": "none", "init_lora_weights": "gaussian"},
            [3, 2, 3],
            "2 to 3",
        ),
        ({"r": 2, "rank_pattern": {"blocks.1.self_attn.q": 3}}, [1, 1, 1], "pairs without alpha, not scaled: 3"),
    ],
)
def test_alpha_beside_an_adapter_of_peft(tmp_path, config, scales, said):
    path = adapter(tmp_path / "style", config, ADAPTER)
    for given in (path, tmp_path / "style"):  # the file or its folder
        lora = read_lora(given, CONFIG, abstract_params())
        assert [delta.value.scale for delta in lora.deltas] == pytest.approx(scales, rel=1e-7)
        assert said in lora.report
    assert split_strength(f"{tmp_path / 'style'}:0.5") == (path, 0.5)
    write_lora(tmp_path / "out.safetensors", lora, "kohya")
    back = read_lora(tmp_path / "out.safetensors", CONFIG, abstract_params())
    assert [delta.value.scale for delta in back.deltas] == pytest.approx(scales, rel=1e-7)


def test_where_alpha_is_looked_for(tmp_path):
    """A key wins over the header, the header over the file beside, and that is for files of PEFT's name only."""
    config = {"lora_alpha": 32, "r": 2}
    name, tensors = "base_model.model.blocks.0.self_attn.q", pair("base_model.model.blocks.0.self_attn.q", 16, 16)

    def scale(path):
        lora = read_lora(path, CONFIG, abstract_params())
        return lora.deltas[0].value.scale, lora.report.partition("; ")[2]

    path = adapter(tmp_path / "a", config, tensors)
    assert scale(path) == (16, "alpha/rank 16 from adapter_config.json")
    save(path, tensors, adapter_metadata(lora_alpha=6))
    assert scale(path) == (3, "alpha/rank 3 from lora_adapter_metadata in its header")
    save(path, tensors | {f"{name}.alpha": np.asarray(4, np.int64)}, adapter_metadata(lora_alpha=6))
    assert scale(path) == (2, "alpha/rank 2 from its keys")
    assert scale(adapter(tmp_path / "b", config, tensors, "style")) == (1, "pairs without alpha, not scaled: 1")
    # Converters keep kohya's header when they multiply alpha into the weights.
    path = save(tmp_path / "kohya.safetensors", tensors, {"ss_network_alpha": "16.0", "ss_network_dim": "2"})
    assert scale(path) == (
        1,
        "pairs without alpha, not scaled: 1 (ss_network_alpha 16.0 in its header is not used)",
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "adapter_config.json is damaged"),
        ("[]", "adapter_config.json is damaged"),
        ({"lora_alpha": "much"}, "adapter_config.json is damaged: could not convert string"),
        ({"lora_alpha": 8, "r": 4}, "blocks.0.self_attn.q.lora_A.weight' has rank 2, but adapter_config.json says 4"),
        (
            {"rank_pattern": {r"blocks\.\d+\.ffn.0": 4}},
            "has alpha or rank 4.0 for 'blocks.*; expected names and numbers",
        ),
        ({"alpha_pattern": {"self_attn.(q|k)": 4}}, "has alpha or rank 4.0 for 'self_attn"),
        ({"peft_type": "LOKR"}, "says peft_type 'LOKR', which is not supported. Supported are"),
        ({"use_dora": True}, "says use_dora=True: DoRA, which is not supported"),
        ({"layer_replication": [[0, 2]]}, "says layer_replication=.*, which is not supported"),
        ({"target_parameters": ["blocks.0.modulation"]}, "says target_parameters="),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': the adapter is for changed weights of the model"),
    ],
)
def test_a_config_of_peft_that_is_no_plain_lora_is_refused(tmp_path, config, message):
    path = adapter(tmp_path / "style", config, ADAPTER)
    with pytest.raises(ValueError, match=message) as error:
        read_lora(path, CONFIG, abstract_params())
    assert str(path) in str(error.value)


def test_folders_that_hold_no_one_lora(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder without a LoRA; expected adapter_model.safetensors or"):
        split_strength(str(tmp_path))
    save(tmp_path / "one.safetensors", PEFT)
    assert split_strength(f"{tmp_path}:2") == (tmp_path / "one.safetensors", 2.0)
    save(tmp_path / "two.safetensors", PEFT)
    with pytest.raises(ValueError, match="is a folder of several files, one.safetensors, two.safetensors; give one"):
        split_strength(str(tmp_path))
    save(tmp_path / "pytorch_lora_weights.safetensors", PEFT)
    assert lora_module.lora_file(tmp_path).name == "pytorch_lora_weights.safetensors"


def test_a_bias_of_a_pair_is_scaled_with_it(tmp_path):
    base = "transformer.blocks.0.attn1.to_q"
    tensors = pair(base, 16, 16, ends=LORA_A) | {f"{base}.lora_B.bias": random(16)}
    params = random_params(np.float32)
    lora = read(tmp_path, tensors, **adapter_metadata(lora_alpha=6))
    bias = flat(apply_loras(params, [(lora, 0.5)]))["blocks/self_attention/query/bias"]
    expected = random(3, 16)[0] + 0.5 * (6 / 2) * random(16)
    np.testing.assert_allclose(bias[0], expected, rtol=0, atol=1e-6)


def test_report_names_what_found_no_place(tmp_path):
    names = [f"text_encoder.block.{index}.lora_down.weight" for index in range(6)]
    tensors = KOHYA | {name: random(1) for name in names} | {"blocks.0.norm3.alpha": random(1)}
    tensors |= {"diffusion_model.blocks.3.self_attn.q.diff": random(16, 16)}  # the model has layers 0 to 2
    report = read(tmp_path, tensors).report
    assert report.startswith(
        "LoRA in.safetensors: 9 of 17 keys matched; alpha/rank 0.15 to 1.5 from its keys; unmatched: "
    )
    assert report.endswith(" and 3 more")
    assert read(tmp_path, {"blocks.1.diff_m": random(1, 6, 16)}).report == "LoRA in.safetensors: 1 of 1 keys matched"
    path = save(tmp_path / "style_HIGH-noise.safetensors", PEFT)
    assert (
        "; by its name for the high-noise half of a Wan 2.2 pair" in read_lora(path, CONFIG, abstract_params()).report
    )


@pytest.mark.parametrize(
    "patches",
    [
        {"patch_embedding.diff": random(16, 4, 1, 2, 2)},
        {
            "patch_embedding.lora_down.weight": random(2, 4, 1, 2, 2),
            "patch_embedding.lora_up.weight": random(16, 2, 1, 1, 1),
            "patch_embedding.alpha": random(1),
        },
    ],
)
def test_text_to_video_patches_are_skipped_by_name(tmp_path, patches):
    tensors = pair("blocks.0.self_attn.q", 16, 16) | patches | {"patch_embedding.diff_b": random(16)}
    lora = read(tmp_path, tensors)
    assert set(lora.skipped) == set(patches)
    assert {delta.path for delta in lora.deltas} == {"blocks/self_attention/query/kernel", "patch_embedding/bias"}
    assert f"3 of {len(tensors)} keys matched; pairs without alpha, not scaled: 1; skipped" in lora.report
    assert "skipped, because they are for 4 input channels" in lora.report
    assert "this one has 12: patch_embedding." in lora.report
    with pytest.raises(ValueError, match="none of its"):
        read(tmp_path, patches)


def test_image_branches_have_no_place_in_a_text_to_video_model(tmp_path):
    config = DiTConfig(
        dim=16,
        ffn_dim=24,
        num_heads=2,
        num_layers=3,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        image_dim=None,
        freq_dim=8,
    )
    lora = read(tmp_path, KOHYA | {"patch_embedding.diff": random(16, 4, 1, 2, 2)}, config)
    assert {name.rpartition(".lora")[0] or name for name in lora.unmatched} == {
        "lora_unet_blocks_2_cross_attn_k_img",
        "lora_unet_blocks_2_cross_attn_k_img.alpha",
    }
    assert (lora.matched, lora.skipped) == (7, ())


NAN = random(2, 16)
NAN[1, 3] = np.nan
Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "none of its 0 keys fits"),
        ({"lora_te_text.lora_down.weight": random(2, 2)}, "none of its 1 keys fits.*lora_te_text.lora_down.weight"),
        ({f"{Q}.alpha": random(1)}, "none of its 1 keys fits"),
        ({f"{Q}.lora_down.weight": random(2, 16)}, f"'{Q}.lora_down.weight' has no partner"),
        ({f"{Q}.lora_B.weight": random(16, 2)}, f"'{Q}.lora_B.weight' has no partner"),
        ({f"{Q}.lora_B.bias": random(16)}, f"'{Q}.lora_B.bias' has no partner"),
        (pair(Q, 16, 15), rf"'{Q}.lora_down.weight' has shape \(2, 15\), expected \(2, 16\)"),
        (pair(Q, 15, 16), rf"'{Q}.lora_up.weight' has shape \(15, 2\), expected \(16, 2\)"),
        (pair(Q, 16, 16, rank=0), rf"'{Q}.lora_down.weight' has shape \(0, 16\), expected \('rank', 16\)"),
        (
            {f"{Q}.lora_down.weight": random(3, 16), f"{Q}.lora_up.weight": random(16, 2)},
            rf"'{Q}.lora_up.weight' has shape \(16, 2\), expected \(16, 3\)",
        ),
        (
            {f"{Q}.lora_down.weight": random(2, 16, 1, 1), f"{Q}.lora_up.weight": random(16, 2, 1, 1)},
            r"has shape \(2, 16, 1, 1\), expected \('rank', 16\)",
        ),
        (
            pair("blocks.0.norm3", 16, 16),
            r"'blocks.0.norm3.lora_down.weight' has shape \(2, 16\), expected \('rank',\)",
        ),
        (pair(Q, 16, 16) | {f"{Q}.alpha": random(2)}, rf"'{Q}.alpha' has shape \(2,\), expected \(1,\)"),
        ({f"{Q}.diff": random(16, 24)}, rf"'{Q}.diff' has shape \(16, 24\), expected \(16, 16\)"),
        ({"blocks.0.diff_m": random(6, 16)}, r"'blocks.0.diff_m' has shape \(6, 16\), expected \(1, 6, 16\)"),
        ({"patch_embedding.diff": random(16, 5, 1, 2, 2)}, r"shape \(16, 5, 1, 2, 2\), expected \(16, 12, 1, 2, 2\)"),
        (
            {f"{Q}.lora_down.weight": NAN, f"{Q}.lora_up.weight": random(16, 2)},
            f"'{Q}.lora_down.weight' has values that are NaN or infinite",
        ),
        (
            pair(Q, 16, 16) | {f"{Q}.alpha": np.asarray(np.inf, BFLOAT16)},
            f"'{Q}.alpha' has values that are NaN or infinite",
        ),
        ({f"{Q}.diff": np.full((16, 16), np.inf, np.float16)}, f"'{Q}.diff' has values"),
        (
            pair(Q, 16, 16) | pair("blocks.0.attn1.to_q", 16, 16),
            "are both the down of blocks/self_attention/query/kernel",
        ),
        (
            pair(Q, 16, 16) | {f"{Q}.lora_up.bias": random(16), f"{Q}.diff_b": random(16)},
            "both add to blocks/self_attention/query/bias",
        ),
        (
            {"blocks.1.diff_m": random(1, 6, 16), "blocks.1.modulation.diff": random(1, 6, 16)},
            "both add to blocks/modulation, layer 1",
        ),
        (pair(Q, 16, 16) | {f"{Q}.dora_scale": random(16, 1)}, f"'{Q}.dora_scale' belongs to DoRA.*Supported are"),
        (pair(Q, 16, 16) | {f"{Q}.lora_magnitude_vector": random(16)}, "belongs to DoRA"),
        ({f"{Q}.hada_w1_a": random(16, 2)}, f"'{Q}.hada_w1_a' belongs to LoHa"),
        ({"lycoris_blocks_0_self_attn_q.lokr_w1": random(4, 4)}, "lokr_w1' belongs to LoKr, which is not supported"),
        # Beside a pair that could be merged: what else is said of a module of the model is not left out.
        (KOHYA | {"lora_unet_blocks_1_ffn_2.oft_blocks": random(2, 2)}, "'.oft_blocks', which is not supported. Supp"),
        (KOHYA | {"lora_unet_blocks_1_ffn_2.b1.weight": random(2, 2)}, "ends in '.b1.weight'"),  # GLoRA
        (KOHYA | {"lora_unet_blocks_1_norm3.w_norm": random(16)}, "ends in '.w_norm'"),
        (KOHYA | {"lora_unet_blocks_0_self_attn_q.scalar": random(1)}, "ends in '.scalar'"),
        (KOHYA | {"diffusion_model.patch_embedding.reshape_weight": random(5)}, "ends in '.reshape_weight'"),
        (KOHYA | {"blocks.0.self_attn.k.lora_down.scale_weight": random(1)}, "ends in '.lora_down.scale_weight'"),
        (PEFT | {"base_model.model.blocks.0.self_attn.k.lora_E": random(2, 1)}, "ends in '.lora_E'"),  # AdaLoRA
        (PEFT | {"base_model.model.head.head.weight": random(16, 16)}, "head.weight' is a whole parameter"),
        (PEFT | {"base_model.model.blocks.0.self_attn.k.bias": random(16)}, "k.bias' is a whole parameter"),
        (PEFT | {"base_model.model.blocks.0.modulation": random(1, 6, 16)}, "modulation' is a whole parameter"),
        (PEFT | pair("transformer_2.blocks.0.attn1.to_q", 16, 16, ends=LORA_A), "belongs to a pair of transformers"),
        # Adapters of two names in one file, and one module under two names.
        (PEFT | pair("transformer.blocks.0.attn1.to_q", 16, 16, ends=("lora_A.b", "lora_B.b")), "are both the down of"),
        (ORIGINAL | pair("_orig_mod.blocks.0.self_attn.q", 16, 16), "are both the down of blocks/self_attention/query"),
        # Whole numbers without what scales them.
        (
            {name: tensor.astype(np.int8) for name, tensor in pair(Q, 16, 16).items()},
            "has dtype int8, expected floating",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=f"LoRA .*in.safetensors: .*{message}"):
        read(tmp_path, tensors)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps({"lora_alpha": "many"}),
        json.dumps({"lora_alpha": [1]}),
        json.dumps({"transformer.alpha_pattern": {"to_q": math.nan}}),
        json.dumps({"transformer.alpha_pattern": {"(.*)*to_q": 1}}),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="LoRA .*in.safetensors: lora_adapter_metadata in its header"):
        read(tmp_path, PEFT, lora_adapter_metadata=text)


def test_no_file_and_no_safetensors_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors does not exist; expected a LoRA file"):
        read_lora(tmp_path / "nowhere.safetensors", CONFIG, abstract_params())
    (tmp_path / "text.safetensors").write_text("no tensors here, whatever the name says")
    with pytest.raises(ValueError, match="text.safetensors is no safetensors file"):
        read_lora(tmp_path / "text.safetensors", CONFIG, abstract_params())


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_strength_must_be_finite(tmp_path, strength):
    with pytest.raises(ValueError, match="strength of LoRA in.safetensors is (nan|inf); it must be a finite number"):
        apply_loras(random_params(), [(read(tmp_path, KOHYA), strength)])


def test_another_model_is_refused_before_anything_is_changed(tmp_path):
    params = random_params()
    params["blocks"]["self_attention"]["query"]["kernel"] = jnp.zeros((3, 16, 8))
    with pytest.raises(
        ValueError, match=r"self_attention/query/kernel' with shape \(16, 16\), the parameter has \(16, 8\)"
    ):
        apply_loras(params, [(read(tmp_path, KOHYA), 1.0)], donate=True)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_what_a_family_cannot_hold_is_refused(tmp_path):
    lora = read(tmp_path, ORIGINAL)
    with pytest.raises(ValueError, match="family='peft' holds low-rank pairs and their biases only.*'blocks/"):
        write_lora(tmp_path / "out.safetensors", lora, "peft")
    with pytest.raises(ValueError, match="family='lokr' is unknown; choose from kohya, peft, original"):
        write_lora(tmp_path / "out.safetensors", lora, "lokr")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1e-1", ("a.safetensors", -0.1)),
        ("a:2.safetensors", ("a:2.safetensors", 1.0)),
        ("a:2.safetensors:3", ("a:2.safetensors", 3.0)),
        ("b:3", ("b:3", 1.0)),
        ("b:3:.5", ("b:3", 0.5)),
    ],
)
def test_strength_is_what_follows_the_last_colon_of_a_file(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "a:2.safetensors", "b:3"):
        pathlib.Path(name).touch()
    path, strength = split_strength(text)
    assert (str(path), strength) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b.safetensors", "there is no LoRA file 'b.safetensors'"),
        ("b.safetensors:1", "there is no LoRA file 'b.safetensors:1'"),
        ("", "there is no LoRA file ''"),
        ("a.safetensors:", "'' after a.safetensors: must be a finite number"),
        ("a.safetensors:strong", "'strong' after a.safetensors: must be a finite number, such as 0.8"),
        ("a.safetensors:nan", "'nan' after a.safetensors"),
        ("a.safetensors:inf", "'inf' after a.safetensors"),
        (":0.5", "there is no LoRA file ':0.5'"),
        ("C:\\loras\\style.safetensors", r"there is no LoRA file 'C:.*style.safetensors'"),
        ("gs://bucket/style.safetensors", "LoRA gs://bucket/style.safetensors: gs:// cannot be read"),
        ("https://example.org/style.safetensors:0.5", "https:// cannot be read or written; give a local path"),
    ],
)
def test_wrong_files_and_strengths(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a.safetensors").touch()
    with pytest.raises(ValueError, match=message):
        split_strength(text)


@pytest.fixture
def files(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    save(pathlib.Path("a.safetensors"), pair("blocks.0.self_attn.q", TINY.dit.dim, TINY.dit.dim) | {"other": random(1)})
    save(pathlib.Path("b.safetensors"), {"blocks.1.ffn.0.diff_b": random(TINY.dit.ffn_dim)})
    save(pathlib.Path("none.safetensors"), {"lora_te_q.lora_down.weight": random(2, 2)})
    save(pathlib.Path("large.safetensors"), pair("blocks.0.self_attn.q", 5120, 5120))
    pathlib.Path("text.safetensors").write_text("no tensors here")
    return tmp_path


def test_a_model_is_loaded_with_loras_merged_in(model_folder, files):  # noqa: F811
    model = pipeline.load(model_folder)
    first = read_lora("a.safetensors", TINY.dit, model.params["dit"])
    second = read_lora("b.safetensors", TINY.dit, model.params["dit"])
    expected = apply_loras(model.params["dit"], [(first, 0.5), (second, -1.0)])

    mesh = make_mesh("fsdp=2,tensor=4")
    for loaded in (
        pipeline.load(model_folder, loras=[("a.safetensors", 0.5), (second, -1.0)]),
        pipeline.load(model_folder, mesh, loras=[(first, 0.5), (second, -1.0)]),
    ):
        assert all(jax.tree.leaves(jax.tree.map(same_bits, expected, loaded.params["dit"])))
        assert loaded.params["vae"].keys() == model.params["vae"].keys()


PROMPT = ["--prompt", "the red apple rises", "--lora"]


def test_sample_hands_loras_and_strengths_on_and_says_what_matched(model_folder, files, capsys, monkeypatch):  # noqa: F811
    given = []

    def load(folder, mesh, loras, **options):
        given.extend(loras)
        raise ValueError("enough")

    monkeypatch.setattr(pipeline, "load", load)
    with pytest.raises(SystemExit, match="enough"):
        sample.main(["--model", str(model_folder), *PROMPT, "a.safetensors", "--lora", "b.safetensors:-.5"])
    assert [(lora.file, strength) for lora, strength in given] == [("a.safetensors", 1.0), ("b.safetensors", -0.5)]
    assert capsys.readouterr().out.splitlines() == [
        "LoRA a.safetensors: 2 of 3 keys matched; pairs without alpha, not scaled: 1; unmatched: other",
        "LoRA b.safetensors: 1 of 1 keys matched",
    ]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("missing.safetensors", "--lora: there is no LoRA file 'missing.safetensors'"),
        ("a.safetensors:much", "--lora: 'much' after a.safetensors: must be a finite number, such as 0.8"),
        ("a.safetensors:inf", "--lora: 'inf' after a.safetensors: must be a finite number"),
        ("none.safetensors", "--lora: LoRA none.safetensors: none of its 1 keys fits a part of this transformer"),
        ("large.safetensors", "self_attn.q.lora_down.weight' has shape (2, 5120), expected (2, 24)"),
        ("text.safetensors", "--lora: text.safetensors is no safetensors file"),
    ],
)
def test_sample_refuses_a_lora_before_weights_are_read(model_folder, files, capsys, monkeypatch, lora, message):  # noqa: F811
    monkeypatch.setattr(pipeline, "load", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(SystemExit) as exit_info:
        sample.main(["--model", str(model_folder), *PROMPT, "a.safetensors:0.1", "--lora", lora])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not pathlib.Path("outputs").exists()


def test_the_next_command_has_the_same_loras(files):
    arguments = sample.parser().parse_args([*PROMPT, "a.safetensors:0.1"])
    (entry,) = sample.read_entries(arguments, sample.Checks())
    assert "--lora a.safetensors:0.1" in sample.what_next(entry, arguments)
