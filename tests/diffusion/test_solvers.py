"""One suite for every solver: problems whose answer is known in closed form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax.diffusion.flow import SCHEDULES, make_schedule, schedule_from_sigmas
from magref_jax.diffusion.sampling import denoise
from magref_jax.diffusion.solvers import SOLVERS

# Data of a normal law; wider than the noise, so that the error of every solver shrinks without changing its sign.
MEAN, STD = 0.5, 2.0


def gaussian_velocity(latents, timesteps):
    """E[ε − x₀ | x_σ] for data of N(MEAN, STD²)."""
    sigmas = timesteps[:, None] / 1000
    centred = (latents - (1 - sigmas) * MEAN) / ((1 - sigmas) ** 2 * STD**2 + sigmas**2)
    return sigmas * centred - (MEAN + (1 - sigmas) * STD**2 * centred)


def gaussian_answer(latents, sigma):
    """Where the flow carries latents of noise level `sigma`: their place within the law does not change."""
    return MEAN + STD * (latents - (1 - sigma) * MEAN) / np.hypot((1 - sigma) * STD, sigma)


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(0), (4, 64))


def test_every_solver_has_a_schedule():
    assert set(SOLVERS) == set(SCHEDULES)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_euler_is_exact_on_a_straight_path(noise, steps):
    clean = jax.random.normal(jax.random.key(1), noise.shape)
    schedule = make_schedule("euler", steps, 3.0)
    found = jax.jit(lambda noise: denoise(lambda latents, timesteps: noise - clean, noise, schedule, solver="euler"))(
        noise
    )
    # Rounding of at most 7 additions of values below 8.
    np.testing.assert_allclose(found, clean, atol=3e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 16])
@pytest.mark.parametrize("solver", SOLVERS)
def test_data_of_one_point_is_reached_in_any_number_of_steps(noise, solver, steps):
    point = jnp.linspace(-1, 1, 64)
    schedule = schedule_from_sigmas(np.linspace(1, 0, steps + 1)[:-1], 5.0)
    run = jax.jit(
        lambda noise: denoise(
            lambda latents, timesteps: 1000 * (latents - point) / timesteps[:, None], noise, schedule, solver=solver
        )
    )
    np.testing.assert_allclose(run(noise), jnp.broadcast_to(point, noise.shape), atol=3e-6)


@pytest.mark.parametrize(
    ("solver", "lowest", "highest"), [("euler", 1.9, 2.1), ("dpm++", 3.0, 5.0), ("unipc", 3.0, 5.0)]
)
def test_error_falls_with_the_order_of_the_solver(noise, solver, lowest, highest):
    errors = []
    for steps in (20, 40, 80):
        schedule = schedule_from_sigmas(np.linspace(0.9, 0, steps + 1)[:-1])
        found = jax.jit(lambda noise, schedule=schedule: denoise(gaussian_velocity, noise, schedule, solver=solver))(
            noise
        )
        errors.append(float(jnp.sqrt(jnp.mean((found - gaussian_answer(noise, schedule.sigmas[0])) ** 2))))
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(errors)]
    assert all(lowest <= ratio <= highest for ratio in ratios), (errors, ratios)
    assert errors[-1] < {"euler": 4e-2, "dpm++": 8e-4, "unipc": 1e-4}[solver]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("solver", SOLVERS)
def test_coefficients_are_finite_and_carry_constants(solver, steps):
    """From pure noise, λ = −∞, to pure data, λ = +∞; weights of x and of m must carry α·x₀ + σ·ε of each level over."""
    schedule = schedule_from_sigmas(np.linspace(1, 0, steps + 1)[:-1], 3.0)
    table = SOLVERS[solver].coefficients(schedule)
    assert all(np.isfinite(leaf).all() and leaf.dtype == np.float32 and len(leaf) == steps for leaf in table)
    for name, levels in (("predictor", schedule.sigmas[1:]), ("corrector", schedule.sigmas[:-1])):
        if name in table._fields:
            weights = getattr(table, name).astype(np.float64)
            before = schedule.sigmas[:-1] if name == "predictor" else np.append(1, schedule.sigmas[:-2])
            np.testing.assert_allclose(weights[:, 0] * before, levels, atol=1e-7)
            np.testing.assert_allclose(weights[:, 1:].sum(1) + weights[:, 0] * (1 - before), 1 - levels, atol=2e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_state_is_float32_for_bfloat16_networks(noise, solver):
    rule = SOLVERS[solver]
    row = jax.tree.map(lambda leaf: leaf[0], rule.coefficients(make_schedule(solver, 4, 3.0)))
    state = rule.init(noise.astype(jnp.bfloat16))
    after = rule.step(row, state, noise.astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves((state, after))} == {jnp.dtype("float32")}
