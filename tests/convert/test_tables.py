"""The tables without torch: the names of the released files, every bit back in both layouts, what is dropped."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax.config import DiTConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig, VAEConfig
from magref_jax.convert.dit import dit_rules
from magref_jax.convert.image_encoder import image_encoder_rules, image_encoder_unused
from magref_jax.convert.rules import convert, to_torch, torch_shapes
from magref_jax.convert.text_encoder import text_encoder_rules
from magref_jax.convert.vae import vae_rules
from magref_jax.models.dit import DiT
from magref_jax.pipeline import abstract_params
from tests.parity.torch_random import random_tensors

TABLES = {
    "dit": dit_rules,
    "vae": vae_rules,
    "text_encoder": text_encoder_rules,
    "image_encoder": image_encoder_rules,
}
LAYOUTS = ["wan", "hf"]
# No two widths alike, and two layers of everything that is stacked.
CONFIG = ModelConfig(
    dit=DiTConfig(
        dim=12,
        ffn_dim=16,
        num_heads=2,
        num_layers=2,
        in_channels=3,
        out_channels=2,
        text_dim=5,
        image_dim=7,
        freq_dim=8,
    ),
    vae=VAEConfig(base_dim=4, dim_multipliers=(1, 2, 3), num_res_blocks=1, temporal_downsample=(False, True)),
    text_encoder=TextEncoderConfig(vocab_size=30, dim=12, ffn_dim=16, num_heads=2, head_dim=5, num_layers=2),
    image_encoder=ImageEncoderConfig(dim=8, ffn_dim=12, num_heads=2, num_layers=3, image_size=12, patch_size=6),
)


@functools.cache
def tiny_abstract_params() -> dict[str, Any]:
    return abstract_params(CONFIG)


def wan_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released checkpoints, written down from their index files."""
    dim, ffn_dim = config.dim, config.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {"patch_embedding.weight": (dim, config.in_channels, 1, 2, 2)}
    shapes |= {"patch_embedding.bias": (dim,), "head.modulation": (1, 2, dim)}
    linears = {"text_embedding.0": (dim, 4096), "text_embedding.2": (dim, dim), "head.head": (64, dim)}
    linears |= {"time_embedding.0": (dim, 256), "time_embedding.2": (dim, dim), "time_projection.1": (6 * dim, dim)}
    image = [] if config.image_dim is None else ["k_img", "v_img"]
    if image:
        linears |= {"img_emb.proj.1": (1280, 1280), "img_emb.proj.3": (dim, 1280)}
        shapes |= {f"img_emb.proj.0.{kind}": (1280,) for kind in ("weight", "bias")}
        shapes |= {f"img_emb.proj.4.{kind}": (dim,) for kind in ("weight", "bias")}
    for layer in range(config.num_layers):
        block = f"blocks.{layer}."
        shapes |= {block + "modulation": (1, 6, dim), block + "norm3.weight": (dim,), block + "norm3.bias": (dim,)}
        linears |= {f"{block}self_attn.{name}": (dim, dim) for name in "qkvo"}
        linears |= {f"{block}cross_attn.{name}": (dim, dim) for name in ["q", "k", "v", "o", *image]}
        linears |= {block + "ffn.0": (ffn_dim, dim), block + "ffn.2": (dim, ffn_dim)}
        shapes |= {f"{block}{attn}.norm_{name}.weight": (dim,) for attn in ("self_attn", "cross_attn") for name in "qk"}
        shapes |= {f"{block}cross_attn.norm_k_img.weight": (dim,) for _ in image[:1]}
    shapes |= {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    return shapes


def abstract_dit(config: DiTConfig) -> Any:
    shapes = [(1, 1, 2, 2, config.in_channels), (1,), (1, config.text_len, config.text_dim), (1, 1, config.image_dim)]
    inputs = [None if None in shape else jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.eval_shape(DiT(config).init, jax.random.key(0), *inputs)["params"]


T2V = DiTConfig(in_channels=16, image_dim=None)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (DiTConfig(), 1303),
        (T2V, 1095),
        (dataclasses.replace(T2V, dim=1536, ffn_dim=8960, num_heads=12, num_layers=30), 825),
    ],
    ids=["magref_14b", "wan_t2v_14b", "wan_t2v_1_3b"],
)
def test_dit_table_names_the_released_checkpoints_and_every_parameter(config: DiTConfig, count: int):
    shapes = torch_shapes(dit_rules(config), abstract_dit(config))
    assert shapes == wan_shapes(config)
    assert len(shapes) == count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network", TABLES)
def test_every_bit_comes_back(network: str, layout: str, dtype: str):
    rules = TABLES[network](getattr(CONFIG, network), layout)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), tiny_abstract_params()[network]
    )
    shapes = torch_shapes(rules, abstract)
    tensors = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in random_tensors(shapes).items()}

    params = convert(rules, tensors, abstract)
    back = to_torch(rules, params)

    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(tensor.size for tensor in tensors.values())
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert back[name].tobytes() == tensor.tobytes(), name


EXTRA = {
    ("dit", "hf"): ["blocks.0.attn2.norm_added_q.weight", "blocks.1.attn2.norm_added_q.weight"],
    ("text_encoder", "wan"): ["spiece_model"],
    ("text_encoder", "hf"): ["spiece_model", "encoder.embed_tokens.weight"],
    ("image_encoder", "wan"): ["textual.token_embedding.weight", "log_scale"],
    ("image_encoder", "hf"): ["embeddings.position_ids", "visual_projection.weight"],
}


@pytest.mark.parametrize(("network", "layout"), EXTRA)
def test_what_files_hold_beside_the_network_is_dropped(network: str, layout: str):
    rules = TABLES[network](getattr(CONFIG, network), layout)
    abstract = tiny_abstract_params()[network]
    tensors = random_tensors(torch_shapes(rules, abstract))
    extra = {name: np.zeros(3, np.uint8) for name in EXTRA[network, layout]}
    if network == "image_encoder":
        unused = image_encoder_unused(CONFIG.image_encoder, layout)
        assert not unused.keys() & tensors.keys()
        extra |= {name: np.zeros(shape, np.float32) for name, shape in unused.items()}

    plain, with_extra = convert(rules, tensors, abstract), convert(rules, extra | tensors, abstract)

    jax.tree.map(np.testing.assert_array_equal, plain, with_extra)
    with pytest.raises(ValueError, match=r"'other.weight' .* matches 0 conversion rules"):
        convert(rules, tensors | {"other.weight": np.zeros(3)}, abstract)


@pytest.mark.parametrize("network", TABLES)
def test_an_unknown_layout_is_an_error(network: str):
    with pytest.raises(ValueError, match="layout='diffusers' is unknown; choose one of 'wan', 'hf'"):
        TABLES[network](getattr(CONFIG, network), "diffusers")
