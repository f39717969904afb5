"""What the diffusion transformer's parameters are called in the files of Wan 2.1 / MAGREF and in those of diffusers."""

from magref_jax.config import DiTConfig
from magref_jax.convert.rules import (
    Layout,
    Row,
    Rule,
    Transform,
    array,
    dense,
    layer_norm,
    norm,
    rules_in,
    unused,
    within,
)

# [1, n, dim] <-> [n, dim]
modulation = array(Transform(lambda tensor: tensor[0], lambda array: array[None]))

# Wan's norm1 and norm2, which are norm1 and norm3 in diffusers, have no weights.
_BLOCK: tuple[Row, ...] = (
    (modulation, "modulation",                 "modulation",        "scale_shift_table"),
    (dense,      "self_attention/query",       "self_attn.q",       "attn1.to_q"),
    (dense,      "self_attention/key",         "self_attn.k",       "attn1.to_k"),
    (dense,      "self_attention/value",       "self_attn.v",       "attn1.to_v"),
    (dense,      "self_attention/out",         "self_attn.o",       "attn1.to_out.0"),
    (norm,       "self_attention/query_norm",  "self_attn.norm_q",  "attn1.norm_q"),
    (norm,       "self_attention/key_norm",    "self_attn.norm_k",  "attn1.norm_k"),
    (layer_norm, "cross_attention_norm",       "norm3",             "norm2"),
    (dense,      "cross_attention/query",      "cross_attn.q",      "attn2.to_q"),
    (dense,      "cross_attention/key",        "cross_attn.k",      "attn2.to_k"),
    (dense,      "cross_attention/value",      "cross_attn.v",      "attn2.to_v"),
    (dense,      "cross_attention/out",        "cross_attn.o",      "attn2.to_out.0"),
    (norm,       "cross_attention/query_norm", "cross_attn.norm_q", "attn2.norm_q"),
    (norm,       "cross_attention/key_norm",   "cross_attn.norm_k", "attn2.norm_k"),
    (dense,      "feed_forward/up",            "ffn.0",             "ffn.net.0.proj"),
    (dense,      "feed_forward/down",          "ffn.2",             "ffn.net.2"),
    (unused,     "",                           None,                "attn2.norm_added_q.weight"),  # in some files
)  # fmt: skip
_IMAGE_BLOCK: tuple[Row, ...] = (
    (dense, "cross_attention/key_image",      "cross_attn.k_img",      "attn2.add_k_proj"),
    (dense, "cross_attention/value_image",    "cross_attn.v_img",      "attn2.add_v_proj"),
    (norm,  "cross_attention/key_image_norm", "cross_attn.norm_k_img", "attn2.norm_added_k"),
)  # fmt: skip
_BLOCKS = "blocks/", "blocks.{layer}.", "blocks.{layer}."

_COMMON: tuple[Row, ...] = (
    (dense,      "text_in",         "text_embedding.0",  "condition_embedder.text_embedder.linear_1"),
    (dense,      "text_out",        "text_embedding.2",  "condition_embedder.text_embedder.linear_2"),
    (dense,      "time_in",         "time_embedding.0",  "condition_embedder.time_embedder.linear_1"),
    (dense,      "time_out",        "time_embedding.2",  "condition_embedder.time_embedder.linear_2"),
    (dense,      "time_modulation", "time_projection.1", "condition_embedder.time_proj"),
    *within(*_BLOCKS, _BLOCK),
    (modulation, "head/modulation", "head.modulation",   "scale_shift_table"),
    (dense,      "head/out",        "head.head",         "proj_out"),
)  # fmt: skip
_IMAGE: tuple[Row, ...] = (
    (layer_norm, "image_in_norm",  "img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    (dense,      "image_in",       "img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    (dense,      "image_out",      "img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    (layer_norm, "image_out_norm", "img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    *within(*_BLOCKS, _IMAGE_BLOCK),
)  # fmt: skip


def dit_rules(config: DiTConfig, layout: Layout = "wan") -> tuple[Rule, ...]:
    """One rule per tensor of a checkpoint, or per tensor of each block."""
    patches: tuple[Row, ...] = (
        (array(_patch_kernel(config)), "patch_embedding/kernel", "patch_embedding.weight", "patch_embedding.weight"),
        (array(), "patch_embedding/bias", "patch_embedding.bias", "patch_embedding.bias"),
    )
    return rules_in(layout, patches + _COMMON + (() if config.image_dim is None else _IMAGE))


def _patch_kernel(config: DiTConfig) -> Transform:
    p, q, r = config.patch_size
    # The reference convolves; we multiply patches laid out as (frame, row, column, channel).
    return Transform(
        lambda w: w.transpose(2, 3, 4, 1, 0).reshape(-1, config.dim),  # [out, in, p, q, r] -> [p·q·r·in, out]
        lambda kernel: kernel.reshape(p, q, r, -1, config.dim).transpose(4, 3, 0, 1, 2),
    )
