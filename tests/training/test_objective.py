"""Losses and dropout against closed forms: a network whose last layer is zero predicts nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax import pipeline
from magref_jax.conditioning.inputs import Conditioning
from magref_jax.diffusion import flow
from magref_jax.training import objective as objectives
from magref_jax.training.config import ObjectiveConfig
from magref_jax.training.step import sum_gradients
from tests.tiny_model import CONFIG, random_params

DIT = CONFIG.dit
PLAIN = ObjectiveConfig(text_dropout=0, reference_dropout=0, blank_dropout=0, injection_dropout=0)


def batch_and_null(size: int) -> tuple[objectives.Batch, objectives.Null]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jnp.ndarray:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    conditioning = Conditioning(
        text_embeddings=normal(size, DIT.text_len, DIT.text_dim),
        image_embeddings=normal(size, 5, DIT.image_dim),
        reference_latents=normal(size, 2, 4, 4, 16),
        region_mask=jnp.ones((size, 2, 4, 4, 4)),
        subject_tokens=jnp.ones((size, 2, DIT.text_len)),
        subject_regions=jnp.ones((size, 2, 4)),
    )
    null = objectives.Null(normal(DIT.text_len, DIT.text_dim), normal(5, 4, 4, 16), normal(5, DIT.image_dim))
    subject_cells = jnp.asarray(rng.random((size, 2, 4, 4)) < 0.5, jnp.float32)
    return objectives.Batch(normal(size, 2, 4, 4, 16), subject_cells, conditioning, (0, 3)), null


def keys(size: int) -> jax.Array:
    return jax.random.split(jax.random.key(1), size)


def drop(stage: ObjectiveConfig) -> tuple:
    """512 samples before and after, and of which of them text and references were dropped."""
    batch, null = batch_and_null(512)
    dropped = objectives.drop_conditioning(batch, null, stage, keys(512))
    text = np.all(dropped.text_embeddings == null.text_embeddings, axis=(1, 2))
    references = np.all(dropped.region_mask == 0, axis=(1, 2, 3, 4))
    return batch, null, dropped, text, references


@pytest.mark.parametrize("rates", [(0.2, 0.3, 0.4), (0.8, 0.3, 0.4)])
def test_dropout_is_per_sample_and_at_the_asked_rates(rates):
    text_rate, reference_rate, injection_rate = rates
    stage = ObjectiveConfig(
        text_dropout=text_rate,
        reference_dropout=reference_rate,
        blank_dropout=0,
        injection_dropout=injection_rate,
    )
    batch, null, dropped, text, references = drop(stage)
    injection = np.all(dropped.subject_tokens == 0, axis=(1, 2))
    # Three standard deviations of a share of 512 at p <= 0.5 are 0.066.
    np.testing.assert_allclose([text.mean(), references.mean()], [text_rate, reference_rate], atol=0.066)
    np.testing.assert_allclose(injection.mean(), 1 - (1 - text_rate) * (1 - injection_rate), atol=0.066)
    # Each is drawn for itself.
    np.testing.assert_allclose(np.mean(text & references), text_rate * reference_rate, atol=0.066)
    np.testing.assert_array_equal(
        dropped.reference_latents[references],
        np.broadcast_to(null.reference_latents[np.array([0, 3])], (references.sum(), 2, 4, 4, 16)),
    )
    np.testing.assert_array_equal(
        dropped.reference_latents[~references], batch.conditioning.reference_latents[~references]
    )


def test_blank_dropout_takes_text_and_references_together():
    stage = ObjectiveConfig(text_dropout=0, reference_dropout=0, blank_dropout=0.3, injection_dropout=0)
    *_, text, references = drop(stage)
    np.testing.assert_array_equal(text, references)
    np.testing.assert_allclose(text.mean(), 0.3, atol=0.066)


def zero_model() -> dict:
    return jax.jit(lambda key: pipeline.init_params(CONFIG, key, only=("dit",))["dit"])(jax.random.key(0))


def means(objective: ObjectiveConfig, params: dict, size: int = 8) -> dict[str, float]:
    batch, null = batch_and_null(size)
    sums = jax.jit(lambda params: objectives.flow_matching(CONFIG, objective, params, None, null, batch, keys(size)))(
        params
    )
    return {name: float(total / count) for name, (total, count) in sums.items()}


def squared_targets(size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Squares of noise − latents, and where subjects are."""
    batch, _ = batch_and_null(size)
    noise = jnp.stack([jax.random.normal(jax.random.split(key, 3)[2], (2, 4, 4, 16)) for key in keys(size)])
    return np.asarray(noise - batch.clean_latents) ** 2, np.asarray(batch.subject_cells, bool)


def test_loss_of_the_zero_model_is_the_mean_square_of_the_target():
    squared, cells = squared_targets()
    found = means(PLAIN, zero_model())
    np.testing.assert_allclose(found["loss"], squared.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["loss_video"], squared[:, 1:].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["loss_subjects"], squared[cells].mean(), rtol=1e-5)


def test_subjects_weigh_what_was_asked():
    squared, cells = squared_targets()
    found = means(dataclasses.replace(PLAIN, subject_weight=3.0), zero_model())
    expected = (3 * squared[cells].sum() + squared[~cells].sum()) / (3 * cells.sum() + (~cells).sum()) / 16
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)


def test_noise_levels_weigh_what_was_asked():
    squared, _ = squared_targets()
    objective = dataclasses.replace(PLAIN, weighting="bsmntw", distribution="uniform", flow_shift=5.0)
    sigmas = np.array([float(jax.random.uniform(jax.random.split(key, 3)[1], ())) for key in keys(8)])
    sigmas = 5 * sigmas / (1 + 4 * sigmas)

    def bell(levels: np.ndarray) -> np.ndarray:
        return np.exp(-2 * (levels - 0.5) ** 2) - np.exp(-0.5)

    grid = np.linspace(1, 0, 1001)[:-1]
    weights = bell(sigmas) / bell(5 * grid / (1 + 4 * grid)).mean()
    found = means(objective, zero_model())
    np.testing.assert_allclose(found["loss"], np.mean(weights * squared.mean((1, 2, 3, 4))), rtol=1e-4)


def test_the_network_sees_the_noisy_latents_and_their_timestep():
    params = random_params(CONFIG)["dit"]
    batch, _ = batch_and_null(2)
    sigmas = jnp.array([0.2, 0.9])
    noise_keys = keys(2)
    sums = jax.jit(lambda params: objectives.velocity_error(CONFIG, PLAIN, params, None, batch, sigmas, noise_keys))(
        params
    )
    noise = jnp.stack([jax.random.normal(key, (2, 4, 4, 16)) for key in noise_keys])
    levels = sigmas[:, None, None, None, None]
    noisy = (1 - levels) * batch.clean_latents + levels * noise
    velocity = jax.jit(pipeline.velocity_fn(CONFIG, params, batch.conditioning, (0, 3)))(noisy, 1000 * sigmas)
    expected = np.mean(np.square(velocity - (noise - batch.clean_latents)))
    total, count = sums["loss"]
    np.testing.assert_allclose(total / count, expected, rtol=1e-5)


def test_four_parts_of_two_are_a_batch_of_eight():
    """Of the real network, with weights that differ from part to part and something dropped in most."""
    objective = ObjectiveConfig(subject_weight=5.0, text_dropout=0.3, reference_dropout=0.3, injection_dropout=0.3)
    params = random_params(CONFIG)["dit"]
    batch, null = batch_and_null(8)

    def loss(params, null, batch, keys):
        return objectives.flow_matching(CONFIG, objective, params, None, null, batch, keys)

    results = [
        jax.jit(lambda params, parts=parts: sum_gradients(loss, params, null, batch, keys(8), parts))(params)
        for parts in (1, 4)
    ]
    (whole, whole_metrics), (parts, part_metrics) = results
    np.testing.assert_allclose(part_metrics["loss"], whole_metrics["loss"], rtol=1e-5)
    norm = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole))
    assert norm > 0
    for one, other in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()) + 1e-9)


def test_reconstruction_of_the_vae_is_a_mean_over_samples():
    config = CONFIG.vae
    params = random_params(CONFIG)["vae"]
    frames = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 3, 8, 8, 3)), jnp.float32)
    both = objectives.reconstruction(config, 0.5, params, frames, keys(2))
    each = [objectives.reconstruction(config, 0.5, params, frames[i : i + 1], keys(2)[i : i + 1]) for i in range(2)]
    for name, (total, count) in both.items():
        assert float(count) == 2
        np.testing.assert_allclose(total, sum(one[name][0] for one in each), rtol=1e-4)
    np.testing.assert_allclose(
        both["loss"][0] - 0.5 * both["kl"][0] - both["squared_error"][0],
        sum(
            np.abs(np.asarray(frames[i] - reconstruct(config, params, frames[i : i + 1], keys(2)[i])[0])).mean()
            for i in range(2)
        ),
        rtol=1e-3,
    )


def reconstruct(config, params, frames: jax.Array, key: jax.Array) -> jax.Array:
    from magref_jax.models import vae

    noise = jax.random.normal(key, (2, 4, 4, config.latent_channels))
    return vae.VAE(config).apply({"params": params}, frames, noise[None])[0]


@pytest.mark.parametrize("sigma", [0.05, 0.95])
def test_an_exact_network_has_no_loss(sigma):
    """With velocity = noise − latents, x_σ − σ·v is the clean clip: the target is consistent with the interpolation."""
    batch, _ = batch_and_null(2)
    noise = jnp.stack([jax.random.normal(key, (2, 4, 4, 16)) for key in keys(2)])
    sigmas = jnp.full(2, sigma)
    noisy = flow.interpolate(batch.clean_latents, noise, sigmas)
    velocity = flow.velocity_target(batch.clean_latents, noise)
    np.testing.assert_allclose(noisy - sigma * velocity, batch.clean_latents, atol=1e-5)
