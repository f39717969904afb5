"""The one mechanism behind every weight conversion: a table of rules read in both directions.

A rule pairs one torch name with the parameter it fills. `{layer}` in the torch name stands for a layer number, which
selects the slot of the parameter's leading (stacked) axis; `*` stands for anything and is only for names to drop.
torch shapes and axis orders exist in this folder alone.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from flax import traverse_util

LAYER = "{layer}"
MAX_PROBLEMS = 8  # in one message


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


layer_norm = functools.partial(norm, bias=True)


# Tables: one row per module, one column per layout

Layout = Literal["wan", "hf"]  # the original names; those of diffusers (transformer, VAE) and transformers (encoders)
_COLUMNS = {"wan": 0, "hf": 1}

# Rules of a module, given its torch name and ours.
MakeRules = Callable[[str, str], tuple[Rule, ...]]
# ... then our name, and the torch name in each layout; None: it has no such module.
Row = tuple[MakeRules, str, str | None, str | None]


def rules_in(layout: Layout, rows: Iterable[Row]) -> tuple[Rule, ...]:
    """What a table says of one layout."""
    if layout not in _COLUMNS:
        raise ValueError(f"layout={layout!r} is unknown; choose one of {', '.join(map(repr, _COLUMNS))}.")
    return tuple(
        rule
        for make_rules, flax, *names in rows
        if (torch := names[_COLUMNS[layout]]) is not None
        for rule in make_rules(torch, flax)
    )


def within(flax: str, wan: str, hf: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows of a part of a network, each name behind that of the part."""
    return tuple(
        (make_rules, flax + name, None if in_wan is None else wan + in_wan, None if in_hf is None else hf + in_hf)
        for make_rules, name, in_wan, in_hf in rows
    )


def array(transform: Transform = IDENTITY) -> MakeRules:
    """For a single array, whose names are complete."""
    return lambda torch, flax: (Rule(torch, flax, transform),)


def unused(torch: str, _: str) -> tuple[Rule, ...]:
    """For what a checkpoint may hold and we have no parameter for."""
    return (drop(torch),)


# Both directions


@dataclasses.dataclass(frozen=True)
class Filling:
    """Which parameters, or which layer of them, a torch tensor fills."""

    name: str
    rule: Rule
    layer: int | None  # None: the whole parameter

    def arrays(self, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Parameter paths and what the tensor holds for them, in our axis order."""
        arrays = self.rule.transform.forward(tensor)
        yield from zip(self.rule.flax_paths, arrays if isinstance(arrays, tuple) else (arrays,), strict=True)


def match(rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]], abstract_params: Any) -> list[Filling]:
    """What each torch tensor of these names and shapes fills, in the order of the names; dropped names are left out.

    Raises:
        ValueError: a name matches no rule or several, fills a slot twice, names a layer the model lacks or has the
            wrong shape; or a parameter, or one layer of it, is left without a tensor. The message lists the first of them.
    """
    abstract = flatten(abstract_params)
    _check_paths(rules, abstract)
    matchers = [(rule, rule.matcher()) for rule in rules]
    expected = {rule: _torch_shape(rule, abstract) for rule in rules if rule.flax_paths}
    fillings: list[Filling] = []
    filled: dict[tuple[str, int], str] = {}
    problems: list[str] = []

    for name, shape in shapes.items():
        matches = [(rule, found) for rule, matcher in matchers if (found := matcher.fullmatch(name))]
        # A layer that the model leaves out also matches the rules of all layers. Dropping too much leaves a parameter empty.
        if any(not rule.flax_paths for rule, _ in matches):
            continue
        if len(matches) != 1:
            patterns = ", ".join(repr(rule.torch_pattern) for rule, _ in matches)
            problems.append(
                f"{name!r} with shape {tuple(shape)} matches {len(matches)} conversion rules"
                f"{f' ({patterns})' if patterns else ''}, expected exactly 1."
            )
            continue
        rule, found = matches[0]
        path, layer, num_layers = rule.flax_paths[0], int(found["layer"]) if rule.is_stacked else 0, 1
        if rule.is_stacked:
            num_layers = _num_layers(rule, abstract)
        earlier = filled.setdefault((path, layer), name)
        if layer >= num_layers:
            problems.append(
                f"{name!r} with shape {tuple(shape)} is layer {layer}, but {path!r} with shape "
                f"{tuple(abstract[path].shape)} has layers 0 to {num_layers - 1}."
            )
        elif earlier != name:
            problems.append(f"{name!r} and {earlier!r} both fill {path!r}, layer {layer}.")
        elif tuple(shape) != expected[rule]:
            problems.append(
                f"{name!r} has shape {tuple(shape)}, expected {expected[rule]} to fill {' + '.join(rule.flax_paths)}."
            )
        fillings.append(Filling(name, rule, layer if rule.is_stacked else None))

    for rule, layer, name in _wanted(rules, abstract):
        if (rule.flax_paths[0], layer) not in filled:
            problems.append(
                f"{name!r} is missing: expected shape {expected[rule]} to fill {' + '.join(rule.flax_paths)}, found none."
            )
    if problems:
        rest = [f"and {len(problems) - MAX_PROBLEMS} more."] if len(problems) > MAX_PROBLEMS else []
        raise ValueError("\n".join(problems[:MAX_PROBLEMS] + rest))
    return fillings


def convert(rules: Sequence[Rule], tensors: Mapping[str, np.ndarray], abstract_params: Any) -> dict[str, Any]:
    """Fills a parameter tree of the shapes and dtypes of `abstract_params` from tensors under torch names, in memory.

    Raises:
        ValueError: see `match`.
    """
    params = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in flatten(abstract_params).items()}
    for filling in match(rules, {name: tensor.shape for name, tensor in tensors.items()}, abstract_params):
        for path, array in filling.arrays(tensors[filling.name]):
            params[path][... if filling.layer is None else filling.layer] = array.astype(params[path].dtype)
    return traverse_util.unflatten_dict(params, sep="/")


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """Where the values of a torch tensor come from."""

    shape: tuple[int, ...]
    rule: Rule
    layer: int | None  # None: the whole parameter


def torch_sources(rules: Sequence[Rule], flat: Mapping[str, Any]) -> dict[str, TorchTensor]:
    """Every torch name that belongs to these parameters, given by slash-separated path; dropped names stay absent.

    Raises:
        ValueError: the rules and the parameters do not cover each other.
    """
    _check_paths(rules, flat)
    return {
        name: TorchTensor(_torch_shape(rule, flat), rule, layer if rule.is_stacked else None)
        for rule, layer, name in _wanted(rules, flat)
    }


def to_torch(rules: Sequence[Rule], params: Any) -> dict[str, np.ndarray]:
    """The tensors under torch names that `convert` would turn into `params`; dropped names stay absent.

    Raises:
        ValueError: the rules and the parameters do not cover each other.
    """
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    tensors = {}
    for name, source in torch_sources(rules, flat).items():
        arrays = (flat[path] if source.layer is None else flat[path][source.layer] for path in source.rule.flax_paths)
        tensors[name] = np.ascontiguousarray(source.rule.transform.inverse(*arrays))
    return tensors


def torch_shapes(rules: Sequence[Rule], abstract_params: Any) -> dict[str, tuple[int, ...]]:
    """Every torch name that `convert` needs for these parameters, with its shape.

    Raises:
        ValueError: the rules and the parameters do not cover each other.
    """
    return {name: source.shape for name, source in torch_sources(rules, flatten(abstract_params)).items()}


def flatten(params: Any) -> dict[str, Any]:
    """The leaves of a tree by slash-separated path."""
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
