"""CLIP: names of `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth` and the parameters of `ImageEncoder`."""

from magref_jax.config import ImageEncoderConfig
from magref_jax.convert.rules import CONV2D, IDENTITY, LINEAR, Rule, dense, drop, norm, reshape, split

_BLOCK = "visual.transformer.{layer}."
_QUERY_KEY_VALUE = tuple(f"blocks/self_attention/{name}" for name in ("query", "key", "value"))


def image_encoder_rules(config: ImageEncoderConfig) -> tuple[Rule, ...]:
    """The table; what is behind the output of `ImageEncoder` and the text tower are dropped by name."""
    dim, tokens = config.dim, config.num_tokens
    return (
        Rule("visual.cls_embedding", "class_embedding", reshape((1, 1, dim), (dim,))),
        Rule("visual.pos_embedding", "position_embedding", reshape((1, tokens, dim), (tokens, dim))),
        Rule("visual.patch_embedding.weight", "patch_embedding/kernel", CONV2D),
        *norm("visual.pre_norm", "input_norm", bias=True),
        *norm(_BLOCK + "norm1", "blocks/self_attention_norm", bias=True),
        Rule(_BLOCK + "attn.to_qkv.weight", tuple(f"{path}/kernel" for path in _QUERY_KEY_VALUE), split(3, LINEAR)),
        Rule(_BLOCK + "attn.to_qkv.bias", tuple(f"{path}/bias" for path in _QUERY_KEY_VALUE), split(3, IDENTITY)),
        *dense(_BLOCK + "attn.proj", "blocks/self_attention/out"),
        *norm(_BLOCK + "norm2", "blocks/feed_forward_norm", bias=True),
        *dense(_BLOCK + "mlp.0", "blocks/feed_forward/up"),
        *dense(_BLOCK + "mlp.2", "blocks/feed_forward/down"),
        drop(f"visual.transformer.{config.num_layers - 1}.*"),  # the embeddings are read before the last block
        drop("visual.post_norm.*"),
        drop("visual.head"),
        drop("textual.*"),  # MAGREF's text comes from umT5
        drop("log_scale"),
    )
