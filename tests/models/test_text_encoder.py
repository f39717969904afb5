"""What of the text encoder is float32 whatever its dtype. Its closed forms are in test_encoders.py, torch in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from magref_jax.config import TextEncoderConfig
from magref_jax.models.text_encoder import SelfAttention, TextEncoder, relative_buckets


def test_position_biases_of_a_bfloat16_encoder_are_float32():
    # With queries of zero the logits are the biases, up to 60 here: bfloat16 would round them to quarters.
    config = TextEncoderConfig(vocab_size=40, dim=32, ffn_dim=48, num_heads=4, head_dim=8, num_layers=1)
    rng = np.random.default_rng(1)
    table = rng.uniform(40, 60, (32, 4)).astype(np.float32)
    value = rng.choice([-1.0, 1.0], (1, 40, 32))
    one, nothing = {"kernel": np.eye(32, dtype=np.float32)}, {"kernel": np.zeros((32, 32), np.float32)}
    params = {"query": nothing, "key": nothing, "value": one, "out": one, "relative_bias": table}

    found = SelfAttention(config).apply({"params": params}, value.astype(np.float32), np.ones((1, 1, 1, 40), bool))

    bias = table.astype(np.float64)[relative_buckets(40, 32, 128)].transpose(2, 0, 1)
    weights = np.exp(bias - bias.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("nqk,knd->qnd", weights, value.reshape(40, 4, 8)).reshape(40, 32)
    # What is left is the rounding of weights and result.
    np.testing.assert_allclose(np.asarray(found[0], np.float64), expected, rtol=0, atol=2**-7)


def test_the_sum_over_layers_of_a_bfloat16_encoder_is_float32():
    # Layers that add nothing: what comes out is the normalised embedding, of which bfloat16 would keep three digits.
    config = TextEncoderConfig(vocab_size=40, dim=32, ffn_dim=48, num_heads=4, head_dim=8, num_layers=2)
    token_ids = np.arange(20, dtype=np.int32)[None]
    params = jax.eval_shape(TextEncoder(config).init, jax.random.key(0), token_ids, token_ids)["params"]
    rng = np.random.default_rng(0)
    flat = {
        path: np.zeros(leaf.shape, np.float32)
        if path[-2:] in {("out", "kernel"), ("down", "kernel")}
        else rng.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in traverse_util.flatten_dict(params).items()
    }

    found = TextEncoder(config).apply(
        {"params": traverse_util.unflatten_dict(flat)}, token_ids, np.ones_like(token_ids)
    )

    x = flat[("token_embedding",)][:20].astype(np.float64)
    expected = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * flat["norm", "scale"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
