"""Training state, losses and steps of the two stages: the VAE, then the DiT on top of it with everything else frozen.

A stage is a curriculum of phases. Batch i of a stage depends on (seed, i) alone and all randomness of step i on
(key, i), so that a run that was cut off continues with the very numbers it would have had.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from magref_jax.checkpoint import Params
from magref_jax.conditioning.inputs import Conditioning, drop_references, drop_text
from magref_jax.config import DType, ModelConfig
from magref_jax.data.emoji_world import EmojiWorldConfig
from magref_jax.diffusion import flow
from magref_jax.models import vae
from magref_jax.pipeline import velocity_fn


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW: linear warm-up, then a cosine down to `final_fraction` of the peak at the end of the stage."""

    learning_rate: float = 1e-3
    warmup_steps: int = 200
    final_fraction: float = 0.05
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999


@dataclasses.dataclass(frozen=True)
class VAEPhase:
    num_steps: int
    batch_size: int
    num_frames: int  # 1, or temporal_stride·n + 1
    crop: int | None  # pixels, a multiple of the spatial stride; None trains on whole frames


@dataclasses.dataclass(frozen=True)
class VAETraining:
    phases: tuple[VAEPhase, ...]
    optimizer: OptimizerConfig
    num_clips: int = 3000  # rendered once, then cropped at random
    kl_weight: float = 1e-4
    grey_fraction: float = 0.1  # clips that are a canvas followed by grey, as reference latents are made


@dataclasses.dataclass(frozen=True)
class DiTPhase:
    num_steps: int
    batch_size: int
    num_latent_frames: int  # the canvas and, drawn anew for every batch, some of the others: fewer are cheaper
    reach: int | None = None  # latent frames from the start of a clip to draw from: early ones are easier; None: all
    max_references: int = 4  # clips with more are left out: one is the easiest to learn to copy


@dataclasses.dataclass(frozen=True)
class DiTTraining:
    phases: tuple[DiTPhase, ...]
    optimizer: OptimizerConfig
    dtype: DType = "float32"  # of the DiT's matmuls in training; the model folder says its own
    num_clips: int = 10000  # encoded once
    first_frame_target: Literal["canvas", "video"] = "canvas"
    distribution: flow.Distribution = "logit_normal"
    flow_shift: float = 1.0
    subject_weight: float = 1.0  # of latent cells that show a subject in the loss, against 1 elsewhere
    text_dropout: float = 0.1
    reference_dropout: float = 0.05
    injection_dropout: float = 0.1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    model: ModelConfig
    data: EmojiWorldConfig
    vae: VAETraining
    dit: DiTTraining
    save_dtype: DType = "float32"  # of the model folder; checkpoints are float32
    seed: int = 0
    checkpoint_every: int = 500  # steps
    log_every: int = 50  # steps


@flax.struct.dataclass
class TrainState:
    step: Array  # scalar int32
    params: Params
    ema: Params
    optimizer_state: optax.OptState


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        min(config.warmup_steps, max(1, num_steps // 2)),
        num_steps,
        config.learning_rate * config.final_fraction,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        # Norm scales, biases and modulation are not decayed.
        optax.adamw(
            schedule,
            config.b1,
            config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params),
        ),
    )


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    # The step donates its state, so the average needs buffers of its own.
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def apply_gradients(
    state: TrainState, gradients: Params, optimizer: optax.GradientTransformation, ema_decay: float
) -> TrainState:
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    # A young average forgets its random start quickly.
    decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
    ema = optax.incremental_update(params, state.ema, 1 - decay)
    return TrainState(step, params, ema, optimizer_state)


Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]


def make_vae_step(config: TrainConfig, optimizer: optax.GradientTransformation) -> TrainStep:
    """A step on frames [B F H W 3] in [-1, 1]: L1 + L2 reconstruction and a small KL to the unit normal."""
    model, stage = vae.VAE(config.model.vae), config.vae

    def loss_fn(params: Params, frames: Array, key: jax.Array) -> tuple[Array, Metrics]:
        stride, latent_frames = config.model.vae.spatial_stride, config.model.vae.num_latent_frames(frames.shape[1])
        batch, _, height, width, _ = frames.shape
        shape = (batch, latent_frames, height // stride, width // stride, config.model.vae.latent_channels)
        output, mean, log_variance = model.apply({"params": params}, frames, jax.random.normal(key, shape))
        squared = jnp.mean(jnp.square(output - frames))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
        loss = jnp.mean(jnp.abs(output - frames)) + squared + stage.kl_weight * kl
        return loss, {"loss": loss, "psnr": 10 * jnp.log10(4 / squared), "kl": kl}

    def step(state: TrainState, frames: Array, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.params, frames, key)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        return apply_gradients(state, gradients, optimizer, stage.optimizer.ema_decay), metrics

    return jax.jit(step, donate_argnums=0)


@flax.struct.dataclass
class Batch:
    """Clean latents, where the subjects are in them, and what they are conditioned on."""

    clean_latents: Float[Array, "B F H W C"]
    subject_cells: Float[Array, "B F H W"]  # 1 where a subject is
    conditioning: Conditioning
    frame_positions: tuple[int, ...] = flax.struct.field(pytree_node=False)  # of the latent frames in their clips


@flax.struct.dataclass
class Null:
    """What dropped conditioning is replaced by, without a batch axis."""

    text_embeddings: Float[Array, "T D"]
    reference_latents: Float[Array, "F H W C"]
    image_embeddings: Float[Array, "I E"] | None


def drop_conditioning(batch: Batch, null: Null, stage: DiTTraining, key: jax.Array) -> Conditioning:
    """Independently per sample: no text (what guidance needs), no references, no injection."""
    conditioning = batch.conditioning
    keep_text, keep_references, keep_injection = (
        ~jax.random.bernoulli(subkey, rate, (len(conditioning.text_embeddings),))
        for subkey, rate in zip(
            jax.random.split(key, 3),
            (stage.text_dropout, stage.reference_dropout, stage.injection_dropout),
            strict=True,
        )
    )
    conditioning = drop_text(conditioning, keep_text, null.text_embeddings)
    if conditioning.reference_latents is not None:
        blank = null.reference_latents[jnp.array(batch.frame_positions)]
        conditioning = drop_references(conditioning, keep_references, blank, null.image_embeddings)
    if conditioning.subject_tokens is not None:
        tokens = conditioning.subject_tokens * keep_injection[:, None, None]
        conditioning = dataclasses.replace(conditioning, subject_tokens=tokens)
    return conditioning


def dit_loss(config: TrainConfig, params: Params, batch: Batch, null: Null, key: jax.Array) -> tuple[Array, Metrics]:
    """Flow matching: the velocity at a random noise level per clip, squared error, a mean weighted toward subjects."""
    stage = config.dit
    drop_key, sigma_key, noise_key = jax.random.split(key, 3)
    conditioning = drop_conditioning(batch, null, stage, drop_key)
    clean = batch.clean_latents.astype(jnp.float32)
    sigmas = flow.sample_sigmas(
        sigma_key, clean.shape[:1], distribution=stage.distribution, flow_shift=stage.flow_shift
    )
    noise = jax.random.normal(noise_key, clean.shape)
    velocity = velocity_fn(config.model, params, conditioning, batch.frame_positions)(
        flow.interpolate(clean, noise, sigmas), flow.to_timesteps(sigmas)
    )
    error = jnp.square(velocity - flow.velocity_target(clean, noise)).mean(-1)
    weights = 1 + (stage.subject_weight - 1) * batch.subject_cells
    loss = jnp.sum(weights * error) / jnp.sum(weights)
    on_subjects = jnp.sum(batch.subject_cells * error) / jnp.maximum(jnp.sum(batch.subject_cells), 1)
    return loss, {"loss": loss, "loss_video": error[:, 1:].mean(), "loss_subjects": on_subjects}


def make_dit_step(config: TrainConfig, optimizer: optax.GradientTransformation, null: Null) -> TrainStep:
    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        gradients, metrics = jax.grad(dit_loss, argnums=1, has_aux=True)(config, state.params, batch, null, key)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        return apply_gradients(state, gradients, optimizer, config.dit.optimizer.ema_decay), metrics

    return jax.jit(step, donate_argnums=0)
