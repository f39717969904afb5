"""Emoji world on canvases, and its clips as the VAE sees them."""

import numpy as np
import pytest
from PIL import Image

from magref_jax.config import DiTConfig, ModelConfig, SamplingConfig, VAEConfig
from magref_jax.data import clips, emoji_clips, emoji_tokenizer
from magref_jax.data.emoji_records import EmojiSource
from magref_jax.data.emoji_world import EmojiWorldConfig, sample_clip, vocabulary
from magref_jax.pipeline import load_tokenizer

DATA = EmojiWorldConfig(background_reference=1.0, subject_counts=(0.0, 0.0, 1.0))
CONFIG = ModelConfig(
    dit=DiTConfig(text_len=48),
    vae=VAEConfig(dim_multipliers=(1, 2, 4), temporal_downsample=(False, True)),
    sampling=SamplingConfig(height=56, width=72, num_frames=9, layout="v1"),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    emoji_tokenizer.build_tokenizer(vocabulary(DATA), folder / "tokenizer", 48)
    return load_tokenizer(folder)


def draw(tokenizer, data: EmojiWorldConfig, index: int) -> clips.Example:
    choice = clips.Choice(cross_pair=0.0, drop_reference=0.0, larger_layout=0.0)
    record = EmojiSource(data, "train", 0, index + 1)[index]
    return clips.make_example(CONFIG, tokenizer, record, np.random.default_rng(3), choice, "canvas")


def test_three_subjects_and_a_background_take_the_layout_that_holds_four(tokenizer):
    clip = sample_clip(DATA, "train", 0, 0)
    assert len(clip.references) == 4
    case = draw(tokenizer, DATA, 0).case
    # v2 splits 72x56 into four cells of 36x28: square sprites become 28x28, the background fills its cell.
    sizes = [(x1 - x0, y1 - y0) for x0, y0, x1, y1 in case.canvas.regions]
    assert sizes == [(28, 28)] * 3 + [(36, 28)]
    # Every label's words are marked in the text, and nothing else: as many tokens as the label has words.
    counts = case.subject_tokens.sum(1)
    assert counts.tolist() == [len(reference.label.split()) for reference in clip.references]
    # 28x28 pixels, from 4 or 40 across and 0 or 28 down, cover half or more of 4 x 4 tokens of 8 pixels
    # but for one corner, of which they cover a quarter.
    assert case.subject_regions[:3].sum(1).tolist() == [15, 15, 15]


def test_one_to_three_references_keep_their_size_in_the_model_layout(tokenizer):
    case = draw(tokenizer, EmojiWorldConfig(subject_counts=(1.0, 0.0, 0.0)), 1).case
    assert case.canvas.regions == ((24, 16, 48, 40),)


def test_rendered_clips_start_with_their_canvas():
    rendered = emoji_clips.render_clips(CONFIG, EmojiWorldConfig(), "train", 5, 2)
    clip = sample_clip(EmojiWorldConfig(), "train", 5, 1)
    np.testing.assert_array_equal(rendered[1, 1:], clip.frames)
    assert (rendered[1, 0] == 255).all(-1).mean() > 0.2  # white around the references
    assert Image.fromarray(rendered[1, 0]).size == (72, 56)


def test_vae_windows_lie_inside_their_clip():
    # Pixel values that say where they come from: clip, frame, row and column.
    pixels = np.zeros((3, 9, 48, 72, 3), np.uint8)
    pixels[..., 0] = np.arange(9)[None, :, None, None] * 10 + np.arange(3)[:, None, None, None]
    pixels[..., 1] = np.arange(48)[:, None]
    pixels[..., 2] = np.arange(72)
    batch = emoji_clips.vae_batch(pixels, np.random.default_rng(0), 64, 5, 16, 4, 0.0)
    values = np.rint((batch + 1) * 127.5).astype(int)
    assert batch.shape == (64, 5, 16, 16, 3)
    np.testing.assert_array_equal(np.diff(values[..., 0] // 10, axis=1), 1)
    np.testing.assert_array_equal(np.diff(values[..., 1], axis=2), 1)
    np.testing.assert_array_equal(np.diff(values[..., 2], axis=3), 1)
    assert set(values[:, 0, 0, 0, 1] % 4) == {0}
    starts = values[:, 0, 0, 0, 0] // 10
    assert 0.35 < np.mean(starts == 0) < 0.8  # half by intent, and one in five of the rest
    grey = emoji_clips.vae_batch(pixels, np.random.default_rng(0), 64, 5, 16, 4, 0.5)
    assert np.array_equal((grey[:, 1:] == 0).all((1, 2, 3, 4)), starts == 0)
