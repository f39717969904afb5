"""Conventions, schedules and the training target against golden tables and closed forms."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax.diffusion.flow import (
    SCHEDULES,
    Schedule,
    interpolate,
    loss_weight,
    make_schedule,
    sample_sigmas,
    schedule_from_sigmas,
    shift_sigmas,
    to_timesteps,
    velocity_target,
)

# Of the official code, at 40 steps.
UNIPC_SIGMAS = {
    3.0: """0.9996665 0.9911891 0.9824195 0.9733424 0.9639411 0.9541981 0.9440944 0.9336096 0.9227217 0.9114069
        0.8996398 0.8873925 0.8746352 0.8613352 0.8474573 0.8329628 0.8178097 0.8019522 0.7853400 0.7679177
        0.7496248 0.7303943 0.7101522 0.6888165 0.6662961 0.6424897 0.6172836 0.5905508 0.5621483 0.5319145
        0.4996666 0.4651961 0.4282652 0.3886008 0.3458875 0.2997600 0.2497916 0.1954820 0.1362397 0.0713605 0""",
    5.0: """0.9997998 0.9946948 0.9893770 0.9838330 0.9780480 0.9720060 0.9656894 0.9590791 0.9521540 0.9448913
        0.9372655 0.9292487 0.9208101 0.9119155 0.9025269 0.8926018 0.8820933 0.8709480 0.8591062 0.8465009
        0.8330554 0.8186829 0.8032843 0.7867454 0.7689347 0.7496998 0.7288627 0.7062144 0.6815081 0.6544499
        0.6246874 0.5917935 0.5552468 0.5144030 0.4684569 0.4163888 0.3568877 0.2882396 0.2081597 0.1135330 0""",
}
TIMESTEPS = {
    ("unipc", 40, 3.0): """999 991 982 973 963 954 944 933 922 911 899 887 874 861 847 832 817 801 785 767 749 730 710
        688 666 642 617 590 562 531 499 465 428 388 345 299 249 195 136 71""",
    ("unipc", 40, 5.0): """999 994 989 983 978 972 965 959 952 944 937 929 920 911 902 892 882 870 859 846 833 818 803
        786 768 749 728 706 681 654 624 591 555 514 468 416 356 288 208 113""",
    ("unipc", 20, 3.0): "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136",
    ("unipc", 8, 5.0): "999 972 937 892 833 749 624 416",
    ("unipc", 6, 8.0): "999 975 941 888 799 615",
    ("unipc", 4, 5.0): "999 937 833 624",
    ("unipc", 4, 3.0): "999 899 749 499",
    ("dpm++", 40, 3.0): """1000 991 982 973 964 954 944 933 923 911 900 887 874 861 847 833 818 802 785 768 750 730 710
        689 666 642 617 590 562 532 500 465 428 388 346 300 249 195 136 71""",
    ("dpm++", 40, 5.0): """1000 994 989 984 978 972 965 959 952 945 937 929 921 912 902 892 882 871 859 846 833 818 803
        787 769 750 729 706 681 654 625 592 555 514 468 416 357 288 208 113""",
}


@pytest.mark.parametrize("shift", UNIPC_SIGMAS)
def test_unipc_sigmas_are_the_official_ones(shift):
    golden = np.array(UNIPC_SIGMAS[shift].split(), np.float64)
    # The table has seven decimals.
    np.testing.assert_allclose(make_schedule("unipc", 40, shift).sigmas, golden, rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", TIMESTEPS)
def test_official_timesteps_are_cut_not_rounded(case):
    golden = np.array(TIMESTEPS[case].split(), np.float32)
    np.testing.assert_array_equal(make_schedule(*case).timesteps, golden)


@pytest.mark.parametrize("solver", ["dpm++", "euler"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_the_other_grids_are_even_before_the_shift(solver, shift):
    schedule = make_schedule(solver, 40, shift)
    np.testing.assert_allclose(
        shift_sigmas(schedule.sigmas.astype(np.float64), 1 / shift), np.linspace(1, 0, 41), atol=3e-7
    )
    if solver == "euler":
        np.testing.assert_allclose(schedule.timesteps, 1000 * schedule.sigmas[:-1], rtol=1e-6)


def test_few_step_levels_of_a_distilled_model():
    schedule = schedule_from_sigmas((1, 0.75, 0.5, 0.25), flow_shift=5.0)
    np.testing.assert_allclose(schedule.sigmas, [1, 0.9375, 0.8333333, 0.625, 0], rtol=1e-6)
    np.testing.assert_allclose(schedule.timesteps, [1000, 937.5, 833.3333, 625], rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 50])
@pytest.mark.parametrize("solver", SCHEDULES)
def test_schedules_are_float32_of_the_asked_length(solver, steps):
    schedule = make_schedule(solver, steps, 3.0)
    assert schedule.num_inference_steps == steps
    assert schedule.sigmas.shape == (steps + 1,)
    assert schedule.timesteps.shape == (steps,)
    assert schedule.sigmas.dtype == schedule.timesteps.dtype == np.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_schedule("ddim", 40, 3.0), "solver='ddim'.*unipc, dpm\\+\\+, euler"),
        (lambda: make_schedule("unipc", 0, 3.0), "num_inference_steps=0"),
        (lambda: make_schedule("unipc", 4, 0.0), "flow_shift=0.0"),
        (lambda: schedule_from_sigmas((0.5, 0.75)), "fall strictly"),
        (lambda: schedule_from_sigmas((1.5, 0.75)), "at most 1"),
        (lambda: schedule_from_sigmas((0.5, 0.0)), "fall strictly"),
        (lambda: schedule_from_sigmas(()), "fall strictly"),
        (lambda: Schedule(np.array([1.0, 0.5, 0.0]), np.array([1000.0])), "one fewer"),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shift_is_undone_by_its_reciprocal_and_keeps_the_ends():
    sigmas = np.linspace(0, 1, 101)
    for shift in (0.5, 3.0, 8.0):
        np.testing.assert_allclose(shift_sigmas(shift_sigmas(sigmas, shift), 1 / shift), sigmas, atol=1e-15)
    assert shift_sigmas(np.float64(0.5), 3.0) == 0.75
    assert shift_sigmas(sigmas, 5.0)[[0, -1]].tolist() == [0, 1]


@pytest.fixture(scope="module")
def clip():
    """Clean latents and noise, [B F H W C]."""
    clean_key, noise_key = jax.random.split(jax.random.key(0))
    return jax.random.normal(clean_key, (3, 4, 2, 5, 6)), jax.random.normal(noise_key, (3, 4, 2, 5, 6))


@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_velocity_leads_back_to_the_clean_latents_and_on_to_the_noise(clip, shape):
    clean, noise = clip
    sigmas = jax.random.uniform(jax.random.key(1), shape)
    noisy = interpolate(clean, noise, sigmas)
    velocity = velocity_target(clean, noise)
    levels = sigmas.reshape(shape + (1,) * (5 - len(shape)))
    # Two float32 roundings of values below 8.
    np.testing.assert_allclose(noisy - levels * velocity, clean, atol=2e-6)
    np.testing.assert_allclose(noisy + (1 - levels) * velocity, noise, atol=2e-6)


def test_noise_level_one_is_noise_zero_is_data_and_frames_have_their_own(clip):
    clean, noise = clip
    sigmas = jnp.zeros((3, 4)).at[:, 1].set(1.0).at[:, 2].set(0.25)
    noisy = interpolate(clean, noise, sigmas)
    np.testing.assert_array_equal(noisy[:, 0], clean[:, 0])
    np.testing.assert_array_equal(noisy[:, 1], noise[:, 1])
    np.testing.assert_allclose(noisy[:, 2], 0.75 * clean[:, 2] + 0.25 * noise[:, 2], atol=1e-6)
    np.testing.assert_array_equal(to_timesteps(sigmas)[0], [0, 1000, 250, 0])


def test_arithmetic_is_float32_for_bfloat16_latents(clip):
    clean, noise = (array.astype(jnp.bfloat16) for array in clip)
    expected = np.asarray(noise, np.float32) - np.asarray(clean, np.float32)
    velocity = velocity_target(clean, noise)
    np.testing.assert_array_equal(velocity, expected)
    assert interpolate(clean, noise, jnp.full(3, 0.3, jnp.bfloat16)).dtype == jnp.float32


def test_sigmas_of_another_batch_are_refused(clip):
    with pytest.raises(ValueError, match=r"sigmas has shape \(1,\).*\(3,\) or \(3, 4\)"):
        interpolate(*clip, jnp.ones(1))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampled_sigmas_have_the_quantiles_of_their_law(shift):
    probabilities = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
    normal = np.array([statistics.NormalDist(0.3, 0.8).inv_cdf(p) for p in probabilities])
    laws = {
        "uniform": probabilities,
        "logit_normal": 1 / (1 + np.exp(-normal)),
    }
    for name, quantiles in laws.items():
        sigmas = sample_sigmas(jax.random.key(0), (400, 500), distribution=name, flow_shift=shift, mean=0.3, std=0.8)
        assert sigmas.shape == (400, 500)
        expected = shift * quantiles / (1 + (shift - 1) * quantiles)
        # 200,000 samples: the standard error of a quantile is below 0.0015.
        np.testing.assert_allclose(np.quantile(sigmas, probabilities), expected, atol=0.006)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="uniform, logit_normal"):
        sample_sigmas(jax.random.key(0), (2,), distribution="mode")
    with pytest.raises(ValueError, match="none, bsmntw"):
        loss_weight(jnp.ones(2), "min_snr")


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_bsmntw_is_a_bell_around_the_middle_with_mean_one(shift):
    timesteps = 1000 * shift_sigmas(np.arange(1000, 0, -1) / 1000, shift)
    bell = np.exp(-2 * ((timesteps - 500) / 1000) ** 2)
    bell = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    weights = loss_weight(jnp.asarray(timesteps / 1000, jnp.float32), "bsmntw", flow_shift=shift)
    # Near the ends the bell is a difference of float32 numbers close to 0.6.
    np.testing.assert_allclose(weights, bell, atol=2e-6)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    # One sample has the weight it would have in any batch.
    assert float(loss_weight(jnp.float32(timesteps[500] / 1000), "bsmntw", flow_shift=shift)) == float(weights[500])


def test_no_weighting_is_one():
    np.testing.assert_array_equal(loss_weight(jnp.array([0.1, 0.9])), [1, 1])
