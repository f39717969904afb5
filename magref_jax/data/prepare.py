"""From a folder of videos to records: cut, resampled, resized, with their captions and references.

    python -m magref_jax.data.prepare clips.jsonl --out records --size 480x832 --num-frames 81 --fps 16

A line of `clips.jsonl` is a clip; paths are relative to the file:

    {"video": "dog.mp4", "caption": "a dog runs over a meadow", "start": 2.5,
     "references": [{"image": ["dog.png", "dog_elsewhere.png"], "label": "dog", "identity": "rex"}]}

A clip that cannot be used is counted with the reason and left out. What is stopped, goes on where it was when the same command
is given again, and the files become the same.
"""

import collections
import dataclasses
import fractions
import io
import json
import math
import pathlib
import re
import tempfile
import time
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import av
import grain
import numpy as np
import tyro
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from magref_jax import images
from magref_jax.checkpoint import file_digest
from magref_jax.command import check_local, program
from magref_jax.conditioning.canvas import Box, Role, resize_and_crop
from magref_jax.conditioning.subjects import Span, clean_prompt, occurrences
from magref_jax.data.records import (
    Caption,
    ClipRecord,
    Origin,
    RecordSource,
    ReferenceRecord,
    Skipped,
    TooManySkippedError,
    View,
    claimed,
    write_records,
)
from magref_jax.files import read_text, text_lines
from magref_jax.video import decode, encode_video, frame_rate, open_video, to_rgb, upright, video_stream

MAX_SKIPPED = 3  # clips that may be left out, however few there are; of many, 1 %
MAX_VIDEO_BYTES = 2**36
MAX_LIST_BYTES = 2**33
MAX_SECONDS = 1e9
SHOWN = 10  # problems of a file that are listed


@dataclasses.dataclass(frozen=True)
class ReferenceLine:
    """A reference as a line names it: several pictures are views of one thing."""

    images: tuple[pathlib.Path, ...]
    origins: tuple[Origin, ...]
    label: str  # words of the caption; "": it does not name this one
    role: Role
    identity: str


@dataclasses.dataclass(frozen=True)
class ClipLine:
    """A line of the list of clips."""

    id: str
    video: pathlib.Path
    captions: tuple[str, ...]
    references: tuple[ReferenceLine, ...]
    start: float  # seconds
    end: float | None  # seconds; None: of the video
    source: str
    crop: Box | None = None  # pixels of the upright picture, such as what black bars leave


@dataclasses.dataclass(frozen=True)
class Cut:
    """What a clip becomes."""

    height: int = 480
    width: int = 832
    num_frames: int = 81
    fps: float = 16.0
    store: Literal["frames", "mp4"] = "mp4"


_LINE = {
    "video": str,
    "caption": str,
    "captions": list,
    "references": list,
    "start": float,
    "end": float,
    "id": str,
    "source": str,
    "crop": list,
}
_REFERENCE = {"image": (str, list), "origin": (str, list), "label": str, "role": str, "identity": str}


def _check_fields(fields: Any, allowed: dict[str, Any], required: str, what: str) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"{what} must be an object, it is {fields!r:.80}.")
    if unknown := sorted(set(fields) - set(allowed)):
        raise ValueError(f"{what} has the unknown name {unknown[0]!r}; the names are {', '.join(allowed)}.")
    if required not in fields:
        raise ValueError(f"{what} has no {required!r}.")
    for name, value in fields.items():
        kinds = (float, int) if allowed[name] is float else allowed[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{what} has {name}={value!r:.80}; it must be {_KINDS[allowed[name]]}.")


_KINDS = {str: "text", list: "a list", float: "a number of seconds", (str, list): "a path or a list"}


def _local(name: str, folder: pathlib.Path, path: str) -> pathlib.Path:
    check_local(name, path)
    return folder / path


def _parse_reference(fields: Any, folder: pathlib.Path) -> ReferenceLine:
    _check_fields(fields, _REFERENCE, "image", "a reference")
    paths = [fields["image"]] if isinstance(fields["image"], str) else fields["image"]
    if not paths or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"a reference has image={paths!r:.80}; it must be a path or some.")
    # The first picture is cut from the clip unless the line says otherwise, the others show the same thing elsewhere.
    origins: Any = fields.get("origin", ["in_pair"] + ["cross_clip"] * (len(paths) - 1))
    origins = [origins] * len(paths) if isinstance(origins, str) else origins
    role = fields.get("role", "subject")
    for name, given, allowed in (("origin", origins, typing.get_args(Origin)), ("role", [role], typing.get_args(Role))):
        if wrong := [value for value in given if value not in allowed]:
            raise ValueError(f"a reference has {name}={wrong[0]!r:.80}; choose one of {', '.join(allowed)}.")
    if len(origins) != len(paths):
        raise ValueError(f"a reference has {len(paths)} images and {len(origins)} origins.")
    return ReferenceLine(
        tuple(_local("image", folder, path) for path in paths),
        cast(tuple[Origin, ...], tuple(origins)),
        fields.get("label", ""),
        role,
        fields.get("identity", ""),
    )


def parse_line(text: str, folder: pathlib.Path) -> ClipLine:
    """The clip that a JSON object describes; its paths are relative to the folder.

    Raises:
        ValueError: says what is wrong with which field.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        comma = "; a line is one object, with no comma after it" if text.rstrip().endswith(",") else ""
        raise ValueError(f"is not JSON: {error}{comma}.") from None
    _check_fields(fields, _LINE, "video", "it")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair, which is no text.") from None
    captions = [fields["caption"]] if "caption" in fields else fields.get("captions", [])
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise ValueError("it needs a 'caption', or 'captions', that are not empty.")
    start, end = fields.get("start", 0.0), fields.get("end")
    if not 0 <= start < min(MAX_SECONDS, math.inf if end is None else end):
        raise ValueError(f"it has start={start!r:.40} and end={end!r:.40}; they must be 0 <= start < end.")
    crop = fields.get("crop")
    if crop is not None:
        is_box = len(crop) == 4 and all(type(edge) is int for edge in crop)
        if not is_box or not (0 <= crop[0] < crop[2] and 0 <= crop[1] < crop[3]):
            raise ValueError(f"it has crop={crop!r:.80}; it must be [x0, y0, x1, y1] in pixels.")
    return ClipLine(
        fields.get("id", fields["video"] + (f"@{start:g}" if start else "")),
        _local("video", folder, fields["video"]),
        tuple(clean_prompt(caption) for caption in captions),
        tuple(_parse_reference(reference, folder) for reference in fields.get("references", [])),
        float(start),
        end,
        fields.get("source", fields["video"]),
        None if crop is None else (crop[0], crop[1], crop[2], crop[3]),
    )


VIDEOS = re.compile(r".*\.(mp4|mov|m4v|mkv|webm|avi|mpe?g|m?2?ts|wmv|flv|gif)", re.IGNORECASE)  # by their names


def _no_list(path: pathlib.Path) -> str | None:
    """What to do about a folder or a video where a list is expected; None for other files."""
    folder, files = (path, sorted(path.iterdir())) if path.is_dir() else (path.parent, [path])
    videos = [file.name for file in files if VIDEOS.fullmatch(file.name) and file.is_file()]
    if not path.is_dir() and not videos:
        return None
    line = {"video": videos[0] if videos else "dog.mp4", "caption": "a dog runs over a meadow"}
    return (
        f"{path} is a {'folder' if path.is_dir() else 'video'}; give a list of clips, a text file with a line for each that "
        f"says what it shows, such as {folder / 'clips.jsonl'} with the line\n{json.dumps(line, ensure_ascii=False)}"
    )


def _entries(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Where each clip of a list stands, and its JSON."""
    text = read_text(path)
    if text.lstrip().startswith("["):  # one JSON list
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}.") from None
        yield from ((f"{path} entry {number}", json.dumps(entry)) for number, entry in enumerate(entries, start=1))
    else:
        lines = enumerate(text_lines(text), start=1)
        yield from ((f"{path} line {number}", line) for number, line in lines if line.strip())


def read_lines(path: pathlib.Path) -> list[ClipLine]:
    """The clips that a file lists: a JSON object a line, or one JSON list.

    Raises:
        ValueError: no such file, another encoding, or lines that say something else; lists them with their numbers.
    """
    if remedy := _no_list(path):
        raise ValueError(remedy)
    images.regular_file(path, MAX_LIST_BYTES, "list of clips")
    lines, problems = [], []
    for where, text in _entries(path):
        try:
            lines.append(parse_line(text, path.parent))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        more = f"\nand {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError("\n".join(problems[:SHOWN]) + more)
    if not lines:
        raise ValueError(f"{path} lists no clip.")
    return lines


ROUNDING = 5e-4  # seconds; times of streams are rounded to it


def _timed_frames(
    container: av.container.InputContainer, stream: av.VideoStream, start: float
) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """Frames from the last whole one before `start`; each with the seconds it begins at and is meant to last."""
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    tick = stream.time_base or fractions.Fraction(1)
    first = stream.start_time or 0
    if start > 0:
        container.seek(first + int(start / tick), stream=stream)
    begin = 0.0
    for frame in decode(container, stream):
        # Its own time base: that of a filter may be finer.
        begin = begin if frame.time is None else frame.time - float(first * tick)
        duration = float(frame.duration * (frame.time_base or tick)) if frame.duration else 1 / rate if rate else 0.0
        yield begin, duration, frame
        begin += duration


def _picture(frame: av.VideoFrame, pixel_aspect: fractions.Fraction | None) -> Image.Image:
    """A frame as a player shows it: its pixels square, and upright."""
    if frame.is_corrupt:
        raise ValueError("a frame is damaged")
    image = Image.fromarray(to_rgb(frame))
    if pixel_aspect and pixel_aspect != 1:
        image = image.resize((max(round(image.width * pixel_aspect), 1), image.height), Image.Resampling.LANCZOS)
    return Image.fromarray(upright(np.asarray(image), frame))


def cut_clip(
    path: pathlib.Path, cut: Cut, start: float = 0.0, end: float | None = None, crop: Box | None = None
) -> UInt8[np.ndarray, "N H W 3"]:
    """The frames on screen at `start`, `start` + 1/fps, ... seconds, cropped, resized and cut in the middle.

    Raises:
        ValueError: no video, a damaged one, or one too short; `av.FFmpegError` where the decoder gives up.
    """
    images.regular_file(path, MAX_VIDEO_BYTES, "video file")
    frames = _cut(path, cut, start, end, crop, seek=start > 0)
    if frames is None:  # the file's index is wrong
        frames = _cut(path, cut, start, end, crop, seek=False)
    return cast(np.ndarray, frames)


def _cut(
    path: pathlib.Path, cut: Cut, start: float, end: float | None, crop: Box | None, seek: bool
) -> np.ndarray | None:
    """`cut_clip` with or without a jump to its start; None if the jump went too far."""
    end = math.inf if end is None else end
    frames: list[np.ndarray] = []

    def show(frame: av.VideoFrame, until: float) -> None:
        """Takes a frame for every time that comes before `until` and was not taken care of."""
        count = math.ceil((min(until, end) - ROUNDING - start) * cut.fps)
        repeats = min(count, cut.num_frames) - len(frames)
        if repeats > 0:
            picture = _picture(frame, stream.sample_aspect_ratio)
            if crop is not None:
                if crop[2] > picture.width or crop[3] > picture.height:
                    raise ValueError(f"crop={crop} is not inside its {picture.width}x{picture.height} pixels")
                picture = picture.crop(crop)
            pixels, _ = resize_and_crop(picture, (0, 0, cut.width, cut.height))
            frames.extend([pixels] * repeats)

    with open_video(path, options={"protocol_whitelist": "file"}) as container:
        stream = video_stream(container)
        stream.codec_context.thread_count = 1  # clips are decoded side by side instead
        shown, until = None, 0.0
        for begin, duration, frame in _timed_frames(container, stream, start if seek else 0.0):
            if shown is None and seek and begin > start + ROUNDING:
                return None
            if shown is not None:
                show(shown, begin)
            shown, until = frame, begin + duration
            if len(frames) == cut.num_frames or begin >= end:
                break
        if shown is not None:
            show(shown, until)
    if len(frames) == cut.num_frames:
        return np.stack(frames)
    raise ValueError(
        f"it is too short: {max(min(until, end) - start, 0):.2f} s from start={start:g}; "
        f"{cut.num_frames} frames at {cut.fps:g} a second are {cut.num_frames / cut.fps:.2f} s"
    )


def read_reference(path: pathlib.Path, box: tuple[int, int]) -> bytes:
    """A reference image as PNG, upright, in sRGB, with its alpha, not larger than a canvas of this size can show.

    Raises:
        ValueError: as `images.read_image`.
    """
    picture = images.read_image(path, keep_alpha=True)
    scale = min(box[0] / picture.width, box[1] / picture.height)
    if scale < 1:
        size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def find_labels(caption: str, labels: Sequence[str]) -> tuple[Span | None, ...]:
    """Where a caption names each reference; of equal labels, the second takes the second occurrence, if there is one."""
    seen: collections.Counter[str] = collections.Counter()
    spans: list[Span | None] = []
    for label in labels:
        found = list(occurrences(caption, label)) if label else []
        spans.append(found[min(seen[label], len(found) - 1)] if found else None)
        seen[label] += 1
    return tuple(spans)


def make_record(line: ClipLine, cut: Cut) -> ClipRecord | Skipped:
    """The record of a line, or why there is none: whatever its files do to those who read them, other clips do not suffer."""
    try:
        labels = [reference.label for reference in line.references]
        captions = tuple(Caption(caption, find_labels(caption, labels)) for caption in line.captions)
        for number, label in enumerate(labels):
            if label and all(caption.label_spans[number] is None for caption in captions):
                raise ValueError(f"no caption has the label {label!r}")
        references = tuple(
            ReferenceRecord(
                reference.label,
                tuple(
                    View(read_reference(path, (cut.width, cut.height)), origin)
                    for path, origin in zip(reference.images, reference.origins, strict=True)
                ),
                reference.role,
                reference.identity,
            )
            for reference in line.references
        )
        frames = cut_clip(line.video, cut, line.start, line.end, line.crop)
    except Exception as error:
        return Skipped.because_of(line.id, error)
    return ClipRecord(
        id=line.id,
        num_frames=cut.num_frames,
        height=cut.height,
        width=cut.width,
        fps=cut.fps,
        captions=captions,
        references=references,
        source=line.source,
        frames=frames if cut.store == "frames" else None,
        video=_to_mp4(frames, cut.fps) if cut.store == "mp4" else None,
    )


def _to_mp4(frames: UInt8[np.ndarray, "N H W 3"], fps: float) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "clip.mp4"
        encode_video(path, frames, fps, scale=1)
        return path.read_bytes()


def _check_cut(cut: Cut) -> None:
    for name in ("num_frames", "height", "width"):
        if getattr(cut, name) < 1:
            raise ValueError(f"{name}={getattr(cut, name)} must be 1 or more.")
    if cut.store == "mp4" and (cut.height % 2 or cut.width % 2):
        raise ValueError(f"size={cut.height}x{cut.width} must have even sides with store=mp4; store=frames takes any.")
    frame_rate(cut.fps)


def prepare(
    clips: pathlib.Path,
    out: pathlib.Path,
    cut: Cut,
    *,
    shard_records: int = 1024,
    num_threads: int = 4,
) -> RecordSource:
    """Writes the records of the clips that a file lists; continues what is unfinished.

    Raises:
        ValueError: an argument or a line that is wrong, or `out` holds records of another file or cut.
        TooManySkippedError: more than 1 % of the clips, and more than a few, or all of them cannot be used.
    """
    _check_cut(cut)
    if num_threads < 1:
        raise ValueError(f"num_threads={num_threads} must be 1 or more.")
    lines = read_lines(clips)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)

    def make(start: int) -> Iterator[ClipRecord | Skipped]:
        dataset = grain.MapDataset.source(lines)[start:].map(lambda line: make_record(line, cut))
        yield from tqdm(
            dataset.to_iter_dataset(options), desc="preparing", unit="clip", initial=start, total=len(lines)
        )

    return write_records(
        out,
        make,
        len(lines),
        shard_records=shard_records,
        settings={"clips": file_digest(clips), **dataclasses.asdict(cut)},
        max_skipped=max(MAX_SKIPPED, len(lines) // 100),
    )


@dataclasses.dataclass(frozen=True)
class Arguments:
    """From videos to records."""

    clips: tyro.conf.Positional[pathlib.Path]  # JSONL, one clip a line
    out: pathlib.Path  # folder for the records
    size: str = "480x832"  # height x width in pixels
    num_frames: int = 81
    fps: float = 16.0
    store: Literal["frames", "mp4"] = "mp4"  # frames: exact, and about 50 times as large
    shard_records: int = 1024  # clips of a file
    num_threads: int = 4


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    with program("data.prepare"):
        check_local("clips", arguments.clips)
        check_local("--out", arguments.out)
        if not (size := re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", arguments.size)):
            raise ValueError(f"size={arguments.size!r} must be HEIGHTxWIDTH, such as 480x832.")
        height, width = map(int, size.groups())
        cut = Cut(height, width, arguments.num_frames, arguments.fps, arguments.store)
        began = time.monotonic()
        try:
            with claimed("data.prepare", arguments.out):
                source = prepare(
                    arguments.clips,
                    arguments.out,
                    cut,
                    shard_records=arguments.shard_records,
                    num_threads=arguments.num_threads,
                )
        except TooManySkippedError as error:
            remedy = "More than 1 % of the clips cannot be used: mend or remove their lines."
            raise TooManySkippedError(f"{error}\n{remedy}") from None
    for skipped in source.skipped:
        print(f"left out: {skipped.id}: {skipped.reason}")
    print(
        f"{len(source)} records in {arguments.out}, {len(source.skipped)} clips left out; "
        f"{len(source) / (time.monotonic() - began):.2f} records/s, {source.num_bytes / len(source) / 1e6:.3f} MB a clip"
    )


if __name__ == "__main__":
    main()
