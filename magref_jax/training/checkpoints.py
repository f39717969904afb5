"""Checkpoints of a run: written beside the loop, whole or not at all, and checked to the bit before they are used.

    checkpoints/300/
        items/              what orbax writes
            state/          the leaves of the training state
            data/  config/  the position in the data and the configuration, JSON
            MANIFEST.json   size and sha256 of every other file in items/
        MANIFEST.sha256     the manifest's own: `sha256sum -c` reads it

A checkpoint is written under a name that begins with a dot and renamed to its number as the last thing of all, after files and
digests are on the disk; an old one loses its number before it is removed. So a folder with a number is complete whenever a
process is killed, and what begins with a dot is a leftover.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from magref_jax.checkpoint import MANIFEST, differences, file_digest, verify_manifest, write_manifest

State = Any  # a pytree of arrays

_ITEMS = "items"
_SEAL = "MANIFEST.sha256"
_LEFTOVER = re.compile(r"\.\d+\.(new|old)")


class SaveError(OSError):
    """A checkpoint could not be written. Older ones are as they were, and the next one may be tried."""


class Checkpoints:
    """The numbered checkpoints in a folder. One run at a time writes there.

    The newest `keep` stay, and the multiples of `keep_every` for good; an older one goes when a newer one is complete. With
    several processes all of them call everything, and the folder is one that they share.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int = 3, keep_every: int | None = None) -> None:
        """Removes what a killed run left unfinished in the folder; the first `save` makes it.

        Raises:
            ValueError: a number below 1.
        """
        for name, value in (("keep", keep), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more.")
        self._folder = folder.absolute()
        self._keep, self._keep_every = keep, keep_every
        self.seconds_blocked = 0.0  # how long `save` has held its callers, in all
        self._pending: concurrent.futures.Future[None] | None = None
        self._pending_step: int | None = None
        self._questions = 0
        if jax.process_index() == 0 and self._folder.is_dir():
            for path in self._folder.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path)
        ocp.multihost.sync_global_processes("checkpoints_opened")
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.StandardCheckpointHandler(),
                data=ocp.JsonCheckpointHandler(),
                config=ocp.JsonCheckpointHandler(),
            )
        )
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def reached_preemption(self) -> signal.Signals | None:
        """SIGTERM, at the same question in all of several processes, once the cluster has announced it to any of them.

        All must ask equally often: after every step, and within what takes long.
        """
        self._questions += 1
        return signal.SIGTERM if ocp.multihost.reached_preemption(self._questions) else None

    def steps(self) -> list[int]:
        """All complete checkpoints, oldest first."""
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())

    def latest_step(self) -> int | None:
        """The newest complete checkpoint."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: State, data: Any, config: Any, wait: bool = False) -> float:
        """Writes a checkpoint in the background, unless it exists; the seconds that this took of the caller's time.

        The state may be donated right away. Only one checkpoint is written at a time: the next one waits for it.

        Args:
            step: Its number: how many steps led to `state`.
            state: Arrays, random keys among them.
            data: JSON, the same in every process.
            config: JSON; what JSON does not know is written as text.
            wait: Return when it is complete.

        Raises:
            SaveError: this one could not be written, as far as is known yet; or the last one could not, which does not keep
                this one from being written. Without `wait`, what goes wrong later is told by the next call, or by `close`.
        """
        started = time.perf_counter()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave({name: _key_data(leaf) for name, leaf in _leaves(state).items()}),
            # Copies: the caller's go on changing.
            data=ocp.args.JsonSave(json.loads(json.dumps(data))),
            config=ocp.args.JsonSave(json.loads(json.dumps(config, default=str))),
        )
        failure = None
        try:
            if step != self._pending_step:
                try:
                    self._settle()
                except SaveError as error:
                    failure = error
                if step not in self.steps():
                    self._begin(step, items)
            if wait:
                self._settle()
            elif failure is not None:
                raise failure
        finally:
            seconds = time.perf_counter() - started
            self.seconds_blocked += seconds
        return seconds

    def _begin(self, step: int, items: ocp.args.Composite) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._checkpointer.save(self._unfinished(step) / _ITEMS, args=items)
        except Exception as error:
            self._give_up(step, error)
        self._pending_step = step
        self._pending = self._finisher.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        """Waits for orbax, then adds the digests, puts the checkpoint in its place and removes what it makes too old."""
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() != 0:
                return
            unfinished = self._unfinished(step)
            items = unfinished / _ITEMS
            for note in items.rglob("commit_success.txt"):  # names folders of this machine; see save_params
                note.unlink()
            write_manifest(items)
            (unfinished / _SEAL).write_bytes(_seal(items / MANIFEST))
            for path in unfinished.rglob("*"):
                if path.is_file():
                    with path.open("rb+") as file:
                        os.fsync(file.fileno())  # before the name: see files.replacing
            unfinished.rename(self._path(step))
        except Exception as error:
            self._give_up(step, error)
        self._remove_old()

    def _give_up(self, step: int, error: Exception) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self._unfinished(step), ignore_errors=True)
        whole = [number for number in self.steps() if number < step]
        newest = f"the newest one is {whole[-1]}" if whole else "there is no other one"
        raise SaveError(f"Checkpoint {step} could not be written to {self._folder}, {newest}: {error}") from error

    def _remove_old(self) -> None:
        for step in self.steps()[: -self._keep]:
            if self._keep_every is None or step % self._keep_every:
                old = self._folder / f".{step}.old"
                self._path(step).rename(old)
                shutil.rmtree(old, ignore_errors=True)  # what stays is a leftover for the next run to remove

    def _settle(self) -> None:
        """Waits for the last save and tells how it went."""
        if self._pending is not None:
            pending, self._pending, self._pending_step = self._pending, None, None
            pending.result()

    def restore(self, step: int, abstract_state: State, verify: bool = True) -> tuple[State, Any, Any]:
        """The state, the position in the data and the configuration of a checkpoint.

        Args:
            step: One of `steps()`.
            abstract_state: Shapes, dtypes and where the arrays go, on whatever mesh; without a sharding, the first device.
            verify: Compare contents with their digests and not only sizes.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: a file is damaged, or leaves of the state are not those of `abstract_state`.
        """
        # One process reads for all: when it fails, they all end.
        expected = self.check(step, abstract_state, contents=verify and jax.process_index() == 0)
        items = self._path(step) / _ITEMS
        restored = self._checkpointer.restore(
            items,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(expected), data=ocp.args.JsonRestore(), config=ocp.args.JsonRestore()
            ),
        )
        leaves = [_from_key_data(restored["state"][name], leaf) for name, leaf in _leaves(abstract_state).items()]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), restored["data"], restored["config"]

    def check(self, step: int, abstract_state: State, contents: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
        """Refuses what `restore` would refuse, but for damaged contents unless asked for; what it would read, by name.

        Raises:
            FileNotFoundError, ValueError: see `restore`.
        """
        self._settle()
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise FileNotFoundError(f"step={step} is not a checkpoint in {self._folder}; there are: {known}.")
        self._check_files(step, contents)
        expected = {name: _abstract_key_data(leaf) for name, leaf in _leaves(abstract_state).items()}
        metadata: Any = self._checkpointer.metadata(self._path(step) / _ITEMS).item_metadata
        if problems := differences(metadata["state"].tree, expected, dtypes=True):
            raise ValueError(f"Checkpoint {self._path(step)} is of another training state: {'; '.join(problems)}.")
        return expected

    def read(self, step: int) -> tuple[Any, Any]:
        """The position in the data and the configuration of a checkpoint that `check` accepts."""
        args = ocp.args.Composite(data=ocp.args.JsonRestore(), config=ocp.args.JsonRestore())
        restored = self._checkpointer.restore(self._path(step) / _ITEMS, args=args)
        return restored["data"], restored["config"]

    def _check_files(self, step: int, contents: bool) -> None:
        if problem := self._problem(step, contents):
            whole = next((older for older in reversed(self.steps()) if older < step and not self._problem(older)), None)
            way_out = (
                "No older checkpoint is whole."
                if whole is None
                else f"Checkpoint {whole} is whole: to continue from there, delete {self._path(step)}."
            )
            raise ValueError(f"Checkpoint {step} is damaged: {problem} {way_out}")

    def _problem(self, step: int, contents: bool = True) -> str | None:
        """Which files of a checkpoint are damaged, if any."""
        items, seal = self._path(step) / _ITEMS, self._path(step) / _SEAL
        for path in (items / MANIFEST, seal):
            if not path.is_file():
                return f"{path} is missing."
        is_sealed = seal.read_bytes() == _seal(items / MANIFEST)
        try:
            verify_manifest(items, contents=contents or not is_sealed)
        except ValueError as error:
            return str(error) if is_sealed else f"{items / MANIFEST} is damaged."
        # A manifest that agrees with all the files is not the one of the two that is wrong.
        return None if is_sealed else f"{seal} is damaged."

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
            SaveError: it could not be written.
        """
        try:
            self._settle()
        finally:
            self._finisher.shutdown()
            self._checkpointer.close()

    def _path(self, step: int) -> pathlib.Path:
        return self._folder / str(step)

    def _unfinished(self, step: int) -> pathlib.Path:
        return self._folder / f".{step}.new"


def _seal(manifest: pathlib.Path) -> bytes:
    return f"{file_digest(manifest)}  {_ITEMS}/{MANIFEST}\n".encode()


def _leaves(state: State) -> dict[str, Any]:
    """The leaves by name, such as optimizer_state/0/mu/head/kernel: the same in every tree that has them."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(state)
    }


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _abstract_key_data(leaf: Any) -> jax.ShapeDtypeStruct:
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(data.shape, np.dtype(data.dtype), sharding=sharding)


def _from_key_data(data: jax.Array, leaf: Any) -> jax.Array:
    return jax.random.wrap_key_data(data, impl=leaf.dtype._impl.name) if _is_key(leaf) else data


class StopSignal:
    """Takes note of the first SIGTERM or SIGINT; a second one of the same kind does what it does without this.

    The loop looks at `received` after every step, saves, and exits with status 128 + the signal's number. One of several
    processes cannot stop alone: there SIGTERM is left to `Checkpoints.reached_preemption`, and SIGINT interrupts.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._is_leaving = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        signal.signal(number, self._previous.pop(number))
        if self._is_leaving:
            self._leave()

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """While there is nothing to save, a signal is not only noted: it ends the program from wherever it is.

        Raises:
            SystemExit: with the status of SIGTERM.
            KeyboardInterrupt: SIGINT.
        """
        self._is_leaving = True
        try:
            yield
        finally:
            self._is_leaving = False
        if self.received:  # where no exception could be raised
            self._leave()

    def _leave(self) -> None:
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + int(self.received or 0))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
