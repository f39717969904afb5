"""The networks of a model folder, as the tasks of training make and copy them."""

import functools
import pathlib
import shutil
from collections.abc import Collection
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from magref_jax import pipeline
from magref_jax.checkpoint import NETWORKS, Params
from magref_jax.config import ModelConfig
from magref_jax.files import naming


def init_random(model: ModelConfig, mesh: Mesh, seed: int, only: Collection[str] = NETWORKS) -> dict[str, Params]:
    """Networks of random parameters on the mesh."""
    abstract = pipeline.place_params(mesh, pipeline.abstract_params(model, only))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    init = functools.partial(pipeline.init_params, model, only=only)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


# The layers through which a block adds to the tokens. Text values are among them: injection adds them without the projection.
_ADDING = ("self_attention/out", "cross_attention/value", "cross_attention/out", "feed_forward/down")


def insert_blocks(dit: Params, num_layers: int) -> Params:
    """A deeper DiT with the same output: new blocks, spread evenly, are copies of the one before them that add nothing yet.

    As LLaMA Pro expands its blocks (arXiv 2401.02415). A copy's other layers are as they were, so that it has gradients at once.
    """
    layers: dict[str, Any] = flax.traverse_util.flatten_dict(dit["blocks"], sep="/")
    old = layers["modulation"].shape[0]
    sources = np.arange(num_layers) * old // num_layers
    is_new = np.append(False, sources[1:] == sources[:-1])

    def insert(name: str, layer: Array) -> Array:
        adds = name.rpartition("/")[0] in _ADDING
        return jnp.where(np.expand_dims(is_new & adds, tuple(range(1, layer.ndim))), 0, layer[sources])

    blocks = {name: insert(name, layer) for name, layer in layers.items()}
    return {**dit, "blocks": flax.traverse_util.unflatten_dict(blocks, sep="/")}


def copy_networks(source: pathlib.Path, target: pathlib.Path, but: str) -> None:
    """The other networks of a model folder and its tokenizer, where they are not there already."""
    for name in (*NETWORKS, "tokenizer"):
        if name != but and (source / name).is_dir() and not (target / name).exists():
            part = target / f".{name}.new"
            shutil.rmtree(part, ignore_errors=True)
            try:
                for path in (source / name).rglob("*"):
                    if path.is_file():
                        copy = part / path.relative_to(source / name)
                        with naming(copy):
                            copy.parent.mkdir(parents=True, exist_ok=True)
                            shutil.copyfile(path, copy)
                part.rename(target / name)
            except OSError:
                shutil.rmtree(part, ignore_errors=True)
                raise
