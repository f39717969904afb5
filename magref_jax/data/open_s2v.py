"""OpenS2V-5M as a list of clips: its annotations and videos become what `prepare` reads.

    python -m magref_jax.data.open_s2v annotations.json --videos VIDEOS --out list [--pairs pairs.json]
    python -m magref_jax.data.prepare list/clips.jsonl --out records

The format is the one that the data pipeline of OpenS2V-Nexus (arXiv:2505.20292) writes in its steps 5 (annotations) and 6 (pairs).
A reference is a mask of a class that the caption names, cut out of the annotated frame; a pair adds the same thing from another
clip as a further view.
"""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import av
import numpy as np
import tyro
from jaxtyping import Bool
from PIL import Image
from tqdm import tqdm

from magref_jax.conditioning.canvas import Box
from magref_jax.conditioning.subjects import clean_prompt, occurrences
from magref_jax.data.prepare import Cut, cut_clip
from magref_jax.files import replacing

CLASSES = ("subject", "object")  # kinds of `word_tags` that become references
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


def import_clip(
    key: str, entry: Mapping[str, Any], videos: pathlib.Path, out: pathlib.Path, limits: Limits
) -> dict[str, Any]:
    """The line of one clip; its cut-outs are written below `out`.

    Raises:
        ValueError: the annotations contradict each other or the video; `av.FFmpegError` where it cannot be decoded.
        KeyError: a field is missing.
    """
    metadata = entry["metadata"]
    captions = [clean_prompt(caption) for caption in metadata["cap"]]
    if not captions:
        raise ValueError("it has no caption")
    masks = choose_masks(entry, captions[0], limits)
    path, rate, crop = videos / metadata["path"], float(metadata["fps"]), _crop_of(metadata)
    # The middle of the frame's time: its number counts from the start of the video, and the rate is rounded.
    frame = (int(entry["annotation"]["ann_frame_data"]["ann_frame_idx"]) + 0.5) / rate
    (picture,) = cut_clip(path, Cut(crop[3] - crop[1], crop[2] - crop[0], 1, rate), frame, crop=crop)
    references = []
    for name, mask in masks.items():
        file = out / reference_file(key, name)
        with replacing(file) as part:
            cut_out(picture, mask).save(part, "PNG")
        references.append({"image": [str(reference_file(key, name))], "origin": ["in_pair"], "label": name})
    first, stop = metadata.get("face_cut", metadata["cut"])
    return {
        "id": key,
        "video": str(path.absolute()),
        "source": metadata["path"],
        "captions": captions[:1],
        "start": first / rate,
        "end": stop / rate,
        "crop": list(crop),
        "references": references,
    }


def reference_file(key: str, name: str) -> pathlib.Path:
    """Where the cut-out of a class of a clip lies, below the list's folder."""
    safe = re.compile(r"[^\w.-]+")
    return pathlib.Path("references", safe.sub("_", key), f"{safe.sub('_', name)}.png")


def add_pairs(lines: Mapping[str, dict[str, Any]], pairs: Iterable[Mapping[str, Any]], limits: Limits) -> int:
    """Gives references the cut-outs of the same thing in other clips as views; returns how many."""
    count = 0
    for pair in pairs:
        if min(pair["text_similarity"], pair["image_similarity"]) < limits.similarity:
            continue
        ends = [(pair["cur_id"], pair["cur_class_name"]), (pair["aft_id"], pair["aft_class_name"])]
        found = [
            reference
            for key, name in ends
            for reference in lines.get(key, {}).get("references", ())
            if reference["label"] == name
        ]
        if len(found) == 2 and ends[0][0] != ends[1][0]:
            for reference, other in (found, found[::-1]):
                if (image := other["image"][0]) not in reference["image"]:
                    reference["image"].append(image)
                    reference["origin"].append("cross_clip")
                    count += 1
    return count


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
    try:
        entries = json.loads(arguments.annotations.read_text(encoding="utf-8"))
        pairs = [pair for path in arguments.pairs for pair in json.loads(path.read_text(encoding="utf-8"))]
        lines, refused = {}, []
        for key, entry in tqdm(entries.items(), desc="cutting out", unit="clip"):
            try:
                lines[key] = import_clip(key, entry, arguments.videos, arguments.out, arguments.limits)
            except (KeyError, ValueError, OSError, av.FFmpegError) as error:
                refused.append(f"left out: {key}: {error!r}")
        views = add_pairs(lines, pairs, arguments.limits)
        with replacing(arguments.out / "clips.jsonl") as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in lines.values()), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print("\n".join(refused[:20]))
    references = sum(len(line["references"]) for line in lines.values())
    print(f"{len(lines)} clips, {references} references, {views} views from pairs; {len(refused)} clips left out")


if __name__ == "__main__":
    main()
