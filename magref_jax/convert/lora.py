"""LoRA files for the diffusion transformer, in the spellings that trainers and programs write, in and out.

    lora = read_lora(path, config, abstract_params)
    params = apply_loras(params, [(lora, 0.8)])

A file adds strength · alpha / rank · up @ down to a weight, or a full difference to a weight, a bias or a modulation. Names
are those of the conversion tables: a spelling is prefixes, one of the two layouts, dots or underscores, and how a key ends.
Alpha is a key of the file, or stands in its header, or in PEFT's `adapter_config.json` beside it.
"""

import collections
import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Shaped, UInt

from magref_jax.command import check_local
from magref_jax.config import DiTConfig
from magref_jax.convert.dit import dit_rules
from magref_jax.convert.naming import DIT_PREFIXES, without_wrappers
from magref_jax.convert.rules import LINEAR, Layout, Rule, Transform, flatten, torch_shapes
from magref_jax.convert.tensor_files import (
    TORCH_SUFFIXES,
    StoredTensor,
    check_pth,
    read_pth_levels,
    read_safetensors,
    safetensors_metadata,
    write_safetensors,
)
from magref_jax.descriptions import short_repr
from magref_jax.files import read_text
from magref_jax.models.adapters import LoraConfig

Family = Literal["kohya", "peft", "original"]
FindAlpha = Callable[[str, int], tuple[float | None, str]]  # of a key and its rank: alpha and where it is from

PREFIXES = (  # besides those of whole models
    "lora_unet__",  # VideoX-Fun
    "lora_unet_",  # kohya, musubi-tuner
    "lora_transformer_",  # OneTrainer
    "lycoris_",
    "base_model.",  # PEFT
    "_orig_mod_",  # torch.compile, where dots are underscores
    "orig_mod_",
    *(f"{prefix}." for prefix in sorted(DIT_PREFIXES)),
)

# How a key ends, what that tensor is, and of which of the module's parameters.
ROLES = tuple(
    (re.compile(rf"(.+)\.(?:{ending})"), role, leaf)
    for ending, role, leaf in (
        (r"lora_(?:down|A)(?:\.[\w-]+)?\.weight", "down", "weight"),  # between may be the name of a PEFT adapter
        (r"lora_(?:up|B)(?:\.[\w-]+)?\.weight", "up", "weight"),
        (r"(?:lora|lora_linear_layer)\.down\.weight|lora_A", "down", "weight"),
        (r"(?:lora|lora_linear_layer)\.up\.weight|lora_B", "up", "weight"),
        (r"alpha", "alpha", "weight"),
        (r"lora_(?:up|B)(?:\.[\w-]+)?\.bias", "up_bias", "bias"),
        (r"diff", "diff", "weight"),
        (r"diff_b", "diff_b", "bias"),
        (r"diff_m", "diff_m", "modulation"),
    )
)
DIFF_ENDINGS = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}

# Parts of keys that mean another method.
UNSUPPORTED = {
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "a Tucker decomposition",
    "transformer_2.": "a pair of transformers, as Wan 2.2 has",
}
SUPPORTED = (
    "Supported are low-rank pairs (lora_down and lora_up, or lora_A and lora_B) and full differences (diff, diff_b, "
    "diff_m)."
)

ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers keeps alpha: a JSON text in the header of the file
KOHYA_ALPHA = "ss_network_alpha"
ADAPTER_CONFIG = "adapter_config.json"  # where PEFT keeps alpha
PEFT_STEM = "adapter_model"
FOLDER_FILES = (f"{PEFT_STEM}.safetensors", f"{PEFT_STEM}.bin", "pytorch_lora_weights.safetensors")
# Fields of PEFT's config that mean more than alpha / rank · up @ down, unless they are empty.
OTHER_METHODS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "target_parameters": "adapters of bare parameters",
}
# How PEFT may have begun without changing the weights that the adapter is for.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga")
PATCH_KERNEL = "patch_embedding/kernel"


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """alpha / rank · up @ down, in torch's axis order and the dtypes of the file. Without an alpha the factor is 1."""

    down: Shaped[np.ndarray, "rank in *kernel"]
    up: Shaped[np.ndarray, "out rank *ones"]
    alpha: Shaped[np.ndarray, "..."] | None = None  # one number
    origin: str = ""  # of alpha; without one, what else a report says of it

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        # Not alpha / sqrt(rank), which some programs guess of base_model.model keys: nothing in such a file says so.
        return self.effective_alpha / self.rank

    @property
    def effective_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha.item())


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class Difference:
    """scale · array, in our axis order and the dtype of the file."""

    array: Shaped[np.ndarray, "..."]
    scale: float = 1.0  # other than 1 for the bias of a PEFT pair, which is scaled as the pair is


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class Delta:
    """What is added to the parameter of this slash-separated path, or to one layer of it."""

    path: str
    layer: int | None
    value: LowRank | Difference


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class Lora:
    """The content of a file, and which of its keys found a place in the model."""

    file: str
    config: DiTConfig
    deltas: tuple[Delta, ...]
    matched: int
    unmatched: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()  # for the patches of a text-to-video model

    @property
    def report(self) -> str:
        total = self.matched + len(self.unmatched) + len(self.skipped)
        text = f"LoRA {self.file}: {self.matched} of {total} keys matched{self._alphas()}"
        if half := re.search(r"(high|low)[ _-]?noise", self.file, re.IGNORECASE):
            text += f"; by its name for the {half[1].lower()}-noise half of a Wan 2.2 pair, and added to the one transformer here"
        if self.unmatched:
            text += f"; unmatched: {_listed(self.unmatched)}"
        if self.skipped:
            text += (
                f"; skipped, because they are for {self.config.out_channels} input channels of a text-to-video model and "
                f"this one has {self.config.in_channels}: {_listed(self.skipped)}"
            )
        return text

    def _alphas(self) -> str:
        """What pairs are scaled by, and where that is from."""
        scales: dict[tuple[bool, str], list[float]] = {}
        for delta in self.deltas:
            if isinstance(delta.value, LowRank):
                group = delta.value.alpha is not None, delta.value.origin
                scales.setdefault(group, []).append(delta.value.scale)
        parts = []
        for (is_given, origin), found in sorted(scales.items(), reverse=True):
            limits = " to ".join(dict.fromkeys(f"{limit:.4g}" for limit in (min(found), max(found))))
            known, unknown = (
                f"; alpha/rank {limits} from {origin}",
                f"; pairs without alpha, not scaled: {len(found)}{origin}",
            )
            parts.append(known if is_given else unknown)
        return "".join(parts)


def _listed(keys: Sequence[str], limit: int = 5) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A parameter, or one layer of it, as a torch model holds it."""

    path: str
    layer: int | None
    shape: tuple[int, ...]  # torch's
    transform: Transform

    @property
    def module(self) -> tuple[str, int | None]:
        return self.path.rpartition("/")[0], self.layer


def _slots(config: DiTConfig, abstract_params: Any) -> dict[tuple[str, str], _Slot]:
    """Every parameter by all names of its module and its own name there; kohya names have no dots to parse."""
    slots = {}
    for layout in get_args(Layout):
        rules = dit_rules(config, layout)
        shapes = torch_shapes(rules, abstract_params)
        for rule in rules:
            if not rule.flax_paths:
                continue
            for layer in range(config.num_layers) if rule.is_stacked else (None,):
                name = rule.torch_name(layer or 0)
                slot = _Slot(rule.flax_paths[0], layer, shapes[name], rule.transform)
                module, leaf = _split_name(name)
                # A modulation is also met as a module of its own.
                for spelling, part in ((module, leaf), (name, "weight"))[: 2 if leaf == "modulation" else 1]:
                    slots[spelling, part] = slots[spelling.replace(".", "_"), part] = slot
    return slots


def _split_name(name: str) -> tuple[str, str]:
    """A module, and which of its parameters the torch name means: weight, bias or modulation."""
    module, _, leaf = name.rpartition(".")
    return module, leaf if leaf in ("weight", "bias") else "modulation"


def lora_file(path: str | pathlib.Path) -> pathlib.Path:
    """The file of a LoRA, which may be given as the folder that PEFT or diffusers wrote it to.

    Raises:
        FileNotFoundError: there is nothing, or no adapter in the folder.
        ValueError: a path such as `gs://…`, or a folder with several files to choose from.
    """
    check_local("LoRA", path)
    path = pathlib.Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; expected a LoRA file there.")
        return path
    found = [path / name for name in FOLDER_FILES if (path / name).is_file()] or sorted(path.glob("[!.]*.safetensors"))
    if not found:
        raise FileNotFoundError(f"{path} is a folder without a LoRA; expected {' or '.join(FOLDER_FILES)} in it.")
    if len(found) > 1 and found[0].name not in FOLDER_FILES:
        raise ValueError(f"{path} is a folder of several files, {_listed([file.name for file in found])}; give one.")
    return found[0]


def read_lora(path: str | pathlib.Path, config: DiTConfig, abstract_params: Any) -> Lora:
    """Reads a file, or the adapter in a folder, against the shapes of a transformer's parameters.

    Keys without a place in the model are reported, not refused: a file may hold a text encoder too, or branches that a
    text-to-video model lacks. So are the patch weights of a text-to-video file on an image-to-video model.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a file of torch, and no torch that reads it safely.
        ValueError: the file is damaged, of another method than LoRA, or for another model: no key matches, a shape differs,
            half of a pair is missing, or a value is not finite. The message names the key.
    """
    path = lora_file(path)
    metadata: Mapping[str, str] = {}
    if path.suffix in TORCH_SUFFIXES:
        tensors = _read_torch(path)
    else:
        tensors, metadata = read_safetensors(path), safetensors_metadata(path)
    try:
        plain, _ = without_wrappers(tensors)
        tensors = {plain[key]: tensor for key, tensor in tensors.items()}
        find_alpha = _find_alpha(path, metadata)
        deltas, unmatched, skipped = _find_deltas(tensors, find_alpha, config, abstract_params)
    except ValueError as error:
        raise ValueError(f"LoRA {path}: {error}") from None
    matched = len(tensors) - len(unmatched) - len(skipped)
    return Lora(path.name, config, tuple(deltas), matched, tuple(unmatched), tuple(skipped))


def _read_torch(path: pathlib.Path) -> dict[str, StoredTensor]:
    """The dictionary of a torch file that holds a LoRA; the others hold what a trainer needs to go on."""
    levels = read_pth_levels(path, numbers=True)
    check_pth(path)
    found = [
        level
        for level, keys in sorted(levels.items())
        if any(pattern.fullmatch(key) for key in keys for pattern, _, _ in ROLES)
    ]
    if len(levels) == 1 or not found:
        return next(iter(levels.values()))
    if len(found) > 1:
        raise ValueError(f"LoRA {path} holds several, under {_listed(found)}; save the one that is meant by itself.")
    return levels[found[0]]


def _find_deltas(
    tensors: Mapping[str, StoredTensor], find_alpha: FindAlpha, config: DiTConfig, abstract_params: Any
) -> tuple[list[Delta], list[str], list[str]]:
    """What a file adds; keys without a place in the model; keys for the patches of a text-to-video model."""
    for key in tensors:
        for part, method in UNSUPPORTED.items():
            if part in key:
                raise ValueError(f"{key!r} belongs to {method}, which is not supported. {SUPPORTED}")
    slots = _slots(config, abstract_params)
    modules: dict[tuple[str, int | None], dict[str, tuple[_Slot, str, StoredTensor]]] = {}
    unmatched, skipped = [], []
    for key, tensor in tensors.items():
        found = _find_slot(key, slots)
        if found is None:
            _check_ending(key, slots)
            unmatched.append(key)
            continue
        slot, role = found
        roles = modules.setdefault(slot.module, {})
        if role in roles:
            raise ValueError(f"{key!r} and {roles[role][1]!r} are both the {role} of {slot.path}, layer {slot.layer}.")
        roles[role] = (slot, key, tensor)

    deltas: list[Delta] = []
    for roles in modules.values():
        skipped += _take_text_to_video_patches(roles, config)
        if "alpha" in roles and not {"down", "up"} & set(roles):
            unmatched.append(roles.pop("alpha")[1])  # of nothing
        deltas += _deltas(roles, find_alpha)
    if not deltas:
        raise ValueError(
            f"none of its {len(tensors)} keys fits a part of this transformer: {_listed(unmatched + skipped)}."
        )
    return deltas, unmatched, skipped


def _find_slot(key: str, slots: Mapping[tuple[str, str], _Slot]) -> tuple[_Slot, str] | None:
    for pattern, role, leaf in ROLES:
        if found := pattern.fullmatch(key):
            slot = slots.get((_without_prefix(found[1]), leaf))
            return None if slot is None else (slot, role)
    return None


def _check_ending(key: str, slots: Mapping[tuple[str, str], _Slot]) -> None:
    """Refuses what is said of a module of the model in another way than is known here; without it the rest means less."""
    if any(pattern.fullmatch(key) for pattern, _, _ in ROLES):
        return
    for end in [found.start() for found in re.finditer(r"\.|$", key)]:
        name = _without_prefix(key[:end])
        if (name, "weight") in slots or (name, "bias") in slots:
            if key[end + 1 :] in ("weight", "bias", ""):
                raise ValueError(
                    f"{key!r} is a whole parameter, not what is added to one: the file is of a model, or PEFT trained this "
                    "one in full (bias, modules_to_save), which is not supported."
                )
            raise ValueError(f"{key!r} ends in {key[end:]!r}, which is not supported. {SUPPORTED}")


def _without_prefix(name: str) -> str:
    while found := next(filter(name.startswith, PREFIXES), ""):
        name = name.removeprefix(found)
    return name


def _take_text_to_video_patches(roles: dict[str, tuple[_Slot, str, StoredTensor]], config: DiTConfig) -> list[str]:
    """Takes out of `roles` what is for patches of `out_channels` noisy latent channels and nothing else; its keys."""
    text_to_video = config.out_channels, *config.patch_size
    for role, others in (("down", ("up", "up_bias", "alpha")), ("diff", ())):
        if role in roles and config.in_channels != config.out_channels:
            slot, _, tensor = roles[role]
            if slot.path == PATCH_KERNEL and tensor.shape[1:] == text_to_video:
                return [roles.pop(name)[1] for name in (role, *others) if name in roles]
    return []


def _deltas(roles: Mapping[str, tuple[_Slot, str, StoredTensor]], find_alpha: FindAlpha) -> list[Delta]:
    """What the tensors of one module add to its parameters."""
    deltas = []
    scale = 1.0
    if "down" in roles and "up" in roles:
        (slot, key, down), (_, up_key, up) = roles["down"], roles["up"]
        rank = down.shape[0] if down.shape else 0
        if rank == 0 or len(slot.shape) < 2 or len(down.shape) != len(slot.shape):
            raise ValueError(f"{key!r} has shape {down.shape}, expected {('rank', *slot.shape[1:])}.")
        arrays = (
            _read(key, down, (rank, *slot.shape[1:])),
            _read(up_key, up, (slot.shape[0], rank, *(1 for _ in slot.shape[2:]))),
        )
        number, origin = find_alpha(key, rank)
        alpha = None if number is None else _scalar(number, arrays[0].dtype)
        if "alpha" in roles:
            _, alpha_key, tensor = roles["alpha"]
            alpha, origin = _read(alpha_key, tensor, (1,) if len(tensor.shape) else ()), "its keys"
        pair = LowRank(*arrays, alpha, origin)
        deltas.append(Delta(slot.path, slot.layer, pair))
        scale = pair.scale
    elif half := {"down", "up", "up_bias"} & set(roles):
        key = roles[min(half)][1]
        raise ValueError(f"{key!r} has no partner: a pair needs both lora_down and lora_up, or both lora_A and lora_B.")
    differences: dict[str, str] = {}
    for role, (slot, key, tensor) in roles.items():
        if role in ("diff", "diff_b", "diff_m", "up_bias"):
            if (other := differences.setdefault(slot.path, key)) != key:
                raise ValueError(f"{other!r} and {key!r} both add to {slot.path}, layer {slot.layer}.")
            array = slot.transform.forward(_read(key, tensor, slot.shape))
            difference = Difference(np.ascontiguousarray(array), scale if role == "up_bias" else 1.0)
            deltas.append(Delta(slot.path, slot.layer, difference))
    return deltas


def _read(key: str, tensor: StoredTensor, shape: tuple[int, ...]) -> np.ndarray:
    if tensor.shape != shape:
        raise ValueError(f"{key!r} has shape {tensor.shape}, expected {shape}.")
    if tensor.dtype.kind in "iub" and math.prod(shape) > 1:  # alpha may be one
        raise ValueError(f"{key!r} has dtype {tensor.dtype}, expected floating-point numbers.")
    array = tensor.read()
    if not np.isfinite(array).all():
        raise ValueError(f"{key!r} has values that are NaN or infinite.")
    return array


def _scalar(number: float, dtype: np.dtype) -> np.ndarray:
    """The number in the dtype of the weights, where files usually have it, if that holds it exactly."""
    array = np.asarray(number, dtype)
    return array if float(array) == number else np.asarray(number, np.float32)


def _find_alpha(path: pathlib.Path, metadata: Mapping[str, str]) -> FindAlpha:
    """Looks alpha up outside the tensors: in the header, and beside a file of PEFT."""
    configs = {}
    if ADAPTER_METADATA in metadata:
        configs[f"{ADAPTER_METADATA} in its header"] = metadata[ADAPTER_METADATA]
    beside = path.with_name(ADAPTER_CONFIG)
    if path.stem == PEFT_STEM and beside.is_file():
        configs[ADAPTER_CONFIG] = read_text(beside)
    alphas = {place: _adapter_alpha(place, text) for place, text in configs.items()}
    # Trainers also leave the alpha of their command line there, and converters keep it when they multiply alpha into the
    # weights. Alphas are keys in such files; nobody takes the header for one.
    hint = f" ({KOHYA_ALPHA} {metadata[KOHYA_ALPHA]} in its header is not used)" if KOHYA_ALPHA in metadata else ""

    def find(key: str, rank: int) -> tuple[float | None, str]:
        found = ((alpha(key, rank), place) for place, alpha in alphas.items())
        return next(((number, place) for number, place in found if number is not None), (None, hint))

    return find


def _adapter_alpha(place: str, text: str) -> Callable[[str, int], float | None]:
    """The alpha of a key and its rank, as a config of PEFT gives it; None if it gives none.

    Raises:
        ValueError: the config is damaged, or says that adapters are more than alpha / rank · up @ down.
    """
    try:
        config = {name.removeprefix("transformer."): value for name, value in json.loads(text).items()}
        default = None if config.get("lora_alpha") is None else float(config["lora_alpha"])
        # PEFT takes them for regular expressions. A stranger's expression may take for ever; modules are named in full.
        alphas, ranks = (
            {
                name.removeprefix("^").replace("\\.", "."): float(value)
                for name, value in (config.get(field) or {}).items()
            }
            for field in ("alpha_pattern", "rank_pattern")
        )
        stated = None if config.get("r") is None else float(config["r"])
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{place} is damaged: {error}.") from None
    for name, number in {"lora_alpha": default or 0.0, **ranks, **alphas}.items():
        if not re.fullmatch(r"[\w.]+", name) or not math.isfinite(number):
            raise ValueError(f"{place} has alpha or rank {number} for {name!r}; expected names and numbers.")
    if (method := config.get("peft_type", "LORA")) != "LORA":
        raise ValueError(f"{place} says peft_type {method!r}, which is not supported. {SUPPORTED}")
    for field, method in OTHER_METHODS.items():
        if config.get(field):
            raise ValueError(f"{place} says {field}={config[field]!r}: {method}, which is not supported. {SUPPORTED}")
    if (begun := config.get("init_lora_weights")) not in INITIALISATIONS:
        raise ValueError(
            f"{place} says init_lora_weights={begun!r}: the adapter is for changed weights of the model, not for the weights "
            "themselves. PEFT converts it: save_pretrained(…, path_initial_model_for_weight_conversion=…)."
        )
    rank_stabilised = bool(config.get("use_rslora"))

    def check_rank(key: str, rank: int) -> None:
        module = "." + _without_prefix(key.partition(".lora_")[0])
        expected = next((number for name, number in ranks.items() if module.endswith("." + name)), stated)
        if expected is not None and expected != rank:
            raise ValueError(f"{key!r} has rank {rank}, but {place} says {expected:g}.")

    def alpha(key: str, rank: int) -> float | None:
        check_rank(key, rank)
        module = "." + _without_prefix(key.partition(".lora_")[0])
        number = next((number for name, number in alphas.items() if module.endswith("." + name)), default)
        return number if number is None or not rank_stabilised else number * math.sqrt(rank)

    return alpha


def apply_loras(params: Any, loras: Iterable[tuple[Lora, float]], *, donate: bool = False) -> Any:
    """The transformer's parameters with LoRAs merged in, each (LoRA, strength), in their dtypes and shardings.

    All that is added to one weight is summed in float32 and the sum is rounded once. Parameters that nothing is added to are
    the same objects. Work goes layer by layer, so that no stacked parameter exists in float32 as a whole.

    Args:
        params: The tree that `read_lora` got the shapes of.
        loras: Strength 0 leaves every bit as it is.
        donate: Reuse the memory of the changed parameters, which cannot be read any more then. Without it there are two
            copies of each.

    Raises:
        ValueError: a strength is not finite, or a LoRA was read for another model.
    """
    flat = flatten(params)
    terms: dict[str, dict[int | None, list[_Term]]] = {}
    for lora, strength in loras:
        if not math.isfinite(strength):
            raise ValueError(f"The strength of LoRA {lora.file} is {strength}; it must be a finite number.")
        rules = _rules(lora.config, "wan")
        for delta in lora.deltas:
            term = _term(delta.value, strength, rules[delta.path].transform)
            expected = flat[delta.path].shape[delta.layer is not None :] if delta.path in flat else None
            if term.shape != expected:
                raise ValueError(
                    f"LoRA {lora.file} adds to {delta.path!r} with shape {term.shape}, the parameter has {expected}."
                )
            if term.scale != 0:  # Adding 0 would turn -0 into 0.
                terms.setdefault(delta.path, {}).setdefault(delta.layer, []).append(term)
    for path, layers in terms.items():
        flat[path] = _add(flat[path], layers, donate)
    return traverse_util.unflatten_dict(flat, sep="/")


def _rules(config: DiTConfig, layout: Layout) -> dict[str, Rule]:
    return {rule.flax_paths[0]: rule for rule in dit_rules(config, layout) if rule.flax_paths}


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class _Term:
    """scale · up @ down of a linear layer, or scale · array; our axis order, float32 only when asked for."""

    scale: float
    pair: LowRank | None = None
    array: Shaped[np.ndarray, "..."] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.pair is not None:
            return self.pair.down.shape[1], self.pair.up.shape[0]
        return () if self.array is None else self.array.shape


def _term(value: LowRank | Difference, strength: float, transform: Transform) -> _Term:
    scale = strength * value.scale
    if isinstance(value, Difference):
        return _Term(scale, array=value.array)
    if transform is LINEAR:
        return _Term(scale, pair=value)
    # The patch embedding, whose torch weight has more axes. It is small.
    down, up = (tensor.astype(np.float32).reshape(len(tensor), -1) for tensor in (value.down, value.up))
    product = (up @ down).reshape(len(up), *value.down.shape[1:])
    return _Term(scale, array=np.asarray(transform.forward(product)))


def _add(leaf: Any, layers: Mapping[int | None, Sequence[_Term]], donate: bool) -> jax.Array:
    leaf = leaf if donate and isinstance(leaf, jax.Array) else jnp.array(leaf)  # the compiled functions consume it
    reinterpret, add = _compiled(leaf.sharding if len(leaf.sharding.device_set) > 1 else None)
    ranks = {layer: sum(term.pair.rank for term in terms if term.pair is not None) for layer, terms in layers.items()}
    # Layers are cut out and put back as integers: of bfloat16, XLA on CPU would take the whole leaf to float32 and back.
    bits = reinterpret(leaf, np.dtype(f"uint{8 * leaf.dtype.itemsize}"))
    for layer, terms in layers.items():
        left = right = full = None
        if ranks[layer]:
            pairs = [(np.float32(term.scale), term.pair) for term in terms if term.pair is not None]
            left = np.concatenate([scale * pair.down.T.astype(np.float32) for scale, pair in pairs], axis=1)
            right = np.concatenate([pair.up.T.astype(np.float32) for _, pair in pairs])
            padding = max(ranks.values()) - ranks[layer]  # with zeros: one compilation for all layers
            left, right = np.pad(left, ((0, 0), (0, padding))), np.pad(right, ((0, padding), (0, 0)))
        arrays = [np.float32(term.scale) * term.array.astype(np.float32) for term in terms if term.array is not None]
        if arrays:
            full = functools.reduce(np.add, arrays)
        bits = add(bits, leaf.dtype, None if layer is None else np.int32(layer), left, right, full)
    return reinterpret(bits, leaf.dtype)


@functools.cache
def _compiled(sharding: jax.sharding.Sharding | None) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """Two functions that work in the memory of their first argument: one reads it as of another dtype, one adds to it."""

    def add(
        bits: UInt[Array, "*layers_and_axes"],
        dtype: np.dtype,  # of the parameter
        layer: Array | None,
        left: Float[Array, "in rank"] | None,
        right: Float[Array, "rank out"] | None,
        full: Float[Array, "*axes"] | None,
    ) -> UInt[Array, "*layers_and_axes"]:
        part = bits if layer is None else jax.lax.dynamic_index_in_dim(bits, layer, keepdims=False)
        total = jax.lax.bitcast_convert_type(part, dtype).astype(jnp.float32)
        delta = jnp.zeros_like(total) if full is None else full
        if left is not None and right is not None:
            delta += jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
        part = jax.lax.bitcast_convert_type((total + delta).astype(dtype), bits.dtype)
        return part if layer is None else jax.lax.dynamic_update_index_in_dim(bits, part, layer, 0)

    compiled = functools.partial(jax.jit, static_argnums=1, donate_argnums=0, out_shardings=sharding)
    return compiled(jax.lax.bitcast_convert_type), compiled(add)


@dataclasses.dataclass(frozen=True)
class _Spelling:
    layout: Layout
    prefix: str
    dot: str  # between the parts of a module's name
    down: str
    up: str


SPELLINGS: Mapping[Family, _Spelling] = {
    "kohya": _Spelling("wan", "lora_unet_", "_", "lora_down", "lora_up"),
    "peft": _Spelling("hf", "transformer.", ".", "lora_A", "lora_B"),
    "original": _Spelling("wan", "diffusion_model.", ".", "lora_down", "lora_up"),
}


def write_lora(path: str | pathlib.Path, lora: Lora, family: Family) -> None:
    """Writes a LoRA in one of the families of names; tensors keep their bits. Keys that did not match are not written.

    "peft" is what diffusers loads: low-rank pairs and their biases and nothing else, with alpha in the header. "kohya" files
    have an alpha for every pair. What "peft" cannot hold, "original" can, and diffusers reads that too.

    Raises:
        ValueError: the family is unknown, or "peft" and the LoRA has differences that are not the bias of a pair.
    """
    if family not in SPELLINGS:
        raise ValueError(f"family={family!r} is unknown; choose from {', '.join(get_args(Family))}.")
    spelling = SPELLINGS[family]
    rules = _rules(lora.config, spelling.layout)
    pairs = {(delta.path, delta.layer): delta.value for delta in lora.deltas if isinstance(delta.value, LowRank)}
    tensors: dict[str, np.ndarray] = {}
    written: dict[str, LowRank] = {}
    for delta in lora.deltas:
        rule = rules[delta.path]
        module, leaf = _split_name(rule.torch_name(delta.layer or 0))
        name = spelling.prefix + module.replace(".", spelling.dot)
        value = delta.value
        if isinstance(value, LowRank):
            written[module] = value
            tensors |= {f"{name}.{spelling.down}.weight": value.down, f"{name}.{spelling.up}.weight": value.up}
            if family == "kohya" or (family == "original" and value.alpha is not None):
                # musubi-tuner writes it always, and diffusers insists on it.
                alpha = _scalar(value.rank, value.down.dtype) if value.alpha is None else value.alpha
                tensors[f"{name}.alpha"] = alpha
            continue
        array, scale, ending = rule.transform.inverse(value.array), value.scale, DIFF_ENDINGS[leaf]
        if family == "peft":
            pair = pairs.get((delta.path.removesuffix("bias") + "kernel", delta.layer)) if leaf == "bias" else None
            if pair is None or pair.scale == 0:
                raise ValueError(
                    f"family='peft' holds low-rank pairs and their biases only, but LoRA {lora.file} has a difference for "
                    f"{delta.path!r}, layer {delta.layer}; family='original' can hold it."
                )
            scale, ending = scale / pair.scale, f"{spelling.up}.bias"
        tensors[f"{name}.{ending}"] = array if scale == 1 else array.astype(np.float32) * np.float32(scale)
    metadata = None
    if family == "peft" and any(pair.alpha is not None for pair in written.values()):
        metadata = {ADAPTER_METADATA: _adapter_metadata(written, tensors)}
    specs = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    write_safetensors(pathlib.Path(path), specs, tensors.__getitem__, metadata)


def _adapter_metadata(pairs: Mapping[str, LowRank], keys: Iterable[str]) -> str:
    """Ranks and alphas by module as diffusers hands them to PEFT: the most frequent, and what differs from it."""
    ranks = {module: pair.rank for module, pair in pairs.items()}
    alphas = {module: pair.effective_alpha for module, pair in pairs.items()}
    values: dict[str, Any] = {"target_modules": list(pairs), "lora_bias": any(key.endswith(".bias") for key in keys)}
    for name, pattern, numbers in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
        values[name] = collections.Counter(numbers.values()).most_common(1)[0][0]
        values[pattern] = {module: number for module, number in numbers.items() if number != values[name]}
    return json.dumps({f"transformer.{name}": value for name, value in values.items()}, sort_keys=True)


def trained_lora(tree: Any, lora: LoraConfig, config: DiTConfig) -> Lora:
    """The adapters of `init_lora` after training, in their dtype, as `write_lora` and `apply_loras` take them."""
    rules = _rules(config, "wan")
    arrays = {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}
    alpha = None if lora.alpha is None else np.asarray(lora.alpha, np.float32)
    deltas = []
    for module in (path.removesuffix("/a") for path in arrays if path.endswith("/a")):
        kernel, a, b = f"{module}/kernel", arrays[f"{module}/a"], arrays[f"{module}/b"]
        layers: Sequence[Any] = range(len(a)) if rules[kernel].is_stacked else (None,)
        for layer in layers:
            down, up = (np.ascontiguousarray((x if layer is None else x[layer]).T) for x in (a, b))
            deltas.append(Delta(kernel, layer, LowRank(down, up, alpha)))
    return Lora("trained", config, tuple(deltas), matched=2 * len(deltas))


def split_strength(text: str) -> tuple[pathlib.Path, float]:
    """The file and the strength of FILE[:STRENGTH], which is 1 if not given; the file may have colons of its own.

    FILE may be a folder that holds an adapter; the file in it is returned.

    Raises:
        ValueError: there is no such file, or the strength is no finite number.
        FileNotFoundError: a folder without an adapter.
    """
    check_local("LoRA", text)
    path, (name, colon, number) = pathlib.Path(text), text.rpartition(":")
    if text and path.exists():
        return lora_file(path), 1.0
    if not colon or not name or not pathlib.Path(name).exists():
        raise ValueError(f"there is no LoRA file {text!r}.")
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise ValueError(f"{number!r} after {name}: must be a finite number, such as 0.8.")
    return lora_file(name), strength
