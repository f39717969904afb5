"""The canvas against the numbers of the official code, recorded at 832x480."""

import numpy as np
import pytest
from PIL import Image

from magref_jax.conditioning.canvas import assign, compose_canvas, draw_regions, layout_cells, resize_and_pad

HEIGHT, WIDTH = 480, 832
LEFT, CENTRE, RIGHT = (0, 0, 277, 480), (277, 0, 554, 480), (554, 0, 832, 480)


def solid(width, height, colour=(10, 20, 30)):
    return Image.new("RGB", (width, height), colour)


@pytest.mark.parametrize(
    ("count", "cells"),
    [
        (0, [(0, 0, 832, 480)]),
        (1, [(0, 0, 832, 480)]),
        (2, [(0, 0, 416, 480), (416, 0, 832, 480)]),
        (3, [LEFT, CENTRE, RIGHT]),
        (4, [(0, 0, 416, 240), (416, 0, 832, 240), (0, 240, 416, 480), (416, 240, 832, 480)]),
        (
            6,
            [
                *[(0, 0, 277, 240), (277, 0, 554, 240), (554, 0, 832, 240)],
                *[(0, 240, 277, 480), (277, 240, 554, 480), (554, 240, 832, 480)],
            ],
        ),
        (
            8,
            [
                *[(0, 0, 208, 240), (208, 0, 416, 240), (416, 0, 624, 240), (624, 0, 832, 240)],
                *[(0, 240, 208, 480), (208, 240, 416, 480), (416, 240, 624, 480), (624, 240, 832, 480)],
            ],
        ),
    ],
)
def test_v2_cells(count, cells):
    assert layout_cells(count, HEIGHT, WIDTH, "v2") == cells


def test_v2_offers_a_spare_cell_to_five_and_seven():
    assert len(layout_cells(5, HEIGHT, WIDTH, "v2")) == 6
    assert len(layout_cells(7, HEIGHT, WIDTH, "v2")) == 8


@pytest.mark.parametrize(
    ("count", "cells"),
    [
        (1, [(277, 0, 555, 480)]),
        (2, [(0, 0, 277, 480), (277, 0, 555, 480)]),
        (3, [(0, 0, 277, 480), (277, 0, 555, 480), (555, 0, 832, 480)]),
    ],
)
def test_v1_cells_have_widths_277_278_277(count, cells):
    assert layout_cells(count, HEIGHT, WIDTH, "v1") == cells


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize(("height", "width"), [(48, 72), (832, 480), (720, 1280), (37, 53)])
def test_cells_tile_any_canvas(layout, height, width):
    covered = np.zeros((height, width), int)
    for x0, y0, x1, y1 in layout_cells(3, height, width, layout):
        covered[y0:y1, x0:x1] += 1
    np.testing.assert_array_equal(covered, 1)


def test_v1_columns_of_a_small_canvas():
    assert layout_cells(3, 48, 72, "v1") == [(0, 0, 24, 48), (24, 0, 48, 48), (48, 0, 72, 48)]


@pytest.mark.parametrize(("layout", "count", "limit"), [("v1", 4, "at most 3"), ("v2", 9, "at most 8")])
def test_too_many_references_name_the_limit_and_the_layout(layout, count, limit):
    for call in (
        lambda: layout_cells(count, HEIGHT, WIDTH, layout),
        lambda: assign(count, layout, 0),
        lambda: compose_canvas([solid(4, 4)] * count, HEIGHT, WIDTH, layout),
    ):
        with pytest.raises(ValueError, match=f"'{layout}' holds {limit}"):
            call()


def test_unknown_layout_and_tiny_canvas():
    with pytest.raises(ValueError, match="'v3' is unknown; choose one of 'v1', 'v2'"):
        layout_cells(1, HEIGHT, WIDTH, "v3")
    with pytest.raises(ValueError, match="3x1 canvas cannot be split into 4 columns and 2 rows"):
        layout_cells(8, 1, 3, "v2")


@pytest.mark.parametrize(
    ("seed", "references", "cells"),
    # As `random.seed(seed)` and two calls of `random.shuffle` leave the two lists; cells 0, 1, 2 are left to right.
    [
        (0, (0, 2, 1), (2, 1, 0)),
        (1, (1, 2, 0), (2, 0, 1)),
        (42, (1, 0, 2), (2, 1, 0)),
        (3407, (2, 1, 0), (2, 1, 0)),
    ],
)
def test_seeded_order_of_three(seed, references, cells):
    cell_of = assign(3, "v2", seed)
    assert [cell_of[reference] for reference in references] == list(cells)
    assert assign(3, "v2", np.int64(seed)) == cell_of


@pytest.mark.parametrize("count", range(9))
def test_a_seed_gives_every_reference_its_own_cell(count):
    cell_of = assign(count, "v2", 7)
    assert len(set(cell_of)) == count
    assert all(0 <= cell < len(layout_cells(count, HEIGHT, WIDTH, "v2")) for cell in cell_of)


def test_order_without_shuffle():
    assert assign(3, "v1", 42) == (0, 1, 2)
    assert assign(3, "v2", "input") == (0, 1, 2)
    # Reference 2 goes to the first cell, 0 to the second, 1 to the third.
    assert assign(3, "v2", "2,0,1") == assign(3, "v2", (2, 0, 1)) == (1, 2, 0)
    assert assign(0, "v2", "input") == ()
    assert assign(5, "v2", (4, None, 0, 1, 2, 3)) == (2, 3, 4, 5, 0)  # 6 cells, the second stays white


@pytest.mark.parametrize("order", ["2,0", "0,0,1", (0, 1, 3), "left", "", (0, 1, 2, 3), (0, None, 1, 2)])
def test_wrong_order(order):
    with pytest.raises(ValueError, match="order="):
        assign(3, "v2", order)


@pytest.mark.parametrize(
    ("size", "cell", "resized", "left_top", "right_bottom"),
    [
        ((100, 100), (277, 480), (277, 277), (0, 101), (0, 102)),
        ((1920, 1080), (832, 480), (832, 468), (0, 6), (0, 6)),
        ((1000, 3000), (278, 480), (160, 480), (59, 0), (59, 0)),
        ((333, 777), (416, 240), (102, 240), (157, 0), (157, 0)),
        ((640, 480), (277, 240), (277, 207), (0, 16), (0, 17)),
        ((430, 1000), (277, 480), (206, 480), (35, 0), (36, 0)),
    ],
)
def test_resize_and_pad(size, cell, resized, left_top, right_bottom):
    pixels, (x0, y0, x1, y1) = resize_and_pad(solid(*size), (5, 7, 5 + cell[0], 7 + cell[1]))
    assert (x1 - x0, y1 - y0) == resized
    assert (x0 - 5, y0 - 7) == left_top
    assert (5 + cell[0] - x1, 7 + cell[1] - y1) == right_bottom
    expected = np.full((cell[1], cell[0], 3), 255, np.uint8)
    expected[y0 - 7 : y1 - 7, x0 - 5 : x1 - 5] = (10, 20, 30)
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(("height", "resized"), [(122, 60), (254, 126), (958, 478)])
def test_scaled_size_truncates_the_float(height, resized):
    # Exactly, 277 * height / 554 is resized + 1; the quotient in floating point falls just below.
    assert 277 * height == (resized + 1) * 554
    _, (_, y0, _, y1) = resize_and_pad(solid(554, height), LEFT)
    assert y1 - y0 == resized


def test_resize_is_lanczos_on_bytes():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    pixels, _ = resize_and_pad(noise, (0, 0, 40, 40))
    np.testing.assert_array_equal(pixels[5:35], np.asarray(noise.resize((40, 30), Image.Resampling.LANCZOS)))
    np.testing.assert_array_equal(pixels[:5], 255)


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000)])
def test_too_elongated(size):
    with pytest.raises(ValueError, match=rf"reference_images\[1\] is {size[0]}x{size[1]} pixels: too elongated"):
        compose_canvas([solid(8, 8), solid(*size)], HEIGHT, WIDTH)


def test_regions_follow_the_references_not_the_cells():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    canvas = compose_canvas([solid(50, 50, colour) for colour in colours], HEIGHT, WIDTH, "v2", 0)
    assert canvas.cells == (RIGHT, LEFT, CENTRE)  # seed 0 sends references 0, 2, 1 to right, centre, left
    for colour, (x0, y0, x1, y1) in zip(colours, canvas.regions, strict=True):
        np.testing.assert_array_equal(canvas.image[y0:y1, x0:x1], np.broadcast_to(colour, (y1 - y0, x1 - x0, 3)))
        np.testing.assert_array_equal(canvas.mask[y0:y1, x0:x1], 1)
    assert canvas.mask.sum() == 277 * 277 * 2 + 278 * 278  # the right cell is one pixel wider
    np.testing.assert_array_equal(canvas.image[canvas.mask == 0], 255)


def test_v1_shows_one_image_in_the_centre():
    canvas = compose_canvas([solid(10, 30)], HEIGHT, WIDTH, "v1", 5)
    assert canvas.regions == ((277 + 59, 0, 277 + 59 + 160, 480),)


def test_a_spare_cell_stays_white():
    canvas = compose_canvas([solid(20, 20)] * 5, HEIGHT, WIDTH, "v2", "input")
    assert canvas.mask[240:, 554:].sum() == 0
    np.testing.assert_array_equal(canvas.image[240:, 554:], 255)


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_no_reference_is_a_blank_canvas(layout):
    canvas = compose_canvas([], HEIGHT, WIDTH, layout, 3)
    assert canvas.image.shape == (HEIGHT, WIDTH, 3)
    assert canvas.image.min() == 255
    assert canvas.mask.max() == 0
    assert canvas.regions == canvas.cells == ()


def test_strict_parity_keeps_the_colours_under_transparency():
    cut_out = Image.new("RGBA", (8, 8), (200, 10, 10, 0))
    assert compose_canvas([cut_out], 8, 8).image.min() == 255
    np.testing.assert_array_equal(compose_canvas([cut_out], 8, 8, strict_parity=True).image[0, 0], (200, 10, 10))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("cell", "scaled", "crop"),
    [
        ((40, 30), (40, 30), (0, 0, 40, 30)),  # the shape of the image
        ((30, 30), (40, 30), (5, 0, 35, 30)),  # the sides are cut
        ((60, 15), (60, 45), (0, 15, 60, 30)),  # top and bottom are cut
        ((240, 120), (240, 180), (0, 30, 240, 150)),  # enlarged
    ],
)
def test_a_background_fills_its_cell_with_its_middle(cell, scaled, crop):
    canvas = compose_canvas([NOISE], cell[1], cell[0], roles=["background"])
    expected = NOISE.resize(scaled, Image.Resampling.LANCZOS).crop(crop)
    np.testing.assert_array_equal(canvas.image, np.asarray(expected))
    assert canvas.mask.min() == 1
    assert canvas.regions == canvas.cells == ((0, 0, *cell),)


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_a_background_among_subjects_owns_its_whole_cell(layout):
    images = [solid(50, 50), solid(50, 50, (0, 200, 0)), solid(50, 50)]
    plain = compose_canvas(images, HEIGHT, WIDTH, layout, 0)
    canvas = compose_canvas(images, HEIGHT, WIDTH, layout, 0, ["subject", "background", "subject"])
    assert canvas.cells == plain.cells
    assert canvas.regions == (plain.regions[0], plain.cells[1], plain.regions[2])
    x0, y0, x1, y1 = canvas.cells[1]
    np.testing.assert_array_equal(canvas.image[y0:y1, x0:x1], np.broadcast_to((0, 200, 0), (y1 - y0, x1 - x0, 3)))
    np.testing.assert_array_equal(canvas.mask[y0:y1, x0:x1], 1)
    outside = np.ones((HEIGHT, WIDTH), bool)
    outside[y0:y1, x0:x1] = False
    np.testing.assert_array_equal(canvas.image[outside], plain.image[outside])
    np.testing.assert_array_equal(canvas.mask[outside], plain.mask[outside])


def test_roles_of_subjects_change_nothing():
    plain = compose_canvas([NOISE, solid(9, 4)], HEIGHT, WIDTH)
    canvas = compose_canvas([NOISE, solid(9, 4)], HEIGHT, WIDTH, roles=("subject", "subject"))
    np.testing.assert_array_equal(canvas.image, plain.image)
    np.testing.assert_array_equal(canvas.mask, plain.mask)
    assert canvas.regions == plain.regions


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000)])
def test_no_background_is_too_elongated(size):
    canvas = compose_canvas([solid(*size)], HEIGHT, WIDTH, roles=["background"])
    np.testing.assert_array_equal(canvas.image, np.broadcast_to((10, 20, 30), (HEIGHT, WIDTH, 3)))


def test_wrong_roles():
    with pytest.raises(ValueError, match="1 roles given for 2 reference images"):
        compose_canvas([NOISE, NOISE], HEIGHT, WIDTH, roles=["background"])
    with pytest.raises(ValueError, match="role 'hero' is unknown; choose one of 'subject', 'background'"):
        compose_canvas([NOISE], HEIGHT, WIDTH, roles=["hero"])


def test_drawing_is_large_and_outlines_regions():
    canvas = compose_canvas([solid(24, 24), solid(10, 40)], 48, 72, "v1")
    picture = draw_regions(canvas, ["fox", "red ball"])
    assert picture.size == (72 * 14, 48 * 14)
    assert picture.getpixel((1, 24 * 14)) != (10, 20, 30)  # the outline, on the left edge of the first region
    assert picture.getpixel((12 * 14, 24 * 14)) == (10, 20, 30)  # the image, in the middle of it
    with pytest.raises(ValueError, match="1 labels given for 2 references"):
        draw_regions(canvas, ["fox"])
