"""What lies in a path: which networks, under whose names, in which files, and the config that their shapes tell.

Nothing is asked of the user: a folder of the official repository, a folder of diffusers, a folder of single files or one
file are told apart by the names of the tensors in them (see `naming`).
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from magref_jax.checkpoint import file_digest
from magref_jax.config import DType, ModelConfig, VAEConfig, from_dict
from magref_jax.convert import naming
from magref_jax.convert.distributed_files import METADATA, read_distributed
from magref_jax.convert.rules import Layout
from magref_jax.convert.tensor_files import TORCH_SUFFIXES, check_pth, read_pth_levels, read_safetensors
from magref_jax.descriptions import short_repr


class Tensor(Protocol):
    """A tensor that can be read: one of a file or of several, or one that is computed."""

    @property
    def dtype(self) -> np.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def num_bytes(self) -> int: ...
    def read(self) -> np.ndarray: ...


class StoredTensor(Tensor, Protocol):
    """A tensor that lies in a file."""

    @property
    def name(self) -> str: ...
    @property
    def file(self) -> pathlib.Path: ...


@short_repr
@dataclasses.dataclass(frozen=True)
class Network:
    """One network as it lies there. Names are those of its layout, without prefixes; 8-bit floats come with their scales."""

    name: str  # as in checkpoint.NETWORKS
    layout: Layout
    files: tuple[pathlib.Path, ...]
    tensors: Mapping[str, Tensor]
    config: dict[str, Any]  # fields of its config dataclass that shapes and config.json tell
    notes: tuple[str, ...] = ()  # what was chosen, and what was taken off the names


@short_repr
@dataclasses.dataclass(frozen=True)
class Source:
    networks: dict[str, Network]
    tokenizer: pathlib.Path | None
    strangers: tuple[str, ...] = ()  # files that hold something else, and what
    sentencepiece: Tensor | None = None  # the tokenizer inside a text encoder's file for ComfyUI: bytes of spiece.model


# Whose config.json is whose, by its `_class_name` or `architectures`.
CONFIG_CLASSES = {
    "WanModel": "dit",
    "WanTransformer3DModel": "dit",
    "AutoencoderKLWan": "vae",
    "UMT5EncoderModel": "text_encoder",
    "UMT5ForConditionalGeneration": "text_encoder",
    "CLIPVisionModel": "image_encoder",
    "CLIPVisionModelWithProjection": "image_encoder",
}
TOKENIZER_FOLDERS = ("tokenizer", "google/umt5-xxl")
SENTENCEPIECE = "spiece_model"
LORA = re.compile(r".*(lora_(up|down|A|B)\b|\.diff(_b|_m)?$|hada_|lokr_).*")
# Files of weights that are read elsewhere, and how.
ELSEWHERE: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r".*\.gguf"),
        "is quantised in the format of GGUF, which is not read here; turn it into safetensors with the gguf package "
        "(docs/weights.md has the lines), or take the safetensors that it was made of.",
    ),
    (
        re.compile(r"(mp_rank_\d+_model_states|(bf16_|fp16_)?zero_pp_rank_\d+_.*_states)\.pt"),
        "is a shard of DeepSpeed. In the folder of its zero_to_fp32.py run `python zero_to_fp32.py . WEIGHTS "
        "--safe_serialization`, then convert the folder WEIGHTS.",
    ),
)
# What trainers leave beside weights.
TRAINING_STATE = re.compile(
    r"(optimizer|scheduler|scaler|sampler|training_args|trainer_state|rng_state|random_states).*"
)
SHARD = re.compile(
    r"(?P<stem>.+?)(\.(?P<old>\w+))?-\d{5}-of-(?P<count>\d{5})(\.(?P<new>\w+))?\.(?P<kind>safetensors|bin)"
)
INDEX = re.compile(r"(?P<stem>.+)\.(?P<kind>safetensors|bin)\.index(\.(?P<variant>\w+))?\.json")
SINGLE = re.compile(r"(?P<stem>.+?)(\.(?P<variant>fp16|bf16|fp32|fp8))?\.(?P<kind>safetensors|pth|pt|bin|ckpt)")
STEMS = {"pytorch_model": "model"}  # of transformers: the same weights in another kind of file
KINDS = "safetensors, .pth, .pt, .bin, .ckpt or a folder with .metadata and .distcp files"


@dataclasses.dataclass(frozen=True)
class Unit:
    """The files that belong together, and the index that says so."""

    files: tuple[pathlib.Path, ...]
    index: pathlib.Path | None = None
    stem: str = ""  # what the same weights of another precision or kind of file are called as well
    variant: str = ""  # such as fp16
    kind: str = "safetensors"

    @property
    def rank(self) -> tuple[bool, bool]:
        """The smallest is the best of those of one stem."""
        return bool(self.variant), self.kind != "safetensors"


def read_source(path: pathlib.Path, only: Collection[str] = (), key: str | None = None) -> Source:
    """Looks at a file, or a folder and the folders in it, reading headers only.

    `key` chooses where a file holds a network several times, such as "ema" and "generator".

    Raises:
        FileNotFoundError: the path, or a file that an index names, is not there.
        ValueError: a damaged file, no network or one of them twice, a model that is known and not supported, or one of
            `only` or the `key` is not there.
    """
    if not path.exists():
        raise FileNotFoundError(f"SOURCE {path} does not exist.")
    wanted = [name for name in CONFIGS if not only or name in only]
    if "dit" in wanted:
        _refuse_pair(path)
    networks: dict[str, Network] = {}
    keys: list[naming.Set] = []
    sentencepiece = None
    units, strangers = _preferred(_units(path))
    strangers += [stranger for folder in _folders(path) for stranger in _elsewhere(folder)]
    for unit in units:
        found, sets = _networks(unit, wanted, key)
        keys += sets
        if not sets:
            strangers.append(f"{unit.files[0]}: {_what_else(unit)}")
        for network in found:
            if network.name in networks:
                raise ValueError(
                    f"SOURCE {path} holds {network.name} twice, in {networks[network.name].files[0]} and in "
                    f"{network.files[0]}; give one of them alone, or leave it out with --only."
                )
            networks[network.name] = network
            sentencepiece = _sentencepiece(network) if network.name == "text_encoder" else sentencepiece
    if key is not None and not any(naming.has_key(each, key) for each in keys):
        there = ", ".join(sorted({each.key for each in keys if each.key})) or "none"
        raise ValueError(f"--set source.key={key}: no weights lie under this key; there are {there}.")
    if not networks and strangers and not keys:
        raise ValueError(f"SOURCE {path} holds no network that is known here. {strangers[0]}")
    if missing := [name for name in only if name not in networks]:
        raise ValueError(
            f"--only {','.join(missing)}: not in SOURCE {path}, which has {', '.join(networks) or 'none'}."
        )
    if not networks:
        raise ValueError(f"SOURCE {path} holds no weights; expected {KINDS}.")
    return Source(networks, _find_tokenizer(path), tuple(strangers), sentencepiece)


def _networks(unit: Unit, wanted: Collection[str], key: str | None) -> tuple[list[Network], list[naming.Set]]:
    """The wanted networks of files that belong together, and every set of names in them."""
    file = unit.files[0]
    levels = _read_unit(unit)
    try:
        plain = {level: naming.without_wrappers(tensors) for level, tensors in levels.items()}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    sets = naming.find_sets({level: renamed.values() for level, (renamed, _) in plain.items()})
    if not sets:
        for renamed, _ in plain.values():
            naming.refuse_foreign(file, renamed.values(), wanted)
        return [], []
    chosen = naming.choose_sets(file, [each for each in sets if each.network in wanted], key)
    found = []
    for level in {each.level: None for each in chosen}:
        renamed, wrappers = plain[level]
        here = [each for each in chosen if each.level == level]
        try:
            split = naming.split_names(renamed.values(), [each for each in sets if each.level == level], here)
        except ValueError as error:
            raise ValueError(f"{file} has names twice: {error}") from None
        stored = {renamed[name]: tensor for name, tensor in levels[level].items()}
        for each in here:
            own = split[each.network]
            naming.refuse_foreign(file, own.values(), [each.network])
            tensors = {ours: stored[theirs] for theirs, ours in own.items()}
            resolved = dequantised(_tie(each.network, tensors))
            fields = CONFIGS[each.network](
                _Shapes(each.layout, resolved, file), _config_json(file.parent, each.network)
            )
            naming.refuse_foreign_sizes(file, each.network, fields)
            notes = naming.notes(each, sets, wrappers)
            found.append(Network(each.network, each.layout, unit.files, resolved, fields, notes))
    return found, sets


def _what_else(unit: Unit) -> str:
    """What files without a network hold."""
    tensors = [name for level in _read_unit(unit).values() for name in level]
    if any(LORA.fullmatch(name) for name in tensors):
        return "it is a LoRA: use it with `sample.py --lora`, or rename its tensors for other programs with --to."
    examples = ", ".join(map(repr, tensors[:3]))
    return f"None of its names is known, such as {examples or 'none at all'}."


def _refuse_pair(path: pathlib.Path) -> None:
    """Refuses a folder that is, or lies in, a pipeline of diffusers with two transformers.

    Raises:
        ValueError: it is one.
    """
    for folder in (path, path.parent):
        index = folder / "model_index.json"
        if not index.is_file():
            continue
        content = _read_json(index)
        second = content.get("transformer_2")
        if content.get("boundary_ratio") is not None or (isinstance(second, list) and second[:1] != [None]):
            raise ValueError(
                f"{index} is of {naming.PAIR}. Not supported; nothing was written. --only takes its other networks."
            )


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        return []
    return [path, *sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))]


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Without what programs leave there for themselves, such as .DS_Store and macOS's ._model.safetensors."""
    return sorted(
        child
        for child in folder.iterdir()
        if child.is_file() and not child.name.startswith(".") and not TRAINING_STATE.fullmatch(child.name)
    )


def _elsewhere(folder: pathlib.Path) -> list[str]:
    found = []
    for pattern, what in ELSEWHERE:
        if files := [file for file in _files(folder) if pattern.fullmatch(file.name)]:
            found.append(f"{files[0]} {what}")
    return found


def _units(path: pathlib.Path) -> Iterator[Unit]:
    if path.is_file():
        for pattern, what in ELSEWHERE:
            if pattern.fullmatch(path.name):
                raise ValueError(f"{path} {what}")
        if index := INDEX.fullmatch(path.name):
            yield _sharded(path, index)
        elif single := SINGLE.fullmatch(path.name):
            yield Unit((path,), kind=single["kind"])
        elif path.name == METADATA or path.suffix == ".distcp":
            yield _distributed(path.parent)
        else:
            raise ValueError(f"SOURCE {path} must be {KINDS}, or a folder of such.")
        return
    for folder in _folders(path):
        if (folder / METADATA).is_file():
            yield _distributed(folder)
        files = _files(folder)
        sharded = [_sharded(file, index) for file in files if (index := INDEX.fullmatch(file.name))]
        taken = {file for unit in sharded for file in unit.files}
        yield from sharded
        for file in files:
            if file in taken or any(pattern.fullmatch(file.name) for pattern, _ in ELSEWHERE):
                continue
            if part := SHARD.fullmatch(file.name):
                variant = part["old"] or part["new"]
                index = f"{part['stem']}.{part['kind']}.index.{f'{variant}.' if variant else ''}json"
                raise FileNotFoundError(
                    f"{file} is one of {int(part['count'])} files, but {folder / index}, which says what is in which, "
                    "is missing or does not name it."
                )
            if single := SINGLE.fullmatch(file.name):
                stem = f"{folder}/{STEMS.get(single['stem'], single['stem'])}"
                yield Unit((file,), None, stem, single["variant"] or "", single["kind"])


def _distributed(folder: pathlib.Path) -> Unit:
    return Unit((folder / METADATA, *sorted(folder.glob("*.distcp"))), kind="distcp")


def _sharded(index: pathlib.Path, found: re.Match[str]) -> Unit:
    stem = f"{index.parent}/{STEMS.get(found['stem'], found['stem'])}"
    return Unit(_shards(index), index, stem, found["variant"] or "", found["kind"])


def _preferred(units: Iterable[Unit]) -> tuple[list[Unit], list[str]]:
    """Of the same weights in several precisions or kinds of files the full ones, and safetensors; what is left out."""
    best: dict[str, Unit] = {}
    others = []
    for unit in units:
        stem = unit.stem or str(unit.files[0])
        if stem in best:
            taken, other = sorted((best[stem], unit), key=lambda each: each.rank)
            others.append(f"{other.files[0]}: the same weights as {taken.files[0]}, which are taken")
            unit = taken
        best[stem] = unit
    return list(best.values()), others


def _shards(index: pathlib.Path) -> tuple[pathlib.Path, ...]:
    shards = sorted(set(_read_index(index).values()))
    if any(pathlib.PurePath(name).name != name for name in shards):
        raise ValueError(f"{index} names files outside its folder.")
    files = tuple(index.parent / name for name in shards)
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{index} names {', '.join(missing)}, which is missing.")
    return files


def _read_index(index: pathlib.Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index} is damaged: it has no weight_map from names to files.")
    return weight_map


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is no JSON object.")
    return content


def _read_unit(unit: Unit) -> Mapping[str, Mapping[str, StoredTensor]]:
    """The tensors by the dictionary of a file that they lie in; "" is the outermost."""
    if unit.kind == "distcp":
        return read_distributed(unit.files[0].parent)
    levels: dict[str, dict[str, StoredTensor]] = {}
    for file in unit.files:
        for level, tensors in _read_file(file).items():
            held = levels.setdefault(level, {})
            for name, tensor in tensors.items():
                if name in held:
                    raise ValueError(f"{name!r} is in {held[name].file} and in {file}.")
                held[name] = tensor
    if unit.index is not None:
        promised = _read_index(unit.index)
        tensors = {name: tensor for held in levels.values() for name, tensor in held.items()}
        for name, file in promised.items():
            if name not in tensors or tensors[name].file.name != file:
                raise ValueError(f"{unit.index} says that {name!r} is in {file}; it is not.")
        if extra := sorted(set(tensors) - set(promised)):
            raise ValueError(f"{tensors[extra[0]].file} holds {extra[0]!r}, which {unit.index} does not name.")
    return levels


def _read_file(file: pathlib.Path) -> Mapping[str, Mapping[str, StoredTensor]]:
    return read_pth_levels(file) if file.suffix in TORCH_SUFFIXES else {"": read_safetensors(file)}


def _tie(name: str, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """In the layout of transformers, umT5's token embedding has one or both of two names."""
    shared, tied = "shared.weight", "encoder.embed_tokens.weight"
    if name != "text_encoder" or tied not in tensors:
        return tensors
    if shared not in tensors:
        return {shared if key == tied else key: tensor for key, tensor in tensors.items()}
    if tensors[shared].shape != tensors[tied].shape:
        raise ValueError(
            f"{shared!r} has shape {tensors[shared].shape} and {tied!r} {tensors[tied].shape}; they are one."
        )
    return tensors


# Quantised files


@dataclasses.dataclass(frozen=True)
class ScaledTensor:
    """An 8-bit tensor and the factors it is stored without: one, one per row, per block of a row or per block of a matrix."""

    weight: StoredTensor
    scale: StoredTensor

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def num_bytes(self) -> int:
        return self.weight.num_bytes

    def read(self) -> np.ndarray:
        weight, scale = self.weight.read().astype(np.float32), self.scale.read().astype(np.float32)
        if scale.shape[:1] == weight.shape[:1] and scale.size == scale.shape[0]:
            scale = scale.reshape(-1, *(1 for _ in weight.shape[1:]))
        elif scale.ndim == 2:
            rows, columns = weight.shape
            scale = scale.repeat(BLOCK, axis=0)[:rows].repeat(BLOCK, axis=1)[:, :columns]
        if scale.size == 1:
            return weight * scale.reshape(())
        if scale.ndim == 3:  # (rows, blocks, 1)
            return (weight.reshape(*scale.shape[:2], -1) * scale).reshape(weight.shape)
        return weight * scale


# What the factors of a layer's weight are called, by ComfyUI and musubi-tuner, ComfyUI since 2025, and transformers. All of
# them are multiplied, those of `_inv` too.
SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
BLOCK = 128  # rows and columns that share a factor where they are given for blocks of a matrix
# What quantised files hold beside weights: settings for running in 8 bits, which we do not.
IGNORED = re.compile(r"(.*\.)?scaled_fp8|.*\.(scale_input|input_scale|comfy_quant)")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


def dequantised(tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors with each 8-bit weight and its scale as one.

    Raises:
        ValueError: a scale without its weight or beside another one, of a shape that does not fit the weight, or a
            format other than 8-bit floats.
    """
    scales: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".comfy_quant"):
            try:
                settings = json.loads(tensor.read().astype(np.uint8).tobytes().decode("utf-8"))["format"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{tensor.file}: {name!r} is damaged.") from None
            if settings not in FLOAT8:
                raise ValueError(f"{tensor.file}: {name!r} says {settings!r}; known are {', '.join(FLOAT8)}.")
        for suffix in SCALES:
            if name.endswith(suffix):
                weight = name.removesuffix(suffix) + ".weight"
                if weight not in tensors:
                    raise ValueError(f"{tensor.file}: {name!r} scales {weight!r}, which is missing.")
                if weight in scales:
                    raise ValueError(f"{tensor.file}: {name!r} and {scales[weight].name!r} both scale {weight!r}.")
                if tensors[weight].dtype.kind in "iub":
                    raise ValueError(
                        f"{tensor.file}: {name!r} scales {weight!r} of dtype {tensors[weight].dtype}; "
                        "of quantised weights only 8-bit floats are known."
                    )
                if not _scales(tensor.shape, tensors[weight].shape):
                    raise ValueError(
                        f"{tensor.file}: {name!r} has shape {tensor.shape}, which does not scale {weight!r} with shape "
                        f"{tensors[weight].shape}."
                    )
                scales[weight] = tensor
    return {
        name: ScaledTensor(tensor, scales[name]) if name in scales else tensor
        for name, tensor in tensors.items()
        if not IGNORED.fullmatch(name) and not name.endswith(SCALES)
    }


def _scales(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    if math.prod(scale) == 1:
        return True
    if scale[:1] == weight[:1] and math.prod(scale) == scale[0]:
        return True
    if len(weight) != 2:
        return False
    if len(scale) == 3:
        return scale[0] == weight[0] and scale[2] == 1 and scale[1] > 0 and weight[1] % scale[1] == 0
    return scale == tuple(-(-size // BLOCK) for size in weight)


# Configs


class _Shapes:
    """Shapes by the name of either layout."""

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor], file: pathlib.Path) -> None:
        self.layout, self.tensors, self.file = layout, tensors, file

    def find(self, wan: str, hf: str) -> tuple[int, ...] | None:
        tensor = self.tensors.get(wan if self.layout == "wan" else hf)
        return None if tensor is None else tensor.shape

    def __call__(self, wan: str, hf: str, ndim: int) -> tuple[int, ...]:
        shape, name = self.find(wan, hf), wan if self.layout == "wan" else hf
        if shape is None or len(shape) != ndim or 0 in shape:
            found = "is missing" if shape is None else f"has shape {shape}"
            raise ValueError(
                f"{self.file}: {name!r} {found}; expected {ndim} dimensions, which tell the size of the network."
            )
        return shape

    def num_layers(self, wan: str, hf: str) -> int:
        pattern = re.compile(re.escape(wan if self.layout == "wan" else hf).replace("N", r"(\d{1,4})") + ".*")
        return 1 + max((int(found[1]) for name in self.tensors if (found := pattern.fullmatch(name))), default=-1)

    def check(self, extra: Mapping[str, Any], fields: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
        """The fields; what config.json says of them must be the same."""
        for theirs, ours in names.items():
            stated = extra.get(theirs)
            stated = tuple(stated) if isinstance(stated, list) else stated
            if stated is not None and stated != fields[ours]:
                raise ValueError(
                    f"{self.file.parent / 'config.json'} says {theirs}={stated}, but the tensors have {fields[ours]}."
                )
        return fields


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# What config.json says and shapes do not tell: nothing but this could find it wrong.
TAKEN_OVER: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("num_heads", "num_attention_heads", "text_len", "relative_attention_max_distance"),
        (_is_count, "a whole number above 0"),
    ),
    **dict.fromkeys(
        ("eps", "layer_norm_epsilon", "layer_norm_eps"),
        (lambda value: _is_number(value) and value > 0, "a number above 0"),
    ),
    **dict.fromkeys(
        ("latents_mean", "latents_std"),
        (lambda value: isinstance(value, list) and all(map(_is_number, value)), "a list of numbers"),
    ),
}


def _config_json(folder: pathlib.Path, network: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    content = _read_json(path)
    architectures = content.get("architectures")
    classes = [content.get("_class_name"), *(architectures if isinstance(architectures, list) else ())]
    if network not in [CONFIG_CLASSES.get(name) for name in classes if isinstance(name, str)]:
        return {}
    fields = content.get("vision_config") or content
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is damaged: vision_config is no JSON object.")
    for name, (is_allowed, expected) in TAKEN_OVER.items():
        if fields.get(name) is not None and not is_allowed(fields[name]):
            raise ValueError(f"{path} says {name}={fields[name]!r}, expected {expected}.")
    return fields


def _dit(shapes: _Shapes, extra: Mapping[str, Any]) -> dict[str, Any]:
    dim, in_channels, *patch_size = shapes("patch_embedding.weight", "patch_embedding.weight", 5)
    embedder = "condition_embedder."
    image = shapes.find("img_emb.proj.1.weight", f"{embedder}image_embedder.ff.net.0.proj.weight")
    fields = {
        "dim": dim,
        "in_channels": in_channels,
        "patch_size": tuple(patch_size),
        "ffn_dim": shapes("blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj.weight", 2)[0],
        "text_dim": shapes("text_embedding.0.weight", f"{embedder}text_embedder.linear_1.weight", 2)[1],
        "freq_dim": shapes("time_embedding.0.weight", f"{embedder}time_embedder.linear_1.weight", 2)[1],
        "out_channels": shapes("head.head.weight", "proj_out.weight", 2)[0] // math.prod(patch_size),
        "num_layers": shapes.num_layers("blocks.N.", "blocks.N."),
        "image_dim": image[-1] if image else None,
        "num_heads": extra.get("num_heads") or extra.get("num_attention_heads") or max(1, dim // 128),
        "text_len": extra.get("text_len") or 512,
        "norm_eps": extra.get("eps") or 1e-6,
    }
    names = {"dim": "dim", "in_dim": "in_channels", "in_channels": "in_channels", "out_channels": "out_channels"}
    names |= {name: name for name in ("ffn_dim", "num_layers", "freq_dim", "text_dim", "patch_size", "image_dim")}
    names |= {"out_dim": "out_channels"}
    return shapes.check(extra, fields, names)


def _vae(shapes: _Shapes, extra: Mapping[str, Any]) -> dict[str, Any]:
    base_dim = shapes("encoder.conv1.weight", "encoder.conv_in.weight", 5)[0]
    widths, blocks, temporal = [0], [0], []
    for index in range(len(shapes.tensors)):
        wan, hf = f"encoder.downsamples.{index}.", f"encoder.down_blocks.{index}."
        block = wan + "residual.2.weight", hf + "conv1.weight"
        if shapes.find(*block) is not None:
            widths[-1], blocks[-1] = shapes(*block, 5)[0], blocks[-1] + 1
        elif shapes.find(wan + "resample.1.weight", hf + "resample.1.weight") is not None:
            temporal.append(shapes.find(wan + "time_conv.weight", hf + "time_conv.weight") is not None)
            widths.append(0)
            blocks.append(0)
        else:
            break
    if len(set(blocks)) != 1 or any(width % base_dim or not width for width in widths):
        raise ValueError(f"{shapes.file}: stages of widths {widths} and {blocks} residual blocks are no Wan VAE.")
    latent_channels = shapes("decoder.conv1.weight", "decoder.conv_in.weight", 5)[1]
    fields = {
        "base_dim": base_dim,
        "dim_multipliers": tuple(width // base_dim for width in widths),
        "num_res_blocks": blocks[0],
        "latent_channels": latent_channels,
        "temporal_downsample": tuple(temporal),
    }
    mean, std = extra.get("latents_mean"), extra.get("latents_std")
    if mean and std:
        fields |= {"latent_mean": tuple(mean), "latent_std": tuple(std)}
    elif latent_channels != VAEConfig.latent_channels:
        # Wan's own statistics cannot be these; 0 and 1 leave the latents as they are until --set says better.
        fields |= {"latent_mean": (0.0,) * latent_channels, "latent_std": (1.0,) * latent_channels}
    names = {"base_dim": "base_dim", "z_dim": "latent_channels", "dim_mult": "dim_multipliers"}
    names |= {"num_res_blocks": "num_res_blocks", "temperal_downsample": "temporal_downsample"}
    return shapes.check(extra, fields, names)


def _text_encoder(shapes: _Shapes, extra: Mapping[str, Any]) -> dict[str, Any]:
    attention = "encoder.block.0.layer.0.SelfAttention."
    vocab_size, dim = shapes("token_embedding.weight", "shared.weight", 2)
    num_buckets, num_heads = shapes(
        "blocks.0.pos_embedding.embedding.weight", attention + "relative_attention_bias.weight", 2
    )
    inner = shapes("blocks.0.attn.q.weight", attention + "q.weight", 2)[0]
    if inner % num_heads:
        raise ValueError(f"{shapes.file}: {inner} query channels do not split into {num_heads} heads.")
    fields = {
        "vocab_size": vocab_size,
        "dim": dim,
        "ffn_dim": shapes("blocks.0.ffn.fc1.weight", "encoder.block.0.layer.1.DenseReluDense.wi_1.weight", 2)[0],
        "num_heads": num_heads,
        "head_dim": inner // num_heads,
        "num_buckets": num_buckets,
        "num_layers": shapes.num_layers("blocks.N.", "encoder.block.N."),
        "max_distance": extra.get("relative_attention_max_distance") or 128,
        "norm_eps": extra.get("layer_norm_epsilon") or 1e-6,
    }
    names = {"vocab_size": "vocab_size", "d_model": "dim", "d_ff": "ffn_dim", "d_kv": "head_dim"}
    return shapes.check(extra, fields, names | {"num_heads": "num_heads", "num_layers": "num_layers"})


def _image_encoder(shapes: _Shapes, extra: Mapping[str, Any]) -> dict[str, Any]:
    dim, _, patch_size, _ = shapes("visual.patch_embedding.weight", "embeddings.patch_embedding.weight", 4)
    positions = shapes.find("visual.pos_embedding", "embeddings.position_embedding.weight") or ()
    count = positions[-2] if len(positions) > 1 else 0
    side = math.isqrt(max(0, count - 1))
    if side == 0 or side * side + 1 != count:
        raise ValueError(
            f"{shapes.file}: position embeddings of shape {positions} are no class token and a square of patches."
        )
    fields = {
        "dim": dim,
        "ffn_dim": shapes("visual.transformer.0.mlp.0.weight", "encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_layers": shapes.num_layers("visual.transformer.N.", "encoder.layers.N."),
        "patch_size": patch_size,
        "image_size": side * patch_size,
        # Shapes do not tell; heads of ViT-H are 80 wide.
        "num_heads": extra.get("num_attention_heads") or max(1, dim // 80),
        "norm_eps": extra.get("layer_norm_eps") or 1e-5,
    }
    names = {"hidden_size": "dim", "intermediate_size": "ffn_dim", "num_hidden_layers": "num_layers"}
    return shapes.check(extra, fields, names | {"patch_size": "patch_size", "image_size": "image_size"})


CONFIGS: dict[str, Callable[[_Shapes, Mapping[str, Any]], dict[str, Any]]] = {
    "dit": _dit,
    "vae": _vae,
    "text_encoder": _text_encoder,
    "image_encoder": _image_encoder,
}


def model_config(source: Source, settings: Mapping[str, Any] | None = None, dtype: DType | None = None) -> ModelConfig:
    """The config of the model folder. Networks that are not in the source get the sizes of the release.

    `dtype` is what the DiT and the encoders of the source compute in; the VAE computes in float32 as it is stored.
    `settings` are fields by dotted path, such as {"image_encoder.num_heads": 16}; they win over what shapes tell.

    Raises:
        ValueError: a setting that does not exist, or sizes that do not fit together.
    """
    values: dict[str, Any] = {name: dict(network.config) for name, network in source.networks.items()}
    if dtype is not None:
        for name in values.keys() - {"vae"}:
            values[name]["dtype"] = dtype
    dit = values.get("dit", {})
    if dit and dit["image_dim"] is None:
        # Text-to-video: no CLIP, and no canvas to cut from the start of the video.
        values["drop_frames"] = 0
        if "image_encoder" not in values:
            values["image_encoder"] = None
    for path, value in (settings or {}).items():
        *parents, field = path.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"--set {path}: {parent} has no fields here.")
        place[field] = value
    try:
        return from_dict(ModelConfig, values, "config")
    except TypeError as error:
        raise ValueError(f"--set: {error}.") from None


def _sentencepiece(network: Network) -> Tensor | None:
    """The tokenizer that ComfyUI keeps among the tensors of a text encoder."""
    tensor = network.tensors.get(SENTENCEPIECE)
    if tensor is not None and (tensor.dtype != np.uint8 or len(tensor.shape) != 1):
        raise ValueError(
            f"{network.files[0]}: {SENTENCEPIECE!r} is {tensor.dtype} {tensor.shape}, expected the bytes of a "
            "sentencepiece model."
        )
    return tensor


def _find_tokenizer(path: pathlib.Path) -> pathlib.Path | None:
    folder = path if path.is_dir() else path.parent
    for name in TOKENIZER_FOLDERS:
        if any((folder / name / file).is_file() for file in ("tokenizer.json", "spiece.model")):
            return folder / name
    return None


# Damage


def known_digest(file: pathlib.Path) -> str | None:
    """The sha256 that a download from the hub left beside a file or in the name of the file it links to."""
    note = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    lines = note.read_text(encoding="utf-8", errors="replace").splitlines() if note.is_file() else []
    for candidate in (lines[1] if len(lines) > 1 else "", file.resolve().name):
        if re.fullmatch(r"[0-9a-f]{64}", candidate.strip()):
            return candidate.strip()
    return None


def check_file(file: pathlib.Path) -> str | None:
    """Looks for damage inside the tensors; a warning when there is nothing to compare with.

    Raises:
        ValueError: the file is damaged.
    """
    if file.suffix in TORCH_SUFFIXES:
        check_pth(file)
        return None
    digest = known_digest(file)
    if digest is None:
        return f"{file.name} comes without a digest: damage inside its tensors would not be seen."
    if (found := file_digest(file)) != digest:
        raise ValueError(f"{file} is damaged: its sha256 is {found}, expected {digest}.")
    return None
