"""What umT5's parameters are called in `models_t5_umt5-xxl-enc-bf16.pth` and in the files of transformers."""

import functools

from magref_jax.config import TextEncoderConfig
from magref_jax.convert.rules import Layout, Row, Rule, array, dense, norm, rules_in, unused, within

_dense = functools.partial(dense, bias=False)

_ATTENTION: tuple[Row, ...] = (
    (norm,    "self_attention_norm",          "norm1",                          "layer_norm"),
    (_dense,  "self_attention/query",         "attn.q",                         "SelfAttention.q"),
    (_dense,  "self_attention/key",           "attn.k",                         "SelfAttention.k"),
    (_dense,  "self_attention/value",         "attn.v",                         "SelfAttention.v"),
    (_dense,  "self_attention/out",           "attn.o",                         "SelfAttention.o"),
    (array(), "self_attention/relative_bias", "pos_embedding.embedding.weight",
                                              "SelfAttention.relative_attention_bias.weight"),
)  # fmt: skip
_FEED_FORWARD: tuple[Row, ...] = (
    (norm,   "feed_forward_norm", "norm2",      "layer_norm"),
    (_dense, "feed_forward/gate", "ffn.gate.0", "DenseReluDense.wi_0"),
    (_dense, "feed_forward/up",   "ffn.fc1",    "DenseReluDense.wi_1"),
    (_dense, "feed_forward/down", "ffn.fc2",    "DenseReluDense.wo"),
)  # fmt: skip
_ROWS: tuple[Row, ...] = (
    (array(), "token_embedding", "token_embedding.weight", "shared.weight"),
    # The same array as `shared.weight`. A file may hold either or both, and a parameter is filled once: where this name
    # stands alone, the reader of the file renames it.
    (unused,  "",                None,                     "encoder.embed_tokens.weight"),
    *within("blocks/", "blocks.{layer}.", "encoder.block.{layer}.layer.0.", _ATTENTION),
    *within("blocks/", "blocks.{layer}.", "encoder.block.{layer}.layer.1.", _FEED_FORWARD),
    (norm,    "norm",            "norm",                   "encoder.final_layer_norm"),
    (unused,  "",                "spiece_model",           "spiece_model"),  # the tokenizer, which is kept as a file
    (unused,  "",                "logit_scale",            "logit_scale"),  # ComfyUI's, of every text encoder
)  # fmt: skip


def text_encoder_rules(config: TextEncoderConfig, layout: Layout = "wan") -> tuple[Rule, ...]:
    """One rule per tensor of a checkpoint, or per tensor of each block; the same for every `config`."""
    return rules_in(layout, _ROWS)
