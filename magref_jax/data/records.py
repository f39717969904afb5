"""What a training clip is, on disk and in memory: frames or their latents, captions, and the references that belong to them.

One schema from a handful of home videos to half a million clips. A record is self-contained and read at random, so that a
shuffled, resumable epoch needs no index but the shards themselves. How references are chosen, paired and laid out is decided
when a record is drawn, not when it is written: `views` holds every picture of a reference that may stand in for another.

N frames of a clip · F latent frames · h/w latent height, width · C latent channels · T text tokens · S subjects
"""

import bisect
import concurrent.futures
import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import ml_dtypes  # noqa: F401  np.dtype knows bfloat16 from here on
import msgpack
import numpy as np
from jaxtyping import Float, Int, UInt8

from magref_jax.checkpoint import file_digest
from magref_jax.command import EXPECTED, check_output_folder, sentence
from magref_jax.conditioning.canvas import Role
from magref_jax.descriptions import short_repr
from magref_jax.distributed import is_first, on_first
from magref_jax.files import Claim, remove_leftovers, replacing

Origin = Literal["in_pair", "cross_clip", "generated"]  # cut from this clip, from another one, or made from a view


@dataclasses.dataclass(frozen=True)
class View:
    """One picture of a reference: a cut-out with alpha, PNG or WEBP."""

    image: bytes
    origin: Origin = "in_pair"


@dataclasses.dataclass(frozen=True)
class ReferenceRecord:
    label: str  # the words of the captions that name it
    views: tuple[View, ...]
    role: Role = "subject"
    identity: str = ""  # equal for one thing in several clips; "": not known


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class Caption:
    text: str
    label_spans: tuple[tuple[int, int] | None, ...]  # one per reference: characters of `text`; None: not named here
    embeddings: Float[np.ndarray, "T D"] | None = None  # of the text encoder, without padding


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """The encoder's posterior over normalised latents: mean + std · ε is a sample."""

    mean: Float[np.ndarray, "F h w C"]
    std: Float[np.ndarray, "F h w C"]


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class EncodedCase:
    """One caption with one choice of views on one canvas, after the frozen encoders: what a training step reads.

    It belongs to its layout: the canvas reaches every latent of the causal encoder, so that neither the reference latents
    nor a target that begins with the canvas can be shared or cropped. Fields see `Conditioning`, without the batch axis.
    """

    caption: int  # which caption; its embeddings are there
    clean_latents: Float[np.ndarray, "F h w C"]
    subject_cells: Float[np.ndarray, "F h w"]
    reference_latents: Float[np.ndarray, "F h w C"] | None
    region_mask: Float[np.ndarray, "F h w 4"] | None
    image_embeddings: Float[np.ndarray, "I E"] | None
    subject_tokens: Float[np.ndarray, "S T"]
    subject_regions: Float[np.ndarray, "S L0"]


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class ClipRecord:
    """A clip. It has `frames`, `video` or `latents`; `cases` once it was encoded."""

    id: str
    num_frames: int
    height: int  # pixels
    width: int  # pixels
    fps: float
    captions: tuple[Caption, ...]
    references: tuple[ReferenceRecord, ...]
    source: str = ""  # where the clip comes from
    frames: UInt8[np.ndarray, "N H W 3"] | None = None
    video: bytes | None = None  # mp4, for clips too long to keep as frames
    subject_boxes: Int[np.ndarray, "S N 4"] | None = None  # x0 y0 x1 y1 in pixels, where a tracker found the subjects
    latents: Latents | None = None  # of the clip without a canvas
    cases: tuple[EncodedCase, ...] = ()


Size = tuple[int, int, int]  # frames, height, width of a clip


class Source(Protocol):
    """Random access to records. `sizes` are known without reading a record: batches hold clips of one size."""

    sizes: Sequence[Size]
    num_references: Sequence[int] | None  # None: known only from the records themselves
    fingerprint: str  # changes when the records or their order do

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ClipRecord: ...


def check_record(record: ClipRecord) -> None:
    """Refuses a record whose parts contradict each other.

    Raises:
        ValueError: names the record and the field.
    """
    shape = (record.num_frames, record.height, record.width, 3)
    if record.frames is None and record.video is None and record.latents is None and not record.cases:
        raise ValueError(f"record {record.id!r} has none of frames, video, latents and cases.")
    if record.frames is not None and record.frames.shape != shape:
        raise ValueError(f"record {record.id!r} has frames {record.frames.shape}, its sizes say {shape}.")
    if not record.captions:
        raise ValueError(f"record {record.id!r} has no caption.")
    for caption in record.captions:
        if len(caption.label_spans) != len(record.references):
            raise ValueError(
                f"record {record.id!r} has {len(record.references)} references and a caption with "
                f"{len(caption.label_spans)} label_spans; give one each, or None."
            )
        for span in filter(None, caption.label_spans):
            if not 0 <= span[0] < span[1] <= len(caption.text):
                raise ValueError(f"record {record.id!r}: span {span} is not inside {caption.text!r}.")
    for reference in record.references:
        if not reference.views:
            raise ValueError(f"record {record.id!r}: reference {reference.label!r} has no view.")
    for case in record.cases:
        if not 0 <= case.caption < len(record.captions):
            raise ValueError(f"record {record.id!r} has a case of caption {case.caption}, of {len(record.captions)}.")


VERSION = 1  # of the bytes of a record; raise it when a field changes its meaning
_ARRAY = 1  # extension type: name of the dtype, shape, values in C order

# What the fields are made of that hold more than numbers, text and arrays.
_PARTS: dict[type, dict[str, type]] = {
    ClipRecord: {"captions": Caption, "references": ReferenceRecord, "latents": Latents, "cases": EncodedCase},
    ReferenceRecord: {"views": View},
}


def encode_record(record: ClipRecord) -> bytes:
    """The bytes of a record, equal for equal records: a version and its fields by name, in msgpack.

    Raises:
        ValueError: as `check_record`.
    """
    check_record(record)

    def pack(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            # The name of a dtype does not tell the order of its bytes: they are written in that of this machine.
            values = np.ascontiguousarray(
                value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))
            )
            parts = [values.dtype.name, list(value.shape), values.reshape(-1).view(np.uint8).data]
            return msgpack.ExtType(_ARRAY, msgpack.packb(parts))
        if isinstance(value, np.generic):
            return value.item()
        # Shallow: `dataclasses.asdict` would copy every array.
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}

    return cast(bytes, msgpack.packb([VERSION, pack(record)], default=pack))


def decode_record(data: bytes) -> ClipRecord:
    """The record of `encode_record`. Its arrays are views of `data`'s copy and cannot be written to.

    Raises:
        ValueError: bytes of another version, or none of ours.
    """

    def unpack_array(code: int, data: bytes) -> np.ndarray:
        if code != _ARRAY:
            raise ValueError(f"an extension of type {code}")
        name, shape, values = msgpack.unpackb(data)
        return np.frombuffer(values, np.dtype(name)).reshape(shape)

    def build(cls: type, fields: dict[str, Any]) -> Any:
        for name, part in _PARTS.get(cls, {}).items():
            value = fields[name]
            if isinstance(value, tuple):
                fields[name] = tuple(build(part, each) for each in value)
            elif value is not None:
                fields[name] = build(part, value)
        return cls(**fields)

    try:
        version, fields = msgpack.unpackb(data, ext_hook=unpack_array, use_list=False)
    except Exception as error:  # whatever bytes that are no msgpack may lead to
        raise ValueError(f"no record: {error}") from None
    if version != VERSION:
        raise ValueError(f"a record of version {version!r}; this program reads version {VERSION}")
    try:
        return build(ClipRecord, fields)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"a record with other fields: {error}") from None


INDEX = "records.json"
PROGRESS = "records.unfinished.json"  # the index of what is there so far; becomes `INDEX` at the end


@dataclasses.dataclass(frozen=True)
class Skipped:
    """In the place of a record: an input that could not be made into one, and why."""

    id: str
    reason: str

    @classmethod
    def because_of(cls, id: str, error: Exception) -> "Skipped":
        """What ends the work on one input leaves out that input; if it may be a fault of ours, the reason has its type."""
        reason = re.sub(r"^\[Errno \d+\] ", "", sentence(error)).rstrip(
            "."
        )  # the numbers of FFmpeg tell nobody anything
        return cls(id, reason if isinstance(error, EXPECTED) else f"{type(error).__name__}: {reason}")


class TooManySkippedError(ValueError):
    """More inputs were skipped than the caller allowed."""


@dataclasses.dataclass(frozen=True)
class _Shard:
    """An entry of the index; `inputs` is what it was made from, records and skipped ones."""

    file: str
    inputs: int
    bytes: int
    sha256: str
    runs: list[tuple[int, int, int, int, int]]  # records in a row with the same frames, height, width and references
    skipped: list[tuple[str, str]]  # id and reason


def write_records(
    folder: pathlib.Path,
    inputs: Sequence[ClipRecord] | Callable[[int], Iterable[ClipRecord | Skipped]],
    count: int | None = None,
    *,
    shard_records: int = 1024,
    shard_bytes: int = 2**30,
    settings: Mapping[str, Any] | None = None,
    max_skipped: int = 0,
) -> "RecordSource":
    """Writes records as ArrayRecord shards and an index, and opens them.

    A folder that is complete is only opened; one that is not is continued after its last whole shard. What it ends as does
    not depend on how often that happened.

    Args:
        folder: Where `records-00000.array_record`, ... and `records.json` go.
        inputs: The records, or a function that makes those from input i on, and `Skipped` for one without a record.
        count: Number of inputs, if `inputs` is a function.
        shard_records: Inputs of a shard, at most.
        shard_bytes: After which a shard is closed.
        settings: What the records were made with, as JSON has it; kept in the index.
        max_skipped: Inputs without a record that are too few to stop for.

    Raises:
        ValueError: the folder holds records of other settings, or a record contradicts itself.
        TooManySkippedError: there were more `Skipped` than `max_skipped`, or nothing else; lists the first.
        OSError: a shard cannot be written.
    """
    make = inputs if callable(inputs) else lambda start: inputs[start:]
    if count is None:
        count = len(cast(Sequence[ClipRecord], inputs))
    if count < 1:
        raise ValueError(f"there are no inputs to write to {folder}.")
    if shard_records < 1:
        raise ValueError(f"shard_records={shard_records} must be 1 or more.")
    about = {"version": VERSION, "inputs": count, "shard_records": shard_records, "shard_bytes": shard_bytes}
    about["settings"] = json.loads(json.dumps(settings or {}))
    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(folder, make, count, about, max_skipped)
    return RecordSource([folder])


@contextlib.contextmanager
def claimed(program: str, folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out of the folder that `--out` of a program names; all processes of a run enter it together.

    Raises:
        ValueError: another process has it, or it is none that could be written to.
    """
    check_output_folder("--out", folder)
    held = Claim(folder)
    try:
        if (note := on_first(held.take)) is not None and is_first():
            print(f"{program}: --out {note}", file=sys.stderr)
        yield
    finally:
        held.release()


def _write_shards(
    folder: pathlib.Path,
    make: Callable[[int], Iterable[ClipRecord | Skipped]],
    count: int,
    about: dict[str, Any],
    max_skipped: int,
) -> None:
    """What `write_records` does to its folder."""
    from array_record.python.array_record_module import ArrayRecordWriter

    remove_leftovers(folder)
    shards = _read_index(folder, about)
    done = sum(shard.inputs for shard in shards)
    pending = iter(make(done)) if done < count else iter(())
    _check_skipped(shards, max_skipped)
    while done < count:
        path = folder / f"records-{len(shards):05}.array_record"
        kinds: list[tuple[int, int, int, int]] = []
        skipped: list[tuple[str, str]] = []
        written = 0
        with replacing(path) as part:
            with _system_errors(path):
                writer = ArrayRecordWriter(str(part), "group_size:1")
            try:
                while (
                    len(kinds) + len(skipped) < min(about["shard_records"], count - done)
                    and written < about["shard_bytes"]
                ):
                    record = next(pending, None)
                    if record is None:
                        raise ValueError(f"inputs ended after {done + len(kinds) + len(skipped)} of count={count}.")
                    if isinstance(record, Skipped):
                        skipped.append((record.id, record.reason))
                        _check_skipped(shards, max_skipped, skipped)
                        continue
                    data = encode_record(record)
                    with _system_errors(path):
                        writer.write(data)
                    written += len(data)
                    kinds.append((record.num_frames, record.height, record.width, len(record.references)))
                if not kinds and done + len(skipped) == count and not any(shard.runs for shard in shards):
                    every = _shown(_all_skipped(shards, skipped))
                    raise TooManySkippedError(f"none of {count} inputs has a record: {every}")
            finally:
                with _system_errors(path):
                    writer.close()
        runs = [(len(list(group)), *kind) for kind, group in itertools.groupby(kinds)]
        size = path.stat().st_size
        shards.append(_Shard(path.name, len(kinds) + len(skipped), size, file_digest(path), runs, skipped))
        done += shards[-1].inputs
        with replacing(folder / PROGRESS) as part:
            part.write_text(json.dumps(about | {"shards": [vars(shard) for shard in shards]}, indent=1) + "\n")
    if not (folder / INDEX).is_file():
        (folder / PROGRESS).rename(folder / INDEX)


@contextlib.contextmanager
def _system_errors(path: pathlib.Path) -> Iterator[None]:
    """Errors of array_record as the system meant them: "write() failed: No space left on device; writing ..."."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written: {str(error).split(';')[0].removesuffix('.')}.") from None


def _read_index(folder: pathlib.Path, about: Mapping[str, Any]) -> list[_Shard]:
    """The whole shards of a folder that is to be continued or opened; none in a new one."""
    path = next((folder / name for name in (INDEX, PROGRESS) if (folder / name).is_file()), None)
    if path is None:
        return []
    index = _load_index(path)
    expected = {**about, **about["settings"]}
    found = {**index, **index.get("settings", {})}
    for name, value in expected.items():
        if name != "settings" and found.get(name) != value:
            raise ValueError(
                f"{folder} holds records made with {name}={found.get(name)!r}, now it is {value!r}; "
                "remove the folder or give another one."
            )
    return index["shards"]


def _load_index(path: pathlib.Path) -> dict[str, Any]:
    """An index, its shards read."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["version"]
        shards = index["shards"] if version != VERSION else [_Shard(**shard) for shard in index["shards"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged.") from None
    if version != VERSION:
        raise ValueError(f"{path} is of version {version!r}; this program reads version {VERSION}.")
    return index | {"shards": shards}


def _all_skipped(shards: Sequence[_Shard], more: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [*itertools.chain.from_iterable(shard.skipped for shard in shards), *more]


def _shown(skipped: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{id}: {reason}" for id, reason in skipped[:5])


def _check_skipped(shards: Sequence[_Shard], most: int, more: Sequence[tuple[str, str]] = ()) -> None:
    skipped = _all_skipped(shards, more)
    if len(skipped) > most:
        raise TooManySkippedError(f"{len(skipped)} inputs have no record, at most {most} may: {_shown(skipped)}")


@dataclasses.dataclass
class _Instruction:
    """What `ArrayRecordDataSource` needs to know of a shard, so that it need not open it to count."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class RecordSource:
    """Records of one or several folders that `write_records` completed. Threads may share it, processes a pickle of it."""

    def __init__(self, folders: Sequence[pathlib.Path]) -> None:
        """Reads the indices; the shards are opened when a record of theirs is asked for.

        Raises:
            FileNotFoundError: a folder or a shard is missing, or a folder is not complete.
            ValueError: a damaged index, or a shard of another length than the index says.
        """
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        if not folders:
            raise ValueError("no folder of records is given.")
        shards = [(folder, shard) for folder in folders for shard in _complete(folder)]
        self.skipped = [Skipped(*entry) for _, shard in shards for entry in shard.skipped]
        self.num_bytes = sum(shard.bytes for _, shard in shards)
        shards = [(folder, shard) for folder, shard in shards if shard.runs]
        self._shards = {str(folder / shard.file): shard.sha256 for folder, shard in shards}
        self.fingerprint = hashlib.sha256("".join(self._shards.values()).encode()).hexdigest()
        sizes: list[Size] = []
        num_references: list[int] = []
        self._ends: list[int] = []  # number of records up to the end of each shard
        for _, shard in shards:
            for count, frames, height, width, references in shard.runs:
                sizes += [(frames, height, width)] * count
                num_references += [references] * count
            self._ends.append(len(sizes))
        self.sizes: Sequence[Size] = sizes
        self.num_references: Sequence[int] | None = num_references
        if not sizes:
            raise ValueError(f"{', '.join(map(str, folders))}: there is no record; all inputs were skipped.")
        counts = [sum(run[0] for run in shard.runs) for _, shard in shards]
        self._records = ArrayRecordDataSource(
            [_Instruction(path, 0, count, count) for path, count in zip(self._shards, counts, strict=True)]
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> ClipRecord:
        """Reads a record.

        Raises:
            IndexError: there are not so many.
            ValueError: it is damaged; names the shard and the record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}.")
        try:
            return decode_record(self._records[index])
        except (RuntimeError, ValueError) as error:  # RuntimeError: of array_record
            shard = bisect.bisect_right(self._ends, index)
            first = self._ends[shard - 1] if shard else 0
            path = list(self._shards)[shard]
            raise ValueError(f"{path}: record {index - first} is damaged: {error}") from None

    def verify(self) -> None:
        """Compares every shard with its digest.

        Raises:
            ValueError: names the shards that differ.
        """
        with concurrent.futures.ThreadPoolExecutor() as pool:
            found = pool.map(file_digest, map(pathlib.Path, self._shards))
            damaged = [
                path for (path, expected), digest in zip(self._shards.items(), found, strict=True) if digest != expected
            ]
        if damaged:
            raise ValueError(f"damaged: {', '.join(damaged)}. Remove what was made from it and prepare it again.")


def _complete(folder: pathlib.Path) -> list[_Shard]:
    if not (folder / INDEX).is_file():
        if (folder / PROGRESS).is_file():
            index = _load_index(folder / PROGRESS)
            done = sum(shard.inputs for shard in index["shards"])
            raise FileNotFoundError(
                f"{folder} is unfinished, {done} of {index['inputs']} inputs are there; run what writes it again."
            )
        raise FileNotFoundError(f"{folder} has no records: there is no {INDEX}.")
    shards = _load_index(folder / INDEX)["shards"]
    for shard in shards:
        path = folder / shard.file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {INDEX} names it.")
        if path.stat().st_size != shard.bytes:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, {INDEX} says {shard.bytes}.")
    return shards


def open_records(paths: str | pathlib.Path | Sequence[str | pathlib.Path]) -> RecordSource:
    """The records of several folders, one after the other. A path may be a glob, whose folders come sorted by name.

    Raises:
        FileNotFoundError: nothing matches a path, or as `RecordSource`.
        ValueError: as `RecordSource`.
    """
    folders: list[pathlib.Path] = []
    for path in [paths] if isinstance(paths, str | pathlib.Path) else paths:
        found = [pathlib.Path(path)]
        if not found[0].exists():
            found = [pathlib.Path(name) for name in sorted(glob.glob(str(path)))]
        if not found:
            raise FileNotFoundError(f"no folder of records is at {path}.")
        folders += found
    return RecordSource(folders)
