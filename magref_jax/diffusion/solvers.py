"""Solvers of dx/dσ = v(x, σ) as pure functions: `init(latents) -> state`, `step(coefficients, state, velocity) -> state`.

Every solver is a linear recurrence in the latents and the clean latents m_i = x_i − σ_i·v_i of the last steps. Its
coefficients depend on the schedule alone, so they are tabulated on the host in float64, where infinite log-ratios
cost nothing, and the loop over steps is a `lax.scan` over the rows of the table.

    α = 1 − σ        λ = ln(α / σ)        h = λ_{i+1} − λ_i        φ = e^{−h} − 1

euler   x_{i+1} = x_i + (σ_{i+1} − σ_i)·v_i
dpm++   DPM-Solver++ 2M, arXiv:2211.01095, as in wan/utils/fm_solvers.py of Wan-Video/Wan2.1
unipc   UniPC of order 2 with B(h) = φ, arXiv:2302.04867, as in wan/utils/fm_solvers_unipc.py of Wan-Video/Wan2.1

The state is float32 whatever dtype the model runs in.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from magref_jax.diffusion.flow import Schedule

Table: TypeAlias = np.ndarray | Array  # all rows on the host, or one row inside the scan


class EulerCoefficients(NamedTuple):
    sigma_step: Float[Table, "*N"]


class EulerState(NamedTuple):
    latents: Float[Array, "B *rest"]


class DPMppCoefficients(NamedTuple):
    sigma: Float[Table, "*N"]
    predictor: Float[Table, "*N 3"]  # of x_i, m_i, m_{i−1}


class DPMppState(NamedTuple):
    latents: Float[Array, "B *rest"]  # x_i
    clean: Float[Array, "B *rest"]  # m_{i−1}


class UniPCCoefficients(NamedTuple):
    sigma: Float[Table, "*N"]
    corrector: Float[Table, "*N 4"]  # of the corrected x_{i−1}, m_i, m_{i−1}, m_{i−2}
    predictor: Float[Table, "*N 3"]  # of the corrected x_i, m_i, m_{i−1}


class UniPCState(NamedTuple):
    latents: Float[Array, "B *rest"]  # x_i as predicted; the velocity is evaluated here
    corrected: Float[Array, "B *rest"]  # x_{i−1} after correction
    clean: tuple[Float[Array, "B *rest"], Float[Array, "B *rest"]]  # m_{i−1}, m_{i−2}


def euler_coefficients(schedule: Schedule) -> EulerCoefficients:
    sigmas = schedule.sigmas.astype(np.float64)
    return EulerCoefficients(_float32(np.diff(sigmas)))


def euler_init(latents: Float[Array, "B *rest"]) -> EulerState:
    return EulerState(latents.astype(jnp.float32))


def euler_step(coefficients: EulerCoefficients, state: EulerState, velocity: Float[Array, "B *rest"]) -> EulerState:
    return EulerState(state.latents + coefficients.sigma_step * velocity.astype(jnp.float32))


def dpmpp_coefficients(schedule: Schedule) -> DPMppCoefficients:
    sigmas = schedule.sigmas.astype(np.float64)
    return DPMppCoefficients(_float32(sigmas[:-1]), _float32(_predictor(sigmas)))


def dpmpp_init(latents: Float[Array, "B *rest"]) -> DPMppState:
    latents = latents.astype(jnp.float32)
    return DPMppState(latents, jnp.zeros_like(latents))


def dpmpp_step(coefficients: DPMppCoefficients, state: DPMppState, velocity: Float[Array, "B *rest"]) -> DPMppState:
    clean = state.latents - coefficients.sigma * velocity.astype(jnp.float32)
    return DPMppState(_combine(coefficients.predictor, state.latents, clean, state.clean), clean)


def unipc_coefficients(schedule: Schedule) -> UniPCCoefficients:
    sigmas = schedule.sigmas.astype(np.float64)
    return UniPCCoefficients(_float32(sigmas[:-1]), _float32(_corrector(sigmas)), _float32(_predictor(sigmas)))


def unipc_init(latents: Float[Array, "B *rest"]) -> UniPCState:
    latents = latents.astype(jnp.float32)
    return UniPCState(latents, latents, (jnp.zeros_like(latents), jnp.zeros_like(latents)))


def unipc_step(coefficients: UniPCCoefficients, state: UniPCState, velocity: Float[Array, "B *rest"]) -> UniPCState:
    # m_i is not evaluated again after the correction: a step costs one velocity.
    clean = state.latents - coefficients.sigma * velocity.astype(jnp.float32)
    corrected = _combine(coefficients.corrector, state.corrected, clean, *state.clean)
    latents = _combine(coefficients.predictor, corrected, clean, state.clean[0])
    return UniPCState(latents, corrected, (clean, state.clean[0]))


@dataclasses.dataclass(frozen=True)
class Solver:
    """One update rule. `coefficients` has a leading axis N in every leaf; `step` takes one row of it."""

    coefficients: Callable[[Schedule], Any]
    init: Callable[[Float[Array, "B *rest"]], Any]
    step: Callable[[Any, Any, Float[Array, "B *rest"]], Any]


SOLVERS: dict[str, Solver] = {
    "unipc": Solver(unipc_coefficients, unipc_init, unipc_step),
    "dpm++": Solver(dpmpp_coefficients, dpmpp_init, dpmpp_step),
    "euler": Solver(euler_coefficients, euler_init, euler_step),
}


def _predictor(sigmas: Float[np.ndarray, "N+1"]) -> Float[np.ndarray, "N 3"]:
    """x_{i+1} = (σ_{i+1}/σ_i)·x_i − α_{i+1}·φ·(m_i + ½·(m_i − m_{i−1})/r), r = (λ_i − λ_{i−1})/h.

    The first and the last step leave out the difference. UniPC and DPM-Solver++ share this rule.
    """
    lambdas, num_steps = _log_ratio(sigmas), len(sigmas) - 1
    rows = np.zeros((num_steps, 3))
    for i in range(num_steps):
        h = lambdas[i + 1] - lambdas[i]
        gain = -(1 - sigmas[i + 1]) * np.expm1(-h)
        # r is infinite where the schedule starts at σ = 1, and the second step is then of first order too.
        slope = gain / 2 * h / (lambdas[i] - lambdas[i - 1]) if 0 < i < num_steps - 1 else 0.0
        rows[i] = sigmas[i + 1] / sigmas[i], gain + slope, -slope
    return rows


def _corrector(sigmas: Float[np.ndarray, "N+1"]) -> Float[np.ndarray, "N 4"]:
    """The corrected x_i = (σ_i/σ_{i−1})·x_{i−1} − α_i·φ·(m_{i−1} + ρ₁·(m_{i−2} − m_{i−1})/r + ρ₂·(m_i − m_{i−1})).

    h and φ are those of the step from i−1 to i, and r = (λ_{i−2} − λ_{i−1})/h. ρ solves ρ₁ + ρ₂ = b₁, r·ρ₁ + ρ₂ = b₂;
    the second step has no m_{i−2} and takes ρ₂ = ½. The first has nothing to correct.
    """
    lambdas, num_steps = _log_ratio(sigmas), len(sigmas) - 1
    rows = np.zeros((num_steps, 4))
    rows[0, 0] = 1
    for i in range(1, num_steps):
        h = lambdas[i] - lambdas[i - 1]
        phi = np.expm1(-h)
        oldest, newest = 0.0, 0.5
        if i > 1:
            r = (lambdas[i - 2] - lambdas[i - 1]) / h
            b1 = (-phi / h - 1) / phi
            b2 = 2 * ((phi / h + 1) / h - 0.5) / phi
            rho = (b2 - b1) / (r - 1)
            oldest, newest = rho / r, b1 - rho
        gain = -(1 - sigmas[i]) * phi
        rows[i] = sigmas[i] / sigmas[i - 1], gain * newest, gain * (1 - oldest - newest), gain * oldest
    return rows


def _log_ratio(sigmas: Float[np.ndarray, "N+1"]) -> Float[np.ndarray, "N+1"]:
    with np.errstate(divide="ignore"):  # −∞ at σ = 1, +∞ at σ = 0
        return np.log1p(-sigmas) - np.log(sigmas)


def _float32(table: Float[np.ndarray, "N *k"]) -> Float[np.ndarray, "N *k"]:
    return table.astype(np.float32)


def _combine(weights: Float[Table, "k"], *terms: Float[Array, "B *rest"]) -> Float[Array, "B *rest"]:
    return sum((weight * term for weight, term in zip(weights, terms, strict=True)), start=jnp.float32(0))
