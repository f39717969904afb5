"""Flow matching: what a noise level is, which ones a solver visits, and what the model is trained to predict.

    noisy latents    x_σ = (1 − σ)·x₀ + σ·ε          σ = 1 is noise, σ = 0 is data
    velocity         v   = dx_σ/dσ = ε − x₀          so x₀ = x_σ − σ·v
    timestep         t   = 1000·σ                    what the model is told
    shift            σ'  = s·σ / (1 + (s − 1)·σ)     s > 1 (`flow_shift`) spends more steps near noise

Latents are [B F H W C]. Training sigmas are [B], or [B F] for a noise level of its own per latent frame.

Flow matching: arXiv:2210.02747. Shift and logit-normal sampling: arXiv:2403.03206. Grids: wan/utils of Wan-Video/Wan2.1.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from magref_jax.descriptions import short_repr

Distribution = Literal["uniform", "logit_normal"]
Weighting = Literal["none", "bsmntw"]
Sigmas = TypeVar("Sigmas", bound=np.ndarray | jax.Array)

NUM_TRAIN_TIMESTEPS = 1000


def shift_sigmas(sigmas: Sigmas, flow_shift: float) -> Sigmas:
    """Noise levels moved toward noise by `flow_shift`; its inverse is the shift by 1 / flow_shift."""
    return flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas)  # pyrefly: ignore[bad-return]


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels of one sampling run and the timestep the model is told at each; host arrays."""

    sigmas: Float[np.ndarray, "N+1"]  # strictly falling, the last is 0
    timesteps: Float[np.ndarray, "N"]  # 0..1000

    def __post_init__(self) -> None:
        sigmas = self.sigmas
        if len(sigmas) < 2 or sigmas[0] > 1 or sigmas[-1] != 0 or not (np.diff(sigmas) < 0).all():
            raise ValueError(f"sigmas={sigmas} must fall strictly from at most 1 to exactly 0.")
        if self.timesteps.shape != (len(sigmas) - 1,):
            raise ValueError(f"timesteps={self.timesteps} must be {len(sigmas) - 1}, one fewer than sigmas.")

    @property
    def num_inference_steps(self) -> int:
        return len(self.timesteps)


def schedule_from_sigmas(
    sigmas: Sequence[float] | Float[np.ndarray, "N"], flow_shift: float = 1.0, *, truncate: bool = False
) -> Schedule:
    """A schedule over the given noise levels, shifted, with the final 0 appended.

    `truncate` cuts the timesteps to whole numbers (it does not round them).
    Distilled models name their few levels directly: `schedule_from_sigmas((1, 0.75, 0.5, 0.25), flow_shift=5)`.

    Raises:
        ValueError: the levels do not fall strictly inside (0, 1], or flow_shift is not positive.
    """
    if not flow_shift > 0:
        raise ValueError(f"flow_shift={flow_shift} must be positive.")
    # float64 until after the cut: float32 moves some of the whole timesteps by one.
    shifted = shift_sigmas(np.asarray(sigmas, np.float64), flow_shift)
    timesteps = shifted * NUM_TRAIN_TIMESTEPS
    return Schedule(
        sigmas=np.append(shifted, 0.0).astype(np.float32),
        timesteps=(np.trunc(timesteps) if truncate else timesteps).astype(np.float32),
    )


def unipc_schedule(num_inference_steps: int, flow_shift: float) -> Schedule:
    """The official UniPC grid: starts at the shifted 0.999, whole timesteps."""
    # The official code keeps its largest noise level in float32, and its timesteps follow from that value.
    return schedule_from_sigmas(_even_sigmas(float(np.float32(0.999)), num_inference_steps), flow_shift, truncate=True)


def dpmpp_schedule(num_inference_steps: int, flow_shift: float) -> Schedule:
    """The official DPM-Solver++ grid: starts at 1, whole timesteps."""
    return schedule_from_sigmas(_even_sigmas(1.0, num_inference_steps), flow_shift, truncate=True)


def euler_schedule(num_inference_steps: int, flow_shift: float) -> Schedule:
    """The plain grid: starts at 1, fractional timesteps."""
    return schedule_from_sigmas(_even_sigmas(1.0, num_inference_steps), flow_shift)


def _even_sigmas(first: float, num_inference_steps: int) -> Float[np.ndarray, "N"]:
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1.")
    return np.linspace(first, 0.0, num_inference_steps + 1)[:-1]


SCHEDULES: dict[str, Callable[[int, float], Schedule]] = {
    "unipc": unipc_schedule,
    "dpm++": dpmpp_schedule,
    "euler": euler_schedule,
}


def make_schedule(solver: str, num_inference_steps: int, flow_shift: float) -> Schedule:
    """The schedule that `solver` runs on in the official code.

    Raises:
        ValueError: the solver is unknown, there are no steps, or flow_shift is not positive.
    """
    if solver not in SCHEDULES:
        raise ValueError(f"solver={solver!r} is unknown; choose from {', '.join(SCHEDULES)}.")
    return SCHEDULES[solver](num_inference_steps, flow_shift)


def to_timesteps(sigmas: Float[Array, "B *F"]) -> Float[Array, "B *F"]:
    """What the model is told in training: 1000·σ, not cut to whole numbers."""
    return NUM_TRAIN_TIMESTEPS * sigmas


def interpolate(
    clean_latents: Float[Array, "B *rest"], noise: Float[Array, "B *rest"], sigmas: Float[Array, "B *F"]
) -> Float[Array, "B *rest"]:
    """Noisy latents x_σ, float32."""
    clean_latents, noise = clean_latents.astype(jnp.float32), noise.astype(jnp.float32)
    sigmas = _broadcast("sigmas", sigmas, clean_latents)
    return (1 - sigmas) * clean_latents + sigmas * noise


def velocity_target(clean_latents: Float[Array, "B *rest"], noise: Float[Array, "B *rest"]) -> Float[Array, "B *rest"]:
    """The velocity ε − x₀ that the model learns, float32."""
    return noise.astype(jnp.float32) - clean_latents.astype(jnp.float32)


def sample_sigmas(
    key: Key[Array, ""],
    shape: tuple[int, ...],
    *,
    distribution: Distribution = "logit_normal",
    flow_shift: float = 3.0,
    mean: float = 0.0,
    std: float = 1.0,
) -> Float[Array, "*shape"]:
    """Random training noise levels: uniform, or the sigmoid of a normal variable with `mean` and `std`; then shifted.

    Raises:
        ValueError: the distribution is unknown.
    """
    if distribution == "uniform":
        sigmas = jax.random.uniform(key, shape, jnp.float32)
    elif distribution == "logit_normal":
        sigmas = jax.nn.sigmoid(mean + std * jax.random.normal(key, shape, jnp.float32))
    else:
        raise ValueError(f"distribution={distribution!r} is unknown; choose from uniform, logit_normal.")
    return shift_sigmas(sigmas, flow_shift)


def loss_weight(
    sigmas: Float[Array, "*shape"], weighting: Weighting = "none", *, flow_shift: float = 1.0
) -> Float[Array, "*shape"]:
    """The weight of each noise level in the loss, with mean 1 over uniform noise levels shifted by `flow_shift`.

    "bsmntw" favours the middle: exp(−2·(σ − ½)²), lowered so that pure noise weighs 0. DiffSynth-Studio.

    Raises:
        ValueError: the weighting is unknown.
    """
    if weighting == "none":
        return jnp.ones_like(sigmas)
    if weighting != "bsmntw":
        raise ValueError(f"weighting={weighting!r} is unknown; choose from none, bsmntw.")

    def bell(levels):
        return jnp.exp(jnp.asarray(-2 * (levels - 0.5) ** 2, jnp.float32)) - math.exp(-0.5)

    # Normalised over the fixed training grid: a batch's own mean would be 0/0 for a batch of one.
    grid = shift_sigmas(np.linspace(1, 0, NUM_TRAIN_TIMESTEPS + 1)[:-1], flow_shift)
    return bell(sigmas) / bell(grid).mean()


def _broadcast(name: str, values: Float[Array, "B *F"], latents: Float[Array, "B *rest"]) -> Float[Array, "B *ones"]:
    if values.shape != latents.shape[: values.ndim]:
        raise ValueError(
            f"{name} has shape {values.shape}; latents of shape {latents.shape} need {latents.shape[:1]}"
            f" or {latents.shape[:2]}."
        )
    return values.reshape(values.shape + (1,) * (latents.ndim - values.ndim))
