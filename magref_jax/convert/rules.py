"""The one mechanism behind every weight conversion: a table of rules read in both directions.

A rule pairs one torch name with the parameter it fills. `{layer}` in the torch name stands for a layer number, which
selects the slot of the parameter's leading (stacked) axis; `*` stands for anything and is only for names to drop.
torch shapes and axis orders exist in this folder alone.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

LAYER = "{layer}"


@dataclasses.dataclass(frozen=True)
class Transform:
    """An axis change and its exact inverse; several arrays when one torch tensor fills several parameters."""

    forward: Callable[[np.ndarray], np.ndarray | tuple[np.ndarray, ...]]
    inverse: Callable[..., np.ndarray]


IDENTITY = Transform(lambda tensor: tensor, lambda array: array)
LINEAR = Transform(np.transpose, np.transpose)  # [out, in] <-> [in, out]
# [out, in, h, w] <-> [h, w, in, out]
CONV2D = Transform(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))
# [out, in, f, h, w] <-> [f, h, w, in, out]
CONV3D = Transform(lambda w: w.transpose(2, 3, 4, 1, 0), lambda w: w.transpose(4, 3, 0, 1, 2))


def reshape(torch_shape: Sequence[int], flax_shape: Sequence[int]) -> Transform:
    """Same values in the same order under another shape, such as [C, 1, 1] for a vector."""
    return Transform(lambda tensor: tensor.reshape(flax_shape), lambda array: array.reshape(torch_shape))


def split(count: int, each: Transform) -> Transform:
    """Cuts torch axis 0 into `count` equal parts, such as a fused query/key/value."""

    def forward(tensor: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.asarray(each.forward(part)) for part in np.split(tensor, count))

    return Transform(
        forward,
        lambda *arrays: np.concatenate([each.inverse(array) for array in arrays]),
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """One torch name (or one per layer) and the slash-separated parameter path, or paths, that it fills."""

    torch_pattern: str
    flax_path: str | tuple[str, ...]
    transform: Transform = IDENTITY

    @property
    def flax_paths(self) -> tuple[str, ...]:
        return (self.flax_path,) if isinstance(self.flax_path, str) else self.flax_path

    @property
    def is_stacked(self) -> bool:
        return LAYER in self.torch_pattern

    def matcher(self) -> re.Pattern[str]:
        pattern = re.escape(self.torch_pattern).replace(re.escape(LAYER), r"(?P<layer>\d+)").replace(r"\*", ".*")
        return re.compile(pattern)

    def torch_name(self, layer: int) -> str:
        return self.torch_pattern.replace(LAYER, str(layer))


def dense(torch: str, flax: str, bias: bool = True) -> tuple[Rule, ...]:
    """Rules of a linear layer."""
    kernel = Rule(f"{torch}.weight", f"{flax}/kernel", LINEAR)
    return (kernel, Rule(f"{torch}.bias", f"{flax}/bias")) if bias else (kernel,)


def norm(torch: str, flax: str, bias: bool = False) -> tuple[Rule, ...]:
    """Rules of a normalisation with a weight."""
    scale = Rule(f"{torch}.weight", f"{flax}/scale")
    return (scale, Rule(f"{torch}.bias", f"{flax}/bias")) if bias else (scale,)


def drop(torch_pattern: str) -> Rule:
    """Names that a checkpoint may hold and our model has no use for, whatever other rule they match."""
    return Rule(torch_pattern, ())


def convert(rules: Sequence[Rule], tensors: Mapping[str, np.ndarray], abstract_params: Any) -> dict[str, Any]:
    """Fills a parameter tree of the shapes and dtypes of `abstract_params` from tensors under torch names.

    `tensors` is read one name at a time, so it may load lazily.

    Raises:
        ValueError: a name matches no rule or several, fills a slot twice, names a layer the model lacks or has the
            wrong shape; or a parameter, or one layer of it, is left without a tensor.
    """
    abstract = _flatten(abstract_params)
    _check_paths(rules, abstract)
    matchers = [(rule, rule.matcher()) for rule in rules]
    params = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in abstract.items()}
    filled: dict[tuple[str, int], str] = {}

    for name in tensors:
        matches = [(rule, match) for rule, matcher in matchers if (match := matcher.fullmatch(name))]
        # A layer that the model leaves out also matches the rules of all layers. Dropping too much leaves a parameter empty.
        if any(not rule.flax_paths for rule, _ in matches):
            continue
        if len(matches) != 1:
            found = ", ".join(repr(rule.torch_pattern) for rule, _ in matches)
            raise ValueError(
                f"{name!r} with shape {tuple(tensors[name].shape)} matches {len(matches)} conversion rules"
                f"{f' ({found})' if found else ''}, expected exactly 1."
            )
        rule, match = matches[0]
        layer = int(match["layer"]) if rule.is_stacked else 0
        num_layers = _num_layers(rule, abstract)
        if layer >= num_layers:
            raise ValueError(
                f"{name!r} with shape {tuple(tensors[name].shape)} is layer {layer}, but {rule.flax_paths[0]!r} with shape "
                f"{tuple(abstract[rule.flax_paths[0]].shape)} has layers 0 to {num_layers - 1}."
            )
        if (earlier := filled.setdefault((rule.flax_paths[0], layer), name)) != name:
            raise ValueError(f"{name!r} and {earlier!r} both fill {rule.flax_paths[0]!r}, layer {layer}.")
        tensor = tensors[name]
        expected = _torch_shape(rule, abstract)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name!r} has shape {tuple(tensor.shape)}, expected {expected} to fill {' + '.join(rule.flax_paths)}."
            )
        arrays = rule.transform.forward(tensor)
        for path, array in zip(rule.flax_paths, arrays if isinstance(arrays, tuple) else (arrays,), strict=True):
            params[path][layer if rule.is_stacked else ...] = array.astype(params[path].dtype)

    for rule, layer, name in _wanted(rules, abstract):
        if (rule.flax_paths[0], layer) not in filled:
            raise ValueError(
                f"{name!r} is missing: expected shape {_torch_shape(rule, abstract)} to fill {' + '.join(rule.flax_paths)}, "
                "found none."
            )
    return traverse_util.unflatten_dict(params, sep="/")


def to_torch(rules: Sequence[Rule], params: Any) -> dict[str, np.ndarray]:
    """The tensors under torch names that `convert` would turn into `params`; dropped names stay absent.

    Raises:
        ValueError: the rules and the parameters do not cover each other.
    """
    flat = {path: np.asarray(leaf) for path, leaf in _flatten(params).items()}
    _check_paths(rules, flat)
    return {
        name: np.ascontiguousarray(
            rule.transform.inverse(*(flat[path][layer] if rule.is_stacked else flat[path] for path in rule.flax_paths))
        )
        for rule, layer, name in _wanted(rules, flat)
    }


def torch_shapes(rules: Sequence[Rule], abstract_params: Any) -> dict[str, tuple[int, ...]]:
    """Every torch name that `convert` needs for these parameters, with its shape.

    Raises:
        ValueError: the rules and the parameters do not cover each other.
    """
    abstract = _flatten(abstract_params)
    _check_paths(rules, abstract)
    return {name: _torch_shape(rule, abstract) for rule, _, name in _wanted(rules, abstract)}


def _flatten(params: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep="/")


def _check_paths(rules: Sequence[Rule], flat: Mapping[str, Any]) -> None:
    paths = [path for rule in rules for path in rule.flax_paths]
    if unknown := sorted(set(paths) - set(flat)):
        raise ValueError(f"No parameter is named {unknown[0]!r}, which a conversion rule fills.")
    if uncovered := sorted(set(flat) - set(paths)):
        raise ValueError(f"No conversion rule fills {uncovered[0]!r} with shape {tuple(flat[uncovered[0]].shape)}.")


def _num_layers(rule: Rule, flat: Mapping[str, Any]) -> int:
    return flat[rule.flax_paths[0]].shape[0] if rule.is_stacked else 1


def _wanted(rules: Sequence[Rule], flat: Mapping[str, Any]) -> Iterator[tuple[Rule, int, str]]:
    for rule in rules:
        if rule.flax_paths:
            for layer in range(_num_layers(rule, flat)):
                yield rule, layer, rule.torch_name(layer)


def _torch_shape(rule: Rule, flat: Mapping[str, Any]) -> tuple[int, ...]:
    shapes = [flat[path].shape[1:] if rule.is_stacked else flat[path].shape for path in rule.flax_paths]
    # One repeated byte under the whole shape: the inverse transform tells the torch shape without a real array.
    return tuple(rule.transform.inverse(*(np.broadcast_to(np.int8(0), shape) for shape in shapes)).shape)
