"""What callers of the Python door hand over: checked by type, and brought into the one form that the rest takes.

Every error names the argument, what was given and what is allowed.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from magref_jax import images
from magref_jax.command import check_local
from magref_jax.config import conform
from magref_jax.descriptions import describe

MAX_SEED = 2**63 - 1


def seed_of(value: Any, name: str = "seed") -> int:
    """The seed, which is a whole number: 3.0 would be another one than 3, and a generator that of its memory address.

    Raises:
        ValueError: anything else, or a number that is negative or too large.
    """
    try:
        seed = conform(int, value, name)
    except ValueError:
        seed = -1
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"{name}={describe(value)} must be a whole number from 0 to {MAX_SEED}.")
    return seed


def count_of(value: Any, name: str) -> int | None:
    """A number of things, at least 1, or None.

    Raises:
        ValueError: anything else.
    """
    count = conform(int | None, value, name)
    if count is not None and count < 1:
        raise ValueError(f"{name}={count} must be at least 1.")
    return count


def list_of(value: Any, name: str, what: str) -> list[Any]:
    """The entries of a list or another sequence that is no text; `what` names them.

    Raises:
        ValueError: no sequence.
    """
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__") or not hasattr(value, "__iter__"):
        raise ValueError(f"{name}={describe(value)} must be a list of {what}.")
    return list(value)


def per_video(
    value: Any, name: str, count: int | None, what: str, is_entry: Callable[[Any], bool]
) -> list[list[Any] | None]:
    """A list of entries, or None, for each of `count` videos.

    A count of None says that there is one video, asked for without a list: its entries need no list of their own around them
    then, nor does a single entry. Of a list of one video the same holds, but not for an empty list, which leaves it out.

    Raises:
        ValueError: not a list for each video.
    """
    if is_entry(value) and count in (None, 1):
        return [[value]]
    outer = list_of(value, name, f"{what}, one list for each prompt")
    is_flat = all(map(is_entry, outer)) and (outer if count == 1 else count is None)
    if is_flat and outer != [None]:  # which says the same of a video as of its only entry
        return [outer]
    count = 1 if count is None else count
    if len(outer) != count:
        raise ValueError(f"{name} has {len(outer)} entries for {count} prompts; give one each.")
    inner = []
    for index, entries in enumerate(outer):
        if entries is not None and is_entry(entries):
            raise ValueError(f"{name}[{index}]={describe(entries)} must be a list of {what}; each prompt has its own.")
        inner.append(None if entries is None else list_of(entries, f"{name}[{index}]", what))
    return inner


def is_picture(value: Any) -> bool:
    """Whether it is of a type that `picture_of` takes."""
    return isinstance(value, str | os.PathLike | Image.Image) or hasattr(value, "__array__")


PICTURES = "PIL images, arrays, tensors or paths"


def picture_of(value: Any, name: str) -> Image.Image:
    """The picture that a PIL image, an array, a tensor or a path means.

    An array or tensor is [H W 3], [H W 4] with alpha, [3 H W] or [4 H W], or [H W] for grey; uint8, or floats from 0 to 1.

    Raises:
        ValueError: none of these, or a file that `images.read_image` refuses.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str | os.PathLike):
        check_local(name, value)
        try:
            return images.read_image(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if not is_picture(value):
        raise ValueError(f"{name}={describe(value)} must be a PIL image, an array, a tensor or a path.")
    array = array_of(value, name)
    if array.dtype != np.uint8:
        if not jax.dtypes.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{name} has dtype {array.dtype}; must be uint8, or floats from 0 to 1.")
        if not ((array >= 0) & (array <= 1)).all():  # NaN is not
            raise ValueError(
                f"{name} has floats from {array.min()} to {array.max()}; must be from 0 to 1, or uint8 from 0 to 255."
            )
        array = np.round(array.astype(np.float32) * 255).astype(np.uint8)
    shape = array.shape
    last, first = (len(shape) == 3 and shape[axis] in (3, 4) for axis in (2, 0))
    if 0 in shape or (last and first) or not (last or first or len(shape) == 2):
        both = ", which may be either of two" if last and first else ""
        raise ValueError(f"{name} has shape {shape}{both}; must be [H W 3], [H W 4], [3 H W], [4 H W] or [H W].")
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(array, 0, -1) if first else array))


def array_of(value: Any, name: str) -> np.ndarray:
    """An array or a tensor on whatever device, as NumPy has it.

    Raises:
        ValueError: NumPy cannot read it, such as a tensor of bfloat16.
    """
    try:
        for step in (
            "detach",
            "cpu",
        ):  # of torch, whose tensors give no array while they have a gradient or lie elsewhere
            value = getattr(value, step)() if hasattr(value, step) else value
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}={describe(value)} cannot be read as an array: {str(error).rstrip('.')}.") from None


def text_list(value: Any, name: str) -> list[str]:
    """The texts of a list, or the one text that was given without.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str):
        return [str(value)]
    return [conform(str, text, f"{name}[{i}]") for i, text in enumerate(list_of(value, name, "texts, or one text"))]


def path_of(value: Any, name: str) -> str:
    """A path of this machine.

    Raises:
        ValueError: no path, or one with a scheme, such as gs://.
    """
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name}={describe(value)} must be a path.")
    check_local(name, value)
    return os.fspath(value)


def one_of(value: Any, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
    """The value, if it is of this kind or None.

    Raises:
        ValueError: it is not; `expected` says what it must be.
    """
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name}={describe(value)} must be {expected}, or None.")
    return value


def order_of(value: Any, name: str) -> int | str | tuple[int | None, ...] | None:
    """The order of references on a canvas; see `canvas.assign`.

    Raises:
        ValueError: another type.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Sequence | np.ndarray):
        return tuple(conform(int | None, entry, f"{name}[{i}]") for i, entry in enumerate(value))
    try:
        return conform(int, value, name)
    except ValueError:
        raise ValueError(f"{name}={describe(value)} must be a seed, 'input', or a list of references.") from None
