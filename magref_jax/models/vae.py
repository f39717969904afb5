"""The Wan 2.1 causal video autoencoder: frames ↔ latents, with the frame cache passed in and out.

A stream is cut into chunks of frames. Every temporal layer takes the last frames of the chunk before and returns its own;
`None` starts a stream. The first frame of a stream gets a latent frame of its own:

* going down, it skips the temporal convolution, and the remaining frames are `conv(frames 0..T-1)`, kernel 3, stride 2;
* going up, it skips the temporal convolution and is not doubled; later frames never see it there.

So one call on the whole clip and any chain of chunks give equal results, as long as chunks after the first hold multiples of
`temporal_stride` frames. All tensors are channels last, `[B F H W C]`.

Port of wan/modules/vae.py, Wan-Video/Wan2.1@9737cba.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from magref_jax.config import VAEConfig
from magref_jax.sharding import constrain

Cache = Any  # a nested dict of the last frames each temporal layer has seen
Finish = Callable[[Array], Any]  # of frames [B F H W 3] in [-1, 1], to arrays [B F ...]: to bytes, for example

_KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", dtype=jnp.float32)


def _wide(dtype: Any) -> Any:
    """float32, or float64 where a comparison with torch runs in it."""
    return jnp.promote_types(dtype, jnp.float32)


def _causal_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Zero for frames of the past: training starts from a network of images, and a clip is at first its frames."""
    present = _KERNEL_INIT(key, shape[1:], dtype)
    return jnp.zeros(shape, dtype).at[-1].set(present)


def _cut(x: Float[Array, "B F H W C"], stride: int = 1) -> Float[Array, "B F H W C"]:
    """Frames cut along their longer side, where convolutions exchange the fewest values, as often as a stride leaves whole."""
    batch, frames, height, width, channels = x.shape
    sides = ("space", "side") if height >= width else ("side", "space")
    shape = batch, frames, height // stride, width // stride, channels
    return constrain(x, "batch", "frames", *sides, "channels", shape=shape)


def _conv2d(x: Array, kernel: Array, stride: int, padding: list[tuple[int, int]]) -> Array:
    """A 2-D convolution of every frame."""
    batch, frames = x.shape[:2]
    y = lax.conv_general_dilated(
        x.reshape(batch * frames, *x.shape[2:]),
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(batch, frames, *y.shape[1:])


def _conv3d(x: Array, past: Array | None, kernel: Array) -> Array:
    taps, height, width = kernel.shape[:3]
    spatial = [(height // 2, height // 2), (width // 2, width // 2)]
    x = jnp.pad(x, [(0, 0), (taps - 1, 0), (0, 0), (0, 0), (0, 0)]) if past is None else jnp.concatenate([past, x], 1)
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), [(0, 0), *spatial], dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def _conv_taps(x: Array, past: Array | None, kernel: Array) -> Array:
    taps, height, width = kernel.shape[:3]
    spatial = [(height // 2, height // 2), (width // 2, width // 2)]
    frames = x.shape[1]
    if past is not None:
        seen = jnp.concatenate([past, x], 1)
        # Frame by frame in the chunks of a stream: less memory, and what is added up stays in the cache.
        size = 1 if frames <= 4 else frames
        parts = (
            sum(_conv2d(seen[:, start + i : start + i + size], kernel[i], 1, spatial) for i in range(taps))
            for start in range(0, frames, size)
        )
        return jnp.concatenate(list(parts), 1)
    total = jnp.zeros((), x.dtype)
    for tap in range(taps):
        delay = taps - 1 - tap
        if delay < frames:  # at the start of a stream the other taps see only zeros
            y = _conv2d(x[:, : frames - delay], kernel[tap], 1, spatial)
            total += jnp.pad(y, [(0, 0), (delay, 0), (0, 0), (0, 0), (0, 0)])
    return total


CONVOLUTIONS = {"3d": _conv3d, "taps": _conv_taps}


class Chunk:
    """The layers of a module on one chunk: each takes its part of the cache before, and leaves one in `cache`."""

    def __init__(self, before: Cache) -> None:
        self.before = before or {}
        self.cache = {}

    def __call__(self, layer: nn.Module, x: Array) -> Array:
        x, self.cache[layer.name] = layer(x, self.before.get(layer.name))
        return x


class CausalConv(nn.Module):
    """A 3-D convolution that sees the present and the `kernel_size[0] - 1` frames before it, zeros before the first."""

    config: VAEConfig
    features: int
    kernel_size: tuple[int, int, int] = (3, 3, 3)

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W C"], past: Array | None = None) -> tuple[Array, Array]:
        kernel = self.param("kernel", _causal_init, (*self.kernel_size, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        y = CONVOLUTIONS[self.config.convolution](x, past, kernel.astype(x.dtype)) + bias.astype(x.dtype)
        keep = self.kernel_size[0] - 1
        missing = keep - x.shape[1]
        if missing <= 0:
            return y, x[:, x.shape[1] - keep :]
        before = (
            jnp.zeros_like(x[:, :1], shape=(x.shape[0], missing, *x.shape[2:])) if past is None else past[:, -missing:]
        )
        return y, jnp.concatenate([before, x], 1)


class Conv(nn.Module):
    """A 2-D convolution of every frame, padded to keep its size."""

    features: int
    kernel_size: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W C"]) -> Float[Array, "B F H W D"]:
        size = self.kernel_size
        kernel = self.param("kernel", _KERNEL_INIT, (size, size, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return _conv2d(x, kernel.astype(x.dtype), 1, [(size // 2, size // 2)] * 2) + bias.astype(x.dtype)


class ChannelNorm(nn.Module):
    """x / max(‖x‖₂, 1e-12) · √C · scale over channels, in float32."""

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W C"]) -> Float[Array, "B F H W C"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        wide = x.astype(_wide(x.dtype))
        # The floor sits inside the root so that the gradient at x = 0 is finite.
        inverse = lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(wide), -1, keepdims=True), 1e-24))
        return (wide * inverse * channels**0.5 * scale).astype(x.dtype)


class ResidualBlock(nn.Module):
    config: VAEConfig
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W C"], cache: Cache = None) -> tuple[Float[Array, "B F H W D"], Cache]:
        run = Chunk(cache)
        y = x = _cut(x)
        for layer in ("in", "out"):
            y = nn.silu(ChannelNorm(name=f"norm_{layer}")(y))
            y = run(CausalConv(self.config, self.features, name=f"conv_{layer}"), y)
        if x.shape[-1] != self.features:
            x = Conv(self.features, name="shortcut")(x)
        # Where the next layer has another size: what XLA infers from that, it gets wrong in the gradients of kernels.
        return _cut(x + y), run.cache


class SpatialAttention(nn.Module):
    """Single-head self-attention over the positions of each frame."""

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W C"]) -> Float[Array, "B F H W C"]:
        batch, _, height, _, channels = x.shape
        # On a mesh every device has whole frames here, and a share of the queries.
        whole = constrain(ChannelNorm(name="norm")(x), "batch", "frames", "side", "side", "channels")
        qkv = Conv(3 * channels, name="qkv")(whole)
        query, key, value = jnp.split(rearrange(qkv, "b f h w c -> (b f) (h w) c"), 3, axis=-1)
        query = constrain(query, "batch", "space", "channels")
        wide = _wide(x.dtype)
        logits = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=wide) / channels**0.5
        y = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(logits), value.astype(wide)).astype(x.dtype)
        y = constrain(y, "batch", "side", "channels")
        y = rearrange(y, "(b f) (h w) c -> b f h w c", b=batch, h=height)
        return x + Conv(channels, name="out")(_cut(y))


class Downsample(nn.Module):
    """Halves height and width and, if `temporal`, the frames after the first."""

    config: VAEConfig
    temporal: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W C"], past: Array | None = None) -> tuple[Array, Array | None]:
        channels = x.shape[-1]
        kernel = self.param("kernel", _KERNEL_INIT, (3, 3, channels, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        # One row and column of padding, right and bottom only.
        x = _cut(_conv2d(_cut(x, stride=2), kernel.astype(x.dtype), 2, [(0, 1), (0, 1)]) + bias.astype(x.dtype))
        if not self.temporal:
            return x, None
        kernel = self.param("time_kernel", _KERNEL_INIT, (3, channels, channels), jnp.float32).astype(x.dtype)
        bias = self.param("time_bias", nn.initializers.zeros, (channels,), jnp.float32).astype(x.dtype)
        frames = x if past is None else jnp.concatenate([past, x], 1)
        steps = (frames.shape[1] - 1) // 2
        y = sum(frames[:, tap : tap + 2 * steps : 2] @ kernel[tap] for tap in range(3)) + bias
        return (jnp.concatenate([x[:, :1], y], 1) if past is None else y), x[:, -1:]


class Upsample(nn.Module):
    """Doubles height and width, halves the channels and, if `temporal`, doubles the frames after the first."""

    config: VAEConfig
    temporal: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W C"], past: Array | None = None) -> tuple[Array, Array | None]:
        channels = x.shape[-1]
        if self.temporal:
            conv = CausalConv(self.config, 2 * channels, (3, 1, 1), name="time_conv")
            first, rest = (x[:, :1], x[:, 1:]) if past is None else (x[:, :0], x)
            if rest.shape[1] or self.is_initializing():
                y, past = conv(rest if rest.shape[1] else first, past)
                x = rearrange(y, "b f h w (s c) -> b (f s) h w c", s=2)
                x = jnp.concatenate([first, x], 1) if rest.shape[1] else first
            else:  # a first chunk of one frame: what comes next is padded with zeros, as if this frame did not exist
                past = jnp.zeros_like(x, shape=(x.shape[0], 2, *x.shape[2:]))
        x = x.repeat(2, axis=2).repeat(2, axis=3)
        return Conv(channels // 2, kernel_size=3, name="conv")(x), past


class Middle(nn.Module):
    config: VAEConfig
    features: int

    @nn.compact
    def __call__(self, x: Array, cache: Cache = None) -> tuple[Array, Cache]:
        run = Chunk(cache)
        x = run(ResidualBlock(self.config, self.features, name="res_0"), x)
        x = SpatialAttention(name="attention")(x)
        x = run(ResidualBlock(self.config, self.features, name="res_1"), x)
        return x, run.cache


class Encoder(nn.Module):
    config: VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W 3"], cache: Cache = None) -> tuple[Float[Array, "B f h w C"], Cache]:
        cfg = self.config
        run = Chunk(cache)
        x = run(CausalConv(cfg, cfg.base_dim, name="conv_in"), x)
        for stage, multiplier in enumerate(cfg.dim_multipliers):
            for i in range(cfg.num_res_blocks):
                x = run(ResidualBlock(cfg, cfg.base_dim * multiplier, name=f"stage_{stage}_res_{i}"), x)
            if stage < len(cfg.temporal_downsample):
                x = run(Downsample(cfg, cfg.temporal_downsample[stage], name=f"stage_{stage}_down"), x)
        x = run(Middle(cfg, x.shape[-1], name="middle"), x)
        x = nn.silu(ChannelNorm(name="norm_out")(x))
        x = run(CausalConv(cfg, 2 * cfg.latent_channels, name="conv_out"), x)
        return x, run.cache


class Decoder(nn.Module):
    config: VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B f h w C"], cache: Cache = None) -> tuple[Float[Array, "B F H W 3"], Cache]:
        cfg = self.config
        run = Chunk(cache)
        multipliers = cfg.dim_multipliers[::-1]
        x = run(CausalConv(cfg, cfg.base_dim * multipliers[0], name="conv_in"), x)
        x = run(Middle(cfg, x.shape[-1], name="middle"), x)
        for stage, multiplier in enumerate(multipliers):
            for i in range(cfg.num_res_blocks + 1):
                x = run(ResidualBlock(cfg, cfg.base_dim * multiplier, name=f"stage_{stage}_res_{i}"), x)
            if stage < len(cfg.temporal_downsample):
                x = run(Upsample(cfg, cfg.temporal_downsample[::-1][stage], name=f"stage_{stage}_up"), x)
        x = nn.silu(ChannelNorm(name="norm_out")(x))
        x = run(CausalConv(cfg, 3, name="conv_out"), x)
        return x, run.cache


class VAE(nn.Module):
    """`encode` and `decode` take a whole clip, or one chunk of a stream with the cache of the chunk before."""

    config: VAEConfig

    def setup(self) -> None:
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quant = Conv(2 * self.config.latent_channels)
        self.post_quant = Conv(self.config.latent_channels)

    def __call__(
        self, frames: Float[Array, "B F H W 3"], noise: Float[Array, "B f h w C"]
    ) -> tuple[Array, Array, Array]:
        """(reconstruction, mean, log variance), decoding mean + noise · standard deviation: the training path."""
        mean, log_variance, _ = self.encode(frames)
        reconstruction, _ = self.decode(mean + noise * jnp.exp(0.5 * log_variance))
        return reconstruction, mean, log_variance

    def encode(self, frames: Float[Array, "B F H W 3"], cache: Cache = None) -> tuple[Array, Array, Cache]:
        """Frames in [-1, 1] → (mean, log variance) [B f h w C] of the latents, not normalised, and the cache.

        Raises:
            ValueError: without a cache, the number of frames is not `temporal_stride`·n + 1.
        """
        if cache is None:  # the strided convolutions would leave the last frames out
            self.config.num_latent_frames(frames.shape[1])
        dtype = jnp.dtype(self.config.dtype)
        x, cache = self.encoder(frames.astype(dtype), cache)
        mean, log_variance = jnp.split(self.quant(x).astype(_wide(x.dtype)), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0), cache

    def decode(self, latents: Float[Array, "B f h w C"], cache: Cache = None) -> tuple[Array, Cache]:
        """Latents that are not normalised → frames, not clamped, and the cache."""
        dtype = jnp.dtype(self.config.dtype)
        x, cache = self.decoder(self.post_quant(latents.astype(dtype)), cache)
        return x.astype(_wide(x.dtype)), cache


def normalise(config: VAEConfig, mean: Float[Array, "B F H W C"]) -> Float[Array, "B F H W C"]:
    """The latents that the DiT works on: (mean − μ) / σ per channel."""
    shift, scale = _statistics(config, mean.dtype)
    return (mean - shift) / scale


def denormalise(config: VAEConfig, latents: Float[Array, "B F H W C"]) -> Float[Array, "B F H W C"]:
    mean, std = _statistics(config, latents.dtype)
    return latents * std + mean


def _statistics(config: VAEConfig, dtype: Any) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """Mean and standard deviation of every channel."""
    return jnp.asarray(config.latent_mean, _wide(dtype)), jnp.asarray(config.latent_std, _wide(dtype))


def encode(config: VAEConfig, params: Any, frames: Float[Array, "B F H W 3"]) -> Float[Array, "B f h w C"]:
    """Normalised latents (the mean; nothing is sampled) of whole clips in [-1, 1].

    Raises:
        ValueError: the number of frames is not `temporal_stride`·n + 1.
    """
    mean, _, _ = VAE(config).apply({"params": params}, frames, method="encode")
    return normalise(config, mean)


def decode(config: VAEConfig, params: Any, latents: Float[Array, "B f h w C"], finish: Finish | None = None) -> Any:
    """Frames [B F H W 3] in [-1, 1] of whole clips of normalised latents, or what `finish` makes of them."""
    frames, _ = VAE(config).apply({"params": params}, denormalise(config, latents), method="decode")
    return _finish(frames, finish)


def encode_stream(config: VAEConfig, params: Any, frames: Float[Array, "B F H W 3"]) -> Float[Array, "B f h w C"]:
    """As `encode`, one chunk of `temporal_stride` frames after another: memory does not grow with the number of frames."""
    config.num_latent_frames(frames.shape[1])

    def chunk(cache: Cache, frames: Array) -> tuple[Cache, Array]:
        mean, _, cache = VAE(config).apply({"params": params}, frames, cache, method="encode")
        return cache, normalise(config, mean)

    return _stream(chunk, frames, config.temporal_stride)


def decode_stream(
    config: VAEConfig, params: Any, latents: Float[Array, "B f h w C"], finish: Finish | None = None
) -> Any:
    """As `decode`, one latent frame after another. Of all frames, only what `finish` returns is ever there at once."""

    def chunk(cache: Cache, latents: Array) -> tuple[Cache, Array]:
        frames, cache = VAE(config).apply({"params": params}, denormalise(config, latents), cache, method="decode")
        return cache, _finish(frames, finish)

    return _stream(chunk, latents, 1)


def _finish(frames: Float[Array, "B F H W 3"], finish: Finish | None) -> Any:
    frames = jnp.clip(frames, -1.0, 1.0)
    return frames if finish is None else finish(frames)


def _stream(chunk: Callable[[Cache, Array], tuple[Cache, Any]], x: Array, size: int) -> Any:
    """Runs `chunk` on the first frame, then on every `size` frames; what it returns is a tree of arrays [B F ...]."""
    cache, first = chunk(None, x[:, :1])
    num_chunks = (x.shape[1] - 1) // size
    if num_chunks == 0:
        return first
    _, parts = jax.eval_shape(chunk, cache, x[:, :size])

    # Written where they belong, in the loop: stacked and moved afterwards, all frames would be there twice.
    def with_room(first: Array, part: jax.ShapeDtypeStruct) -> Array:
        shape = (x.shape[0], 1 + num_chunks * part.shape[1], *first.shape[2:])
        return jnp.zeros(shape, first.dtype).at[:, :1].set(first)

    def step(i: Array, carry: tuple[Cache, Any]) -> tuple[Cache, Any]:
        cache, out = carry
        cache, parts = chunk(cache, lax.dynamic_slice_in_dim(x, 1 + i * size, size, 1))

        def write(out: Array, part: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(out, part, 1 + i * part.shape[1], 1)

        return cache, jax.tree.map(write, out, parts)

    return lax.fori_loop(0, num_chunks, step, (cache, jax.tree.map(with_room, first, parts)))[1]
