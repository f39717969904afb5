"""The tables against the torch modules: their names and shapes without memory, and diffusers' converters."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    UMT5Config,
    UMT5EncoderModel,
)

from magref_jax.config import DiTConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig
from magref_jax.convert.dit import dit_rules
from magref_jax.convert.image_encoder import image_encoder_rules, image_encoder_unused
from magref_jax.convert.rules import convert, to_torch, torch_shapes
from magref_jax.convert.text_encoder import text_encoder_rules
from magref_jax.convert.vae import vae_rules
from magref_jax.models.dit import DiT
from magref_jax.models.image_encoder import ImageEncoder
from magref_jax.models.text_encoder import TextEncoder
from magref_jax.models.vae import VAE
from tests.parity.test_dit import torch_dit
from tests.parity.torch_random import random_tensors

pytestmark = pytest.mark.parity

Shapes = dict[str, tuple[int, ...]]

T2V = DiTConfig(in_channels=16, image_dim=None)
DITS = {  # with the number of parameters of the released weights
    "i2v_14b": (DiTConfig(), 16_394_878_784),
    "t2v_14b": (T2V, 14_288_491_584),
    "t2v_1_3b": (dataclasses.replace(T2V, dim=1536, ffn_dim=8960, num_heads=12, num_layers=30), 1_418_996_800),
}
VAES = {
    "released": VAEConfig(),
    "three_stages": VAEConfig(
        base_dim=8, dim_multipliers=(1, 2, 4), num_res_blocks=1, temporal_downsample=(False, True)
    ),
    "two_stages": VAEConfig(base_dim=8, dim_multipliers=(2, 4), num_res_blocks=3, temporal_downsample=(True,)),
    "one_stage": VAEConfig(base_dim=8, dim_multipliers=(1,), num_res_blocks=1, temporal_downsample=()),
}


def shapes_of(tensors: dict[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def num_values(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def on_meta(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def abstract_params(module: Any, *shapes: tuple[int | None, ...], dtype: Any = jnp.float32) -> Any:
    inputs = [None if None in shape else jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


@functools.cache
def abstract_dit(config: DiTConfig) -> Any:
    latents, text = (1, 1, *config.patch_size[1:], config.in_channels), (1, config.text_len, config.text_dim)
    return abstract_params(DiT(config), latents, (1,), text, (1, 1, config.image_dim))


@functools.cache
def abstract_vae(config: VAEConfig) -> Any:
    stride = config.spatial_stride
    return abstract_params(VAE(config), (1, 1, stride, stride, 3), (1, 1, 1, 1, config.latent_channels))


def diffusers_dit(config: DiTConfig) -> Shapes:
    with torch.device("meta"):
        return shapes_of(torch_dit(config).state_dict())


def diffusers_vae(config: VAEConfig) -> Shapes:
    with torch.device("meta"):
        model = AutoencoderKLWan(
            base_dim=config.base_dim,
            z_dim=config.latent_channels,
            dim_mult=list(config.dim_multipliers),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal_downsample),
        )
    return shapes_of(model.state_dict())


@pytest.mark.parametrize(("config", "count"), DITS.values(), ids=DITS)
def test_dit(config: DiTConfig, count: int):
    theirs = diffusers_dit(config)
    hf = torch_shapes(dit_rules(config, "hf"), abstract_dit(config))
    wan = torch_shapes(dit_rules(config, "wan"), abstract_dit(config))
    assert hf == theirs
    assert shapes_of(convert_wan_transformer_to_diffusers(on_meta(wan))) == theirs
    assert num_values(hf) == num_values(wan) == count


@pytest.mark.parametrize("config", VAES.values(), ids=VAES)
def test_vae_in_the_names_of_diffusers(config: VAEConfig):
    assert torch_shapes(vae_rules(config, "hf"), abstract_vae(config)) == diffusers_vae(config)


def test_released_vae():
    config = VAEConfig()
    wan = torch_shapes(vae_rules(config, "wan"), abstract_vae(config))
    assert shapes_of(convert_wan_vae_to_diffusers(on_meta(wan))) == diffusers_vae(config)
    assert (len(wan), num_values(wan)) == (194, 126_892_531)


def test_umt5_xxl():
    config = TextEncoderConfig()
    with torch.device("meta"):
        model = UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.dim,
                d_kv=config.head_dim,
                d_ff=config.ffn_dim,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                feed_forward_proj="gated-gelu",
            )
        )
    theirs = shapes_of(model.state_dict())
    assert theirs.pop("encoder.embed_tokens.weight") == theirs["shared.weight"]

    abstract = abstract_params(TextEncoder(config), (1, 4), (1, 4), dtype=jnp.int32)
    hf, wan = (torch_shapes(text_encoder_rules(config, layout), abstract) for layout in ("hf", "wan"))

    assert hf == theirs
    assert list(hf.values()) == list(wan.values())
    assert (len(wan), num_values(wan)) == (242, 5_680_910_336)


def test_clip_vit_h_14():
    config = ImageEncoderConfig()
    clip = CLIPVisionConfig(
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        projection_dim=1024,
    )
    with torch.device("meta"):
        model, with_head = CLIPVisionModel(clip), CLIPVisionModelWithProjection(clip)
    # Some releases of transformers prefix every name.
    theirs = {name.removeprefix("vision_model."): shape for name, shape in shapes_of(model.state_dict()).items()}

    abstract = abstract_params(ImageEncoder(config), (1, config.image_size, config.image_size, 3))
    kept = {layout: torch_shapes(image_encoder_rules(config, layout), abstract) for layout in ("hf", "wan")}
    unused = {layout: image_encoder_unused(config, layout) for layout in kept}
    assert all(not kept[layout].keys() & unused[layout].keys() for layout in kept)

    assert kept["hf"] | unused["hf"] == theirs
    wan = kept["wan"] | unused["wan"]
    assert len(wan) == 392
    assert num_values(wan) == num_values(shapes_of(with_head.state_dict())) == 632_076_800


TINY_DIT = DiTConfig(
    dim=12, ffn_dim=16, num_heads=2, num_layers=2, in_channels=3, out_channels=2, text_dim=5, image_dim=7, freq_dim=8
)
TINY_VAE = VAEConfig(base_dim=2)  # the converter of diffusers knows the released number of stages only


@pytest.mark.parametrize(
    ("table", "config", "abstract", "converter"),
    [
        (dit_rules, TINY_DIT, abstract_dit, convert_wan_transformer_to_diffusers),
        (dit_rules, dataclasses.replace(TINY_DIT, image_dim=None), abstract_dit, convert_wan_transformer_to_diffusers),
        (vae_rules, TINY_VAE, abstract_vae, convert_wan_vae_to_diffusers),
    ],
    ids=["i2v", "t2v", "vae"],
)
def test_wan_weights_leave_under_the_names_of_diffusers_as_its_converter_has_them(table, config, abstract, converter):
    tensors = random_tensors(torch_shapes(table(config, "wan"), abstract(config)))
    params = convert(table(config, "wan"), tensors, abstract(config))
    hf = to_torch(table(config, "hf"), params)

    theirs = converter({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})

    assert hf.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(hf[name], tensor.numpy(), err_msg=name)
    back = convert(table(config, "hf"), hf, abstract(config))
    jax.tree.map(np.testing.assert_array_equal, back, params)
