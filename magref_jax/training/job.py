"""What a training run needs of whatever it trains: the face that the loop in `train.py` sees."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from magref_jax.checkpoint import Params
from magref_jax.sharding import ParamSpecs
from magref_jax.training.monitor import Work
from magref_jax.training.step import LossFn


class BatchStream(Protocol):
    """Batches of this process, and where in the epoch the next one is."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def __next__(self) -> dict[str, Any]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Samples:
    """Videos of fixed cases, and a contact sheet of them with references and canvases."""

    sheet: Image.Image
    videos: list[UInt8[np.ndarray, "F H W 3"]]
    fps: float


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
    validate: Callable[[Params], dict[str, Any]] | None = None
    sample: Callable[[Params], Samples] | None = None
    overfit: bool = False  # every step sees the batch and the noise of the first
