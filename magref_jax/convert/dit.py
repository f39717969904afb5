"""The dictionary between the original Wan 2.1 / MAGREF names of the diffusion transformer and ours."""

from magref_jax.config import DiTConfig
from magref_jax.convert.rules import Rule, Transform, dense, norm, reshape

BLOCK = "blocks.{layer}."


def DIT_RULES(config: DiTConfig) -> tuple[Rule, ...]:
    """One rule per tensor of a checkpoint in the original layout."""
    rules = (
        Rule("patch_embedding.weight", "patch_embedding/kernel", _patch_kernel(config)),
        Rule("patch_embedding.bias", "patch_embedding/bias"),
        *dense("text_embedding.0", "text_in"),
        *dense("text_embedding.2", "text_out"),
        *dense("time_embedding.0", "time_in"),
        *dense("time_embedding.2", "time_out"),
        *dense("time_projection.1", "time_modulation"),
        Rule(BLOCK + "modulation", "blocks/modulation", reshape((1, 6, config.dim), (6, config.dim))),
        *dense(BLOCK + "self_attn.q", "blocks/self_attention/query"),
        *dense(BLOCK + "self_attn.k", "blocks/self_attention/key"),
        *dense(BLOCK + "self_attn.v", "blocks/self_attention/value"),
        *dense(BLOCK + "self_attn.o", "blocks/self_attention/out"),
        *norm(BLOCK + "self_attn.norm_q", "blocks/self_attention/query_norm"),
        *norm(BLOCK + "self_attn.norm_k", "blocks/self_attention/key_norm"),
        *norm(BLOCK + "norm3", "blocks/cross_attention_norm", bias=True),  # norm1 and norm2 have no weights
        *dense(BLOCK + "cross_attn.q", "blocks/cross_attention/query"),
        *dense(BLOCK + "cross_attn.k", "blocks/cross_attention/key"),
        *dense(BLOCK + "cross_attn.v", "blocks/cross_attention/value"),
        *dense(BLOCK + "cross_attn.o", "blocks/cross_attention/out"),
        *norm(BLOCK + "cross_attn.norm_q", "blocks/cross_attention/query_norm"),
        *norm(BLOCK + "cross_attn.norm_k", "blocks/cross_attention/key_norm"),
        *dense(BLOCK + "ffn.0", "blocks/feed_forward/up"),
        *dense(BLOCK + "ffn.2", "blocks/feed_forward/down"),
        Rule("head.modulation", "head/modulation", reshape((1, 2, config.dim), (2, config.dim))),
        *dense("head.head", "head/out"),
    )
    image_rules = (
        *norm("img_emb.proj.0", "image_in_norm", bias=True),
        *dense("img_emb.proj.1", "image_in"),
        *dense("img_emb.proj.3", "image_out"),
        *norm("img_emb.proj.4", "image_out_norm", bias=True),
        *dense(BLOCK + "cross_attn.k_img", "blocks/cross_attention/key_image"),
        *dense(BLOCK + "cross_attn.v_img", "blocks/cross_attention/value_image"),
        *norm(BLOCK + "cross_attn.norm_k_img", "blocks/cross_attention/key_image_norm"),
    )
    return rules if config.image_dim is None else rules + image_rules


def _patch_kernel(config: DiTConfig) -> Transform:
    p, q, r = config.patch_size
    # The reference convolves; we multiply patches laid out as (frame, row, column, channel).
    return Transform(
        lambda w: w.transpose(2, 3, 4, 1, 0).reshape(-1, config.dim),  # [out, in, p, q, r] -> [p·q·r·in, out]
        lambda kernel: kernel.reshape(p, q, r, -1, config.dim).transpose(4, 3, 0, 1, 2),
    )
