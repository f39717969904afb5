"""From noise to latents: a schedule, a solver and a guidance over any velocity function.

`denoise` is the whole loop. `start` and `advance` are the same loop in pieces, so that a program on the host can report
progress, look at the latents or stop between any two steps: `advance` takes the step to stop at as an array, so that one
compiled program serves every piece. No piece calls back to the host; programs that do cannot be kept in JAX's persistent
compilation cache.

All are plain JAX: call them inside the caller's `jax.jit`. The schedule and the guidance weights are host values and
become constants of that program; a velocity function closes over params and conditioning, which should be arguments of it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int32

from magref_jax.descriptions import short_repr
from magref_jax.diffusion.flow import Schedule
from magref_jax.diffusion.solvers import SOLVERS
from magref_jax.diffusion.step_cache import StepPlan

# (latents, timesteps) -> velocity, which may have any float dtype
VelocityFn: TypeAlias = Callable[[Float[Array, "B *rest"], Float[Array, "B"]], Float[Array, "B *rest"]]

FINITE = -1  # `SamplingState.failed_step` of a sample that is well


@short_repr
@struct.dataclass
class SamplingState:
    """A sampling run between two steps."""

    step: Int32[Array, ""]  # the next one
    solver: Any
    velocity: Float[Array, "B *rest"]  # guided, of the last step; float32
    evaluated: tuple[
        Float[Array, "B *rest"], Float[Array, "B *rest"]
    ]  # the last two that the network gave, newest first
    failed_step: Int32[Array, "B"]  # the first step after which a sample's latents were not finite, or FINITE

    @property
    def latents(self) -> Float[Array, "B *rest"]:
        return self.solver.latents


class PlanArrays(NamedTuple):
    """A step plan as arguments of a program, so that another plan is not another compilation."""

    evaluate: Bool[np.ndarray | Array, "N"]
    weights: Float[np.ndarray | Array, "N 2"]


def check_plan(plan: StepPlan | PlanArrays | None, num_steps: int) -> None:
    """Refuses a plan for another number of solver steps."""
    if plan is not None and len(plan.evaluate) != num_steps:
        raise ValueError(f"step_plan is for {len(plan.evaluate)} steps, the schedule has {num_steps}.")


def plan_arrays(plan: StepPlan | None) -> PlanArrays | None:
    """None where the network is evaluated in every step: that program needs no choice."""
    if plan is None or all(plan.evaluate):
        return None
    return PlanArrays(np.asarray(plan.evaluate), np.asarray(plan.weights, np.float32))


def guidance_branches(guidance_scale: float, reference_guidance_scale: float | None = 1.0) -> dict[str, float]:
    """Guidance b + r·(u − b) + s·(c − u) as a weight per branch; a branch of weight 0 is left out.

    c sees prompt and references, u (`unconditional`) the references alone, b (`blank`) neither; s and r are the scales of
    prompt and references. r = 1 is classifier-free guidance u + s·(c − u), r = s (None) that of both at once, b + s·(c − b),
    for as much work. Two scales: InstructPix2Pix, arXiv:2211.09800; for references of a video: Phantom, arXiv:2502.11079.
    """
    of_references = guidance_scale if reference_guidance_scale is None else reference_guidance_scale
    weights = {
        "conditional": float(guidance_scale),
        "unconditional": float(of_references) - guidance_scale,
        "blank": 1.0 - of_references,
    }
    return {branch: weight for branch, weight in weights.items() if weight}


def guide(velocity_fn: VelocityFn, weights: Mapping[str, float]) -> VelocityFn:
    """The weighted sum of K branches, float32.

    `velocity_fn` is asked for all of them at once: a batch of K·B, branch after branch in the order of `weights`, from which
    branches of weight 0 are left out. So a mesh may hold the branches of one sample on different devices.

    Raises:
        ValueError: the weights do not add up to 1.
    """
    weights = {branch: weight for branch, weight in weights.items() if weight}
    if not np.isclose(sum(weights.values()), 1.0):
        raise ValueError(f"guidance={weights} must add up to 1, or the result is no velocity.")
    # Relative to the last branch, u + s·(c − u): rounds like the official code, and one branch alone stays bitwise itself.
    *others, _ = weights

    def guided(latents, timesteps):
        repeats = (len(weights), *[1] * (latents.ndim - 1))
        velocity = velocity_fn(jnp.tile(latents, repeats), jnp.tile(timesteps, len(weights))).astype(jnp.float32)
        *branches, base = jnp.split(velocity, len(weights))
        for branch, of_branch in zip(others, branches, strict=True):
            velocity = (velocity if branch != others[0] else base) + weights[branch] * (of_branch - base)
        return velocity

    return guided


def start(noise: Float[Array, "B *rest"], solver: str = "unipc") -> SamplingState:
    """The state before the first step.

    Raises:
        ValueError: the solver is unknown.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown; choose from {', '.join(SOLVERS)}.")
    nothing = jnp.zeros(noise.shape, jnp.float32)
    return SamplingState(
        step=jnp.int32(0),
        solver=SOLVERS[solver].init(noise),
        velocity=nothing,
        evaluated=(nothing, nothing),
        failed_step=jnp.full(noise.shape[:1], FINITE, jnp.int32),
    )


def advance(
    velocity_fn: VelocityFn,
    state: SamplingState,
    schedule: Schedule,
    stop: int | Int32[Array, ""],
    *,
    solver: str = "unipc",
    guidance: Mapping[str, float] | None = None,
    step_plan: StepPlan | PlanArrays | None = None,
) -> SamplingState:
    """The state before step `stop`. See `denoise`."""
    step = _step_fn(velocity_fn, schedule, solver, guidance, step_plan)
    return jax.lax.fori_loop(state.step, stop, lambda _, state: step(state), state)


def denoise(
    velocity_fn: VelocityFn,
    noise: Float[Array, "B *rest"],
    schedule: Schedule,
    *,
    solver: str = "unipc",
    guidance: Mapping[str, float] | None = None,
    step_plan: StepPlan | None = None,
    return_trajectory: bool = False,
) -> Float[Array, "B *rest"] | Float[Array, "N B *rest"]:
    """Clean latents, float32, from noise at the first noise level of `schedule`.

    With `guidance`, a weight per branch as `guidance_branches` gives them, `velocity_fn` takes all branches at once; see
    `guide`. `step_plan` says in which steps it is not asked. `return_trajectory` returns the latents after every step,
    stacked, in place of the last ones.

    Raises:
        ValueError: the solver is unknown, the guidance is none, or the plan is for another number of steps.
    """
    state = start(noise, solver)
    step = _step_fn(velocity_fn, schedule, solver, guidance, step_plan)

    def body(state: SamplingState, _: None) -> tuple[SamplingState, Array | None]:
        state = step(state)
        return state, state.latents if return_trajectory else None

    state, trajectory = jax.lax.scan(body, state, length=schedule.num_inference_steps)
    return state.latents if trajectory is None else trajectory


def _step_fn(
    velocity_fn: VelocityFn,
    schedule: Schedule,
    solver: str,
    guidance: Mapping[str, float] | None,
    step_plan: StepPlan | PlanArrays | None,
) -> Callable[[SamplingState], SamplingState]:
    if guidance is not None:
        velocity_fn = guide(velocity_fn, guidance)
    num_steps, rule = schedule.num_inference_steps, SOLVERS[solver]
    check_plan(step_plan, num_steps)
    plan = plan_arrays(step_plan) if isinstance(step_plan, StepPlan) else step_plan
    tables = jax.tree.map(jnp.asarray, (schedule.timesteps, rule.coefficients(schedule)))

    def step(state: SamplingState) -> SamplingState:
        timestep, coefficients = jax.tree.map(lambda table: table[state.step], tables)
        latents = state.latents

        newest, older = state.evaluated

        def evaluate() -> tuple[Array, tuple[Array, Array]]:
            velocity = velocity_fn(latents, jnp.broadcast_to(timestep, latents.shape[:1])).astype(jnp.float32)
            return velocity, (velocity, newest)

        if plan is None:
            velocity, evaluated = evaluate()
        else:
            is_evaluated, weights = (jnp.asarray(table)[state.step] for table in plan)
            velocity, evaluated = jax.lax.cond(
                is_evaluated, evaluate, lambda: (weights[0] * newest + weights[1] * older, state.evaluated)
            )
        solver_state = rule.step(coefficients, state.solver, velocity)
        is_finite = jnp.isfinite(solver_state.latents).all(axis=tuple(range(1, latents.ndim)))
        has_failed_now = (state.failed_step == FINITE) & ~is_finite
        return SamplingState(
            step=state.step + 1,
            solver=solver_state,
            velocity=velocity,
            evaluated=evaluated,
            failed_step=jnp.where(has_failed_now, state.step, state.failed_step),
        )

    return step
