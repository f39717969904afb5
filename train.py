"""Trains MAGREF, a part of it, or a LoRA beside it.

    python train.py configs/smoke.py --output-dir runs/smoke --num-steps 20

A preset is a Python file with a `config`; those of this folder are found wherever one stands. The same command continues a
run that was cut off, to the bit, and a longer `--num-steps` continues a finished one. OUTPUT_DIR holds:

    config.json      the preset with all overrides
    metrics.jsonl    one line a step: step, loss and everything else that was measured
    checkpoints/     parameters, average, optimiser, random key and position in the data, with digests
    samples/         contact sheets of held-out cases
    tensorboard/     the same for TensorBoard (`--config.tensorboard True`)
    profile/         traces of jax.profiler (`--config.events.profile 10 5`)
    model/           a model folder for `sample.py --model`, or lora.safetensors, once all steps are done

SIGTERM and Ctrl-C write a checkpoint of the current step and exit with status 143 and 130; what was being validated or drawn is
dropped. Exit status 2: a request that cannot be met, said in one sentence.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

if __name__ == "__main__":
    from magref_jax import interrupts

    interrupts.end_silently()

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh
from tqdm import tqdm

from magref_jax.checkpoint import MANIFEST, Params, file_digest
from magref_jax.command import (
    check_devices,
    check_local,
    check_local_fields,
    check_output_folder,
    default_cache,
    keep_compiled_programs,
    program,
)
from magref_jax.distributed import initialise, is_first, on_first, wait_for_all
from magref_jax.files import Claim, remove_leftovers, replacing
from magref_jax.models.adapters import LoraConfig
from magref_jax.sharding import make_mesh
from magref_jax.training.checkpoints import Checkpoints, SaveError, StopSignal
from magref_jax.training.config import TrainConfig
from magref_jax.training.job import BatchStream, Job, Samples, Stopped
from magref_jax.training.monitor import Monitor
from magref_jax.training.optimizer import make_optimizer
from magref_jax.training.step import TrainState, init_state, state_shardings, train_step
from magref_jax.training.tasks import open_job


def train(config: TrainConfig, out: pathlib.Path, mesh: Mesh | None = None) -> TrainState:
    """Trains to step `config.num_steps`, from the newest checkpoint in `out` if there is one; the state at the end.

    `mesh` is all devices on the axis `fsdp` if not given. Writes nothing before all of this is accepted.

    Raises:
        ValueError, OSError: what cannot be trained or continued; nearly all of it is known before weights are read.
        SystemExit: a signal, with its status, once a checkpoint is written.
    """
    events, last = config.events, config.num_steps
    mesh = make_mesh("fsdp=-1") if mesh is None else mesh
    about = as_json(config) | {"weights": weights_digest(config.task.folder)}
    optimizer = make_optimizer(config.optimizer)
    make_state = functools.partial(
        init_state,
        optimizer=optimizer,
        key=jax.random.key(config.seed),
        with_ema=config.optimizer.ema_decay is not None,
    )
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
        checkpoints = Checkpoints(out / "checkpoints", keep=events.keep, keep_every=events.keep_every)
        stack.callback(checkpoints.close)
        done = checkpoints.latest_step()
        if done is not None and done > last:
            raise ValueError(f"num_steps={last}: the run in {out} has done {done} steps; give more, or another folder.")

        def accept(params: Params, batches: BatchStream | None) -> None:
            if done is not None:
                checkpoints.check(done, jax.eval_shape(make_state, params))
                if batches is not None:
                    batches.restore(checkpoints.read(done)[0])

        with stop.leaving():  # nothing is to be saved yet
            job = open_job(config, out, mesh, accept)
            stack.callback(job.batches.close)
            state, shardings = start_state(make_state, job, optimizer, mesh)
            if done is not None:
                state, position, saved = checkpoints.restore(done, abstract_state(state, shardings))
                job.batches.restore(position)
                for change in changes(saved, about) if is_first() else []:
                    print(f"train.py: not as before step {done}: {change}", file=sys.stderr)
            on_first(lambda: write_config(config, out))
            on_first(lambda: [remove_leftovers(folder) for folder in (out, out / "samples")])
        step_fn = jax.jit(
            functools.partial(train_step, job.loss, optimizer, config.optimizer.ema_decay, config.accumulation_steps),
            donate_argnums=0,
            out_shardings=(shardings, None),
        )

        def received() -> Any:
            """The signal that ends the run, in all of several processes after the same number of questions."""
            stop.received = stop.received or checkpoints.reached_preemption()
            return stop.received

        def check() -> None:
            if received():
                raise Stopped

        monitor.begin(int(state.step), int(state.skipped))
        batch = work = None
        for step in range(int(state.step) + 1, last + 1):
            with monitor.time("data"):
                if batch is None or not job.overfit:
                    host = next(job.batches)
                    batch, work = job.prepare(host), job.work(host)
            with monitor.time("step"):
                noise = jnp.asarray(0 if job.overfit else step - 1, jnp.int32)
                state, metrics = step_fn(state, job.frozen, batch, noise)
            monitor.log(step, metrics, work)

            with contextlib.suppress(Stopped):
                if job.validate is not None and is_due(events.validation, step, last):
                    with monitor.time("validation"):
                        check()
                        monitor.log(step, job.validate(trained(state), check))
                if job.sample is not None and is_due(events.sample, step, last):
                    with monitor.time("sample"):
                        check()
                        samples = job.sample(trained(state), check)
                        if is_first():
                            save_samples(samples, out, step, monitor)
            stopped = received()
            if is_due(events.checkpoint, step, last) or stopped:
                with monitor.time("checkpoint"):
                    save(checkpoints, step, state, job.batches.state(), about, wait=bool(stopped) or step == last)
            if stopped:
                if is_first():
                    tqdm.write(
                        f"train.py: {stopped.name}: stopped at step {step} of {last}, which is saved", file=sys.stderr
                    )
                raise SystemExit(128 + int(stopped))

        with monitor.time("other"):
            message = job.export(trained(state))
        if is_first():
            print(monitor.goodput.table())
            print(message)
    return state


def start_state(
    make_state: Callable[[Params], TrainState], job: Job, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, Any]:
    """The state of step 0 on the mesh, and where the mesh holds what of it. Takes the memory of the job's parameters."""
    shardings = state_shardings(mesh, jax.eval_shape(make_state, job.params), optimizer, job.specs)
    state = jax.jit(make_state, out_shardings=shardings)(job.params)
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


def save(checkpoints: Checkpoints, step: int, state: TrainState, position: Any, about: Any, wait: bool) -> None:
    """A full disk does not end a run as long as there is a next time to try."""
    try:
        checkpoints.save(step, state, position, about, wait=wait)
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


def weights_digest(folder: pathlib.Path | None) -> str | None:
    """Of the manifest of a model folder, which has the digests of all its files."""
    manifest = None if folder is None else folder / MANIFEST
    return None if manifest is None or not manifest.is_file() else file_digest(manifest)


def changes(before: Any, now: Any) -> list[str]:
    """What a run that goes on does differently, and whether its model folder is another."""
    lines = config_changes(before | {"weights": None}, now | {"weights": None})
    if before.get("weights") not in (None, now["weights"]):
        lines.append(f"what config.task.folder holds: {now['task']['folder']} has other files")
    return lines


def config_changes(before: Any, now: Any, path: str = "") -> list[str]:
    """What a run that goes on does differently; how long it is to be is no difference."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in now if path or name != "num_steps"]
        return [line for name in names for line in config_changes(before.get(name), now[name], f"{path}.{name}")]
    return [] if before == now else [f"config{path} is {now}, was {before}"]


def write_config(config: TrainConfig, out: pathlib.Path) -> None:
    with replacing(out / "config.json") as part:
        part.write_text(json.dumps(as_json(config), indent=1) + "\n", encoding="utf-8")


PRESETS = pathlib.Path(__file__).parent / "configs"


def load_config(path: str) -> TrainConfig:
    """The `config` of a Python file, in the working directory or beside this program.

    Raises:
        ValueError: there is no such file, or what is in it makes no `TrainConfig`; names the line.
    """
    file = next((file for file in (pathlib.Path(path), PRESETS.parent / path) if file.is_file()), None)
    spec = None if file is None else importlib.util.spec_from_file_location("preset", file)
    if file is None or spec is None or spec.loader is None:
        names = ", ".join(sorted(preset.name for preset in PRESETS.glob("*.py")))
        raise ValueError(f"{path} is not a Python file; the presets in {PRESETS} are {names}.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's code may lead to
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)] or [getattr(error, "lineno", None)]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path}, line {lines[-1]}: {kind}{getattr(error, 'msg', error)}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, TrainConfig):
        found = "none" if config is None else f"one of type {type(config).__name__}"
        raise ValueError(f"{path} must have a `config` that is a TrainConfig; it has {found}.")
    return config


@dataclasses.dataclass(frozen=True)
class Arguments:
    output_dir: pathlib.Path  # checkpoints, metrics and what comes out
    config: TrainConfig
    num_steps: int | None = None  # of the whole run; what the preset says if not given
    coordinator: str | None = None  # HOST:PORT of process 0, where processes do not find each other; with the next two
    num_processes: int | None = None
    process_id: int | None = None  # of this process, from 0
    mesh: str = ""  # sizes of data, fsdp, context and tensor, such as "data=2,fsdp=-1"; "": all devices on fsdp
    compile_cache: str | None = None  # folder that keeps compiled programs for the next start; "none": nowhere
    plan: str | None = (
        None  # train nothing: what a step takes on chips such as v5p:4x4x4; `--mesh auto` compares meshes
    )
    plan_json: pathlib.Path | None = None  # where to write that


USAGE = "python train.py configs/NAME.py --output-dir DIR [--num-steps N] [--config.… overrides]"


def names_as_option(config: TrainConfig) -> contextlib.AbstractContextManager[Any]:
    """In the context, tyro gives what a DiT trains an option; of text or a LoRA it would make a word without one."""
    registry = tyro.constructors.ConstructorRegistry()
    if isinstance(config.task.trainable, str):

        @registry.primitive_rule
        def _(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[str] | None:
            if info.type != LoraConfig | str:
                return None
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar="STR",
                instance_from_str=lambda words: words[0],
                is_instance=lambda value: isinstance(value, str),
                str_from_instance=lambda value: [value],
            )

    return registry


def parse(argv: Sequence[str]) -> Arguments:
    """The arguments; ends the program where they ask for help.

    Raises:
        ValueError: no preset, one that cannot be read, or a value that cannot be used.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: {USAGE}\n\n{__doc__}\nWith a preset, --help lists its options.")
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        raise ValueError(f"the first argument must be a preset; usage: {USAGE}")
    default = Arguments(output_dir=pathlib.Path("runs") / pathlib.Path(argv[0]).stem, config=load_config(argv[0]))
    # A preset says what is trained; its alternatives are other presets.
    options = (tyro.conf.AvoidSubcommands,)
    with names_as_option(default.config):
        arguments = tyro.cli(
            Arguments, prog=f"train.py {argv[0]}", default=default, args=argv[1:], description=__doc__, config=options
        )
    for name in ("output_dir", "compile_cache", "plan_json"):
        if (path := getattr(arguments, name)) is not None:
            check_local(f"--{name.replace('_', '-')}", path)
    if arguments.num_steps is not None:
        config = dataclasses.replace(arguments.config, num_steps=arguments.num_steps)
        arguments = dataclasses.replace(arguments, config=config)
    check_local_fields("--config", arguments.config)
    return arguments


def run(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    if arguments.plan is not None:
        from magref_jax import planner

        if arguments.plan_json is not None:
            check_output_folder("--plan-json", arguments.plan_json.parent)
        print(planner.report_training(arguments.config, str(arguments.plan), arguments.mesh, arguments.plan_json))
        return
    check_output_folder("--output-dir", arguments.output_dir)
    initialise(arguments.coordinator, arguments.num_processes, arguments.process_id)
    check_devices()
    if arguments.compile_cache != "none":
        keep_compiled_programs(arguments.compile_cache or default_cache())
    mesh = make_mesh(arguments.mesh or "fsdp=-1")
    with contextlib.ExitStack() as stack:
        held = Claim(arguments.output_dir)
        stack.callback(held.release)
        if (note := on_first(held.take)) is not None and is_first():
            print(f"train.py: --output-dir {note}", file=sys.stderr)
        train(arguments.config, arguments.output_dir, mesh)


def main(argv: Sequence[str] | None = None) -> None:
    with program("train.py"):
        run(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
