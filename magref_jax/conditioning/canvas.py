"""The reference canvas: every reference image laid out on one white frame.

Two layouts exist for the same released weights. "v1" is the first release (June 2025): three fixed columns. "v2" is
the layout since March 2026: the smallest grid that has a cell for every reference. Port of MAGREF's `process_refimg`,
except that a seed decides the order, that regions come back per reference, and that none is dropped in silence.

H, W: canvas height and width in pixels. A box is (x0, y0, x1, y1) in canvas pixels, x1 and y1 excluded.
"""

import dataclasses
import random
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from magref_jax.config import Layout
from magref_jax.descriptions import short_repr
from magref_jax.images import WHITE, to_rgb

Box = tuple[int, int, int, int]
Order = int | str | Sequence[int | None]
Role = Literal["subject", "background"]

# v2: number of cells -> (rows, columns).
GRIDS = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 8: (2, 4)}
# v1: number of references -> which of the three columns they take, in order.
COLUMNS = {0: (), 1: (1,), 2: (0, 1), 3: (0, 1, 2)}
LIMITS: dict[Layout, int] = {"v1": max(COLUMNS), "v2": max(GRIDS)}


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class Canvas:
    """A composed canvas. `regions[i]` is where reference i itself lies, `cells[i]` adds the white around it.

    `mask` is 1 on the references' pixels and 0 elsewhere, also on the padding inside a cell.
    """

    image: UInt8[np.ndarray, "H W 3"]
    mask: UInt8[np.ndarray, "H W"]
    regions: tuple[Box, ...]
    cells: tuple[Box, ...]


def _check_count(count: int, layout: Layout) -> None:
    if layout not in LIMITS:
        raise ValueError(f"layout={layout!r} is unknown; choose one of {', '.join(map(repr, LIMITS))}.")
    if not 0 <= count <= LIMITS[layout]:
        raise ValueError(f"{count} reference images given, but layout {layout!r} holds at most {LIMITS[layout]}.")


def layout_cells(count: int, height: int, width: int, layout: Layout) -> list[Box]:
    """The cells offered to `count` references, in canonical order: left to right, then top to bottom.

    v2 may offer one more cell than there are references (5 -> 6, 7 -> 8); the spare one stays white.

    Raises:
        ValueError: unknown layout, too many references, or a canvas with less than one pixel per cell.
    """
    _check_count(count, layout)
    if layout == "v1":
        rows, columns = 1, 3
        x_edges = [round(i * width / columns) for i in range(columns + 1)]  # 832 -> widths 277, 278, 277
    else:
        rows, columns = GRIDS[min(size for size in GRIDS if size >= count)]
        x_edges = [i * (width // columns) for i in range(columns)] + [width]  # the last column takes the remainder
    if height < rows or width < columns:
        raise ValueError(f"A {width}x{height} canvas cannot be split into {columns} columns and {rows} rows.")
    y_edges = [i * (height // rows) for i in range(rows)] + [height]
    grid = [(x_edges[c], y_edges[r], x_edges[c + 1], y_edges[r + 1]) for r in range(rows) for c in range(columns)]
    return [grid[c] for c in COLUMNS[count]] if layout == "v1" else grid


def assign(count: int, layout: Layout, order: Order) -> tuple[int, ...]:
    """For each reference, the index of its cell in `layout_cells`.

    `order` is a seed (v2 shuffles as the reference does; v1 never shuffles), "input" for list order, or the references
    in the order of the cells: (2, 0, 1) or "2,0,1" shows reference 2 in the first cell. None leaves a cell white.

    Raises:
        ValueError: unknown layout, too many references, or an order that is not a permutation of the references.
    """
    _check_count(count, layout)
    if isinstance(order, int | np.integer):
        return _shuffled(count, int(order)) if layout == "v2" else tuple(range(count))
    if isinstance(order, str):
        if order == "input":
            return tuple(range(count))
        try:
            order = tuple(int(part) for part in order.split(","))
        except ValueError:
            raise ValueError(f"order={order!r} is neither 'input' nor reference indices such as '2,0,1'.") from None
    cell_of = {reference: cell for cell, reference in enumerate(order) if reference is not None}
    if sorted(reference for reference in order if reference is not None) != list(range(count)):
        raise ValueError(f"order={tuple(order)} must name each of the {count} references 0..{count - 1} exactly once.")
    num_cells = count if layout == "v1" else min(size for size in GRIDS if size >= count)
    if len(order) > num_cells:
        raise ValueError(f"order={tuple(order)} is for {len(order)} cells; {count} references have {num_cells}.")
    return tuple(cell_of[reference] for reference in range(count))


def _shuffled(count: int, seed: int) -> tuple[int, ...]:
    # Two shuffles, references first and cells second, are what the reference draws from the global generator.
    rng = random.Random(seed)
    references = list(range(count))
    cells = list(range(min(size for size in GRIDS if size >= count)))
    rng.shuffle(references)
    rng.shuffle(cells)
    cell_of = dict(zip(references, cells, strict=False))  # a spare cell stays empty
    return tuple(cell_of[reference] for reference in range(count))


def fitted_size(size: tuple[int, int], box: tuple[int, int], name: str = "image") -> tuple[int, int]:
    """Width and height of an image scaled to fit a box of this width and height.

    Raises:
        ValueError: the image is so elongated that it would be less than one pixel thin.
    """
    box_width, box_height = box
    aspect = size[0] / size[1]
    # Truncated float products, as in the reference: exact integer arithmetic gives one pixel more for some sizes.
    if aspect > box_width / box_height:
        width, height = box_width, int(box_width / aspect)
    else:
        width, height = int(box_height * aspect), box_height
    if not width or not height:
        raise ValueError(
            f"{name} is {size[0]}x{size[1]} pixels: too elongated for a {box_width}x{box_height} cell, "
            f"where it would be {width}x{height}. Crop it first."
        )
    return width, height


def resize_and_pad(
    image: Image.Image, box: Box, *, name: str = "image", strict_parity: bool = False
) -> tuple[UInt8[np.ndarray, "h w 3"], Box]:
    """The image scaled to fit the box and centred on white, and the canvas region which the scaled image covers.

    Raises:
        ValueError: the image is so elongated that it would be less than one pixel thin.
    """
    image = to_rgb(image, name=name, strict_parity=strict_parity)
    x0, y0, x1, y1 = box
    box_width, box_height = x1 - x0, y1 - y0
    width, height = fitted_size(image.size, (box_width, box_height), name)
    left, top = (box_width - width) // 2, (box_height - height) // 2
    pixels = np.full((box_height, box_width, 3), WHITE, np.uint8)
    resized = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    pixels[top : top + height, left : left + width] = resized
    return pixels, (x0 + left, y0 + top, x0 + left + width, y0 + top + height)


def resize_and_crop(
    image: Image.Image, box: Box, *, name: str = "image", strict_parity: bool = False
) -> tuple[UInt8[np.ndarray, "h w 3"], Box]:
    """The middle of the image, scaled to fill the box, and the box: no image is too elongated for that."""
    x0, y0, x1, y1 = box
    image = to_rgb(image, name=name, strict_parity=strict_parity)
    return np.asarray(ImageOps.fit(image, (x1 - x0, y1 - y0), Image.Resampling.LANCZOS)), box


# How a reference is put into its cell. A background has no white around it, which could be taken for a part of the scene.
PLACEMENTS = {"subject": resize_and_pad, "background": resize_and_crop}


def compose_canvas(
    images: Sequence[Image.Image],
    height: int,
    width: int,
    layout: Layout = "v2",
    order: Order = "input",
    roles: Sequence[Role] = (),
    *,
    strict_parity: bool = False,
) -> Canvas:
    """All references on one white canvas; without references it stays white and its mask 0.

    `roles[i]` is "subject" or "background"; without roles, all are subjects, as in MAGREF.

    Raises:
        ValueError: too many references for the layout, a wrong order or role, or a subject too elongated for its cell.
    """
    if roles and len(roles) != len(images):
        raise ValueError(f"{len(roles)} roles given for {len(images)} reference images; give one each, or none.")
    for role in roles:
        if role not in PLACEMENTS:
            raise ValueError(f"role {role!r} is unknown; choose one of {', '.join(map(repr, PLACEMENTS))}.")
    offered = layout_cells(len(images), height, width, layout)
    cells = tuple(offered[cell] for cell in assign(len(images), layout, order))
    canvas = np.full((height, width, 3), WHITE, np.uint8)
    mask = np.zeros((height, width), np.uint8)
    regions = []
    for index, (image, cell) in enumerate(zip(images, cells, strict=True)):
        place = PLACEMENTS[roles[index] if roles else "subject"]
        pixels, region = place(image, cell, name=f"reference_images[{index}]", strict_parity=strict_parity)
        canvas[cell[1] : cell[3], cell[0] : cell[2]] = pixels
        mask[region[1] : region[3], region[0] : region[2]] = 1
        regions.append(region)
    return Canvas(image=canvas, mask=mask, regions=tuple(regions), cells=cells)


# One per reference, after Okabe & Ito's palette for colour-vision deficiency, darkened where it carries white text.
_COLOURS = ("#0072b2", "#c75300", "#00805d", "#a84d80", "#9c6b00", "#2b86b8", "#7f3c8d", "#5a5a5a")


def draw_regions(canvas: Canvas, labels: Sequence[str] | None = None, min_width: int = 960) -> Image.Image:
    """The canvas for people to look at: regions in a thick outline and cells in a thin one, with index and words.

    Raises:
        ValueError: the number of labels is not the number of references.
    """
    labels = [""] * len(canvas.regions) if labels is None else labels
    if len(labels) != len(canvas.regions):
        raise ValueError(f"{len(labels)} labels given for {len(canvas.regions)} references.")
    height, width = canvas.mask.shape
    scale = max(1, -(-min_width // width))  # whole pixels, so that a small canvas shows its real pixels
    picture = Image.fromarray(canvas.image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=22)
    for index, (region, cell, label) in enumerate(zip(canvas.regions, canvas.cells, labels, strict=True)):
        colour = _COLOURS[index % len(_COLOURS)]
        for box, line_width in ((cell, 1), (region, 4)):
            x0, y0, x1, y1 = (edge * scale for edge in box)
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=line_width)
        text, corner = f"{index} {label}".strip(), (region[0] * scale + 4, region[1] * scale + 4)
        left, top, right, bottom = draw.textbbox(corner, text, font=font)
        draw.rectangle((left - 4, top - 4, right + 4, bottom + 4), fill=colour)
        draw.text(corner, text, fill="white", font=font)
    return picture
