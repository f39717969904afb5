"""Trains the VAE: the start of a new world, or a sharper decoder for an old one."""

import dataclasses
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from magref_jax import checkpoint, pipeline
from magref_jax.checkpoint import Params
from magref_jax.config import VAEConfig, load_model_config
from magref_jax.data import emoji_clips, emoji_tokenizer, emoji_world
from magref_jax.distributed import is_first, on_first, on_host
from magref_jax.models import vae
from magref_jax.sharding import PARAM_SPECS, on_mesh, shard_batch
from magref_jax.training.config import TrainConfig, VAEPhase, VAETask
from magref_jax.training.job import Accept, Check, Job
from magref_jax.training.monitor import Work
from magref_jax.training.networks import copy_networks, init_random
from magref_jax.training.objective import reconstruction
from magref_jax.training.optimizer import join_params, split_params


class VAEBatches:
    """Random crops of rendered clips; batch i is a function of (seed, i)."""

    def __init__(self, frames: UInt8[np.ndarray, "N F H W 3"], task: VAETask, seed: int) -> None:
        self._frames, self._task, self._seed = frames, task, seed
        self._ends = np.cumsum([phase.num_steps for phase in task.phases])
        self._count = 0

    def __iter__(self) -> "VAEBatches":
        return self

    def phase(self, step: int) -> VAEPhase:
        return self._task.phases[min(int(np.searchsorted(self._ends, step, side="right")), len(self._ends) - 1)]

    def __next__(self) -> dict[str, Any]:
        phase, rng = self.phase(self._count), np.random.default_rng([self._seed, self._count])
        self._count += 1
        stride = self._task.model.vae.spatial_stride
        frames = emoji_clips.vae_batch(
            self._frames, rng, phase.batch_size, phase.num_frames, phase.crop, stride, self._task.grey_fraction
        )
        return {"frames": frames}

    def state(self) -> dict[str, Any]:
        return {"batches": self._count}

    def restore(self, state: dict[str, Any]) -> None:
        self._count = state["batches"]

    def close(self) -> None:
        pass


def open_vae(config: TrainConfig, out: pathlib.Path, mesh: Mesh, accept: Accept) -> Job:
    task = config.task
    assert isinstance(task, VAETask)
    model = task.model if task.folder is None else load_model_config(task.folder)
    check_phases(task, model.vae)

    def write_tokenizer(folder: pathlib.Path) -> int:
        return emoji_tokenizer.build_tokenizer(emoji_world.vocabulary(task.data.world), folder, model.dit.text_len)

    if task.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            vocab_size = write_tokenizer(pathlib.Path(folder))
        text_encoder = dataclasses.replace(model.text_encoder, vocab_size=vocab_size)
        model = dataclasses.replace(model, text_encoder=text_encoder)
    abstract = pipeline.place_params(mesh, pipeline.abstract_params(model, only=("vae",)))
    accept(split_params(abstract["vae"], task.trainable)[0], None)
    if task.folder is None:
        params = init_random(model, mesh, config.seed)
    else:
        _, params = checkpoint.restore_model(task.folder, abstract)
    trained, rest = split_params(params["vae"], task.trainable)
    frames = emoji_clips.render_clips(model, task.data.world, "train", config.seed, task.data.num_clips)
    num_held_out = 0 if config.events.validation is None else task.data.validation_clips
    held_out = emoji_clips.render_clips(model, task.data.world, "held_out", config.seed, num_held_out)
    if is_first() and config.events.validation and not num_held_out:
        print("train.py: no validation: task.data.validation_clips is 0.", file=sys.stderr)

    def loss(trained: Params, frozen: Any, frames: Array, keys: Array) -> Any:
        with on_mesh(mesh):
            return reconstruction(model.vae, task.kl_weight, join_params(trained, frozen), frames, keys)

    def encode(params: Params, frames: Array) -> Array:
        with on_mesh(mesh):
            return vae.encode(model.vae, params, frames.astype(jnp.float32) / 127.5 - 1)

    @jax.jit
    def squared_error(params: Params, frames: Array) -> Array:
        with on_mesh(mesh):
            decoded = pipeline.decode(model, params, encode(params, frames))
        return jnp.mean(jnp.square(jnp.clip(decoded, -1, 1) - (frames.astype(jnp.float32) / 127.5 - 1)))

    def validate(trained: Params, check: Check) -> dict[str, Any]:
        params, parts = join_params(trained, rest), [held_out[i : i + 8] for i in range(0, len(held_out), 8)]
        errors = []
        for part in parts:
            errors.append(float(squared_error(params, part)))
            check()
        return {"validation_psnr": float(10 * np.log10(4 / np.average(errors, weights=[len(part) for part in parts])))}

    def export(trained: Params) -> str:
        folder, vae_params = out / "model", join_params(trained, rest)
        if task.folder is not None:
            on_first(lambda: copy_networks(task.folder, folder, but="vae"))
            checkpoint.save_model(folder, model, {"vae": vae_params}, config.save_dtype)
        else:
            # The DiT works on latents of mean 0 and deviation 1 per channel.
            encode_some, some = jax.jit(encode), range(0, min(len(frames), 512), 16)
            latents = np.concatenate([on_host(encode_some(vae_params, frames[i : i + 16])) for i in some])
            mean, std = latents.mean((0, 1, 2, 3)), latents.std((0, 1, 2, 3))
            statistics = {
                "latent_mean": tuple(map(float, mean.round(4))),
                "latent_std": tuple(map(float, std.round(4))),
            }
            finished = dataclasses.replace(model, vae=dataclasses.replace(model.vae, **statistics))
            others = {name: params[name] for name in ("text_encoder", "image_encoder") if name in params}
            networks = {"vae": vae_params, **others}
            checkpoint.save_model(folder, finished, networks, config.save_dtype, write_tokenizer)
        return f"wrote {folder}; a DiT can be trained on it now"

    return Job(
        params=trained,
        frozen=rest,
        specs=PARAM_SPECS["vae"],
        loss=loss,
        batches=VAEBatches(frames, task, config.seed),
        prepare=lambda host: shard_batch(mesh, host["frames"]),
        work=lambda host: Work(len(host["frames"])),
        export=export,
        validate=validate if num_held_out else None,
    )


def check_phases(task: VAETask, config: VAEConfig) -> None:
    """Refuses windows that the clips or the VAE do not have.

    Raises:
        ValueError: names the phase and the field.
    """
    world = task.data.world
    for number, phase in enumerate(task.phases):
        sizes = (world.height, world.width) if phase.crop is None else (phase.crop, phase.crop)
        if phase.num_steps < 1 or phase.batch_size < 1:
            raise ValueError(
                f"phase {number}: num_steps={phase.num_steps}, batch_size={phase.batch_size}: must be 1 or more."
            )
        config.num_latent_frames(phase.num_frames)
        if phase.num_frames > world.num_frames + 1:
            raise ValueError(
                f"phase {number}: num_frames={phase.num_frames} must be at most {world.num_frames + 1}, a clip and its canvas."
            )
        if sizes[0] < 1 or any(size % config.spatial_stride for size in sizes):
            raise ValueError(
                f"phase {number}: crop={phase.crop} of {world.width}x{world.height} must be a multiple of {config.spatial_stride}."
            )
        if sizes[0] > world.height or sizes[1] > world.width:
            raise ValueError(
                f"phase {number}: crop={phase.crop} is larger than clips of {world.width}x{world.height} pixels."
            )
