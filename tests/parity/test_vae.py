"""The VAE against diffusers, which streams its chunks, through the names of the original Wan checkpoint."""

import copy
import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders import autoencoder_kl_wan

from magref_jax.config import VAEConfig
from magref_jax.convert.rules import convert, to_torch, torch_shapes
from magref_jax.convert.vae import vae_rules
from magref_jax.models import vae
from tests.parity.rounding import rounding_ratio
from tests.parity.torch_random import random_tensors

pytestmark = pytest.mark.parity

# The released layout; the width is the least that tells 3 (pixels), 16 (latents) and every stage apart.
WAN = VAEConfig(base_dim=10)
SMALL = VAEConfig(base_dim=8, dim_multipliers=(1, 2, 4), num_res_blocks=1, temporal_downsample=(False, True))
CONFIGS = {"wan": WAN, "small": SMALL}
HEIGHT, WIDTH = 24, 16

# Float32 rounding through 30 convolutions at unit scale.
TOLERANCE = 2e-5

RESIDUAL_BLOCK = (
    (r"residual\.0", "norm1"),
    (r"residual\.2", "conv1"),
    (r"residual\.3", "norm2"),
    (r"residual\.6", "conv2"),
    (r"shortcut", "conv_shortcut"),
)


def diffusers_name(config: VAEConfig, name: str) -> str:
    """The same renaming as diffusers' own converter, which knows the released number of stages only."""
    for old, new in RESIDUAL_BLOCK:
        name = re.sub(rf"\.{old}\.", f".{new}.", name)
    name = re.sub(r"coder\.conv1\.", "coder.conv_in.", name)
    name = re.sub(r"^conv1\.", "quant_conv.", name)
    name = re.sub(r"^conv2\.", "post_quant_conv.", name)
    name = re.sub(r"\.head\.0\.", ".norm_out.", name)
    name = re.sub(r"\.head\.2\.", ".conv_out.", name)
    name = re.sub(r"\.middle\.1\.", ".mid_block.attentions.0.", name)
    name = re.sub(r"\.middle\.([02])\.", lambda match: f".mid_block.resnets.{int(match[1]) // 2}.", name)
    name = name.replace(".downsamples.", ".down_blocks.")
    if match := re.match(r"decoder\.upsamples\.(\d+)\.", name):
        stage, position = divmod(int(match[1]), config.num_res_blocks + 2)
        layer = f"resnets.{position}" if position <= config.num_res_blocks else "upsamplers.0"
        name = f"decoder.up_blocks.{stage}.{layer}.{name[match.end() :]}"
    return name


@functools.cache
def abstract_params(config: VAEConfig):
    frames = jax.ShapeDtypeStruct((2, 5, HEIGHT, WIDTH, 3), np.float32)
    latents = jax.ShapeDtypeStruct(latent_shape(config, 5), np.float32)
    return jax.eval_shape(vae.VAE(config).init, jax.random.key(0), frames, latents)["params"]


def latent_shape(config: VAEConfig, num_frames: int) -> tuple[int, ...]:
    size = HEIGHT // config.spatial_stride, WIDTH // config.spatial_stride
    return 2, config.num_latent_frames(num_frames), *size, config.latent_channels


@functools.cache
def tensors(config: VAEConfig) -> dict[str, np.ndarray]:
    return random_tensors(torch_shapes(vae_rules(config), abstract_params(config)))


@functools.cache
def params(config: VAEConfig):
    return convert(vae_rules(config), tensors(config), abstract_params(config))


@functools.cache
def reference(config: VAEConfig) -> AutoencoderKLWan:
    torch.set_num_threads(1)
    model = AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.latent_channels,
        dim_mult=list(config.dim_multipliers),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
    ).eval()
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors(config).items()}
    if config is WAN:
        state = convert_wan_vae_to_diffusers(state)
    else:
        state = {diffusers_name(config, name): tensor for name, tensor in state.items()}
    model.load_state_dict(state, strict=True)
    return model


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 4, 1, 2, 3)))


def channels_last(x: torch.Tensor) -> np.ndarray:
    return x.numpy().transpose(0, 2, 3, 4, 1)


@functools.cache
def encoded(config: VAEConfig, num_frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random frames, and the mean and log variance that diffusers makes of them."""
    shape = (2, num_frames, HEIGHT, WIDTH, 3)
    frames = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
    with torch.no_grad():
        posterior = reference(config).encode(channels_first(frames)).latent_dist
    mean, log_variance = channels_last(posterior.mean), channels_last(posterior.logvar)
    assert mean.shape == latent_shape(config, num_frames)
    assert min(np.std(mean), np.std(log_variance)) > 0.3
    return frames, mean, log_variance


@functools.cache
def decoded(config: VAEConfig, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Random latents, and the frames that diffusers makes of them, clamped to [-1, 1]."""
    latents = np.random.default_rng(2).standard_normal(latent_shape(config, num_frames)).astype(np.float32)
    with torch.no_grad():
        frames = channels_last(reference(config).decode(channels_first(latents)).sample)
    assert frames.shape == (2, num_frames, HEIGHT, WIDTH, 3)
    assert np.std(frames) > 0.25
    assert np.mean(np.abs(frames) == 1) < 0.25  # the clamp hides little
    return latents, frames


def assert_equals_diffusers(config: VAEConfig, variant: VAEConfig, num_frames: int, close: Callable[..., None]):
    def run(method: str, x: np.ndarray):
        return jax.jit(functools.partial(vae.VAE(variant).apply, method=method))({"params": params(config)}, x)

    frames, theirs_mean, theirs_log_variance = encoded(config, num_frames)
    mean, log_variance, _ = run("encode", frames)
    close("VAE encode", mean, theirs_mean, TOLERANCE)
    close("VAE encode", log_variance, theirs_log_variance, TOLERANCE)

    latents, theirs = decoded(config, num_frames)
    ours, _ = run("decode", latents)
    close("VAE decode", np.clip(ours, -1, 1), theirs, TOLERANCE)


@pytest.mark.parametrize("num_frames", [1, 17])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_diffusers(config, num_frames, close):
    assert_equals_diffusers(config, config, num_frames, close)


@pytest.mark.slow
def test_equals_diffusers_in_float64(close, monkeypatch):
    """Nothing is approximately right: with the rounding of float32 gone, so is the difference."""
    # diffusers repeats pixels in float32, whatever the dtype of the rest.
    monkeypatch.setattr(autoencoder_kl_wan.WanUpsample, "forward", torch.nn.Upsample.forward)
    frames, latents = encoded(WAN, 17)[0].astype(np.float64), decoded(WAN, 17)[0].astype(np.float64)
    model = copy.deepcopy(reference(WAN)).double()
    with torch.no_grad():
        posterior = model.encode(channels_first(frames)).latent_dist
        theirs = channels_last(model.decode(channels_first(latents)).sample)
    double = dataclasses.replace(WAN, dtype="float64")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params(WAN))
        mean, log_variance, _ = jax.jit(functools.partial(vae.VAE(double).apply, method="encode"))(
            {"params": wide}, frames
        )
        ours, _ = jax.jit(functools.partial(vae.VAE(double).apply, method="decode"))({"params": wide}, latents)
    assert mean.dtype == ours.dtype == np.float64
    close("VAE encode, float64", mean, channels_last(posterior.mean), 1e-10)
    close("VAE encode, float64", log_variance, channels_last(posterior.logvar), 1e-10)
    close("VAE decode, float64", np.clip(ours, -1, 1), theirs, 1e-10)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_convolution_by_taps_equals_diffusers(config, close):
    assert_equals_diffusers(config, dataclasses.replace(config, convolution="taps"), 17, close)


def test_streams_equal_diffusers(close):
    frames, theirs_mean, _ = encoded(WAN, 17)
    latents = jax.jit(functools.partial(vae.encode_stream, WAN))(params(WAN), frames)
    mean, std = np.asarray(WAN.latent_mean), np.asarray(WAN.latent_std)
    close("VAE encode, streamed", latents, (theirs_mean - mean) / std, TOLERANCE)

    latents, theirs_frames = decoded(WAN, 17)
    frames = jax.jit(functools.partial(vae.decode_stream, WAN))(params(WAN), (latents - mean) / std)
    close("VAE decode, streamed", frames, theirs_frames, TOLERANCE)


def test_bfloat16_is_about_as_far_from_float32_as_that_of_diffusers():
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    model = copy.deepcopy(reference(SMALL)).bfloat16()
    frames, mean, _ = encoded(SMALL, 17)
    latents, theirs = decoded(SMALL, 17)
    with torch.no_grad():
        rounded_mean = channels_last(model.encode(channels_first(frames).bfloat16()).latent_dist.mean.float())
        rounded = channels_last(model.decode(channels_first(latents).bfloat16()).sample.float())
    found = {
        method: np.asarray(
            jax.jit(functools.partial(vae.VAE(half).apply, method=method))({"params": params(SMALL)}, x)[0]
        )
        for method, x in (("encode", frames), ("decode", latents))
    }
    ratios = [
        rounding_ratio([(found["encode"], rounded_mean, mean)]),
        rounding_ratio([(np.clip(found["decode"], -1, 1), rounded, theirs)]),
    ]
    # Measured 0.99 and 0.92: both round after every layer.
    assert max(ratios) < 1.2, ratios


def test_renaming_of_this_file_is_that_of_diffusers():
    names = {name: name for name in tensors(WAN)}
    assert {diffusers_name(WAN, name): name for name in names} == convert_wan_vae_to_diffusers(names)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_table_renames_as_this_file(config):
    hf = to_torch(vae_rules(config, "hf"), params(config))
    assert hf.keys() == {diffusers_name(config, name) for name in tensors(config)}
    for name, tensor in tensors(config).items():
        np.testing.assert_array_equal(hf[diffusers_name(config, name)], tensor, err_msg=name)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_table_is_invertible(config):
    back = to_torch(vae_rules(config), params(config))
    assert back.keys() == tensors(config).keys()
    for name, tensor in tensors(config).items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
