"""OpenS2V-5M as a list of clips: its annotations and videos become what `prepare` reads.

    python -m magref_jax.data.open_s2v annotations.json --videos VIDEOS --out list [--pairs pairs.json]
    python -m magref_jax.data.prepare list/clips.jsonl --out records

The format is the one that the data pipeline of OpenS2V-Nexus (arXiv:2505.20292) writes in its steps 5 (annotations) and 6 (pairs).
A reference is a mask of a class that the caption names, cut out of the annotated frame; a pair adds the same thing from another
clip as a further view.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tyro
from jaxtyping import Bool
from PIL import Image
from tqdm import tqdm

from magref_jax import images
from magref_jax.command import check_local, check_local_fields, program
from magref_jax.conditioning.canvas import Box
from magref_jax.conditioning.subjects import clean_prompt, occurrences
from magref_jax.data.prepare import Cut, cut_clip, parse_line
from magref_jax.data.records import Skipped, claimed
from magref_jax.files import read_text, replacing
from magref_jax.prompts import safe_key

CLASSES = ("subject", "object")  # kinds of `word_tags` that become references
MAX_BYTES = 2**36  # of a file of annotations
SHOWN = 20  # problems that are listed
DUPLICATE = 0.8  # intersection over union from which two masks are one thing with two names


@dataclasses.dataclass(frozen=True)
class Limits:
    """Which masks become references."""

    references: int = 4  # of a clip, the largest first
    min_area: float = 0.02  # of the frame
    max_area: float = 0.6
    similarity: float = 0.6  # of text and of image, for a pair


def decode_mask(encoded: Mapping[str, Any]) -> Bool[np.ndarray, "H W"]:
    """A mask as COCO writes it: lengths of runs of 0 and 1 by turns, down the columns, in a text.

    A length is written in groups of 5 bits, the lowest first and each as a character from "0" on, with a sixth bit where more
    follow; from the fourth on it is the difference from the length before the last.

    Raises:
        ValueError: the lengths are not those of a mask of this size.
    """
    height, width = encoded["size"]
    lengths: list[int] = []
    value = shift = 0
    for character in encoded["counts"].encode():
        group = character - ord("0")
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            if group & 16:  # negative
                value -= 1 << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if min(lengths, default=0) < 0 or sum(lengths) != height * width:
        raise ValueError(f"a mask has runs for {sum(lengths)} pixels, its size is {width}x{height}")
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T


def choose_masks(entry: Mapping[str, Any], caption: str, limits: Limits) -> dict[str, Bool[np.ndarray, "H W"]]:
    """The masks that become references, by the words that name them."""
    tags = entry["word_tags"]
    classes = [name for kind in CLASSES for name in tags.get(kind, ())]
    frame = str(entry["annotation"]["ann_frame_data"]["ann_frame_idx"])
    encoded = entry["annotation"]["mask_annotation"][frame]
    found: list[tuple[str, np.ndarray]] = []
    for number, mask in encoded.items():
        name = entry["annotation"]["mask_map"][number]["class_name"]
        if name in classes and next(occurrences(caption, name), None):
            found.append((name, decode_mask(mask)))
    # Of equal masks the one named first in `word_tags`: sorting keeps their order.
    found.sort(key=lambda pair: classes.index(pair[0]))
    found.sort(key=lambda pair: -pair[1].sum())
    chosen: dict[str, np.ndarray] = {}
    for name, mask in found:
        is_new = all((mask & other).sum() < DUPLICATE * (mask | other).sum() for other in chosen.values())
        if name not in chosen and is_new and limits.min_area <= mask.mean() <= limits.max_area:
            chosen[name] = mask
    return dict(list(chosen.items())[: limits.references])


def cut_out(picture: np.ndarray, mask: Bool[np.ndarray, "H W"]) -> Image.Image:
    """What the mask covers, RGBA, in the smallest box around it."""
    if picture.shape[:2] != mask.shape:
        raise ValueError(f"a mask is {mask.shape[1]}x{mask.shape[0]}, its frame {picture.shape[1]}x{picture.shape[0]}")
    image = Image.fromarray(np.dstack([picture * mask[..., None], mask.astype(np.uint8) * 255]))
    return image.crop(image.getchannel("A").getbbox())


def _crop_of(metadata: Mapping[str, Any]) -> Box:
    left, right, top, bottom = metadata["crop"]
    return left, top, right, bottom


def _captions(given: Any) -> list[str]:
    """One text or some, cleaned."""
    captions = [clean_prompt(caption) for caption in ([given] if isinstance(given, str) else given)]
    if not captions or not captions[0]:
        raise ValueError("it has no caption")
    return captions


def import_clip(
    key: str, entry: Mapping[str, Any], videos: pathlib.Path, out: pathlib.Path, limits: Limits
) -> tuple[dict[str, Any], dict[pathlib.Path, Image.Image]]:
    """The line of one clip, and its cut-outs by the file below `out` that the line has them in.

    Raises:
        Exception: whatever annotations that contradict each other, or have other types than they should, or a damaged video
            lead to.
    """
    metadata = entry["metadata"]
    captions = _captions(metadata["cap"])
    masks = choose_masks(entry, captions[0], limits)
    path, rate, crop = videos / metadata["path"], float(metadata["fps"]), _crop_of(metadata)
    # The middle of the frame's time: its number counts from the start of the video, and the rate is rounded.
    frame = (int(entry["annotation"]["ann_frame_data"]["ann_frame_idx"]) + 0.5) / rate
    (picture,) = cut_clip(path, Cut(crop[3] - crop[1], crop[2] - crop[0], 1, rate), frame, crop=crop)
    pictures = {reference_file(key, name): cut_out(picture, mask) for name, mask in masks.items()}
    first, stop = metadata.get("face_cut", metadata["cut"])
    line = {
        "id": key,
        "video": str(path.absolute()),
        "source": metadata["path"],
        "captions": captions[:1],
        "start": first / rate,
        "end": stop / rate,
        "crop": list(crop),
        "references": [
            {"image": [str(file)], "origin": ["in_pair"], "label": name}
            for file, name in zip(pictures, masks, strict=True)
        ],
    }
    parse_line(json.dumps(line), out)  # what `prepare` would refuse
    return line, pictures


def reference_file(key: str, name: str) -> pathlib.Path:
    """Where the cut-out of a class of a clip lies, below the list's folder."""
    return pathlib.Path("references", _file_name(key), f"{_file_name(name)}.png")


def _file_name(text: str) -> str:
    """A name that is seen and stays in its folder; with a digest where it says less than the text."""
    name = safe_key(text)
    if name and name == re.sub(r"[^\w.-]+", "_", text):
        return name
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".lstrip("-")


def add_pairs(lines: Mapping[str, dict[str, Any]], pairs: Iterable[Mapping[str, Any]], limits: Limits) -> list[str]:
    """Gives references the cut-outs of the same thing in other clips as views.

    Returns:
        What is wrong with the pairs that say something else.
    """
    problems = []
    for number, pair in enumerate(pairs):
        try:
            if min(pair["text_similarity"], pair["image_similarity"]) < limits.similarity:
                continue
            ends = [(pair["cur_id"], pair["cur_class_name"]), (pair["aft_id"], pair["aft_class_name"])]
            found = [
                reference
                for key, name in ends
                for reference in lines.get(key, {}).get("references", ())
                if reference["label"] == name
            ]
        except Exception as error:
            problems.append(f"pair {number}: {Skipped.because_of('', error).reason}")
            continue
        if len(found) == 2 and ends[0][0] != ends[1][0]:
            for reference, other in (found, found[::-1]):
                if (image := other["image"][0]) not in reference["image"]:
                    reference["image"].append(image)
                    reference["origin"].append("cross_clip")
    return problems


def _read_json(path: pathlib.Path, kind: type, what: str) -> Any:
    """The JSON of a file, an object or a list.

    Raises:
        ValueError: the file holds something else, or is not there.
    """
    images.regular_file(path, MAX_BYTES, what)
    try:
        read = json.loads(read_text(path))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be a {what}.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(read, kind):
        raise ValueError(f"{path} is no {what}: it must hold {_KINDS[kind]}, not {read!r:.60}.")
    return read


_KINDS = {dict: "a JSON object of clips by their keys", list: "a JSON list"}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """From OpenS2V's annotations to a list of clips."""

    annotations: tyro.conf.Positional[pathlib.Path]  # JSON of step 5
    videos: pathlib.Path  # folder that `path` of the annotations is relative to
    out: pathlib.Path  # folder for clips.jsonl and references/
    pairs: tuple[pathlib.Path, ...] = ()  # JSON files of step 6
    limits: Limits = dataclasses.field(default_factory=Limits)


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    with program("data.open_s2v"):
        check_local("annotations", arguments.annotations)
        for name in ("videos", "out", "pairs"):
            check_local_fields(f"--{name}", getattr(arguments, name))
        if not arguments.videos.is_dir():
            raise ValueError(f"--videos {arguments.videos}: there is no such folder.")
        entries = _read_json(arguments.annotations, dict, "file of annotations")
        pairs = [pair for path in arguments.pairs for pair in _read_json(path, list, "file of pairs")]
        with claimed("data.open_s2v", arguments.out):
            lines, refused = {}, []
            for key, entry in tqdm(entries.items(), desc="cutting out", unit="clip"):
                try:
                    lines[key], pictures = import_clip(key, entry, arguments.videos, arguments.out, arguments.limits)
                except Exception as error:
                    refused.append(f"{key}: {Skipped.because_of(key, error).reason}")
                    continue
                for file, picture in pictures.items():
                    with replacing(arguments.out / file) as part:
                        picture.save(part, "PNG")
            if not lines:
                raise ValueError(
                    f"{arguments.annotations}: none of {len(entries)} clips can be used: {'; '.join(refused[:5])}"
                )
            wrong = add_pairs(lines, pairs, arguments.limits)
            with replacing(arguments.out / "clips.jsonl") as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in lines.values()), encoding="utf-8")
    for problem in [*refused, *wrong][:SHOWN]:
        print(f"left out: {problem}")
    references = [reference for line in lines.values() for reference in line["references"]]
    views = sum(len(reference["image"]) - 1 for reference in references)
    print(
        f"{len(lines)} clips, {len(references)} references, {views} views from pairs; "
        f"{len(refused)} clips and {len(wrong)} pairs left out"
    )


if __name__ == "__main__":
    main()
