"""Trains the transformer, or a part of it, or a LoRA beside it; the other networks are frozen."""

import dataclasses
import functools
import glob
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from PIL import Image

from magref_jax import checkpoint, pipeline
from magref_jax.checkpoint import Params
from magref_jax.conditioning.case import check_size, encode_cases, prepare_case, stack_cases
from magref_jax.conditioning.inputs import Conditioning
from magref_jax.config import ModelConfig, load_model_config
from magref_jax.convert.lora import apply_loras, trained_lora, write_lora
from magref_jax.data import clips
from magref_jax.data.emoji_records import EmojiSource
from magref_jax.data.precompute import encode_batch, precompute
from magref_jax.data.records import ClipRecord, Source, open_records
from magref_jax.descriptions import short_repr
from magref_jax.distributed import batch_share, is_first, on_first, on_host, shard_rows
from magref_jax.models.adapters import LoraConfig, init_lora, scale_lora
from magref_jax.sharding import PARAM_SPECS, ParamSpecs, on_mesh, shard_batch
from magref_jax.training.config import DiTTask, EmojiData, TrainConfig
from magref_jax.training.job import Accept, Check, Job, SameBatch, Samples
from magref_jax.training.monitor import Work, dit_work
from magref_jax.training.networks import copy_networks, init_random, insert_blocks
from magref_jax.training.objective import Batch, Null, flow_matching, velocity_error
from magref_jax.training.optimizer import join_params, split_params
from magref_jax.video import SheetRow, contact_sheet

VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
SAMPLES = 4  # videos on a contact sheet


def open_dit(config: TrainConfig, out: pathlib.Path, mesh: Mesh, accept: Accept) -> Job:
    task = config.task
    assert isinstance(task, DiTTask)
    model = model_config(task)
    tokenizer = pipeline.load_tokenizer(task.folder, model)
    training_clips, validation_clips = open_sources(task, config.seed)
    make = functools.partial(make_row, model, tokenizer, task)
    # What cannot be trained is refused before weights are read: batches that cannot be filled, records that do not fit.
    batches = open_batches(training_clips, task, make, config.seed, mesh)
    for source in filter(None, (training_clips, validation_clips)):
        check_records(model, source, make)
    abstract = abstract_networks(task, model, mesh)
    accept(abstract_trained(task, model), None if task.layouts else batches)
    dit, encoders = read_networks(task, model, mesh, config.seed, abstract)
    if task.layouts:
        training_clips = precompute(
            training_clips,
            out / "encoded",
            model,
            tokenizer,
            encoders,
            layouts=task.layouts,
            choice=task.choice,
            first_frame_target=task.objective.first_frame_target,
            seed=config.seed,
            mesh=mesh,
        )
        batches = open_batches(training_clips, task, make, config.seed, mesh)
    trained, rest, specs, join, export = choose_trainable(task, config, model, mesh, dit, out)
    frozen = {"dit": rest, "null": blank_conditioning(model, tokenizer, encoders)}
    run = _Run(task, model, tokenizer, mesh, encoders, frozen, join, config.seed)

    validate = sample = None
    if validation_clips is not None:
        sample = functools.partial(run.sample, validation_clips)
    elif is_first() and (config.events.validation or config.events.sample):
        print(f"train.py: no validation and no sample sheets: {why_no_validation(task)}", file=sys.stderr)
    if validation_clips is not None and config.events.validation is not None:
        # Every process makes all of the fixed set, which may be smaller than the mesh.
        prepare_whole = functools.partial(run.prepare, place=shard_batch)
        fixed = validation_batches(validation_clips, make, prepare_whole, config.seed)
        validate = functools.partial(run.validate, fixed)
    return Job(
        params=trained,
        frozen=frozen,
        specs=specs,
        loss=run.loss,
        batches=SameBatch(batches) if task.overfit else batches,
        prepare=run.prepare,
        work=run.work,
        export=export,
        validate=validate,
        sample=sample,
        overfit=task.overfit,
    )


Join = Callable[[Params, Params], tuple[Params, Params | None]]  # (trained, frozen) -> (DiT, LoRA)


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """What the functions of a job share."""

    task: DiTTask
    model: ModelConfig
    tokenizer: Any
    mesh: Mesh
    encoders: dict[str, Params]
    frozen: dict[str, Any]  # the part of the DiT that is not trained, and the null conditioning
    join: Join
    seed: int

    @functools.cached_property
    def in_training(self) -> ModelConfig:
        dit, task = self.model.dit, self.task
        dit = dataclasses.replace(dit, dtype=task.dtype or dit.dtype, remat=task.remat or dit.remat)
        return dataclasses.replace(self.model, dit=dit)

    @functools.cached_property
    def encode(self) -> Callable[..., dict[str, Array]]:
        return jax.jit(functools.partial(encode_batch, self.model, mesh=self.mesh))

    def prepare(self, host: dict[str, Any], place: Callable[[Mesh, Any], Any] = shard_rows) -> Batch:
        positions = tuple(host["frame_positions"])
        batch = place(self.mesh, {name: value for name, value in host.items() if name != "frame_positions"})
        if "frames" in batch:
            batch = {**self.encode(self.encoders, batch), "subject_cells": batch["subject_cells"]}
            chosen = jnp.array(positions, jnp.int32)
            batch |= {name: batch[name][:, chosen] for name in ("clean_latents", "reference_latents") if name in batch}
        return as_batch(batch, positions)

    def loss(self, trained: Params, frozen: Any, batch: Batch, keys: Array) -> Any:
        dit, lora = self.join(trained, frozen["dit"])
        with on_mesh(self.mesh):
            return flow_matching(self.in_training, self.task.objective, dit, lora, frozen["null"], batch, keys)

    @functools.cached_property
    def level_error(self) -> Callable[..., Any]:
        """Sum and count of the squared error of the clips at one noise level, the same noise every time."""

        def error(trained: Params, frozen: Any, batch: Batch, sigma: Array) -> Any:
            dit, lora = self.join(trained, frozen["dit"])
            size = len(batch.clean_latents)
            keys = jax.random.split(jax.random.key(self.seed), size)
            with on_mesh(self.mesh):
                sigmas = jnp.full(size, sigma, jnp.float32)
                sums = velocity_error(self.in_training, self.task.objective, dit, lora, batch, sigmas, keys)
            return sums["loss_video"]

        return jax.jit(error)

    def validate(self, fixed: list[Batch], trained: Params, check: Check) -> dict[str, Any]:
        levels = {}
        for sigma in VALIDATION_SIGMAS:
            sums: list[Any] = []
            for batch in fixed:
                sums.append(self.level_error(trained, self.frozen, batch, sigma))
                jax.block_until_ready(sums[-2:-1])  # the device has a batch in its queue while the host waits
                check()
            levels[f"{sigma:g}"] = float(sum(total for total, _ in sums) / sum(count for _, count in sums))
        return {"validation_loss": float(np.mean(list(levels.values()))), "validation_loss_by_sigma": levels}

    def sample(self, source: Source, trained: Params, check: Check) -> Samples:
        dit, _ = self.join(trained, self.frozen["dit"])
        if isinstance(self.task.trainable, LoraConfig):
            dit = apply_loras(dit, [(trained_lora(on_host(trained), self.task.trainable, self.model.dit), 1.0)])
        model = pipeline.Model(self.model, self.encoders | {"dit": dit}, self.tokenizer, self.mesh)
        return make_samples(model, [source[i] for i in range(min(SAMPLES, len(source)))], check)

    def work(self, host: dict[str, Any]) -> Work:
        rows, *latents = host["subject_cells"].shape
        shape = (batch_share(self.mesh).batch_size(rows), *latents, self.model.vae.latent_channels)
        return dit_work(self.model, shape, frozen_kernels=isinstance(self.task.trainable, LoraConfig))


def make_row(
    model: ModelConfig, tokenizer: Any, task: DiTTask, record: ClipRecord, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """One row of a batch: encoded, if the record is."""
    if record.cases:
        return clips.choose_case(record, rng, model.dit.text_len)
    target = task.objective.first_frame_target
    return clips.example_arrays(clips.make_example(model, tokenizer, record, rng, task.choice, target))


def abstract_networks(task: DiTTask, model: ModelConfig, mesh: Mesh) -> dict[str, Params]:
    """What the folder must have: shapes, and where the mesh holds them.

    Raises:
        ValueError: `task.start` does not fit it.
    """
    abstract = pipeline.place_params(mesh, pipeline.abstract_params(model))
    if task.start == "random":
        del abstract["dit"]
    elif task.start == "deeper":
        stored = load_model_config(task.folder).dit.num_layers
        if model.dit.num_layers <= stored:
            raise ValueError(
                f"task.start='deeper' with model.dit.num_layers={model.dit.num_layers}: must be more than the {stored} of {task.folder}."
            )
        shallow = dataclasses.replace(model, dit=dataclasses.replace(model.dit, num_layers=stored))
        abstract |= pipeline.place_params(mesh, pipeline.abstract_params(shallow, ("dit",)))
    return abstract


def read_networks(
    task: DiTTask, model: ModelConfig, mesh: Mesh, seed: int, abstract: dict[str, Params]
) -> tuple[Params, dict[str, Params]]:
    """The DiT to start from, and the frozen networks, on the mesh."""
    _, params = checkpoint.restore_model(task.folder, abstract)
    if task.start == "random":
        params |= init_random(model, mesh, seed, only=("dit",))
    elif task.start == "deeper":
        placed = pipeline.place_params(mesh, pipeline.abstract_params(model, ("dit",)))["dit"]
        shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
        insert = functools.partial(insert_blocks, num_layers=model.dit.num_layers)
        params["dit"] = jax.jit(insert, out_shardings=shardings)(params["dit"])
    return params.pop("dit"), params


def model_config(task: DiTTask) -> ModelConfig:
    """The model to train: what the task says, with the frozen networks that the folder has."""
    stored = load_model_config(task.folder)
    if task.model is None:
        return stored
    has_images = task.model.dit.image_dim is not None
    model = dataclasses.replace(
        task.model,
        vae=stored.vae,
        text_encoder=stored.text_encoder,
        image_encoder=stored.image_encoder if has_images else None,
    )
    model.check()
    return model


def open_sources(task: DiTTask, seed: int) -> tuple[Source, Source | None]:
    """Records to train on, and to validate on if there are any: see `why_no_validation`."""
    data = task.data
    if isinstance(data, EmojiData):
        held_out = data.validation_clips
        return (
            EmojiSource(data.world, "train", seed + 1, data.num_clips),
            EmojiSource(data.world, "held_out", seed + 1, held_out) if held_out else None,
        )
    return open_records(data.folders), None if why_no_validation(task) else open_records(data.validation_folders)


def why_no_validation(task: DiTTask) -> str | None:
    """Why there are no clips to validate on; None where there are. Folders of which only some are there are a mistake."""
    if isinstance(task.data, EmojiData):
        return None if task.data.validation_clips else "task.data.validation_clips is 0."
    folders = task.data.validation_folders
    if not folders:
        return "task.data.validation_folders is empty."
    if any(folder.exists() or glob.glob(str(folder)) for folder in folders):
        return None
    return f"there is no folder at {', '.join(map(str, folders))} (task.data.validation_folders)."


def check_records(model: ModelConfig, source: Source, make: clips.Make) -> None:
    """Refuses records of sizes that the model cannot take, and a first record that makes no row for it.

    Raises:
        ValueError: names the size, or the record.
    """
    for _, height, width in dict.fromkeys(map(tuple, source.sizes)):
        try:
            check_size(model, 1, height, width)
        except ValueError as error:
            raise ValueError(f"there are clips of {width}x{height} pixels: {error}") from None
    record = source[0]
    try:
        row = make(record, np.random.default_rng(0))
        if record.cases:
            check_encoded(model, record, row)
    except ValueError as error:
        raise ValueError(f"record {record.id!r}: {error}") from None


def check_encoded(model: ModelConfig, record: ClipRecord, row: dict[str, np.ndarray]) -> None:
    """Refuses what the encoders of another model made.

    Raises:
        ValueError: names the array.
    """
    stride, dit = model.vae.spatial_stride, model.dit
    latents = (record.height // stride, record.width // stride, model.vae.latent_channels)
    expected: dict[str, tuple[int, ...]] = {"clean_latents": latents, "text_embeddings": (dit.text_len, dit.text_dim)}
    if pipeline.takes_references(model):
        expected["reference_latents"] = latents
    if dit.image_dim is not None:
        expected["image_embeddings"] = (dit.image_dim,)
    for name, shape in expected.items():
        found = row[name].shape if name in row else ()
        if found[-len(shape) :] != shape:
            raise ValueError(f"its {name} have the shape {found}, which must end in {shape}: another model encoded it.")


def open_batches(
    source: Source,
    task: DiTTask,
    make: clips.Make,
    seed: int,
    mesh: Mesh,
) -> clips.Batches:
    return clips.Batches(source, task.phases, make, seed, rows=batch_share(mesh).rows)


def abstract_trained(task: DiTTask, model: ModelConfig) -> Params:
    """Shapes of what is trained.

    Raises:
        ValueError: names that no parameter or layer has; lists those there are.
    """
    if isinstance(task.trainable, LoraConfig):
        return jax.eval_shape(functools.partial(init_lora, model.dit, task.trainable), jax.random.key(0))
    return split_params(pipeline.abstract_params(model, ("dit",))["dit"], task.trainable)[0]


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
    make: clips.Make,
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
        for start in range(0, len(indices), batch_size):
            rows = [make(source[i], np.random.default_rng([seed, i])) for i in indices[start : start + batch_size]]
            host: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            cells = host["subject_cells"]
            batches.append(prepare(host | {"frame_positions": tuple(range(cells.shape[1]))}))
    return batches


def make_samples(model: pipeline.Model, records: list[ClipRecord], check: Check) -> Samples:
    """Of the records' first captions and the first views of their references."""
    requests = []
    for index, record in enumerate(records):
        caption = record.captions[0]
        images = [clips.view_image(reference.views[0]) for reference in record.references]
        requests.append(pipeline.Request(caption.text, images, clips.caption_subjects(record, caption), key=str(index)))
    videos = pipeline.generate(model, requests, on_step=lambda _: check())
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
