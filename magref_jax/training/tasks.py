"""Which task opens how."""

import pathlib

from jax.sharding import Mesh

from magref_jax.training.config import DiTTask, TrainConfig
from magref_jax.training.dit_task import open_dit
from magref_jax.training.job import Accept, Job
from magref_jax.training.vae_task import open_vae


def open_job(config: TrainConfig, out: pathlib.Path, mesh: Mesh, accept: Accept) -> Job:
    """Reads what the task needs; everything that can be refused is refused, last by `accept`, before it reads weights."""
    return (open_dit if isinstance(config.task, DiTTask) else open_vae)(config, out, mesh, accept)
