"""Converts PyTorch weights of MAGREF and Wan 2.1 into a model folder, and back.

    python convert_torch_weights.py SOURCE OUT                 a folder or file in any layout, recognised by itself
    python convert_torch_weights.py MODEL_FOLDER OUT --to wan  for the official code; also diffusers and comfy
    python convert_torch_weights.py LORA OUT --to diffusers    a LoRA under other names
    python convert_torch_weights.py MODEL_FOLDER --verify      looks for damage

Everything is checked before anything is written; OUT appears when it is complete.
"""

import argparse
import json
import pathlib
import re
from typing import Any

if __name__ == "__main__":
    from magref_jax import interrupts

    interrupts.end_silently()

from tqdm import tqdm

from magref_jax import pipeline
from magref_jax.checkpoint import MANIFEST, NETWORKS, verify_manifest
from magref_jax.command import check_local, check_output_folder, program
from magref_jax.config import DiTConfig, ModelConfig, from_dict
from magref_jax.convert import conversion, export, lora, sources

# What a LoRA may be for, and the names that each program reads: kohya is what musubi-tuner writes for the official code.
RELEASED_DITS: tuple[dict[str, Any], ...] = (
    {},
    {"in_channels": 16, "image_dim": None},
    {"in_channels": 16, "image_dim": None, "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30},
)
LORA_FAMILIES: dict[str, lora.Family] = {"wan": "kohya", "diffusers": "peft", "comfy": "original"}
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{7,40})")
HUB_FILES = ["*.safetensors", "*.json", "*.pth", "*.model", "*.txt"]  # no code


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="convert_torch_weights.py",
        description="Converts PyTorch weights of MAGREF and Wan 2.1 into a model folder, and back with --to.",
        allow_abbrev=False,
    )
    p.add_argument("source", metavar="SOURCE", help="folder, file, or OWNER/NAME@REVISION of the Hugging Face hub")
    p.add_argument("out", metavar="OUT", nargs="?", type=pathlib.Path, help="model folder; a folder or file with --to")
    p.add_argument("--only", default="", metavar="NAME,...", help=f"networks to convert: {', '.join(NETWORKS)}")
    p.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="that matrices are stored and computed in; norms, biases, modulation and the VAE stay as stored with bfloat16 "
        "(default: as stored, computed in bfloat16)",
    )
    p.add_argument(
        "--to", choices=tuple(export.TARGETS), help="write PyTorch weights: SOURCE is a model folder or a LoRA"
    )
    p.add_argument("--dry_run", action="store_true", help="check everything, print the plan, write nothing")
    p.add_argument("--resume", action="store_true", help="go on with a conversion that was cut off")
    p.add_argument(
        "--verify", action="store_true", help="re-hash the files of a model folder; alone, or after converting"
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="of the config, as image_encoder.num_heads=16; source.key=NAME takes the weights of this name in a file of several",
    )
    p.add_argument("--no_checks", action="store_true", help="do not hash source files that come with a digest")
    return p


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    with program("convert_torch_weights.py"):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    check_local("SOURCE", arguments.source)
    if arguments.out is not None:
        check_local("OUT", arguments.out)
        check_output_folder("OUT", arguments.out.parent)
    source, out = locate(arguments.source), arguments.out
    is_model = (source / MANIFEST).is_file()
    if out is None and not (arguments.verify or arguments.dry_run):
        raise ValueError("OUT is missing; only --verify and --dry_run go without.")
    only = tuple(filter(None, arguments.only.split(",")))
    if unknown := sorted(set(only) - set(NETWORKS)):
        raise ValueError(f"--only {','.join(unknown)}: choose from {', '.join(NETWORKS)}.")
    if arguments.to is not None and out is not None:
        to_torch(source, out, arguments, only)
    elif is_model and out is None:
        verify(source)
    elif is_model:
        raise ValueError(f"SOURCE {source} is a model folder already; say with --to what to turn it into.")
    else:
        from_torch(source, out, arguments, only)


def locate(text: str) -> pathlib.Path:
    """A path, or the local copy of a pinned revision of a repository of the hub."""
    path = pathlib.Path(text)
    if path.exists():
        return path
    pinned = HUB_ID.fullmatch(text)
    if pinned is None:
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
            hint = f" For a repository of the hub pin a revision: {text}@COMMIT."
        raise FileNotFoundError(f"SOURCE {text} does not exist.{hint}")
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(pinned[1], revision=pinned[2], allow_patterns=HUB_FILES))
    except (ValueError, OSError) as error:
        raise OSError(f"SOURCE {text} could not be downloaded: {' '.join(str(error).split())}") from None


def read_settings(texts: list[str]) -> dict[str, Any]:
    settings = {}
    for text in texts:
        field, equals, value = text.partition("=")
        if not field or not equals:
            raise ValueError(f"--set {text}: must be FIELD=VALUE, such as image_encoder.num_heads=16.")
        try:
            settings[field] = json.loads(value)
        except ValueError:
            settings[field] = value
    return settings


def from_torch(
    path: pathlib.Path, out: pathlib.Path | None, arguments: argparse.Namespace, only: tuple[str, ...]
) -> None:
    settings = read_settings(arguments.set)
    key = settings.pop("source.key", None)
    source = sources.read_source(path, only, None if key is None else str(key))
    config = sources.model_config(source, settings, arguments.dtype)
    abstract = pipeline.abstract_params(config, only=tuple(source.networks))
    plan = conversion.make_plan(source, config, abstract, arguments.dtype)
    print(conversion.describe(plan, out or pathlib.Path("none given")))
    for stranger in source.strangers:
        print(f"left out: {stranger}")
    if arguments.dry_run or out is None:
        return
    total = sum(part.source_bytes for part in plan.parts)
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting") as bar:
        warnings = conversion.run(
            plan, out, resume=arguments.resume, checks=not arguments.no_checks, progress=bar.update, say=tqdm.write
        )
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"wrote {out}")
    if arguments.verify:
        verify(out)


def to_torch(path: pathlib.Path, out: pathlib.Path, arguments: argparse.Namespace, only: tuple[str, ...]) -> None:
    if path.is_file() or any((path / name).is_file() for name in lora.FOLDER_FILES):
        rename_lora(path, out, arguments)
        return
    if not (path / MANIFEST).is_file():
        raise ValueError(f"--to {arguments.to}: SOURCE {path} must be a model folder or the file of a LoRA.")
    total = export.exported_bytes(path, only)
    if arguments.dry_run:
        print(f"{path} to the layout of {arguments.to}: {total / 1e9:.2f} GB into {out}")
        return
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing") as bar:
        files = export.export(path, out, arguments.to, only=only, progress=bar.update, say=tqdm.write)
    print("wrote", *(str(out / file) for file in files), sep="\n  ")


def rename_lora(path: pathlib.Path, out: pathlib.Path, arguments: argparse.Namespace) -> None:
    """The model it is for is the first of the released ones that it fits, unless --set says another."""
    if out.exists():
        raise FileExistsError(f"OUT {out} exists already; give another name.")
    settings = {field.removeprefix("dit."): value for field, value in read_settings(arguments.set).items()}
    problems = []
    for released in RELEASED_DITS:
        config = from_dict(DiTConfig, released | settings, "--set dit")
        try:
            abstract = pipeline.abstract_params(ModelConfig(dit=config), only=("dit",))
            found = lora.read_lora(path, config, abstract["dit"])
        except ValueError as error:
            problems.append(str(error))
            continue
        print(found.report)
        if not arguments.dry_run:
            lora.write_lora(out, found, LORA_FAMILIES[arguments.to])
            print(f"wrote {out}")
        return
    raise ValueError(problems[0])


def verify(folder: pathlib.Path) -> None:
    for stranger in verify_manifest(folder):
        print(f"not of the model: {stranger}")
    print(f"{folder}: every file is as it was written")


if __name__ == "__main__":
    main()
