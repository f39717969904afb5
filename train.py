"""Trains MAGREF, a part of it, or a LoRA beside it.

    python train.py configs/smoke.py --output-dir runs/smoke --num-steps 20

The same command continues a run that was cut off, to the bit, and a longer `--num-steps` continues a finished one. OUTPUT_DIR
holds:

    config.json      the preset with all overrides
    metrics.jsonl    one line a step: step, loss and everything else that was measured
    checkpoints/     parameters, average, optimiser, random key and position in the data, with digests
    samples/         contact sheets of held-out cases
    tensorboard/     the same for TensorBoard (`--config.tensorboard True`)
    profile/         traces of jax.profiler (`--config.events.profile 10 5`)
    model/           a model folder for `sample.py --model`, or lora.safetensors, once all steps are done

SIGTERM and Ctrl-C write a checkpoint of the current step and exit with status 143 and 130.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh
from tqdm import tqdm

from magref_jax.checkpoint import Params
from magref_jax.distributed import initialise, is_first, on_first, wait_for_all
from magref_jax.files import replacing
from magref_jax.sharding import make_mesh
from magref_jax.training.checkpoints import Checkpoints, SaveError, StopSignal
from magref_jax.training.config import TrainConfig
from magref_jax.training.job import Job, Samples
from magref_jax.training.monitor import Monitor
from magref_jax.training.optimizer import make_optimizer
from magref_jax.training.step import TrainState, init_state, state_shardings, train_step
from magref_jax.training.tasks import open_job


def train(config: TrainConfig, out: pathlib.Path, mesh: Mesh | None = None) -> TrainState:
    """Trains to step `config.num_steps`, from the newest checkpoint in `out` if there is one; the state at the end.

    `mesh` is all devices on the axis `fsdp` if not given.
    """
    events, last = config.events, config.num_steps
    mesh = make_mesh("fsdp=-1") if mesh is None else mesh
    with contextlib.ExitStack() as stack:
        monitor = stack.enter_context(
            Monitor(
                out,
                last,
                report_every=events.report,
                max_skipped=config.max_skipped,
                tensorboard=config.tensorboard,
                profile=events.profile,
            )
        )
        stop = stack.enter_context(StopSignal())
        on_first(lambda: write_config(config, out))
        checkpoints = Checkpoints(out / "checkpoints", keep=events.keep, keep_every=events.keep_every)
        stack.callback(checkpoints.close)
        job = open_job(config, out, mesh)
        stack.callback(job.batches.close)

        optimizer = make_optimizer(config.optimizer)
        state, shardings = start_state(config, job, optimizer, mesh)
        if (done := checkpoints.latest_step()) is not None:
            state, position, saved = checkpoints.restore(done, abstract_state(state, shardings))
            job.batches.restore(position)
            for change in config_changes(saved, as_json(config)) if is_first() else []:
                print(f"train.py: not as before step {done}: {change}", file=sys.stderr)
        step_fn = jax.jit(
            functools.partial(train_step, job.loss, optimizer, config.optimizer.ema_decay, config.accumulation_steps),
            donate_argnums=0,
            out_shardings=(shardings, None),
        )

        monitor.begin(int(state.step), int(state.skipped))
        batch = work = None
        for step in range(int(state.step) + 1, last + 1):
            with monitor.time("data"):
                if batch is None or not job.overfit:
                    host = next(job.batches)
                    batch, work = job.prepare(host), job.work(host)
            with monitor.time("step"):
                noise = jnp.asarray(0 if job.overfit else step - 1)
                state, metrics = step_fn(state, job.frozen, batch, noise)
            monitor.log(step, metrics, work)

            if job.validate is not None and is_due(events.validation, step, last):
                with monitor.time("validation"):
                    monitor.log(step, job.validate(trained(state)))
            if job.sample is not None and is_due(events.sample, step, last):
                with monitor.time("sample"):
                    samples = job.sample(trained(state))
                    if is_first():
                        save_samples(samples, out, step, monitor)
            stopped = stop.received or checkpoints.reached_preemption(step)
            if is_due(events.checkpoint, step, last) or stopped:
                with monitor.time("checkpoint"):
                    save(checkpoints, step, state, job.batches.state(), config, wait=bool(stopped) or step == last)
            if stopped:
                raise SystemExit(128 + int(stopped))

        with monitor.time("other"):
            message = job.export(trained(state))
        if is_first():
            print(monitor.goodput.table())
            print(message)
    return state


def start_state(
    config: TrainConfig, job: Job, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, Any]:
    """The state of step 0 on the mesh, and where the mesh holds what of it. Takes the memory of the job's parameters."""
    init = functools.partial(
        init_state,
        optimizer=optimizer,
        key=jax.random.key(config.seed),
        with_ema=config.optimizer.ema_decay is not None,
    )
    shardings = state_shardings(mesh, jax.eval_shape(init, job.params), optimizer, job.specs)
    state = jax.jit(init, out_shardings=shardings)(job.params)
    for leaf in jax.tree.leaves(job.params):
        if isinstance(leaf, jax.Array):
            leaf.delete()
    return state, shardings


def abstract_state(state: TrainState, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
    )


def is_due(every: int | None, step: int, last: int) -> bool:
    return every is not None and (step % every == 0 or step == last)


def trained(state: TrainState) -> Params:
    """The parameters to look at and to keep: the average, where there is one."""
    return state.params if state.ema is None else state.ema


def save(
    checkpoints: Checkpoints, step: int, state: TrainState, position: Any, config: TrainConfig, wait: bool
) -> None:
    """A full disk does not end a run as long as there is a next time to try."""
    try:
        checkpoints.save(step, state, position, as_json(config), wait=wait)
    except SaveError as error:
        if wait:
            raise
        tqdm.write(f"train.py: {error}", file=sys.stderr)
    if wait:
        wait_for_all("saved")  # the first process is the last to finish


def save_samples(samples: Samples, out: pathlib.Path, step: int, monitor: Monitor) -> None:
    with replacing(out / "samples" / f"step_{step}.png") as part:
        samples.sheet.save(part, "PNG")
    monitor.image("samples", step, np.asarray(samples.sheet))
    for index, video in enumerate(samples.videos):
        monitor.video(f"sample_{index}", step, video, samples.fps)


def as_json(config: TrainConfig) -> Any:
    """The config as JSON holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def config_changes(before: Any, now: Any, path: str = "") -> list[str]:
    """What a run that goes on does differently; how long it is to be is no difference."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in now if path or name != "num_steps"]
        return [line for name in names for line in config_changes(before.get(name), now[name], f"{path}.{name}")]
    return [] if before == now else [f"config{path} is {now}, was {before}"]


def write_config(config: TrainConfig, out: pathlib.Path) -> None:
    with replacing(out / "config.json") as part:
        part.write_text(json.dumps(as_json(config), indent=1) + "\n", encoding="utf-8")


def load_config(path: str) -> TrainConfig:
    """The `config` of a Python file."""
    spec = importlib.util.spec_from_file_location("preset", path)
    if spec is None or spec.loader is None or not pathlib.Path(path).is_file():
        raise SystemExit(f"train.py: {path} is not a Python file; the presets are configs/*.py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.config


@dataclasses.dataclass(frozen=True)
class Arguments:
    output_dir: pathlib.Path  # checkpoints, metrics and what comes out
    config: TrainConfig
    num_steps: int | None = None  # of the whole run; what the preset says if not given
    coordinator: str | None = None  # HOST:PORT of process 0, where processes do not find each other; with the next two
    num_processes: int | None = None
    process_id: int | None = None  # of this process, from 0
    mesh: str = ""  # sizes of data, fsdp, context and tensor, such as "data=2,fsdp=-1"; "": all devices on fsdp
    plan: str | None = (
        None  # train nothing: what a step takes on chips such as v5p:4x4x4; `--mesh auto` compares meshes
    )
    plan_json: pathlib.Path | None = None  # where to write that


def plan(config: TrainConfig, arguments: Arguments) -> str:
    from magref_jax import planner

    try:
        return planner.report_training(config, str(arguments.plan), arguments.mesh, arguments.plan_json)
    except (ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"train.py: {error}") from None


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(
            "usage: python train.py configs/NAME.py --output-dir DIR [--num-steps N] [--config.… overrides]"
        )
    default = Arguments(
        output_dir=pathlib.Path("runs") / pathlib.Path(sys.argv[1]).stem, config=load_config(sys.argv[1])
    )
    # A preset says what is trained; its alternatives are other presets.
    options = (tyro.conf.AvoidSubcommands,)
    arguments = tyro.cli(Arguments, default=default, args=sys.argv[2:], description=__doc__, config=options)
    if arguments.plan is not None:
        print(plan(arguments.config, arguments))
        return
    try:
        initialise(arguments.coordinator, arguments.num_processes, arguments.process_id)
    except ValueError as error:
        raise SystemExit(f"train.py: {error}") from None
    config = arguments.config
    if arguments.num_steps is not None:
        config = dataclasses.replace(config, num_steps=arguments.num_steps)
    train(config, arguments.output_dir, make_mesh(arguments.mesh or "fsdp=-1"))


if __name__ == "__main__":
    main()
