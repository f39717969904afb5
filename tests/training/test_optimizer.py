"""Schedule, decay and the choice of parameters, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax.sharding import PARAM_SPECS, make_mesh
from magref_jax.training.config import OptimizerConfig
from magref_jax.training.optimizer import join_params, make_optimizer, make_schedule, split_params
from magref_jax.training.step import init_state, state_shardings


def test_cosine_with_restarts():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, cycle_steps=(20, 40), final_fraction=0.1)
    schedule = make_schedule(config)

    def expected(step: int) -> float:
        if step < 10:
            return 2.0 * step / 10
        if step >= 70:
            return 0.2
        start, length = (10, 20) if step < 30 else (30, 40)
        return 2.0 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (step - start) / length)))

    for step in range(100):
        np.testing.assert_allclose(schedule(step), expected(step), rtol=1e-5, err_msg=str(step))


def test_without_cycles_the_rate_stays_at_its_peak():
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4))
    np.testing.assert_allclose([schedule(step) for step in (0, 2, 4, 5, 10**6)], [0, 1, 2, 2, 2])
    assert float(make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=0))(0)) == 2.0


def test_only_matrices_decay():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    params = {name: jnp.ones(2) for name in ("kernel", "a", "b", "bias", "scale", "modulation")}
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for name, update in updates.items():
        expected = -0.1 * 0.5 if name in ("kernel", "a", "b") else 0.0
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=name)


def test_gradients_are_clipped_together():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_steps=0, clip_norm=1.0, b1=0.0, b2=0.0))
    params = {"bias": jnp.zeros(2), "scale": jnp.zeros(1)}
    state = optimizer.init(params)
    # Adam forgets the length of a gradient, its second moment does not: it holds the clipped one.
    _, state = optimizer.update({"bias": jnp.array([3.0, 0.0]), "scale": jnp.array([4.0])}, state, params)
    moments = [leaf for leaf in jax.tree.leaves(state) if getattr(leaf, "ndim", 0)]
    np.testing.assert_allclose(sum(float(jnp.sum(leaf)) for leaf in moments), 0.6 + 0.8 + 0.36 + 0.64, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_an_update_of_muon_is_orthogonal_and_as_large_as_one_of_adamw(shape):
    optimizer = make_optimizer(OptimizerConfig(method="muon", learning_rate=0.01, warmup_steps=0, weight_decay=0.0))
    gradient = np.random.default_rng(0).standard_normal(shape)
    params = {"blocks": {"up": {"kernel": jnp.ones((1, *shape))}}}
    gradients = {"blocks": {"up": {"kernel": jnp.asarray(gradient[None], jnp.float32)}}}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    update = updates["blocks"]["up"]["kernel"][0]
    # arXiv:2502.16982. Five steps of Newton and Schulz leave singular values of 0.68 to 1.13 in the place of ones.
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(update))), 0.01 * 0.2, rtol=0.1)
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    expected = -0.01 * 0.2 * np.sqrt(max(shape)) * left @ right
    np.testing.assert_allclose(update, expected, rtol=0, atol=0.35 * np.abs(expected).max())


def test_split_and_join():
    params = {"a": {"kernel": 1, "bias": 2}, "b": {"c": {"kernel": 3}}}
    trained, frozen = split_params(params, "a/.*|b/c/bias")
    assert (trained, frozen) == ({"a": {"kernel": 1, "bias": 2}}, {"b": {"c": {"kernel": 3}}})
    assert join_params(trained, frozen) == params
    # The whole name has to match, so that a prefix does not train what it only begins.
    assert split_params(params, "a/k.*")[0] == {"a": {"kernel": 1}}
    everything, nothing = split_params(params, ".*")
    assert (everything, nothing) == (params, {})
    assert join_params(everything, nothing) == params
    with pytest.raises(ValueError, match=r"trainable='kernel' matches no parameter.*a/bias, a/kernel, b/c"):
        split_params(params, "kernel")


@pytest.mark.parametrize("options", [{"warmup_steps": -1}, {"cycle_steps": (10, 0)}, {"eps": 0.0}, {"ema_decay": 1.0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=f"OptimizerConfig.*{next(iter(options))}"):
        OptimizerConfig(**options)


def test_moments_of_both_methods_lie_like_their_parameters():
    mesh = make_mesh("fsdp=4,tensor=2")
    params = {
        "blocks": {"feed_forward": {"up": {"kernel": jnp.ones((2, 8, 16)), "bias": jnp.ones((2, 16))}}},
        "head": {"out": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}},
    }
    for method in ("adamw", "muon"):
        optimizer = make_optimizer(OptimizerConfig(method=method))
        state = jax.eval_shape(lambda params, by=optimizer: init_state(params, by, jax.random.key(0)), params)
        shardings = state_shardings(mesh, state, optimizer, PARAM_SPECS["dit"])
        state = jax.jit(
            lambda params, by=optimizer: init_state(params, by, jax.random.key(0)), out_shardings=shardings
        )(params)
        cut = [leaf for leaf in jax.tree.leaves(state.optimizer_state) if leaf.shape == (2, 8, 16)]
        assert len(cut) == {"adamw": 2, "muon": 1}[method]  # momentum, and for Adam the second moment
        assert all(leaf.sharding.shard_shape(leaf.shape) == (2, 2, 8) for leaf in cut)
