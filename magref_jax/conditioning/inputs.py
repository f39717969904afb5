"""What the DiT is conditioned on, as one struct, and the array operations that make, join and drop it.

B batch · T text tokens · I image tokens · F/H/W latent frames, height, width · C latent channels · S subjects
L0 tokens of latent frame 0
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from magref_jax.descriptions import short_repr

# uint8 -> [-1, 1]. A table: XLA divides by 255 inexactly, which moves most values by one unit in the last place.
_UNIT_RANGE = (np.arange(256, dtype=np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


@short_repr
@flax.struct.dataclass
class Conditioning:
    """Everything besides noise and time. `None`: this model has no such input, or no subjects are injected."""

    text_embeddings: Float[Array, "B T text_dim"]  # 0 at padding
    image_embeddings: Float[Array, "B I image_dim"] | None = None  # of the whole canvas
    reference_latents: Float[Array, "B F H W C"] | None = None  # normalised; canvas, then grey frames
    region_mask: Float[Array, "B F H W 4"] | None = None  # 1 known, 0 to be generated
    subject_tokens: Float[Array, "B S T"] | None = None  # 1 where a text token names the subject
    subject_regions: Float[Array, "B S L0"] | None = None  # 1 where a token of latent frame 0 shows the subject


def concatenate_channels(
    noisy_latents: Float[Array, "B F H W C"], conditioning: Conditioning
) -> Float[Array, "B F H W in_channels"]:
    """The DiT input of channel concatenation: noise, region mask, reference latents. Text-to-video has noise alone."""
    parts = (noisy_latents, conditioning.region_mask, conditioning.reference_latents)
    return jnp.concatenate([part for part in parts if part is not None], axis=-1)


def concatenate_tokens(
    noisy_latents: Float[Array, "B F H W C"],
    timesteps: Float[Array, "B"] | Float[Array, "B F"],
    conditioning: Conditioning,
    frame_positions: Sequence[int] | None = None,
) -> tuple[Float[Array, "B F+1 H W C"], Float[Array, "B F+1"], tuple[int, ...]]:
    """The DiT input, its timesteps and positions with the canvas ahead of the clip: a latent frame at time 0.

    The region mask has no place there: the model must see from the canvas where it is empty.

    Raises:
        ValueError: no reference latents.
    """
    if conditioning.reference_latents is None:
        raise ValueError("conditioning.reference_latents is None: there is no canvas to put ahead of the clip.")
    batch, frames = noisy_latents.shape[:2]
    canvas = conditioning.reference_latents[:, :1].astype(noisy_latents.dtype)
    timesteps = jnp.broadcast_to(timesteps.reshape(batch, -1), (batch, frames))
    positions = range(frames) if frame_positions is None else frame_positions
    return (
        jnp.concatenate([canvas, noisy_latents], axis=1),
        jnp.pad(timesteps, ((0, 0), (1, 0))),
        (0, *(position + 1 for position in positions)),
    )


def zero_padding(
    embeddings: Float[Array, "B T D"], mask: Bool[Array, "B T"] | Int[Array, "B T"], text_len: int | None = None
) -> Float[Array, "B text_len D"]:
    """Text embeddings with zeros at padding, extended with zeros to `text_len` tokens.

    Wan attends to the padding, so that its value matters: the encoder's output there must not survive.

    Raises:
        ValueError: there are more than `text_len` tokens.
    """
    num_tokens = embeddings.shape[1]
    text_len = num_tokens if text_len is None else text_len
    if num_tokens > text_len:
        raise ValueError(f"embeddings have {num_tokens} tokens, more than text_len={text_len}.")
    # A selection, not a product: 0 * inf of an overflowed padding token would be NaN.
    zeroed = jnp.where(mask[..., None] != 0, embeddings, 0)
    return jnp.pad(zeroed, ((0, 0), (0, text_len - num_tokens), (0, 0)))


def canvas_frames(
    canvas_image: UInt8[Array | np.ndarray, "*B height width 3"], num_frames: int
) -> Float32[Array, "*B num_frames height width 3"]:
    """The clip whose latents are the reference latents: the canvas in [-1, 1], then grey frames (0).

    Raises:
        ValueError: no frame.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} must be at least 1.")
    frames = jnp.asarray(_UNIT_RANGE)[jnp.asarray(canvas_image)][..., None, :, :, :]
    grey = [(0, 0)] * (frames.ndim - 4) + [(0, num_frames - 1), (0, 0), (0, 0), (0, 0)]
    return jnp.pad(frames, grey)


def _keep(keep: Bool[Array, "B"], values: Array, otherwise: Array | float) -> Array:
    flags = jnp.reshape(keep, (-1,) + (1,) * (values.ndim - 1))
    return jnp.where(flags, values, jnp.asarray(otherwise, values.dtype))


def drop_text(
    conditioning: Conditioning, keep: Bool[Array, "B"], null_text_embeddings: Float[Array, "*B T text_dim"]
) -> Conditioning:
    """Where `keep` is false, the text becomes the null text and no token names a subject."""
    tokens = conditioning.subject_tokens
    return dataclasses.replace(
        conditioning,
        text_embeddings=_keep(keep, conditioning.text_embeddings, null_text_embeddings),
        subject_tokens=None if tokens is None else _keep(keep, tokens, 0),
    )


def drop_references(
    conditioning: Conditioning,
    keep: Bool[Array, "B"],
    blank_latents: Float[Array, "F H W C"],
    blank_image_embeddings: Float[Array, "I image_dim"] | None = None,
) -> Conditioning:
    """Where `keep` is false, the canvas becomes the blank one: its latents and image embeddings, mask and regions 0.

    Raises:
        ValueError: the model sees image embeddings and none of the blank canvas are given.
    """
    if conditioning.image_embeddings is not None and blank_image_embeddings is None:
        raise ValueError("blank_image_embeddings is missing: the image embeddings would still show the references.")
    blank: dict[str, Any] = {
        "image_embeddings": blank_image_embeddings,
        "reference_latents": blank_latents,
        "region_mask": 0,
        "subject_regions": 0,
    }
    given = {name: getattr(conditioning, name) for name in blank}
    dropped = {name: _keep(keep, values, blank[name]) for name, values in given.items() if values is not None}
    return dataclasses.replace(conditioning, **dropped)
