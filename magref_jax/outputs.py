"""What a run leaves in its folder, and how the next run goes on where it was killed.

    KEY.mp4             the video
    KEY_canvas.png      the canvas with the place and the words of each reference
    KEY.json            the sidecar: settings, and sha256 of the two files above
    contact_sheet.png   the first 24 videos of the latest run
    run.json            versions, device and timings of the latest run
    .lock               while a run writes to the folder: who that is

A case is known by the digest of its settings. Its sidecar is written last and says that the case is finished. Equal
settings give equal bytes in all files but run.json, whether a run was interrupted or not: nothing in them knows the time
or the machine, and the contact sheet is made from the finished files.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from PIL import Image

from magref_jax.checkpoint import file_digest
from magref_jax.conditioning.canvas import Box, Canvas, draw_regions
from magref_jax.config import DType, ModelConfig
from magref_jax.files import replacing
from magref_jax.video import (
    TILE_HEIGHT,
    SheetRow,
    contact_sheet,
    default_scale,
    encode_video,
    evenly_spaced,
    fit_tile,
    read_frames,
)

SHEET_ROWS = 24  # videos on the contact sheet; more would not fit a screen
SHEET_CAPTION = 300  # characters
TABLE_LINES = 40  # of the summary
RESERVED_KEYS = ("run",)  # its sidecar would be run.json


class FileSettings(TypedDict):
    """A file that a video depends on: by its contents, and by its name, which the sidecar shows."""

    file: str
    sha256: str


class ReferenceSettings(FileSettings):
    words: str | None
    role: Literal["subject", "background"]


class LoraSettings(FileSettings):
    strength: float


class CaseSettings(TypedDict):
    """Everything that the files of a case depend on, as JSON holds it.

    Not the mesh, the batch size or the other cases, which change nothing or the last bits, and no folders.
    """

    key: str
    prompt: str
    seed: int
    references: list[ReferenceSettings]
    order: int | str | Sequence[int | None] | None  # of the canvas; None: by seed and key
    sampling: dict[str, Any]  # the resolved SamplingConfig
    model: FileSettings  # the folder's name, sha256 of its MANIFEST.json
    dtype: str  # that the networks compute in; see `compute_dtype`
    loras: list[LoraSettings]
    step_plan: dict[str, Any] | None
    strict_parity: bool
    fps: float
    store_metadata: bool  # whether the mp4 tells all this too


class StoredFile(TypedDict):
    file: str
    bytes: int
    sha256: str


class StoredVideo(StoredFile):
    num_frames: int
    height: int  # pixels of the model; the file has `scale` times as many
    width: int
    fps: float
    scale: int


class PlacedReference(TypedDict):
    words: str | None
    role: str
    box: Box  # where the image itself lies on the canvas: (x0, y0, x1, y1) in pixels, x1 and y1 excluded
    cell: Box  # with the white around it


class Sidecar(TypedDict):
    digest: str
    settings: CaseSettings
    video: StoredVideo
    canvas: StoredFile
    references: list[PlacedReference]


class CaseFiles(NamedTuple):
    video: pathlib.Path
    canvas: pathlib.Path
    sidecar: pathlib.Path


def case_files(out: pathlib.Path, key: str) -> CaseFiles:
    """Where the files of a case are, or will be.

    Raises:
        ValueError: a key that is not a plain file name, or one whose files would be those of the run.
    """
    if not key or key in (".", "..") or re.search(r"[/\\\0]", key):
        raise ValueError(f"key={key!r} must be a file name without folders.")
    if key.casefold() in RESERVED_KEYS:
        raise ValueError(f"key={key!r} is taken: {key}.json describes the whole run. Choose another key.")
    return CaseFiles(out / f"{key}.mp4", out / f"{key}_canvas.png", out / f"{key}.json")


def file_settings(path: pathlib.Path) -> FileSettings:
    """The name and sha256 of a file; of a model folder, its own name and the sha256 of its manifest."""
    if path.is_dir():
        return {"file": path.resolve().name, "sha256": file_settings(path / "MANIFEST.json")["sha256"]}
    facts = path.stat()
    return {"file": path.name, "sha256": _known_sha256(path.resolve(), facts.st_mtime_ns, facts.st_size)}


@functools.lru_cache(maxsize=4096)
def _known_sha256(path: pathlib.Path, mtime_ns: int, size: int) -> str:
    del mtime_ns, size  # another file by these is read anew; thousands of lines may name the same one
    return file_digest(path)


def compute_dtype(config: ModelConfig) -> str:
    """What the networks compute in: "float32", or where they differ "bfloat16, vae float32"."""
    names = ("dit", "vae", "text_encoder", "image_encoder")
    dtypes: dict[str, DType] = {
        name: getattr(config, name).dtype for name in names if getattr(config, name) is not None
    }
    common = dtypes["dit"]
    return ", ".join([common, *(f"{name} {dtype}" for name, dtype in dtypes.items() if dtype != common)])


def case_digest(settings: CaseSettings) -> str:
    """sha256 of the settings as canonical JSON.

    Raises:
        ValueError: a name that is missing or unknown, a number that is not finite, or text that UTF-8 cannot hold.
    """
    names = CaseSettings.__required_keys__
    if different := sorted(set(settings) ^ names):
        raise ValueError(f"settings are {', '.join(sorted(names))}; {different[0]!r} is missing or not one of them.")
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        return hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[error.start : error.end]!r} in the prompt or a name is half a character.") from None


def read_sidecar(out: pathlib.Path, key: str) -> Sidecar | None:
    """The sidecar of a case; None where there is none, or a file that is something else."""
    try:
        sidecar: Any = json.loads(case_files(out, key).sidecar.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(sidecar, dict) or set(sidecar) != Sidecar.__required_keys__:
        return None
    parts = {"settings": CaseSettings, "video": StoredVideo, "canvas": StoredFile}
    ours = all(
        isinstance(sidecar[name], dict) and set(sidecar[name]) == parts[name].__required_keys__ for name in parts
    )
    return cast(Sidecar, sidecar) if ours else None


def is_finished(out: pathlib.Path, key: str, digest: str) -> bool:
    """Whether a case was written with these settings, and its files are what was written."""
    sidecar = read_sidecar(out, key)
    if sidecar is None or sidecar["digest"] != digest:
        return False
    paths = case_files(out, key)
    return all(
        path.is_file() and path.stat().st_size == stored["bytes"] and file_digest(path) == stored["sha256"]
        for path, stored in ((paths.video, sidecar["video"]), (paths.canvas, sidecar["canvas"]))
    )


def existing(out: pathlib.Path, keys: Iterable[str]) -> list[pathlib.Path]:
    """The files of these cases that are there already."""
    return [path for key in keys for path in case_files(out, key) if os.path.lexists(path)]


def check_folder(out: pathlib.Path) -> None:
    """Refuses a folder that cannot be written to, or made; nothing is written.

    Raises:
        ValueError: names what is in the way.
    """
    above = next(folder for folder in (out, *out.absolute().parents) if os.path.lexists(folder))
    if not above.is_dir():
        raise ValueError(f"{above} is a file; it must be a folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{above} may not be written to.")


def keep_finished(
    out: pathlib.Path, cases: Sequence[CaseSettings], *, resume: bool = False, overwrite: bool = False
) -> frozenset[str]:
    """The keys of the cases that are finished and need not be made again; nothing is written.

    With `resume`, finished cases are kept and the others made; files of other settings are in the way unless `overwrite`
    is given too. With `overwrite` alone, all cases are made. With neither, there must be nothing to overwrite.

    Raises:
        ValueError: names what is in the way and says what can be done.
    """
    check_folder(out)
    found = existing(out, [case["key"] for case in cases])
    if blocked := [path for path in found if path.is_dir()]:
        raise ValueError(f"{_listed([f'{path} is a folder' for path in blocked])}, where a file must go.")
    if not resume:
        if found and not overwrite:
            raise ValueError(
                f"{_listed([path.name for path in found])} exist{'s' if len(found) == 1 else ''} already. Give --resume to "
                "keep what is finished and make the rest, --overwrite to make all anew, or another --out."
            )
        return frozenset()

    sidecars = {path.name for path in found if path.suffix == ".json"}
    kept, changed = set(), []
    for case in cases:
        key, digest = case["key"], case_digest(case)
        if is_finished(out, key, digest):
            kept.add(key)
        # Without a sidecar, the files are those of a run that was killed while it wrote them.
        elif f"{key}.json" in sidecars:
            sidecar = read_sidecar(out, key)
            if sidecar is None:
                changed.append(f"{key}.json was not written by this program, or by another version of it")
            elif sidecar["digest"] != digest:
                changed.append(f"{key} was made with other settings ({_changes(sidecar['settings'], case)})")
    if changed and not overwrite:
        raise ValueError(
            f"{_listed(changed, '; ')}. Give --overwrite too, to make these anew, or another --out to keep both."
        )
    return frozenset(kept)


def _listed(items: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    more = f"{separator}and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Which settings differ, with their values where these are short."""
    before, after = _flat(old), _flat(json.loads(json.dumps(new)))
    changes = []
    for name in before | after:
        was, now = (json.dumps(flat[name], ensure_ascii=False) if name in flat else "none" for flat in (before, after))
        if was != now:
            changes.append(f"{name} {was}, now {now}" if len(was) + len(now) <= 40 else name)
    return _listed(changes, "; ", most=4)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def write_case(
    out: pathlib.Path, settings: CaseSettings, frames: UInt8[np.ndarray, "F H W 3"], canvas: Canvas
) -> Sidecar:
    """Writes the files of a case. All three are complete before the first takes its name, and the sidecar is the last."""
    paths, digest = case_files(out, settings["key"]), case_digest(settings)
    placed = list(zip(settings["references"], canvas.regions, canvas.cells, strict=True))
    # The innermost is renamed first.
    with replacing(paths.sidecar) as sidecar_part, replacing(paths.canvas) as canvas_part:
        picture = draw_regions(canvas, [reference["words"] or "" for reference in settings["references"]])
        picture.save(canvas_part, format="PNG")
        with replacing(paths.video) as video_part:
            scale = default_scale(*frames.shape[1:3])
            metadata = dict(settings) if settings["store_metadata"] else None
            parameters = parameters_text(settings) if settings["store_metadata"] else None
            encode_video(video_part, frames, settings["fps"], metadata, parameters=parameters, scale=scale)
            sidecar: Sidecar = {
                "digest": digest,
                "settings": settings,
                "video": {
                    **_stored(paths.video, video_part),
                    "num_frames": frames.shape[0],
                    "height": frames.shape[1],
                    "width": frames.shape[2],
                    "fps": settings["fps"],
                    "scale": scale,
                },
                "canvas": _stored(paths.canvas, canvas_part),
                "references": [
                    {"words": reference["words"], "role": reference["role"], "box": box, "cell": cell}
                    for reference, box, cell in placed
                ],
            }
            _write_json(sidecar_part, sidecar)
            # From here on the old sidecar would speak of files that are being replaced.
            paths.sidecar.unlink(missing_ok=True)
    return sidecar


def _stored(path: pathlib.Path, part: pathlib.Path) -> StoredFile:
    return {"file": path.name, "bytes": part.stat().st_size, "sha256": file_digest(part)}


def _write_json(path: pathlib.Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def parameters_text(settings: CaseSettings) -> str:
    """The settings as the text under `parameters` that sites for generated media read, in AUTOMATIC1111's format."""
    sampling = settings["sampling"]
    facts = {
        "Steps": sampling["num_inference_steps"],
        "Sampler": sampling["solver"],
        "CFG scale": sampling["guidance_scale"],
        "Shift": sampling["flow_shift"],
        "Seed": settings["seed"],
        "Size": f"{sampling['width']}x{sampling['height']}",
        "Frames": sampling["num_frames"],
        "Model": settings["model"]["file"],
    }
    of_references = sampling["reference_guidance_scale"]
    if of_references != 1:
        facts["Reference CFG scale"] = sampling["guidance_scale"] if of_references is None else of_references
    if settings["loras"]:
        facts["Lora"] = ", ".join(f"{lora['file']}: {lora['strength']}" for lora in settings["loras"])
    # Quotes where the text would look like several facts.
    quoted = {
        name: json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", str(value)) else value
        for name, value in facts.items()
    }
    lines = [settings["prompt"]]
    if sampling["negative_prompt"]:
        lines.append(f"Negative prompt: {sampling['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in quoted.items())])


def write_contact_sheet(
    out: pathlib.Path,
    digests: Mapping[str, str],
    read_references: Callable[[str], Sequence[Image.Image]] = lambda key: (),
) -> pathlib.Path | None:
    """One row per finished case, at most 24, in the order of `digests`; None if no case is finished.

    Everything but the references is read from the files, one case at a time: frames in memory do not add up.

    Args:
        out: The folder of the run.
        digests: Of its cases, by key.
        read_references: The reference images of a key.
    """
    rows: list[SheetRow] = []
    for key, digest in digests.items():
        sidecar = read_sidecar(out, key)
        if sidecar is None or sidecar["digest"] != digest:
            continue
        paths, stored = case_files(out, key), sidecar["video"]
        frames = read_frames(paths.video, evenly_spaced(stored["num_frames"]))
        with Image.open(paths.canvas) as canvas:
            tile = fit_tile(canvas)
        caption = f"{key}: {sidecar['settings']['prompt']}"
        rows.append(
            {
                "references": [fit_tile(image, TILE_HEIGHT, TILE_HEIGHT) for image in read_references(key)],
                "canvas": tile,
                "frames": np.stack([np.asarray(fit_tile(_shrink(frame, stored["scale"]))) for frame in frames]),
                "caption": caption if len(caption) <= SHEET_CAPTION else f"{caption[:SHEET_CAPTION]} ...",
            }
        )
        if len(rows) == SHEET_ROWS:
            break
    if not rows:
        return None
    with replacing(out / "contact_sheet.png") as part:
        contact_sheet(rows).save(part, format="PNG")
    return out / "contact_sheet.png"


def _shrink(frame: UInt8[np.ndarray, "H W 3"], scale: int) -> Image.Image:
    """Means of scale x scale pixels, in whole numbers, so that every machine rounds alike."""
    height, width, channels = frame.shape
    blocks = frame.reshape(height // scale, scale, width // scale, scale, channels)
    return Image.fromarray(((blocks.sum((1, 3), dtype=np.uint32) + scale**2 // 2) // scale**2).astype(np.uint8))


@dataclasses.dataclass(frozen=True)
class CaseReport:
    """How a case went. `status` is "written", "kept" or "failed: " and the reason."""

    key: str
    status: str
    height: int  # pixels
    width: int
    num_frames: int
    num_inference_steps: int
    seconds: float | None = None
    seconds_per_step: float | None = None
    num_bytes: int | None = None  # of the mp4

    @classmethod
    def of(
        cls, sidecar: Sidecar, status: str, seconds: float | None = None, seconds_per_step: float | None = None
    ) -> "CaseReport":
        """The report of a case whose files are there."""
        video, settings = sidecar["video"], sidecar["settings"]
        return cls(
            key=settings["key"],
            status=status,
            height=video["height"],
            width=video["width"],
            num_frames=video["num_frames"],
            num_inference_steps=settings["sampling"]["num_inference_steps"],
            seconds=seconds,
            seconds_per_step=seconds_per_step,
            num_bytes=video["bytes"],
        )


def write_run(
    out: pathlib.Path,
    reports: Sequence[CaseReport],
    *,
    arguments: Sequence[str],
    config: ModelConfig,
    timings: Mapping[str, float],
    mesh: Mesh | None = None,
) -> None:
    """Writes run.json, which is the only file that knows the machine.

    Args:
        out: The folder of the run.
        reports: One per case; a case that was not reached has none.
        arguments: The command line as it was typed, so that paths are what the user wrote.
        config: Of the model, with the sampling options of the run.
        timings: Seconds by name: loading, compiling, a step, decoding, writing.
        mesh: None is one device.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    packages = ("magref-jax", "jax", "jaxlib", "flax", "numpy", "av", "pillow")
    with replacing(out / "run.json") as part:
        _write_json(
            part,
            {
                "arguments": list(arguments),
                "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
                "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
                "mesh": None if mesh is None else dict(mesh.shape),
                "dtype": compute_dtype(config),
                "peak_memory_bytes": peak_memory(),
                "seconds": {name: round(value, 3) for name, value in timings.items()},
                "cases": [_rounded(dataclasses.asdict(report)) for report in reports],
                "config": dataclasses.asdict(config),
            },
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
        return None


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}


def peak_memory() -> dict[str, int]:
    """The most bytes this process has held: on the host, and on the fullest device where the platform counts them."""
    peaks = {}
    if os.name == "posix":
        import resource  # there is none on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    counted = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if known := [peak for peak in counted if peak is not None]:
        peaks["device"] = max(known)
    return peaks


def summary_table(reports: Sequence[CaseReport]) -> str:
    """One line per video and a total, aligned. Of a long run the failures come first, and the table ends at 40 lines."""
    header = ("video", "size x frames", "steps", "s/step", "seconds", "file")
    shown = list(reports)
    most = TABLE_LINES - 2  # header and total
    if len(shown) > most:
        failed = [index for index, report in enumerate(reports) if report.status.startswith("failed")]
        others = [index for index in range(len(reports)) if index not in set(failed)]
        shown = [reports[index] for index in sorted([*failed, *others][: most - 1])]
    rows = [header, *map(_cells, shown)]
    widths = [max(_columns(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for row in rows:
        # Names and files to the left, numbers to the right.
        padding = [" " * (width - _columns(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [
            cell + space if column in (0, 5) else space + cell
            for column, (cell, space) in enumerate(zip(row, padding, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    if len(shown) < len(reports):
        lines.append(f"... and {len(reports) - len(shown)} more")
    counts = Counter(report.status.partition(":")[0] for report in reports)
    seconds = sum(report.seconds or 0.0 for report in reports)
    lines.append(
        f"{len(reports)} video{'' if len(reports) == 1 else 's'}: "
        + ", ".join(f"{counts[status]} {status}" for status in ("written", "kept", "failed") if counts[status])
        + f"; {seconds:.1f} s, {_size(sum(report.num_bytes or 0 for report in reports))}"
    )
    return "\n".join(lines)


def _cells(report: CaseReport) -> tuple[str, ...]:
    if report.status.startswith("failed"):
        last = _cut(report.status, 80)
    else:
        last = _size(report.num_bytes or 0) + (", kept" if report.status == "kept" else "")
    return (
        _cut(report.key, 32),
        f"{report.width}x{report.height}x{report.num_frames}",
        str(report.num_inference_steps),
        "" if report.seconds_per_step is None else f"{report.seconds_per_step:.2f}",
        "" if report.seconds is None else f"{report.seconds:.1f}",
        last,
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"


def _columns(text: str) -> int:
    """How wide a terminal shows it: Chinese characters take two columns, combining accents none."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def _cut(text: str, columns: int) -> str:
    text = " ".join(text.split())
    if _columns(text) <= columns:
        return text
    while _columns(text) > columns - 3:
        text = text[:-1]
    return f"{text}..."
