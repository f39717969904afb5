"""Model folders and training checkpoints.

A model folder is what `sample.py` reads and what training and conversion write:

    config.json                                   ModelConfig
    dit/  vae/  text_encoder/  image_encoder/     parameters (orbax); a text-to-video model has no image_encoder
    tokenizer/                                    files for transformers.AutoTokenizer
    MANIFEST.json                                 size and sha256 of all these files; others may lie beside them
"""

import collections
import concurrent.futures
import hashlib
import itertools
import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from magref_jax.config import NETWORKS, ModelConfig, load_model_config
from magref_jax.distributed import is_first, on_first

Params = Any

MANIFEST = "MANIFEST.json"
PARTS = ("config.json", "tokenizer", *NETWORKS)  # of a model folder, all in the manifest; whatever else is there is not
_LEFT_BY_SYSTEMS = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini", re.IGNORECASE)
CHUNK_BYTES = 2**25  # at most, of what is written: what a device reads of a parameter that is cut over many
READERS = 16  # chunks that are read at a time; each is in memory up to three times: as stored, decoded, as it is read


def save_params(folder: pathlib.Path, params: Params, dtype: str | None = None) -> None:
    """Writes one network's parameters, cast to `dtype` if given; an existing folder is replaced as a whole."""
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    folder = folder.absolute()
    temporary = folder.with_name(f".{folder.name}.new")

    def clear() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for path in folder.parent.iterdir():
            if path.name.startswith(temporary.name):  # orbax adds to the name of what is unfinished
                shutil.rmtree(path, ignore_errors=True)

    def replace() -> None:
        # It names the folder of the machine that wrote it, and nothing reads it on a file system that renames atomically.
        (temporary / "commit_success.txt").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    on_first(clear)
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary, params, save_args=chunks)
    except Exception:
        if is_first():
            clear()
        raise
    on_first(replace)


class ParamsWriter:
    """Writes one network's parameters piece by piece, for models that do not fit into memory.

    Chunks in files of their own and no time stamps: the same values give the same bytes, in whatever order they come.
    `restore_params` reads the folder like one that `save_params` wrote.
    """

    def __init__(
        self, folder: pathlib.Path, abstract: Mapping[str, Any], stacked: Callable[[str], bool], keep: bool = False
    ) -> None:
        """Opens what will become `folder` when all is written.

        Args:
            folder: Where the parameters go.
            abstract: Their shapes and dtypes by slash-separated path.
            stacked: Whether a parameter is written layer by layer.
            keep: Go on with what an earlier writer of the same parameters left unfinished.
        """
        self._folder = folder.absolute()
        self._temporary = self._folder.with_name(f".{self._folder.name}.new")
        if not keep:
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True, exist_ok=True)
        self._abstract = dict(abstract)
        self._stores = {path: self._create(path, leaf, stacked(path)) for path, leaf in abstract.items()}

    def _create(self, path: str, leaf: Any, stacked: bool) -> tensorstore.TensorStore:
        dtype = np.dtype(leaf.dtype)
        chunks = [1, *leaf.shape[1:]] if stacked else list(leaf.shape)
        while math.prod(chunks) * dtype.itemsize > CHUNK_BYTES:
            largest = int(np.argmax(chunks))
            chunks[largest] = -(-chunks[largest] // 2)
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(self._temporary / path.replace("/", "."))},
            "metadata": {"chunks": chunks, "compressor": {"id": "zstd", "level": 1}},
            "store_data_equal_to_fill_value": True,
        }
        dtype = tensorstore.dtype(dtype)
        return tensorstore.open(spec, create=True, open=True, dtype=dtype, shape=leaf.shape).result()

    def write(self, path: str, array: np.ndarray, layer: int | None = None) -> None:
        """Writes a parameter, or one layer of it, cast to its dtype."""
        store = self._stores[path]
        # First the cast, in the order of memory, then the transposition, of half as many bytes: twice as fast as both at once.
        values = _row_major(array.astype(np.dtype(self._abstract[path].dtype), order="K", copy=False))
        (store if layer is None else store[layer]).write(values).result()

    def finish(self) -> None:
        """Puts the folder in the place of whatever has its name."""
        entries = {}
        for path, leaf in self._abstract.items():
            keys = path.split("/")
            entries[str(tuple(keys))] = {
                "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
                "value_metadata": {
                    "value_type": "jax.Array",
                    "skip_deserialize": False,
                    "write_shape": list(leaf.shape),
                },
            }
        tree = {
            "tree_metadata": entries,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        for lock in self._temporary.rglob("*.__lock"):  # of a writer that was killed
            lock.unlink()
        (self._temporary / "_METADATA").write_text(json.dumps(tree), encoding="utf-8")
        (self._temporary / "_CHECKPOINT_METADATA").write_text(
            '{"metrics": {}, "performance_metrics": {}}', encoding="utf-8"
        )
        shutil.rmtree(self._folder, ignore_errors=True)
        self._temporary.rename(self._folder)


def _row_major(array: np.ndarray, tile: int = 128) -> np.ndarray:
    """The array in C order. A transposed matrix goes tile by tile, which NumPy does not: 2x as fast."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array).reshape(array.shape)
    copy = np.empty(array.shape, array.dtype)
    for row in range(0, array.shape[0], tile):
        for column in range(0, array.shape[1], tile):
            part = slice(row, row + tile), slice(column, column + tile)
            copy[part] = array[part]
    return copy


_DICT_KEY = 2  # how orbax's _METADATA says that a part of a path is the key of a dict


def open_params(folder: pathlib.Path) -> dict[str, tensorstore.TensorStore]:
    """The parameters of a network by slash-separated path, unread; `[...].read().result()` reads them or a part."""
    folder = folder.absolute()
    if not (folder / "_METADATA").is_file():
        raise FileNotFoundError(
            f"{folder} does not exist or is unfinished; expected the parameters of a network there."
        )
    tree = json.loads((folder / "_METADATA").read_text(encoding="utf-8"))
    stores = {}
    for entry in tree["tree_metadata"].values():
        keys = [part["key"] for part in entry["key_metadata"]]
        if tree["use_ocdbt"]:
            base = {"driver": "file", "path": f"{folder}/"}
            kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(keys) + "/"}
        else:
            kvstore = {"driver": "file", "path": f"{folder / '.'.join(keys)}/"}
        spec = {"driver": "zarr3" if tree.get("use_zarr3") else "zarr", "kvstore": kvstore}
        stores["/".join(keys)] = tensorstore.open(spec, open=True, read=True)
    return {path: store.result() for path, store in stores.items()}


def stored_params(folder: pathlib.Path, abstract_params: Params) -> Params:
    """The parameters of a folder as shapes, with the dtypes they are stored in; shardings are those of `abstract_params`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: names or shapes differ from `abstract_params`.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; expected the parameters of a network there.")
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.metadata(folder).item_metadata.tree
    problems = differences(found, abstract_params)
    if problems:
        raise ValueError(f"{folder} does not hold the parameters that config.json describes: " + "; ".join(problems))
    return jax.tree.map(
        lambda stored, expected: jax.ShapeDtypeStruct(
            expected.shape, stored.dtype, sharding=getattr(expected, "sharding", None)
        ),
        found,
        abstract_params,
    )


def restore_params(folder: pathlib.Path, abstract_params: Params) -> Params:
    """Reads parameters in the dtype they are stored in, into the shardings of `abstract_params`.

    Without a sharding they come to the first device, wherever they were when they were written. A process reads what its own
    devices hold, each chunk once, and has at most one large parameter at a time on the host.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: names or shapes differ from `abstract_params`.
    """
    leaves, tree = jax.tree.flatten_with_path(stored_params(folder, abstract_params))
    first_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = {"/".join(key.key for key in path): leaf.sharding or first_device for path, leaf in leaves}
    stores = open_params(folder)

    def is_small(path: str, shape: Sequence[int]) -> bool:
        return math.prod(shape) * stores[path].dtype.numpy_dtype.itemsize <= CHUNK_BYTES

    small = [path for path in shardings if is_small(path, stores[path].shape)]
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        # Side by side: the small ones with each other, the chunks of a large one unless they are large themselves.
        read = pool.map(lambda path: _read(stores[path], shardings[path], map), small)
        arrays = dict(zip(small, read, strict=True))
        for path in [path for path in shardings if path not in arrays]:
            run = pool.map if is_small(path, stores[path].chunk_layout.read_chunk_template.shape) else map
            arrays[path] = _read(stores[path], shardings[path], run)
    return jax.tree.unflatten(tree, [arrays[path] for path in shardings])


Box = tuple[tuple[int, int], ...]  # start and stop along each dimension


def _read(
    store: tensorstore.TensorStore, sharding: jax.sharding.Sharding, run: Callable[..., Iterable[Any]]
) -> jax.Array:
    """A parameter on the devices of this process; `run` calls a function for all that it has to read, as `map` does."""
    holders = collections.defaultdict(list)  # the devices of each part: those along `data` hold the same
    for device, index in sharding.addressable_devices_indices_map(store.shape).items():
        sides = zip(index or (), store.shape, strict=True)
        holders[tuple(side.indices(size)[:2] for side, size in sides)].append(device)
    # They take memory as they are filled.
    buffers = {part: np.empty([stop - first for first, stop in part], store.dtype.numpy_dtype) for part in holders}

    def read(box: Box) -> None:
        values = store[_slices(box)].read().result()
        for part, buffer in buffers.items():
            common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, part, strict=True))
            if all(first < stop for first, stop in common):
                buffer[_slices(common, part)] = values[_slices(common, box)]

    done: set[Box] = set()
    arrays = []
    for part, devices in holders.items():
        boxes = set(_chunks(store, part)) - done  # a chunk that parts share has been read for all of them
        collections.deque(run(read, sorted(boxes)), maxlen=0)
        done |= boxes
        buffer = buffers.pop(part)
        arrays += jax.block_until_ready([jax.device_put(buffer, device) for device in devices])
        del buffer  # before the next part is read
    return jax.make_array_from_single_device_arrays(store.shape, sharding, arrays)


def _slices(box: Box, origin: Box | None = None) -> tuple[slice, ...]:
    """Of the box, in an array that begins where `origin` does."""
    begins = [first for first, _ in origin] if origin else [0] * len(box)
    return tuple(slice(first - begin, stop - begin) for (first, stop), begin in zip(box, begins, strict=True))


def _chunks(store: tensorstore.TensorStore, part: Box) -> Iterator[Box]:
    """The chunks that have something of a part."""
    sides = [
        [(first, min(first + chunk, size)) for first in range(start // chunk * chunk, stop, chunk)]
        for (start, stop), chunk, size in zip(
            part, store.chunk_layout.read_chunk_template.shape, store.shape, strict=True
        )
    ]
    return itertools.product(*sides)


def differences(found: Params, expected: Params, *, dtypes: bool = False, limit: int = 5) -> list[str]:
    """How the leaves of a stored tree differ from those expected, in name, shape and, if asked for, dtype; the first few."""

    def describe(tree: Params) -> dict[str, str]:
        return {
            jax.tree_util.keystr(path): f"shape {tuple(leaf.shape)}"
            + (f" and dtype {np.dtype(leaf.dtype)}" if dtypes else "")
            for path, leaf in jax.tree.leaves_with_path(tree)
        }

    found, expected = describe(found), describe(expected)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} has {found[name]}, expected {expected[name].removeprefix('shape ')}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    return problems[:limit] + ([f"and {len(problems) - limit} more"] if len(problems) > limit else [])


def save_model(
    folder: pathlib.Path,
    config: ModelConfig,
    params: Mapping[str, Params],
    dtype: str | None = None,
    write_tokenizer: Callable[[pathlib.Path], Any] | None = None,
) -> None:
    """Writes the given networks, the config and the manifest; networks that are not given stay as they are."""
    unknown = sorted(set(params) - set(NETWORKS))
    if unknown:
        raise ValueError(f"params has unknown networks {unknown}; allowed are {NETWORKS}.")
    for name, tree in params.items():
        save_params(folder / name, tree, dtype)

    def write_rest() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if write_tokenizer is not None:
            write_tokenizer(folder / "tokenizer")
        (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
        write_manifest(folder, PARTS)

    on_first(write_rest)


def restore_model(
    folder: pathlib.Path, abstract_params: Mapping[str, Params], *, verify: bool = True
) -> tuple[ModelConfig, dict[str, Params]]:
    """The config of a model folder and the parameters of the networks named in `abstract_params`.

    Sizes are always compared with the manifest, contents unless `verify` is false.

    Raises:
        FileNotFoundError: the folder or a network is missing.
        ValueError: a file differs from the manifest, or parameters from the config.
    """
    config = load_model_config(folder)
    verify_manifest(folder, contents=False)
    if missing := [name for name in abstract_params if not (folder / name).is_dir()]:
        raise FileNotFoundError(f"{folder / missing[0]} does not exist; expected the parameters of a network there.")
    # Contents are read twice, to compare and to compute with, at the same time. Of several processes the first one compares,
    # and where that fails they all end.
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        verified = other.submit(verify_manifest, folder) if verify and is_first() else None
        try:
            return config, {name: restore_params(folder / name, tree) for name, tree in abstract_params.items()}
        finally:
            if verified is not None:  # what is damaged says more than what could not be read because of it
                verified.result()


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """By slash-separated name, without the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): path for path in files}


def _entries(files: Mapping[str, pathlib.Path], contents: bool) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {name: {"bytes": path.stat().st_size} for name, path in files.items()}
    if contents:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for entry, digest in zip(entries.values(), pool.map(file_digest, files.values()), strict=True):
                entry["sha256"] = digest
    return entries


def file_digest(path: pathlib.Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: pathlib.Path, parts: Collection[str] | None = None) -> None:
    """Writes the manifest of a folder, or of some of what is in it; what systems leave in folders is in none."""
    files = {
        name: path
        for name, path in _files(folder).items()
        if (parts is None or name.partition("/")[0] in parts) and not _LEFT_BY_SYSTEMS.fullmatch(path.name)
    }
    text = json.dumps(_entries(files, contents=True), indent=1) + "\n"
    part = folder.with_name(f".{folder.name}.{MANIFEST}.new")
    part.write_text(text, encoding="utf-8")
    part.rename(folder / MANIFEST)


def verify_manifest(folder: pathlib.Path, *, contents: bool = True) -> list[str]:
    """Compares every file of the manifest. Orbax has no checksum of its own: a flipped bit would load in silence.

    Returns the files that are not in the manifest, such as a README or what a file manager leaves: they are no damage, for
    nothing reads them.

    Raises:
        FileNotFoundError: no manifest, so this is not a model folder.
        ValueError: names the files that are damaged or missing.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {MANIFEST}.")
    try:
        expected = {name: dict(entry) for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"{path} is damaged.") from None
    files = _files(folder)
    found = _entries({name: file for name, file in files.items() if name in expected}, contents)
    problems = [f"{name} is missing" for name in expected if name not in found]
    for name in expected.keys() & found.keys():
        if expected[name].get("bytes") != found[name]["bytes"]:
            problems.append(f"{name} has {found[name]['bytes']} bytes, expected {expected[name].get('bytes')}")
        elif contents and expected[name].get("sha256") != found[name]["sha256"]:
            problems.append(f"{name} is damaged")
    if problems:
        raise ValueError(f"{folder} differs from its {MANIFEST}: {'; '.join(problems[:5])}.")
    return [name for name in files if name not in expected]
