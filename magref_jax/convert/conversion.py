"""From a source to a model folder, one tensor at a time: a plan that has been checked to the last name, then the writing."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from magref_jax.checkpoint import (
    MANIFEST,
    NETWORKS,
    PARTS,
    ParamsWriter,
    verify_manifest,
    write_manifest,
)
from magref_jax.command import check_output_folder
from magref_jax.config import DType, ModelConfig, load_model_config
from magref_jax.convert.dit import dit_rules
from magref_jax.convert.image_encoder import image_encoder_rules
from magref_jax.convert.rules import Filling, Rule, flatten, match
from magref_jax.convert.sources import Network, ScaledTensor, Source, Tensor, check_file
from magref_jax.convert.text_encoder import text_encoder_rules
from magref_jax.convert.vae import vae_rules
from magref_jax.descriptions import short_repr
from magref_jax.files import naming

RULES: Mapping[str, Callable[..., Sequence[Rule]]] = {
    "dit": dit_rules,
    "vae": vae_rules,
    "text_encoder": text_encoder_rules,
    "image_encoder": image_encoder_rules,
}
SPIECE = "spiece.model"  # what sentencepiece reads
FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
# What is computed in float32 (see config.py) and the VAE stay as they are stored when the rest is made smaller.
PRECISE = re.compile(r"vae/.*|.*(norm|modulation|time_|head/|(class|position)_embedding|relative_bias|bias$).*")
TOKENIZER_FILES = (".json", ".model", ".txt")


@short_repr
@dataclasses.dataclass(frozen=True)
class Part:
    """How one network is converted."""

    network: Network
    fillings: tuple[Filling, ...]
    abstract: dict[str, jax.ShapeDtypeStruct]  # parameters by slash-separated path, in the dtype they will be stored in

    @property
    def source_bytes(self) -> int:
        return sum(self.network.tensors[filling.name].num_bytes for filling in self.fillings)

    @property
    def target_bytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self.abstract.values())


@short_repr
@dataclasses.dataclass(frozen=True)
class Plan:
    config: ModelConfig
    parts: tuple[Part, ...]
    tokenizer: pathlib.Path | None
    sentencepiece: Tensor | None = None  # bytes of spiece.model

    def digest(self) -> str:
        """Changes with anything that the written bytes depend on; a resumed run must have the same."""
        files = [[str(file), *_state(file)] for part in self.parts for file in part.network.files]
        dtypes = [[path, str(leaf.dtype)] for part in self.parts for path, leaf in part.abstract.items()]
        chosen = [[part.network.layout, *part.network.notes] for part in self.parts]
        text = json.dumps([self.config.to_json(), files, dtypes, chosen, str(self.tokenizer)])
        return hashlib.sha256(text.encode()).hexdigest()


def _state(file: pathlib.Path) -> tuple[int, int]:
    return file.stat().st_size, file.stat().st_mtime_ns


def make_plan(
    source: Source,
    config: ModelConfig,
    abstract_params: Mapping[str, Any],
    dtype: DType | None = None,
) -> Plan:
    """Checks every name and shape of the source against the parameters of `config`, by network, reading no tensor.

    `dtype` is that of the matrices of DiT and encoders; None keeps what is stored. 16-bit floats of the other kind become
    float32, 8-bit ones bfloat16.

    Raises:
        ValueError: names or shapes do not fit, with the names; or a dtype that no weight has.
    """
    config.check(source.networks.keys())
    parts, problems = [], []
    for name in NETWORKS:
        if name not in source.networks:
            continue
        network = source.networks[name]
        abstract = abstract_params.get(name)
        if abstract is None:
            raise ValueError(
                f"SOURCE has an {name}, but the model is text-to-video and uses none; leave it out with --only."
            )
        shapes = {key: tensor.shape for key, tensor in network.tensors.items()}
        try:
            fillings = match(RULES[name](getattr(config, name), network.layout), shapes, abstract)
        except ValueError as error:
            problems.append(
                f"{name} in {network.files[0]} ({len(network.files)} files, {network.layout} names):\n{error}"
            )
            continue
        parts.append(Part(network, tuple(fillings), _stored_as(network, fillings, abstract, dtype)))
    if problems:
        raise ValueError("\n".join(problems))
    return Plan(config, tuple(parts), source.tokenizer, source.sentencepiece)


def _stored_as(
    network: Network, fillings: Sequence[Filling], abstract: Any, dtype: DType | None
) -> dict[str, jax.ShapeDtypeStruct]:
    found: dict[str, set[np.dtype]] = collections.defaultdict(set)
    for filling in fillings:
        for path in filling.rule.flax_paths:
            found[path].add(_keep(filling.name, network.tensors[filling.name]))

    def choose(path: str) -> np.dtype:
        stored = FLOAT32 if FLOAT32 in found[path] else BFLOAT16
        if dtype is None or (dtype == "bfloat16" and PRECISE.fullmatch(f"{network.name}/{path}")):
            return stored
        return np.dtype(dtype)

    return {path: jax.ShapeDtypeStruct(leaf.shape, choose(path)) for path, leaf in flatten(abstract).items()}


def _keep(name: str, tensor: Tensor) -> np.dtype:
    """The dtype of ours that holds a stored one."""
    if isinstance(tensor, ScaledTensor) or tensor.dtype.itemsize == 1:
        if not isinstance(tensor, ScaledTensor) and tensor.dtype.kind in "iub":
            raise ValueError(f"{network_file(tensor)}: {name!r} has dtype {tensor.dtype}; weights are floats.")
        return BFLOAT16  # 3 bits of mantissa, and a scale that matters no more than bfloat16 rounding
    if tensor.dtype not in (FLOAT32, BFLOAT16, np.dtype(np.float16), np.dtype(np.float64)):
        raise ValueError(f"{network_file(tensor)}: {name!r} has dtype {tensor.dtype}; weights are floats.")
    return BFLOAT16 if tensor.dtype == BFLOAT16 else FLOAT32


def network_file(tensor: Tensor) -> str:
    return str(getattr(tensor, "file", ""))


def describe(plan: Plan, out: pathlib.Path) -> str:
    """The plan as a table: what goes in, what comes out, and what is missing for a whole model."""
    rows = [("network", "names", "files", "tensors", "parameters", "stored as", "read", "written")]
    for part in plan.parts:
        kinds = collections.Counter(str(part.network.tensors[filling.name].dtype) for filling in part.fillings)
        target = collections.Counter(str(leaf.dtype) for leaf in part.abstract.values())
        rows.append(
            (
                part.network.name,
                part.network.layout,
                str(len(part.network.files)),
                str(len(part.fillings)),
                f"{sum(leaf.size for leaf in part.abstract.values()):,}",
                f"{' + '.join(kinds)} -> {' + '.join(target)}",
                _gigabytes(part.source_bytes),
                _gigabytes(part.target_bytes),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{part.network.name}: {note}" for part in plan.parts for note in part.network.notes]
    found = [str(plan.tokenizer)] if plan.tokenizer else []
    if plan.sentencepiece is not None:
        found.append(f"{SPIECE} among the tensors of the text encoder")
    needed = "" if plan.tokenizer else f"{'; ' if found else 'none found; '}sampling needs OUT/tokenizer/tokenizer.json"
    lines.append(f"tokenizer: {', '.join(found)}{needed}")
    missing = [name for name in NETWORKS if name not in [part.network.name for part in plan.parts]]
    if plan.config.image_encoder is None and "image_encoder" in missing:
        missing.remove("image_encoder")
    if missing:
        lines.append(f"not in SOURCE: {', '.join(missing)}; convert them into the same OUT to complete the model")
    lines.append(f"target: {out}")
    return "\n".join(lines)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def run(
    plan: Plan,
    out: pathlib.Path,
    *,
    resume: bool = False,
    checks: bool = True,
    progress: Callable[[int], object] = lambda count: None,
    say: Callable[[str], object] = print,
) -> list[str]:
    """Writes the model folder, or adds networks to one; the name appears when all is written. Returns warnings.

    Raises:
        FileExistsError: OUT holds one of the networks already, is something else, or has an unfinished run beside it.
        ValueError: a damaged source, an unfinished run of another plan, or not enough space.
    """
    out = out.absolute()
    names = [part.network.name for part in plan.parts]
    existing = _existing(out, names)
    config = plan.config if existing is None else _joined(plan.config, existing, out, names)
    partial = out.with_name(f".{out.name}.partial")
    _check_partial(partial, _note(out), plan, resume)
    todo = [part for part in plan.parts if not (partial / part.network.name).is_dir()]
    for part in plan.parts:
        if part not in todo:
            say(f"{part.network.name} was finished before")
            progress(part.source_bytes)
    check_place(out, sum(part.target_bytes for part in todo))
    warnings = []
    if checks:
        files = sorted({file for part in todo for file in part.network.files})
        warnings += [warning for file in files if (warning := check_file(file))]
    partial.parent.mkdir(parents=True, exist_ok=True)
    _note(out).write_text(plan.digest(), encoding="utf-8")
    partial.mkdir(exist_ok=True)
    try:
        for part in todo:
            convert_network(part, partial / part.network.name, progress)
    except BaseException:
        say(f"{partial} keeps what is finished; --resume goes on with it.")
        raise
    warnings += [
        f"{part.network.name}: {name!r} has values that are infinite or no numbers."
        for part in plan.parts
        for name, broken in _read_journal(_journal(partial / part.network.name)).items()
        if broken
    ]
    if plan.tokenizer is not None:
        (partial / "tokenizer").mkdir(exist_ok=True)
        for file in sorted(plan.tokenizer.iterdir()):
            if file.is_file() and file.suffix in TOKENIZER_FILES and not file.name.startswith("."):
                shutil.copyfile(file, partial / "tokenizer" / file.name)
    if existing is not None:
        for child in sorted(out.iterdir()):
            target = partial / child.name
            if child.is_dir() and not target.exists():
                shutil.copytree(child, target, copy_function=_link)
            elif child.is_file() and child.name not in ("config.json", MANIFEST):  # a README that somebody has added
                _link(str(child), str(target))
    if plan.sentencepiece is not None and not (partial / "tokenizer" / SPIECE).exists():
        (partial / "tokenizer").mkdir(exist_ok=True)
        (partial / "tokenizer" / SPIECE).write_bytes(plan.sentencepiece.read().tobytes())
    for part in plan.parts:
        _journal(partial / part.network.name).unlink(missing_ok=True)
    (partial / "config.json").write_text(config.to_json(), encoding="utf-8")
    write_manifest(partial, PARTS)
    if existing is not None:
        shutil.rmtree(_old(out), ignore_errors=True)
        out.rename(_old(out))
    partial.rename(out)
    _note(out).unlink()
    shutil.rmtree(_old(out), ignore_errors=True)
    return warnings


def _joined(config: ModelConfig, existing: ModelConfig, out: pathlib.Path, names: Sequence[str]) -> ModelConfig:
    """The config of a model folder that gets the networks of `names`; refuses those that do not fit what it has."""
    kept = {name: getattr(existing, name) for name in NETWORKS if (out / name).is_dir()}
    # What belongs to no network alone, such as the frames to drop, comes with the DiT.
    rest = config if "dit" in names else existing
    joined = dataclasses.replace(rest, **kept, **{name: getattr(config, name) for name in names})
    try:
        joined.check([*kept, *names])
    except ValueError as error:
        raise ValueError(f"OUT {out} holds {', '.join(kept)} already: {error}") from None
    return joined


def check_place(out: pathlib.Path, needed: int) -> None:
    """Sees that OUT can be written, before time is spent on what goes into it.

    Raises:
        ValueError: it cannot, or there is no room for `needed` bytes.
    """
    folder = out.absolute().parent
    check_output_folder("OUT", folder)
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    if needed > (free := shutil.disk_usage(place).free):
        raise ValueError(f"OUT {out}: {_gigabytes(needed)} are needed, {_gigabytes(free)} are free.")


def _old(out: pathlib.Path) -> pathlib.Path:
    return out.with_name(f".{out.name}.old")


def _note(out: pathlib.Path) -> pathlib.Path:
    """Says which plan an unfinished folder follows; beside it, so that the manifest can be written before it goes."""
    return out.with_name(f".{out.name}.partial.sha256")


def _existing(out: pathlib.Path, names: Sequence[str]) -> ModelConfig | None:
    """The config of the model folder that OUT is already, if it is one."""
    if _old(out).exists() and not out.exists():
        _old(out).rename(out)  # cut off while one took the place of the other
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise FileExistsError(f"OUT {out} exists and is no model folder; give another name.")
    if taken := [name for name in names if (out / name).exists()]:
        raise FileExistsError(
            f"OUT {out} holds {', '.join(taken)} already; give another name, or --only of the others."
        )
    verify_manifest(out)
    return load_model_config(out)


def _check_partial(partial: pathlib.Path, note: pathlib.Path, plan: Plan, resume: bool) -> None:
    if partial.exists() and not resume:
        raise FileExistsError(
            f"{partial} is an unfinished conversion to the same OUT; go on with it by --resume, or remove it."
        )
    if partial.exists() and (not note.is_file() or note.read_text(encoding="utf-8") != plan.digest()):
        raise ValueError(
            f"--resume: {partial} was begun with another source, other settings or another dtype; remove it to start anew."
        )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _journal(folder: pathlib.Path) -> pathlib.Path:
    """The file beside a network's folder that names its tensors as they are written."""
    return folder.with_name(f".{folder.name}.written")


def _read_journal(journal: pathlib.Path) -> dict[str, bool]:
    """The tensors that are written, by this run or one that was cut off, and whether they hold values that are no numbers."""
    lines = journal.read_text(encoding="utf-8").split("\n") if journal.is_file() else []
    # The end of the text may be half a line.
    return {name: bool(broken) for broken, _, name in (line.partition("\t") for line in lines[:-1])}


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    """Makes errors of the system of those of tensorstore, whose type is one for all and whose text names its own source."""
    try:
        yield
    except ValueError as error:
        raise OSError(f"{folder} could not be written: {_system_reason(error)}.") from None


def _system_reason(error: Exception) -> str:
    known = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO))
    return next((reason for reason in known if reason in str(error)), str(error).splitlines()[0])


def convert_network(part: Part, folder: pathlib.Path, progress: Callable[[int], object]) -> None:
    """Reads each tensor once and writes what it fills; what the journal names is written already."""
    journal = _journal(folder)
    written = _read_journal(journal)
    stacked = {path: filling.layer is not None for filling in part.fillings for path in filling.rule.flax_paths}
    with _writing(folder):
        writer = ParamsWriter(folder, part.abstract, stacked.__getitem__, keep=bool(written))

    def convert(filling: Filling) -> tuple[Filling, bool]:
        if filling.name in written:
            return filling, False
        values = part.network.tensors[filling.name].read()
        broken = not np.isfinite(values).all()
        for path, array in filling.arrays(values):
            with _writing(folder):
                writer.write(path, array, filling.layer)
        return filling, broken

    # Two at a time: one is read and cast while the other is packed and written.
    with naming(journal), concurrent.futures.ThreadPoolExecutor(2) as pool, journal.open("a", encoding="utf-8") as file:
        for filling, broken in pool.map(convert, part.fillings):
            if filling.name not in written:
                print("broken" if broken else "", filling.name, sep="\t", file=file, flush=True)
            progress(part.network.tensors[filling.name].num_bytes)
    writer.finish()
