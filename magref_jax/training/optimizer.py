"""The optimiser, and which parameters it trains."""

import re
from typing import Any

import flax.traverse_util
import jax
import optax

from magref_jax.checkpoint import Params
from magref_jax.training.config import OptimizerConfig

DECAYED = ("kernel", "a", "b")  # matrices of layers, and the two of a LoRA


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
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config),
            config.b1,
            config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key in DECAYED, params),
        ),
    )


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
