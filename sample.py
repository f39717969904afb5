"""Makes videos from reference images and a prompt.

    python sample.py
    python sample.py --prompt "the fox slides right over a meadow" --ref fox.png:fox
    python sample.py --prompts cases.txt --out results

Everything that was asked for is checked before the weights are read; each file appears under its name when it is complete.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import shlex
import sys
from typing import Any

import jax
from PIL import Image
from tqdm import tqdm

import magref_jax
from magref_jax import pipeline, sharding
from magref_jax.conditioning.canvas import draw_regions
from magref_jax.config import ModelConfig, load_model_config
from magref_jax.convert.lora import Lora, read_lora, split_strength
from magref_jax.files import replacing
from magref_jax.prompts import Checks, Line, check_keys, read_prompt_file, read_references, safe_key
from magref_jax.video import SheetRow, contact_sheet, write_video

BUNDLED = pathlib.Path(magref_jax.__file__).parent / "bundled"
SHEET_ROWS = 24  # videos on the contact sheet; more would not fit a screen


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="sample.py",
        description="Makes videos from reference images and a prompt; without --prompt or --prompts, two bundled examples.",
        allow_abbrev=False,
    )
    p.add_argument("--model", type=pathlib.Path, default=BUNDLED / "emoji", metavar="DIR", help="model folder")
    p.add_argument("--prompt", metavar="TEXT", help="what the video shows")
    p.add_argument(
        "--ref", action="append", default=[], metavar="FILE[:WORD]", help="image, and its words in the prompt; repeat"
    )
    p.add_argument("--prompts", type=pathlib.Path, metavar="FILE", help="lines key@@prompt@@image@@image...")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("outputs"), metavar="DIR", help="default: outputs")
    p.add_argument("--seed", type=int, default=3407, help="another seed, another video (default: %(default)s)")
    p.add_argument("--steps", type=int, help="solver steps")
    p.add_argument("--guidance", type=float, help="how strictly to follow the prompt; 1 is twice as fast")
    p.add_argument("--shift", type=float, help="above 1, more steps are spent near noise")
    p.add_argument("--solver", help="unipc, dpm++ or euler")
    p.add_argument("--frames", type=int, help="before the leading ones, which show the canvas, are dropped")
    p.add_argument("--size", metavar="WxH", help="pixels")
    p.add_argument("--layout", help="of the canvas: v1 or v2; v2:input or v2:2,0,1 pins the order of the references")
    p.add_argument("--mesh", metavar="AXIS=SIZE,...", help="axes data, fsdp, context, tensor; default: one device")
    p.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="added to the transformer; repeat"
    )
    p.add_argument("--no_metadata", action="store_true", help="do not store prompt and settings in the mp4")
    return p


def read_overrides(arguments: argparse.Namespace, config: ModelConfig, checks: Checks) -> dict[str, Any]:
    """The sampling options that differ from the model folder's, each checked against the model."""
    size = re.fullmatch(r"(\d+)[xX*](\d+)", arguments.size or "")
    if arguments.size is not None and size is None:
        checks.problems.append(f"--size {arguments.size}: must be WIDTHxHEIGHT in pixels, such as 832x480.")
    layout = None if arguments.layout is None else arguments.layout.partition(":")[0]
    flags = {
        "--steps": {"num_inference_steps": arguments.steps},
        "--guidance": {"guidance_scale": arguments.guidance},
        "--shift": {"flow_shift": arguments.shift},
        "--solver": {"solver": arguments.solver},
        "--frames": {"num_frames": arguments.frames},
        "--size": {} if size is None else {"width": int(size[1]), "height": int(size[2])},
        "--layout": {"layout": layout},
    }
    overrides = {}
    for flag, fields in flags.items():
        given = {name: value for name, value in fields.items() if value is not None}
        if given:
            checks.attempt(f"{flag} {getattr(arguments, flag[2:])}", pipeline.with_sampling, config, **given)
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


def read_lines(arguments: argparse.Namespace, checks: Checks) -> list[Line]:
    if arguments.prompt is not None and arguments.prompts is not None:
        checks.problems.append("--prompt and --prompts: give one of the two.")
    elif arguments.prompt is not None and not arguments.prompt.strip():
        checks.problems.append("--prompt: there are no words in it.")
    elif arguments.prompt is not None:
        key = safe_key(arguments.prompt) or "video"
        return [
            Line("--ref" if arguments.ref else "--prompt", key, arguments.prompt, tuple(arguments.ref), pathlib.Path())
        ]
    elif arguments.ref:
        checks.problems.append(
            f"--ref {arguments.ref[0]}: needs --prompt; with --prompts, put it into a line of the file."
        )
    else:
        lines = read_prompt_file(arguments.prompts or BUNDLED / "examples" / "examples.txt", checks)
        check_keys(lines, checks)
        return lines
    return []


def save_image(image: Image.Image, path: pathlib.Path) -> None:
    with replacing(path) as part:
        image.save(part, format="PNG")


def write_outputs(
    line: Line,
    request: pipeline.Request,
    video: pipeline.Video,
    arguments: argparse.Namespace,
    config: ModelConfig,
) -> SheetRow:
    metadata = {"prompt": line.prompt, "references": line.references, "seed": arguments.seed, "key": line.key}
    metadata |= {"loras": arguments.lora} if arguments.lora else {}
    metadata |= dataclasses.asdict(config.sampling) | {"model": arguments.model.name}
    path = arguments.out / f"{line.key}.mp4"
    write_video(path, video.frames, config.fps, None if arguments.no_metadata else metadata)
    canvas = video.case.canvas
    save_image(
        draw_regions(canvas, [words if isinstance(words, str) else "" for words in request.subjects]),
        path.with_name(f"{line.key}_canvas.png"),
    )
    return SheetRow(
        references=request.images, canvas=Image.fromarray(canvas.image), frames=video.frames, caption=line.prompt
    )


def what_next(line: Line, arguments: argparse.Namespace) -> str:
    """A command that does something a little different from what was just done."""
    if arguments.prompt is None and arguments.prompts is None:
        image = pathlib.Path(os.path.relpath(BUNDLED / "examples" / "penguin.png"))
        words = ["--prompt", "the penguin in the middle bounces in front of a sunset", "--ref", f"{image}:penguin"]
    elif arguments.prompt is None:
        words = ["--prompts", str(arguments.prompts), "--seed", str(arguments.seed + 1)]
    else:
        references = [word for reference in line.references for word in ("--ref", reference)]
        words = ["--prompt", line.prompt, *references, "--seed", str(arguments.seed + 1)]
    words += [word for lora in arguments.lora for word in ("--lora", lora)]
    if arguments.model != BUNDLED / "emoji":
        words = ["--model", str(arguments.model), *words]
    return shlex.join(["python", "sample.py", *words])


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    checks = Checks()
    config = checks.attempt(f"--model {arguments.model}", load_model_config, arguments.model)
    tokenizer = config and checks.attempt(f"--model {arguments.model}", pipeline.load_tokenizer, arguments.model)
    overrides = {} if config is None else read_overrides(arguments, config, checks)
    loras = [] if config is None else read_loras(arguments, config, checks)
    mesh = arguments.mesh and checks.attempt(f"--mesh {arguments.mesh}", sharding.make_mesh, arguments.mesh)
    if arguments.out.exists() and not arguments.out.is_dir():
        checks.problems.append(f"--out {arguments.out}: is a file; it must be a folder.")
    order = (arguments.layout or "").partition(":")[2] or None
    # With wrong options, every line would repeat what is wrong with them.
    config = None if config is None or checks.problems else pipeline.with_sampling(config, **overrides)
    lines, requests = read_lines(arguments, checks), []
    for line in lines:
        references = read_references(line, checks)
        if references is not None:
            requests.append(pipeline.Request(line.prompt, *references, arguments.seed, order, line.key))
            if config is not None:
                checks.attempt(line.where, pipeline.prepare, config, tokenizer, requests[-1])
    if not checks.problems:
        checks.attempt(f"--out {arguments.out}", arguments.out.mkdir, parents=True, exist_ok=True)
    if config is None or checks.problems:
        checks.stop()

    for lora, _ in loras:
        print(lora.report)
    try:
        model = pipeline.load(arguments.model, mesh=mesh, loras=loras)
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: --model {arguments.model}: {error}")

    rows: list[SheetRow] = []
    batch_size = sharding.batch_multiple(mesh)
    starts = range(0, len(requests), batch_size)
    with tqdm(total=len(starts) * config.sampling.num_inference_steps, unit="step") as bar:

        def on_step(step: int) -> None:
            bar.set_postfix_str("", refresh=False)
            bar.update()

        bar.set_postfix_str("compiling")
        for start in starts:
            batch = requests[start : start + batch_size]
            bar.set_description(", ".join(request.key for request in batch)[:40])
            videos = pipeline.generate(model, batch, on_step=on_step, **overrides)
            jax.effects_barrier()
            for line, request, video in zip(lines[start:], batch, videos, strict=False):
                rows.append(write_outputs(line, request, video, arguments, config))
                del rows[SHEET_ROWS:]
                tqdm.write(f"wrote {arguments.out / request.key}.mp4 and _canvas.png")
    save_image(contact_sheet(rows), arguments.out / "contact_sheet.png")
    print(f"wrote {arguments.out / 'contact_sheet.png'}")
    print(f"next: {what_next(lines[0], arguments)}")


if __name__ == "__main__":
    main()
