"""CLIP's vision tower: the encoder that turns the reference canvas into the image embeddings of the DiT.

Port of wan/modules/clip.py, Wan-Video/Wan2.1@9737cba: OpenCLIP ViT-H/14, read before its last block. That block, the
norm after it and the projection to the text space do not exist here.

B batch · H/W height/width · S image size · I image tokens, the class token first · D model width · N heads · K head width
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from magref_jax.config import ImageEncoderConfig
from magref_jax.models.layers import REMAT, LayerNorm

# Per-channel statistics of CLIP's training images, in [0, 1].
CLIP_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
CLIP_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


@functools.lru_cache
def bicubic_matrix(in_size: int, out_size: int) -> Float[np.ndarray, "out in"]:
    """Weights of torch's bicubic interpolation along one axis: a = -0.75, no antialiasing, corners not aligned.

    R. Keys, Cubic convolution interpolation, 1981. `jax.image.resize` uses a = -0.5 and antialiases.
    """
    a = np.float32(-0.75)
    # torch computes coordinates in float32, as a fused multiply-add that rounds once. Following it brings the difference
    # on noise from 1e-4 (exact coordinates) to 1e-6.
    scale = float(np.float32(in_size / out_size))
    source = (scale * (np.arange(out_size) + 0.5) - 0.5).astype(np.float32)
    first = np.floor(source)
    fraction = source - first

    def near(x: Float[np.ndarray, " out"]) -> Float[np.ndarray, " out"]:  # |x| <= 1
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Float[np.ndarray, " out"]) -> Float[np.ndarray, " out"]:  # 1 < |x| < 2
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = (far(fraction + 1), near(fraction), near(1 - fraction), far(2 - fraction))
    matrix = np.zeros((out_size, in_size), np.float32)
    rows = np.arange(out_size)
    for tap, weight in enumerate(weights):
        # Beyond the border the edge pixel repeats, so that several taps may add up in one column.
        columns = np.clip(first.astype(np.int64) + tap - 1, 0, in_size - 1)
        np.add.at(matrix, (rows, columns), weight)
    matrix.flags.writeable = False  # shared by every caller through the cache
    return matrix


def preprocess(frames: Float[Array, "B H W 3"], image_size: int) -> Float[Array, "B S S 3"]:
    """Frames in [-1, 1] resized to a square, whatever their aspect, and normalised with CLIP's statistics.

    The whole canvas is squashed rather than cropped: a crop would lose the outer references. Overshoot of the
    interpolation is kept, as in the reference.

    Raises:
        ValueError: the frames are not [B, H, W, 3].
    """
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames have shape {frames.shape}; must be [batch, height, width, 3].")
    rows = bicubic_matrix(frames.shape[1], image_size)
    columns = bicubic_matrix(frames.shape[2], image_size)
    # Highest precision: by default a TPU would multiply in bfloat16, an error of one grey level in 256.
    resized = jnp.einsum(
        "sh,rw,bhwc->bsrc", rows, columns, frames.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return (resized * 0.5 + 0.5 - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)


class SelfAttention(nn.Module):
    config: ImageEncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B I D"]) -> Float[Array, "B I D"]:
        cfg = self.config

        def heads(name: str) -> Float[Array, "B I N K"]:
            return rearrange(nn.Dense(cfg.dim, dtype=cfg.dtype, name=name)(x), "b i (n k) -> b i n k", n=cfg.num_heads)

        out = jax.nn.dot_product_attention(heads("query"), heads("key"), heads("value"))
        return nn.Dense(cfg.dim, dtype=cfg.dtype, name="out")(rearrange(out, "b i n k -> b i (n k)"))


class FeedForward(nn.Module):
    config: ImageEncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B I D"]) -> Float[Array, "B I D"]:
        cfg = self.config
        # The exact GELU, unlike everywhere else in the model but the DiT's image projection.
        x = nn.gelu(nn.Dense(cfg.ffn_dim, dtype=cfg.dtype, name="up")(x), approximate=False)
        return nn.Dense(cfg.dim, dtype=cfg.dtype, name="down")(x)


class Block(nn.Module):
    config: ImageEncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B I D"]) -> tuple[Float[Array, "B I D"], None]:
        cfg = self.config
        x += SelfAttention(cfg, name="self_attention")(LayerNorm(cfg.norm_eps, name="self_attention_norm")(x))
        x += FeedForward(cfg, name="feed_forward")(LayerNorm(cfg.norm_eps, name="feed_forward_norm")(x))
        return x, None


class ImageEncoder(nn.Module):
    """Image embeddings before the last block of the tower; it has parameters for `num_layers - 1` blocks."""

    config: ImageEncoderConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B I D"]:
        """`pixels` as `preprocess` returns them.

        Raises:
            ValueError: the pixels are not [B, image_size, image_size, 3].
        """
        cfg = self.config
        if pixels.ndim != 4 or pixels.shape[1:] != (cfg.image_size, cfg.image_size, 3):
            raise ValueError(
                f"pixels have shape {pixels.shape}; must be [batch, {cfg.image_size}, {cfg.image_size}, 3]."
            )
        patch = (cfg.patch_size, cfg.patch_size)
        patch_embedding = nn.Conv(
            cfg.dim, patch, strides=patch, padding="VALID", use_bias=False, dtype=cfg.dtype, name="patch_embedding"
        )
        x = rearrange(patch_embedding(pixels), "b h w d -> b (h w) d")

        init = nn.initializers.normal(cfg.dim**-0.5)
        class_embedding = self.param("class_embedding", init, (cfg.dim,), jnp.float32).astype(cfg.dtype)
        position_embedding = self.param("position_embedding", init, (cfg.num_tokens, cfg.dim), jnp.float32)
        position_embedding = position_embedding.astype(cfg.dtype)
        x = jnp.concatenate([jnp.broadcast_to(class_embedding, (len(x), 1, cfg.dim)), x], axis=1)
        # The norm returns float32, and so the sum over layers stays float32.
        x = LayerNorm(cfg.norm_eps, name="input_norm")(x + position_embedding)

        blocks = nn.scan(
            REMAT[cfg.remat](Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=cfg.num_layers - 1,
        )(cfg, name="blocks")
        x, _ = blocks(x)
        return x
