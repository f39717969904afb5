"""Reference images: what is read from a file, and what is refused before it is decoded.

A file from elsewhere may be damaged, huge once unpacked, or no file at all. Whatever is wrong with it is a ValueError
that names it.
"""

import os
import stat

import numpy as np
from PIL import Image

# 192 MB as RGB, and more than the photographs that people would have scaled down to a canvas. PIL itself refuses only
# twice its limit of 89 million, and warns below that.
MAX_PIXELS = 64_000_000
# More than cameras and editors write for such a picture; it bounds what a damaged or hostile file makes us read.
MAX_BYTES = 50 * 2**20
# Names of PIL's decoders. Others run programs (EPS), hold many pictures (TIFF, GIF) or were not made for strangers' files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

WHITE = 255

_ORIENTATION = 0x0112  # the EXIF tag
# Orientation -> what turns the stored pixels upright; 1 is upright already.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image, *, strict_parity: bool = False) -> Image.Image:
    """An upright RGB image, transparency composited on white. It carries no metadata: a second call changes nothing.

    With `strict_parity`, what the official command line reads: alpha is discarded, which shows the colours hidden under
    transparent pixels, and the orientation tag of photographs is ignored.
    """
    rgb = image.convert("RGB") if strict_parity else _on_white(_upright(image))
    rgb.info.clear()  # among it the orientation, which was applied, or was to be ignored
    return rgb


def _upright(image: Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip 16-bit grey to white instead of scaling it
        grey = np.asarray(image)
        clear = grey == image.info["transparency"] if "transparency" in image.info else False
        return Image.fromarray(np.where(clear, WHITE, grey >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, (WHITE,) * 3)
    white.paste(image, mask=image.getchannel("A"))
    return white


def regular_file(path: str | os.PathLike[str], max_bytes: int, kind: str) -> os.stat_result:
    """What the system knows of a file that can be read to its end: no folder, pipe or device, and not too large.

    `kind` is what was hoped for, such as "image file".

    Raises:
        ValueError: names the path, and what it is instead.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = "" if isinstance(error, FileNotFoundError) else f": {getattr(error, 'strerror', None) or error}"
        raise ValueError(f"there is no {kind} {shown(path)}{reason}.") from None
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise ValueError(f"{shown(path)} is {what}, no {kind}.")
    if status.st_size > max_bytes:
        raise ValueError(f"{shown(path)} has {status.st_size / 2**20:.1f} MB; at most {max_bytes // 2**20} are read.")
    return status


def shown(path: str | os.PathLike[str]) -> str:
    """A path for a message: one that is as long as a letter, or not text, would hide what is said about it."""
    text = os.fspath(path)
    text = text if len(text) <= 200 else f"{text[:100]}...{text[-90:]}"
    return text if text.isprintable() else ascii(text)


def read_image(path: str | os.PathLike[str], *, strict_parity: bool = False) -> Image.Image:
    """The first picture of a file, as `to_rgb` makes it.

    Raises:
        ValueError: no JPEG, PNG, WEBP or BMP file, a damaged one, or one with more bytes or pixels than the limits.
    """
    regular_file(path, MAX_BYTES, "image file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            # PIL has read no more than the header by now.
            if image.width * image.height <= MAX_PIXELS:
                return to_rgb(image, strict_parity=strict_parity)
            size = f"{image.width}x{image.height} pixels"
    except Image.DecompressionBombError:
        size = f"more than {2 * (Image.MAX_IMAGE_PIXELS or MAX_PIXELS) / 1e6:.0f} million pixels"
    except Image.UnidentifiedImageError:
        raise ValueError(f"{shown(path)} is no image: by its content it is none of {', '.join(FORMATS)}.") from None
    except Exception as error:  # whatever the decoder of a damaged file may raise
        if isinstance(error, OSError) and error.strerror:
            raise ValueError(f"{shown(path)} cannot be read: {error.strerror}.") from None
        raise ValueError(
            f"{shown(path)} is a damaged image: {str(error).rstrip('.') or type(error).__name__}."
        ) from None
    raise ValueError(f"{shown(path)} has {size}; at most {MAX_PIXELS / 1e6:.0f} million are read.")


def check_image(path: str | os.PathLike[str], *, strict_parity: bool = False) -> tuple[int, int]:
    """Width and height of what `read_image` returns. A file that did not change since is not read again.

    Raises:
        ValueError: as `read_image`.
    """
    status = regular_file(path, MAX_BYTES, "image file")
    key = (os.path.realpath(path), status.st_mtime_ns, status.st_size, strict_parity)
    if key not in _SIZES:
        _SIZES[key] = read_image(path, strict_parity=strict_parity).size
    return _SIZES[key]


_SIZES: dict[tuple[str, int, int, bool], tuple[int, int]] = {}
