"""What the parameters of CLIP's vision tower are called in the original files and in those of transformers.

The original file is `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`. The names of transformers are those that
its `CLIPVisionModel` writes, without the `vision_model.` that other files put before them.
"""

from collections.abc import Iterable

import jax
import numpy as np

from magref_jax.config import ImageEncoderConfig
from magref_jax.convert.rules import (
    CONV2D,
    IDENTITY,
    LINEAR,
    Layout,
    Row,
    Rule,
    Transform,
    array,
    dense,
    layer_norm,
    rules_in,
    split,
    torch_shapes,
    unused,
    within,
)

# Width of the space that CLIP shares between images and texts, which we never enter.
_TEXT_DIM = 1024

_cls_embedding = array(Transform(lambda tensor: tensor[0, 0], lambda array: array[None, None]))
_pos_embedding = array(Transform(lambda tensor: tensor[0], lambda array: array[None]))


def _query_key_value(torch: str, flax: str) -> tuple[Rule, ...]:
    """Rules of one linear layer whose output is query, key and value in a row."""
    paths = [f"{flax}/{name}" for name in ("query", "key", "value")]
    return (
        Rule(f"{torch}.weight", tuple(f"{path}/kernel" for path in paths), split(3, LINEAR)),
        Rule(f"{torch}.bias", tuple(f"{path}/bias" for path in paths), split(3, IDENTITY)),
    )


_BLOCK: tuple[Row, ...] = (
    (layer_norm,       "self_attention_norm",  "norm1",       "layer_norm1"),
    (_query_key_value, "self_attention",       "attn.to_qkv", None),
    (dense,            "self_attention/query", None,          "self_attn.q_proj"),
    (dense,            "self_attention/key",   None,          "self_attn.k_proj"),
    (dense,            "self_attention/value", None,          "self_attn.v_proj"),
    (dense,            "self_attention/out",   "attn.proj",   "self_attn.out_proj"),
    (layer_norm,       "feed_forward_norm",    "norm2",       "layer_norm2"),
    (dense,            "feed_forward/up",      "mlp.0",       "mlp.fc1"),
    (dense,            "feed_forward/down",    "mlp.2",       "mlp.fc2"),
)  # fmt: skip
_BLOCKS = "visual.transformer.{layer}.", "encoder.layers.{layer}."

_ROWS: tuple[Row, ...] = (
    (_cls_embedding, "class_embedding",        "visual.cls_embedding",          None),
    (array(),        "class_embedding",        None,                            "embeddings.class_embedding"),
    (_pos_embedding, "position_embedding",     "visual.pos_embedding",          None),
    (array(),        "position_embedding",     None,                            "embeddings.position_embedding.weight"),
    (array(CONV2D),  "patch_embedding/kernel", "visual.patch_embedding.weight", "embeddings.patch_embedding.weight"),
    (layer_norm,     "input_norm",             "visual.pre_norm",               "pre_layrnorm"),  # sic
    *within("blocks/", *_BLOCKS, _BLOCK),
    (unused,         "",                       "visual.post_norm.*",            "post_layernorm.*"),
    (unused,         "",                       "visual.head",                   "visual_projection.*"),
    (unused,         "",                       None,                            "embeddings.position_ids"),  # 0, 1, ...
    (unused,         "",                       "textual.*",                     None),  # MAGREF's text comes from umT5
    (unused,         "",                       "log_scale",                     None),
)  # fmt: skip


def image_encoder_rules(config: ImageEncoderConfig, layout: Layout = "wan") -> tuple[Rule, ...]:
    """One rule per tensor of a checkpoint, or per tensor of each block; what we leave out is dropped by name."""
    return rules_in(layout, _ROWS + _last_block(config, ((unused, "", "*", "*"),)))


def image_encoder_unused(config: ImageEncoderConfig, layout: Layout = "wan") -> dict[str, tuple[int, ...]]:
    """Names and torch shapes of what a vision tower has behind the output of `ImageEncoder`."""
    norm = {"scale": (config.dim,), "bias": (config.dim,)}
    square = {"kernel": (config.dim, config.dim), "bias": (config.dim,)}
    end = {
        "self_attention_norm": norm,
        "self_attention": dict.fromkeys(("query", "key", "value", "out"), square),
        "feed_forward_norm": norm,
        "feed_forward": {
            "up": {"kernel": (config.dim, config.ffn_dim), "bias": (config.ffn_dim,)},
            "down": {"kernel": (config.ffn_dim, config.dim), "bias": (config.dim,)},
        },
        "norm": norm,
    }
    rows = (*_last_block(config, _BLOCK), (layer_norm, "norm", "visual.post_norm", "post_layernorm"))
    abstract = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32), end, is_leaf=lambda node: isinstance(node, tuple)
    )
    shapes = torch_shapes(rules_in(layout, rows), abstract)
    return shapes | {"visual.head": (config.dim, _TEXT_DIM)} if layout == "wan" else shapes


def _last_block(config: ImageEncoderConfig, rows: Iterable[Row]) -> tuple[Row, ...]:
    wan, hf = (name.format(layer=config.num_layers - 1) for name in _BLOCKS)
    return within("", wan, hf, rows)
