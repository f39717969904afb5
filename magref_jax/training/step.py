"""One training step as a pure function.

Gradients in parts, clipping, AdamW, the average; nothing of it where the gradients are not finite. Step i of a run depends on its batch and on (key, i) alone, and every sample has a key of its own: neither a restart nor the
number of parts that a batch is computed in changes what is drawn.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32, Key

from magref_jax.checkpoint import Params
from magref_jax.descriptions import short_repr
from magref_jax.sharding import ParamSpecs, param_shardings

# Sums over a batch and what to divide them by. Parts of a batch add up, whatever each of them weighs; the denominators do not
# depend on parameters. "loss" is what is minimised.
Sums = dict[str, tuple[Array, Array]]
LossFn = Callable[[Params, Any, Any, Key[Array, "B"]], Sums]  # (trained, frozen, batch, keys)
Metrics = dict[str, Array]


@short_repr
@flax.struct.dataclass
class TrainState:
    """All that a step changes. Parameters and their moments are float32."""

    step: Int32[Array, ""]
    key: Key[Array, ""]  # of the run; never changes
    params: Params  # the trained ones
    ema: Params | None
    optimizer_state: optax.OptState
    skipped: Int32[Array, ""]  # steps whose gradients were not finite


def init_state(
    params: Params, optimizer: optax.GradientTransformation, key: Key[Array, ""], *, with_ema: bool = True
) -> TrainState:
    # Buffers of their own: the step donates its state.
    def copy() -> Params:
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)

    params = copy()
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=params,
        ema=copy() if with_ema else None,
        optimizer_state=optimizer.init(params),
        skipped=jnp.zeros((), jnp.int32),
    )


def state_shardings(
    mesh: Mesh, state: TrainState, optimizer: optax.GradientTransformation, specs: ParamSpecs
) -> TrainState:
    """Where a mesh holds a state: the average and the moments like their parameters, the rest on every device."""
    whole: Any = NamedSharding(mesh, P())
    of_params = param_shardings(mesh, state.params, specs)
    # optax asks for `init` alone, which a GradientTransformation has; its types say more.
    moments = optax.tree.map_params(
        cast(Any, optimizer),
        lambda leaf, sharding: leaf if isinstance(leaf, optax.MaskedNode) else sharding,  # one that it does not train
        state.optimizer_state,
        of_params,
        transform_non_params=lambda _: whole,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    ema = None if state.ema is None else of_params
    return TrainState(whole, whole, of_params, ema, moments, whole)


def sum_gradients(
    loss_fn: LossFn, params: Params, frozen: Any, batch: Any, keys: Key[Array, "B"], parts: int = 1
) -> tuple[Params, Metrics]:
    """Gradients of the batch's loss and the means of everything that `loss_fn` sums, in so many parts one after another."""

    def minimised(params: Params, batch: Any, keys: Array) -> tuple[Array, Sums]:
        sums = loss_fn(params, frozen, batch, keys)
        return sums["loss"][0], sums

    def of_part(batch: Any, keys: Array) -> tuple[Params, Sums]:
        return jax.grad(minimised, has_aux=True)(params, batch, keys)

    if parts == 1:
        gradients, sums = of_part(batch, keys)
    else:
        # Every parts-th sample: a batch that is cut over devices stays cut.
        pieces = jax.tree.map(lambda leaf: rearrange(leaf, "(b n) ... -> n b ...", n=parts), (batch, keys))
        zero = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(of_part, *jax.tree.map(lambda leaf: leaf[0], pieces)),
        )
        (gradients, sums), _ = jax.lax.scan(
            lambda total, piece: (jax.tree.map(jnp.add, total, of_part(*piece)), None), zero, pieces
        )
    count = sums["loss"][1]
    gradients = jax.tree.map(lambda leaf: leaf / count, gradients)
    return gradients, {name: total / jnp.maximum(weight, 1e-12) for name, (total, weight) in sums.items()}


def apply_gradients(
    state: TrainState, gradients: Params, optimizer: optax.GradientTransformation, ema_decay: float | None
) -> TrainState:
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    ema = state.ema
    if ema is not None and ema_decay is not None:
        # A young average forgets its start quickly.
        decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
        ema = optax.incremental_update(params, ema, 1 - decay)
    return dataclasses.replace(state, step=step, params=params, ema=ema, optimizer_state=optimizer_state)


def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema_decay: float | None,
    parts: int,
    state: TrainState,
    frozen: Any,
    batch: Any,
    noise_step: Int32[Array, ""] | None = None,
) -> tuple[TrainState, Metrics]:
    """The next state. Where loss or gradients are not finite, only `step` and `skipped` change.

    `noise_step` is the step whose randomness is used, the state's own if not given.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    key = jax.random.fold_in(state.key, state.step if noise_step is None else noise_step)
    gradients, metrics = sum_gradients(loss_fn, state.params, frozen, batch, jax.random.split(key, size), parts)
    norm = optax.tree.norm(gradients)
    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    updated = apply_gradients(state, gradients, optimizer, ema_decay)
    kept = dataclasses.replace(state, step=updated.step, skipped=state.skipped + 1)
    state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, kept)
    return state, metrics | {"gradient_norm": norm, "skipped": state.skipped}
