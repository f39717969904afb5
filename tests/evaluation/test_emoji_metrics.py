"""The metrics on videos whose answer is known: true ones, damaged ones, and true ones of another case."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from magref_jax import pipeline
from magref_jax.conditioning.canvas import layout_cells
from magref_jax.data.emoji_tokenizer import build_tokenizer
from magref_jax.data.emoji_world import (
    BACKGROUNDS,
    DEFAULT_MOTIONS,
    EmojiWorldConfig,
    background_image,
    load_atlas,
    sample_clip,
    vocabulary,
)
from magref_jax.evaluation import emoji_benchmark
from magref_jax.evaluation.emoji_metrics import METRICS, evaluate, other_case, score_clip, summarise
from tests.tiny_model import CONFIG, random_params, write_model

DATA = EmojiWorldConfig()
COUNT = 40


@pytest.fixture(scope="module")
def clips():
    return [sample_clip(DATA, "held_out", 0, index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def truth(clips):
    return [clip.frames for clip in clips]


@pytest.fixture(scope="module")
def ceiling(clips, truth):
    return evaluate(truth, clips, DATA)


@pytest.fixture(scope="module")
def floor(clips, truth):
    others = [other_case(clip, DATA, 0, index) for index, clip in enumerate(clips)]
    return evaluate(truth, others, DATA)


def blurred(frames, radius):
    return np.stack([Image.fromarray(frame).filter(ImageFilter.GaussianBlur(radius)) for frame in frames])


def binomial_bounds(probability, count):
    """Three standard deviations; wide enough for two of the three subjects of a video to share one fate."""
    deviation = 3 * np.sqrt(2 * probability * (1 - probability) / count)
    return probability - deviation, probability + deviation


def num_subjects(clips):
    return sum(len(clip.subjects) for clip in clips)


@pytest.mark.parametrize(
    ("metric", "least"),
    [
        ("identity_top1", 0.97),
        ("identity_top5", 0.99),
        ("similarity", 0.9),
        ("region_iou", 0.9),
        ("present", 0.97),
        ("all_present", 0.95),
        ("motion", 0.97),
        ("place", 0.97),
        ("background", 1.0),
    ],
)
def test_true_videos_score_near_one(ceiling, metric, least):
    assert ceiling[metric].value >= least
    assert ceiling[metric].low <= ceiling[metric].value <= ceiling[metric].high


def test_another_case_scores_as_a_guess(clips, floor):
    subjects = num_subjects(clips)
    # What the video shows may be among the distractors: identity can be below chance, never above.
    assert floor["identity_top1"].value <= binomial_bounds(1 / 32, subjects)[1]
    assert floor["identity_top5"].value <= binomial_bounds(5 / 32, subjects)[1]
    for metric, options, count in (("motion", 6, subjects), ("place", 9, subjects), ("background", 10, COUNT)):
        low, high = binomial_bounds(1 / options, count)
        assert low <= floor[metric].value <= high
    assert floor["present"].value <= 0.15
    assert floor["similarity"].value <= 0.4


def test_another_case_has_other_subjects_and_as_many_of_them(clips):
    for index, clip in enumerate(clips):
        other = other_case(clip, DATA, 0, index)
        assert len(other.references) == len(clip.references)
        assert not {truth.identity for truth in other.subjects} & {truth.identity for truth in clip.subjects}


def test_a_video_of_nothing_scores_no_better_than_a_guess(clips):
    grey = [np.full_like(clip.frames, 128) for clip in clips]
    found = evaluate(grey, clips, DATA)
    assert found["identity_top1"].value <= binomial_bounds(1 / 32, num_subjects(clips))[1]
    assert found["present"].value == 0


def test_a_blurred_and_noisy_video_is_still_recognised(clips, truth):
    rng = np.random.default_rng(0)
    damaged = [
        (blurred(frames, 1) + rng.normal(0, 10, frames.shape)).round().clip(0, 255).astype(np.uint8)
        for frames in truth[:20]
    ]
    error = np.mean([np.square(np.subtract(a, b, dtype=float)).mean() for a, b in zip(damaged, truth, strict=False)])
    assert 10 * np.log10(255**2 / error) < 25
    found = evaluate(damaged, clips[:20], DATA)
    assert found["identity_top1"].value >= 0.9
    assert found["motion"].value >= 0.95
    assert found["background"].value == 1


def test_more_blur_never_scores_higher(clips, truth):
    levels = [evaluate([blurred(f, radius) for f in truth[:10]], clips[:10], DATA) for radius in (0.5, 2, 5)]
    for metric in ("identity_top1", "identity_top5", "similarity", "region_iou", "present"):
        values = [level[metric].value for level in levels]
        assert values == sorted(values, reverse=True), metric
        assert values[-1] < values[0], metric


def test_positions_between_the_searched_ones_are_found(clips, truth):
    moved = [np.roll(frames, (1, 1), (1, 2)) for frames in truth[:20]]
    found = evaluate(moved, clips[:20], DATA)
    assert found["identity_top1"].value >= 0.95
    assert found["similarity"].value >= 0.85


def test_region_iou_is_that_of_the_shifted_box():
    one = dataclasses.replace(DATA, motions=("stays still",), subject_counts=(1,), backgrounds=("plain wall",))
    for index in range(4):
        clip = sample_clip(one, "held_out", 1, index)
        shift = 4 if clip.subjects[0].boxes[0, 0] == 0 else -4
        moved = np.roll(clip.frames, shift, axis=2)  # a plain wall has one colour along a row
        assert score_clip(clip.frames, clip, DATA)["region_iou"].tolist() == [1]
        side = DATA.sprite_size
        assert score_clip(moved, clip, DATA)["region_iou"] == pytest.approx((side - 4) / (side + 4))


@pytest.mark.parametrize("motion", DEFAULT_MOTIONS)
def test_every_motion_is_recognised(motion):
    one = dataclasses.replace(DATA, motions=(motion,), subject_counts=(1,))
    for index in range(4):
        clip = sample_clip(one, "held_out", 1, index)
        assert score_clip(clip.frames, clip, DATA)[f"motion/{motion}"].tolist() == [1]
        if motion != "bounces":  # backwards, a bounce is a bounce that starts one frame later
            backwards = score_clip(clip.frames[::-1].copy(), clip, DATA)[f"motion/{motion}"]
            assert backwards.tolist() == [motion == "stays still"]


def test_the_place_is_where_the_video_starts_if_the_prompt_says_one():
    one = dataclasses.replace(DATA, motions=("slides right",), subject_counts=(1,))
    for index in range(4):
        clip = sample_clip(dataclasses.replace(one, place_words=1.0), "held_out", 1, index)
        assert score_clip(clip.frames, clip, DATA)["place"].tolist() == [1]
        assert score_clip(clip.frames[:, :, ::-1].copy(), clip, DATA)["place"].tolist() == [0]
        silent = sample_clip(dataclasses.replace(one, place_words=0.0), "held_out", 1, index)
        assert score_clip(silent.frames, silent, DATA)["place"].tolist() == []


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_every_background_is_recognised_behind_its_sprites(name):
    one = dataclasses.replace(DATA, backgrounds=(name,))
    for index in range(4):
        clip = sample_clip(one, "held_out", 2, index)
        assert score_clip(clip.frames, clip, DATA)["background"].tolist() == [1]


def test_a_subject_that_is_painted_over_is_absent():
    two = dataclasses.replace(DATA, subject_counts=(0, 1), backgrounds=("meadow",))
    for index in range(4):
        clip = sample_clip(two, "held_out", 3, index)
        backdrop = background_image("meadow", clip.background_params, DATA.width, DATA.height)
        frames = clip.frames.copy()
        for frame, (x0, y0, x1, y1) in zip(frames, clip.subjects[0].boxes, strict=True):
            frame[y0:y1, x0:x1] = backdrop[y0:y1, x0:x1]
        scores = score_clip(frames, clip, DATA)
        assert score_clip(clip.frames, clip, DATA)["all_present"].tolist() == [1]
        assert scores["present"].tolist() == [0, 1]
        assert scores["all_present"].tolist() == [0]


@pytest.mark.parametrize(
    ("change", "loss"),
    [(lambda frames: np.ascontiguousarray(frames[..., ::-1]), 0.5), (lambda frames: frames.clip(0, 185) + 70, 0.45)],
    ids=["red and blue swapped", "brighter"],
)
def test_similarity_sees_a_change_of_colour(clips, truth, ceiling, change, loss):
    changed = evaluate([change(frames) for frames in truth[:15]], clips[:15], DATA)
    assert changed["similarity"].value < ceiling["similarity"].value - loss


def test_intervals_are_those_of_independent_videos():
    rng = np.random.default_rng(0)
    scores = [{name: rng.integers(0, 2, 1).astype(float) for name in METRICS} for _ in range(400)]
    estimate = summarise(scores)["background"]
    # 1.96 standard deviations of the mean of 400 fair coins.
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)


def test_a_model_that_never_moves_anything_scores_a_guess(clips, truth):
    still = [np.repeat(frames[:1], DATA.num_frames, axis=0) for frames in truth]
    assert evaluate(still, clips, DATA)["motion"].value == pytest.approx(1 / 6, abs=0.02)


def test_what_cannot_be_measured_is_refused(clips):
    with pytest.raises(ValueError, match="frames must be uint8"):
        score_clip(clips[0].frames[:4], clips[0], DATA)
    with pytest.raises(ValueError, match="spins"):
        score_clip(clips[0].frames, clips[0], dataclasses.replace(DATA, motions=("spins", "rises")))
    with pytest.raises(ValueError, match="0 videos and 40 clips"):
        evaluate([], clips, DATA)


@pytest.fixture(scope="module")
def model_config():
    sampling = dataclasses.replace(CONFIG.sampling, height=56, width=72, num_frames=9, num_inference_steps=1)
    return dataclasses.replace(CONFIG, sampling=sampling, dit=dataclasses.replace(CONFIG.dit, text_len=40))


COLUMNS = ["model", "shuffled", "another case", "VAE", "ground truth"]


def test_benchmark_of_a_perfect_model(model_config, tmp_path, monkeypatch):
    data = dataclasses.replace(DATA, subject_counts=(1,))
    clips = [sample_clip(data, "held_out", 0, index) for index in range(5)]
    build_tokenizer(vocabulary(data), tmp_path / "tokenizer", model_config.dit.text_len)
    model = pipeline.Model(model_config, {"vae": random_params(model_config)["vae"]}, pipeline.load_tokenizer(tmp_path))
    asked = []

    def generate(model, requests, **overrides):
        """Follows its references: the true clip for the true ones, a video of nothing for others."""
        assert overrides == {"num_inference_steps": 7}
        asked.append(len(requests))
        videos = []
        for request in requests:
            clip = clips[int(request.key)]
            is_true = np.array_equal(request.images[0], clip.references[0].image)
            frames = clip.frames if is_true else np.full_like(clip.frames, 128)
            videos.append(pipeline.Video(frames, pipeline.prepare(model.config, model.tokenizer, request)))
        return videos

    monkeypatch.setattr(pipeline, "generate", generate)
    arguments = emoji_benchmark.Arguments(
        tmp_path, tmp_path / "out", cases=5, shuffled_cases=3, batch_size=2, steps=7, data=data
    )
    columns = emoji_benchmark.run_benchmark(arguments, model)
    assert list(columns) == COLUMNS
    assert asked == [2] * 5  # always whole batches: one compilation
    assert columns["model"] == columns["ground truth"]
    assert columns["model"]["present"].value == 1
    assert columns["shuffled"]["present"].value == 0
    assert columns["VAE"]["similarity"].value < 0.5  # its weights are random

    table = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert table[0] == f"| metric | {' | '.join(COLUMNS)} | chance |"
    assert table[2].endswith("| 0.031 |")  # 1/32
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["columns"]["ground truth"]["background"] == [1, 1, 1]
    with np.load(tmp_path / "out" / "videos.npz") as videos:
        assert videos["model"].shape == (5, 8, 56, 72, 3)
        assert videos["shuffled"].shape == (3, 8, 56, 72, 3)
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    assert sheet.height > 5 * emoji_benchmark.TILE_HEIGHT


def test_cases_have_the_sizes_of_the_model(model_config):
    sampling = dataclasses.replace(model_config.sampling, width=96, height=64, num_frames=5)
    world = emoji_benchmark.of_model_size(DATA, dataclasses.replace(model_config, sampling=sampling, drop_frames=1))
    assert sample_clip(world, "held_out", 0, 0).frames.shape == (4, 64, 96, 3)
    assert world.sprite_size == 32
    # The cells of three references are 32 pixels wide.
    assert {x1 - x0 for x0, _, x1, _ in layout_cells(3, 64, 96, "v1")} == {32}


@pytest.mark.slow
def test_benchmark_runs_a_model_folder(model_config, tmp_path):
    folder = write_model(tmp_path / "model", model_config)
    arguments = emoji_benchmark.Arguments(folder, tmp_path, cases=3, shuffled_cases=2, batch_size=2)
    columns = emoji_benchmark.run_benchmark(arguments, pipeline.load(folder))
    assert list(columns) == COLUMNS
    assert columns["model"]["similarity"].value < 0.5  # nothing was learnt


def test_shuffled_requests_keep_the_prompt_and_swap_the_pictures(clips):
    clip, atlas = clips[0], load_atlas()
    other = other_case(clip, DATA, 0, 0)
    request = emoji_benchmark.make_request(clip, 0, 0, other)
    assert request.prompt == clip.caption
    assert [subject.words for subject in request.subjects] == [
        atlas.identities[truth.identity].name for truth in clip.subjects
    ]
    for image, truth in zip(request.images, other.subjects, strict=True):
        np.testing.assert_array_equal(np.asarray(image), atlas.sprite(truth.identity, truth.style))
