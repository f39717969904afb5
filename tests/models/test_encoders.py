"""The text and image encoders: closed forms, golden integers and the size of the released models."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax.config import ImageEncoderConfig, TextEncoderConfig
from magref_jax.convert.image_encoder import image_encoder_rules, image_encoder_unused
from magref_jax.convert.rules import convert, torch_shapes
from magref_jax.convert.text_encoder import text_encoder_rules
from magref_jax.models.image_encoder import CLIP_MEAN, CLIP_STD, ImageEncoder, bicubic_matrix, preprocess
from magref_jax.models.text_encoder import TextEncoder, relative_buckets

TINY_TEXT = TextEncoderConfig(vocab_size=40, dim=32, ffn_dim=48, num_heads=4, head_dim=8, num_layers=2, dtype="float32")
TINY_IMAGE = ImageEncoderConfig(
    dim=32, ffn_dim=48, num_heads=4, num_layers=3, image_size=12, patch_size=4, dtype="float32"
)


def abstract_text_params(config):
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(TextEncoder(config).init, jax.random.key(0), tokens, tokens)["params"]


def abstract_image_params(config):
    pixels = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    return jax.eval_shape(ImageEncoder(config).init, jax.random.key(0), pixels)["params"]


def num_parameters(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def padded(token_ids, length):
    ids = np.zeros((1, length), np.int32)
    ids[0, : len(token_ids)] = token_ids
    return ids, (np.arange(length) < len(token_ids)).astype(np.int32)[None]


@pytest.fixture(scope="module")
def text_params():
    tokens = jnp.zeros((1, 4), jnp.int32)
    return jax.jit(TextEncoder(TINY_TEXT).init)(jax.random.key(0), tokens, tokens)["params"]


@pytest.fixture(scope="module")
def encode_text(text_params):
    apply = jax.jit(TextEncoder(TINY_TEXT).apply)
    return lambda ids, mask: np.asarray(apply({"params": text_params}, ids, mask))


def test_relative_buckets_are_the_published_integers():
    buckets = relative_buckets(512, num_buckets=32, max_distance=128)
    # First distance of every bucket of one direction, as printed from transformers.
    starts = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91)
    one_way = np.repeat(np.arange(16), np.diff((*starts, 512)))
    offset = np.arange(512)[None, :] - np.arange(512)[:, None]  # key - query
    np.testing.assert_array_equal(buckets, one_way[np.abs(offset)] + 16 * (offset > 0))


def test_text_embeddings_of_real_tokens_do_not_depend_on_padding(encode_text):
    prompt = np.random.default_rng(0).integers(2, TINY_TEXT.vocab_size, 11)
    shortest = encode_text(*padded(prompt, 11))
    for length in (16, 160):
        ids, mask = padded(prompt, length)
        ids[0, 11:] = 7  # what stands in the padding does not matter either
        # Another length sums in another order: 1e-6 of the largest value, 3.2.
        np.testing.assert_allclose(encode_text(ids, mask)[:, :11], shortest, rtol=0, atol=3e-6)


def test_text_embeddings_depend_on_the_order_of_tokens(encode_text):
    forward = encode_text(*padded([5, 6, 7, 8], 4))
    backward = encode_text(*padded([8, 7, 6, 5], 4))
    assert np.abs(forward - backward[:, ::-1]).max() > 0.1


def test_bfloat16_text_embeddings_are_float32_embeddings_rounded_on_the_way(encode_text, text_params):
    ids, mask = padded(np.arange(2, 32), 32)
    half = dataclasses.replace(TINY_TEXT, dtype="bfloat16")
    rounded = jax.jit(TextEncoder(half).apply)({"params": text_params}, ids, mask)
    assert rounded.dtype == jnp.float32
    # bfloat16 holds 8 bits, 0.4%; two layers of it.
    exact = encode_text(ids, mask)[:, :30]
    assert 1e-4 < np.abs(rounded[:, :30] - exact).mean() / np.abs(exact).mean() < 0.03


def test_text_embeddings_of_an_empty_mask_are_finite(encode_text):
    assert np.isfinite(encode_text(np.ones((1, 4), np.int32), np.zeros((1, 4), np.int32))).all()


def test_text_encoder_initial_spread_is_that_of_t5(text_params):
    attention = text_params["blocks"]["self_attention"]
    spread = {
        "token_embedding": (text_params["token_embedding"], 1.0),
        "query": (attention["query"]["kernel"], (32 * 8) ** -0.5),
        "key": (attention["key"]["kernel"], 32**-0.5),
        "out": (attention["out"]["kernel"], 32**-0.5),
        "relative_bias": (attention["relative_bias"], 1.0),
        "down": (text_params["blocks"]["feed_forward"]["down"]["kernel"], 48**-0.5),
    }
    for name, (array, expected) in spread.items():
        # The smallest array has 256 draws: 4 standard errors.
        assert np.std(array) == pytest.approx(expected, rel=0.18), name


def test_text_encoder_heads_look_at_their_own_offset():
    offsets = (-2, -1, 1, 5)
    config = dataclasses.replace(TINY_TEXT, num_heads=4, relative_offsets=offsets)
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = jax.jit(TextEncoder(config).init)(jax.random.key(0), tokens, tokens)["params"]
    table = np.asarray(params["blocks"]["self_attention"]["relative_bias"][0])
    buckets = relative_buckets(12, config.num_buckets, config.max_distance)
    for head, offset in enumerate(offsets):
        bias = table[buckets, head]
        for query in range(2, 6):
            assert bias[query].argmax() == query + offset


def test_text_encoder_needs_an_offset_for_every_head():
    with pytest.raises(ValueError, match=r"relative_offsets=\(1, 2\) needs one entry per head, or none: num_heads=4"):
        dataclasses.replace(TINY_TEXT, relative_offsets=(1, 2))


def test_text_encoder_rejects_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"\(1, 4\) and \(1, 5\)"):
        jax.eval_shape(
            TextEncoder(TINY_TEXT).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 5), jnp.int32)
        )


def test_full_size_text_encoder_is_umt5_xxl():
    params = abstract_text_params(TextEncoderConfig())
    assert num_parameters(params) == 5_680_910_336
    shapes = torch_shapes(text_encoder_rules(TextEncoderConfig()), params)
    assert len(shapes) == 242
    assert sum(map(math.prod, shapes.values())) == 5_680_910_336
    expected = {
        "token_embedding.weight": (256384, 4096),
        "blocks.23.attn.q.weight": (4096, 4096),
        "blocks.23.pos_embedding.embedding.weight": (32, 64),
        "blocks.0.ffn.gate.0.weight": (10240, 4096),
        "blocks.0.ffn.fc1.weight": (10240, 4096),
        "blocks.0.ffn.fc2.weight": (4096, 10240),
        "norm.weight": (4096,),
    }
    assert {name: shapes[name] for name in expected} == expected


def original_clip_shapes():
    """Every `visual.*` tensor of the released checkpoint."""
    block = {
        "norm1.weight": (1280,),
        "norm1.bias": (1280,),
        "attn.to_qkv.weight": (3840, 1280),
        "attn.to_qkv.bias": (3840,),
        "attn.proj.weight": (1280, 1280),
        "attn.proj.bias": (1280,),
        "norm2.weight": (1280,),
        "norm2.bias": (1280,),
        "mlp.0.weight": (5120, 1280),
        "mlp.0.bias": (5120,),
        "mlp.2.weight": (1280, 5120),
        "mlp.2.bias": (1280,),
    }
    return {
        "visual.cls_embedding": (1, 1, 1280),
        "visual.pos_embedding": (1, 257, 1280),
        "visual.patch_embedding.weight": (1280, 3, 14, 14),
        "visual.pre_norm.weight": (1280,),
        "visual.pre_norm.bias": (1280,),
        "visual.post_norm.weight": (1280,),
        "visual.post_norm.bias": (1280,),
        "visual.head": (1280, 1024),
        **{f"visual.transformer.{i}.{name}": shape for i in range(32) for name, shape in block.items()},
    }


def test_full_size_image_encoder_is_clip_without_its_end():
    config = ImageEncoderConfig()
    params = abstract_image_params(config)
    original = original_clip_shapes()
    assert (len(original), sum(map(math.prod, original.values()))) == (392, 632_076_800)

    rules = image_encoder_rules(config)
    kept = torch_shapes(rules, params)
    assert kept == {name: original[name] for name in kept}
    drops = [rule.matcher() for rule in rules if not rule.flax_paths]
    dropped = {name for name in original if any(matcher.fullmatch(name) for matcher in drops)}
    assert kept.keys() | dropped == original.keys()
    assert image_encoder_unused(config) == {name: original[name] for name in dropped}
    assert not kept.keys() & dropped
    num_dropped = sum(math.prod(original[name]) for name in dropped)
    assert num_parameters(params) == 611_086_080
    assert num_parameters(params) + num_dropped == 632_076_800


def test_conversion_drops_the_end_of_clip_but_no_other_layer():
    abstract = abstract_image_params(TINY_IMAGE)
    rules = image_encoder_rules(TINY_IMAGE)
    tensors = {name: np.ones(shape, np.float32) for name, shape in torch_shapes(rules, abstract).items()}
    end = {
        "visual.transformer.2.norm1.weight": np.zeros(32),
        "visual.head": np.zeros((32, 20)),
        "log_scale": np.zeros(()),
    }
    params = convert(rules, tensors | end, abstract)
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(params))
    with pytest.raises(ValueError, match=r"visual\.transformer\.3\.norm1\.weight"):
        convert(rules, tensors | {"visual.transformer.3.norm1.weight": np.zeros(32, np.float32)}, abstract)
    with pytest.raises(ValueError, match=r"visual\.transformer\.1\.mlp\.0\.bias.* is missing"):
        convert(rules, {name: tensors[name] for name in tensors if name != "visual.transformer.1.mlp.0.bias"}, abstract)


def test_image_encoder_returns_one_embedding_per_patch_and_the_class_token():
    assert ImageEncoderConfig().num_tokens == 257
    params = abstract_image_params(ImageEncoderConfig())
    pixels = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    out = jax.eval_shape(ImageEncoder(ImageEncoderConfig()).apply, {"params": params}, pixels)
    assert out.shape == (2, 257, 1280)


def test_image_encoder_rejects_another_image_size():
    with pytest.raises(ValueError, match=r"\(1, 16, 12, 3\).*12, 12, 3"):
        jax.eval_shape(ImageEncoder(TINY_IMAGE).init, jax.random.key(0), jnp.zeros((1, 16, 12, 3)))


def test_bicubic_weights_of_a_doubling():
    # Keys' kernel with a = -0.75 at distances 1.75, 0.75, 0.25 and 1.25, far from the border.
    row = bicubic_matrix(8, 16)[8]  # source coordinate 3.75
    np.testing.assert_allclose(row[2:6], [-0.03515625, 0.26171875, 0.87890625, -0.10546875], atol=1e-7)
    assert not row[:2].any()
    assert not row[6:].any()
    # The first output lies 0.25 before the first pixel, which also stands for the two taps beyond the border.
    edge = [-0.03515625 + 0.26171875 + 0.87890625, -0.10546875]
    np.testing.assert_allclose(bicubic_matrix(8, 16)[0, :2], edge, atol=1e-7)


def test_bicubic_to_the_same_size_changes_nothing():
    np.testing.assert_array_equal(bicubic_matrix(7, 7), np.eye(7, dtype=np.float32))


def test_preprocess_normalises_with_the_statistics_of_clip():
    colour = np.array([-1.0, 0.0, 1.0], np.float32)
    pixels = preprocess(jnp.broadcast_to(colour, (2, 9, 17, 3)), 6)
    expected = ((0.0, 0.5, 1.0) - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    assert pixels.dtype == jnp.float32
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, (2, 6, 6, 3)), atol=1e-5)
    with pytest.raises(ValueError, match=r"\(9, 17, 3\)"):
        preprocess(jnp.zeros((9, 17, 3)), 6)
