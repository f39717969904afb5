"""A prepared case against positions, sizes and tokens that can be counted by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from magref_jax.conditioning.case import Encoders, encode_cases, prepare_case, stack_cases
from magref_jax.conditioning.subjects import Subject
from magref_jax.config import DiTConfig, ModelConfig, SamplingConfig, VAEConfig
from magref_jax.data.emoji_tokenizer import build_tokenizer
from magref_jax.pipeline import load_tokenizer

CONFIG = ModelConfig(
    dit=DiTConfig(dim=24, num_heads=2, text_len=8),
    vae=VAEConfig(dim_multipliers=(1, 2, 4), temporal_downsample=(False, True)),
    sampling=SamplingConfig(layout="v1"),
)
SIZE = {"num_frames": 5, "height": 16, "width": 48}
RED, BLUE = Image.new("RGB", (30, 30), (255, 0, 0)), Image.new("RGB", (30, 30), (0, 0, 255))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(["the", "red", "apple", "and", "blue", "fish", "meet"], folder / "tokenizer", CONFIG.dit.text_len)
    return load_tokenizer(folder)


def prepare(
    tokenizer, prompt="the red apple and the fish", images=(RED, BLUE), subjects=("red apple", "fish"), **kwargs
):
    return prepare_case(CONFIG, tokenizer, prompt, images, subjects, **SIZE | kwargs)


def test_subjects_are_tied_to_their_words_and_to_their_regions(tokenizer):
    case = prepare(tokenizer, num_subjects=3)
    # the red apple and the fish </s>, then padding to 8
    np.testing.assert_array_equal(case.attention_mask, [1, 1, 1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(case.subject_tokens, [[0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0], [0] * 8])
    # v1 gives two references the first and second 16-pixel column of 48, each two tokens of 8 pixels wide and high.
    first = np.tile([1, 1, 0, 0, 0, 0], 2)
    np.testing.assert_array_equal(case.subject_regions, [first, np.roll(first, 2), 0 * first])


def test_the_region_mask_marks_the_references_in_latent_frame_0_only(tokenizer):
    case = prepare(tokenizer)
    assert case.region_mask.shape == (3, 4, 12, 4)
    expected = np.zeros((3, 4, 12, 4))
    expected[0, :, :8] = 1
    np.testing.assert_array_equal(case.region_mask, expected)


def test_a_reference_without_words_is_shown_but_not_injected(tokenizer):
    case = prepare(tokenizer, subjects=(None, "fish"))
    assert case.canvas.image[8, 8].tolist() == [255, 0, 0]
    assert case.subject_tokens[0].sum() == case.subject_regions[0].sum() == 0
    assert case.subject_regions[1].sum() == 4


def test_a_span_picks_one_of_two_equal_words(tokenizer):
    prompt = "the fish meet the fish"
    second = Subject("fish", span=(18, 22))
    case = prepare(tokenizer, prompt, (BLUE,), (second,), num_subjects=1)
    np.testing.assert_array_equal(case.subject_tokens, [[0, 0, 0, 0, 1, 0, 0, 0]])


def test_no_subjects_and_no_references(tokenizer):
    case = prepare(tokenizer, "", (), ())
    np.testing.assert_array_equal(case.attention_mask, [1, 0, 0, 0, 0, 0, 0, 0])
    assert (case.canvas.image == 255).all()
    for array in (case.region_mask, case.subject_tokens, case.subject_regions):
        assert not array.any()
    assert not prepare(tokenizer, subjects=()).subject_regions.any()


def test_layout_is_the_one_asked_for(tokenizer):
    cells = ((0, 0, 24, 16), (24, 0, 48, 16))
    assert prepare(tokenizer, layout="v2", order="input").canvas.cells == cells
    assert prepare(tokenizer, layout="v2", order="1,0").canvas.cells == cells[::-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 4}, r"num_frames=4 must be 2n \+ 1"),
        ({"height": 12}, "height=12 must be a positive multiple of 8"),
        ({"width": -8}, "width=-8 must be a positive multiple of 8"),
        ({"subjects": ("fish",)}, "1 subjects given for 2 reference images"),
        ({"subjects": ("green apple", None)}, "'green apple' is not in the prompt"),
        ({"num_subjects": 1}, "2 subjects given for num_subjects=1"),
        ({"images": (RED,) * 4, "subjects": ()}, "4 reference images given, but layout 'v1' holds at most 3"),
        ({"prompt": "the the the the the the the the red apple fish"}, "has no token"),
    ],
)
def test_what_a_model_cannot_take_is_refused(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(tokenizer, **changes)


def test_encoders_see_the_canvas_then_grey_and_text_without_its_padding(tokenizer):
    cases = [prepare(tokenizer), prepare(tokenizer, "fish", (), ())]
    encoders = Encoders(
        text=lambda ids, mask: jnp.ones((*ids.shape, 2)),
        image=lambda canvas: canvas[:, None, 8, 8],
        frames=lambda frames: frames[:, ::2, ::4, ::4],
    )
    found = encode_cases(encoders, stack_cases(cases), 5)
    np.testing.assert_array_equal(found.text_embeddings[:, :, 0], [[1] * 7 + [0], [1] * 2 + [0] * 6])
    np.testing.assert_array_equal(found.image_embeddings[:, 0], [[1, -1, -1], [1, 1, 1]])  # red, white; in [-1, 1]
    assert found.reference_latents.shape == (2, 3, 4, 12, 3)
    assert (found.reference_latents[:, 1:] == 0).all()
    np.testing.assert_array_equal(found.reference_latents[0, 0, 2, 5], [-1, -1, 1])  # blue
    assert found.region_mask.shape == (2, 3, 4, 12, 4)


def test_a_text_to_video_model_has_neither_canvas_nor_mask(tokenizer):
    encoders = Encoders(
        text=lambda ids, mask: jnp.ones((*ids.shape, 2)),
        image=None,
        frames=lambda frames: frames,
        takes_references=False,
    )
    found = encode_cases(encoders, stack_cases([prepare(tokenizer, "fish", (), ())]), 5)
    assert found.image_embeddings is found.reference_latents is found.region_mask is None


def test_full_mask_mode_is_plain_image_to_video(tokenizer):
    config = dataclasses.replace(CONFIG, sampling=dataclasses.replace(CONFIG.sampling, mask_mode="full"))
    case = prepare_case(config, tokenizer, "fish", [RED], **SIZE)
    assert case.region_mask[0].all()
    assert not case.region_mask[1:].any()
