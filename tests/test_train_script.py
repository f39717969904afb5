"""Both stages of train.py on the smoke preset, and that a run which was cut off ends where an unbroken one does."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from magref_jax import checkpoint, pipeline, training
from magref_jax.conditioning.inputs import Conditioning


@pytest.fixture(scope="module")
def config() -> training.TrainConfig:
    return train.load_config("configs/smoke.py")


@pytest.fixture(scope="module")
def trained(config: training.TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("smoke")
    train.train_vae(config, out)
    train.train_dit(config, out)
    return out


def records(out: pathlib.Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def test_both_stages_write_a_model_folder_that_loads(config, trained):
    model = pipeline.load(trained / "model")
    assert set(model.params) == set(checkpoint.NETWORKS)
    assert model.config.text_encoder.vocab_size == len(model.tokenizer)
    # The statistics are those of the latents: not the (0, 1) that the preset starts from.
    assert all(std > 0 for std in model.config.vae.latent_std)
    assert model.config.vae.latent_std != config.model.vae.latent_std


def test_vae_learns_and_latents_are_normalised(trained):
    steps = records(trained, "vae")
    assert [record["step"] for record in steps] == [4, 8, 12, 16]
    assert steps[-1]["psnr"] > steps[0]["psnr"]
    latents = np.load(trained / "encoded" / "clean_latents.npy").astype(np.float32)
    assert abs(latents.mean()) < 0.2
    assert 0.7 < latents.std() < 1.3


def test_untrained_dit_predicts_nothing(config, trained):
    # The head starts at zero, so the first losses are the mean square of the target: noise (1) plus the latents.
    frames = config.dit.phases[0].num_latent_frames
    latents = np.load(trained / "encoded" / "clean_latents.npy")[:, :frames].astype(np.float32)
    np.testing.assert_allclose(records(trained, "dit")[0]["loss"], 1 + np.mean(latents**2), rtol=0.25)


def test_a_run_that_was_cut_off_ends_bitwise_where_an_unbroken_one_does(config, tmp_path):
    params = {"layer": {"kernel": jnp.ones((3, 2))}}
    optimizer = training.make_optimizer(training.OptimizerConfig(warmup_steps=2), 12)

    @jax.jit
    def step_fn(state, batch, key):
        noise = jax.random.normal(jax.random.fold_in(key, state.step), batch.shape)

        def loss_fn(params):
            return jnp.mean(jnp.square((batch + noise) @ params["layer"]["kernel"] - 1))

        loss, gradients = jax.value_and_grad(loss_fn)(state.params)
        return training.apply_gradients(state, gradients, optimizer, 0.9), {"loss": loss}

    phases = (training.DiTPhase(8, 4, 1), training.DiTPhase(4, 2, 1))

    def make_batch(phase, rng):
        return rng.standard_normal((phase.batch_size, 3), np.float32)

    calls = 0

    def failing_batch(phase, rng):
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return make_batch(phase, rng)

    def run(out, batches):
        out.mkdir(exist_ok=True)
        return train.run_phases(out, "dit", config, phases, training.init_state(params, optimizer), step_fn, batches)

    whole = run(tmp_path / "whole", make_batch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", failing_batch)
    resumed = run(tmp_path / "cut", make_batch)
    assert records(tmp_path / "cut", "dit")[-1]["step"] == 12
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert not np.array_equal(whole.params["layer"]["kernel"], params["layer"]["kernel"])


def test_ema_of_young_state_follows_its_formula():
    optimizer = training.make_optimizer(training.OptimizerConfig(learning_rate=0.1, warmup_steps=1), 10)
    state = training.init_state({"kernel": jnp.zeros(2)}, optimizer)
    expected = np.zeros(2)
    for step in range(1, 5):
        state = training.apply_gradients(state, {"kernel": jnp.ones(2)}, optimizer, 0.999)
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["kernel"])
        np.testing.assert_allclose(state.ema["kernel"], expected, rtol=1e-6)


def test_only_kernels_decay():
    config = training.OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    params = {"kernel": jnp.ones(2), "bias": jnp.ones(2), "modulation": jnp.ones(2)}
    optimizer = training.make_optimizer(config, 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    state = training.apply_gradients(training.init_state(params, optimizer), zero, optimizer, 0.9)
    np.testing.assert_allclose(state.params["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(state.params["bias"], 1.0)
    np.testing.assert_array_equal(state.params["modulation"], 1.0)


def batch_and_null(config: training.TrainConfig, size: int) -> tuple[training.Batch, training.Null]:
    dit = config.model.dit
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jnp.ndarray:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    conditioning = Conditioning(
        text_embeddings=normal(size, dit.text_len, dit.text_dim),
        image_embeddings=normal(size, 17, dit.image_dim),
        reference_latents=normal(size, 2, 4, 4, 16),
        region_mask=jnp.ones((size, 2, 4, 4, 4)),
        subject_tokens=jnp.ones((size, 2, dit.text_len)),
        subject_regions=jnp.ones((size, 2, 4)),
    )
    null = training.Null(normal(dit.text_len, dit.text_dim), normal(5, 4, 4, 16), normal(17, dit.image_dim))
    subject_cells = jnp.asarray(rng.random((size, 2, 4, 4)) < 0.5, jnp.float32)
    return training.Batch(normal(size, 2, 4, 4, 16), subject_cells, conditioning, (0, 3)), null


def test_dropout_is_per_sample_and_at_the_asked_rates(config):
    stage = dataclasses.replace(config.dit, text_dropout=0.2, reference_dropout=0.3, injection_dropout=0.4)
    batch, null = batch_and_null(config, 512)
    dropped = training.drop_conditioning(batch, null, stage, jax.random.key(0))
    text = np.all(dropped.text_embeddings == null.text_embeddings, axis=(1, 2))
    references = np.all(dropped.region_mask == 0, axis=(1, 2, 3, 4))
    injection = np.all(dropped.subject_tokens == 0, axis=(1, 2))
    # Three standard deviations of a share of 512 at p <= 0.5 are 0.066.
    np.testing.assert_allclose([text.mean(), references.mean()], [0.2, 0.3], atol=0.066)
    np.testing.assert_allclose(injection.mean(), 1 - 0.8 * 0.6, atol=0.066)
    np.testing.assert_array_equal(
        dropped.reference_latents[references],
        np.broadcast_to(null.reference_latents[np.array([0, 3])], (references.sum(), 2, 4, 4, 16)),
    )
    np.testing.assert_array_equal(
        dropped.reference_latents[~references], batch.conditioning.reference_latents[~references]
    )


def test_loss_of_the_zero_model_is_the_mean_square_of_the_target(config):
    batch, null = batch_and_null(config, 8)
    params = jax.jit(lambda key: pipeline.init_params(config.model, key)["dit"])(jax.random.key(0))
    loss, metrics = jax.jit(lambda params: training.dit_loss(config, params, batch, null, jax.random.key(1)))(params)
    noise = jax.random.normal(jax.random.split(jax.random.key(1), 3)[2], batch.clean_latents.shape)
    squared = np.asarray(noise - batch.clean_latents) ** 2
    np.testing.assert_allclose(loss, np.mean(squared), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_video"], np.mean(squared[:, 1:]), rtol=1e-5)
    cells = np.asarray(batch.subject_cells, bool)
    np.testing.assert_allclose(metrics["loss_subjects"], np.mean(squared[cells]), rtol=1e-5)
    weighted = dataclasses.replace(config, dit=dataclasses.replace(config.dit, subject_weight=3.0))
    loss, _ = jax.jit(lambda params: training.dit_loss(weighted, params, batch, null, jax.random.key(1)))(params)
    expected = (3 * squared[cells].sum() + squared[~cells].sum()) / (3 * cells.sum() + (~cells).sum()) / 16
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
