"""What a run trains, behind one face: the transformer beside frozen encoders, or the VAE.

A `Job` is a task that was opened: its files are read, its parameters are on the mesh, its batches can be drawn. The loop in
`train.py` knows nothing else.
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8
from PIL import Image

from magref_jax import checkpoint, pipeline
from magref_jax.checkpoint import NETWORKS, Params
from magref_jax.conditioning.case import encode_cases, prepare_case, stack_cases
from magref_jax.conditioning.inputs import Conditioning
from magref_jax.config import ModelConfig, load_model_config
from magref_jax.convert.lora import apply_loras, trained_lora, write_lora
from magref_jax.data import clips, emoji_clips, emoji_tokenizer, emoji_world
from magref_jax.data.emoji_records import EmojiSource
from magref_jax.data.precompute import encode_batch, precompute
from magref_jax.data.records import ClipRecord, Source, open_records
from magref_jax.distributed import batch_share, on_first, on_host, shard_rows
from magref_jax.models import vae
from magref_jax.models.adapters import LoraConfig, init_lora, scale_lora
from magref_jax.sharding import PARAM_SPECS, ParamSpecs, on_mesh, shard_batch
from magref_jax.training.config import DiTTask, EmojiData, TrainConfig, VAEPhase, VAETask
from magref_jax.training.monitor import Work, dit_work
from magref_jax.training.objective import Batch, Null, flow_matching, reconstruction, velocity_error
from magref_jax.training.optimizer import join_params, split_params
from magref_jax.training.step import LossFn
from magref_jax.video import SheetRow, contact_sheet

VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
SAMPLES = 4  # videos on a contact sheet


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


def open_job(config: TrainConfig, out: pathlib.Path, mesh: Mesh) -> Job:
    """Reads what the task needs; everything that can be refused is refused before it reads weights."""
    return (open_dit if isinstance(config.task, DiTTask) else open_vae)(config, out, mesh)


def open_dit(config: TrainConfig, out: pathlib.Path, mesh: Mesh) -> Job:
    task = config.task
    assert isinstance(task, DiTTask)
    model = model_config(task)
    in_training = {"dtype": task.dtype or model.dit.dtype, "remat": task.remat or model.dit.remat}
    compute = dataclasses.replace(model, dit=dataclasses.replace(model.dit, **in_training))
    tokenizer = pipeline.load_tokenizer(task.folder)
    training_clips, validation_clips = open_sources(task, config.seed)

    def arrays(record: ClipRecord, rng: np.random.Generator) -> dict[str, np.ndarray]:
        if record.cases:
            return clips.choose_case(record, rng, model.dit.text_len)
        target = task.objective.first_frame_target
        return clips.example_arrays(clips.make_example(model, tokenizer, record, rng, task.choice, target))

    # What cannot be trained is refused before weights are read: batches that cannot be filled, records that do not fit.
    batches = open_batches(training_clips, task, arrays, config.seed, mesh)
    arrays(training_clips[0], np.random.default_rng(0))
    abstract = pipeline.place_params(mesh, pipeline.abstract_params(model))
    check_trainable(task, model, abstract["dit"])
    abstract = {name: tree for name, tree in abstract.items() if name != "dit" or task.start == "folder"}
    _, params = checkpoint.restore_model(task.folder, abstract)
    if task.start == "random":
        params |= init_random(model, mesh, config.seed, only=("dit",))
    dit = params.pop("dit")

    encode = jax.jit(functools.partial(encode_batch, model))

    def prepare(host: dict[str, Any], place: Callable[[Mesh, Any], Any] = shard_rows) -> Batch:
        positions = tuple(host["frame_positions"])
        batch = place(mesh, {name: value for name, value in host.items() if name != "frame_positions"})
        if "frames" in batch:
            batch = {**encode(params, batch), "subject_cells": batch["subject_cells"]}
            chosen = jnp.array(positions)
            batch |= {name: batch[name][:, chosen] for name in ("clean_latents", "reference_latents") if name in batch}
        return as_batch(batch, positions)

    if task.layouts:
        training_clips = precompute(
            training_clips,
            out / "encoded",
            model,
            tokenizer,
            params,
            layouts=task.layouts,
            choice=task.choice,
            first_frame_target=task.objective.first_frame_target,
            seed=config.seed,
            mesh=mesh,
        )
        batches = open_batches(training_clips, task, arrays, config.seed, mesh)
    null = blank_conditioning(model, tokenizer, params)
    trained, rest, specs, join, export = choose_trainable(task, config, model, mesh, dit, out)

    def loss(trained: Params, frozen: Any, batch: Batch, keys: Array) -> Any:
        dit, lora = join(trained, frozen["dit"])
        with on_mesh(mesh):
            return flow_matching(compute, task.objective, dit, lora, frozen["null"], batch, keys)

    # Every process makes all of the fixed set, which may be smaller than the mesh.
    prepare_whole = functools.partial(prepare, place=shard_batch)
    fixed: list[Batch] = []
    if validation_clips is not None and config.events.validation is not None:
        fixed = validation_batches(validation_clips, arrays, prepare_whole, config.seed)

    @jax.jit
    def level_errors(trained: Params, frozen: Any, batch: Batch, sigma: Array) -> Any:
        dit, lora = join(trained, frozen["dit"])
        size = len(batch.clean_latents)
        keys = jax.random.split(jax.random.key(config.seed), size)
        with on_mesh(mesh):
            sums = velocity_error(compute, task.objective, dit, lora, batch, jnp.full(size, sigma), keys)
        return sums["loss_video"]

    frozen = {"dit": rest, "null": null}

    def validate(trained: Params) -> dict[str, Any]:
        levels = {}
        for sigma in VALIDATION_SIGMAS:
            sums = [level_errors(trained, frozen, batch, sigma) for batch in fixed]
            levels[f"{sigma:g}"] = float(sum(total for total, _ in sums) / sum(count for _, count in sums))
        return {"validation_loss": float(np.mean(list(levels.values()))), "validation_loss_by_sigma": levels}

    def sample(source: Source, trained: Params) -> Samples:
        dit, _ = join(trained, rest)
        if isinstance(task.trainable, LoraConfig):
            dit = apply_loras(dit, [(trained_lora(on_host(trained), task.trainable, model.dit), 1.0)])
        sampled = pipeline.Model(model, params | {"dit": dit}, tokenizer, mesh)
        return make_samples(sampled, [source[i] for i in range(min(SAMPLES, len(source)))])

    def work(host: dict[str, Any]) -> Work:
        rows, *latents = host["subject_cells"].shape
        shape = (batch_share(mesh).batch_size(rows), *latents, model.vae.latent_channels)
        return dit_work(model, shape, frozen_kernels=isinstance(task.trainable, LoraConfig))

    return Job(
        params=trained,
        frozen=frozen,
        specs=specs,
        loss=loss,
        batches=batches,
        prepare=prepare,
        work=work,
        export=export,
        validate=validate if fixed else None,
        sample=None if validation_clips is None else functools.partial(sample, validation_clips),
        overfit=task.overfit,
    )


def model_config(task: DiTTask) -> ModelConfig:
    """The model to train: what the task says, with the frozen networks that the folder has."""
    stored = load_model_config(task.folder)
    if task.model is None:
        return stored
    has_images = task.model.dit.image_dim is not None
    return dataclasses.replace(
        task.model,
        vae=stored.vae,
        text_encoder=stored.text_encoder,
        image_encoder=stored.image_encoder if has_images else None,
    )


def open_sources(task: DiTTask, seed: int) -> tuple[Source, Source | None]:
    """Records to train on and to validate on."""
    data = task.data
    if isinstance(data, EmojiData):
        held_out = data.validation_clips
        return (
            EmojiSource(data.world, "train", seed + 1, data.num_clips),
            EmojiSource(data.world, "held_out", seed + 1, held_out) if held_out else None,
        )
    return open_records(data.folders), open_records(data.validation_folders) if data.validation_folders else None


def open_batches(
    source: Source,
    task: DiTTask,
    arrays: Callable[[ClipRecord, np.random.Generator], dict[str, np.ndarray]],
    seed: int,
    mesh: Mesh,
) -> clips.Batches:
    return clips.Batches(source, task.phases, arrays, seed, rows=batch_share(mesh).rows)


def check_trainable(task: DiTTask, model: ModelConfig, abstract_dit: Params) -> None:
    """Refuses names that no parameter or layer has.

    Raises:
        ValueError: lists those there are.
    """
    if isinstance(task.trainable, LoraConfig):
        jax.eval_shape(functools.partial(init_lora, model.dit, task.trainable), jax.random.key(0))
    else:
        split_params(abstract_dit, task.trainable)


def init_random(model: ModelConfig, mesh: Mesh, seed: int, only: Collection[str] = NETWORKS) -> dict[str, Params]:
    """Networks of random parameters on the mesh."""
    abstract = pipeline.place_params(mesh, pipeline.abstract_params(model, only))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    init = functools.partial(pipeline.init_params, model, only=only)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


Join = Callable[[Params, Params], tuple[Params, Params | None]]  # (trained, frozen) -> (DiT, LoRA)


def choose_trainable(
    task: DiTTask, config: TrainConfig, model: ModelConfig, mesh: Mesh, dit: Params, out: pathlib.Path
) -> tuple[Params, Params, ParamSpecs, Join, Callable[[Params], str]]:
    """What is trained, what stays, how both are one model again, and what is written in the end."""
    if isinstance(task.trainable, LoraConfig):
        lora_config = task.trainable
        lora = init_lora(model.dit, lora_config, jax.random.key(config.seed))

        def write(trained: Params) -> str:
            file = out / "lora.safetensors"
            finished = trained_lora(on_host(trained), lora_config, model.dit)
            on_first(lambda: write_lora(file, finished, "original"))
            return f"wrote {file}; next: python sample.py --model {task.folder} --lora {file}"

        return lora, dit, PARAM_SPECS["lora"], lambda lora, dit: (dit, scale_lora(lora_config, lora)), write

    trained, rest = split_params(dit, task.trainable)

    def write_model(trained: Params) -> str:
        folder = out / "model"
        on_first(lambda: copy_networks(task.folder, folder, but="dit"))
        checkpoint.save_model(folder, model, {"dit": join_params(trained, rest)}, config.save_dtype)
        return f"wrote {folder}; next: python sample.py --model {folder}"

    return trained, rest, PARAM_SPECS["dit"], lambda trained, rest: (join_params(trained, rest), None), write_model


def copy_networks(source: pathlib.Path, target: pathlib.Path, but: str) -> None:
    """The other networks of a model folder and its tokenizer, where they are not there already."""
    for name in (*NETWORKS, "tokenizer"):
        if name != but and (source / name).is_dir() and not (target / name).exists():
            part = target / f".{name}.new"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(source / name, part)
            part.rename(target / name)


def as_batch(arrays: dict[str, Array], frame_positions: tuple[int, ...]) -> Batch:
    arrays = dict(arrays)
    clean, cells = arrays.pop("clean_latents"), arrays.pop("subject_cells")
    return Batch(clean, cells, Conditioning(**arrays), frame_positions)


def blank_conditioning(model: ModelConfig, tokenizer: Any, params: dict[str, Params]) -> Null:
    """No prompt and an empty canvas, in the model's own size."""
    sampling = model.sampling
    blank = prepare_case(
        model,
        tokenizer,
        "",
        [],
        num_frames=sampling.num_frames,
        height=sampling.height,
        width=sampling.width,
        num_subjects=1,
    )
    encode = jax.jit(lambda params, arrays: encode_cases(pipeline.encoders(model, params), arrays, sampling.num_frames))
    conditioning = jax.tree.map(lambda leaf: leaf[0], encode(params, stack_cases([blank])))
    return Null(conditioning.text_embeddings, conditioning.reference_latents, conditioning.image_embeddings)


def validation_batches(
    source: Source,
    arrays: Callable[[ClipRecord, np.random.Generator], dict[str, np.ndarray]],
    prepare: Callable[[dict[str, Any]], Batch],
    seed: int,
    batch_size: int = 8,
) -> list[Batch]:
    """The fixed set: all records of a source, each as its own number says, grouped by size."""
    batches = []
    by_size: dict[Any, list[int]] = {}
    for index, size in enumerate(source.sizes):
        by_size.setdefault(size, []).append(index)
    for indices in by_size.values():
        for start in range(0, len(indices) - batch_size + 1, batch_size):
            rows = [arrays(source[i], np.random.default_rng([seed, i])) for i in indices[start : start + batch_size]]
            host: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            cells = host["subject_cells"]
            batches.append(prepare(host | {"frame_positions": tuple(range(cells.shape[1]))}))
    return batches


def make_samples(model: pipeline.Model, records: list[ClipRecord]) -> Samples:
    """Of the records' first captions and the first views of their references."""
    requests = []
    for index, record in enumerate(records):
        caption = record.captions[0]
        images = [clips.view_image(reference.views[0]) for reference in record.references]
        requests.append(pipeline.Request(caption.text, images, clips.caption_subjects(record, caption), key=str(index)))
    videos = pipeline.generate(model, requests)
    rows = [
        SheetRow(
            references=list(request.images),
            canvas=Image.fromarray(video.case.canvas.image),
            frames=video.frames,
            caption=request.prompt,
        )
        for request, video in zip(requests, videos, strict=True)
    ]
    return Samples(contact_sheet(rows), [video.frames for video in videos], model.config.fps)


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


def open_vae(config: TrainConfig, out: pathlib.Path, mesh: Mesh) -> Job:
    task = config.task
    assert isinstance(task, VAETask)
    model = task.model
    if task.folder is None:
        vocabulary = emoji_world.vocabulary(task.data.world)
        tokenizer = out / "model" / "tokenizer"
        vocab_size = on_first(lambda: emoji_tokenizer.build_tokenizer(vocabulary, tokenizer, model.dit.text_len))
        text_encoder = dataclasses.replace(model.text_encoder, vocab_size=vocab_size)
        model = dataclasses.replace(model, text_encoder=text_encoder)
        params = init_random(model, mesh, config.seed)
    else:
        model = load_model_config(task.folder)
        abstract = pipeline.place_params(mesh, pipeline.abstract_params(model, only=("vae",)))
        _, params = checkpoint.restore_model(task.folder, abstract)
    trained, rest = split_params(params["vae"], task.trainable)
    frames = emoji_clips.render_clips(model, task.data.world, "train", config.seed, task.data.num_clips)
    num_held_out = 0 if config.events.validation is None else task.data.validation_clips
    held_out = emoji_clips.render_clips(model, task.data.world, "held_out", config.seed, num_held_out)

    def loss(trained: Params, frozen: Any, frames: Array, keys: Array) -> Any:
        return reconstruction(model.vae, task.kl_weight, join_params(trained, frozen), frames, keys)

    @jax.jit
    def squared_error(params: Params, frames: Array) -> Array:
        frames = frames.astype(jnp.float32) / 127.5 - 1
        latents = vae.encode(model.vae, params, frames)
        return jnp.mean(jnp.square(jnp.clip(pipeline.decode(model, params, latents), -1, 1) - frames))

    def validate(trained: Params) -> dict[str, Any]:
        params = join_params(trained, rest)
        errors = [squared_error(params, held_out[i : i + 8]) for i in range(0, len(held_out) - 7, 8)]
        return {"validation_psnr": float(10 * np.log10(4 / np.mean(errors)))}

    def export(trained: Params) -> str:
        folder, vae_params = out / "model", join_params(trained, rest)
        if task.folder is not None:
            on_first(lambda: copy_networks(task.folder, folder, but="vae"))
            checkpoint.save_model(folder, model, {"vae": vae_params}, config.save_dtype)
        else:
            # The DiT works on latents of mean 0 and deviation 1 per channel.
            encode = jax.jit(
                lambda params, frames: vae.encode(model.vae, params, frames.astype(jnp.float32) / 127.5 - 1)
            )
            some = range(0, min(len(frames), 512), 16)
            latents = np.concatenate([on_host(encode(vae_params, frames[i : i + 16])) for i in some])
            mean, std = latents.mean((0, 1, 2, 3)), latents.std((0, 1, 2, 3))
            statistics = {
                "latent_mean": tuple(map(float, mean.round(4))),
                "latent_std": tuple(map(float, std.round(4))),
            }
            finished = dataclasses.replace(model, vae=dataclasses.replace(model.vae, **statistics))
            others = {name: params[name] for name in ("text_encoder", "image_encoder") if name in params}
            checkpoint.save_model(folder, finished, {"vae": vae_params, **others}, config.save_dtype)
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
        validate=validate if len(held_out) >= 8 else None,
    )
