"""The region mask: which latent cells and which video tokens show a reference.

It fills the four mask channels of the DiT input. 1 is known, 0 is to be generated.

H, W: pixels · h, w: latent cells · F: latent frames · C: mask channels · S: subjects · L0: tokens of latent frame 0.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt8

from magref_jax.conditioning.canvas import Box
from magref_jax.config import MaskMode

# What the mask of latent frame 0 is: the references' cells (MAGREF), or everything (Wan image-to-video).
MODES = {"region": lambda mask: mask, "full": np.ones_like}


def latent_mask(mask: UInt8[np.ndarray, "H W"], stride: int) -> UInt8[np.ndarray, "h w"]:
    """1 where any pixel of a stride x stride cell is 1. Regions that meet inside a cell both own it.

    Raises:
        ValueError: height or width is not a multiple of the stride.
    """
    height, width = mask.shape
    if height % stride or width % stride:
        raise ValueError(f"mask of {width}x{height} pixels must be a multiple of the spatial stride {stride} each way.")
    cells = mask.reshape(height // stride, stride, width // stride, stride)
    return np.asarray(cells.any(axis=(1, 3)), np.uint8)


def pack_region_mask(
    latent_mask: UInt8[np.ndarray, "h w"], num_latent_frames: int, channels: int = 4
) -> Float32[np.ndarray, "F h w C"]:
    """The mask in every channel of latent frame 0, and 0 in all later frames.

    The reference repeats pixel frame 0 four times and folds each four frames into channels, which comes to the same.

    Raises:
        ValueError: no latent frame.
    """
    if num_latent_frames < 1:
        raise ValueError(f"num_latent_frames={num_latent_frames} must be at least 1.")
    packed = np.zeros((num_latent_frames, *latent_mask.shape, channels), np.float32)
    packed[0] = latent_mask[..., None]
    return packed


def region_mask(
    mask: UInt8[np.ndarray, "H W"],
    num_latent_frames: int,
    spatial_stride: int,
    mode: MaskMode = "region",
    channels: int = 4,
) -> Float32[np.ndarray, "F h w C"]:
    """From the canvas mask in pixels to the mask channels of the DiT input.

    Raises:
        ValueError: unknown mode, no latent frame, or a size that is not a multiple of the stride.
    """
    if mode not in MODES:
        raise ValueError(f"mask_mode={mode!r} is unknown; choose one of {', '.join(map(repr, MODES))}.")
    return pack_region_mask(MODES[mode](latent_mask(mask, spatial_stride)), num_latent_frames, channels)


def patch_regions(
    rectangles: Sequence[Box | None],
    height: int,
    width: int,
    spatial_stride: int,
    patch_size: tuple[int, ...],
    num_subjects: int | None = None,
) -> Float32[np.ndarray, "S L0"]:
    """1 where a rectangle covers at least half of a token's pixels, tokens row by row; a row of zeros for None.

    Rows and columns of a token are the last two entries of `patch_size`, in latent cells, as in `DiTConfig`. Up to
    `num_subjects`, rows of zeros fill the slots that are left.

    Raises:
        ValueError: more rectangles than slots, or a size that is not a whole number of tokens.
    """
    num_subjects = len(rectangles) if num_subjects is None else num_subjects
    if len(rectangles) > num_subjects:
        raise ValueError(f"{len(rectangles)} rectangles given for num_subjects={num_subjects}.")
    token_height, token_width = (spatial_stride * cells for cells in patch_size[-2:])
    if height % token_height or width % token_width:
        raise ValueError(f"{width}x{height} pixels is not a whole number of tokens of {token_width}x{token_height}.")

    def overlap(start: int, stop: int, size: int, length: int) -> np.ndarray:
        edges = np.arange(0, length, size)
        return np.clip(np.minimum(stop, edges + size) - np.maximum(start, edges), 0, None)

    regions = np.zeros((num_subjects, (height // token_height) * (width // token_width)), np.float32)
    for row, rectangle in zip(regions, rectangles, strict=False):
        if rectangle is None:
            continue
        x0, y0, x1, y1 = rectangle
        covered = np.outer(overlap(y0, y1, token_height, height), overlap(x0, x1, token_width, width))
        row[:] = (2 * covered >= token_height * token_width).reshape(-1)
    return regions
