"""One case, from a prompt and reference images to the arrays that the encoders and the DiT read.

Everything on the host happens in `prepare_case`; `encode_cases` runs the frozen encoders on a batch of them.
Training and sampling both go through here, so that they cannot disagree.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32
from PIL import Image

from magref_jax.conditioning.canvas import Canvas, Order, Role, compose_canvas
from magref_jax.conditioning.inputs import Conditioning, canvas_frames, zero_padding
from magref_jax.conditioning.region_mask import patch_regions, region_mask
from magref_jax.conditioning.subjects import Subject, clean_prompt, subject_tokens
from magref_jax.config import Layout, ModelConfig
from magref_jax.descriptions import short_repr


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A prepared case. T text tokens, S subject slots, F/h/w latent frames, height, width, L0 tokens of latent frame 0."""

    prompt: str  # cleaned
    canvas: Canvas
    token_ids: Int32[np.ndarray, "T"]
    attention_mask: Int32[np.ndarray, "T"]
    region_mask: Float32[np.ndarray, "F h w 4"]
    subject_tokens: Float32[np.ndarray, "S T"]
    subject_regions: Float32[np.ndarray, "S L0"]


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The frozen networks as functions of arrays, and which of their outputs the DiT sees."""

    text: Callable[[Int32[Array, "B T"], Int32[Array, "B T"]], Float[Array, "B T D"]]
    image: Callable[[Float[Array, "B H W 3"]], Float[Array, "B I E"]] | None  # takes the canvas in [-1, 1]
    frames: Callable[[Float[Array, "B F H W 3"]], Float[Array, "B f h w C"]]  # → normalised latents
    takes_references: bool = True  # False: text-to-video, without reference latents and region mask


def check_size(config: ModelConfig, num_frames: int, height: int, width: int) -> None:
    """Refuses clips that the networks cannot take.

    Raises:
        ValueError: names the argument and what it must be.
    """
    config.vae.num_latent_frames(num_frames)
    for name, value, patch in (("height", height, 1), ("width", width, 2)):
        multiple = config.vae.spatial_stride * config.dit.patch_size[patch]
        if value < multiple or value % multiple:
            raise ValueError(f"{name}={value} must be a positive multiple of {multiple} for this model.")


def tokenize(config: ModelConfig, tokenizer: Any, prompt: str) -> dict[str, Any]:
    """`token_ids` and `attention_mask` [T] of a cleaned prompt, and the `offsets` of its tokens in it, a span each."""
    encoding = tokenizer(
        prompt, padding="max_length", truncation=True, max_length=config.dit.text_len, return_offsets_mapping=True
    )
    return {
        "token_ids": np.asarray(encoding["input_ids"], np.int32),
        "attention_mask": np.asarray(encoding["attention_mask"], np.int32),
        "offsets": encoding["offset_mapping"],
    }


def prepare_case(
    config: ModelConfig,
    tokenizer: Any,
    prompt: str,
    images: Sequence[Image.Image],
    subjects: Sequence[Subject | str | None] = (),
    *,
    num_frames: int,
    height: int,
    width: int,
    order: Order = "input",
    roles: Sequence[Role] = (),
    layout: Layout | None = None,
    num_subjects: int = 8,
) -> Case:
    """Composes the canvas and aligns each subject's words with its region.

    `subjects[i]` are the words of reference i in the prompt, or None; `roles` see `compose_canvas`. `layout` defaults to the
    model's. `tokenizer` is a fast Hugging Face tokenizer.

    Raises:
        ValueError: a size the networks cannot take, too many references, or words that are not in the prompt.
    """
    if subjects and len(subjects) != len(images):
        raise ValueError(f"{len(subjects)} subjects given for {len(images)} reference images; give one each, or None.")
    check_size(config, num_frames, height, width)
    num_latent_frames = config.vae.num_latent_frames(num_frames)
    sampling = config.sampling
    canvas = compose_canvas(images, height, width, layout or sampling.layout, order, roles)
    prompt = clean_prompt(prompt)
    encoding = tokenize(config, tokenizer, prompt)
    named = [region if subject is not None else None for region, subject in zip(canvas.regions, subjects, strict=False)]
    return Case(
        prompt=prompt,
        canvas=canvas,
        token_ids=encoding["token_ids"],
        attention_mask=encoding["attention_mask"],
        region_mask=region_mask(canvas.mask, num_latent_frames, config.vae.spatial_stride, sampling.mask_mode),
        subject_tokens=subject_tokens(prompt, subjects, encoding["offsets"], num_subjects, config.dit.text_len),
        subject_regions=patch_regions(
            named, height, width, config.vae.spatial_stride, config.dit.patch_size, num_subjects
        ),
    )


def stack_cases(cases: Sequence[Case]) -> dict[str, np.ndarray]:
    """The arrays of several cases of one shape, batched, as `encode_cases` takes them."""
    names = ("token_ids", "attention_mask", "region_mask", "subject_tokens", "subject_regions")
    arrays = {name: np.stack([getattr(case, name) for case in cases]) for name in names}
    return arrays | {"canvas": np.stack([case.canvas.image for case in cases])}


def encode_text(
    encoders: Encoders, token_ids: Int32[Array, "B T"], attention_mask: Int32[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Text embeddings, 0 at padding."""
    return zero_padding(encoders.text(token_ids, attention_mask), attention_mask)


def encode_cases(encoders: Encoders, arrays: dict[str, Array], num_frames: int) -> Conditioning:
    """Runs the frozen encoders on stacked cases; safe inside `jax.jit`."""
    frames = canvas_frames(arrays["canvas"], num_frames)
    conditioning = Conditioning(
        text_embeddings=encode_text(encoders, arrays["token_ids"], arrays["attention_mask"]),
        image_embeddings=None if encoders.image is None else encoders.image(frames[:, 0]),
        reference_latents=encoders.frames(frames) if encoders.takes_references else None,
        region_mask=jnp.asarray(arrays["region_mask"]) if encoders.takes_references else None,
        subject_tokens=jnp.asarray(arrays["subject_tokens"]),
        subject_regions=jnp.asarray(arrays["subject_regions"]),
    )
    return jax.tree.map(jax.lax.stop_gradient, conditioning)
