"""Clips of emoji world as the VAE sees them: rendered once and kept, because on a CPU that costs as much as training on them."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from tqdm import tqdm

from magref_jax.conditioning.canvas import compose_canvas
from magref_jax.config import ModelConfig
from magref_jax.data.clips import choose_layout
from magref_jax.data.emoji_world import Clip, EmojiWorldConfig, Split, sample_clip


def clip_images(clip: Clip) -> list[Image.Image]:
    return [Image.fromarray(reference.image) for reference in clip.references]


def render_clips(
    config: ModelConfig, data: EmojiWorldConfig, split: Split, seed: int, count: int
) -> UInt8[np.ndarray, "N F H W 3"]:
    """Clips with their canvas in front, as the VAE sees them later."""
    clips = np.empty((count, data.num_frames + 1, data.height, data.width, 3), np.uint8)
    for index in tqdm(range(count), desc="rendering clips", unit="clip"):
        clip = sample_clip(data, split, seed, index)
        canvas = compose_canvas(
            clip_images(clip), data.height, data.width, choose_layout(config, len(clip.references)), index
        )
        clips[index, 0], clips[index, 1:] = canvas.image, clip.frames
    return clips


def vae_batch(
    clips: UInt8[np.ndarray, "N F H W 3"],
    rng: np.random.Generator,
    batch_size: int,
    num_frames: int,
    crop: int | None,
    stride: int,
    grey_fraction: float,
) -> Float[np.ndarray, "B f h w 3"]:
    """Random windows in time and space, in [-1, 1]; some are a canvas followed by grey frames."""
    _, length, height, width, _ = clips.shape
    rows, columns = (height, width) if crop is None else (crop, crop)
    batch = np.empty((batch_size, num_frames, rows, columns, 3), np.float32)
    for sample in batch:
        clip = clips[rng.integers(len(clips))]
        top = stride * rng.integers((height - rows) // stride + 1)
        left = stride * rng.integers((width - columns) // stride + 1)
        # Half of the windows start at the canvas: the cut after it is what the model will have to encode.
        start = 0 if num_frames > 1 and rng.random() < 0.5 else rng.integers(length - num_frames + 1)
        window = clip[start : start + num_frames, top : top + rows, left : left + columns]
        sample[:] = window.astype(np.float32) / 127.5 - 1
        if start == 0 and rng.random() < 2 * grey_fraction:
            sample[1:] = 0
    return batch
