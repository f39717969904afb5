"""Masks against recorded sums, a literal construction in NumPy, and counted pixels."""

import numpy as np
import pytest
from PIL import Image

from magref_jax.conditioning.canvas import compose_canvas
from magref_jax.conditioning.region_mask import latent_mask, pack_region_mask, patch_regions, region_mask


def test_one_image_sets_2760_cells():
    canvas = compose_canvas([Image.new("RGB", (300, 400))], 480, 832)
    mask = latent_mask(canvas.mask, 8)
    assert mask.shape == (60, 104)
    assert mask.sum() == 2760
    np.testing.assert_array_equal(np.flatnonzero(mask.any(axis=0)), np.arange(29, 75))
    packed = pack_region_mask(mask, 21)
    assert packed.shape == (21, 60, 104, 4)
    assert packed[0].sum() == packed.sum() == 4 * 2760


@pytest.mark.parametrize(("border", "reference", "column"), [(277, 0, 34), (277, 1, 34), (554, 1, 69), (554, 2, 69)])
def test_cells_on_a_border_belong_to_both_neighbours(border, reference, column):
    assert border // 8 == column
    assert border % 8
    images = [Image.new("RGB", (10, 10), colour) for colour in ("red", "green", "blue")]
    x0, y0, x1, y1 = compose_canvas(images, 480, 832).regions[reference]
    alone = np.zeros((480, 832), np.uint8)
    alone[y0:y1, x0:x1] = 1
    assert latent_mask(alone, 8)[30, column] == 1


def test_a_cell_is_set_by_any_of_its_pixels():
    mask = np.zeros((16, 24), np.uint8)
    mask[7, 8] = mask[15, 23] = 1
    np.testing.assert_array_equal(latent_mask(mask, 8), [[0, 1, 0], [0, 0, 1]])
    with pytest.raises(ValueError, match="mask of 24x16 pixels must be a multiple of the spatial stride 5"):
        latent_mask(mask, 5)


@pytest.mark.parametrize("num_frames", [1, 5, 49, 81])
def test_packing_equals_folding_pixel_frames_into_channels(num_frames):
    mask = np.random.default_rng(0).integers(0, 2, (6, 9), dtype=np.uint8)
    frames = np.zeros((1, num_frames, 6, 9))
    frames[:, 0] = mask
    frames = np.concatenate([np.repeat(frames[:, :1], 4, axis=1), frames[:, 1:]], axis=1)
    folded = frames.reshape(1, (num_frames + 3) // 4, 4, 6, 9).swapaxes(1, 2)[0]  # [4 F h w], as in torch
    packed = pack_region_mask(mask, (num_frames - 1) // 4 + 1)
    assert packed.dtype == np.float32
    np.testing.assert_array_equal(packed, np.moveaxis(folded, 0, -1))


def test_modes():
    mask = np.zeros((16, 16), np.uint8)
    mask[0, 0] = 1
    assert region_mask(mask, 3, 8).sum() == 4
    full = region_mask(mask, 3, 8, "full")
    np.testing.assert_array_equal(full[0], 1)
    np.testing.assert_array_equal(full[1:], 0)
    with pytest.raises(ValueError, match="mask_mode='none' is unknown; choose one of 'region', 'full'"):
        region_mask(mask, 3, 8, "none")
    with pytest.raises(ValueError, match="num_latent_frames=0"):
        region_mask(mask, 0, 8)


@pytest.mark.parametrize(
    ("height", "width", "stride", "patch_size"),
    [(48, 72, 4, (1, 2, 2)), (64, 96, 8, (1, 2, 2)), (48, 72, 4, (1, 1, 3))],
)
def test_patch_regions_count_pixels(height, width, stride, patch_size):
    rng = np.random.default_rng(1)
    rectangles = []
    for _ in range(40):
        (x0, x1), (y0, y1) = (sorted(rng.choice(size + 1, 2, replace=False).tolist()) for size in (width, height))
        rectangles.append((x0, y0, x1, y1))
    token_height, token_width = stride * patch_size[1], stride * patch_size[2]
    regions = patch_regions(rectangles, height, width, stride, patch_size)
    for row, (x0, y0, x1, y1) in zip(regions, rectangles, strict=True):
        pixels = np.zeros((height, width))
        pixels[y0:y1, x0:x1] = 1
        expected = [
            pixels[y : y + token_height, x : x + token_width].mean() >= 0.5
            for y in range(0, height, token_height)
            for x in range(0, width, token_width)
        ]
        np.testing.assert_array_equal(row, expected)


def test_exactly_half_a_token_counts_and_spare_slots_are_empty():
    regions = patch_regions([(4, 0, 11, 8), None], 16, 16, 4, (1, 2, 2), num_subjects=3)
    np.testing.assert_array_equal(regions, [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    with pytest.raises(ValueError, match="2 rectangles given for num_subjects=1"):
        patch_regions([None, None], 16, 16, 4, (1, 2, 2), num_subjects=1)
    with pytest.raises(ValueError, match="20x16 pixels is not a whole number of tokens of 8x8"):
        patch_regions([None], 16, 20, 4, (1, 2, 2))
