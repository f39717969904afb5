"""What a training run needs of whatever it trains: the face that the loop in `train.py` sees."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from magref_jax.checkpoint import Params
from magref_jax.descriptions import short_repr
from magref_jax.sharding import ParamSpecs
from magref_jax.training.monitor import Work
from magref_jax.training.step import LossFn


class Stopped(Exception):
    """The run is to end: what has not been begun is not done, and what is being validated or drawn is dropped."""


Check = Callable[
    [], None
]  # raises `Stopped`; in all of several processes, which must call it equally often, the same time


class BatchStream(Protocol):
    """Batches of this process, and where in the epoch the next one is."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def __next__(self) -> dict[str, Any]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class SameBatch:
    """Hands out the next batch of a stream again and again.

    Its place in the data stays before that batch, so that a run that goes on from there sees the same one.
    """

    def __init__(self, batches: BatchStream) -> None:
        self._batches, self._place = batches, batches.state()
        self._batch: dict[str, Any] | None = None

    def __iter__(self) -> "SameBatch":
        return self

    def __next__(self) -> dict[str, Any]:
        if self._batch is None:
            self._batch = next(self._batches)
        return self._batch

    def state(self) -> dict[str, Any]:
        return self._place

    def restore(self, state: dict[str, Any]) -> None:
        self._batches.restore(state)
        self._place, self._batch = self._batches.state(), None

    def close(self) -> None:
        self._batches.close()


# Refuses a run that trains parameters of these shapes on these batches; None: they are not known before weights are read.
Accept = Callable[[Params, BatchStream | None], None]


@short_repr
@dataclasses.dataclass(frozen=True)
class Samples:
    """Videos of fixed cases, and a contact sheet of them with references and canvases."""

    sheet: Image.Image
    videos: list[UInt8[np.ndarray, "F H W 3"]]
    fps: float


@short_repr
@dataclasses.dataclass(frozen=True)
class Job:
    """A task that was opened: its files are read, its parameters are on the mesh, its batches can be drawn."""

    params: Params  # to train, as they start
    frozen: Any  # the second argument of `loss`
    specs: ParamSpecs  # how a mesh cuts `params`
    loss: LossFn
    batches: BatchStream
    prepare: Callable[[dict[str, Any]], Any]  # from a host batch to the third argument of `loss`
    work: Callable[[dict[str, Any]], Work]
    export: Callable[[Params], str]  # writes what the run was for; returns what to do with it
    validate: Callable[[Params, Check], dict[str, Any]] | None = None
    sample: Callable[[Params, Check], Samples] | None = None
    overfit: bool = False  # every step sees the noise of the first, and `batches` its batch
