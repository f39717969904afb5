"""Joining and dropping conditions, on arrays whose every value says where it comes from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax.conditioning.inputs import (
    Conditioning,
    canvas_frames,
    concatenate_channels,
    concatenate_tokens,
    drop_references,
    drop_text,
    zero_padding,
)


@pytest.fixture
def conditioning():
    return Conditioning(
        text_embeddings=jnp.full((2, 3, 4), 1.0),
        image_embeddings=jnp.full((2, 5, 6), 2.0),
        reference_latents=jnp.full((2, 3, 4, 5, 16), 3.0),
        region_mask=jnp.ones((2, 3, 4, 5, 4)),
        subject_tokens=jnp.ones((2, 2, 3)),
        subject_regions=jnp.ones((2, 2, 5)),
    )


def test_channels_are_noise_then_mask_then_reference(conditioning):
    joined = concatenate_channels(jnp.full((2, 3, 4, 5, 16), 7.0), conditioning)
    assert joined.shape == (2, 3, 4, 5, 36)
    np.testing.assert_array_equal(joined[1, 2, 3, 4], [7.0] * 16 + [1.0] * 4 + [3.0] * 16)


def test_text_to_video_has_noise_alone():
    noise = jnp.ones((1, 2, 2, 2, 16))
    np.testing.assert_array_equal(
        concatenate_channels(noise, Conditioning(text_embeddings=jnp.zeros((1, 3, 4)))), noise
    )


@pytest.mark.parametrize("timesteps", [jnp.array([500.0, 900.0]), jnp.array([[500.0] * 3, [900.0] * 3])])
def test_tokens_are_the_canvas_at_time_zero_then_noise(conditioning, timesteps):
    noise = jnp.full((2, 3, 4, 5, 16), 7.0)
    grey = conditioning.reference_latents.at[:, 1:].set(-1.0)  # latent frames after the canvas: not a part of it
    seen = dataclasses.replace(conditioning, reference_latents=grey)
    joined, times, positions = concatenate_tokens(noise, timesteps, seen)
    np.testing.assert_array_equal(joined[1, :, 2, 3, 4], [3.0, 7.0, 7.0, 7.0])
    assert joined.shape == (2, 4, 4, 5, 16)
    np.testing.assert_array_equal(times, [[0, 500, 500, 500], [0, 900, 900, 900]])
    assert positions == (0, 1, 2, 3)
    assert concatenate_tokens(noise, timesteps, seen, (0, 2, 5))[2] == (0, 1, 3, 6)


def test_tokens_need_a_canvas():
    with pytest.raises(ValueError, match="reference_latents is None"):
        concatenate_tokens(jnp.ones((1, 2, 2, 2, 16)), jnp.ones(1), Conditioning(text_embeddings=jnp.zeros((1, 3, 4))))


@pytest.mark.parametrize(
    "array", [np.array, jnp.array]
)  # XLA makes a selection of a product with a mask, NumPy does not
def test_zero_padding_hides_even_infinite_values(array):
    embeddings = array([[[1.0], [2.0], [np.inf]], [[4.0], [np.nan], [6.0]]])
    mask = array([[1, 1, 0], [1, 0, 0]])
    expected = [[1, 2, 0, 0, 0], [4, 0, 0, 0, 0]]
    np.testing.assert_array_equal(zero_padding(embeddings, mask, 5)[..., 0], expected)
    np.testing.assert_array_equal(zero_padding(embeddings, mask.astype(bool))[..., 0], np.array(expected)[:, :3])
    with pytest.raises(ValueError, match="3 tokens, more than text_len=2"):
        zero_padding(embeddings, mask, 2)


@pytest.mark.parametrize("jit", [False, True])
def test_canvas_frames_to_the_last_bit(jit):
    canvas = np.arange(256, dtype=np.uint8).repeat(3).reshape(2, 8, 16, 3)
    convert = jax.jit(canvas_frames, static_argnums=1) if jit else canvas_frames
    frames = np.asarray(convert(canvas, 5))
    assert frames.shape == (2, 5, 8, 16, 3)
    assert frames.dtype == np.float32
    expected = np.subtract(np.divide(canvas, 255, dtype=np.float32), 0.5, dtype=np.float32)
    np.testing.assert_array_equal(frames[:, 0], np.divide(expected, 0.5, dtype=np.float32))
    assert (frames.min(), frames.max()) == (-1, 1)
    np.testing.assert_array_equal(frames[:, 1:], 0)


def test_canvas_frames_counts():
    assert canvas_frames(np.zeros((8, 8, 3), np.uint8), 1).shape == (1, 8, 8, 3)
    with pytest.raises(ValueError, match="num_frames=0"):
        canvas_frames(np.zeros((8, 8, 3), np.uint8), 0)


def test_dropping_the_text_drops_its_subjects(conditioning):
    dropped = drop_text(conditioning, jnp.array([True, False]), jnp.full((3, 4), -1.0))
    np.testing.assert_array_equal(dropped.text_embeddings[0], 1)
    np.testing.assert_array_equal(dropped.text_embeddings[1], -1)
    np.testing.assert_array_equal(dropped.subject_tokens.sum(axis=(1, 2)), [6, 0])
    for name in ("image_embeddings", "reference_latents", "region_mask", "subject_regions"):
        np.testing.assert_array_equal(getattr(dropped, name), getattr(conditioning, name))


def test_dropping_the_references_leaves_no_trace_of_them(conditioning):
    blank = jnp.arange(3 * 4 * 5 * 16.0).reshape(3, 4, 5, 16)
    keep = jnp.array([False, True])
    dropped = drop_references(conditioning, keep, blank, jnp.full((5, 6), -2.0))
    np.testing.assert_array_equal(dropped.reference_latents[0], blank)
    np.testing.assert_array_equal(dropped.reference_latents[1], 3)
    np.testing.assert_array_equal(dropped.image_embeddings[:, 0, 0], [-2, 2])
    np.testing.assert_array_equal(dropped.region_mask.sum(axis=(1, 2, 3, 4)), [0, 3 * 4 * 5 * 4])
    np.testing.assert_array_equal(dropped.subject_regions.sum(axis=(1, 2)), [0, 10])
    np.testing.assert_array_equal(dropped.text_embeddings, conditioning.text_embeddings)
    np.testing.assert_array_equal(dropped.subject_tokens, conditioning.subject_tokens)
    with pytest.raises(ValueError, match="blank_image_embeddings is missing"):
        drop_references(conditioning, keep, blank)


def test_dropping_is_jittable_and_keeps_types_and_absent_fields():
    conditioning = Conditioning(
        text_embeddings=jnp.ones((2, 3, 4), jnp.bfloat16),
        reference_latents=jnp.ones((2, 1, 1, 1, 16), jnp.bfloat16),
        region_mask=jnp.ones((2, 1, 1, 1, 4), jnp.bfloat16),
    )

    @jax.jit
    def drop(conditioning, keep):
        conditioning = drop_text(conditioning, keep, jnp.zeros((3, 4), jnp.float32))
        return drop_references(conditioning, keep, jnp.zeros((1, 1, 1, 16), jnp.float32))

    dropped = drop(conditioning, jnp.array([True, False]))
    assert {leaf.dtype for leaf in jax.tree.leaves(dropped)} == {jnp.dtype(jnp.bfloat16)}
    assert [float(leaf[1].sum()) for leaf in jax.tree.leaves(dropped)] == [0, 0, 0]
    assert [float(leaf[0].sum()) for leaf in jax.tree.leaves(dropped)] == [12, 16, 4]
    assert dropped.subject_tokens is None
    assert dropped.image_embeddings is None
