"""Training batches from emoji world: rendered clips for the VAE, encoded ones for the DiT.

Both are made once and kept, because on a CPU rendering and encoding a clip costs as much as training on it. Clip i of a
store depends on (seed, i) alone.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image
from tqdm import tqdm

from magref_jax.conditioning.canvas import LIMITS, compose_canvas
from magref_jax.conditioning.case import Case, Encoders, encode_cases, prepare_case, stack_cases
from magref_jax.conditioning.inputs import Conditioning
from magref_jax.conditioning.subjects import Subject
from magref_jax.config import Layout, ModelConfig
from magref_jax.data.emoji_world import Clip, EmojiWorldConfig, Split, sample_clip

NUM_SUBJECTS = 4  # subject slots of a training case


def clip_images(clip: Clip) -> list[Image.Image]:
    return [Image.fromarray(reference.image) for reference in clip.references]


def clip_layout(config: ModelConfig, clip: Clip) -> Layout:
    """The model's layout, or v2 for more references than it holds."""
    return config.sampling.layout if len(clip.references) <= LIMITS[config.sampling.layout] else "v2"


def clip_case(config: ModelConfig, tokenizer: Any, clip: Clip, order: int, num_frames: int) -> Case:
    """The case whose ideal answer is the clip."""
    height, width = clip.frames.shape[1:3]
    subjects = [Subject(reference.label, span=reference.label_span) for reference in clip.references]
    return prepare_case(
        config,
        tokenizer,
        clip.caption,
        clip_images(clip),
        subjects,
        num_frames=num_frames,
        height=height,
        width=width,
        order=order,
        layout=clip_layout(config, clip),
        num_subjects=NUM_SUBJECTS,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A case, the frames to train toward, and the latent cells where a subject is in them."""

    case: Case
    frames: UInt8[np.ndarray, "N H W 3"]
    subject_cells: Bool[np.ndarray, "F h w"]


def make_example(
    config: ModelConfig, tokenizer: Any, clip: Clip, order: int, first_frame_target: Literal["canvas", "video"]
) -> Example:
    """The example of a clip: its own first frames, or the canvas and then its first frames."""
    num_frames = config.sampling.num_frames
    case = clip_case(config, tokenizer, clip, order, num_frames)
    boxes = np.stack([subject.boxes for subject in clip.subjects])
    frames = clip.frames
    if first_frame_target == "canvas":
        frames = np.concatenate([case.canvas.image[None], frames])
        boxes = np.concatenate([np.zeros_like(boxes[:, :1]), boxes], 1)  # empty: no subject moves on the canvas
    if len(frames) < num_frames:
        raise ValueError(
            f"the clip has {len(clip.frames)} frames; first_frame_target={first_frame_target!r} needs more."
        )
    cells = subject_cells(config, boxes[:, :num_frames], *frames.shape[1:3])
    return Example(case, frames[:num_frames], cells)


def subject_cells(
    config: ModelConfig, boxes: Int[np.ndarray, "S N 4"], height: int, width: int
) -> Bool[np.ndarray, "F h w"]:
    """Whether a subject's box reaches into a latent cell in any of the pixel frames that the latent frame stands for."""
    stride = config.vae.spatial_stride
    pixels = np.zeros((boxes.shape[1], height, width), bool)
    for track in boxes:
        for frame, (x0, y0, x1, y1) in enumerate(track):
            pixels[frame, y0:y1, x0:x1] = True
    cells = rearrange(pixels, "n (h s) (w t) -> n h w (s t)", s=stride, t=stride).max(-1)
    rest = rearrange(cells[1:], "(f s) h w -> f h w s", s=config.vae.temporal_stride).max(-1)
    return np.concatenate([cells[:1], rest])


def render_clips(
    config: ModelConfig, data: EmojiWorldConfig, split: Split, seed: int, count: int
) -> UInt8[np.ndarray, "N F H W 3"]:
    """Clips with their canvas in front, as the VAE sees them later."""
    clips = np.empty((count, data.num_frames + 1, data.height, data.width, 3), np.uint8)
    for index in tqdm(range(count), desc="rendering clips", unit="clip"):
        clip = sample_clip(data, split, seed, index)
        canvas = compose_canvas(clip_images(clip), data.height, data.width, clip_layout(config, clip), index)
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


class EncodedClips:
    """Clips of emoji world after the frozen encoders, one memory-mapped array per field."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.counts = arrays["subject_tokens"].any(-1).sum(-1)  # references of each clip

    def __len__(self) -> int:
        return len(self.arrays["clean_latents"])

    def batch(
        self,
        rng: np.random.Generator,
        batch_size: int,
        num_latent_frames: int,
        reach: int | None = None,
        max_references: int = NUM_SUBJECTS,
    ) -> tuple[Array, Array, Conditioning, tuple[int, ...]]:
        """(clean latents, subject cells, conditioning, frame positions) of random clips and latent frames.

        The first latent frame, the canvas, is always among them.
        """
        rows = np.sort(rng.choice(np.flatnonzero(self.counts <= max_references), batch_size, replace=False))
        candidates = np.arange(1, self.arrays["clean_latents"].shape[1])[: reach and reach - 1]
        frames = [0, *np.sort(rng.choice(candidates, num_latent_frames - 1, replace=False)).tolist()]
        fields = {name: np.asarray(array[rows], np.float32) for name, array in self.arrays.items()}
        for name in ("clean_latents", "subject_cells", "reference_latents", "region_mask"):
            fields[name] = fields[name][:, frames]
        arrays = {name: jnp.asarray(array) for name, array in fields.items()}
        return arrays.pop("clean_latents"), arrays.pop("subject_cells"), Conditioning(**arrays), tuple(frames)


def encode_clips(
    folder: pathlib.Path,
    make: Callable[[int], Example],
    encoders: Encoders,
    count: int,
    batch_size: int = 16,
) -> EncodedClips:
    """Encodes examples 0..count-1 into `folder`; a folder that is complete is only opened, one that is not is continued."""

    @jax.jit
    def encode(arrays: dict[str, jax.Array], frames: jax.Array) -> dict[str, jax.Array]:
        conditioning = encode_cases(encoders, arrays, frames.shape[1])
        clean = encoders.frames(frames.astype(jnp.float32) / 127.5 - 1)
        fields = {name: value for name, value in vars(conditioning).items() if value is not None}
        return {name: value.astype(jnp.float16) for name, value in fields.items()} | {
            "clean_latents": clean.astype(jnp.float16)
        }

    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "progress"
    done = int(progress.read_text()) if progress.exists() else 0
    arrays: dict[str, np.ndarray] = {path.stem: np.load(path, mmap_mode="r+") for path in folder.glob("*.npy")}
    if arrays and len(arrays["clean_latents"]) != count:
        raise ValueError(
            f"{folder} holds {len(arrays['clean_latents'])} clips, the config asks for {count}; remove it."
        )
    with tqdm(total=count, initial=done, desc="encoding clips", unit="clip") as bar:
        while done < count:
            made = [make(min(index, count - 1)) for index in range(done, done + batch_size)]
            fields = encode(stack_cases([each.case for each in made]), np.stack([each.frames for each in made]))
            fields["subject_cells"] = np.stack([each.subject_cells for each in made])
            size = min(batch_size, count - done)
            for name, value in fields.items():
                if name not in arrays:
                    arrays[name] = np.lib.format.open_memmap(
                        folder / f"{name}.npy", "w+", np.float16, (count, *value.shape[1:])
                    )
                arrays[name][done : done + size] = np.asarray(value[:size])
            done += size
            progress.write_text(str(done))
            bar.update(size)
    return EncodedClips(arrays)
