"""The diffusion transformer of Wan 2.1, which MAGREF leaves unchanged, with optional subject injection.

The network of wan/modules/model.py, Wan-Video/Wan2.1@9737cba; subject injection after MAGREF, arXiv:2505.23742.
Precision: matmuls and activations in `config.dtype`; the residual stream, norms, modulation, timestep embedding, rotary
embedding, softmax and head in float32.

Letters: B batch · F/H/W latent frames, rows, columns · C channels · L video tokens, in order (frame, row, column) ·
T text tokens · I image tokens · S subjects · D width · N heads · K head width · G timesteps per clip, 1 or F
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int, Real

from magref_jax.config import DiTConfig
from magref_jax.descriptions import short_repr
from magref_jax.models.attention import FULL, AttentionStructure
from magref_jax.models.context_parallel import cross_attention, self_attention
from magref_jax.models.layers import (
    LORA,
    REMAT,
    LayerNorm,
    Linear,
    RMSNorm,
    rotary_rotations,
    rotate,
    timestep_embedding,
)
from magref_jax.sharding import constrain, current_mesh

Rotations = tuple[Float[Array, "L K//2"], Float[Array, "L K//2"]]


@short_repr
@struct.dataclass
class SubjectInjection:
    """Where the subjects are: in the prompt and in latent frame 0, whose tokens number L0. An unused subject is all zeros."""

    tokens: Float[Array, "B S T"]  # 1 where the text token belongs to the subject's words
    regions: Float[Array, "B S L0"]  # 1 where the video token lies in the subject's region


@short_repr
@struct.dataclass
class KeysValues:
    """What an attention reads of its context, heads not yet split. Keys are normalised."""

    key: Float[Array, "*N B T D"]
    value: Float[Array, "*N B T D"]


@short_repr
@struct.dataclass
class Context:
    """Keys and values of prompt and canvas in every layer: what no step of the sampling changes."""

    text: KeysValues
    image: KeysValues | None


@short_repr
@struct.dataclass
class VideoTokens:
    """What the tokens of all layers have in common."""

    rotations: Rotations
    number: int = struct.field(pytree_node=False)  # without the padding that makes a mesh divide them
    frames: Int[Array, "L"] | None = None  # of each token, on a mesh that cuts them, if frames differ in their timestep


SMALL = nn.initializers.normal(0.02)


def modulate(
    x: Float[Array, "B L D"], shift: Float[Array, "B G D"], scale: Float[Array, "B G D"], tokens: VideoTokens
) -> Float[Array, "B L D"]:
    """Gives x · (1 + scale) + shift."""
    return x * (1 + per_token(scale, x, tokens)) + per_token(shift, x, tokens)


def per_token(
    modulation: Float[Array, "B G D"], x: Float[Array, "B L D"], tokens: VideoTokens
) -> Float[Array, "B L D"]:
    """Gives every token the modulation of its latent frame, or of the clip."""
    if tokens.frames is not None:  # a device looks up its own; repeated, all would be made and cut afterwards
        return constrain(jnp.take(modulation, tokens.frames, axis=1), "batch", "tokens", "width")
    return repeat(modulation, "b g d -> b (g tokens) d", tokens=x.shape[1] // modulation.shape[1])


def gelu(x: Float[Array, "*batch D"], approximate: bool = True) -> Float[Array, "*batch D"]:
    """In float32: the layer that follows rounds once, as torch does, where bfloat16 would round every operation."""
    return nn.gelu(x.astype(jnp.float32), approximate=approximate)


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
    subject_value = constrain(subject_value, "batch", "text", "width")  # values are cut, what x is made of is not
    regions = subjects.regions
    if is_cut := _tokens_are_cut():  # every device adds its own, zeros beyond frame 0; a part of x would be gathered
        regions = jnp.pad(regions, [(0, 0), (0, 0), (0, x.shape[1] - regions.shape[2])])
        regions = constrain(regions, "batch", "text", "tokens")
    change = jnp.einsum("bsl,bsd->bld", regions, subject_value, preferred_element_type=jnp.float32)
    return x + alpha * change if is_cut else x.at[:, : change.shape[1]].add(alpha * change)


def _tokens_are_cut() -> bool:
    mesh = current_mesh()
    return mesh is not None and mesh.shape["context"] > 1


class SelfAttention(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], tokens: VideoTokens, structure: AttentionStructure
    ) -> Float[Array, "B L D"]:
        cfg = self.config
        query, key, value = (
            constrain(Linear(cfg.dim, cfg.dtype, name=name)(x), "batch", "tokens", "heads")
            for name in ("query", "key", "value")
        )
        # Query and key are normalised over the whole width, before it is split into heads.
        query, key = RMSNorm(cfg.norm_eps, name="query_norm")(query), RMSNorm(cfg.norm_eps, name="key_norm")(key)
        out = self_attention(
            rotate(split_heads(query, cfg), tokens.rotations).astype(cfg.dtype),
            rotate(split_heads(key, cfg), tokens.rotations).astype(cfg.dtype),
            split_heads(value, cfg),
            structure=structure,
            implementation=cfg.attention,
            context_parallel=cfg.context_parallel,
            num_tokens=tokens.number,
        )
        return constrain(Linear(cfg.dim, cfg.dtype, name="out")(merge_heads(out)), "batch", "tokens", "width")


def embed_context(
    config: DiTConfig,
    text_embeddings: Float[Array, "B T text_dim"],
    image_embeddings: Float[Array, "B I image_dim"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B I D"] | None]:
    """The layers in front of the blocks, of the module that is calling."""
    # Left to itself, XLA (of jax 0.10.2) cuts these so that on data=2,fsdp=2,tensor=2 the gradient of text_out is wrong.
    text = Linear(config.dim, config.dtype, SMALL, name="text_in")(text_embeddings)
    text = gelu(constrain(text, "batch", "text", "hidden"))
    text = constrain(Linear(config.dim, config.dtype, SMALL, name="text_out")(text), "batch", "text", "width")
    image = image_embeddings
    if config.image_dim is not None:
        # The reference projects image tokens with its own epsilon and the exact GELU, unlike everything else here.
        image = LayerNorm(1e-5, name="image_in_norm")(image)
        image = constrain(Linear(config.image_dim, config.dtype, name="image_in")(image), "batch", "text", "hidden")
        image = Linear(config.dim, config.dtype, name="image_out")(gelu(image, approximate=False))
        image = LayerNorm(1e-5, name="image_out_norm")(constrain(image, "batch", "text", "width"))
    return text, image


def keys_values(config: DiTConfig, tokens: Float[Array, "B T D"], suffix: str = "") -> KeysValues:
    """The layers that a cross-attention applies to its context, of the module that is calling."""
    key = Linear(config.dim, config.dtype, name=f"key{suffix}")(tokens)
    key = RMSNorm(config.norm_eps, name=f"key{suffix}_norm")(key).astype(config.dtype)
    return KeysValues(key, Linear(config.dim, config.dtype, name=f"value{suffix}")(tokens))


IMAGE = "_image"  # the suffix of the layers for image tokens


class CrossAttention(nn.Module):
    """Attends to the text and, apart from it, to the image tokens; the sum is projected. Also returns the text values."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        text: Float[Array, "B T D"] | KeysValues,
        image: Float[Array, "B I D"] | KeysValues | None,
        text_bias: Float[Array, "T"] | None,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B T D"]]:
        cfg = self.config
        query = constrain(Linear(cfg.dim, cfg.dtype, name="query")(x), "batch", "tokens", "heads")
        query = split_heads(RMSNorm(cfg.norm_eps, name="query_norm")(query), cfg).astype(cfg.dtype)

        def attend(context: Array | KeysValues, suffix: str, bias: Array | None) -> tuple[Array, Array]:
            context = context if isinstance(context, KeysValues) else keys_values(cfg, context, suffix)
            key, value = split_heads(context.key, cfg), split_heads(context.value, cfg)
            out = cross_attention(query, key, value, bias=bias, implementation=cfg.attention)
            return merge_heads(out), context.value

        out, text_value = attend(text, "", None if text_bias is None else text_bias[None, None, None])
        if image is not None:
            out += attend(image, IMAGE, None)[0]
        return constrain(Linear(cfg.dim, cfg.dtype, name="out")(out), "batch", "tokens", "width"), text_value


class FeedForward(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        cfg = self.config
        x = constrain(Linear(cfg.ffn_dim, cfg.dtype, name="up")(x), "batch", "tokens", "hidden")
        x = gelu(x)
        return constrain(Linear(cfg.dim, cfg.dtype, name="down")(x), "batch", "tokens", "width")


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the timestep modulates the first and the last.

    The cross-attention takes this layer's keys and values from `context`, or makes them of the tokens in `text` and `image`.
    """

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context | None,
        text: Float[Array, "B T D"] | None,
        image: Float[Array, "B I D"] | None,
        text_bias: Float[Array, "T"] | None,
        time_modulation: Float[Array, "B G 6 D"],
        tokens: VideoTokens,
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
        y = modulate(y, shift_attention, scale_attention, tokens)
        y = SelfAttention(cfg, name="self_attention")(y, tokens, structure)
        x = x + y * per_token(gate_attention, x, tokens)

        y = LayerNorm(cfg.norm_eps, name="cross_attention_norm")(x)
        seen = (text, image) if context is None else (context.text, context.image)
        y, text_value = CrossAttention(cfg, name="cross_attention")(y, *seen, text_bias)
        x = x + y
        if subjects is not None:
            x = inject_subjects(x, text_value, subjects, subject_alpha)

        y = LayerNorm(cfg.norm_eps, affine=False, name="feed_forward_norm")(x)
        y = modulate(y, shift_feed_forward, scale_feed_forward, tokens)
        y = FeedForward(cfg, name="feed_forward")(y)
        return constrain(x + y * per_token(gate_feed_forward, x, tokens), "batch", "tokens", "width"), None


class Head(nn.Module):
    """Modulated norm and projection to the values of a patch, in float32."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], time: Float[Array, "B G D"], tokens: VideoTokens
    ) -> Float[Array, "B L P"]:
        cfg = self.config
        modulation = self.param("modulation", nn.initializers.normal(cfg.dim**-0.5), (2, cfg.dim), jnp.float32)
        # The blocks are modulated by a projection of the time embedding, the head by the embedding itself.
        shift, scale = jnp.moveaxis(modulation + time[:, :, None], -2, 0)
        x = modulate(LayerNorm(cfg.norm_eps, affine=False, name="norm")(x), shift, scale, tokens)
        features = cfg.out_channels * cfg.patch_size[0] * cfg.patch_size[1] * cfg.patch_size[2]
        return Linear(features, jnp.float32, nn.initializers.zeros, name="out")(x)


class _CrossAttentionContext(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, text: Float[Array, "B T D"], image: Float[Array, "B I D"] | None) -> Context:
        cfg = self.config
        return Context(keys_values(cfg, text), None if image is None else keys_values(cfg, image, IMAGE))


class _BlockContext(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, carry: None, text: Float[Array, "B T D"], image: Array | None) -> tuple[None, Context]:
        return None, _CrossAttentionContext(self.config, name="cross_attention")(text, image)


class ContextEncoder(nn.Module):
    """The layers of the DiT that see neither noise nor time. Their parameters are the DiT's, by the same names."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        text_embeddings: Float[Array, "B T text_dim"],
        image_embeddings: Float[Array, "B I image_dim"] | None = None,
    ) -> Context:
        cfg = self.config
        blocks = nn.scan(
            _BlockContext,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.num_layers,
        )(cfg, name="blocks")
        context = blocks(None, *embed_context(cfg, text_embeddings, image_embeddings))[1]
        return jax.tree.map(lambda leaf: constrain(leaf, "layers", "batch", "text", "heads"), context)


def encode_context(
    config: DiTConfig,
    dit_params: Mapping[str, Any],
    text_embeddings: Float[Array, "B T text_dim"],
    image_embeddings: Float[Array, "B I image_dim"] | None = None,
) -> Context:
    """The context of a DiT with these parameters, computed once for all steps of a sampling run."""
    layers = dit_params["blocks"]["cross_attention"]
    used = {name: layer for name, layer in layers.items() if name.startswith(("key", "value"))}
    params = {name: layer for name, layer in dit_params.items() if name.startswith(("text_", "image_"))}
    params["blocks"] = {"cross_attention": used}
    return ContextEncoder(config).apply({"params": params}, text_embeddings, image_embeddings)


class DiT(nn.Module):
    """Predicts the velocity of the flow from noise to video, conditioned on text and on reference images."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B F H W C"],
        timesteps: Real[Array, "B"] | Real[Array, "B F"],
        text_embeddings: Float[Array, "B T text_dim"] | None = None,
        image_embeddings: Float[Array, "B I image_dim"] | None = None,
        *,
        context: Context | None = None,
        padding_repeats: int = 1,
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
            context: what `encode_context` made of the embeddings, in place of them.
            padding_repeats: how often the last text token counts. All padding is one and the same token, so a single one
                can stand for the last `padding_repeats` of the `config.text_len`: the same sums, with fewer terms.
            subjects: whose text values to add inside their regions.
            subject_alpha: strength of that; 0 as a Python number leaves it out of the computation.
            structure: which video tokens see which.
            frame_positions: where in the clip the latent frames lie, for training on a part of them; 0, 1, … if not given.

        Raises:
            ValueError: a shape contradicts the config or another argument.
        """
        cfg = self.config
        num_text_tokens = _check_context(cfg, text_embeddings, image_embeddings, context, padding_repeats)
        _check_inputs(cfg, latents, timesteps, subjects, num_text_tokens)
        if isinstance(subject_alpha, int | float) and subject_alpha == 0:
            subjects = None

        p, q, r = cfg.patch_size
        grid = (latents.shape[1] // p, latents.shape[2] // q, latents.shape[3] // r)
        x = rearrange(latents, "b (f p) (h q) (w r) c -> b (f h w) (p q r c)", p=p, q=q, r=r)
        x = constrain(_pad_tokens(x, 1), "batch", "tokens", "width")
        x = Linear(cfg.dim, cfg.dtype, name="patch_embedding")(x).astype(jnp.float32)
        x = constrain(x, "batch", "tokens", "width")
        positions = range(grid[0]) if frame_positions is None else frame_positions
        if len(positions) != grid[0]:
            raise ValueError(
                f"frame_positions={tuple(positions)} must have one entry per latent frame, here {grid[0]}."
            )
        cos, sin = (
            constrain(_pad_tokens(table, 0), "tokens", "head_width")
            for table in rotary_rotations(positions, range(grid[1]), range(grid[2]), cfg.head_dim, cfg.rope_theta)
        )
        frames = None
        if timesteps.ndim == 2 and _tokens_are_cut():
            frames = constrain(
                _pad_tokens(jnp.repeat(jnp.arange(grid[0], dtype=jnp.int32), grid[1] * grid[2]), 0), "tokens"
            )
        tokens = VideoTokens((cos, sin), math.prod(grid), frames)

        time = timestep_embedding(timesteps.reshape(timesteps.shape[0], -1), cfg.freq_dim)
        time = constrain(Linear(cfg.dim, jnp.float32, SMALL, name="time_in")(time), "batch", "frames", "hidden")
        time = Linear(cfg.dim, jnp.float32, SMALL, name="time_out")(nn.silu(time))
        time = constrain(time, "batch", "frames", "width")
        time_modulation = Linear(6 * cfg.dim, jnp.float32, name="time_modulation")(nn.silu(time))
        # A cut of its kernel would become one of everything that is modulated.
        time_modulation = constrain(time_modulation, "batch", "frames", "width")
        time_modulation = rearrange(time_modulation, "b g (six d) -> b g six d", six=6)

        text = image = text_bias = None
        if text_embeddings is not None:
            text, image = embed_context(cfg, text_embeddings, image_embeddings)
        if padding_repeats > 1:  # a token that counts n times has n times the weight: log n on its logit
            text_bias = jnp.zeros(num_text_tokens).at[-1].set(math.log(padding_repeats))

        per_layer, of_all = 0, nn.broadcast
        blocks = nn.scan(
            REMAT[cfg.remat](Block),
            variable_axes={"params": 0, LORA: 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(per_layer, *[of_all] * 8),
            length=cfg.num_layers,
        )(cfg, name="blocks")
        x, _ = blocks(x, context, text, image, text_bias, time_modulation, tokens, subjects, subject_alpha, structure)

        x = Head(cfg, name="head")(x, time, tokens)[:, : tokens.number]
        f, h, w = grid
        return rearrange(x, "b (f h w) (p q r c) -> b (f p) (h q) (w r) c", f=f, h=h, w=w, p=p, q=q, r=r)


def _pad_tokens(x: Array, axis: int) -> Array:
    """With zeros, to a number that the current mesh divides."""
    mesh = current_mesh()
    padding = 0 if mesh is None else -x.shape[axis] % mesh.shape["context"]
    return jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)]) if padding else x


def _check_context(
    config: DiTConfig,
    text_embeddings: Array | None,
    image_embeddings: Array | None,
    context: Context | None,
    padding_repeats: int,
) -> int:
    """The number of text tokens."""
    if context is None:
        name, text, width = "text_embeddings", text_embeddings, config.text_dim
        image_name, image = "image_embeddings", image_embeddings
    else:
        name, text, width = "context.text.key", context.text.key, config.dim
        image_name, image = "context.image", context.image
    is_doubled = context is not None and (text_embeddings is not None or image_embeddings is not None)
    if text is None or is_doubled:
        raise ValueError(
            "Either text_embeddings, and image_embeddings if the model has them, or context must be given."
        )
    if padding_repeats < 1:
        raise ValueError(f"padding_repeats={padding_repeats} must be 1 or more.")
    num_tokens = text.shape[-2]
    if num_tokens + padding_repeats - 1 != config.text_len or text.shape[-1] != width:
        raise ValueError(
            f"{name} has shape {text.shape}; expected text_len={config.text_len} tokens, padded with zeros, of which the last "
            f"counts padding_repeats={padding_repeats} times, and {width} values each."
        )
    if (image is None) != (config.image_dim is None):
        state = "None" if image is None else "given"
        raise ValueError(f"{image_name} is {state}, but the model has image_dim={config.image_dim}.")
    return num_tokens


def _check_inputs(
    config: DiTConfig,
    latents: Array,
    timesteps: Array,
    subjects: SubjectInjection | None,
    num_text_tokens: int,
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
    if subjects is not None:
        frame_tokens = (sizes[1] // config.patch_size[1]) * (sizes[2] // config.patch_size[2])
        if subjects.tokens.shape[-1] != num_text_tokens or subjects.regions.shape[-1] != frame_tokens:
            raise ValueError(
                f"subjects has tokens {subjects.tokens.shape} and regions {subjects.regions.shape}; expected "
                f"{num_text_tokens} text tokens and {frame_tokens} tokens of a latent frame last."
            )


def dit_flops(config: DiTConfig, tokens: int, context_tokens: int) -> int:
    """Floating point operations of the matrix products of one step on one clip whose context is encoded already."""
    dim, patch = config.dim, math.prod(config.patch_size)
    linear = tokens * dim * (4 * dim + 2 * dim + 2 * config.ffn_dim)  # self-attention, cross-attention, feed-forward
    attention = 2 * tokens * (tokens + context_tokens) * dim
    ends = tokens * patch * dim * (config.in_channels + config.out_channels)
    time_embedding = dim * (config.freq_dim + dim + 6 * dim)
    return 2 * (config.num_layers * (linear + attention) + ends + time_embedding)


def context_flops(config: DiTConfig, text_tokens: int, image_tokens: int) -> int:
    """Floating point operations of the matrix products that make keys and values of the context, once per prompt."""
    dim, image_dim = config.dim, config.image_dim or 0
    text = text_tokens * dim * (config.text_dim + dim)
    image = image_tokens * image_dim * (image_dim + dim)
    return 2 * (text + image + config.num_layers * 2 * (text_tokens + image_tokens) * dim * dim)
