"""The step cache: which steps a table lets a run skip, what skipped steps do, and which tables are refused."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax.config import SamplingConfig
from magref_jax.diffusion.flow import make_schedule, schedule_from_sigmas
from magref_jax.diffusion.sampling import denoise
from magref_jax.diffusion.solvers import SOLVERS
from magref_jax.diffusion.step_cache import (
    Measured,
    StepPlan,
    StepTable,
    choose_steps,
    extrapolate,
    load_plan,
    plan_steps,
)

# MagCache's ratios of Wan 2.1 I2V 480P in 40 steps, as the configuration files of LightX2V give them.
WAN_RATIOS = (
    1.0, 0.98783, 0.97559, 0.98311, 0.98202, 0.9888, 0.98762, 0.98957, 0.99052, 0.99383,
    0.98857, 0.99065, 0.98845, 0.99057, 0.98957, 0.98601, 0.98823, 0.98756, 0.98808, 0.98721,
    0.98571, 0.98543, 0.98157, 0.98411, 0.97952, 0.98149, 0.9774, 0.97825, 0.97355, 0.97085,
    0.97056, 0.96588, 0.96113, 0.9567, 0.94961, 0.93973, 0.93217, 0.91878, 0.90955, 0.92617,
)  # fmt: skip

SAMPLING = SamplingConfig(num_inference_steps=8, solver="unipc", flow_shift=3.0, guidance_scale=5.0)
TABLE = StepTable(
    model="a model",
    sampling=SAMPLING,
    cases=2,
    max_skips=2,
    keep_first=0.25,
    ratios=(1.0, 0.9, 0.98, 0.99, 0.99, 0.99, 0.99, 0.95),
    spread=(0.0,) * 8,
    measured=(Measured(0.05, 5, 0.01, 40.0, 0.02, None),),
)


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(0), (2, 3))


def velocity(latents, timesteps):
    return jnp.sin(latents + timesteps[:, None] / 1000)


def steps(text: str) -> tuple[bool, ...]:
    return tuple(mark == "1" for mark in text)


def longest_skip(evaluate: tuple[bool, ...]) -> int:
    return max((len(list(run)) for value, run in itertools.groupby(evaluate) if not value), default=0)


@pytest.mark.parametrize(
    ("ratios", "threshold", "max_skips", "keep_first", "expected"),
    [
        # Sums from step 2 on: 0.2; 0.2 + 0.2, which is too much; 0.5, too; 0.05; 0.05 + 0.145; the last step.
        ((1.0, 0.9, 0.8, 1.0, 0.5, 0.95, 0.9, 0.9), 0.35, 2, 0.25, "11011001"),
        # The same with lengths that grow, where 1 - 1.2 is as far from 1 as 1 - 0.8.
        ((1.0, 9.0, 1.2, 1.0, 1.5, 1.05, 1.0, 1.0), 0.35, 2, 0.25, "11011001"),
        # A product that returns to 1 adds nothing: |1 - 0.5| + |1 - 0.5 * 2|.
        ((1.0, 0.5, 2.0, 0.5, 1.0), 0.6, 3, 0.0, "10011"),
        ((1.0,) * 10, 1.0, 2, 0.2, "1100100101"),  # only the limit of skips in a row
        ((1.0,) * 4, 1.0, 9, 0.0, "1001"),
        ((1.0,) * 4, 1.0, 9, 1.0, "1111"),
        ((1.0,) * 4, 0.0, 9, 0.0, "1111"),  # nothing is less than no error
        ((1.0,), 1.0, 9, 0.0, "1"),
    ],
)
def test_the_rule_computed_by_hand(ratios, threshold, max_skips, keep_first, expected):
    assert choose_steps(ratios, threshold, max_skips, keep_first) == steps(expected)


@pytest.mark.parametrize(
    ("threshold", "max_skips", "skipped"),
    # LightX2V skips 25, 23, 17 and 15 steps, among the 23 the last step, which here is always evaluated.
    [(0.24, 6, 25), (0.12, 4, 22), (0.06, 3, 17), (0.04, 2, 15)],
)
def test_as_many_steps_are_skipped_as_by_magcache_with_its_own_table(threshold, max_skips, skipped):
    assert 40 - sum(choose_steps(WAN_RATIOS, threshold, max_skips, 0.2)) == skipped


def test_more_error_allowed_means_no_more_evaluations():
    rng = np.random.default_rng(0)
    thresholds = [0, 0.001, 0.01, 0.03, 0.1, 0.3, 1, 10]
    for _ in range(50):
        # Lengths that only fall: where they rise again the sum may fall back, and a plan need not be monotone.
        ratios = tuple(1 - rng.gamma(1, 0.02, rng.integers(2, 60)).clip(0, 0.5))
        max_skips, keep_first = int(rng.integers(0, 6)), rng.uniform(0, 0.5)
        plans = [choose_steps(ratios, threshold, max_skips, keep_first) for threshold in thresholds]
        counts = [sum(plan) for plan in plans]
        assert counts == sorted(counts, reverse=True)
        assert all(plans[0])
        for plan in plans:
            assert plan[0]
            assert plan[-1]
            assert all(plan[: int(len(ratios) * keep_first)])
            assert longest_skip(plan) <= max_skips


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_skipped_steps_are_exact_for_a_velocity_that_is_linear_in_sigma(solver):
    schedule = make_schedule(solver, 12, 3.0)
    plan = extrapolate(steps("110100110011"), schedule.sigmas[:-1].tolist())
    assert plan.num_evaluations == 7
    noise = np.random.default_rng(1).standard_normal((2, 3)).astype(np.float32)

    def velocity_fn(latents, timesteps):
        # The schedule's σ; timesteps are cut to whole numbers and would not be linear.
        sigma = jnp.asarray(schedule.sigmas)[jnp.searchsorted(-schedule.timesteps, -timesteps)]
        return jnp.broadcast_to(2 - 3 * sigma[:, None], latents.shape)

    planned, full = (
        jax.jit(lambda noise, plan=plan: denoise(velocity_fn, noise, schedule, solver=solver, step_plan=plan))(noise)
        for plan in (plan, None)
    )
    # Float32, and weights of up to 5 where a short interval is followed by a long one.
    np.testing.assert_allclose(planned, full, atol=1e-5)
    sigmas = schedule.sigmas.astype(np.float64)
    if solver == "euler":
        np.testing.assert_allclose(planned, noise + np.sum(np.diff(sigmas) * (2 - 3 * sigmas[:-1])), atol=1e-5)


def test_a_run_with_skipped_steps_is_the_loop_written_out(noise):
    plan = StepPlan(
        steps("1101001"), ((1.0, 0.0), (1.0, 0.0), (1.5, -0.5), (1.0, 0.0), (1.25, -0.25), (1.75, -0.75), (1.0, 0.0))
    )
    schedule = schedule_from_sigmas((1.0, 0.9, 0.8, 0.6, 0.5, 0.3, 0.1))
    found = jax.jit(lambda noise: denoise(velocity, noise, schedule, solver="euler", step_plan=plan))(noise)
    latents, sigmas, given = np.asarray(noise, np.float64), schedule.sigmas.astype(np.float64), []
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        if plan.evaluate[step]:
            given.append(np.sin(latents + sigma))
            used = given[-1]
        else:
            used = plan.weights[step][0] * given[-1] + plan.weights[step][1] * given[-2]
        latents = latents + (following - sigma) * used
    np.testing.assert_allclose(found, latents, atol=3e-6)


def test_one_evaluation_is_held_which_with_euler_is_one_long_step(noise):
    schedule = make_schedule("euler", 6, 3.0)
    plan = extrapolate(steps("100000"), schedule.sigmas[:-1].tolist())
    assert plan.weights == ((1.0, 0.0),) * 6
    found = jax.jit(lambda noise: denoise(velocity, noise, schedule, solver="euler", step_plan=plan))(noise)
    np.testing.assert_allclose(found, noise - np.sin(np.asarray(noise, np.float64) + 1), atol=1e-6)


def test_the_network_is_asked_in_the_planned_steps_and_no_others(noise):
    schedule = make_schedule("unipc", 8, 3.0)
    plan = extrapolate(steps("11010011"), schedule.sigmas[:-1].tolist())
    told = []

    def velocity_fn(latents, timesteps):
        jax.debug.callback(lambda values: told.append(float(values[0])), timesteps)
        return velocity(latents, timesteps)

    jax.block_until_ready(jax.jit(lambda noise: denoise(velocity_fn, noise, schedule, step_plan=plan))(noise))
    jax.effects_barrier()
    assert len(told) == plan.num_evaluations == 5
    assert sorted(told, reverse=True) == schedule.timesteps[list(plan.evaluate)].tolist()


def test_a_full_plan_is_bitwise_no_plan(noise):
    schedule = make_schedule("unipc", 5, 3.0)
    full = StepPlan.full(5)
    assert full.num_evaluations == 5
    planned, plain = (
        jax.jit(lambda noise, plan=plan: denoise(velocity, noise, schedule, step_plan=plan))(noise)
        for plan in (full, None)
    )
    np.testing.assert_array_equal(planned, plain)


def test_a_plan_can_be_a_static_argument():
    schedule = make_schedule("unipc", 8, 3.0)
    plan = plan_steps(TABLE.ratios, SAMPLING, 0.05, 2, 0.25)
    again = extrapolate(steps("11001001"), schedule.sigmas[:-1].tolist())
    assert plan == again
    assert hash(plan) == hash(again)


def test_threshold_0_is_the_full_plan():
    assert TABLE.plan(SAMPLING, 0.0) == StepPlan.full(8)


@pytest.mark.parametrize(
    ("evaluate", "weights", "message"),
    [
        ("", (), "evaluate=.* must begin with True"),
        ("011", ((1.0, 0.0),) * 3, "evaluate=.* must begin with True"),
        ("101", ((1.0, 0.0),) * 2, "2 entries for 3 steps"),
        ("101", ((1.0, 0.0), (1.5, -0.5), (1.0, 0.0)), r"weights\[1\].*there is one by then"),
        ("111", ((1.0, 0.0), (0.5, 0.0), (1.0, 0.0)), r"weights\[1\].*add up to 1"),
        ("111", ((1.0, 0.0), (float("nan"), 0.0), (1.0, 0.0)), r"weights\[1\].*add up to 1"),
    ],
)
def test_plans_that_no_run_can_follow_are_refused(evaluate, weights, message):
    with pytest.raises(ValueError, match=message):
        StepPlan(steps(evaluate), weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": ()}, r"ratios=\(\) must be positive"),
        ({"ratios": (1.0, 0.0)}, "ratios=.* must be positive"),
        ({"ratios": (1.0, float("nan"))}, "ratios=.* must be positive"),
        ({"threshold": -0.1}, "threshold=-0.1 must be"),
        ({"threshold": float("nan")}, "threshold=nan must be"),
        ({"threshold": float("inf")}, "threshold=inf must be"),
        ({"max_skips": -1}, "max_skips=-1 must be"),
        ({"keep_first": 1.5}, "keep_first=1.5 must be"),
    ],
)
def test_options_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        choose_steps(**({"ratios": (1.0, 1.0), "threshold": 0.1} | change))


def test_a_plan_of_another_number_of_steps_is_refused(noise):
    with pytest.raises(ValueError, match="4 steps.* 5"):
        denoise(velocity, noise, make_schedule("unipc", 5, 3.0), step_plan=StepPlan.full(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "euler"}, "solver='unipc', the run has solver='euler'"),
        ({"flow_shift": 5.0}, "flow_shift=3.0, the run has flow_shift=5.0"),
        ({"num_inference_steps": 16}, "num_inference_steps=8, the run has num_inference_steps=16"),
        ({"guidance_scale": 1.0}, "guidance_scale=5.0, the run has guidance_scale=1.0"),
    ],
)
def test_a_table_for_another_run_is_refused_and_both_are_named(change, message, tmp_path):
    path = tmp_path / "step_cache.json"
    path.write_text(TABLE.to_json())
    with pytest.raises(ValueError, match=f"step_cache.json: was measured with {message}"):
        load_plan(path, dataclasses.replace(SAMPLING, **change))


def test_a_table_is_read_as_it_was_written(tmp_path):
    assert StepTable.from_json(TABLE.to_json()) == TABLE
    path = tmp_path / "a:0.5"  # a colon of its own
    path.write_text(TABLE.to_json())
    for text in (path, f"{path}:0.01"):
        assert load_plan(text, SAMPLING) == TABLE.plan(SAMPLING, 0.01)  # 0.01 is what is taken if none is given
    assert load_plan(f"{path}:0", SAMPLING) == StepPlan.full(8)
    assert load_plan(f"{path}:0.05", SAMPLING).evaluate == steps("11001001")


VALUES = json.loads(TABLE.to_json())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no step cache"),
        ("[]", "no step cache"),
        ("{}", "no step cache"),
        (json.dumps(VALUES | {"colour": 1}), "no step cache: .*unknown name 'colour'"),
        (json.dumps({name: value for name, value in VALUES.items() if name != "ratios"}), "no step cache: .*'ratios'"),
        (json.dumps(VALUES | {"ratios": VALUES["ratios"][:-1]}), "no step cache: spread has 8 entries for 7"),
        (json.dumps(VALUES | {"ratios": [1.0], "spread": [0.0]}), "no step cache: 1 ratios.*num_inference_steps=8"),
        (json.dumps(VALUES | {"ratios": ["1"] * 8}), "no step cache"),
        (json.dumps(VALUES | {"ratios": [1e999] * 8}), "no step cache: step_cache.ratios.0.=inf must be a finite"),
        (json.dumps(VALUES | {"max_skips": "many"}), "no step cache"),
        (json.dumps(VALUES | {"sampling": 3}), "no step cache"),
        (json.dumps(VALUES | {"measured": [3]}), "no step cache"),
        (json.dumps(VALUES | {"measured": 3}), "no step cache"),
    ],
)
def test_files_that_are_no_table_are_refused(text, message, tmp_path):
    path = tmp_path / "step_cache.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"step_cache.json is {message}"):
        load_plan(path, SAMPLING)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing.json", "there is no step cache file 'missing.json'"),
        ("missing.json:0.1", "there is no step cache file 'missing.json:0.1'"),
        (":0.1", "there is no step cache file ':0.1'"),
        ("", "there is no step cache file ''"),
        ("{file}:", "'' after .*step_cache.json: must be a number"),
        ("{file}:low", "'low' after .*step_cache.json: must be a number"),
        ("{file}:-1", "step_cache.json: threshold=-1.0 must be"),
        ("{file}:nan", "step_cache.json: threshold=nan must be"),
    ],
)
def test_flags_that_name_no_plan_are_refused(text, message, tmp_path):
    path = tmp_path / "step_cache.json"
    path.write_text(TABLE.to_json())
    with pytest.raises(ValueError, match=message):
        load_plan(text.format(file=path), SAMPLING)
