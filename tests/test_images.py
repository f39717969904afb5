"""Reference images: the pixels a file must become, and that whatever is no image is refused by name."""

import io
import os
import random
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, features

from magref_jax import images
from magref_jax.conditioning.canvas import compose_canvas
from magref_jax.data.clips import view_image
from magref_jax.data.prepare import read_reference
from magref_jax.data.records import View
from magref_jax.images import check_image, image_notes, read_image, to_rgb

ORIENTATION = 0x0112
UPRIGHT = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
# How a camera that was held so stores the upright picture, from the EXIF standard's "the 0th row is the visual ...".
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.swapaxes(0, 1),
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(UPRIGHT, -1),
}


def pixels(path, **options):
    image = read_image(path, **options)
    assert image.mode == "RGB"
    assert check_image(path, **options) == image.size
    return np.asarray(image)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("webp", {"lossless": True})])
def test_photographs_are_turned_upright(tmp_path, orientation, suffix, options):
    path = tmp_path / f"photograph.{suffix}"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(STORED[orientation]).save(path, exif=exif, **options)
    np.testing.assert_array_equal(pixels(path), UPRIGHT)
    np.testing.assert_array_equal(pixels(path, strict_parity=True), STORED[orientation])
    # The canvas is given what was read, and must not turn it once more.
    np.testing.assert_array_equal(to_rgb(read_image(path)), UPRIGHT)
    np.testing.assert_array_equal(to_rgb(read_image(path, strict_parity=True)), STORED[orientation])


def test_a_jpeg_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photograph = Image.new("RGB", (40, 20), (0, 0, 255))
    photograph.paste((255, 0, 0), (0, 0, 16, 16))  # top left as it is stored, top right as it is seen
    photograph.save(tmp_path / "photograph.jpg", exif=exif, quality=95)
    upright = read_image(tmp_path / "photograph.jpg")
    assert upright.size == (20, 40)
    assert np.abs(np.subtract(upright.getpixel((15, 4)), (255, 0, 0))).max() < 8
    assert np.abs(np.subtract(upright.getpixel((1, 4)), (0, 0, 255))).max() < 8


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0", b"Exif\0\0no TIFF header", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01"],
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_no_damaged_picture(tmp_path, suffix, exif):
    Image.new("RGB", (40, 20), RED).save(tmp_path / f"image.{suffix}", exif=exif)
    assert check_image(tmp_path / f"image.{suffix}") == (40, 20)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour_type, rows):
    """A PNG file of these rows, each with the 0 of its filter before it."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    packed = chunk(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + packed + chunk(b"IEND", b"")


def png_of(width, height):
    """A black PNG of one bit per pixel: a bomb, if it is large."""
    return png(width, height, 1, 0, bytes((1 + -(-width // 8)) * height))


def palette(transparency=None):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 10, 10, 200, 10])
    image.putdata([0, 1])
    return image, {} if transparency is None else {"transparency": transparency}


RED, GREEN, WHITE, BLACK = (200, 10, 10), (10, 200, 10), (255, 255, 255), (0, 0, 0)
FIFTH = (244, 206, 206)  # 0.2 · RED + 0.8 · WHITE
SIXTEEN = Image.fromarray(np.array([[0, 300, 30000, 65535]], np.uint16))


@pytest.mark.parametrize(
    ("name", "image", "options", "expected", "strict"),
    [
        ("clear.png", Image.new("RGBA", (1, 1), (*RED, 0)), {}, [WHITE], [RED]),
        ("fifth.png", Image.new("RGBA", (1, 1), (*RED, 51)), {}, [FIFTH], [RED]),
        ("clear.webp", Image.new("RGBA", (1, 1), (*RED, 0)), {"lossless": True, "exact": True}, [WHITE], [RED]),
        ("grey.png", Image.new("LA", (1, 1), (100, 51)), {}, [(224,) * 3], [(100,) * 3]),
        ("palette.png", *palette(), [RED, GREEN], [RED, GREEN]),
        ("clear_palette.png", *palette(0), [WHITE, GREEN], [RED, GREEN]),
        ("half_clear_palette.png", *palette(bytes([51, 255])), [FIFTH, GREEN], [RED, GREEN]),
        ("keyed.png", Image.new("RGB", (1, 1), RED), {"transparency": RED}, [WHITE], [RED]),
        ("keyed_grey.png", Image.new("L", (1, 1), 7), {"transparency": 7}, [WHITE], [(7,) * 3]),
        # 16 bits: the high byte; the official reading clips.
        ("sixteen.png", SIXTEEN, {}, [(v,) * 3 for v in (0, 1, 117, 255)], [(v,) * 3 for v in (0, 255, 255, 255)]),
        ("cmyk.jpg", Image.new("CMYK", (1, 1), (0, 255, 255, 0)), {"quality": 100}, [(255, 0, 0)], [(255, 0, 0)]),
        ("black.jpg", Image.new("CMYK", (1, 1), (0, 0, 0, 255)), {"quality": 100}, [BLACK], [BLACK]),
        ("bit.png", Image.new("1", (1, 1), 1), {}, [WHITE], [WHITE]),
        ("bit.bmp", Image.new("1", (2, 1), 0), {}, [BLACK] * 2, [BLACK] * 2),
        ("colour.bmp", Image.new("RGB", (1, 1), RED), {}, [RED], [RED]),
        ("misnamed.bmp", Image.new("RGB", (1, 1), RED), {"format": "PNG"}, [RED], [RED]),
        ("thin.png", Image.new("RGB", (1, 10000), RED), {}, [RED] * 10000, [RED] * 10000),
        ("colour.gif", Image.new("RGB", (1, 1), RED), {}, [RED], [RED]),
        ("clear.gif", *palette(0), [WHITE, GREEN], [RED, GREEN]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_file_has_the_pixels_it_must_have(tmp_path, name, image, options, expected, strict):
    image.save(tmp_path / name, **options)
    assert pixels(tmp_path / name).reshape(-1, 3).tolist() == [list(colour) for colour in expected]
    assert pixels(tmp_path / name, strict_parity=True).reshape(-1, 3).tolist() == [list(colour) for colour in strict]


@pytest.mark.parametrize(
    ("colour_type", "depth", "row", "expected"),
    [
        (0, 2, [0b00011011], [(0,) * 3, (85,) * 3, (170,) * 3, (255,) * 3]),
        (0, 4, [0x5F], [(85,) * 3, (255,) * 3]),
        (2, 16, [0xC8, 0xFF, 0x0A, 0x00, 0x0A, 0x80], [RED]),  # of 16 bits the high byte
        (6, 16, [0xC8, 0xFF, 0x0A, 0x00, 0x0A, 0x80, 0x33, 0x33], [FIFTH]),
        (4, 16, [0x64, 0xFF, 0x33, 0x33], [(224,) * 3]),
    ],
)
def test_every_depth_of_a_png(tmp_path, colour_type, depth, row, expected):
    (tmp_path / "image.png").write_bytes(png(len(expected), 1, depth, colour_type, bytes([0, *row])))
    assert pixels(tmp_path / "image.png")[0].tolist() == [list(colour) for colour in expected]


def test_sixteen_bit_grey_may_be_transparent(tmp_path):
    file = io.BytesIO()
    SIXTEEN.save(file, "PNG")
    content = file.getvalue()
    # The colour key of grey images is a chunk of its own, before the pixels; PIL does not write it for 16 bits.
    cut = content.index(b"IDAT") - 4
    (tmp_path / "keyed.png").write_bytes(content[:cut] + chunk(b"tRNS", struct.pack(">H", 300)) + content[cut:])
    assert pixels(tmp_path / "keyed.png")[0, :, 0].tolist() == [0, 255, 117, 255]


@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("webp", {"lossless": True}), ("gif", {})])
def test_the_first_picture_of_an_animation(tmp_path, suffix, options):
    path = tmp_path / f"moving.{suffix}"
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), GREEN)
    first.save(path, save_all=True, append_images=[second], duration=100, **options)
    assert set(map(tuple, pixels(path).reshape(-1, 3).tolist())) == {RED}
    assert image_notes(path) == (f"{path}: it is animated: the first of its 2 pictures is used.",)
    first.save(path, **options)
    assert image_notes(path) == ()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot")
def test_avif(tmp_path):
    Image.new("RGBA", (64, 32), (*RED, 0)).save(tmp_path / "clear.avif")
    Image.new("RGB", (64, 32), RED).save(tmp_path / "colour.avif", quality=100)
    assert pixels(tmp_path / "clear.avif").min() == 255
    assert np.abs(pixels(tmp_path / "colour.avif") - np.array(RED)).max() <= 2


def profile(space, tags):
    """A colour profile of version 2, as the specification ICC.1:2001-04 writes it."""
    table, data = b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    content = struct.pack(">I", len(tags)) + table + data
    kind, connection = (b"prtr", b"Lab ") if space == b"CMYK" else (b"mntr", b"XYZ ")
    header = struct.pack(">I4sI4s4s4s", 128 + len(content), bytes(4), 0x02100000, kind, space, connection)
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)  # D50
    return header.ljust(128, b"\0") + content


def xyz(*values):
    return struct.pack(">4s4x3i", b"XYZ ", *(round(value * 65536) for value in values))


def curve(*values):
    """From stored to linear: the exponent, or a table."""
    numbers = [round(values[0] * 256)] if len(values) == 1 else [round(value * 65535) for value in values]
    return struct.pack(f">4s4xI{len(numbers)}H", b"curv", len(numbers), *numbers)


def rgb_profile(primaries, tone):
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    tags = {name: xyz(*values) for name, values in zip(names, primaries, strict=True)}
    return profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), tone) | {b"wtpt": xyz(0.9642, 1, 0.8249)})


def cmyk_profile(cyan):
    """Cyan prints as this colour, byte values of L, a and b; black as black, and the other inks as white."""
    ramp = bytes(range(256))
    grid = b"".join(bytes([0, 128, 128] if i & 1 else cyan if i & 8 else [255, 128, 128]) for i in range(16))
    matrix = struct.pack(">9i", *(65536 * (index % 4 == 0) for index in range(9)))
    return profile(b"CMYK", {b"A2B0": b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + grid + ramp * 3})


# Linear light of sRGB, by IEC 61966-2-1; and primaries as XYZ under D50, rounded as the profiles of Adobe and Apple have them.
SRGB_TONE = curve(*(v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in np.linspace(0, 1, 1024)))
SRGB = rgb_profile([(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)], SRGB_TONE)
P3 = rgb_profile([(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)], SRGB_TONE)
ADOBE = rgb_profile([(0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)], curve(563 / 256))
GREY = profile(b"GRAY", {b"kTRC": curve(1.0), b"wtpt": xyz(0.9642, 1, 0.8249)})  # linear
CMYK = cmyk_profile((138, 209, 198))  # the red of sRGB


@pytest.mark.parametrize(
    ("name", "mode", "stored", "icc", "expected"),
    [
        # What the primaries of sRGB are in the wider spaces: values of published converters.
        ("p3.png", "RGB", (234, 51, 35), P3, (255, 0, 0)),
        ("p3.jpg", "RGB", (234, 51, 35), P3, (255, 0, 0)),
        ("p3.webp", "RGB", (0, 0, 245), P3, (0, 0, 255)),
        ("clear.png", "RGBA", (234, 51, 35, 51), P3, (255, 204, 204)),
        ("adobe.png", "RGB", (219, 0, 0), ADOBE, (255, 0, 0)),
        ("adobe.jpg", "RGB", (144, 255, 60), ADOBE, (0, 255, 0)),
        ("palette.png", "P", (234, 51, 35), P3, (255, 0, 0)),
        ("grey.png", "L", 55, GREY, (128,) * 3),  # 0.2159 of the light
        ("grey.jpg", "L", 55, GREY, (128,) * 3),
        ("grey_alpha.png", "LA", (55, 51), GREY, (230,) * 3),  # 0.2 · 128 + 0.8 · 255
        ("sixteen.png", "I;16", 55 * 257, GREY, (128,) * 3),
        ("bit.png", "1", 1, GREY, (255,) * 3),
        ("grey_in_rgb.png", "L", 32, ADOBE, (26,) * 3),  # 32 ** 2.2 of the light
        ("cyan.jpg", "CMYK", (255, 0, 0, 0), CMYK, (255, 0, 0)),
        ("magenta.jpg", "CMYK", (0, 255, 0, 0), CMYK, (255, 255, 255)),
    ],
)
def test_colours_are_those_of_the_profile(tmp_path, name, mode, stored, icc, expected):
    image = Image.new(mode, (8, 8), stored if mode != "P" else 0)
    if mode == "P":
        image.putpalette(stored)
    options = {".jpg": {"quality": 100}, ".webp": {"lossless": True}}.get((tmp_path / name).suffix, {})
    image.save(tmp_path / name, icc_profile=icc, **options)
    assert np.abs(pixels(tmp_path / name).astype(int) - expected).max() <= 3
    assert image_notes(tmp_path / name) == ()
    # The official command line knows of no profile.
    plain = Image.open(tmp_path / name).convert("RGB")
    np.testing.assert_array_equal(pixels(tmp_path / name, strict_parity=True), plain)
    # An image that was opened elsewhere is read alike, and so is a reference of a training clip.
    stored_reference = view_image(View(read_reference(tmp_path / name, (8, 8)), "in_pair"))
    for image in (Image.open(tmp_path / name), stored_reference):
        np.testing.assert_array_equal(to_rgb(image), pixels(tmp_path / name))


@pytest.mark.parametrize(
    ("icc", "is_srgb"),
    [
        (SRGB, True),
        (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), True),
        (b"no profile", False),
        (P3[:300], False),
        (CMYK, False),
        (GREY, False),
    ],
    ids=["ours", "LittleCMS", "damaged", "cut", "of another mode", "of grey"],
)
@pytest.mark.parametrize("channels", [3, 4])
def test_srgb_and_what_is_no_profile_change_no_bit(tmp_path, icc, is_srgb, channels):
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, channels), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png", icc_profile=icc)
    found = np.asarray(read_image(tmp_path / "image.png", keep_alpha=True))
    np.testing.assert_array_equal(found, noise)
    notes = image_notes(tmp_path / "image.png")
    if is_srgb:
        assert notes == ()
    else:
        assert len(notes) == 1
        assert "image.png: the colour profile cannot be used, and the colours are taken for sRGB: " in notes[0]


@pytest.mark.parametrize(
    ("mode", "numbers", "expected"),
    [
        ("I;16", [0, 300, 30000, 65535], [0, 1, 117, 255]),
        ("I;16B", [0, 300, 30000, 65535], [0, 1, 117, 255]),
        ("I", [0, 300, 30000, 65535], [0, 1, 117, 255]),
        ("I", [0, 7, 128, 255], [0, 7, 128, 255]),
        ("I", [0, 0], [0, 0]),
        (
            "I",
            [0, 4095],
            "the image has pixels of 0 to 4095 (mode I), and which number is white cannot be told: scale them to 0..255 or 0..65535",
        ),
        ("I", [0, 65536], "of 0 to 65536 (mode I)"),
        ("I", [-1, 255], "of -1 to 255 (mode I)"),
        ("F", [0.0, 0.25, 0.5, 1.0], [0, 64, 128, 255]),
        ("F", [0.0, 7.4, 128.0, 255.0], [0, 7, 128, 255]),
        (
            "F",
            [0.0, 3.5],
            "of 0 to 3.5 (mode F), and which number is white cannot be told: scale them to 0..1 or 0..255",
        ),
        ("F", [0.0, 65535.0], "of 0 to 65535 (mode F)"),
        ("F", [-0.5, 1.0], "of -0.5 to 1 (mode F)"),
        ("F", [float("nan"), 1.0], "of nan to nan (mode F)"),
    ],
)
def test_numbers_are_scaled_by_their_range(mode, numbers, expected):
    kind = {"I": np.int32, "F": np.float32, "I;16": "<u2", "I;16B": ">u2"}[mode]
    image = Image.fromarray(np.array([numbers], kind))
    assert image.mode == mode
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            to_rgb(image)
        with pytest.raises(ValueError, match="reference_images\\[1\\] has pixels of"):
            compose_canvas([Image.new("RGB", (8, 8)), image], 32, 32)
    else:
        assert np.asarray(to_rgb(image))[0].tolist() == [[value] * 3 for value in expected]


def test_pictures_from_elsewhere_are_read_alike_and_not_changed():
    image = Image.new("RGBA", (2, 2), (*RED, 0))
    image.info["note"] = "kept"
    assert np.asarray(to_rgb(image)).min() == 255
    assert (image.mode, image.info) == ("RGBA", {"note": "kept"})
    rgb = Image.new("RGB", (2, 2), RED)
    rgb.info["note"] = "kept"
    assert to_rgb(rgb).info == {}
    assert rgb.info == {"note": "kept"}


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("strict_parity", [False, True])
def test_an_image_without_pixels_is_refused_by_name(size, strict_parity):
    images = [Image.new("RGB", (8, 8)), Image.new("RGB", size)]
    with pytest.raises(ValueError, match=rf"reference_images\[1\] has no pixels: it is {size[0]}x{size[1]}\."):
        compose_canvas(images, 32, 32, strict_parity=strict_parity)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (20000, 20000, "more than 179 million pixels; at most 64 million are read"),  # PIL refuses
        (12000, 12000, "has 12000x12000 pixels; at most 64 million"),  # PIL would warn
        (8001, 8000, "has 8001x8000 pixels; at most 64 million"),  # PIL would read
    ],
)
def test_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch, width, height, message):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(width, height))
    assert path.stat().st_size < 300_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was unpacked"))
    for strict_parity in (False, True):
        with pytest.raises(ValueError, match=f"bomb.png.* {message}"):
            read_image(path, strict_parity=strict_parity)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="bomb.png has .* pixels; at most 64 million are read"):
            read_image(path)


def test_the_largest_image_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 12)
    (tmp_path / "small.png").write_bytes(png_of(4, 3))
    assert check_image(tmp_path / "small.png") == (4, 3)
    (tmp_path / "large.png").write_bytes(png_of(13, 1))
    with pytest.raises(ValueError, match="13x1"):
        check_image(tmp_path / "large.png")


def test_what_is_no_image_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.effect_noise((50, 50), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-700])
    (tmp_path / "link.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "huge.png").open("wb") as file:  # 51 MB that take no room
        file.truncate(51 * 2**20)
    for name, message in (
        ("missing.png", "there is no image file missing.png."),
        ("link.png", "there is no image file link.png: it is a link to nowhere.png, which is not there."),
        ("folder", "folder is a folder, no image file"),
        ("pipe.png", "pipe.png is a pipe or a device, no image file"),
        ("/dev/zero", "/dev/zero is a pipe or a device"),
        ("huge.png", "huge.png has 51.0 MB; at most 50 are read"),
        ("text.png", "text.png is no image: by its content it is none of JPEG, PNG, WEBP, BMP, GIF"),
        ("empty.png", "empty.png is empty, no image file"),
        ("cut.png", "cut.png is a damaged image: "),
        ("x" * 5000, f"there is no image file {'x' * 100}...{'x' * 90}: File name too long"),
        ("a\0b\033[2J.png", r"there is no image file 'a\x00b\x1b[2J.png': embedded null byte"),
    ):
        for read in (read_image, check_image, image_notes):
            with pytest.raises(ValueError, match=re.escape(message)):
                read(name)


TIFF = io.BytesIO()
Image.new("F", (8, 8)).save(TIFF, "TIFF")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            "a HEIC picture, which is not read: pip install pillow-heif, or save it",
        ),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", "a HEIC picture, which"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "an AVIF picture, which is not read: update Pillow, or save it"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "an AVIF picture, which"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "a video, which is not read: save one of its frames as PNG"),
        (TIFF.getvalue(), "a TIFF picture, or a camera's raw one, which is not read: save it as JPEG or PNG"),
        (b"\xff\x0a\xfa\x1f", "a JPEG XL picture, which"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 picture, which"),
        (b"8BPS\0\1", "a Photoshop document, which"),
        (b"%PDF-1.7", "a PostScript or PDF document, which"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "a pointer to a file in Git LFS, which is not read: run git lfs pull",
        ),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing, which"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page, which is not read: download the picture itself"),
    ],
)
def test_pictures_of_other_formats_are_named_with_what_to_do(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(images, "_formats", lambda: ("JPEG", "PNG"))  # as without pillow-heif and Pillow's AVIF
    (tmp_path / "picture.png").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"picture.png is {message}")):
        read_image(tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (struct.error("unpack requires 4 bytes"), "image.png is a damaged image: unpack requires 4 bytes."),
        (IndexError(), "image.png is a damaged image: IndexError."),
        (MemoryError(), "image.png is a damaged image: MemoryError."),
        (PermissionError(13, "Permission denied", "image.png"), "image.png cannot be read: Permission denied."),
    ],
)
def test_whatever_a_decoder_raises_the_file_is_named(tmp_path, monkeypatch, error, message):
    def load(self):
        raise error

    (tmp_path / "image.png").write_bytes(png_of(4, 3))
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_image(tmp_path / "image.png")


def test_a_checked_file_is_read_again_only_when_it_changed(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    path.write_bytes(png_of(4, 3))
    reads = []
    read = images._read
    monkeypatch.setattr(images, "_read", lambda *args: reads.append(args) or read(*args))
    monkeypatch.chdir(tmp_path)
    assert check_image(path) == check_image("image.png") == check_image(str(path)) == (4, 3)
    assert len(reads) == 1
    path.write_bytes(png_of(5, 3))
    os.utime(path, ns=(1, 1))
    assert check_image(path) == (5, 3)
    assert image_notes(path) == ()
    assert len(reads) == 2
    path.unlink()
    with pytest.raises(ValueError, match="there is no image file"):
        check_image(path)


def sources():
    """A small file of every kind, by format."""
    noise = np.random.default_rng(1).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for image, name, options in (
        (rgb, "JPEG", {"exif": exif}),
        (rgb, "JPEG", {"progressive": True}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgba, "PNG", {"exif": exif}),
        (rgb.quantize(16), "PNG", {"transparency": 3}),
        (grey.convert("I;16"), "PNG", {}),
        (rgba.convert("LA"), "PNG", {}),
        (rgba, "WEBP", {"lossless": True}),
        (rgb, "WEBP", {"save_all": True, "append_images": [grey.convert("RGB")]}),
        (rgb, "BMP", {}),
        (rgb, "GIF", {"save_all": True, "append_images": [grey.convert("RGB")]}),
        (rgb, "PNG", {"icc_profile": P3}),
        (grey.convert("1"), "BMP", {}),
    ):
        file = io.BytesIO()
        image.save(file, name, **options)
        yield file.getvalue()


def damaged(content, rng):
    """The content of a file after something happened to it."""
    content = bytearray(content)
    match rng.randrange(5):
        case 0:
            del content[rng.randrange(len(content)) :]
        case 1:
            for _ in range(rng.randint(1, 8)):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case 2:
            content += rng.randbytes(rng.randint(1, 2000))
        case 3:  # what sizes and kinds stand in
            for _ in range(rng.randint(1, 4)):
                content[rng.randrange(min(64, len(content)))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        case _:
            start = rng.randrange(len(content))
            content[start : start + rng.randint(1, 40)] = rng.randbytes(rng.randint(0, 60))
    return bytes(content)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_as_pictures_or_refused_by_name(tmp_path):
    rng = random.Random(0)
    contents = list(sources())
    path = tmp_path / "damaged.png"
    outcomes = []
    for index in range(300):
        path.write_bytes(damaged(contents[index % len(contents)], rng))
        try:
            image = read_image(path)
        except ValueError as error:
            outcomes.append(str(error))
        else:
            assert np.asarray(image).shape == (image.height, image.width, 3)
            assert (image.mode, image.width * image.height > 0) == ("RGB", True)
            outcomes.append("read")
    assert all(outcome == "read" or "damaged.png" in outcome for outcome in outcomes)
    assert 60 < outcomes.count("read") < 240  # the damage is neither none nor total
