"""From noise to latents: a schedule, a solver and a guidance over any velocity function.

`denoise` is plain JAX: call it inside the caller's `jax.jit`. The schedule and the guidance weights are host values and
become constants of that program; a velocity function closes over params and conditioning, which should be arguments of it.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from magref_jax.diffusion.flow import Schedule
from magref_jax.diffusion.solvers import SOLVERS

# (latents, timesteps) -> velocity, which may have any float dtype
VelocityFn: TypeAlias = Callable[[Float[Array, "B *rest"], Float[Array, "B"]], Float[Array, "B *rest"]]


def guidance_branches(guidance_scale: float) -> dict[str, float]:
    """Classifier-free guidance u + s·(c − u) as a weight per branch; a branch of weight 0 is left out."""
    weights = {"conditional": float(guidance_scale), "unconditional": 1.0 - guidance_scale}
    return {branch: weight for branch, weight in weights.items() if weight}


def guide(velocity_fns: Mapping[str, VelocityFn], weights: Mapping[str, float]) -> VelocityFn:
    """The weighted sum of the named branches, float32. A branch of weight 0 is not evaluated.

    Raises:
        ValueError: a weighted branch has no velocity function, or the weights do not add up to 1.
    """
    weights = {branch: weight for branch, weight in weights.items() if weight}
    unknown = sorted(set(weights) - set(velocity_fns))
    if unknown:
        raise ValueError(f"guidance names the branch {unknown[0]!r}; velocity_fn has {', '.join(velocity_fns)}.")
    if not np.isclose(sum(weights.values()), 1.0):
        raise ValueError(f"guidance={weights} must add up to 1, or the result is no velocity.")
    # Relative to the last branch, u + s·(c − u): rounds like the official code, and one branch alone stays bitwise itself.
    *others, base = weights

    def velocity_fn(latents, timesteps):
        origin = velocity_fns[base](latents, timesteps).astype(jnp.float32)
        velocity = origin
        for branch in others:
            velocity += weights[branch] * (velocity_fns[branch](latents, timesteps).astype(jnp.float32) - origin)
        return velocity

    return velocity_fn


def denoise(
    velocity_fn: VelocityFn | Mapping[str, VelocityFn],
    noise: Float[Array, "B *rest"],
    schedule: Schedule,
    *,
    solver: str = "unipc",
    guidance: Mapping[str, float] | None = None,
    on_step: Callable[[int], None] | None = None,
    return_trajectory: bool = False,
) -> Float[Array, "B *rest"] | Float[Array, "N B *rest"]:
    """Clean latents, float32, from noise at the first noise level of `schedule`.

    `velocity_fn` is one function, or one per branch of `guidance` (see `guidance_branches`). `on_step(i)` is called on the
    host after step i. `return_trajectory` returns the latents after every step, stacked, in place of the last ones.

    Raises:
        ValueError: the solver is unknown, or the guidance does not fit the velocity functions.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown; choose from {', '.join(SOLVERS)}.")
    rule = SOLVERS[solver]
    if isinstance(velocity_fn, Mapping):
        velocity_fn = guide(velocity_fn, {"conditional": 1.0} if guidance is None else guidance)
    elif guidance is not None:
        raise ValueError(
            f"guidance={dict(guidance)} needs a velocity function per branch; velocity_fn is one function."
        )

    def step(state, inputs):
        index, timestep, coefficients = inputs
        timesteps = jnp.broadcast_to(timestep, noise.shape[:1])
        state = rule.step(coefficients, state, velocity_fn(state.latents, timesteps))
        if on_step is not None:
            # The barrier makes the index wait for the latents: a report is of work done. That also keeps reports in the
            # order of the steps; `ordered=True` would not run on more than one device.
            index, _ = jax.lax.optimization_barrier((index, state.latents))
            jax.debug.callback(lambda i: on_step(int(i)), index, ordered=False)
        return state, state.latents if return_trajectory else None

    inputs = (np.arange(schedule.num_inference_steps), schedule.timesteps, rule.coefficients(schedule))
    state, trajectory = jax.lax.scan(step, rule.init(noise), inputs)
    return state.latents if trajectory is None else trajectory
