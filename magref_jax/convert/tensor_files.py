"""Files of named tensors: safetensors in and out, torch's `.pth`, `.pt`, `.bin` and `.ckpt` in.

Headers first, then one tensor at a time.

A checkpoint of 65 GB passes through a machine of 16 GB because nothing here maps or reads a whole file. That is why the
safetensors format is read here and not by its library, which maps the file, cannot hand 8-bit floats to NumPy and in release
0.8 writes the memory of a transposed array instead of its values.
"""

import dataclasses
import json
import math
import pathlib
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from magref_jax.files import replacing

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")  # all of them are what torch.save writes
MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file."""

    name: str
    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    strides: tuple[int, ...] | None = None  # elements; None: row-major

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The values, row-major.

        Raises:
            ValueError: the file ends before the tensor does.
        """
        span = math.prod(self.shape)
        if self.strides is not None:
            last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
            span = 0 if 0 in self.shape else 1 + last
        with self.file.open("rb") as file:
            file.seek(self.offset)
            content = np.fromfile(file, np.uint8, span * self.dtype.itemsize)
        if len(content) != span * self.dtype.itemsize:
            raise ValueError(f"{self.file} ends inside {self.name!r}: the file is cut off.")
        if self.strides is None:
            return content.view(self.dtype).reshape(self.shape)
        # As whole numbers: NumPy makes no strided arrays of 8-bit floats.
        steps = [stride * self.dtype.itemsize for stride in self.strides]
        values = np.lib.stride_tricks.as_strided(content.view(f"u{self.dtype.itemsize}"), self.shape, steps)
        return values.copy(order="C").view(self.dtype)


@dataclasses.dataclass(frozen=True)
class StoredNumber(StoredTensor):
    """A number that a torch checkpoint holds as such, read as a tensor of no axes."""

    value: float = 0.0

    def read(self) -> np.ndarray:
        return np.asarray(self.value, self.dtype)


def read_safetensors(path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name and still unread.

    Raises:
        ValueError: no safetensors file, or a damaged one.
    """
    return _parse_header(path)[0]


def safetensors_metadata(path: pathlib.Path) -> dict[str, str]:
    """The texts that a file carries beside its tensors."""
    return _parse_header(path)[1]


def _parse_header(path: pathlib.Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError(
                f"{path} is no safetensors file, or it is cut off: {size} bytes, of which its header claims {length}."
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ does not map names to texts")
        tensors = {name: _parse_entry(path, name, entry, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
            if tensor.offset != end:
                raise ValueError(f"{tensor.name!r} begins at byte {tensor.offset}, expected {end}")
            end += tensor.num_bytes
    except (ValueError, RecursionError) as error:  # also JSON and UTF-8 errors
        raise ValueError(f"The header of {path} is damaged: {error}.") from None
    if end != size:
        problem = "is cut off" if size < end else "has bytes that belong to no tensor"
        raise ValueError(f"{path} {problem}: its header describes {end} bytes, the file has {size}.")
    return tensors, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _parse_entry(path: pathlib.Path, name: str, entry: Any, start: int) -> StoredTensor:
    def is_count(value: Any) -> bool:
        return type(value) is int and value >= 0

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name!r} is not dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name!r} has dtype {entry['dtype']!r}; known are {', '.join(_DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(map(is_count, shape)):
        raise ValueError(f"{name!r} has shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise ValueError(f"{name!r} has data_offsets {offsets!r}")
    tensor = StoredTensor(name, path, _DTYPES[entry["dtype"]], tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != tensor.num_bytes:
        raise ValueError(
            f"{name!r} has {offsets[1] - offsets[0]} bytes, expected {tensor.num_bytes} for {entry['dtype']} {shape}"
        )
    return tensor


def write_safetensors(
    path: pathlib.Path,
    specs: Mapping[str, tuple[np.dtype, Sequence[int]]],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors as `read` gives them, one at a time, in C order whatever their strides; appears when complete.

    Raises:
        ValueError: a tensor is not of the dtype or shape that `specs` says, or of a dtype that the format has not.
    """
    # Wider elements first, so that every tensor starts at a multiple of its element size.
    names = sorted(specs, key=lambda name: -np.dtype(specs[name][0]).itemsize)
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        dtype, shape = np.dtype(specs[name][0]), [int(size) for size in specs[name][1]]
        if dtype not in _DTYPE_NAMES:
            raise ValueError(f"{name!r} has dtype {dtype}, which safetensors has no name for.")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = np.asarray(read(name))
            dtype, shape = np.dtype(specs[name][0]), tuple(specs[name][1])
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(f"{name!r} is {array.dtype} {array.shape}, expected {dtype} {shape}.")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def read_pth(path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a torch checkpoint, by name and still unread.

    Raises:
        ImportError: torch is missing, or of a release whose restricted unpickler can be broken out of.
        ValueError: no zip archive of torch, a damaged one, or one that holds anything but named tensors.
    """
    content, records = _load_pth(path)
    if isinstance(content, dict) and len(content) == 1 and isinstance(next(iter(content.values())), dict):
        (content,) = content.values()  # such as {"state_dict": {...}}
    return _named_tensors(path, content, records)


def read_pth_levels(path: pathlib.Path, numbers: bool = False) -> dict[str, dict[str, StoredTensor]]:
    """The tensors of a torch checkpoint, by the dictionary that they lie in; with `numbers` plain numbers are tensors too.

    "" is the outermost dictionary, "a.b" the one at ["a"]["b"].
    What is no tensor is an error where there is but one dictionary, and left out beside others, as the step is that a
    trainer stopped at.

    Raises:
        ImportError: see `read_pth`.
        ValueError: see `read_pth`.
    """
    content, records = _load_pth(path)
    levels = dict(_levels(content, ""))
    plain = {
        level: tensors
        for level, values in levels.items()
        if (tensors := {name: value for name, value in values.items() if _is_named_tensor(name, value, numbers)})
    }
    if not plain:
        raise ValueError(f"{path} holds a {type(content).__name__} without tensors; expected tensors by name.")
    return {
        level: _named_tensors(path, values, records, numbers)
        for level, values in (levels if len(levels) == 1 else plain).items()
    }


def _levels(content: Any, level: str) -> Iterator[tuple[str, dict[Any, Any]]]:
    if not isinstance(content, dict):
        return
    inner = {name for name, value in content.items() if isinstance(name, str) and _holds_tensors(value)}
    if own := {name: value for name, value in content.items() if name not in inner}:
        yield level, own
    for name in inner:
        yield from _levels(content[name], f"{level}.{name}".lstrip("."))


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(
        _is_named_tensor(name, each) or (isinstance(name, str) and _holds_tensors(each)) for name, each in value.items()
    )


def _is_named_tensor(name: Any, value: Any, numbers: bool = False) -> bool:
    return isinstance(name, str) and (hasattr(value, "untyped_storage") or (numbers and type(value) in (int, float)))


def _load_pth(path: pathlib.Path) -> tuple[Any, dict[int, int]]:
    """What a checkpoint holds, its tensors without values, and its records. The only place that opens a pickle."""
    torch = import_torch(path)
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        records = _read_records(path)
    except Exception as error:  # what zipfile runs into in a damaged archive is of many types
        raise ValueError(
            f"{path} is no checkpoint that torch.save wrote as a zip archive, or it is cut off or damaged: {error}."
        ) from None
    try:
        # Fake tensors have no values, but know where in the file theirs are.
        with FakeTensorMode():
            return torch.load(path, map_location="cpu", weights_only=True), records
    except Exception as error:  # and so is what the unpickler refuses with
        raise ValueError(
            f"{path} holds something other than tensors, or is damaged, and was not loaded: {first_line(error)}"
        ) from None


def _named_tensors(
    path: pathlib.Path, content: Any, records: dict[int, int], numbers: bool = False
) -> dict[str, StoredTensor]:
    torch = import_torch(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds a {type(content).__name__}; expected tensors by name.")
    tensors: dict[str, StoredTensor] = {}
    for name, value in content.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: {name!r} is a {type(name).__name__}; expected the name of a tensor.")
        if numbers and type(value) in (int, float):
            tensors[name] = StoredNumber(name, path, np.dtype(np.float32), (), 0, value=float(value))
            continue
        if not torch.is_tensor(value):
            raise ValueError(f"{path}: {name!r} is a {type(value).__name__}; expected a tensor.")
        # A negated view has its sign in a flag, not in the file.
        storage = value.untyped_storage() if value.layout == torch.strided and not value.is_neg() else None
        offset = getattr(storage, "_checkpoint_offset", None)
        if storage is None or offset is None:
            raise ValueError(f"{path}: {name!r} is sparse, negated or without values; expected a plain tensor.")
        # Of fake tensors torch computes the places, and takes the sizes from the pickle; both may be wrong.
        if offset not in records:
            raise ValueError(
                f"{path}: {name!r} is not where torch.save puts it, so something else wrote this archive; "
                "load it in torch and save it again."
            )
        if records[offset] != storage.nbytes():
            raise ValueError(f"{path}: {name!r} takes {storage.nbytes()} bytes, but its record has {records[offset]}.")
        dtype = TORCH_DTYPES.get(str(value.dtype).removeprefix("torch."))
        if dtype is None:
            raise ValueError(f"{path}: {name!r} has dtype {value.dtype}; known are {', '.join(TORCH_DTYPES)}.")
        shape, strides = tuple(value.shape), tuple(value.stride())
        offset += value.storage_offset() * dtype.itemsize
        tensors[name] = StoredTensor(name, path, dtype, shape, offset, None if value.is_contiguous() else strides)
    return tensors


TORCH_DTYPES = {dtype.name: dtype for dtype in _DTYPES.values()}


def _read_records(path: pathlib.Path) -> dict[int, int]:
    """Bytes of every record of the archive, by where they begin; all but those of tensors agree with their checksums.

    Raises:
        ValueError: records that cannot be read from where they lie, as values of this machine.
    """
    sizes = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"record {record.filename!r} is compressed")
            if "/data/" not in record.filename:
                content = archive.read(record)
                if record.filename.endswith("/byteorder") and content != b"little":
                    raise ValueError(f"its byte order is {content!r}, expected b'little'")
            file.seek(record.header_offset + 26)
            sizes[record.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))] = record.file_size
    return sizes


def first_line(error: Exception) -> str:
    """The first line of an error's text, which torch follows with advice and its own stack; its type if it has no text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def import_torch(path: pathlib.Path) -> Any:
    """torch, of a release that opens files of strangers safely.

    Raises:
        ImportError: it is missing or too old.
    """
    needed = "pip install 'magref-jax[convert]'"
    try:
        import torch
    except ImportError:
        raise ImportError(f"{path} is a torch checkpoint; reading it needs torch: {needed}.") from None
    # CVE-2025-32434 and CVE-2026-24747: older unpicklers run code or corrupt memory in spite of weights_only.
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        raise ImportError(f"{path}: torch {torch.__version__} cannot load it safely; 2.10 or newer can: {needed}.")
    return torch


def check_pth(path: pathlib.Path) -> None:
    """Compares every record with the checksum of its archive, which torch itself does not.

    Raises:
        ValueError: names the first damaged record.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # see read_pth
        raise ValueError(f"{path} is damaged: {error}.") from None
    if damaged is not None:
        raise ValueError(f"{path} is damaged: its record {damaged!r} does not match its checksum.")
