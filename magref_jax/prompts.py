"""What people write to ask for videos: references on a command line and prompt files, read and checked.

A prompt file is UTF-8 of one of four formats, by its suffix:

    .txt     key@@prompt@@image@@image..., as in the official repository; lines that begin with # are skipped
    .json    {id: {"prompt": ..., "img_paths": [...], "class_label": [...]}} as in OpenS2V-Eval, or a list of objects
    .jsonl   an object per line
    .csv     a header, and a row per video; commas, semicolons or tabs between the cells (.tsv: the same)

Objects and rows have the fields of `FIELDS`. A reference is "FILE", "FILE:WORDS" with the words of the prompt that name
it, or {"image": ..., "words": ..., "role": ...}. Files are looked for beside the prompt file, then in the working
directory. A null or NaN is as good as no field or reference; in a table so are an empty cell, nan, None and the like.
"""

import csv
import dataclasses
import difflib
import functools
import io
import json
import math
import os
import pathlib
import re
import reprlib
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

from magref_jax import images
from magref_jax.arguments import MAX_SEED
from magref_jax.command import check_local, sentence
from magref_jax.conditioning.canvas import PLACEMENTS, Role, fitted_size, layout_cells
from magref_jax.conditioning.subjects import Subject, clean_prompt, find_words, occurrences
from magref_jax.config import Layout, SamplingConfig
from magref_jax.files import read_text

MAX_KEY = 120  # bytes of a file name, which may have 255
MAX_BYTES = 64 * 2**20  # of a prompt file; 10,000 long prompts are 20 MB
MAX_TEXT = 20_000  # characters of a field; the text encoder reads 512 tokens
SHOWN = 50  # problems; whoever has more will not read them
MAX_COUNT = 100_000  # frames or pixels along one side, before a model says what it takes

# What we call a field of a row or an option of a run, and what Wan, MAGREF, diffusers and the benchmarks call it.
ALIASES: dict[str, tuple[str, ...]] = {
    "key": ("id",),
    "prompt": (),
    "references": ("ref", "ref_image", "src_ref_images", "reference_images", "image", "images", "img_paths"),
    "subjects": (),
    "class_label": (),
    "roles": (),
    "seed": ("base_seed",),
    "size": (),
    "height": (),
    "width": (),
    "frames": ("num_frames", "frame_num"),
    "negative": ("negative_prompt", "n_prompt"),
    # From here on, of a run.
    "prompts": ("prompt_path",),
    "out": ("save_dir", "save_path", "output_path"),
    "steps": ("num_inference_steps", "sample_steps", "infer_steps"),
    "guidance": ("guidance_scale", "sample_guide_scale", "sample_guide_scale_text"),
    "reference_guidance": ("reference_guidance_scale", "sample_guide_scale_img"),
    "shift": ("flow_shift", "sample_shift"),
    "solver": ("sample_solver",),
    "fps": ("sample_fps",),
    "lora": ("lora_weight",),
    "compile_cache": ("jax_cache_dir",),
}
FIELDS = tuple(ALIASES)[: tuple(ALIASES).index("prompts")]
UNUSED = ("synthesis_flag",)  # written by OpenS2V-Eval, and of no consequence for a video
_SPELLED = {spelled: name for name in FIELDS for spelled in (name, *ALIASES[name])}

SIZES = {"480p": (832, 480), "480p-portrait": (480, 832), "720p": (1280, 720), "720p-portrait": (720, 1280)}

# Names that Windows keeps for devices, whatever follows the first dot; and `run`, because run.json is the whole run's.
_RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\.|$)|run$", re.IGNORECASE)

_NO_TEXT = re.compile("[\0\ud800-\udfff]")

# Letters and marks that nobody sees: fillers of syllables, and what chooses between shapes of the character before.
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]")

# What programs write into the cells of a table that have no value.
_NO_VALUE = frozenset(("nan", "none", "null", "<na>", "nat", "n/a", "#n/a"))

# "(cat:1.3)" and "<lora:name:0.8>", which other programs take for orders.
_WEIGHT = re.compile(r"\([^()]*[^\W\d_]\s*:\s*(?:[0-9]*\.[0-9]+|[0-9])\s*\)|<lora:[^<>]*>")

P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Reference:
    """An image, the words of the prompt that name it, and whether it is something in the video or what is around it."""

    path: pathlib.Path
    words: str | None = None
    role: Role = "subject"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A video as it was asked for."""

    where: str  # for messages: a flag, or a file and the number of a line
    key: str  # safe as a file name
    prompt: str
    references: tuple[Reference, ...] = ()
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # seed, or a field of SamplingConfig


@dataclasses.dataclass(frozen=True)
class Checked:
    """An entry that a model can take, and what was learnt on the way."""

    entry: Entry
    sampling: SamplingConfig  # with the entry's overrides
    subjects: tuple[Subject | None, ...]  # with their spans in the cleaned prompt
    sizes: tuple[tuple[int, int], ...]  # width and height of each reference


class Checks:
    """Collects what is wrong, so that one hears of all of it at once; `notes` are what one may want to know.

    `unfinished` are the entries with problems, of which the other fields are still checked.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.unfinished: list[Entry] = []

    def attempt(self, where: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The function's result; if it refuses its arguments, None and one more problem."""
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError) as error:
            self.problems.append(f"{where}: {sentence(error)}")
            return None

    def show_notes(self, limit: int = 10) -> None:
        if self.notes:
            print("sample.py: please note", *_listed(self.notes, limit), sep="\n  ", file=sys.stderr)

    def stop(self, limit: int = SHOWN) -> NoReturn:
        problems = _listed(self.problems, limit)
        print("sample.py: nothing was written, because of", *problems, sep="\n  ", file=sys.stderr)
        sys.exit(2)


def _listed(lines: Sequence[str], limit: int) -> list[str]:
    lines = list(dict.fromkeys(lines))
    shown = [line if len(line) <= 600 else f"{line[:600]}..." for line in lines[:limit]]
    return shown + ([f"... and {len(lines) - limit} more"] if len(lines) > limit else [])


# Long or nested values would hide what is said about them; repr also escapes what would upset a terminal.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlevel = 2


def _shown(value: Any) -> str:
    return _short.repr(value)


def safe_key(text: str) -> str:
    """A file name without folders, of the letters, marks, digits, '_', '-' and '.' of the text; it may be empty.

    It begins with a letter or digit, so that it is seen and is no option of a program; with '_' before a reserved name.
    """
    if not text.isascii():
        # Composed, as macOS would, where both spellings of é are one file; once more, as removals bring marks to letters.
        seen = "".join(_seen(_UNSEEN.sub("", unicodedata.normalize("NFC", text))))
        key = re.sub("\0+", "_", unicodedata.normalize("NFC", seen))
    else:
        key = re.sub(r"[^\w.-]+", "_", text)
    key = key.lstrip("._-").rstrip("._")
    key = f"_{key}" if _RESERVED.match(key) else key
    return key.encode()[:MAX_KEY].decode(errors="ignore").rstrip("._")


def _seen(text: str) -> Iterator[str]:
    """The characters that may be in a file name; NUL for others, and nothing for what has no shape of its own."""
    bears_marks = False
    for c in text:
        if c.isalnum():
            bears_marks = True
            yield c
            continue
        kind = unicodedata.category(c)
        if kind in ("Mn", "Mc"):  # parts of letters, in Hindi of most words, but no letters to a regular expression
            if bears_marks:
                yield c
        elif kind != "Cf":  # which joins characters, or turns the direction of reading
            bears_marks = False
            yield c if c in "_-." else "\0"


def size_of(text: str) -> tuple[int, int]:
    """Width and height of "832x480", "832*480" or "480p".

    Raises:
        ValueError: says what it must be.
    """
    numbers = re.fullmatch(r"\s*([0-9]{1,5})\s*[xX*×]\s*([0-9]{1,5})\s*", text)
    if numbers is not None:
        return int(numbers[1]), int(numbers[2])
    if text in SIZES:
        return SIZES[text]
    raise ValueError(f"must be WIDTHxHEIGHT in pixels, such as 832x480, or one of {', '.join(SIZES)}.")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text.")
    if _NO_TEXT.search(value):
        raise ValueError("has a character that is no text: a NUL, or half of a surrogate pair.")
    if len(value) > MAX_TEXT:
        raise ValueError(f"has {len(value)} characters; at most {MAX_TEXT} are read.")
    return value.strip()


def _key(value: Any) -> str:
    key = safe_key(_text(str(value) if type(value) is int else value))
    if not key:
        raise ValueError("has no letter or digit to name a file by.")
    return key


def _prompt(value: Any) -> str:
    text = _text(value)
    if not clean_prompt(text):
        raise ValueError("has no words.")
    return text


def _whole(value: Any, lowest: int, highest: int) -> int:
    # 7.0 is what a table says of 7 where a cell of the column is empty. Larger floats may not be what was written.
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([+-]?[0-9]{1,20})(?:\.0*)?\s*", value)):
        value = int(match[1])
    elif isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        value = int(value)
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"must be a whole number from {lowest} to {highest}.")
    return value


def _size(value: Any) -> tuple[int, int]:
    return size_of(_text(value))


_count = functools.partial(_whole, lowest=1, highest=MAX_COUNT)
_PARSERS: dict[str, Callable[[Any], Any]] = {
    "key": _key,
    "prompt": _prompt,
    "seed": functools.partial(_whole, lowest=0, highest=MAX_SEED),
    "size": _size,
    "height": _count,
    "width": _count,
    "frames": _count,
    "negative": _text,
}


def _parsed(name: str, spelled: str, value: Any) -> Any:
    try:
        return _PARSERS[name](value)
    except ValueError as error:
        raise ValueError(f"{spelled}={_shown(value)} {error}") from None


Find = Callable[[str], pathlib.Path | None]


def files_beside(folder: pathlib.Path) -> Find:
    """From a name to the path that it has in the folder or else in the working directory, whatever is there.

    Each name is looked for once: do not keep the function while files come and go.
    """
    places = dict.fromkeys((folder, pathlib.Path()))

    @functools.cache
    def find(name: str) -> pathlib.Path | None:
        paths = (os.path.join(place, spelled) for spelled in _spellings(name) for place in places)
        return next((pathlib.Path(path) for path in paths if os.path.exists(path)), None)

    return find


def _spellings(name: str) -> Iterator[str]:
    """A name as it is written, then what else a file system may call the file."""
    if not name:
        return
    yield name
    if not name.isascii():  # é may be one character or two; macOS writes two
        yield unicodedata.normalize("NFC", name)
        yield unicodedata.normalize("NFD", name)
    if name.startswith("~"):  # which shells expand, but not in a file
        yield os.path.expanduser(name)
    if "\\" in name:  # written on Windows
        yield name.replace("\\", "/")


def read_fields(where: str, given: Mapping[str, Any], find: Find, checks: Checks) -> Entry | None:
    """The video that the fields of one object, row or command line ask for; None if one of them is wrong.

    None and NaN are as good as absent. Without a key, the prompt names the files. References may be a list, or one
    string: "a.png;b.png" or "a.png,b.png"; so may subjects and roles. What is right in a wrong one goes to
    `checks.unfinished`.
    """
    before = len(checks.problems)
    fields = _by_name(where, given, checks)
    values = {
        name: checks.attempt(where, _parsed, name, *spelled) for name, spelled in fields.items() if name in _PARSERS
    }
    prompt, size = values.get("prompt"), values.get("size")
    if "prompt" not in fields:
        checks.problems.append(f"{where}: has no prompt.")
    references = _read_references(where, fields, prompt, find, checks)
    if size is not None and ("height" in values or "width" in values):
        checks.problems.append(f"{where}: has a size, and also height or width; give one of the two.")
    overrides = {name: values[field] for field, name in _OVERRIDES.items() if values.get(field) is not None}
    if size is not None:
        overrides["width"], overrides["height"] = size
    named_by_prompt = prompt is not None and "key" not in fields
    key: str = values.get("key") or ((safe_key(prompt) or "video") if named_by_prompt else "")
    if len(checks.problems) > before or prompt is None:
        if prompt is None:  # in which no words can be looked for
            references = tuple(dataclasses.replace(reference, words=None) for reference in references)
        checks.unfinished.append(Entry(where, key, prompt or "", references, overrides))
        return None
    return Entry(where, key, prompt, references, overrides)


_OVERRIDES = {
    "seed": "seed",
    "frames": "num_frames",
    "height": "height",
    "width": "width",
    "negative": "negative_prompt",
}


def _by_name(where: str, given: Mapping[str, Any], checks: Checks) -> dict[str, tuple[str, Any]]:
    """By our name of each field, how it is spelled here and its value."""
    fields: dict[str, tuple[str, Any]] = {}
    for spelled, value in given.items():
        name = _SPELLED.get(spelled)
        if _is_nothing(value) or spelled in UNUSED:
            continue
        if name is None:
            near = difflib.get_close_matches(spelled[:80], _SPELLED, 1, 0.75)
            there_are = f"did you mean {near[0]}? There are" if near else "there are"
            checks.problems.append(f"{where}: the field {_shown(spelled)} is unknown; {there_are} {', '.join(FIELDS)}.")
        elif name in fields:
            checks.problems.append(f"{where}: {spelled} and {fields[name][0]} are one field; give one of the two.")
        else:
            fields[name] = (spelled, value)
    return fields


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _read_references(
    where: str, fields: Mapping[str, tuple[str, Any]], prompt: str | None, find: Find, checks: Checks
) -> tuple[Reference, ...]:
    spelled, given = fields.get("references", ("references", []))
    items = checks.attempt(where, _reference_list, spelled, given, find)
    if items is None:  # how many there should be is not known
        return ()
    found = [None if _is_blank(item, find) else checks.attempt(where, read_reference, item, find) for item in items]
    there = [index for index, item in enumerate(items) if not _is_blank(item, find)]
    merges: dict[str, Callable[[Reference, str], Reference]] = {"subjects": _with_words, "roles": _with_role}
    for name, merge in merges.items():
        spelled, given = fields.get(name, (name, None))
        texts = None if given is None else checks.attempt(where, _one_each, spelled, given, len(items), there)
        for index, text in zip(there, texts or (), strict=False):
            if (reference := found[index]) is not None:
                found[index] = checks.attempt(where, merge, reference, text) or reference
    if "class_label" in fields and prompt is not None:
        labels = checks.attempt(where, _texts, *fields["class_label"], len(there))
        if labels is not None:
            _give_labels(where, prompt, found, there, labels, checks)
    return tuple(reference for reference in found if reference is not None)


def _is_blank(item: Any, find: Find) -> bool:
    """Whether an item of a list says that there is none."""
    if not isinstance(item, str):
        return _is_nothing(item)
    return not item.strip() or (item.strip().casefold() in _NO_VALUE and find(item.strip()) is None)


def _reference_list(spelled: str, given: Any, find: Find) -> list[Any]:
    if isinstance(given, Mapping):
        return [given]
    if isinstance(given, list | tuple):
        return list(given)
    if not isinstance(given, str):
        raise ValueError(f"{spelled}={_shown(given)} must be a file, or a list of files.")
    # The separators may also stand in the name of a file, or in words.
    whole = given.strip()
    if find(whole) is None:
        for separator in ";,":
            parts = [part.strip() for part in whole.split(separator)]
            said = [part for part in parts if not _is_blank(part, find)]
            if len(parts) > 1 and said and all(_find_reference(part, find) is not None for part in said):
                return parts
        if _find_reference(whole, find) is None:
            return [part.strip() for part in _split(whole)]
    return [whole]


def _split(text: str) -> list[str]:
    return text.split(";" if ";" in text else ",")


def _texts(spelled: str, given: Any, count: int) -> list[str]:
    """A text for each of `count` references, or for some of them."""
    if isinstance(given, str):  # with one reference, a comma belongs to its words
        given = [given] if count == 1 else _split(given)
    if not isinstance(given, list | tuple):
        raise ValueError(f"{spelled}={_shown(given)} must be a list, or text such as 'fox;ball'.")
    try:
        return ["" if item is None else _text(item) for item in given]
    except ValueError as error:
        raise ValueError(f"{spelled}={_shown(given)}: each of them {error}") from None


def _one_each(spelled: str, given: Any, count: int, there: Sequence[int]) -> list[str]:
    """A text for each reference that is there, of `count` that could be; blank ones may have a text too, or have none."""
    texts = _texts(spelled, given, len(there))
    if len(texts) == len(there):
        return texts
    if len(texts) == count:
        return [texts[index] for index in there]
    raise ValueError(f"{spelled}={_shown(given)} has {len(texts)} for {len(there)} references; give one each, or ''.")


def _with_words(reference: Reference, words: str) -> Reference:
    if words and reference.words not in (None, words):
        raise ValueError(f"{reference.path} has two names: {_shown(reference.words)} and {_shown(words)}.")
    return dataclasses.replace(reference, words=words or reference.words)


def _with_role(reference: Reference, role: str) -> Reference:
    if role and role not in PLACEMENTS:
        raise ValueError(f"role {_shown(role)} is unknown; choose one of {', '.join(map(repr, PLACEMENTS))}.")
    return dataclasses.replace(reference, role=role or reference.role)


def _give_labels(
    where: str,
    prompt: str,
    found: list[Reference | None],
    there: Sequence[int],
    labels: Sequence[str],
    checks: Checks,
) -> None:
    """The labels of a benchmark pair with its images, but the prompt may have other words: "mug" for the label "Cup"."""
    if len(labels) != len(there):
        if len(labels) == len(found):
            labels = [labels[index] for index in there]
        else:
            checks.notes.append(f"{where}: has {len(labels)} class labels for {len(there)} references.")
    for index, label in zip(there, labels, strict=False):
        reference = found[index]
        if reference is not None and reference.words is None and label:
            if any(occurrences(clean_prompt(prompt), label)):
                found[index] = dataclasses.replace(reference, words=label)
            else:
                checks.notes.append(f"{where}: the class label {_shown(label)} is not in the prompt and names nothing.")


def read_reference(item: Any, find: Find) -> Reference:
    """A reference written as FILE, as FILE:WORDS, or as an object with image, words and role.

    The file may have colons of its own, and the longest name that exists wins.

    Raises:
        ValueError: there is no such file, or it is in a bucket or on the web; nothing after the colon, an unknown role, or
            something of another type.
    """
    if isinstance(item, Mapping):
        unknown = [name for name in item if name not in ("image", "words", "role")]
        if unknown or not isinstance(item.get("image"), str):
            raise ValueError(f"the reference {_shown(item)} must have an image, and may have words and a role.")
        path = find(item["image"].strip())
        if path is None:
            raise _no_file(item["image"])
        words, role = _texts("words and role", [item.get("words"), item.get("role")], 2)
        return _with_role(_with_words(Reference(path), words), role)
    if not isinstance(item, str):
        raise ValueError(f"the reference {_shown(item)} must be a file, or an object with image, words and role.")
    reference = _find_reference(item.strip(), find)
    if reference is None:
        raise _no_file(item)
    return dataclasses.replace(reference, words=None if reference.words is None else _text(reference.words))


def _no_file(text: str) -> ValueError:
    if text.isprintable():
        check_local("the reference", text.strip()[:200])
    return ValueError(f"there is no image file {_shown(text)}.")


def _find_reference(text: str, find: Find) -> Reference | None:
    colons = [index for index in range(len(text)) if text[index] == ":"]
    # A path is a few colons at most; a text of thousands is none, and would be looked for as often.
    for cut in [len(text), *reversed(colons[-16:])]:
        path = find(text[:cut])
        if path is not None:
            words = text[cut + 1 :].strip()
            if cut < len(text) and not words:
                raise ValueError(f"{_shown(text)} has no words after its last colon.")
            return Reference(path, words or None)
    return None


def read_entries(path: pathlib.Path, checks: Checks) -> list[Entry]:
    """The videos of a prompt file that can be read; problems with the others go to `checks`."""
    path = pathlib.Path(path)
    entries: list[Entry] = []
    before = len(checks.problems)
    checks.attempt(str(path), _read_file, path, entries, checks)
    if not entries and len(checks.problems) == before:
        checks.problems.append(f"{path}: no video is asked for in it.")
    return entries


def _read_file(path: pathlib.Path, entries: list[Entry], checks: Checks) -> None:
    images.regular_file(path, MAX_BYTES, "prompt file")
    read = FORMATS.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"the suffix {path.suffix!r} is unknown; a prompt file is one of {', '.join(FORMATS)}.")
    try:
        text = read_text(path)
    except ValueError as error:  # which names the file and the line
        checks.problems.append(str(error))
        return
    find = files_beside(path.parent)
    for where, fields in read(path, text, checks):
        entry = read_fields(where, fields, find, checks)
        if entry is not None:
            entries.append(entry)


Row = tuple[str, Mapping[str, Any]]  # where it stands, and its fields as they are spelled


def _lines(path: pathlib.Path, text: str) -> Iterator[tuple[str, str]]:
    """Lines that say something, and where they stand."""
    # Not str.splitlines: it would also break lines at characters that may stand in a prompt.
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"{path} line {number}", line.strip()


def _txt_rows(path: pathlib.Path, text: str, checks: Checks) -> Iterator[Row]:
    for where, line in _lines(path, text):
        key, *fields = line.split("@@")
        if not fields or not fields[0].strip():
            checks.problems.append(f"{where}: must be key@@prompt@@image@@image..., it is {_shown(line)}.")
        else:
            files = [file.strip() for file in fields[1:]]
            yield where, {"key": key.strip(), "prompt": fields[0], "references": [file for file in files if file]}


def _jsonl_rows(path: pathlib.Path, text: str, checks: Checks) -> Iterator[Row]:
    for where, line in _lines(path, text):
        for value in _json_values(where, line, checks):
            if isinstance(value, dict):
                yield where, value
            else:
                checks.problems.append(f"{where}: must be an object, it is {_shown(value)}.")


def _json_rows(path: pathlib.Path, text: str, checks: Checks) -> Iterator[Row]:
    for top in _json_values(str(path), text, checks):
        if isinstance(top, dict | list):
            yield from _entries_of(path, top, checks)
        else:
            checks.problems.append(f"{path}: must be objects by key, or a list of objects; it is {_shown(top)}.")


def _entries_of(path: pathlib.Path, top: dict[str, Any] | list[Any], checks: Checks) -> Iterator[Row]:
    rows: Iterable[tuple[Any, Any]] = top.items() if isinstance(top, dict) else enumerate(top, start=1)
    for key, fields in rows:
        where = f"{path} entry {_shown(key)}"
        if not isinstance(fields, dict):
            checks.problems.append(f"{where}: must be an object, it is {_shown(fields)}.")
        elif isinstance(top, list):
            yield where, fields
        elif "key" in fields:
            checks.problems.append(f"{where}: has a key of its own, {_shown(fields['key'])}; give one of the two.")
        else:
            yield where, {"key": key, **fields}


def _json_values(where: str, text: str, checks: Checks) -> list[Any]:
    """The value of a JSON text; none if it is not JSON."""
    twice: list[str] = []
    values: list[Any] = []
    try:
        values = [json.loads(text, object_pairs_hook=functools.partial(_object, twice=twice), parse_int=_json_int)]
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if "\n" in text else f"column {error.colno}"
        checks.problems.append(f"{where}: is not JSON: {error.msg} at {place}{_json_hint(text, error.pos)}.")
    except RecursionError:
        checks.problems.append(f"{where}: is nested too deeply to be a prompt file.")
    except ValueError as error:
        checks.problems.append(f"{where}: {error}")
    checks.problems += [f"{where}: has the name {_shown(name)} twice in one object." for name in twice]
    return values


def _object(pairs: list[tuple[str, Any]], twice: list[str]) -> dict[str, Any]:
    """An object; JSON would keep the last of two equal names, and lose a video without a word."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice.extend(name for name, _ in pairs if name in seen or seen.add(name))
    return fields


def _json_hint(text: str, position: int) -> str:
    """What is often meant by a text that is not JSON here."""
    before, after = text[max(position - 1000, 0) : position].rstrip()[-1:], text[position : position + 10].lstrip()
    if (before == "," and after[:1] in ("]", "}")) or (after[:1] == "," and after[1:].lstrip()[:1] in ("]", "}")):
        return "; remove the comma before the bracket"
    if after.startswith("'"):
        return "; text stands in double quotes"
    if after.startswith(("None", "True", "False")):
        return "; it has null, true and false"
    if after.startswith(("//", "/*", "#")):
        return "; it has no comments"
    if before in ("}", "]") and after.startswith("{"):
        return "; a comma is missing, or the file is .jsonl, an object per line"
    return ""


def _json_int(text: str) -> int:
    if len(text) > 20:  # more than any field may have; thousands of digits would take seconds
        raise ValueError(f"has a number of {len(text)} digits, {_shown(text)}.")
    return int(text)


_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_ROW_NUMBER = re.compile(r"[0-9]+(?:\.0*)?")
_SEP_LINE = re.compile(r"\s*\"?sep=([^\w\s\"]|\t)\"?[,;\t]*\s*", re.IGNORECASE)


def _csv_rows(path: pathlib.Path, text: str, checks: Checks) -> Iterator[Row]:
    lines = list(io.StringIO(text, newline=""))
    # Before the header nothing counts: rows that were emptied, comments.
    first = next((index for index, line in enumerate(lines) if line.strip(' \t\r\n,;"') and line[0] != "#"), 0)
    # Excel has a line of its own for it, and takes it for a cell if the quotes say so.
    if lines and (match := _SEP_LINE.fullmatch(lines[first])):
        first, delimiter = first + 1, match[1]
    else:
        delimiter = next((d for d in _DELIMITERS if "prompt" in _names(lines[first : first + 1], d)), ",")
    names: list[str | None] = []
    for number, cells in _cells(lines, first, delimiter):
        where = f"{path} line {number}"
        if isinstance(cells, csv.Error):
            # Of two quotes, the second is missing or is one of the text.
            reason = "a quote is not closed" if "end of data" in str(cells) else str(cells)
            checks.problems.append(f"{where}: is not CSV: {reason}.")
        elif not any(cells):
            continue
        elif not names:
            names = _column_names(path, where, cells, checks)
            if "prompt" not in map(_SPELLED.get, filter(None, names)):  # which every row would repeat
                return
        else:
            while len(cells) > len(names) and not cells[-1]:
                cells.pop()
            if len(cells) != len(names):
                hint = f"; text with '{delimiter}' stands in quotes" if len(cells) > len(names) else ""
                checks.problems.append(f"{where}: has {len(cells)} cells, the header has {len(names)}{hint}.")
            else:
                values = [None if not cell or cell.casefold() in _NO_VALUE else cell for cell in cells]
                checks.problems += [
                    f"{where}: {_shown(value)} stands in a column without a name."
                    for name, value in zip(names, values, strict=True)
                    if name == "" and value is not None and not _ROW_NUMBER.fullmatch(value)
                ]
                yield where, {name: value for name, value in zip(names, values, strict=True) if name}


def _names(header: Sequence[str], delimiter: str) -> set[str | None]:
    try:
        return {_SPELLED.get(_as_field(cell)) for row in csv.reader(header, delimiter=delimiter) for cell in row}
    except csv.Error:  # which will be said when the rows are read
        return set()


def _as_field(cell: str) -> str:
    """A name as fields are spelled, if it is one: "Negative Prompt" in the header of a table people look at."""
    name = cell.strip()
    folded = re.sub(r"[\s-]+", "_", name.lower())
    return folded if folded in _SPELLED else name


def _cells(lines: Sequence[str], first: int, delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """The rows of a table, each with the number of the line where it begins; after a wrong one it goes on with the next."""
    position = first

    def rest() -> Iterator[str]:
        nonlocal position
        while position < len(lines):
            position += 1
            yield lines[position - 1]

    while position < len(lines):
        begin = position
        try:
            row = next(csv.reader(rest(), delimiter=delimiter, strict=True))
        except csv.Error as error:
            position = begin + 1
            yield position, error
        else:
            yield begin + 1, [cell.strip() for cell in row]


def _column_names(path: pathlib.Path, where: str, header: Sequence[str], checks: Checks) -> list[str | None]:
    """The names of the columns: "" for one without, None for one that is no field or the same as another."""
    # pandas writes its index without a name, and "Unnamed: 0" or "Unnamed: 0.1" when it has read that.
    names = ["" if re.fullmatch(r"Unnamed: [0-9.]+", name) else _as_field(name) for name in header]
    given = [name for name in names if name]
    if len(set(given)) < len(given):
        checks.problems.append(f"{path}: the header must name each column once; it is {_shown(list(header))}.")
    if "prompt" not in map(_SPELLED.get, given):
        separators = ", ".join(_DELIMITERS.values())
        checks.problems.append(
            f"{path}: the header must name the columns, among them 'prompt', with {separators} between them; "
            f"it is {_shown(list(header))}."
        )
    known = {spelled for spelled, _ in _by_name(where, dict.fromkeys(given, ""), checks).values()}
    columns: list[str | None] = []
    for name in names:
        columns.append(name if not name or (name in known and name not in columns) else None)
    return columns


FORMATS: dict[str, Callable[[pathlib.Path, str, Checks], Iterator[Row]]] = {
    ".txt": _txt_rows,
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
}


def check_entries(
    entries: Sequence[Entry],
    checks: Checks,
    resolve: Callable[..., SamplingConfig],
    *,
    takes_references: bool = True,
    strict_parity: bool = False,
) -> list[Checked]:
    """The entries that can be made; what is wrong with the others, unfinished ones too, goes to `checks`.

    `resolve` takes the overrides of an entry except its seed, and returns its sampling options or raises ValueError.
    `takes_references` is False for a text-to-video model.
    """
    every = [*entries, *checks.unfinished]
    check_keys([entry for entry in every if entry.key], checks)
    # Each image, and each cell that an image is for, once, however many entries have them.
    size_of_image = functools.cache(functools.partial(_outcome, images.check_image, strict_parity=strict_parity))
    notes_on_image = functools.cache(functools.partial(images.image_notes, strict_parity=strict_parity))
    fits = functools.cache(functools.partial(_outcome, _check_cells))
    options = functools.cache(functools.partial(_outcome, resolve))
    checked = []
    for index, entry in enumerate(every):
        is_finished = index < len(entries)
        problems: list[str] = []
        sampling = options(**{name: value for name, value in entry.overrides.items() if name != "seed"})
        sizes = [size_of_image(reference.path) for reference in entry.references]
        for reference, size in zip(entry.references, sizes, strict=True):
            if not isinstance(size, ValueError):
                checks.notes += notes_on_image(reference.path)
        problems += [str(outcome) for outcome in (sampling, *sizes) if isinstance(outcome, ValueError)]
        if entry.references and not takes_references:
            problems.append(f"has {len(entry.references)} references, but this is a text-to-video model.")
        elif not isinstance(sampling, ValueError):
            canvas = (len(sizes), sampling.height, sampling.width, sampling.layout)
            if isinstance(outcome := fits(*canvas), ValueError):
                problems.append(str(outcome))
            else:
                for reference, size in zip(entry.references, sizes, strict=True):
                    if reference.role == "subject" and not isinstance(size, ValueError):
                        outcome = fits(*canvas, size, reference.path)
                        problems += [str(outcome)] if isinstance(outcome, ValueError) else []
        if takes_references and not entry.references and is_finished:
            checks.notes.append(f"{entry.where}: has no reference; its canvas stays white.")
        for text in (entry.prompt, "" if isinstance(sampling, ValueError) else sampling.negative_prompt):
            if match := _WEIGHT.search(text):
                advice = "--lora adds a LoRA" if match[0].startswith("<") else "words have no weights here"
                checks.notes.append(f"{entry.where}: {_shown(match[0])} is read as it stands; {advice}.")
        subjects = _find_subjects(entry, problems, checks)
        checks.problems += [f"{entry.where}: {problem}" for problem in problems]
        if is_finished and not isinstance(sampling, ValueError) and not problems:
            known = tuple(size for size in sizes if not isinstance(size, ValueError))
            checked.append(Checked(entry, sampling, subjects, known))
    return checked


def check_keys(entries: Sequence[Entry], checks: Checks) -> None:
    """Two videos cannot have one key."""
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries):
        # Upper and lower case are one, because they are to the file systems of Windows and macOS.
        name = unicodedata.normalize("NFC", entry.key.casefold())
        first = seen.setdefault(name, index)
        if first != index:
            checks.problems.append(
                f"{entry.where}: the key {entry.key!r} is taken by {entries[first].where}; both would be one file. "
                "Give each a key of its own."
            )


def _outcome(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | ValueError:
    """What a function returns or raises, so that both can be cached."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        return error


def _check_cells(
    count: int,
    height: int,
    width: int,
    layout: Layout,
    size: tuple[int, int] | None = None,
    path: pathlib.Path = pathlib.Path(),
) -> None:
    """Refuses what no canvas can hold: so many references, or a subject of this size in one of their cells."""
    # In any cell: which one it will be depends on the seed, and a video of another seed should not be refused.
    for x0, y0, x1, y1 in layout_cells(count, height, width, layout):
        if size is not None:
            fitted_size(size, (x1 - x0, y1 - y0), images.shown(path))


def _find_subjects(entry: Entry, problems: list[str], checks: Checks) -> tuple[Subject | None, ...]:
    subjects: list[Subject | None] = []
    prompt = clean_prompt(entry.prompt)
    for reference in entry.references:
        words = reference.words
        span = None if words is None else next(occurrences(prompt, words), None)
        subjects.append(None if words is None or span is None else Subject(words, span=span))
        if words is not None and span is None:
            # What `find_words` says is better, but too slow to say it ten thousand times.
            outcome = _outcome(find_words, prompt, words) if len(checks.problems) < SHOWN else None
            problems.append(str(outcome or f"{_shown(words)} is not in the prompt."))
    spans = [subject.span for subject in subjects if subject is not None]
    if len(set(spans)) < len(spans):
        checks.notes.append(f"{entry.where}: two references have the same words.")
    return tuple(subjects)
