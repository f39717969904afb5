"""Several processes that compute one thing: how they find each other, and what the host of each must see to.

Every process runs the whole program on its own devices and its own rows of a batch. What the host makes must be the same in
all of them (`check_equal`), what it writes is written once (`on_first`), and what it reads back from devices of others has to
be gathered (`on_host`). With one process all of this is nothing.
"""

import builtins
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magref_jax.command import check_devices
from magref_jax.sharding import shard_batch

# A process that is silent for so long is dead, and the others end. So does one that waits for them to end with it.
DEAD_SECONDS = 60
# What process 0 may take for something the others wait for, such as writing a model.
WAIT_SECONDS = 3600

T = TypeVar("T")


def initialise(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the processes of a run; must be called before anything that asks JAX for devices.

    Without arguments they are those of a SLURM step of several tasks or of a TPU slice, and elsewhere there is one. A
    process that has joined stays where it is.

    Args:
        coordinator: host:port on which process 0 listens.
        num_processes: Of the run.
        process_id: Of this one.

    Raises:
        ValueError: some of the arguments but not all, numbers that make no sense, or JAX does not start on the platform that
            was asked for.
        RuntimeError: too late, or a process did not appear within five minutes.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"{' and '.join(missing)} not given: processes are told all of {', '.join(given)}, or none.")
    if jax.distributed.is_initialized():
        return
    if coordinator is not None and num_processes is not None and process_id is not None:
        if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdecimal():
            raise ValueError(f"coordinator={coordinator!r} must be HOST:PORT, with a port that is free on process 0.")
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"process_id={process_id} must be in 0..{num_processes - 1} (num_processes={num_processes})."
            )
        if num_processes > 1:
            _join(
                coordinator_address=coordinator,
                num_processes=num_processes,
                process_id=process_id,
                cluster_detection_method="deactivate",
            )
    elif _slurm_tasks() > 1:
        _join(cluster_detection_method="slurm")
    elif _has_tpus():
        try:
            _join()
        except ValueError as error:  # chips without the metadata of a slice
            if "coordinator_address" not in str(error):
                raise
    check_devices()


def _join(**arguments: Any) -> None:
    jax.distributed.initialize(
        **arguments, heartbeat_timeout_seconds=DEAD_SECONDS, shutdown_timeout_seconds=DEAD_SECONDS
    )


def _slurm_tasks() -> int:
    """Tasks of the step that `srun` started this process in; 0 outside of one."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    return int(os.environ["SLURM_NTASKS"]) if all(name in os.environ for name in names) else 0


def _has_tpus() -> bool:
    """Whether JAX will use TPUs. Asks for no devices: where there are chips, importing JAX sets its platforms."""
    return "tpu" in (getattr(jax.config, "jax_platforms", None) or "").split(",")


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when all processes have come here, however long the slowest takes, up to `WAIT_SECONDS`."""
    if jax.process_count() > 1:
        ocp.multihost.sync_global_processes(name, timeout=WAIT_SECONDS)


def on_first(function: Callable[[], T]) -> T:
    """What `function` returns in process 0, in all processes; the others do not call it.

    With several processes the value goes through JSON; paths become text.

    Raises:
        Exception: what it raised there, in all processes: of the same class if that is one of Python's own.
    """
    if jax.process_count() == 1:
        return function()
    outcome = _outcome(function) if is_first() else b""
    wait_for_all("process_0_has_done_it")  # collectives of devices wait less long
    value, error, words = json.loads(_broadcast(outcome))
    if error is None:
        return value
    kind = getattr(builtins, error, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        raise kind(*words)
    raise RuntimeError(f"{error}: {' '.join(words)}")


def _outcome(function: Callable[[], Any]) -> bytes:
    """The value of a function, or name and words of its exception."""
    try:
        return json.dumps([function(), None, None], default=str).encode()
    except Exception as error:
        says = all(isinstance(each, str) for each in error.args)
        return json.dumps([None, type(error).__name__, error.args if says else [str(error)]]).encode()


def _broadcast(contents: bytes) -> bytes:
    """Those of process 0."""
    size = int(multihost_utils.broadcast_one_to_all(np.int64(len(contents))))
    padded = np.zeros(-(-size // 1024) * 1024, np.uint8)  # few shapes, which are programs
    if is_first():
        padded[:size] = np.frombuffer(contents, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].tobytes()


def check_equal(name: str, tree: Any) -> None:
    """Raises in every process unless all have the same arrays: names, shapes, dtypes and bytes.

    Raises:
        ValueError: says which processes differ from process 0.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        leaf = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    wait_for_all("to_compare")
    digests = multihost_utils.process_allgather(np.frombuffer(digest.digest(), np.uint8))
    if others := [index for index, row in enumerate(digests) if not np.array_equal(row, digests[0])]:
        raise ValueError(
            f"{name} must be the same in every process, but in process {', '.join(map(str, others))} it is not what it is "
            "in process 0: they need the same command line, the same files and the same versions of the libraries."
        )


def on_host(tree: Any) -> Any:
    """Whole arrays as NumPy holds them, in every process; all must call it."""

    def gather(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(gather, tree)


@dataclasses.dataclass(frozen=True)
class BatchShare:
    """Which of the equal pieces that a mesh cuts a batch into are on devices of this process.

    Not always a block: on a torus of TPUs neighbours on an axis of the mesh may belong to any host. And where `context` or
    `tensor` go over several processes, these hold the same pieces.
    """

    pieces: tuple[int, ...]
    num_pieces: int

    def rows(self, batch_size: int) -> list[int]:
        """The rows of a global batch that this process must have.

        Raises:
            ValueError: the pieces of a batch of this size are not equal.
        """
        if len(self.pieces) == self.num_pieces:
            return list(range(batch_size))
        if batch_size % self.num_pieces:
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of {self.num_pieces}, the devices on the mesh axes data and fsdp, "
                "when these belong to several processes."
            )
        size = batch_size // self.num_pieces
        return [row for piece in self.pieces for row in range(piece * size, (piece + 1) * size)]

    def batch_size(self, num_rows: int) -> int:
        """Of the global batch of which this process has so many rows."""
        return num_rows * self.num_pieces // len(self.pieces)


@functools.cache
def batch_share(mesh: Mesh) -> BatchShare:
    """What this process has of every batch on a mesh."""
    num_pieces = mesh.shape["data"] * mesh.shape["fsdp"]
    places = NamedSharding(mesh, P(("data", "fsdp"))).addressable_devices_indices_map((num_pieces,))
    pieces = {index[0].start or 0 for index in places.values() if index is not None}
    return BatchShare(tuple(sorted(pieces)), num_pieces)


def shard_rows(mesh: Mesh, tree: Any) -> Any:
    """Global batches on the mesh, whole where it does not divide them; each process gives the rows of its `BatchShare`."""
    if jax.process_count() == 1:
        return shard_batch(mesh, tree)
    share = batch_share(mesh)

    def place(local: np.ndarray) -> jax.Array:
        batch_size = share.batch_size(len(local))
        position = {row: i for i, row in enumerate(share.rows(batch_size))}
        is_divided = batch_size % share.num_pieces == 0

        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first, stop, _ = index[0].indices(batch_size)
            return local[position[first] : position[first] + stop - first]

        sharding = NamedSharding(mesh, P(("data", "fsdp")) if is_divided else P())
        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, piece)

    return jax.tree.map(place, tree)
