"""The VAE against what is known without a reference: lengths, causality, chunks, sizes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from magref_jax.config import VAEConfig
from magref_jax.convert.rules import torch_shapes
from magref_jax.convert.vae import vae_rules
from magref_jax.models import vae

FULL_SIZE = VAEConfig()
# Temporal stride 4, as the released one.
SMALL = VAEConfig(base_dim=4, dim_multipliers=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True))


def abstract_params(config: VAEConfig):
    stride = config.spatial_stride
    frames = jax.ShapeDtypeStruct((1, 1, stride, stride, 3), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, 1, 1, 1, config.latent_channels), jnp.float32)
    return jax.eval_shape(vae.VAE(config).init, jax.random.key(0), frames, latents)["params"]


@functools.cache
def params(config: VAEConfig):
    """Random kernels of unit gain; everything else random too."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        return rng.standard_normal(leaf.shape, np.float32) / math.sqrt(max(1, math.prod(leaf.shape[:-1])))

    return jax.tree.map(draw, abstract_params(config))


def run(config: VAEConfig, method: str):
    return jax.jit(functools.partial(vae.VAE(config).apply, {"params": params(config)}, method=method))


def random_frames(batch: int, num_frames: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (batch, num_frames, 8, 8, 3)).astype(np.float32)


def random_latents(batch: int, num_latent_frames: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((batch, num_latent_frames, 2, 2, 16), np.float32)


def test_full_size_is_that_of_the_released_weights():
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(FULL_SIZE))]
    assert len(sizes) == 194
    assert sum(sizes) == 126_892_531


def test_table_names_every_released_tensor():
    shapes = torch_shapes(vae_rules(FULL_SIZE), abstract_params(FULL_SIZE))
    assert len(shapes) == 194
    assert sum(map(math.prod, shapes.values())) == 126_892_531
    released = {
        "conv1.weight": (32, 32, 1, 1, 1),
        "conv2.weight": (16, 16, 1, 1, 1),
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "encoder.downsamples.0.residual.0.gamma": (96, 1, 1, 1),
        "encoder.downsamples.2.resample.1.weight": (96, 96, 3, 3),
        "encoder.downsamples.3.residual.2.weight": (192, 96, 3, 3, 3),
        "encoder.downsamples.10.residual.6.weight": (384, 384, 3, 3, 3),
        "encoder.middle.1.norm.gamma": (384, 1, 1),
        "encoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
        "encoder.head.2.weight": (32, 384, 3, 3, 3),
        "decoder.conv1.weight": (384, 16, 3, 3, 3),
        "decoder.upsamples.3.resample.1.weight": (192, 384, 3, 3),
        "decoder.upsamples.4.residual.2.weight": (384, 192, 3, 3, 3),
        "decoder.upsamples.11.resample.1.weight": (96, 192, 3, 3),
        "decoder.upsamples.14.residual.6.weight": (96, 96, 3, 3, 3),
        "decoder.head.2.weight": (3, 96, 3, 3, 3),
    }
    assert {name: shapes[name] for name in released} == released
    assert {name: shape for name, shape in shapes.items() if name.endswith("time_conv.weight")} == {
        "encoder.downsamples.5.time_conv.weight": (192, 192, 3, 1, 1),
        "encoder.downsamples.8.time_conv.weight": (384, 384, 3, 1, 1),
        "decoder.upsamples.3.time_conv.weight": (768, 384, 3, 1, 1),
        "decoder.upsamples.7.time_conv.weight": (768, 384, 3, 1, 1),
    }
    assert {name: shape for name, shape in shapes.items() if name.endswith("shortcut.weight")} == {
        "encoder.downsamples.3.shortcut.weight": (192, 96, 1, 1, 1),
        "encoder.downsamples.6.shortcut.weight": (384, 192, 1, 1, 1),
        "decoder.upsamples.4.shortcut.weight": (384, 192, 1, 1, 1),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("num_frames", "num_latent_frames"), [(1, 1), (5, 2), (81, 21)])
def test_lengths(num_frames, num_latent_frames, dtype):
    config = dataclasses.replace(FULL_SIZE, dtype=dtype)
    weights = abstract_params(config)
    frames = jax.ShapeDtypeStruct((1, num_frames, 480, 832, 3), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, num_latent_frames, 60, 104, 16), jnp.float32)
    for encode in (vae.encode, vae.encode_stream):
        assert jax.eval_shape(functools.partial(encode, config), weights, frames) == latents
    for decode in (vae.decode, vae.decode_stream):
        assert jax.eval_shape(functools.partial(decode, config), weights, latents) == frames


@pytest.mark.parametrize("num_frames", [2, 16, 20])
def test_wrong_number_of_frames_raises(num_frames):
    frames = jnp.zeros((1, num_frames, 8, 8, 3))
    message = rf"num_frames={num_frames} must be 4n \+ 1"
    for encode in (vae.encode, vae.encode_stream):
        with pytest.raises(ValueError, match=message):
            encode(SMALL, params(SMALL), frames)
    with pytest.raises(ValueError, match=message):
        vae.VAE(SMALL).apply({"params": params(SMALL)}, frames, method="encode")


# In latent frames; a chunk encodes 4 frames per latent frame, and one frame for the first.
@pytest.mark.parametrize(("convolution", "sizes"), [("3d", (1, 2, 2)), ("taps", (2, 3))])
def test_chunks_equal_the_whole_clip(convolution, sizes):
    config = dataclasses.replace(SMALL, convolution=convolution)
    ends = np.cumsum(sizes)[:-1]
    for method, x, cuts in (("encode", random_frames(2, 17), 4 * ends - 3), ("decode", random_latents(2, 5), ends)):
        apply = run(config, method)
        whole = apply(x)[0]
        assert np.std(whole) > 0.1
        cache, chunks = None, []
        for chunk in np.split(x, cuts, axis=1):
            y, *_, cache = apply(chunk, cache)
            chunks.append(y)
        # Float32 rounding: a chunk of another length may add in another order.
        np.testing.assert_allclose(np.concatenate(chunks, 1), whole, rtol=0, atol=2e-5, err_msg=method)


def test_streams_equal_the_whole_clip():
    for whole, stream, x in (
        (vae.encode, vae.encode_stream, random_frames(2, 9)),
        (vae.decode, vae.decode_stream, random_latents(2, 3)),
    ):
        expected = jax.jit(functools.partial(whole, SMALL))(params(SMALL), x)
        streamed = jax.jit(functools.partial(stream, SMALL))(params(SMALL), x)
        np.testing.assert_allclose(streamed, expected, rtol=0, atol=2e-5)  # float32 rounding


def test_frames_leave_the_decoder_as_they_are_finished():
    def to_bytes(frames):
        return jnp.round(127.5 * (frames + 1)).astype(jnp.uint8)

    latents = random_latents(2, 3)
    frames = np.asarray(jax.jit(functools.partial(vae.decode, SMALL))(params(SMALL), latents), np.float64)
    expected = np.round(127.5 * (frames + 1))
    for decode in (vae.decode, vae.decode_stream):
        finished = jax.jit(functools.partial(decode, SMALL, finish=to_bytes))(params(SMALL), latents)
        assert finished.dtype == np.uint8
        # A value on the border between two bytes may be rounded either way.
        assert np.abs(np.asarray(finished, np.float64) - expected).max() <= 1
        assert np.mean(finished == expected) > 0.999


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_memory_of_a_stream_does_not_grow_with_its_length(method: str):
    def bytes_of(num_frames: int) -> tuple[int, int]:
        frames = jax.ShapeDtypeStruct((1, num_frames, 32, 32, 3), jnp.float32)
        latents = jax.ShapeDtypeStruct((1, num_frames // 4 + 1, 8, 8, 16), jnp.float32)
        stream, x = {
            "encode": (vae.encode_stream, frames),
            "decode": (functools.partial(vae.decode_stream, finish=lambda x: x.astype(jnp.uint8)), latents),
        }[method]
        memory = jax.jit(functools.partial(stream, SMALL)).lower(abstract_params(SMALL), x).compile().memory_analysis()
        return memory.temp_size_in_bytes, memory.output_size_in_bytes

    (short, short_out), (long, long_out) = bytes_of(17), bytes_of(81)
    assert long_out > 4 * short_out  # what is returned does grow
    assert long <= 1.02 * short


def test_decoder_is_causal():
    latents = random_latents(1, 4).repeat(4, axis=0)
    for k in range(1, 4):
        latents[k, k] += 1.0
    frames, _ = run(SMALL, "decode")(latents)
    change = np.abs(frames - frames[:1]).max(axis=(2, 3, 4))
    for k in range(1, 4):
        assert change[k, : 4 * k - 3].max() == 0
        assert change[k, 4 * k - 3 :].min() > 1e-3


def test_encoder_is_causal():
    frames = random_frames(1, 13).repeat(13, axis=0)
    for k in range(1, 13):
        frames[k, k] += 1.0
    mean, *_ = run(SMALL, "encode")(frames)
    change = np.abs(mean - mean[:1]).max(axis=(2, 3, 4))
    for k in range(1, 13):
        first = math.ceil(k / 4)
        assert change[k, :first].max() == 0
        assert change[k, first:].min() > 1e-4


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to it, in float64."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def test_channel_norm():
    norm = vae.ChannelNorm()
    scale = {"params": {"scale": jnp.array([1.0, -2.0])}}
    y = norm.apply(scale, jnp.array([3.0, 4.0]).reshape(1, 1, 1, 1, 2))
    np.testing.assert_allclose(y.ravel(), math.sqrt(2) * np.array([0.6, -1.6]), rtol=1e-6)
    # Without an epsilon: however dark a place is, its norm is 1, down to 1e-12.
    for size in (1e3, 1e-3, 1e-6, 1e-11, 1e-13):
        y = norm.apply(scale, jnp.array([3.0, 4.0]).reshape(1, 1, 1, 1, 2) * size)
        expected = math.sqrt(2) * np.array([3, -8]) * size / max(5 * size, 1e-12)
        np.testing.assert_allclose(y.ravel(), expected, rtol=1e-5)

    # A bfloat16 network rounds the result and nothing before it.
    rng = np.random.default_rng(4)
    x, gains = bfloat16(rng.standard_normal((1, 1, 1, 50, 96))), 1 + 0.3 * rng.standard_normal(96).astype(np.float32)
    y = norm.apply({"params": {"scale": gains}}, jnp.asarray(x, jnp.bfloat16))
    expected = x / np.sqrt(np.square(x).sum(-1, keepdims=True)) * math.sqrt(96) * gains
    assert np.mean(np.asarray(y, np.float64) == bfloat16(expected)) > 0.995

    zeros = jnp.zeros((1, 1, 1, 1, 2))
    np.testing.assert_array_equal(norm.apply(scale, zeros), zeros)
    for gradient in jax.tree.leaves(jax.grad(lambda *args: norm.apply(*args).sum(), argnums=(0, 1))(scale, zeros)):
        assert np.isfinite(gradient).all()


def test_attention_of_a_bfloat16_network_is_float32_inside():
    # Ones with signs, which the norm leaves as they are, and weights that bfloat16 holds: logits up to 60, where bfloat16
    # counts in quarters.
    rng = np.random.default_rng(3)
    x = rng.choice([-1.0, 1.0], (1, 1, 4, 5, 8))
    kernel = bfloat16(rng.standard_normal((8, 24)) * np.repeat([1.7, 1.7, 1], 8))
    params = {
        "norm": {"scale": np.ones(8, np.float32)},
        "qkv": {"kernel": kernel.astype(np.float32)[None, None], "bias": np.zeros(24, np.float32)},
        "out": {"kernel": np.eye(8, dtype=np.float32)[None, None], "bias": np.zeros(8, np.float32)},
    }

    found = vae.SpatialAttention().apply({"params": params}, jnp.asarray(x, jnp.bfloat16))

    query, key, value = np.split(bfloat16(x.reshape(20, 8) @ kernel), 3, axis=-1)
    logits = query @ key.T / math.sqrt(8)
    assert np.abs(logits).max() > 32
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = x + (weights / weights.sum(-1, keepdims=True) @ value).reshape(x.shape)
    # What is left are the roundings of the result and of its sum with x, values up to 8.
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=2**-5)


def test_log_variances_are_clipped_where_those_of_wan_are():
    extremes = np.array([-40, -29, -12, -5, 3, 19, 21, 100, *[0] * 8], np.float32)
    network = traverse_util.flatten_dict(params(SMALL), sep="/")
    network["quant/kernel"] = np.zeros_like(network["quant/kernel"])
    network["quant/bias"] = np.concatenate([extremes, extremes])
    network = traverse_util.unflatten_dict(network, sep="/")
    mean, log_variance, _ = vae.VAE(SMALL).apply({"params": network}, random_frames(1, 1), method="encode")
    np.testing.assert_array_equal(mean[0, 0, 0, 0], extremes)
    np.testing.assert_array_equal(log_variance[0, 0, 0, 0, :8], [-30, -29, -12, -5, 3, 19, 20, 20])


def test_normalised_latents_have_the_published_statistics():
    mean, std = np.float32(-0.7571), np.float32(2.8184)  # channel 0
    latents = np.zeros((1, 1, 1, 2, 16), np.float32)
    latents[..., 0] = mean, mean + 2 * std
    normalised = vae.normalise(FULL_SIZE, latents)
    np.testing.assert_allclose(normalised[0, 0, 0, :, 0], [0, 2], atol=1e-6)
    np.testing.assert_allclose(vae.denormalise(FULL_SIZE, normalised), latents, atol=1e-6)
