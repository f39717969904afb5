"""What of the text encoder is float32 whatever its dtype. Its closed forms are in test_encoders.py, torch in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from magref_jax.config import TextEncoderConfig
from magref_jax.models.text_encoder import TextEncoder


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
