"""Guidance and the sampling loop: what is evaluated, with which numbers, and how often it is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from magref_jax.diffusion.flow import make_schedule, schedule_from_sigmas
from magref_jax.diffusion.sampling import FINITE, advance, denoise, guidance_branches, guide, start
from magref_jax.diffusion.step_cache import StepPlan

SCHEDULE = make_schedule("unipc", 5, 3.0)


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(0), (8, 2, 3))


def conditional(latents, timesteps):
    return jnp.sin(latents + timesteps[:, None, None] / 1000)


def unconditional(latents, timesteps):
    return jnp.cos(latents)


def stacked(*branches):
    """One function of a batch that holds the branches one after the other."""

    def velocity_fn(latents, timesteps):
        parts = zip(branches, jnp.split(latents, len(branches)), jnp.split(timesteps, len(branches)), strict=True)
        return jnp.concatenate([branch(x, t) for branch, x, t in parts])

    return velocity_fn


BOTH = stacked(conditional, unconditional)


def test_guidance_weights_are_those_of_classifier_free_guidance():
    assert guidance_branches(5.0) == {"conditional": 5.0, "unconditional": -4.0}
    assert guidance_branches(1.0) == {"conditional": 1.0}
    assert guidance_branches(0.0) == {"unconditional": 1.0}


def test_two_guidance_scales_are_those_of_phantom(noise):
    """Its generate.py: neg + scale_img * (pos_i - neg) + scale_text * (pos_it - pos_i), in the defaults 5 and 7.5."""
    assert guidance_branches(7.5, 5.0) == {"conditional": 7.5, "unconditional": -2.5, "blank": -4.0}

    def blank(latents, timesteps):
        return jnp.exp(-jnp.abs(latents))

    t = jnp.full(8, 300.0)
    found = guide(stacked(conditional, unconditional, blank), guidance_branches(7.5, 5.0))(noise, t)
    pos_it, pos_i, neg = (np.asarray(branch(noise, t)) for branch in (conditional, unconditional, blank))
    np.testing.assert_allclose(found, neg + 5 * (pos_i - neg) + 7.5 * (pos_it - pos_i), rtol=1e-5, atol=1e-5)


def test_equal_scales_are_two_branches():
    assert guidance_branches(4.0, 4.0) == guidance_branches(4.0, None) == {"conditional": 4.0, "blank": -3.0}
    assert guidance_branches(1.0, None) == {"conditional": 1.0}
    assert guidance_branches(1.0, 3.0) == {"conditional": 1.0, "unconditional": 2.0, "blank": -2.0}


def test_guided_velocity_is_rounded_like_the_official_expression(noise):
    found = guide(BOTH, guidance_branches(5.0))(noise, jnp.full(8, 300.0))
    c, u = (np.asarray(branch(noise, jnp.full(8, 300.0))) for branch in (conditional, unconditional))
    np.testing.assert_array_equal(found, u + np.float32(5) * (c - u))


def test_guided_velocity_is_float32(noise):
    c = jnp.full(noise.shape, 1.01, jnp.bfloat16)
    u = jnp.full(noise.shape, 0.3, jnp.bfloat16)
    velocity_fn = stacked(lambda latents, timesteps: c, lambda latents, timesteps: u)
    found = guide(velocity_fn, guidance_branches(7.5))(noise, jnp.ones(8))
    np.testing.assert_allclose(found, 7.5 * c.astype(jnp.float32) - 6.5 * u.astype(jnp.float32), rtol=1e-6)
    assert found.dtype == jnp.float32


def test_three_branches_are_combined_by_their_weights_in_one_evaluation(noise):
    shapes = []

    def velocity_fn(latents, timesteps):
        shapes.append((latents.shape, timesteps.shape))
        return jnp.repeat(jnp.array([1.0, 10.0, 100.0]), 8)[:, None, None] * jnp.ones_like(latents)

    found = guide(velocity_fn, {"a": 2.0, "b": -1.5, "left out": 0.0, "c": 0.5})(noise, jnp.ones(8))
    np.testing.assert_allclose(found, np.full(noise.shape, 37.0), rtol=1e-6)
    assert shapes == [((24, 2, 3), (24,))]


@pytest.mark.parametrize("weights", [guidance_branches(1.0), {"unconditional": 0, "conditional": 1}])
def test_guidance_scale_one_is_bitwise_the_conditional_branch_alone(noise, weights):
    alone = jax.jit(lambda noise: denoise(conditional, noise, SCHEDULE))
    guided = jax.jit(lambda noise: denoise(conditional, noise, SCHEDULE, guidance=weights))
    np.testing.assert_array_equal(guided(noise), alone(noise))


def test_euler_with_guidance_is_the_loop_written_out(noise):
    schedule = schedule_from_sigmas((1.0, 0.6, 0.2))
    guidance = guidance_branches(3.0)
    run = jax.jit(
        lambda noise: denoise(BOTH, noise, schedule, solver="euler", guidance=guidance, return_trajectory=True)
    )
    trajectory = run(noise)
    latents, expected = np.asarray(noise, np.float64), []
    for sigma, following in ((1.0, 0.6), (0.6, 0.2), (0.2, 0.0)):
        c, u = np.sin(latents + sigma), np.cos(latents)
        latents = latents + (following - sigma) * (u + 3 * (c - u))
        expected.append(latents)
    # Three float32 steps of unit scale.
    np.testing.assert_allclose(trajectory, expected, atol=3e-6)
    last = jax.jit(lambda noise: denoise(BOTH, noise, schedule, solver="euler", guidance=guidance))
    np.testing.assert_allclose(last(noise), trajectory[-1], atol=1e-6)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_a_loop_in_pieces_is_one_program_and_bitwise_the_loop_at_once(noise, solver):
    run = jax.jit(
        lambda state, stop: advance(BOTH, state, SCHEDULE, stop, solver=solver, guidance=guidance_branches(3.0))
    )
    at_once = run(start(noise, solver), 5)
    state = start(noise, solver)
    for stop in (1, 2, 4, 5):
        state = run(state, stop)
        assert int(state.step) == stop
    jax.tree.map(np.testing.assert_array_equal, state, at_once)
    assert run._cache_size() == 1
    whole = jax.jit(lambda noise: denoise(BOTH, noise, SCHEDULE, solver=solver, guidance=guidance_branches(3.0)))
    np.testing.assert_allclose(state.latents, whole(noise), atol=1e-6)


def test_the_state_has_the_velocity_of_its_last_step(noise):
    state = advance(conditional, start(noise, "euler"), SCHEDULE, 1, solver="euler")
    np.testing.assert_allclose(state.velocity, conditional(noise, jnp.full(8, SCHEDULE.timesteps[0])), atol=1e-6)
    np.testing.assert_array_equal(state.evaluated[0], state.velocity)


def test_the_first_step_without_finite_latents_is_noted_for_each_sample(noise):
    def velocity_fn(latents, timesteps):
        # Sample 2 from step 2 on (timestep 817), sample 5 from the first step on.
        bad = (jnp.arange(8) == 2) & (timesteps < 900) | (jnp.arange(8) == 5)
        return jnp.where(bad[:, None, None], jnp.where(jnp.arange(8) == 5, jnp.nan, jnp.inf)[:, None, None], latents)

    state = jax.jit(lambda state: advance(velocity_fn, state, SCHEDULE, 5))(start(noise))
    assert state.failed_step.tolist() == [FINITE, FINITE, 2, FINITE, FINITE, 0, FINITE, FINITE]
    good = jax.jit(lambda state: advance(lambda latents, timesteps: latents, state, SCHEDULE, 5))(start(noise))
    others = [0, 1, 3, 4, 6, 7]
    np.testing.assert_array_equal(state.latents[jnp.array(others)], good.latents[jnp.array(others)])


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


def test_a_batch_may_be_cut_over_a_mesh(noise):
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    run = jax.jit(lambda noise: denoise(conditional, noise, SCHEDULE), in_shardings=sharding, out_shardings=sharding)
    whole = jax.jit(lambda noise: denoise(conditional, noise, SCHEDULE))
    np.testing.assert_allclose(run(jax.device_put(noise, sharding)), whole(noise), atol=1e-6)


def test_no_program_calls_back_to_the_host(noise):
    # Such programs are not kept in the compilation cache.
    whole = jax.make_jaxpr(lambda noise: denoise(conditional, noise, SCHEDULE))(noise)
    piece = jax.make_jaxpr(lambda noise: advance(conditional, start(noise), SCHEDULE, 3))(noise)
    assert "callback" not in str(whole) + str(piece)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "heun"}, "solver='heun'.*unipc, dpm\\+\\+, euler"),
        ({"guidance": {"conditional": 2.0}}, "add up to 1"),
        ({"guidance": {}}, "add up to 1"),
        ({"step_plan": StepPlan.full(4)}, "step_plan is for 4 steps, the schedule has 5"),
    ],
)
def test_requests_that_do_not_fit_are_refused(noise, arguments, message):
    with pytest.raises(ValueError, match=message):
        denoise(conditional, noise, SCHEDULE, **arguments)
