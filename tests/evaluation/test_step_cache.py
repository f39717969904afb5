"""What the measuring command of the step cache writes, against the same numbers computed from the videos themselves."""

import json
import pathlib

import numpy as np
import pytest

from magref_jax import pipeline
from magref_jax.diffusion.step_cache import StepTable, load_plan
from magref_jax.evaluation import step_cache
from magref_jax.pipeline import Request
from tests.tiny_model import model_folder, picture  # noqa: F401

KEYS = ("one", "two", "three")
PROMPT = "the red apple slides right over a meadow"
PROMPTS = "\n".join(f"{key}@@{PROMPT}@@apple.png:red apple" for key in KEYS)


def test_ratios_are_of_lengths_over_channels_averaged_over_positions():
    rng = np.random.default_rng(0)
    velocities = rng.standard_normal((1, 2, 1, 1, 2, 16)) * np.ones((3, 1, 1, 1, 1, 1))
    velocities[1] *= [[[[[0.5], [1.5]]]], [[[[3.0], [1.0]]]]]  # two positions each of two cases
    velocities[2] = 2 * velocities[1][..., ::-1]  # the direction does not matter
    np.testing.assert_allclose(step_cache.length_ratios(velocities), [[1, 1], [1, 2], [2, 2]], rtol=1e-12)


def test_errors_are_averages_over_cases_and_decibels_over_all_frames():
    truth = np.stack([np.full((2, 3), 2.0), np.full((2, 3), -4.0)])
    latents = np.stack([np.full((2, 3), 3.0), np.full((2, 3), -4.0)])
    assert step_cache.relative_error(latents, truth) == pytest.approx((0.5 + 0) / 2)
    black, grey = np.zeros((2, 1, 4, 4, 3), np.uint8), np.full((2, 1, 4, 4, 3), 51, np.uint8)
    assert step_cache.psnr(grey, black) == pytest.approx(20 * np.log10(5))  # 255 / 51
    assert step_cache.psnr(grey, grey) is None


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    picture((250, 20, 20)).save(folder / "apple.png")
    (folder / "cases.txt").write_text(PROMPTS)
    return folder / "cases.txt"


@pytest.fixture(scope="module")
def arguments(model_folder, prompts):  # noqa: F811
    return step_cache.Arguments(
        model_folder,
        prompts.with_name("step_cache.json"),
        prompts=prompts,
        batch_size=2,
        seed=5,
        thresholds=(0.0, 100.0),
        max_skips=2,
        steps=6,
    )


@pytest.fixture(scope="module")
def model(model_folder):  # noqa: F811
    return pipeline.load(model_folder)


@pytest.fixture(scope="module")
def table(arguments, model):
    return step_cache.measure(arguments, model, step_cache.make_requests(arguments, model.config))


def test_the_table_has_what_the_videos_say(arguments, model, table):
    requests = [Request(PROMPT, [picture((250, 20, 20))], ["red apple"], seed=5, key=key) for key in KEYS]
    assert table.cases == 3

    def run(steps, plan=None):
        options = {"num_inference_steps": steps, "step_plan": plan, "return_trajectory": True, "batch_size": 2}
        first, last = (pipeline.generate(model, batch, **options) for batch in (requests[:2], requests[2:]))
        return tuple(
            np.concatenate([getattr(first, name), getattr(last, name)], axis).astype(np.float64)
            for name, axis in (("latents", 0), ("frames", 0), ("velocities", 1))
        )

    latents, frames, velocities = run(6)
    lengths = np.sqrt((velocities**2).sum(-1)).reshape(6, 3, -1)
    ratios = (lengths[1:] / lengths[:-1]).mean(-1)
    np.testing.assert_allclose(table.ratios, [1, *ratios.mean(1)], rtol=1e-6)
    np.testing.assert_allclose(table.spread, [0, *ratios.std(1)], atol=1e-6)

    exact, cached = table.measured
    assert (exact.threshold, exact.num_evaluations) == (0, 6)
    assert (exact.error, exact.psnr) == (exact.fewer_steps_error, exact.fewer_steps_psnr) == (0, None)
    plan = load_plan(f"{arguments.out}:100", pipeline.with_sampling(model.config, num_inference_steps=6).sampling)
    assert plan.evaluate == (True, False, False, True, False, True)
    assert (cached.threshold, cached.num_evaluations) == (100, 3)
    for found, decibels, other in (
        (cached.error, cached.psnr, run(6, plan)),
        (cached.fewer_steps_error, cached.fewer_steps_psnr, run(3)),
    ):
        errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(other[0], latents, strict=True)]
        assert found == pytest.approx(np.mean(errors), rel=1e-6)
        assert decibels == pytest.approx(20 * np.log10(255 / np.sqrt(((other[1] - frames) ** 2).mean())), rel=1e-6)
    assert cached.error != cached.fewer_steps_error


def test_the_file_holds_the_table_and_the_page_shows_it(arguments, table):
    assert StepTable.from_json(arguments.out.read_text()) == table
    report = json.loads(arguments.out.read_text())
    assert (report["sampling"]["solver"], report["sampling"]["num_inference_steps"]) == ("unipc", 6)
    lines = step_cache.write_table(table).splitlines()
    assert lines[2].startswith("| 0 | 6 of 6 | 0.0000 | 0.0000 | same frames | same frames |")
    assert f"| 100 | 3 of 6 | {table.measured[1].error:.4f} |" in lines[3]
    assert "3 cases of 5 frames, 12x8; unipc, 6 steps, shift 3, guidance 2; at most 2 skips in a row" in lines[-1]
    assert not list(arguments.out.parent.glob(".*.part"))


def test_cases_of_emoji_world_have_the_size_of_the_model(model):
    config = pipeline.with_sampling(model.config, height=56, width=72, num_frames=9)
    requests = step_cache.emoji_requests(config, 2, seed=3)
    assert [request.key for request in requests] == ["0", "1"]
    assert {request.seed for request in requests} == {3}
    pipeline.prepare(config, model.tokenizer, requests[0])


@pytest.mark.parametrize(
    ("lines", "change", "message"),
    [
        ("one@@a red apple@@missing.png", {}, "missing.png"),
        (PROMPTS, {"thresholds": (-1.0,)}, "threshold=-1.0"),
        (PROMPTS, {"keep_first": 2.0}, "keep_first=2.0"),
        (PROMPTS, {"solver": "heun"}, "heun"),
        (PROMPTS, {"frames": 4}, "num_frames=4"),
        (PROMPTS, {"out": pathlib.Path()}, "is a folder"),
        (PROMPTS, {"cases": 0}, "cases=0 must be at least 1"),
    ],
)
def test_what_is_wrong_is_found_before_weights_are_read(lines, change, message, arguments, model, tmp_path):
    picture((250, 20, 20)).save(tmp_path / "apple.png")
    (tmp_path / "cases.txt").write_text(lines)
    values = {name: getattr(arguments, name) for name in arguments.__dataclass_fields__}
    values |= {"prompts": tmp_path / "cases.txt"} | change
    with pytest.raises(ValueError, match=message):
        step_cache.make_requests(step_cache.Arguments(**values), model.config)


def test_a_row_of_another_size_is_refused(arguments, model, tmp_path):
    (tmp_path / "cases.jsonl").write_text(json.dumps({"prompt": PROMPT, "height": 16, "width": 16}))
    values = {name: getattr(arguments, name) for name in arguments.__dataclass_fields__}
    with pytest.raises(ValueError, match="one table is for one size"):
        step_cache.make_requests(step_cache.Arguments(**values | {"prompts": tmp_path / "cases.jsonl"}), model.config)


def test_a_case_that_fails_is_named(arguments, model, monkeypatch):
    requests = step_cache.make_requests(arguments, model.config)

    def generate(model, batch, **options):
        return pipeline.Result(None, None, (), failures=(None, "the latents are not finite after step 2 of 6"))

    monkeypatch.setattr(pipeline, "generate", generate)
    with pytest.raises(ValueError, match="case 'two', full, 6 steps: the latents are not finite after step 2 of 6"):
        step_cache.measure(arguments, model, requests)
