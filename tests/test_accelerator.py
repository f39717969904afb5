"""What only an accelerator can show: `pytest -m gpu`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax import pipeline
from magref_jax.models.attention import automatic, dot_product_attention
from tests.tiny_model import CONFIG, model_folder, picture, random_params  # noqa: F401

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_keys", [128, 257, 384])
def test_attention_of_the_platform_is_exact_to_the_last_bits_of_bfloat16(num_keys: int, with_bias: bool):
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((2, length, 4, 128)), jnp.bfloat16) for length in (384, num_keys, num_keys)
    )
    bias = jnp.asarray(rng.standard_normal((1, 1, 1, num_keys)), jnp.float32) if with_bias else None
    logits = np.einsum("bqnk,bsnk->bnqs", *(np.asarray(array, np.float64) for array in (query, key))) / 128**0.5
    logits += 0 if bias is None else np.asarray(bias, np.float64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bnqs,bsnk->bqnk", weights, np.asarray(value, np.float64))
    found = jax.jit(lambda *args: dot_product_attention(*args, bias=bias, implementation="auto"))(query, key, value)
    # Weights and result are rounded to 8 bits.
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=2e-2)


def test_the_platform_has_an_attention_of_its_own():
    if jax.default_backend() == "gpu":
        assert automatic(jnp.bfloat16) == "cudnn"


def test_a_video_is_that_of_the_cpu(model_folder):  # noqa: F811
    config = dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, attention="blockwise"))
    model = pipeline.Model(config, random_params(config), pipeline.load_tokenizer(model_folder))
    arguments = {"prompts": ["the red apple"], "references": [[picture((250, 20, 20))]], "subjects": [["apple"]]}
    found = model.generate(**arguments)
    with jax.default_device(jax.devices("cpu")[0]):
        expected = model.generate(**arguments)
    # Three steps of latents up to 6; the encoders' and the VAE's convolutions may round to fewer bits there.
    np.testing.assert_allclose(found.latents, expected.latents, atol=5e-2)
