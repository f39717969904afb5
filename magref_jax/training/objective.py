"""What is minimised: flow matching for the DiT, reconstruction for the VAE. Both return sums, see `step.Sums`."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from magref_jax.checkpoint import Params
from magref_jax.conditioning.inputs import Conditioning, drop_references, drop_text
from magref_jax.config import ModelConfig, VAEConfig
from magref_jax.descriptions import short_repr
from magref_jax.diffusion import flow
from magref_jax.models import vae
from magref_jax.pipeline import velocity_fn
from magref_jax.training.config import ObjectiveConfig
from magref_jax.training.step import Sums


@short_repr
@flax.struct.dataclass
class Batch:
    """Clean latents, where the subjects are in them, and what they are conditioned on."""

    clean_latents: Float[Array, "B F H W C"]
    subject_cells: Float[Array, "B F H W"]  # 1 where a subject is
    conditioning: Conditioning
    frame_positions: tuple[int, ...] = flax.struct.field(pytree_node=False)  # of the latent frames in their clips


@short_repr
@flax.struct.dataclass
class Null:
    """What dropped conditioning is replaced by, without a batch axis."""

    text_embeddings: Float[Array, "T D"]
    reference_latents: Float[Array, "F H W C"] | None
    image_embeddings: Float[Array, "I E"] | None


def drop_conditioning(batch: Batch, null: Null, objective: ObjectiveConfig, keys: Key[Array, "B"]) -> Conditioning:
    """Independently per sample: no text, no references, neither of them, no injection."""
    conditioning = batch.conditioning
    kinds = ("text", "reference", "injection", "blank")
    rates = jnp.array([getattr(objective, f"{kind}_dropout") for kind in kinds], jnp.float32)
    kept = ~jax.vmap(lambda key: jax.random.bernoulli(key, rates))(keys)
    keep_text, keep_references, keep_injection, keep_any = kept.T
    keep_text, keep_references = keep_text & keep_any, keep_references & keep_any
    conditioning = drop_text(conditioning, keep_text, null.text_embeddings)
    if conditioning.reference_latents is not None and null.reference_latents is not None:
        blank = null.reference_latents[jnp.array(batch.frame_positions)]
        conditioning = drop_references(conditioning, keep_references, blank, null.image_embeddings)
    if conditioning.subject_tokens is not None:
        tokens = conditioning.subject_tokens * keep_injection[:, None, None]
        conditioning = dataclasses.replace(conditioning, subject_tokens=tokens)
    return conditioning


def flow_matching(
    config: ModelConfig,
    objective: ObjectiveConfig,
    params: Params,
    lora: Params | None,
    null: Null,
    batch: Batch,
    keys: Key[Array, "B"],
) -> Sums:
    """Squared error of the velocity at a random noise level per clip, weighted toward subjects.

    The loss is a mean over latent cells of all samples; `loss_video` leaves out latent frame 0, `loss_subjects` is of the
    cells that show a subject; both are without weights.
    """
    drop_keys, sigma_keys, noise_keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
    batch = dataclasses.replace(batch, conditioning=drop_conditioning(batch, null, objective, drop_keys))
    sigmas = jax.vmap(
        lambda key: flow.sample_sigmas(key, (), distribution=objective.distribution, flow_shift=objective.flow_shift)
    )(sigma_keys)
    return velocity_error(config, objective, params, lora, batch, sigmas, noise_keys)


def velocity_error(
    config: ModelConfig,
    objective: ObjectiveConfig,
    params: Params,
    lora: Params | None,
    batch: Batch,
    sigmas: Float[Array, "B"],
    noise_keys: Key[Array, "B"],
) -> Sums:
    """The sums of `flow_matching` at given noise levels, with nothing dropped."""
    clean = batch.clean_latents.astype(jnp.float32)
    noise = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:], jnp.float32))(noise_keys)
    velocity = velocity_fn(config, params, batch.conditioning, batch.frame_positions, lora=lora)(
        flow.interpolate(clean, noise, sigmas), flow.to_timesteps(sigmas)
    )
    error = jnp.square(velocity - flow.velocity_target(clean, noise)).mean(-1)
    cells = batch.subject_cells.astype(jnp.float32)
    weights = 1 + (objective.subject_weight - 1) * cells
    of_level = flow.loss_weight(sigmas, objective.weighting, flow_shift=objective.flow_shift)
    return {
        # Divided by the weights of the cells alone: levels that weigh little are to contribute little.
        "loss": (jnp.sum(of_level[:, None, None, None] * weights * error), jnp.sum(weights)),
        "loss_video": (jnp.sum(error[:, 1:]), jnp.asarray(error[:, 1:].size, jnp.float32)),
        "loss_subjects": (jnp.sum(cells * error), jnp.sum(cells)),
    }


def reconstruction(
    config: VAEConfig, kl_weight: float, params: Params, frames: Float[Array, "B F H W 3"], keys: Key[Array, "B"]
) -> Sums:
    """L1 + L2 of frames in [-1, 1] and a small KL to the unit normal."""
    batch, length, height, width, _ = frames.shape
    stride = config.spatial_stride
    shape = (config.num_latent_frames(length), height // stride, width // stride, config.latent_channels)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
    output, mean, log_variance = vae.VAE(config).apply({"params": params}, frames, noise)
    count = jnp.asarray(batch, jnp.float32)

    def over_batch(values: Array) -> Array:
        return values.mean(tuple(range(1, values.ndim))).sum()

    squared, absolute = over_batch(jnp.square(output - frames)), over_batch(jnp.abs(output - frames))
    kl = 0.5 * over_batch(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
    return {
        "loss": (absolute + squared + kl_weight * kl, count),
        "squared_error": (squared, count),
        "kl": (kl, count),
    }
