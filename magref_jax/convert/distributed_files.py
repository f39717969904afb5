"""Checkpoints of torch.distributed: folders of `.metadata` and `.distcp` files, read by torch's own reader, tensor by tensor."""

import dataclasses
import enum
import io
import math
import pathlib
import pickle
import warnings
from typing import Any

import numpy as np

from magref_jax.convert.tensor_files import TORCH_DTYPES, first_line, import_torch

METADATA = ".metadata"
# What the pickle of `.metadata` may name: descriptions of tensors and of where they lie, and nothing that does anything.
_ALLOWED = {
    "Metadata": "torch.distributed.checkpoint.metadata",
    "MetadataIndex": "torch.distributed.checkpoint.metadata",
    "StorageMeta": "torch.distributed.checkpoint.metadata",
    "TensorStorageMetadata": "torch.distributed.checkpoint.metadata",
    "BytesStorageMetadata": "torch.distributed.checkpoint.metadata",
    "ChunkStorageMetadata": "torch.distributed.checkpoint.metadata",
    "TensorProperties": "torch.distributed.checkpoint.metadata",
    "_MEM_FORMAT_ENCODING": "torch.distributed.checkpoint.metadata",
    "_StorageInfo": "torch.distributed.checkpoint.filesystem",
    "_get_layout": "torch.serialization",
    "Size": "torch",
    "OrderedDict": "collections",
}
# Where the checkpoint was once; Python 3.13 has another name for their module.
_PATHS = {"PosixPath": pathlib.PurePosixPath, "WindowsPath": pathlib.PureWindowsPath}


@dataclasses.dataclass(frozen=True)
class DistributedTensor:
    """A tensor that lies in pieces in the files of a folder."""

    name: str
    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    metadata: Any = dataclasses.field(repr=False, compare=False)  # of the whole folder

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The values, row-major.

        Raises:
            ValueError: a file is damaged.
        """
        torch = import_torch(self.file)
        from torch.distributed import checkpoint

        tensor = torch.empty(self.shape, dtype=getattr(torch, self.dtype.name))
        try:
            checkpoint.load({self.name: tensor}, storage_reader=_reader(self.file.parent, self.metadata), no_dist=True)
        except OSError:
            raise
        except Exception as error:  # what torch runs into in a damaged file is of many types
            raise ValueError(f"{self.file.parent}: {self.name!r} is damaged: {first_line(error)}") from None
        return tensor.reshape(-1).view(torch.uint8).numpy().view(self.dtype).reshape(self.shape)


def read_distributed(folder: pathlib.Path) -> dict[str, dict[str, DistributedTensor]]:
    """The tensors of a folder, unread, by the dictionary that they were saved in.

    "" is the outermost dictionary, "a.b" the one at ["a"]["b"].

    Raises:
        FileNotFoundError: a file that `.metadata` names.
        ImportError: torch is missing or too old.
        ValueError: `.metadata` is damaged, or names anything but tensors in this folder.
    """
    file = folder / METADATA
    import_torch(file)
    # Torch thinks it noteworthy that one process reads alone.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
    metadata = _read_metadata(file)
    try:
        ends: dict[str, int] = {}
        for info in metadata.storage_data.values():
            ends[str(info.relative_path)] = max(ends.get(str(info.relative_path), 0), info.offset + info.length)
        levels: dict[str, dict[str, DistributedTensor]] = {}
        for name, entry in metadata.state_dict_metadata.items():
            if (size := getattr(entry, "size", None)) is None:
                continue  # bytes, such as the number of a step
            # Integers are places in lists, as optimizers have them.
            *parents, own = map(str, (metadata.planner_data or {}).get(name, (name,)))
            dtype = TORCH_DTYPES.get(str(entry.properties.dtype).removeprefix("torch."))
            if dtype is None:
                raise ValueError(f"{name!r} has dtype {entry.properties.dtype}")
            levels.setdefault(".".join(parents), {})[own] = DistributedTensor(name, file, dtype, tuple(size), metadata)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}.") from None
    if outside := sorted(name for name in ends if pathlib.PurePath(name).name != name):
        raise ValueError(f"{file} names files outside its folder: {outside[0]!r}.")
    if missing := sorted(name for name in ends if not (folder / name).is_file()):
        raise FileNotFoundError(f"{file} names {', '.join(missing)}, which is missing.")
    for name, end in ends.items():
        if (size := (folder / name).stat().st_size) < end:
            raise ValueError(f"{folder / name} is cut off: {file} describes {end} bytes, the file has {size}.")
    return levels


def _read_metadata(file: pathlib.Path) -> Any:
    try:
        return _Unpickler(io.BytesIO(file.read_bytes())).load()
    except OSError:
        raise
    except Exception as error:  # what pickle runs into in a damaged file is of many types
        raise ValueError(
            f"{file} describes something other than tensors, or is damaged, and was not loaded: {first_line(error)}"
        ) from None


class _Unpickler(pickle.Unpickler):
    """Torch unpickles the description with whatever it names; this one knows a few names."""

    def find_class(self, module: str, name: str) -> Any:
        if _ALLOWED.get(name) == module or (module == "torch" and name in TORCH_DTYPES):
            return super().find_class(module, name)
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return _PATHS[name]
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise ValueError(f"it names {module}.{name}")


def _member(owner: Any, name: str) -> enum.Enum:
    """What `getattr` is for here: some releases of Python 3.11 pickle a member of an enumeration as an attribute of its class."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum)) or name not in owner.__members__:
        raise ValueError(f"it asks for {name!r} of {owner!r}")
    return owner[name]


def _reader(folder: pathlib.Path, metadata: Any) -> Any:
    """Torch's reader of a folder, which is given the description instead of unpickling it."""
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return metadata

    return Reader(folder)
