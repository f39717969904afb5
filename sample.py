"""Makes videos from reference images and a prompt.

    python sample.py
    python sample.py --prompt "the fox slides right over a meadow" --ref fox.png:fox
    python sample.py --prompts cases.json --out results --dry_run
    python sample.py --prompts cases.json --out results --resume

Everything that was asked for is checked before the weights are read; each file appears under its name when it is complete.
Exit status: 0 all videos were made, 1 the model cannot be used, 2 something asked for is wrong, 3 some videos failed.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

if __name__ == "__main__":
    from magref_jax import interrupts

    interrupts.end_silently()

import jax
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

import magref_jax
from magref_jax import batches, distributed, files, outputs, pipeline, prompts, sharding
from magref_jax.command import check_local, default_cache, keep_compiled_programs, program, sentence
from magref_jax.conditioning.canvas import assign
from magref_jax.config import RELEASED, ModelConfig, SamplingConfig, load_model_config, with_dtype
from magref_jax.convert.lora import Lora, read_lora, split_strength
from magref_jax.diffusion.step_cache import load_plan
from magref_jax.dry_run import check_memory, dry_run, stored_shapes
from magref_jax.models.attention import IMPLEMENTATIONS
from magref_jax.prompts import ALIASES, Checks, Entry
from magref_jax.video import frame_rate

BUNDLED = pathlib.Path(magref_jax.__file__).parent / "bundled"
MAX_BATCH = 4096
# Options that name files or folders.
PATHS = ("prompts", "ref", "background", "model", "lora", "step_cache", "plan_json", "compile_cache", "out")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="sample.py",
        description="Makes videos from reference images and a prompt; without --prompt or --prompts, two bundled examples.",
        epilog="Options also have the names that Wan, MAGREF and diffusers give them, such as --num_inference_steps.",
        allow_abbrev=False,
    )

    def add(group: Any, name: str, **keywords: Any) -> None:
        group.add_argument(f"--{name}", **keywords)

    what = p.add_argument_group("what to make")
    add(what, "prompt", metavar="TEXT", help="what the video shows")
    add(
        what,
        "ref",
        action="append",
        default=[],
        metavar="FILE[:WORDS]",
        help="image, and its words in the prompt; repeat",
    )
    add(
        what,
        "background",
        action="append",
        default=[],
        metavar="FILE[:WORDS]",
        help="image of the surroundings; repeat",
    )
    add(what, "subjects", metavar="WORDS,...", help="the words of each --ref, in place of FILE:WORDS")
    add(
        what,
        "prompts",
        type=pathlib.Path,
        metavar="FILE",
        help="many cases: .txt (key@@prompt@@image...), .json, .jsonl, .csv",
    )
    add(what, "negative", metavar="TEXT", help="what to lead away from")
    add(what, "seed", type=int, default=3407, help="another seed, another video (default: %(default)s)")
    add(what, "size", metavar="WxH", help="pixels; or 480p, 480p-portrait, 720p, 720p-portrait")
    add(what, "height", type=int, help=argparse.SUPPRESS)
    add(what, "width", type=int, help=argparse.SUPPRESS)
    add(what, "frames", type=int, help="before the leading ones, which show the canvas, are dropped")
    add(what, "fps", type=float, help="frames per second of the file")
    add(what, "layout", help="of the canvas: v1 or v2; v2:input or v2:2,0,1 pins the order of the references")
    add(
        what,
        "strict_parity",
        action="store_true",
        help="read images as the official code: no EXIF, no colour profile, no transparency",
    )

    how = p.add_argument_group("how to make it")
    add(how, "model", type=pathlib.Path, default=BUNDLED / "emoji", metavar="DIR", help="model folder")
    add(how, "lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="added to the transformer; repeat")
    add(how, "steps", type=int, help="solver steps")
    add(how, "guidance", type=float, help="how strictly to follow the prompt; 1 is twice as fast")
    add(how, "reference_guidance", type=float, help="how strictly to follow the references; 1 is not to ask for more")
    add(how, "shift", type=float, help="above 1, more steps are spent near noise")
    add(how, "solver", help="unipc, dpm++ or euler")
    add(how, "step_cache", metavar="FILE[:THRESHOLD]", help="skip steps by a table of magref_jax.evaluation.step_cache")
    add(how, "dtype", metavar="DTYPE", help="to compute in: float32 or bfloat16 (default: as the model folder says)")
    add(how, "batch_size", type=int, default=1, help="cases at once (default: %(default)s)")
    add(how, "attention", metavar="NAME", help=f"auto, {', '.join(IMPLEMENTATIONS)} (default: the model folder's)")
    add(how, "mesh", metavar="AXIS=SIZE,...", help="axes data, fsdp, context, tensor; default: one device")
    add(
        how,
        "plan",
        metavar="CHIP:SIZES",
        help="make nothing: what a step of --model, which may be "
        f"{RELEASED}, takes on chips such as v6e:2x4; --mesh auto",
    )
    add(how, "plan_json", type=pathlib.Path, metavar="FILE", help="where to write that")
    add(how, "coordinator", metavar="HOST:PORT", help="of process 0, where several processes do not find each other")
    add(how, "num_processes", type=int, help="with --coordinator")
    add(how, "process_id", type=int, help="with --coordinator: of this process, from 0")
    add(
        how,
        "compile_cache",
        metavar="DIR",
        help="compiled programs; 'none' for no cache (default: ~/.cache/magref_jax)",
    )

    where = p.add_argument_group("where it goes")
    add(where, "out", type=pathlib.Path, default=pathlib.Path("outputs"), metavar="DIR", help="default: outputs")
    add(
        where,
        "dry_run",
        action="store_true",
        help="check everything, draw the canvases, say what it will cost; no weights",
    )
    add(where, "resume", action="store_true", help="keep the videos that are finished, make the others")
    add(where, "overwrite", action="store_true", help="replace files that are there")
    add(where, "no_metadata", action="store_true", help="do not store prompt and settings in the mp4")
    return p


def spelled_as_ours(argv: Sequence[str]) -> list[str]:
    """A command line with the option names of Wan, MAGREF and diffusers replaced by ours."""
    ours = {action.dest for action in parser()._actions}
    names = {alias: name for name in ours for alias in ALIASES.get(name, ()) if alias not in ours}
    names |= {alias: "ref" for alias in ALIASES["references"] if alias not in ours}
    words = []
    for word in argv:
        option, equals, value = word.partition("=")
        known = option.startswith("--") and option[2:] in names
        words.append(f"--{names[option[2:]]}{equals}{value}" if known else word)
    return words


def read_overrides(arguments: argparse.Namespace, config: ModelConfig, checks: Checks) -> dict[str, Any]:
    """The sampling options that differ from the model folder's, each checked against the model."""
    size = (
        None if arguments.size is None else checks.attempt(f"--size {arguments.size}", prompts.size_of, arguments.size)
    )
    if arguments.size is not None and (arguments.height or arguments.width):
        checks.problems.append("--size, and also --height or --width: give one of the two.")
    flags = {
        "steps": {"num_inference_steps": arguments.steps},
        "guidance": {"guidance_scale": arguments.guidance},
        "reference_guidance": {"reference_guidance_scale": arguments.reference_guidance},
        "shift": {"flow_shift": arguments.shift},
        "solver": {"solver": arguments.solver},
        "frames": {"num_frames": arguments.frames},
        "size": {} if size is None else {"width": size[0], "height": size[1]},
        "height": {"height": arguments.height},
        "width": {"width": arguments.width},
        "layout": {"layout": None if arguments.layout is None else arguments.layout.partition(":")[0]},
        "negative": {"negative_prompt": arguments.negative},
    }
    overrides = {}
    for flag, fields in flags.items():
        given = {name: value for name, value in fields.items() if value is not None}
        if given and checks.attempt(f"--{flag} {getattr(arguments, flag)}", pipeline.with_sampling, config, **given):
            overrides |= given
    return overrides


def read_loras(arguments: argparse.Namespace, config: ModelConfig, checks: Checks) -> list[tuple[Lora, float]]:
    loras = []
    abstract = pipeline.abstract_params(config, only=("dit",))["dit"] if arguments.lora else None
    for text in arguments.lora:
        path, strength = checks.attempt("--lora", split_strength, text) or (None, 0.0)
        lora = None if path is None else checks.attempt("--lora", read_lora, path, config.dit, abstract)
        if lora is not None:
            loras.append((lora, strength))
    return loras


def read_entries(arguments: argparse.Namespace, checks: Checks) -> list[Entry]:
    if arguments.prompt is not None and arguments.prompts is not None:
        checks.problems.append("--prompt and --prompts: give one of the two.")
    elif arguments.prompt is not None:
        find = prompts.files_beside(pathlib.Path())
        references = arguments.ref + arguments.background
        roles = ["subject"] * len(arguments.ref) + ["background"] * len(arguments.background)
        fields = {
            "prompt": arguments.prompt,
            # One may be several, "a.png,b.png".
            "references": references[0] if len(references) == 1 else references,
            "roles": roles if arguments.background else None,
            "subjects": arguments.subjects,
        }
        entry = prompts.read_fields("--prompt", fields, find, checks)
        return [] if entry is None else [entry]
    elif arguments.ref or arguments.background or arguments.subjects:
        checks.problems.append(
            "--ref, --background and --subjects need --prompt; with --prompts, put them into the file."
        )
    else:
        return prompts.read_entries(arguments.prompts or BUNDLED / "examples" / "examples.txt", checks)
    return []


def run_settings(arguments: argparse.Namespace, config: ModelConfig, checks: Checks) -> batches.RunSettings:
    loras: list[outputs.LoraSettings] = []
    for text in arguments.lora:
        path, strength = split_strength(text)
        loras.append({**outputs.file_settings(path), "strength": strength})
    plan = arguments.step_cache and checks.attempt(
        f"--step_cache {arguments.step_cache}", load_plan, arguments.step_cache, config.sampling
    )
    return batches.RunSettings(
        seed=arguments.seed,
        fps=config.fps,
        model=outputs.file_settings(arguments.model),
        dtype=outputs.compute_dtype(config),
        order=(arguments.layout or "").partition(":")[2] or None,
        loras=tuple(loras),
        step_plan=plan or None,
        strict_parity=arguments.strict_parity,
        store_metadata=not arguments.no_metadata,
    )


def what_next(entry: Entry, arguments: argparse.Namespace) -> str:
    """A command that does something a little different from what was just done."""
    if arguments.prompt is None and arguments.prompts is None:
        image = pathlib.Path(os.path.relpath(BUNDLED / "examples" / "penguin.png"))
        words = ["--prompt", "the penguin in the middle bounces in front of a sunset", "--ref", f"{image}:penguin"]
    elif arguments.prompt is None:
        words = ["--prompts", str(arguments.prompts), "--seed", str(arguments.seed + 1)]
    else:
        given = {"prompt": [entry.prompt], "ref": arguments.ref, "background": arguments.background}
        given["subjects"] = [arguments.subjects] if arguments.subjects else []
        words = [word for flag, texts in given.items() for text in texts for word in _option(flag, text)]
        words += ["--seed", str(arguments.seed + 1)]
    words += [word for lora in arguments.lora for word in ("--lora", lora)]
    if arguments.model != BUNDLED / "emoji":
        words = ["--model", str(arguments.model), *words]
    return shlex.join(["python", "sample.py", *words, "--out", f"{arguments.out}_next"])


def _option(flag: str, text: str) -> list[str]:
    return [f"--{flag}={text}"] if text.startswith("-") else [f"--{flag}", text]  # or it would be read as an option


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A run that has been checked and can begin."""

    config: ModelConfig
    tokenizer: Any
    mesh: Mesh | None
    loras: list[tuple[Lora, float]]
    cases: list[batches.PlannedCase]
    kept: frozenset[str]  # keys that are finished
    work: list[list[batches.PlannedCase]]  # the cases in batches
    options: dict[str, Any]  # of every batch


def check_options(arguments: argparse.Namespace, checks: Checks) -> dict[str, Any]:
    """What needs no model to be seen wrong. `fps` and `attention`, if they were given and are right."""
    for flag, lowest, highest in (("seed", 0, prompts.MAX_SEED), ("batch_size", 1, MAX_BATCH)):
        if not lowest <= getattr(arguments, flag) <= highest:
            checks.problems.append(f"--{flag} {getattr(arguments, flag)}: must be {lowest} to {highest}.")
    right = {}
    if arguments.fps is not None and checks.attempt(f"--fps {arguments.fps}", frame_rate, arguments.fps) is not None:
        right["fps"] = arguments.fps
    if arguments.attention not in (None, "auto", *IMPLEMENTATIONS):
        names = ", ".join(("auto", *IMPLEMENTATIONS))
        checks.problems.append(f"--attention {arguments.attention}: is unknown; choose one of {names}.")
    elif arguments.attention is not None:
        right["attention"] = arguments.attention
    checks.attempt(f"--out {arguments.out}", outputs.check_folder, arguments.out)
    return right


def make_plan(arguments: argparse.Namespace, checks: Checks) -> Plan:
    """Checks all that was asked for and reads no weights; ends the program if anything is wrong."""
    # First what concerns all cases. A wrong option is left out of what the cases are checked with: each would repeat it.
    config = checks.attempt("--model", load_model_config, arguments.model)
    tokenizer = config and checks.attempt("--model", pipeline.load_tokenizer, arguments.model, config)
    overrides = {} if config is None else read_overrides(arguments, config, checks)
    computed = config and checks.attempt(f"--dtype {arguments.dtype}", with_dtype, config, arguments.dtype)
    config = computed or config
    loras = [] if config is None else read_loras(arguments, config, checks)
    shape = arguments.mesh or ("fsdp=-1" if jax.process_count() > 1 else "")
    mesh = shape and checks.attempt(f"--mesh {shape}", sharding.make_mesh, shape)
    right = check_options(arguments, checks)
    entries = read_entries(arguments, checks)
    if config is None or tokenizer is None:
        checks.stop()
    usual = config.sampling
    dit = dataclasses.replace(config.dit, attention=right.get("attention", config.dit.attention))
    config = dataclasses.replace(config, dit=dit, fps=right.get("fps", config.fps))
    config = checks.attempt("options", pipeline.with_sampling, config, **overrides) or config
    run = None if checks.problems else checks.attempt("--model", run_settings, arguments, config, checks)

    def resolve(**fields: Any) -> SamplingConfig:
        return pipeline.with_sampling(config, **fields).sampling

    checked = prompts.check_entries(
        entries,
        checks,
        resolve,
        takes_references=pipeline.takes_references(config),
        strict_parity=arguments.strict_parity,
    )
    for case in checked:
        if run is not None and run.order is not None:
            shown = len(case.entry.references), case.sampling.layout
            checks.attempt(f"{case.entry.where}: --layout {arguments.layout}", assign, *shown, run.order)
    text_tokens = batches.check_tokens(config, tokenizer, checked, checks)
    batches.check_words(tokenizer, checked, usual.negative_prompt, checks)
    if run is None or checks.problems:
        checks.stop()

    cases = [batches.plan_case(case, run) for case in checked]
    keep = functools.partial(outputs.keep_finished, resume=arguments.resume, overwrite=arguments.overwrite)
    settings = [] if arguments.dry_run else [case.settings for case in cases]
    kept = checks.attempt(f"--out {arguments.out}", distributed.on_first, lambda: sorted(keep(arguments.out, settings)))
    if not checks.problems:
        checks.attempt(f"--out {arguments.out}", arguments.out.mkdir, parents=True, exist_ok=True)
    work = batches.make_batches(cases, arguments.batch_size)
    options = {"batch_size": arguments.batch_size, "text_tokens": text_tokens, "step_plan": run.step_plan}
    todo = [] if arguments.dry_run else [batch for batch in work if any(case.key not in (kept or ()) for case in batch)]
    # What does not fit one process of several would be known to that one alone.
    if todo and not checks.problems and jax.process_count() == 1:
        fits = functools.partial(check_memory, usual=usual, mesh=mesh or None, **options)
        checks.attempt("memory", fits, arguments.model, config, tokenizer, todo)
    if kept is None or checks.problems:
        checks.stop()
    return Plan(
        config=config,
        tokenizer=tokenizer,
        mesh=mesh or None,
        loras=loras,
        cases=cases,
        kept=frozenset(kept),
        work=work,
        options=options,
    )


@contextlib.contextmanager
def ends_if_unusable(model: pathlib.Path) -> Iterator[None]:
    """Ends the program with status 1 where a model folder turns out to be damaged or incomplete."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: --model {model}: {sentence(error)}")


def make_videos(plan: Plan, arguments: argparse.Namespace, argv: Sequence[str]) -> list[outputs.CaseReport]:
    """Makes and writes what is not finished, with a progress bar."""
    clock, model = batches.Clock(), None
    todo = [batch for batch in plan.work if any(case.key not in plan.kept for case in batch)]
    if todo:
        with ends_if_unusable(arguments.model), clock.measure("loading"):
            model = pipeline.load(arguments.model, mesh=plan.mesh, dtype=arguments.dtype, loras=plan.loras)
        model = dataclasses.replace(model, config=plan.config)
    reports: list[outputs.CaseReport] = []
    try:
        total = sum(batch[0].sampling.num_inference_steps for batch in todo)
        with tqdm(total=total, unit="step", disable=not distributed.is_first()) as bar:

            def on_batch(batch: Sequence[batches.PlannedCase]) -> None:
                bar.set_description(", ".join(case.key for case in batch)[:40])
                bar.set_postfix_str("compiling" if not bar.n else "")

            def on_step(step: int) -> None:
                bar.set_postfix_str("", refresh=False)
                bar.update()

            made = batches.run_batches(
                model,
                plan.work,
                arguments.out,
                kept=plan.kept,
                clock=clock,
                on_batch=on_batch,
                on_step=on_step,
                **plan.options,
            )
            for report in made:
                reports.append(report)
                if report.status != "kept" and distributed.is_first():
                    tqdm.write(f"{report.key}: {report.status}")
    finally:
        if distributed.is_first():
            try:
                outputs.write_run(
                    arguments.out, reports, arguments=argv, config=plan.config, timings=clock.seconds, mesh=plan.mesh
                )
            except OSError as error:  # the disk is full, but the videos are there
                print(f"sample.py: no run.json: {sentence(error)}", file=sys.stderr)
    return reports


def write_sheet(cases: Sequence[batches.PlannedCase], out: pathlib.Path) -> pathlib.Path | None:
    by_key = {case.key: case for case in cases}

    def references(key: str) -> list[Image.Image]:
        try:
            return by_key[key].read_images()
        except (ValueError, OSError):  # gone or changed since its video was made
            return []

    return outputs.write_contact_sheet(out, {case.key: case.digest for case in cases}, references)


def plan_report(arguments: argparse.Namespace) -> str:
    from magref_jax import planner

    width, height = (None, None) if arguments.size is None else prompts.size_of(arguments.size)
    asked = {
        "width": width or arguments.width,
        "height": height or arguments.height,
        "num_frames": arguments.frames,
        "guidance_scale": arguments.guidance,
        "reference_guidance_scale": arguments.reference_guidance,
    }
    sampling: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return planner.report_sampling(
        arguments.model,
        arguments.plan,
        arguments.mesh or "",
        arguments.batch_size,
        arguments.plan_json,
        dtype=arguments.dtype,
        **sampling,
    )


def check_paths(arguments: argparse.Namespace, checks: Checks) -> None:
    """Ends the program if a path is one that would be made into a local folder of a strange name."""
    for option in PATHS:
        given = getattr(arguments, option)
        for path in given if isinstance(given, list) else [given] if given is not None else []:
            try:
                check_local(f"--{option}", path)
            except ValueError as error:
                checks.problems.append(str(error))
    if checks.problems:
        checks.stop()


def claim(out: pathlib.Path, held: files.Claim, checks: Checks) -> None:
    """Keeps other runs out of the folder until `held` is released."""

    def take() -> str | None:
        outputs.check_folder(out)
        return held.take()

    note = checks.attempt(f"--out {out}", distributed.on_first, take)
    if note is not None:
        checks.notes.append(f"--out {note}")


def run(arguments: argparse.Namespace, argv: Sequence[str], stack: contextlib.ExitStack) -> None:
    """The whole program; `stack` is closed at its end."""
    checks = Checks()
    check_paths(arguments, checks)
    if arguments.plan is not None:
        print(plan_report(arguments))
        return
    distributed.initialise(arguments.coordinator, arguments.num_processes, arguments.process_id)
    if arguments.compile_cache != "none":
        keep_compiled_programs(arguments.compile_cache or default_cache())
    if not arguments.dry_run:
        held = files.Claim(arguments.out)
        stack.callback(held.release)
        claim(arguments.out, held, checks)
    plan = make_plan(arguments, checks)
    if distributed.is_first():
        checks.show_notes()
    if arguments.dry_run:
        with ends_if_unusable(arguments.model):
            stored_shapes(arguments.model, plan.config, plan.mesh)
        dry_run(arguments.model, plan.config, plan.tokenizer, plan.work, arguments.out, mesh=plan.mesh, **plan.options)
        return
    distributed.on_first(lambda: files.remove_leftovers(arguments.out))
    if distributed.is_first():
        for lora, _ in plan.loras:
            print(lora.report)
    reports = make_videos(plan, arguments, argv)
    sheet, no_sheet = None, None
    try:
        sheet = distributed.on_first(lambda: write_sheet(plan.cases, arguments.out))
    except (ValueError, OSError) as error:  # the disk is full, or a video has gone: the others are there all the same
        no_sheet = sentence(error)
    if distributed.is_first():
        print(outputs.summary_table(reports))
        if sheet is not None:
            print(f"wrote {sheet}")
        if no_sheet is not None:
            print(f"sample.py: no contact sheet: {no_sheet}", file=sys.stderr)
    if any(report.status.startswith("failed") for report in reports):
        sys.exit(3)
    if distributed.is_first():
        print(f"next: {what_next(plan.cases[0].checked.entry, arguments)}")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(spelled_as_ours(argv))
    with program("sample.py"), contextlib.ExitStack() as stack:
        run(arguments, argv, stack)


if __name__ == "__main__":
    main()
