"""Guidance and the sampling loop: what is evaluated, with which numbers, and how often it is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from magref_jax.diffusion.flow import make_schedule, schedule_from_sigmas
from magref_jax.diffusion.sampling import denoise, guidance_branches, guide

SCHEDULE = make_schedule("unipc", 5, 3.0)


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(0), (8, 2, 3))


def conditional(latents, timesteps):
    return jnp.sin(latents + timesteps[:, None, None] / 1000)


def unconditional(latents, timesteps):
    return jnp.cos(latents)


def must_not_run(latents, timesteps):
    raise AssertionError("a branch of weight 0 was evaluated")


def test_guidance_weights_are_those_of_classifier_free_guidance():
    assert guidance_branches(5.0) == {"conditional": 5.0, "unconditional": -4.0}
    assert guidance_branches(1.0) == {"conditional": 1.0}
    assert guidance_branches(0.0) == {"unconditional": 1.0}


def test_guided_velocity_is_rounded_like_the_official_expression(noise):
    found = guide({"conditional": conditional, "unconditional": unconditional}, guidance_branches(5.0))(
        noise, jnp.full(8, 300.0)
    )
    c, u = (np.asarray(branch(noise, jnp.full(8, 300.0))) for branch in (conditional, unconditional))
    np.testing.assert_array_equal(found, u + np.float32(5) * (c - u))


def test_guided_velocity_is_float32(noise):
    c = jnp.full(noise.shape, 1.01, jnp.bfloat16)
    u = jnp.full(noise.shape, 0.3, jnp.bfloat16)
    branches = {"conditional": lambda latents, timesteps: c, "unconditional": lambda latents, timesteps: u}
    found = guide(branches, guidance_branches(7.5))(noise, jnp.ones(8))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 7.5 * c.astype(jnp.float32) - 6.5 * u.astype(jnp.float32), rtol=1e-6)


def test_three_branches_are_combined_by_their_weights(noise):
    branches = {
        name: lambda latents, timesteps, value=value: jnp.full_like(latents, value)
        for name, value in zip("abc", (1.0, 10.0, 100.0), strict=True)
    }
    found = guide(branches, {"a": 2.0, "b": -1.5, "c": 0.5})(noise, jnp.ones(8))
    np.testing.assert_allclose(found, np.full(noise.shape, 37.0), rtol=1e-6)


@pytest.mark.parametrize("weights", [guidance_branches(1.0), {"unconditional": 0, "conditional": 1}, None])
def test_guidance_scale_one_is_bitwise_the_conditional_branch_alone(noise, weights):
    alone = jax.jit(lambda noise: denoise(conditional, noise, SCHEDULE))
    guided = jax.jit(
        lambda noise: denoise(
            {"conditional": conditional, "unconditional": must_not_run}, noise, SCHEDULE, guidance=weights
        )
    )
    np.testing.assert_array_equal(guided(noise), alone(noise))


def test_euler_with_guidance_is_the_loop_written_out(noise):
    schedule = schedule_from_sigmas((1.0, 0.6, 0.2))
    branches = {"conditional": conditional, "unconditional": unconditional}
    run = jax.jit(
        lambda noise: denoise(
            branches, noise, schedule, solver="euler", guidance=guidance_branches(3.0), return_trajectory=True
        )
    )
    trajectory = run(noise)
    latents, expected = np.asarray(noise, np.float64), []
    for sigma, following in ((1.0, 0.6), (0.6, 0.2), (0.2, 0.0)):
        c, u = np.sin(latents + sigma), np.cos(latents)
        latents = latents + (following - sigma) * (u + 3 * (c - u))
        expected.append(latents)
    # Three float32 steps of unit scale.
    np.testing.assert_allclose(trajectory, expected, atol=3e-6)
    last = jax.jit(lambda noise: denoise(branches, noise, schedule, solver="euler", guidance=guidance_branches(3.0)))
    np.testing.assert_allclose(last(noise), trajectory[-1], atol=1e-6)


def test_velocity_function_is_told_the_timesteps_of_the_schedule_once_per_sample(noise):
    told = []

    def velocity_fn(latents, timesteps):
        assert timesteps.shape == (8,)
        assert timesteps.dtype == jnp.float32
        jax.debug.callback(lambda values: told.append(np.asarray(values)), timesteps)
        return latents

    jax.block_until_ready(jax.jit(lambda noise: denoise(velocity_fn, noise, SCHEDULE))(noise))
    jax.effects_barrier()
    np.testing.assert_array_equal(sorted(values[0] for values in told), [428, 666, 817, 922, 999])
    assert all((values == values[0]).all() for values in told)


def test_two_noises_share_one_program_which_evaluates_the_network_in_one_place(noise):
    traces = []

    @jax.jit
    def run(noise):
        traces.append("program")

        def velocity_fn(latents, timesteps):
            traces.append("network")
            return conditional(latents, timesteps)

        return denoise(velocity_fn, noise, make_schedule("unipc", 40, 3.0))

    assert not np.allclose(run(noise), run(-noise))
    assert traces.count("program") == 1
    assert traces.count("network") <= 2  # a scan may trace its body twice, never once per step


def test_progress_is_reported_once_per_step_on_a_mesh(noise):
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    reports = []
    run = jax.jit(
        lambda noise: denoise(conditional, noise, SCHEDULE, on_step=reports.append),
        in_shardings=sharding,
        out_shardings=sharding,
    )
    found = run(jax.device_put(noise, sharding))
    jax.effects_barrier()
    assert reports == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(found, jax.jit(lambda noise: denoise(conditional, noise, SCHEDULE))(noise), atol=1e-6)


def test_without_progress_the_program_has_no_callback(noise):
    assert "callback" not in str(jax.make_jaxpr(lambda noise: denoise(conditional, noise, SCHEDULE))(noise))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"velocity_fn": conditional, "solver": "heun"}, "solver='heun'.*unipc, dpm\\+\\+, euler"),
        ({"velocity_fn": conditional, "guidance": guidance_branches(5.0)}, "velocity function per branch"),
        ({"velocity_fn": {"conditional": conditional}, "guidance": guidance_branches(5.0)}, "'unconditional'"),
        ({"velocity_fn": {"conditional": conditional}, "guidance": {"conditional": 2.0}}, "add up to 1"),
        ({"velocity_fn": {"conditional": conditional}, "guidance": {}}, "add up to 1"),
    ],
)
def test_requests_that_do_not_fit_are_refused(noise, arguments, message):
    with pytest.raises(ValueError, match=message):
        denoise(noise=noise, schedule=SCHEDULE, **arguments)
