"""umT5 against transformers, through the names of the original Wan checkpoint."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from magref_jax.config import TextEncoderConfig
from magref_jax.convert.rules import convert, to_torch, torch_shapes
from magref_jax.convert.text_encoder import text_encoder_rules
from magref_jax.models.text_encoder import TextEncoder
from tests.parity.rounding import rounding_ratio
from tests.parity.torch_random import random_tensors

pytestmark = pytest.mark.parity

# The heads together are wider than the model, so that a swap of the two widths cannot pass.
CONFIG = TextEncoderConfig(vocab_size=50, dim=32, ffn_dim=48, num_heads=5, head_dim=8, num_layers=3, dtype="float32")
LENGTH = 160  # beyond distance 128, so that the last bucket of both directions is used
REAL_LENGTHS = (160, 37, 1)

# Original Wan name -> transformers name.
HF_NAMES = (
    (r"token_embedding\.weight", r"shared.weight"),
    (r"blocks\.(\d+)\.norm1\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.weight", r"encoder.block.\1.layer.0.SelfAttention.\2.weight"),
    (
        r"blocks\.(\d+)\.pos_embedding\.embedding\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (r"blocks\.(\d+)\.norm2\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight"),
    (r"blocks\.(\d+)\.ffn\.fc1\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (r"blocks\.(\d+)\.ffn\.fc2\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
    (r"norm\.weight", r"encoder.final_layer_norm.weight"),
)


def hf_name(name: str) -> str:
    (found,) = [match.expand(new) for old, new in HF_NAMES if (match := re.fullmatch(old, name))]
    return found


@pytest.fixture(scope="module")
def abstract_params():
    tokens = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(TextEncoder(CONFIG).init, jax.random.key(0), tokens, tokens)["params"]


@pytest.fixture(scope="module")
def tensors(abstract_params):
    tensors = random_tensors(torch_shapes(text_encoder_rules(CONFIG), abstract_params))
    # Biases nearly as large as the logits: at a smaller size a wrong bucket would hide behind the content.
    return {name: tensor * (2.0 if "pos_embedding" in name else 1.0) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def reference(tensors):
    torch.set_num_threads(1)
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=CONFIG.vocab_size,
            d_model=CONFIG.dim,
            d_kv=CONFIG.head_dim,
            d_ff=CONFIG.ffn_dim,
            num_layers=CONFIG.num_layers,
            num_heads=CONFIG.num_heads,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    state = {hf_name(name): torch.from_numpy(tensor) for name, tensor in tensors.items()}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, strict=True)
    # In float64 the difference is our own rounding; float32 torch is twice as far from it as we are.
    return model.double()


def test_equals_transformers_on_real_tokens(abstract_params, tensors, reference, close):
    token_ids = np.random.default_rng(1).integers(2, CONFIG.vocab_size, (len(REAL_LENGTHS), LENGTH), dtype=np.int32)
    mask = (np.arange(LENGTH) < np.array(REAL_LENGTHS)[:, None]).astype(np.int32)
    params = convert(text_encoder_rules(CONFIG), tensors, abstract_params)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(TextEncoder(CONFIG).apply)({"params": params}, token_ids, mask))
    with torch.no_grad():
        theirs = reference(torch.from_numpy(token_ids).long(), torch.from_numpy(mask).long()).last_hidden_state.numpy()
    real = mask.astype(bool)
    assert np.std(theirs[real]) > 0.5
    # Float32 rounding over 3 layers of unscaled attention, in values of size 1 to 5.
    close("umT5 encoder", ours[real], theirs[real], 2e-5)


def test_bfloat16_is_closer_to_float32_than_that_of_transformers(abstract_params, tensors, reference):
    rng = np.random.default_rng(2)
    run = jax.jit(TextEncoder(dataclasses.replace(CONFIG, dtype="bfloat16")).apply)
    params = convert(text_encoder_rules(CONFIG), tensors, abstract_params)
    token_ids = rng.integers(2, CONFIG.vocab_size, (4, LENGTH), dtype=np.int32)
    ours = np.asarray(run({"params": params}, token_ids, np.ones_like(token_ids)))
    exact, theirs = (
        model(torch.from_numpy(token_ids).long()).last_hidden_state.detach().double().numpy()
        for model in (reference, copy.deepcopy(reference).bfloat16())
    )
    # Measured 0.76: transformers adds up its layers in bfloat16.
    ratio = rounding_ratio([(ours, theirs, exact)])
    assert ratio < 0.85, ratio


def test_table_renames_as_this_file(abstract_params, tensors):
    params = convert(text_encoder_rules(CONFIG), tensors, abstract_params)
    hf = to_torch(text_encoder_rules(CONFIG, "hf"), params)
    assert hf.keys() == {hf_name(name) for name in tensors}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(hf[hf_name(name)], tensor, err_msg=name)


def test_table_is_invertible(abstract_params, tensors):
    back = to_torch(text_encoder_rules(CONFIG), convert(text_encoder_rules(CONFIG), tensors, abstract_params))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
