"""What people write to ask for videos: references on a command line and prompt files, read and checked.

A prompt file has one video per line, key@@prompt@@image@@image..., as in the official repository. After an image and a
colon there may be the words of the prompt that name it. Empty lines and lines that begin with # are skipped.
"""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, ParamSpec, TypeVar

from PIL import Image

from magref_jax.conditioning.canvas import to_rgb

MAX_KEY = 120  # bytes of a file name, which may have 255

P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Line:
    """A video as it was asked for."""

    where: str  # for messages: a flag, or a file and the number of a line
    key: str
    prompt: str
    references: tuple[str, ...]  # FILE[:WORDS]
    folder: pathlib.Path  # where files are looked for before the working directory


class Checks:
    """Collects what is wrong, so that one hears of all of it at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def attempt(self, where: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The function's result; if it refuses its arguments, None and one more problem."""
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError) as error:
            self.problems.append(f"{where}: {error}")
            return None

    def stop(self) -> NoReturn:
        print("sample.py: nothing was written, because of", *self.problems, sep="\n  ", file=sys.stderr)
        sys.exit(2)


def safe_key(text: str) -> str:
    """A file name without folders, made of the letters, digits, '_', '-' and '.' of the text; it may be empty."""
    key = re.sub(r"[^\w.-]+", "_", text).strip("._")
    return key.encode()[:MAX_KEY].decode(errors="ignore").rstrip("._")


def read_prompt_file(path: pathlib.Path, checks: Checks) -> list[Line]:
    """The lines of a prompt file that can be read; problems with the others go to `checks`."""
    text = checks.attempt(str(path), path.read_text, encoding="utf-8-sig")
    lines, written = [], []
    for number, content in enumerate((text or "").split("\n"), start=1):
        if not content.strip() or content.lstrip().startswith("#"):
            continue
        where = f"{path} line {number}"
        written.append(where)
        key, *fields = (field.strip() for field in content.split("@@"))
        if not fields or not fields[0]:
            checks.problems.append(f"{where}: must be key@@prompt@@image@@image..., it is {content.strip()!r}.")
        elif not safe_key(key):
            checks.problems.append(f"{where}: the key {key!r} has no letter or digit to name a file by.")
        else:
            lines.append(Line(where, safe_key(key), fields[0], tuple(filter(None, fields[1:])), path.parent))
    if text is not None and not written:
        checks.problems.append(f"{path}: there is no line in it.")
    return lines


def check_keys(lines: Sequence[Line], checks: Checks) -> None:
    """Two videos cannot have one key."""
    seen: dict[str, str] = {}
    for line in lines:
        # Upper and lower case are one, because they are to the file systems of Windows and macOS.
        other = seen.setdefault(line.key.casefold(), line.where)
        if other != line.where:
            checks.problems.append(f"{line.where}: the key {line.key!r} is taken by {other}; both would be one file.")


def split_reference(text: str, folder: pathlib.Path) -> tuple[pathlib.Path, str | None]:
    """The file and the words of FILE[:WORDS]; the file may have colons of its own, and the longest name that exists wins.

    Raises:
        ValueError: there is no such file, or nothing after the colon.
    """
    colons = [index for index in range(len(text)) if text[index] == ":"]
    for cut in [len(text), *reversed(colons)]:
        for path in (folder / text[:cut], pathlib.Path(text[:cut])):
            if path.is_file():
                words = text[cut + 1 :].strip()
                if cut < len(text) and not words:
                    raise ValueError(f"{text!r} has no words after its last colon.")
                return path, words or None
    raise ValueError(f"there is no image file {text!r}.")


def read_image(path: pathlib.Path) -> Image.Image:
    """An image, upright and on white.

    Raises:
        ValueError: the file is no image, or a damaged one.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    except Exception as error:  # whatever the decoder of a damaged file may raise
        raise ValueError(f"{path} is no image that can be read: {error}") from None


def read_references(line: Line, checks: Checks) -> tuple[list[Image.Image], list[str | None]] | None:
    """Images and words of a line's references; None if one of them is wrong."""
    images, all_words = [], []
    for text in line.references:
        found = checks.attempt(line.where, split_reference, text, line.folder)
        image = None if found is None else checks.attempt(line.where, read_image, found[0])
        if found is not None and image is not None:
            images.append(image)
            all_words.append(found[1])
    return (images, all_words) if len(images) == len(line.references) else None
