"""The optimiser, and which parameters it trains."""

import re
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import optax
import optax.contrib

from magref_jax.checkpoint import Params
from magref_jax.training.config import OptimizerConfig

DECAYED = ("kernel", "a", "b")  # matrices of layers, and the two of a LoRA
MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)  # in front of them the layers
UPDATE_RMS = 0.2  # root mean square of an update of AdamW, arXiv:2502.16982


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate by step."""
    peak, low = config.learning_rate, config.learning_rate * config.final_fraction
    parts = [optax.linear_schedule(0.0, peak, config.warmup_steps)] if config.warmup_steps else []
    ends = [config.warmup_steps] * len(parts)
    for steps in config.cycle_steps:
        parts.append(optax.cosine_decay_schedule(peak, steps, config.final_fraction))
        ends.append((ends[-1] if ends else 0) + steps)
    parts.append(optax.constant_schedule(low if config.cycle_steps else peak))
    return optax.join_schedules(parts, ends)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    schedule = make_schedule(config)
    adamw = optax.adamw(
        schedule,
        config.b1,
        config.b2,
        config.eps,
        weight_decay=config.weight_decay,
        mask=_by_path(lambda path: path[-1] in DECAYED),
    )
    if config.method == "adamw":
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    muon = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: MATRIX, tree)),
        optax.stateless(lambda updates, _: jax.tree.map(lambda x: UPDATE_RMS * max(x.shape[-2:]) ** 0.5 * x, updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    labels = _by_path(lambda path: "muon" if path[0] == "blocks" and path[-1] in DECAYED else "adamw")
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm), optax.partition({"muon": muon, "adamw": adamw}, labels)
    )


def _by_path(rule: Callable[[tuple[str, ...]], Any]) -> Callable[[Params], Any]:
    """A function of parameters that gives what the rule says of each one's path."""
    return lambda params: jax.tree.map_with_path(lambda path, _: rule(tuple(key.key for key in path)), params)


def split_params(params: Params, pattern: str) -> tuple[Params, Params]:
    """The parameters whose whole slash-separated name matches, and the rest.

    Raises:
        ValueError: none matches; the names are listed by their first parts.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    chosen = {name: leaf for name, leaf in flat.items() if re.fullmatch(pattern, name)}
    if not chosen:
        known = sorted({"/".join(name.split("/")[:2]) for name in flat})
        raise ValueError(f"trainable={pattern!r} matches no parameter; their names begin with {', '.join(known)}.")
    rest = {name: leaf for name, leaf in flat.items() if name not in chosen}
    return flax.traverse_util.unflatten_dict(chosen, sep="/"), flax.traverse_util.unflatten_dict(rest, sep="/")


def join_params(one: Params, other: Params) -> Params:
    """The inverse of `split_params`."""
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(one, sep="/")
    return flax.traverse_util.unflatten_dict(flat | flax.traverse_util.flatten_dict(other, sep="/"), sep="/")
