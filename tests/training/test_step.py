"""The training step against closed forms: a linear model, whose gradients are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from magref_jax.training import step as steps
from magref_jax.training.config import OptimizerConfig
from magref_jax.training.optimizer import make_optimizer


def linear_loss(params, frozen, batch, keys) -> steps.Sums:
    """Weighted squares of (x + noise)·w − y, with a sum of weights that differs from part to part."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    error = jnp.square((batch["x"] + frozen["scale"] * noise) @ params["layer"]["kernel"] - batch["y"])
    return {"loss": (jnp.sum(batch["weight"] * error), jnp.sum(batch["weight"]))}


def linear_batch(size: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((size, 3)).astype(np.float32),
        "y": rng.standard_normal(size).astype(np.float32),
        "weight": rng.uniform(0.1, 5, size).astype(np.float32),
    }


def linear_state(config: OptimizerConfig) -> tuple[steps.TrainState, optax.GradientTransformation]:
    optimizer = make_optimizer(config)
    params = {"layer": {"kernel": jnp.array([0.5, -1.0, 2.0])}}
    with_ema = config.ema_decay is not None
    return steps.init_state(params, optimizer, jax.random.key(0), with_ema=with_ema), optimizer


def test_gradient_is_that_of_the_weighted_mean():
    batch, state = linear_batch(), linear_state(OptimizerConfig())[0]
    keys = jax.random.split(jax.random.key(1), 8)
    gradients, metrics = steps.sum_gradients(linear_loss, state.params, {"scale": 0.0}, batch, keys)
    x, y, weight = (batch[name].astype(np.float64) for name in ("x", "y", "weight"))
    residual = x @ np.array([0.5, -1.0, 2.0]) - y
    np.testing.assert_allclose(metrics["loss"], np.average(residual**2, weights=weight), rtol=1e-6)
    expected = 2 * (weight * residual) @ x / weight.sum()
    np.testing.assert_allclose(gradients["layer"]["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_of_a_batch_add_up_to_the_batch(parts):
    # With noise: it belongs to the sample, not to the part.
    batch, state = linear_batch(), linear_state(OptimizerConfig())[0]
    keys = jax.random.split(jax.random.key(1), 8)
    whole, whole_metrics = steps.sum_gradients(linear_loss, state.params, {"scale": 1.0}, batch, keys)
    split, split_metrics = steps.sum_gradients(linear_loss, state.params, {"scale": 1.0}, batch, keys, parts)
    np.testing.assert_allclose(split["layer"]["kernel"], whole["layer"]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(split_metrics["loss"], whole_metrics["loss"], rtol=1e-6)


def loss_with_a_root(params, frozen, batch, keys) -> steps.Sums:
    """Adds √(root · ‖w‖²): with root = 0 the loss is finite and its gradient is not."""
    total, count = linear_loss(params, frozen, batch, keys)["loss"]
    roots = jnp.sqrt(batch["root"] * jnp.sum(jnp.square(params["layer"]["kernel"])))
    return {"loss": (total + jnp.sum(roots), count)}


@pytest.mark.parametrize(("name", "value"), [("y", np.nan), ("root", 0)])
def test_a_step_without_finite_gradients_changes_nothing_but_its_count(name, value):
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0)
    state, optimizer = linear_state(config)
    step = jax.jit(functools.partial(steps.train_step, loss_with_a_root, optimizer, 0.9, 1))
    batch = linear_batch() | {"root": np.ones(8, np.float32)}
    state, _ = step(state, {"scale": 1.0}, batch)
    skipped, metrics = step(state, {"scale": 1.0}, batch | {name: np.full(8, value, np.float32)})
    assert np.isfinite(metrics["loss"]) == (name == "root")
    assert (int(skipped.step), int(skipped.skipped), int(metrics["skipped"])) == (2, 1, 1)
    for part in ("params", "ema", "optimizer_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(skipped, part), getattr(state, part))
    after, _ = step(skipped, {"scale": 1.0}, batch)
    assert (int(after.step), int(after.skipped)) == (3, 1)
    assert not np.array_equal(after.params["layer"]["kernel"], state.params["layer"]["kernel"])


def test_randomness_of_a_step_depends_on_its_number_alone():
    state, optimizer = linear_state(OptimizerConfig(warmup_steps=0))
    step = jax.jit(functools.partial(steps.train_step, linear_loss, optimizer, 0.9, 1))
    batch = linear_batch()
    losses = [float(step(state.replace(step=jnp.asarray(i)), {"scale": 1.0}, batch)[1]["loss"]) for i in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
    fixed = [
        float(step(state.replace(step=jnp.asarray(i)), {"scale": 1.0}, batch, jnp.asarray(7))[1]["loss"])
        for i in (0, 1)
    ]
    assert fixed[0] == fixed[1] != losses[0]


def test_ema_follows_its_formula():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, ema_decay=0.5)
    state, optimizer = linear_state(config)
    expected = np.array([0.5, -1.0, 2.0])
    step = jax.jit(functools.partial(steps.train_step, linear_loss, optimizer, 0.5, 1))
    for i in range(1, 13):
        state, _ = step(state, {"scale": 0.0}, linear_batch())
        decay = min(0.5, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["layer"]["kernel"])
        np.testing.assert_allclose(state.ema["layer"]["kernel"], expected, rtol=1e-5)


def test_without_an_average_none_is_held():
    state, optimizer = linear_state(OptimizerConfig(ema_decay=None))
    assert state.ema is None
    state, _ = steps.train_step(linear_loss, optimizer, None, 1, state, {"scale": 0.0}, linear_batch())
    assert state.ema is None


def test_parameters_are_trained_in_float32_whatever_they_were():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-4, warmup_steps=0, weight_decay=0.0))
    state = steps.init_state({"kernel": jnp.ones(2, jnp.bfloat16)}, optimizer, jax.random.key(0))
    for _ in range(5):  # each of which bfloat16 would round away: its neighbours of 1 are 0.004 off
        state = steps.apply_gradients(state, {"kernel": jnp.ones(2)}, optimizer, 0.5)
    np.testing.assert_allclose(state.params["kernel"], 1 - 5e-4, rtol=0, atol=1e-6)
    average = 1.0
    for step in range(1, 6):
        decay = (1 + step) / (10 + step)
        average = decay * average + (1 - decay) * (1 - step * 1e-4)
    np.testing.assert_allclose(state.ema["kernel"], average, rtol=0, atol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {jnp.dtype("float32")}
