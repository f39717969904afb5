"""The diffusion transformer of Wan 2.1, which MAGREF leaves unchanged, with optional subject injection.

The network of wan/modules/model.py, Wan-Video/Wan2.1@9737cba; subject injection after MAGREF, arXiv:2505.23742.
Precision: matmuls and activations in `config.dtype`; the residual stream, norms, modulation, timestep embedding, rotary
embedding, softmax and head in float32.

Letters: B batch · F/H/W latent frames, rows, columns · C channels · L video tokens, in order (frame, row, column) ·
T text tokens · I image tokens · S subjects · D width · N heads · K head width · G timesteps per clip, 1 or F
"""

from collections.abc import Sequence

import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Real

from magref_jax.config import DiTConfig
from magref_jax.models.attention import FULL, AttentionStructure, dot_product_attention
from magref_jax.models.layers import REMAT, LayerNorm, Linear, RMSNorm, rotary_rotations, rotate, timestep_embedding

Rotations = tuple[Float[Array, "L K//2"], Float[Array, "L K//2"]]


@struct.dataclass
class SubjectInjection:
    """Where the subjects are: in the prompt and in latent frame 0, whose tokens number L0. An unused subject is all zeros."""

    tokens: Float[Array, "B S T"]  # 1 where the text token belongs to the subject's words
    regions: Float[Array, "B S L0"]  # 1 where the video token lies in the subject's region


SMALL = nn.initializers.normal(0.02)


def modulate(
    x: Float[Array, "B L D"], shift: Float[Array, "B G D"], scale: Float[Array, "B G D"]
) -> Float[Array, "B L D"]:
    """Gives x · (1 + scale) + shift."""
    return x * (1 + per_token(scale, x)) + per_token(shift, x)


def per_token(modulation: Float[Array, "B G D"], x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """Gives every token the modulation of its latent frame, or of the clip."""
    return repeat(modulation, "b g d -> b (g tokens) d", tokens=x.shape[1] // modulation.shape[1])


def split_heads(x: Float[Array, "B L D"], config: DiTConfig) -> Float[Array, "B L N K"]:
    return rearrange(x, "b l (n k) -> b l n k", n=config.num_heads)


def merge_heads(x: Float[Array, "B L N K"]) -> Float[Array, "B L D"]:
    return rearrange(x, "b l n k -> b l (n k)")


def inject_subjects(
    x: Float[Array, "B L D"], text_value: Float[Array, "B T D"], subjects: SubjectInjection, alpha: float | Array
) -> Float[Array, "B L D"]:
    """Adds alpha · Σ_s region_s ⊙ v_s to latent frame 0, v_s the mean text value of subject s. arXiv:2505.23742."""
    count = jnp.maximum(jnp.sum(subjects.tokens, axis=-1, keepdims=True), 1)
    subject_value = jnp.einsum("bst,btd->bsd", subjects.tokens / count, text_value, preferred_element_type=jnp.float32)
    change = jnp.einsum("bsl,bsd->bld", subjects.regions, subject_value, preferred_element_type=jnp.float32)
    return x.at[:, : change.shape[1]].add(alpha * change)


class SelfAttention(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], rotations: Rotations, structure: AttentionStructure
    ) -> Float[Array, "B L D"]:
        cfg = self.config
        # Query and key are normalised over the whole width, before it is split into heads.
        query = RMSNorm(cfg.norm_eps, name="query_norm")(Linear(cfg.dim, cfg.dtype, name="query")(x))
        key = RMSNorm(cfg.norm_eps, name="key_norm")(Linear(cfg.dim, cfg.dtype, name="key")(x))
        value = Linear(cfg.dim, cfg.dtype, name="value")(x)
        out = dot_product_attention(
            rotate(split_heads(query, cfg), rotations).astype(cfg.dtype),
            rotate(split_heads(key, cfg), rotations).astype(cfg.dtype),
            split_heads(value, cfg),
            structure=structure,
            implementation=cfg.attention,
        )
        return Linear(cfg.dim, cfg.dtype, name="out")(merge_heads(out))


class CrossAttention(nn.Module):
    """Attends to the text and, apart from it, to the image tokens; the sum is projected. Also returns the text values."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], text: Float[Array, "B T D"], image: Float[Array, "B I D"] | None
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B T D"]]:
        cfg = self.config
        query = RMSNorm(cfg.norm_eps, name="query_norm")(Linear(cfg.dim, cfg.dtype, name="query")(x))
        query = split_heads(query, cfg).astype(cfg.dtype)

        def attend(tokens: Array, suffix: str) -> tuple[Array, Array]:
            key = Linear(cfg.dim, cfg.dtype, name=f"key{suffix}")(tokens)
            key = RMSNorm(cfg.norm_eps, name=f"key{suffix}_norm")(key).astype(cfg.dtype)
            value = Linear(cfg.dim, cfg.dtype, name=f"value{suffix}")(tokens)
            out = dot_product_attention(
                query, split_heads(key, cfg), split_heads(value, cfg), implementation=cfg.attention
            )
            return merge_heads(out), value

        out, text_value = attend(text, "")
        if image is not None:
            out += attend(image, "_image")[0]
        return Linear(cfg.dim, cfg.dtype, name="out")(out), text_value


class FeedForward(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        cfg = self.config
        x = nn.gelu(Linear(cfg.ffn_dim, cfg.dtype, name="up")(x), approximate=True)
        return Linear(cfg.dim, cfg.dtype, name="down")(x)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the timestep modulates the first and the last."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        time_modulation: Float[Array, "B G 6 D"],
        rotations: Rotations,
        text: Float[Array, "B T D"],
        image: Float[Array, "B I D"] | None,
        subjects: SubjectInjection | None,
        subject_alpha: float | Array,
        structure: AttentionStructure,
    ) -> tuple[Float[Array, "B L D"], None]:
        cfg = self.config
        modulation = self.param("modulation", nn.initializers.normal(cfg.dim**-0.5), (6, cfg.dim), jnp.float32)
        shift_attention, scale_attention, gate_attention, shift_feed_forward, scale_feed_forward, gate_feed_forward = (
            jnp.moveaxis(modulation + time_modulation, -2, 0)
        )

        y = LayerNorm(cfg.norm_eps, affine=False, name="self_attention_norm")(x)
        y = modulate(y, shift_attention, scale_attention)
        y = SelfAttention(cfg, name="self_attention")(y, rotations, structure)
        x = x + y * per_token(gate_attention, x)

        y = LayerNorm(cfg.norm_eps, name="cross_attention_norm")(x)
        y, text_value = CrossAttention(cfg, name="cross_attention")(y, text, image)
        x = x + y
        if subjects is not None:
            x = inject_subjects(x, text_value, subjects, subject_alpha)

        y = LayerNorm(cfg.norm_eps, affine=False, name="feed_forward_norm")(x)
        y = modulate(y, shift_feed_forward, scale_feed_forward)
        y = FeedForward(cfg, name="feed_forward")(y)
        return x + y * per_token(gate_feed_forward, x), None


class Head(nn.Module):
    """Modulated norm and projection to the values of a patch, in float32."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], time: Float[Array, "B G D"]) -> Float[Array, "B L P"]:
        cfg = self.config
        modulation = self.param("modulation", nn.initializers.normal(cfg.dim**-0.5), (2, cfg.dim), jnp.float32)
        # The blocks are modulated by a projection of the time embedding, the head by the embedding itself.
        shift, scale = jnp.moveaxis(modulation + time[:, :, None], -2, 0)
        x = modulate(LayerNorm(cfg.norm_eps, affine=False, name="norm")(x), shift, scale)
        features = cfg.out_channels * cfg.patch_size[0] * cfg.patch_size[1] * cfg.patch_size[2]
        return Linear(features, jnp.float32, nn.initializers.zeros, name="out")(x)


class DiT(nn.Module):
    """Predicts the velocity of the flow from noise to video, conditioned on text and on reference images."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B F H W C"],
        timesteps: Real[Array, "B"] | Real[Array, "B F"],
        text_embeddings: Float[Array, "B T text_dim"],
        image_embeddings: Float[Array, "B I image_dim"] | None = None,
        *,
        subjects: SubjectInjection | None = None,
        subject_alpha: float | Array = 0.0,
        structure: AttentionStructure = FULL,
        frame_positions: Sequence[int] | None = None,
    ) -> Float[Array, "B F H W out_channels"]:
        """Velocity ε − x0 in float32.

        Args:
            latents: noisy latents with the conditioning channels already behind them.
            timesteps: 1000·sigma, per clip or per latent frame.
            text_embeddings: zero-padded to `config.text_len`; the padding is attended.
            image_embeddings: needed exactly if `config.image_dim` is set.
            subjects: whose text values to add inside their regions.
            subject_alpha: strength of that; 0 as a Python number leaves it out of the computation.
            structure: which video tokens see which.
            frame_positions: where in the clip the latent frames lie, for training on a part of them; 0, 1, … if not given.

        Raises:
            ValueError: a shape contradicts the config or another argument.
        """
        cfg = self.config
        _check_inputs(cfg, latents, timesteps, text_embeddings, image_embeddings, subjects)
        if isinstance(subject_alpha, int | float) and subject_alpha == 0:
            subjects = None

        p, q, r = cfg.patch_size
        grid = (latents.shape[1] // p, latents.shape[2] // q, latents.shape[3] // r)
        x = rearrange(latents, "b (f p) (h q) (w r) c -> b (f h w) (p q r c)", p=p, q=q, r=r)
        x = Linear(cfg.dim, cfg.dtype, name="patch_embedding")(x).astype(jnp.float32)
        positions = range(grid[0]) if frame_positions is None else frame_positions
        if len(positions) != grid[0]:
            raise ValueError(
                f"frame_positions={tuple(positions)} must have one entry per latent frame, here {grid[0]}."
            )
        rotations = rotary_rotations(positions, range(grid[1]), range(grid[2]), cfg.head_dim, cfg.rope_theta)

        time = timestep_embedding(timesteps.reshape(timesteps.shape[0], -1), cfg.freq_dim)
        time = Linear(cfg.dim, jnp.float32, SMALL, name="time_in")(time)
        time = Linear(cfg.dim, jnp.float32, SMALL, name="time_out")(nn.silu(time))
        time_modulation = Linear(6 * cfg.dim, jnp.float32, name="time_modulation")(nn.silu(time))
        time_modulation = rearrange(time_modulation, "b g (six d) -> b g six d", six=6)

        text = Linear(cfg.dim, cfg.dtype, SMALL, name="text_in")(text_embeddings)
        text = Linear(cfg.dim, cfg.dtype, SMALL, name="text_out")(nn.gelu(text, approximate=True))

        image = image_embeddings
        if cfg.image_dim is not None:
            # The reference projects image tokens with its own epsilon and the exact GELU, unlike everything else here.
            image = LayerNorm(1e-5, name="image_in_norm")(image)
            image = nn.gelu(Linear(cfg.image_dim, cfg.dtype, name="image_in")(image), approximate=False)
            image = LayerNorm(1e-5, name="image_out_norm")(Linear(cfg.dim, cfg.dtype, name="image_out")(image))

        blocks = nn.scan(
            REMAT[cfg.remat](Block),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.num_layers,
        )(cfg, name="blocks")
        x, _ = blocks(x, time_modulation, rotations, text, image, subjects, subject_alpha, structure)

        x = Head(cfg, name="head")(x, time)
        f, h, w = grid
        return rearrange(x, "b (f h w) (p q r c) -> b (f p) (h q) (w r) c", f=f, h=h, w=w, p=p, q=q, r=r)


def _check_inputs(
    config: DiTConfig,
    latents: Array,
    timesteps: Array,
    text_embeddings: Array,
    image_embeddings: Array | None,
    subjects: SubjectInjection | None,
) -> None:
    sizes = latents.shape[1:4]
    is_whole = all(size % patch == 0 for size, patch in zip(sizes, config.patch_size, strict=True))
    if latents.shape[-1] != config.in_channels or not is_whole:
        raise ValueError(
            f"latents has shape {latents.shape}; expected in_channels={config.in_channels} last and frames, rows and "
            f"columns that are multiples of patch_size={config.patch_size}."
        )
    per_clip, per_frame = latents.shape[:1], (latents.shape[0], sizes[0] // config.patch_size[0])
    if timesteps.shape not in (per_clip, per_frame):
        raise ValueError(f"timesteps has shape {timesteps.shape}; expected {per_clip} or {per_frame}.")
    if text_embeddings.shape[1:] != (config.text_len, config.text_dim):
        raise ValueError(
            f"text_embeddings has shape {text_embeddings.shape}; expected text_len={config.text_len}, padded with zeros, "
            f"and text_dim={config.text_dim} last."
        )
    if (image_embeddings is None) != (config.image_dim is None):
        given = None if image_embeddings is None else image_embeddings.shape
        raise ValueError(f"image_embeddings has shape {given}, but the model has image_dim={config.image_dim}.")
    if subjects is not None:
        frame_tokens = (sizes[1] // config.patch_size[1]) * (sizes[2] // config.patch_size[2])
        if subjects.tokens.shape[-1] != config.text_len or subjects.regions.shape[-1] != frame_tokens:
            raise ValueError(
                f"subjects has tokens {subjects.tokens.shape} and regions {subjects.regions.shape}; expected "
                f"text_len={config.text_len} and {frame_tokens} tokens of a latent frame last."
            )
