"""Trains a model from scratch, one stage after another.

Run `python train.py configs/emoji.py --stage vae --out runs/emoji`, then the same with `--stage dit`. The same command
continues a run that was cut off. `OUT/model` is a model folder that `sample.py --model` takes.
"""

import dataclasses
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro
from tqdm import tqdm

from magref_jax import checkpoint, pipeline, training
from magref_jax.conditioning.case import encode_cases, prepare_case, stack_cases
from magref_jax.config import load_model_config
from magref_jax.data import emoji_clips, emoji_tokenizer, emoji_world
from magref_jax.models import vae


def load_config(path: str) -> training.TrainConfig:
    """The `config` of a Python file."""
    spec = importlib.util.spec_from_file_location("preset", path)
    if spec is None or spec.loader is None or not pathlib.Path(path).is_file():
        raise SystemExit(f"train.py: {path} is not a Python file; the presets are configs/*.py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.config


def run_phases(
    out: pathlib.Path,
    name: str,
    config: training.TrainConfig,
    phases: tuple[Any, ...],
    state: training.TrainState,
    step_fn: training.TrainStep,
    make_batch: Callable[[Any, np.random.Generator], Any],
) -> training.TrainState:
    """The loop. Batch and randomness of step i are functions of (seed, i): a restored run goes on as if never stopped."""
    key = jax.random.key(config.seed)
    ends = np.cumsum([phase.num_steps for phase in phases])
    window: list[dict[str, jax.Array]] = []
    with (
        checkpoint.checkpoint_manager(out / "checkpoints" / name) as manager,
        (out / f"{name}.jsonl").open("a") as log,
        tqdm(total=int(ends[-1]), desc=name, unit="step") as bar,
    ):
        if manager.latest_step() is not None:
            abstract = jax.eval_shape(lambda: state)
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(abstract))
        bar.update(int(state.step))
        started = time.perf_counter()
        for step in range(int(state.step), int(ends[-1])):
            phase = phases[int(np.searchsorted(ends, step, side="right"))]
            batch = make_batch(phase, np.random.default_rng([config.seed, step]))
            state, metrics = step_fn(state, batch, key)
            window.append(metrics)
            bar.update()
            last = step + 1 == ends[-1]
            if (step + 1) % config.log_every == 0 or last:
                means = {k: float(np.mean([m[k] for m in window])) for k in window[0]}
                if not np.isfinite(means["loss"]):
                    raise SystemExit(f"train.py: the loss is {means['loss']} at step {step + 1}.")
                seconds = (time.perf_counter() - started) / len(window)
                record = {"step": step + 1, **means, "samples_per_second": phase.batch_size / seconds}
                print(json.dumps({k: round(v, 5) for k, v in record.items()}), file=log, flush=True)
                bar.set_postfix({k: f"{v:.4g}" for k, v in means.items()})
                window, started = [], time.perf_counter()
            if (step + 1) % config.checkpoint_every == 0 or last:
                manager.save(step + 1, args=ocp.args.StandardSave(state))
    return state


def train_vae(config: training.TrainConfig, out: pathlib.Path, start: pathlib.Path | None = None) -> None:
    """Trains the VAE and writes the model folder with it, the frozen random encoders and the tokenizer."""
    tokenizer_folder = out / "model" / "tokenizer"
    text_len = config.model.dit.text_len
    vocab_size = emoji_tokenizer.build_tokenizer(emoji_world.vocabulary(config.data), tokenizer_folder, text_len)
    text_encoder = dataclasses.replace(config.model.text_encoder, vocab_size=vocab_size)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text_encoder=text_encoder))

    stage = config.vae
    clips = emoji_clips.render_clips(config.model, config.data, "train", config.seed, stage.num_clips)
    params = jax.jit(lambda key: pipeline.init_params(config.model, key))(jax.random.key(config.seed))
    params["vae"] = start_params(start, "vae", params["vae"])
    optimizer = training.make_optimizer(stage.optimizer, sum(phase.num_steps for phase in stage.phases))
    stride = config.model.vae.spatial_stride

    def make_batch(phase: training.VAEPhase, rng: np.random.Generator) -> np.ndarray:
        return emoji_clips.vae_batch(
            clips, rng, phase.batch_size, phase.num_frames, phase.crop, stride, stage.grey_fraction
        )

    state = training.init_state(params["vae"], optimizer)
    step_fn = training.make_vae_step(config, optimizer)
    state = run_phases(out, "vae", config, stage.phases, state, step_fn, make_batch)

    # The DiT works on latents of mean 0 and deviation 1 per channel.
    encode = jax.jit(lambda frames: vae.encode(config.model.vae, state.ema, frames.astype(jnp.float32) / 127.5 - 1))
    latents = np.concatenate([encode(clips[i : i + 16]) for i in range(0, min(len(clips), 512), 16)])
    mean, std = latents.mean((0, 1, 2, 3)), latents.std((0, 1, 2, 3))
    statistics = {"latent_mean": tuple(map(float, mean.round(4))), "latent_std": tuple(map(float, std.round(4)))}
    model = dataclasses.replace(config.model, vae=dataclasses.replace(config.model.vae, **statistics))
    frozen = {name: params[name] for name in ("text_encoder", "image_encoder")}
    checkpoint.save_model(out / "model", model, {"vae": state.ema, **frozen}, config.save_dtype)
    print(f"wrote {out / 'model'}; next: the same command with --stage dit")


def train_dit(config: training.TrainConfig, out: pathlib.Path, start: pathlib.Path | None = None) -> None:
    """Encodes the clips once with the frozen networks of OUT/model, then trains the DiT and adds it to the folder."""
    folder = out / "model"
    stored = load_model_config(folder)
    # Sizes and statistics that the first stage found out; the DiT itself may have been changed since.
    model = dataclasses.replace(config.model, vae=stored.vae, text_encoder=stored.text_encoder)
    config = dataclasses.replace(config, model=model)
    stage, data = config.dit, config.data
    abstract = {k: v for k, v in pipeline.abstract_params(model).items() if k != "dit"}
    _, frozen = checkpoint.restore_model(folder, abstract)
    encoders = pipeline.encoders(model, frozen)
    tokenizer = pipeline.load_tokenizer(folder)
    num_frames = model.sampling.num_frames

    def make_example(index: int) -> emoji_clips.Example:
        clip = emoji_world.sample_clip(data, "train", config.seed + 1, index)
        return emoji_clips.make_example(model, tokenizer, clip, index, stage.first_frame_target)

    clips = emoji_clips.encode_clips(out / "encoded", make_example, encoders, stage.num_clips)

    blank = prepare_case(
        model, tokenizer, "", [], num_frames=num_frames, height=data.height, width=data.width, num_subjects=1
    )
    conditioning = jax.jit(lambda arrays: encode_cases(encoders, arrays, num_frames))(stack_cases([blank]))
    null = training.Null(
        conditioning.text_embeddings[0], conditioning.reference_latents[0], conditioning.image_embeddings[0]
    )

    def make_batch(phase: training.DiTPhase, rng: np.random.Generator) -> training.Batch:
        batch = clips.batch(rng, phase.batch_size, phase.num_latent_frames, phase.reach, phase.max_references)
        return training.Batch(*batch)

    optimizer = training.make_optimizer(stage.optimizer, sum(phase.num_steps for phase in stage.phases))
    params = jax.jit(lambda key: pipeline.init_params(model, key)["dit"])(jax.random.key(config.seed))
    params = start_params(start, "dit", params)
    state = training.init_state(params, optimizer)
    compute = dataclasses.replace(
        config, model=dataclasses.replace(model, dit=dataclasses.replace(model.dit, dtype=stage.dtype))
    )
    step_fn = training.make_dit_step(compute, optimizer, null)
    state = run_phases(out, "dit", config, stage.phases, state, step_fn, make_batch)
    checkpoint.save_model(folder, model, {"dit": state.ema}, config.save_dtype)
    print(f"wrote {folder}; next: python sample.py --model {folder}")


def start_params(folder: pathlib.Path | None, name: str, params: checkpoint.Params) -> checkpoint.Params:
    """The parameters of a model folder to start from, or those given."""
    if folder is None:
        return params
    return checkpoint.restore_params(folder / name, jax.eval_shape(lambda: params))


STAGES = {"vae": train_vae, "dit": train_dit}


@dataclasses.dataclass(frozen=True)
class Arguments:
    stage: Literal["vae", "dit"]  # the DiT needs the VAE's model folder
    out: pathlib.Path  # checkpoints, logs and the model folder
    start: pathlib.Path | None  # a model folder whose weights to start from instead of random ones
    config: training.TrainConfig


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python train.py configs/NAME.py --stage vae|dit --out DIR [--config.… overrides]")
    default = Arguments(
        stage="vae",
        out=pathlib.Path("runs") / pathlib.Path(sys.argv[1]).stem,
        start=None,
        config=load_config(sys.argv[1]),
    )
    arguments = tyro.cli(Arguments, default=default, args=sys.argv[2:])
    STAGES[arguments.stage](arguments.config, arguments.out, arguments.start)


if __name__ == "__main__":
    main()
