"""Batches of emoji world: windows for the VAE, encoded clips for the DiT."""

import numpy as np
import pytest
from PIL import Image

from magref_jax.conditioning.case import Encoders
from magref_jax.config import DiTConfig, ModelConfig, SamplingConfig, VAEConfig
from magref_jax.data import emoji_clips, emoji_tokenizer
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


def test_three_subjects_and_a_background_take_the_layout_that_holds_four(tokenizer):
    clip = sample_clip(DATA, "train", 0, 0)
    assert len(clip.references) == 4
    case = emoji_clips.clip_case(CONFIG, tokenizer, clip, order=3, num_frames=9)
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
    data = EmojiWorldConfig(subject_counts=(1.0, 0.0, 0.0))
    case = emoji_clips.clip_case(CONFIG, tokenizer, sample_clip(data, "train", 0, 1), order=0, num_frames=9)
    assert case.canvas.regions == ((24, 16, 48, 40),)


def test_rendered_clips_start_with_their_canvas():
    clips = emoji_clips.render_clips(CONFIG, EmojiWorldConfig(), "train", 5, 2)
    clip = sample_clip(EmojiWorldConfig(), "train", 5, 1)
    np.testing.assert_array_equal(clips[1, 1:], clip.frames)
    assert (clips[1, 0] == 255).all(-1).mean() > 0.2  # white around the references
    assert Image.fromarray(clips[1, 0]).size == (72, 56)


def test_vae_windows_lie_inside_their_clip():
    # Pixel values that say where they come from: clip, frame, row and column.
    clips = np.zeros((3, 9, 48, 72, 3), np.uint8)
    clips[..., 0] = np.arange(9)[None, :, None, None] * 10 + np.arange(3)[:, None, None, None]
    clips[..., 1] = np.arange(48)[:, None]
    clips[..., 2] = np.arange(72)
    batch = emoji_clips.vae_batch(clips, np.random.default_rng(0), 64, 5, 16, 4, 0.0)
    values = np.rint((batch + 1) * 127.5).astype(int)
    assert batch.shape == (64, 5, 16, 16, 3)
    np.testing.assert_array_equal(np.diff(values[..., 0] // 10, axis=1), 1)
    np.testing.assert_array_equal(np.diff(values[..., 1], axis=2), 1)
    np.testing.assert_array_equal(np.diff(values[..., 2], axis=3), 1)
    assert set(values[:, 0, 0, 0, 1] % 4) == {0}
    starts = values[:, 0, 0, 0, 0] // 10
    assert 0.35 < np.mean(starts == 0) < 0.8  # half by intent, and one in five of the rest
    grey = emoji_clips.vae_batch(clips, np.random.default_rng(0), 64, 5, 16, 4, 0.5)
    assert np.array_equal((grey[:, 1:] == 0).all((1, 2, 3, 4)), starts == 0)


def test_examples_start_with_the_canvas_or_with_their_own_first_frame(tokenizer):
    clip = sample_clip(EmojiWorldConfig(num_frames=9, subject_counts=(1.0,), motions=("slides right",)), "train", 0, 2)
    canvas = emoji_clips.make_example(CONFIG, tokenizer, clip, 0, "canvas")
    np.testing.assert_array_equal(canvas.frames[0], canvas.case.canvas.image)
    np.testing.assert_array_equal(canvas.frames[1:], clip.frames[:8])
    video = emoji_clips.make_example(CONFIG, tokenizer, clip, 0, "video")
    np.testing.assert_array_equal(video.frames, clip.frames)
    # A 24-pixel sprite on the 4-pixel grid covers 6x6 cells; moving 4 pixels a frame, two frames of it cover 6x7.
    assert canvas.subject_cells.sum((1, 2)).tolist() == [0, 42, 42, 42, 42]
    assert video.subject_cells.sum((1, 2)).tolist() == [36, 42, 42, 42, 42]
    x0, y0, x1, y1 = clip.subjects[0].boxes[0] // 4
    assert video.subject_cells[0, y0:y1, x0:x1].all()
    short = sample_clip(EmojiWorldConfig(num_frames=8), "train", 0, 2)
    with pytest.raises(ValueError, match="has 8 frames"):
        emoji_clips.make_example(CONFIG, tokenizer, short, 0, "video")


def test_encoding_is_kept_resumed_and_cut_in_time(tokenizer, tmp_path):
    seen = []

    def make(index):
        seen.append(index)
        clip = sample_clip(EmojiWorldConfig(), "train", 7, index)
        return emoji_clips.make_example(CONFIG, tokenizer, clip, index, "canvas")

    # Encoders with a known answer: every second frame at a quarter of the size.
    encoders = Encoders(
        text=lambda ids, mask: ids[..., None] * np.ones(2, np.float32),
        image=lambda frames: frames[:, :1, :3, 0],
        frames=lambda frames: frames[:, ::2, ::4, ::4],
    )
    clips = emoji_clips.encode_clips(tmp_path, make, encoders, 6, batch_size=4)
    assert len(clips) == 6
    (tmp_path / "progress").write_text("4")
    seen.clear()
    again = emoji_clips.encode_clips(tmp_path, make, encoders, 6, batch_size=4)
    assert min(seen) == 4
    frames = make(5).frames
    np.testing.assert_allclose(again.arrays["clean_latents"][5], frames[::2, ::4, ::4] / 127.5 - 1, atol=1e-3)
    clean, cells, conditioning, frames = again.batch(np.random.default_rng(0), 6, 2, reach=2)
    assert frames == (0, 1)
    np.testing.assert_array_equal(cells[5], make(5).subject_cells[:2])
    assert clean.shape == (6, 2, 14, 18, 3)
    assert conditioning.region_mask.shape == (6, 2, 14, 18, 4)
    np.testing.assert_allclose(clean[5], again.arrays["clean_latents"][5, :2])
    np.testing.assert_array_equal(conditioning.reference_latents[:, 1], 0.0)
    drawn = {again.batch(np.random.default_rng(seed), 1, 3)[3] for seed in range(40)}
    assert drawn == {(0, first, second) for first in range(1, 5) for second in range(first + 1, 5)}
    clean, _, conditioning, frames = again.batch(np.random.default_rng(0), 6, 3)
    np.testing.assert_allclose(clean[5], again.arrays["clean_latents"][5, list(frames)])
    references = [len(sample_clip(EmojiWorldConfig(), "train", 7, index).references) for index in range(6)]
    np.testing.assert_array_equal(clips.counts, references)
    single = clips.batch(np.random.default_rng(0), references.count(1), 2, max_references=1)[2]
    np.testing.assert_array_equal(single.subject_tokens.any(-1).sum(-1), 1)
    with pytest.raises(ValueError, match="6 clips, the config asks for 7"):
        emoji_clips.encode_clips(tmp_path, make, encoders, 7)
