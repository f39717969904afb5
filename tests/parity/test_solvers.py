"""The whole trajectory of each solver on a nonlinear velocity network, against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from magref_jax.diffusion.flow import Schedule, make_schedule
from magref_jax.diffusion.sampling import denoise

pytestmark = pytest.mark.parity

WIDTH = 24
RUNS = [(steps, shift) for steps in (4, 8, 20, 40) for shift in (3.0, 5.0)]
# Latents stay within ±2, where float32 is spaced by up to 1.2e-7. Over 40 steps each side drifts up to 9e-7 from the same
# run in float64; the two differ by at most 1.2e-6.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def network() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "kernel": rng.normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH),
        "time": rng.normal(size=WIDTH),
        "noise": rng.uniform(-1, 1, size=(3, WIDTH)),
    }


def torch_trajectory(scheduler, network: dict[str, np.ndarray]) -> np.ndarray:
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in network.items()}
    latents, trajectory = tensors["noise"], []
    for timestep in scheduler.timesteps:
        velocity = torch.tanh(latents @ tensors["kernel"] + timestep / 1000 * tensors["time"])
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        trajectory.append(latents.numpy())
    return np.stack(trajectory)


def jax_trajectory(solver: str, schedule: Schedule, network: dict[str, np.ndarray]) -> np.ndarray:
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in network.items()}

    def velocity_fn(latents, timesteps):
        return jnp.tanh(latents @ arrays["kernel"] + timesteps[:, None] / 1000 * arrays["time"])

    run = jax.jit(lambda noise: denoise(velocity_fn, noise, schedule, solver=solver, return_trajectory=True))
    return np.asarray(run(arrays["noise"]))


@pytest.mark.parametrize(("steps", "shift"), RUNS)
def test_unipc_matches_diffusers(network, steps, shift, close):
    reference = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    # Without explicit noise levels diffusers runs on a grid of its own, from 1 to 0.001.
    reference.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])
    schedule = make_schedule("unipc", steps, shift)

    np.testing.assert_array_equal(schedule.timesteps, reference.timesteps.numpy())
    np.testing.assert_allclose(schedule.sigmas, reference.sigmas.numpy(), atol=1e-7)
    trajectory = jax_trajectory("unipc", schedule, network)
    close("UniPC trajectory", trajectory, torch_trajectory(reference, network), TOLERANCE)


@pytest.mark.parametrize(("steps", "shift"), RUNS)
def test_dpmpp_matches_diffusers(network, steps, shift, close):
    reference = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero"
    )
    reference.set_timesteps(steps)
    schedule = make_schedule("dpm++", steps, shift)
    # diffusers has this solver but not the official grid, which starts at pure noise.
    reference.sigmas = torch.from_numpy(schedule.sigmas)
    reference.timesteps = torch.from_numpy(schedule.timesteps.astype(np.int64))
    reference.set_begin_index(0)

    trajectory = jax_trajectory("dpm++", schedule, network)
    close("DPM-Solver++ trajectory", trajectory, torch_trajectory(reference, network), TOLERANCE)


@pytest.mark.parametrize(("steps", "shift"), RUNS)
def test_euler_matches_diffusers(network, steps, shift, close):
    reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    # Explicit noise levels are shifted once; without them diffusers shifts its end points as well.
    reference.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    schedule = make_schedule("euler", steps, shift)

    np.testing.assert_allclose(schedule.timesteps, reference.timesteps.numpy(), rtol=1e-6)
    np.testing.assert_allclose(schedule.sigmas, reference.sigmas.numpy(), rtol=1e-6)
    trajectory = jax_trajectory("euler", schedule, network)
    close("Euler trajectory", trajectory, torch_trajectory(reference, network), TOLERANCE)
