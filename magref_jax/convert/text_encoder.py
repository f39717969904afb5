"""umT5: names of `models_t5_umt5-xxl-enc-bf16.pth` and the parameters of `TextEncoder`."""

from magref_jax.convert.rules import Rule, dense, norm

_BLOCK = "blocks.{layer}."

TEXT_ENCODER_RULES = (
    Rule("token_embedding.weight", "token_embedding"),
    *norm(_BLOCK + "norm1", "blocks/self_attention_norm"),
    *dense(_BLOCK + "attn.q", "blocks/self_attention/query", bias=False),
    *dense(_BLOCK + "attn.k", "blocks/self_attention/key", bias=False),
    *dense(_BLOCK + "attn.v", "blocks/self_attention/value", bias=False),
    *dense(_BLOCK + "attn.o", "blocks/self_attention/out", bias=False),
    Rule(_BLOCK + "pos_embedding.embedding.weight", "blocks/self_attention/relative_bias"),
    *norm(_BLOCK + "norm2", "blocks/feed_forward_norm"),
    *dense(_BLOCK + "ffn.gate.0", "blocks/feed_forward/gate", bias=False),
    *dense(_BLOCK + "ffn.fc1", "blocks/feed_forward/up", bias=False),
    *dense(_BLOCK + "ffn.fc2", "blocks/feed_forward/down", bias=False),
    *norm("norm", "norm"),
)
