"""umT5: the encoder that turns token ids into the text embeddings of the DiT.

Port of wan/modules/t5.py, Wan-Video/Wan2.1@9737cba. It is T5 v1.1 with a table of relative position biases in every
layer instead of one shared table: attention is unscaled, there are no biases and no other position information.

B batch · T text tokens · D model width · N heads · K head width · U buckets
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from magref_jax.config import TextEncoderConfig
from magref_jax.models.layers import REMAT, RMSNorm


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "T T"]:
    """Bucket of every (query, key) pair; the upper half of the buckets holds the keys that follow their query.

    Of each half, the nearer half holds one distance per bucket, the rest grow geometrically up to `max_distance`, and
    the last one holds everything beyond. T5, arXiv:1910.10683 §2.1. On the host, so that no backend's logarithm can
    move a distance to the next bucket.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]  # key - query
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    growth = np.log(np.maximum(distance, exact) / exact) / np.log(max_distance / exact)
    far = np.minimum(exact + (growth * (half - exact)).astype(np.int32), half - 1)
    return (np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)).astype(np.int32)


OFFSET_BIAS = 10.0  # logit of a head at its own offset, against 0 at all others


def _relative_bias_init(config: TextEncoderConfig) -> nn.initializers.Initializer:
    if not config.relative_offsets:
        return nn.initializers.normal(1.0)
    # Bucket of an offset: those of the first query for keys behind it, of the last one for keys before it.
    reach = max(map(abs, config.relative_offsets)) + 1
    buckets = relative_buckets(reach, config.num_buckets, config.max_distance)
    chosen = [buckets[max(0, -offset), max(0, offset)] for offset in config.relative_offsets]
    return lambda key, shape, dtype=jnp.float32: (
        OFFSET_BIAS * jax.nn.one_hot(np.array(chosen), shape[0], axis=0, dtype=dtype)
    )


class SelfAttention(nn.Module):
    """Unscaled attention with this layer's own relative position biases added to the logits."""

    config: TextEncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B 1 1 T"]) -> Float[Array, "B T D"]:
        cfg = self.config
        width = cfg.num_heads * cfg.head_dim

        def heads(name: str, stddev: float) -> Float[Array, "B T N K"]:
            return rearrange(_dense(cfg, width, name, stddev)(x), "b t (n k) -> b t n k", n=cfg.num_heads)

        # T5 folds 1/sqrt(head_dim) into the initial query weights instead of scaling the logits.
        query = heads("query", (cfg.dim * cfg.head_dim) ** -0.5)
        key = heads("key", cfg.dim**-0.5)
        value = heads("value", cfg.dim**-0.5)

        table = self.param("relative_bias", _relative_bias_init(cfg), (cfg.num_buckets, cfg.num_heads), jnp.float32)
        buckets = relative_buckets(x.shape[1], cfg.num_buckets, cfg.max_distance)
        bias = rearrange(table.astype(jnp.float32)[buckets], "q k n -> 1 n q k")

        # A masked logit is a large negative number rather than -inf, so that a row without any key stays finite.
        out = jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask, scale=1.0)
        return _dense(cfg, cfg.dim, "out", width**-0.5)(rearrange(out, "b t n k -> b t (n k)"))


class FeedForward(nn.Module):
    """down(up(x) · gelu(gate(x))), with the tanh approximation of GELU."""

    config: TextEncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        cfg = self.config
        gate = nn.gelu(_dense(cfg, cfg.ffn_dim, "gate", cfg.dim**-0.5)(x), approximate=True)
        up = _dense(cfg, cfg.ffn_dim, "up", cfg.dim**-0.5)(x)
        return _dense(cfg, cfg.dim, "down", cfg.ffn_dim**-0.5)(up * gate)


class Block(nn.Module):
    config: TextEncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B 1 1 T"]) -> tuple[Float[Array, "B T D"], None]:
        cfg = self.config
        x += SelfAttention(cfg, name="self_attention")(RMSNorm(cfg.norm_eps, name="self_attention_norm")(x), mask)
        x += FeedForward(cfg, name="feed_forward")(RMSNorm(cfg.norm_eps, name="feed_forward_norm")(x))
        return x, None


class TextEncoder(nn.Module):
    """Text embeddings of token ids.

    Padding only has to be masked: embeddings of real tokens do not depend on the padded length, so a short prompt may
    be run short. Embeddings at padding positions carry no meaning; the DiT expects zeros there.
    """

    config: TextEncoderConfig

    @nn.compact
    def __call__(self, token_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """`attention_mask` is 1 at real tokens and 0 at padding.

        Raises:
            ValueError: the mask does not have the shape of the token ids.
        """
        cfg = self.config
        if token_ids.ndim != 2 or attention_mask.shape != token_ids.shape:
            raise ValueError(
                f"token_ids and attention_mask have shapes {token_ids.shape} and {attention_mask.shape}; "
                "both must be the same [batch, tokens]."
            )
        table = self.param("token_embedding", nn.initializers.normal(1.0), (cfg.vocab_size, cfg.dim), jnp.float32)
        # The sum over layers stays float32, as in the DiT: it costs nothing at this length and saves 48 roundings.
        x = jnp.take(table, token_ids, axis=0).astype(jnp.float32)
        mask = rearrange(attention_mask.astype(bool), "b t -> b 1 1 t")

        blocks = nn.scan(
            REMAT[cfg.remat](Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.num_layers,
        )(cfg, name="blocks")
        x, _ = blocks(x, mask)
        return RMSNorm(cfg.norm_eps, name="norm")(x)


def _dense(config: TextEncoderConfig, features: int, name: str, stddev: float) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=config.dtype, kernel_init=nn.initializers.normal(stddev), name=name)
