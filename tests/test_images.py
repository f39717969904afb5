"""Reference images: the pixels a file must become, and that whatever is no image is refused by name."""

import io
import os
import random
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from magref_jax import images
from magref_jax.images import check_image, read_image, to_rgb

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
    ],
)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_every_kind_of_file_has_the_pixels_it_must_have(tmp_path, name, image, options, expected, strict):
    image.save(tmp_path / name, **options)
    assert pixels(tmp_path / name).reshape(-1, 3).tolist() == [list(colour) for colour in expected]
    assert pixels(tmp_path / name, strict_parity=True).reshape(-1, 3).tolist() == [list(colour) for colour in strict]


def test_sixteen_bit_grey_may_be_transparent(tmp_path):
    file = io.BytesIO()
    SIXTEEN.save(file, "PNG")
    content = file.getvalue()
    # The colour key of grey images is a chunk of its own, before the pixels; PIL does not write it for 16 bits.
    cut = content.index(b"IDAT") - 4
    (tmp_path / "keyed.png").write_bytes(content[:cut] + chunk(b"tRNS", struct.pack(">H", 300)) + content[cut:])
    assert pixels(tmp_path / "keyed.png")[0, :, 0].tolist() == [0, 255, 117, 255]


@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("webp", {"lossless": True})])
def test_the_first_picture_of_an_animation(tmp_path, suffix, options):
    path = tmp_path / f"moving.{suffix}"
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), GREEN)
    first.save(path, save_all=True, append_images=[second], duration=100, **options)
    assert Image.open(path).n_frames == 2
    assert set(map(tuple, pixels(path).reshape(-1, 3).tolist())) == {RED}


def test_pictures_from_elsewhere_are_read_alike_and_not_changed():
    image = Image.new("RGBA", (2, 2), (*RED, 0))
    image.info["note"] = "kept"
    assert np.asarray(to_rgb(image)).min() == 255
    assert (image.mode, image.info) == ("RGBA", {"note": "kept"})
    rgb = Image.new("RGB", (2, 2), RED)
    rgb.info["note"] = "kept"
    assert to_rgb(rgb).info == {}
    assert rgb.info == {"note": "kept"}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height):
    """A black PNG of one bit per pixel: a bomb, if it is large."""
    rows = zlib.compress(bytes((1 + -(-width // 8)) * height), 1)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


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
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.tiff")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.gif")
    Image.effect_noise((50, 50), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-700])
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "huge.png").open("wb") as file:  # 51 MB that take no room
        file.truncate(51 * 2**20)
    for name, message in (
        ("missing.png", "there is no image file missing.png."),
        ("folder", "folder is a folder, no image file"),
        ("pipe.png", "pipe.png is a pipe or a device, no image file"),
        ("/dev/zero", "/dev/zero is a pipe or a device"),
        ("huge.png", "huge.png has 51.0 MB; at most 50 are read"),
        ("text.png", "text.png is no image: by its content it is none of JPEG, PNG, WEBP, BMP"),
        ("empty.png", "empty.png is no image"),
        ("picture.tiff", "picture.tiff is no image"),
        ("picture.gif", "picture.gif is no image"),
        ("cut.png", "cut.png is a damaged image: "),
        ("x" * 5000, f"there is no image file {'x' * 100}...{'x' * 90}: File name too long"),
        ("a\0b\033[2J.png", r"there is no image file 'a\x00b\x1b[2J.png': embedded null byte"),
    ):
        for read in (read_image, check_image):
            with pytest.raises(ValueError, match=re.escape(message)):
                read(name)


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
    monkeypatch.setattr(images, "read_image", lambda *args, **kwargs: reads.append(args) or read_image(*args, **kwargs))
    monkeypatch.chdir(tmp_path)
    assert check_image(path) == check_image("image.png") == check_image(str(path)) == (4, 3)
    assert len(reads) == 1
    path.write_bytes(png_of(5, 3))
    os.utime(path, ns=(1, 1))
    assert check_image(path) == (5, 3)
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
