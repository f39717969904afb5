"""Reference images: what is read from a file, and what is refused before it is decoded.

A file from elsewhere may be damaged, huge once unpacked, or no file at all. Whatever is wrong with it is a ValueError
that names it.
"""

import functools
import io
import os
import re
import stat
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, features

# 192 MB as RGB, and more than the photographs that people would have scaled down to a canvas. PIL itself refuses only
# twice its limit of 89 million, and warns below that.
MAX_PIXELS = 64_000_000
# More than cameras and editors write for such a picture; it bounds what a damaged or hostile file makes us read.
MAX_BYTES = 50 * 2**20
# Names of PIL's decoders. Others run programs (EPS), hold anything (TIFF) or were not made for strangers' files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", *(("AVIF",) if features.check("avif") else ()))

WHITE = 255
_ROUNDING = 2  # of 255: by how much the sRGB profiles of different makers differ

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


# What a file that is none of these says it is in its first bytes, and what to do about it. The first that matches counts.
_SAVE = "save it as JPEG or PNG"
_OTHERS = [
    (re.compile(pattern, re.DOTALL), what, advice)
    for pattern, what, advice in (
        (rb"....ftyp(?:avif|avis|mif1.{4}.{0,40}avif)", "an AVIF picture", f"update Pillow, or {_SAVE}"),
        (rb"....ftyp(?:hei|hev|mif1|msf1)", "a HEIC picture", f"pip install pillow-heif, or {_SAVE}"),
        (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "a video", "save one of its frames as PNG"),
        (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "a TIFF picture, or a camera's raw one", _SAVE),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture", _SAVE),
        (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture", _SAVE),
        (rb"v/1\x01", "an OpenEXR picture", _SAVE),
        (rb"8BPS", "a Photoshop document", _SAVE),
        (rb"\0\0\x01\0", "an icon", _SAVE),
        (rb"%!PS|%PDF", "a PostScript or PDF document", _SAVE),
        (rb"version https://git-lfs", "a pointer to a file in Git LFS", "run git lfs pull"),
        (rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml.*?)?<svg", "an SVG drawing", _SAVE),
        (rb"(?i)(?:\xef\xbb\xbf)?\s*<(?:!doctype )?html", "a web page", "download the picture itself"),
    )
]


def to_rgb(image: Image.Image, *, name: str = "the image", strict_parity: bool = False) -> Image.Image:
    """An upright sRGB image, transparency composited on white. It carries no metadata: a second call changes nothing.

    The colours are those that the image's colour profile says; a profile that cannot be used is passed over.

    With `strict_parity`, what the official command line reads: alpha is discarded, which shows the colours hidden under
    transparent pixels, and the orientation tag and the colour profile of photographs are ignored.

    Raises:
        ValueError: there are no pixels, or they are numbers of which white cannot be told. It calls the image `name`.
    """
    try:
        return _to_rgb(image, [], strict_parity)
    except _UnusableError as error:
        raise ValueError(f"{name} {error}") from None


def _to_rgb(image: Image.Image, notes: list[str], strict_parity: bool) -> Image.Image:
    if 0 in image.size:
        raise _UnusableError(f"has no pixels: it is {image.width}x{image.height}.")
    if strict_parity:
        if (
            image.mode == "P" and image.has_transparency_data
        ):  # as PIL asks for in a warning; alpha goes in the next line
            image = image.convert("RGBA")
        rgb = image.convert("RGB")
        rgb.info.clear()  # among it the orientation and the profile, which were to be ignored
        return rgb
    picture = _upright(image, notes)
    if picture.mode == "RGB":
        return picture
    white = Image.new("RGB", picture.size, (WHITE,) * 3)
    white.paste(picture, mask=picture.getchannel("A"))
    return white


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    """An upright picture in sRGB without metadata: RGB, or RGBA where something may be transparent."""
    turn = _UPRIGHT.get(_orientation(image))
    colours, alpha = _colours_and_alpha(image if turn is None else image.transpose(turn))
    if profile := image.info.get("icc_profile"):
        try:
            colours = _in_srgb(colours, profile)
        except Exception as error:  # whatever is said of a damaged profile, or a PIL without LittleCMS
            reason = str(error).strip().rstrip(".") or type(error).__name__
            notes.append(f"the colour profile cannot be used, and the colours are taken for sRGB: {reason}")
    picture = colours.convert("RGB")
    if alpha is not None:
        picture.putalpha(alpha)
    picture.info.clear()  # among it the orientation and the profile, which were applied
    return picture


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF, which may raise anything, does not damage the picture
        return 1


def _colours_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours (L, RGB or CMYK, what a colour profile speaks of) and where they are opaque; None: everywhere."""
    mode = image.mode
    if mode == "F" or mode.startswith("I"):  # convert() would clip to white instead of scaling
        numbers = np.asarray(image)
        clear = image.info.get("transparency") if mode.startswith("I;16") else None
        alpha = None if clear is None else Image.fromarray(np.where(numbers == clear, 0, 255).astype(np.uint8))
        return Image.fromarray(_to_bytes(numbers, mode)), alpha
    if mode == "La":
        image = image.convert("LA")
    is_grey = mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("LA" if is_grey else "RGBA")
        return image.convert("L" if is_grey else "RGB"), image.getchannel("A")
    if mode == "CMYK":
        return image, None
    return image.convert("L" if is_grey else "RGB"), None


class _UnusableError(ValueError):
    """Says of an image, but for its name, what is wrong with its pixels."""


def _to_bytes(numbers: np.ndarray, mode: str) -> UInt8[np.ndarray, "H W"]:
    """Grey of 8 bits. White is 65535 of 16 bits; of 32 bits and of floats it is told from the brightest pixel.

    Raises:
        _UnusableError: no usual white explains the brightest pixel, or there is one that is no brightness.
    """
    if mode.startswith("I;16"):
        return (numbers >> 8).astype(np.uint8)
    darkest, brightest = (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 0.0)
    whites = (255, 65535) if mode == "I" else (1, 255)
    # Nobody takes a picture of which no pixel has a sixteenth of white; 10 and 12 bits, or light of a scene, are more likely.
    found = [white for white in whites if (white == whites[0] or brightest >= white / 16) and brightest <= white]
    if darkest < 0 or not found:  # a NaN is neither
        raise _UnusableError(
            f"has pixels of {darkest:g} to {brightest:g} (mode {mode}), and which number is white cannot be told: "
            f"scale them to 0..{whites[0]} or 0..{whites[1]}."
        )
    if found[0] == 65535:
        return (numbers >> 8).astype(np.uint8)
    return np.floor(numbers * (255 / found[0]) + 0.5).astype(np.uint8)


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    space = _profile_space(profile)
    image = image.convert("RGB") if (image.mode, space) == ("L", "RGB") else image
    transform = _transform(profile, image.mode)
    return image if transform is None else transform.apply(image)


@functools.lru_cache(maxsize=16)
def _profile_space(profile: bytes) -> str:
    return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None if the profile is sRGB but for its rounding, so that such pictures stay as they are.

    Raises:
        OSError, ImageCms.PyCMSError: the profile is damaged, or is not of this mode.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    # Threads share it, which LittleCMS allows without its cache of one pixel.
    transform = ImageCms.buildTransform(
        source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=ImageCms.Flags.NOCACHE
    )
    if mode == "CMYK":
        return transform
    levels = np.arange(256, dtype=np.uint8)
    greys = np.repeat(levels, 3).reshape(1, -1, 3)
    if mode == "L":
        changed = np.asarray(transform.apply(Image.fromarray(levels[None])))
        return None if np.abs(changed.astype(int) - greys).max() <= _ROUNDING else transform
    cube = np.stack(np.meshgrid(levels[::15], levels[::15], levels[::15]), axis=-1).reshape(1, -1, 3)
    colours = np.concatenate([greys, cube], axis=1)
    changed = np.asarray(transform.apply(Image.fromarray(colours)))
    return None if np.abs(changed.astype(int) - colours).max() <= _ROUNDING else transform


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
        if not reason and os.path.islink(path):
            reason = f": it is a link to {shown(os.readlink(path))}, which is not there"
        raise ValueError(f"there is no {kind} {shown(path)}{reason}.") from None
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise ValueError(f"{shown(path)} is {what}, no {kind}.")
    if not status.st_size:
        raise ValueError(f"{shown(path)} is empty, no {kind}.")
    if status.st_size > max_bytes:
        raise ValueError(f"{shown(path)} has {status.st_size / 2**20:.1f} MB; at most {max_bytes // 2**20} are read.")
    return status


def shown(path: str | os.PathLike[str]) -> str:
    """A path for a message: one that is as long as a letter, or not text, would hide what is said about it."""
    text = os.fspath(path)
    text = text if len(text) <= 200 else f"{text[:100]}...{text[-90:]}"
    return text if text.isprintable() else ascii(text)


def read_image(path: str | os.PathLike[str], *, strict_parity: bool = False, keep_alpha: bool = False) -> Image.Image:
    """The first picture of a file, as `to_rgb` makes it; with `keep_alpha` RGBA where something may be transparent.

    Raises:
        ValueError: no file of `FORMATS`, a damaged one, or one with more bytes or pixels than the limits.
    """
    return _read(path, strict_parity, keep_alpha)[0]


def _read(path: str | os.PathLike[str], strict_parity: bool, keep_alpha: bool) -> tuple[Image.Image, tuple[str, ...]]:
    """A picture, and what one may want to know of how it was read."""
    regular_file(path, MAX_BYTES, "image file")
    notes: list[str] = []
    try:
        with Image.open(path, formats=_formats()) as image:
            # PIL has read no more than the header by now.
            if image.width * image.height <= MAX_PIXELS:
                keep_alpha = keep_alpha and not strict_parity
                picture = _upright(image, notes) if keep_alpha else _to_rgb(image, notes, strict_parity)
                if (count := _pictures_in(image)) > 1:
                    notes.append(f"it is animated: the first of its {count} pictures is used")
                return picture, tuple(f"{shown(path)}: {note}." for note in notes)
            size = f"{image.width}x{image.height} pixels"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # a warning where they are errors
        limit = (2 if isinstance(error, Image.DecompressionBombError) else 1) * (Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
        size = f"more than {limit / 1e6:.0f} million pixels"
    except Image.UnidentifiedImageError:
        raise ValueError(f"{shown(path)} {_what_else(path)}.") from None
    except _UnusableError as error:
        raise ValueError(f"{shown(path)} {error}") from None
    except Exception as error:  # whatever the decoder of a damaged file may raise
        if isinstance(error, OSError) and error.strerror:
            raise ValueError(f"{shown(path)} cannot be read: {error.strerror}.") from None
        raise ValueError(
            f"{shown(path)} is a damaged image: {str(error).rstrip('.') or type(error).__name__}."
        ) from None
    raise ValueError(f"{shown(path)} has {size}; at most {MAX_PIXELS / 1e6:.0f} million are read.")


@functools.cache
def _formats() -> tuple[str, ...]:
    """The decoders that there are: of `FORMATS`, and of HEIC where pillow-heif is installed."""
    try:
        import pillow_heif  # pyrefly: ignore[missing-import]
    except ImportError:
        return FORMATS
    pillow_heif.register_heif_opener()
    return (*FORMATS, "HEIF")


def _pictures_in(image: Image.Image) -> int:
    """How many pictures an animation has; of what is none, 1."""
    try:
        # The further ones of a JPEG are the same picture for other screens, or its depth.
        return 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
    except Exception:  # a later picture is damaged, which the first one is not
        return 1


def _what_else(path: str | os.PathLike[str]) -> str:
    """What a file is that no decoder knows, and what to do about it."""
    with open(path, "rb") as file:
        head = file.read(1024)
    for pattern, what, advice in _OTHERS:
        if pattern.match(head):
            return f"is {what}, which is not read: {advice}"
    return f"is no image: by its content it is none of {', '.join(_formats())}"


class _Known(NamedTuple):
    size: tuple[int, int]
    notes: tuple[str, ...]


def check_image(path: str | os.PathLike[str], *, strict_parity: bool = False) -> tuple[int, int]:
    """Width and height of what `read_image` returns. A file that did not change since is not read again.

    Raises:
        ValueError: as `read_image`.
    """
    return _look_at(path, strict_parity).size


def image_notes(path: str | os.PathLike[str], *, strict_parity: bool = False) -> tuple[str, ...]:
    """Sentences on what was passed over in a picture: a damaged colour profile, all pictures of an animation but one.

    Raises:
        ValueError: as `read_image`.
    """
    return _look_at(path, strict_parity).notes


def _look_at(path: str | os.PathLike[str], strict_parity: bool) -> _Known:
    status = regular_file(path, MAX_BYTES, "image file")
    key = (os.path.realpath(path), status.st_mtime_ns, status.st_size, strict_parity)
    if key not in _KNOWN:
        picture, notes = _read(path, strict_parity, False)
        _KNOWN[key] = _Known(picture.size, notes)
    return _KNOWN[key]


_KNOWN: dict[tuple[str, int, int, bool], _Known] = {}
