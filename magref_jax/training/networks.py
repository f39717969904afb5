"""The networks of a model folder, as the tasks of training make and copy them."""

import functools
import pathlib
import shutil
from collections.abc import Collection

import jax
from jax.sharding import Mesh

from magref_jax import pipeline
from magref_jax.checkpoint import NETWORKS, Params
from magref_jax.config import ModelConfig


def init_random(model: ModelConfig, mesh: Mesh, seed: int, only: Collection[str] = NETWORKS) -> dict[str, Params]:
    """Networks of random parameters on the mesh."""
    abstract = pipeline.place_params(mesh, pipeline.abstract_params(model, only))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    init = functools.partial(pipeline.init_params, model, only=only)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def copy_networks(source: pathlib.Path, target: pathlib.Path, but: str) -> None:
    """The other networks of a model folder and its tokenizer, where they are not there already."""
    for name in (*NETWORKS, "tokenizer"):
        if name != but and (source / name).is_dir() and not (target / name).exists():
            part = target / f".{name}.new"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(source / name, part)
            part.rename(target / name)
