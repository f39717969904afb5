"""`--dry_run`: pictures and figures without a weight, checked against geometry and counting written out here."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

import sample
from magref_jax import dry_run, pipeline
from magref_jax.diffusion.step_cache import StepPlan
from tests.tiny_model import CONFIG, model_folder, picture  # noqa: F401

ROOT = pathlib.Path(sample.__file__).parent


@pytest.fixture
def plan(model_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Runs `sample.py --dry_run` in a folder with two images; what it prints. It must read no weight."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "load", lambda *args, **kwargs: pytest.fail("weights were read"))
    picture((250, 20, 20)).save("apple.png")
    picture((20, 20, 250), (30, 20)).save("fish.png")

    def run(*arguments):
        sample.main(["--model", str(model_folder), "--compile_cache", "none", "--dry_run", *arguments])
        return capsys.readouterr().out

    return run


def blocks(printed):
    """The lines of each shape by their names."""
    parts = [part for part in printed.split("\n\n") if "latents " in part]
    return [dict(re.split(r"  +", line, maxsplit=1) for line in part.strip().splitlines()) for part in parts]


# By hand, for one evaluation of the tiny DiT: 18 video tokens of width 24, feed-forward of 32, 40 text and 5 image tokens.
# Per layer: query, key, value, out; query and out of the attention to the context; up and down; and two attentions.
PRODUCTS = 4 * 18 * 24 * 24 + 2 * 18 * 24 * 24 + 2 * 18 * 24 * 32
SCORES = 2 * 18 * 18 * 24 + 2 * 18 * 45 * 24
# Patches of 2 x 2 cells of 36 channels in and of 16 out; the timestep through widths 16, 24, 24 and 6 * 24.
ENDS = 18 * 4 * 24 * (36 + 16) + (16 * 24 + 24 * 24 + 24 * 6 * 24)
FLOPS = 2 * (2 * (PRODUCTS + SCORES) + ENDS)  # two operations each, two layers


def number(value, unit):
    """Three digits."""
    power = max(exponent for exponent in (0, 3, 6, 9) if value >= 10**exponent)
    return f"{float(f'{value / 10**power:.3g}'):g} {dict(zip((0, 3, 6, 9), ('', 'k', 'M', 'G'), strict=True))[power]}{unit}"


def test_a_plan_is_two_pictures_and_the_figures_of_the_run(plan, tmp_path):
    text = "--prompt|the apple, and the fish|--ref|apple.png:apple|--background|fish.png:fish|--layout|v2:input"
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "the_apple_and_the_fish.mp4").touch()  # of an earlier run, which it does not touch
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    printed = plan(*text.split("|"), "--out", "made")
    key = "the_apple_and_the_fish"
    expected = {tmp_path / "made" / "dry_run" / f"{key}_{name}.png" for name in ("canvas", "mask")}
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before | expected

    (lines,) = blocks(printed)
    assert lines["size"] == "12x8, 5 frames, 4 after the canvas is dropped"
    assert lines["cases"] == "1 in 1 batch"
    assert lines["latents"] == "3 x 4 x 6 x 16"  # strides of 2 each way, the first frame by itself
    assert lines["tokens"].startswith("18 video, 40 text (of 40, the rest is padding), 5 image")
    assert lines["steps"] == "3 of unipc, 3 of them with the network, 2 branches of guidance"
    expected = f"{number(2 * FLOPS, 'FLOP')} per step and case, {number(3 * 2 * FLOPS, 'FLOP')} in all"
    assert lines["operations"] == expected
    # Everything that is stored is bfloat16.
    stored = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(pipeline.abstract_params(CONFIG))) * 2
    found = re.fullmatch(
        r"(\S+ .?B) per device: parameters (\S+ .?B), then at most encoding (\S+) .?B, sampling (\S+) .?B, decoding (\S+) .?B",
        lines["memory"],
    )
    assert found, lines["memory"]
    assert found[2] == number(stored, "B")
    assert all(float(value) > 0 for value in found.groups()[2:])

    # The canvas is 12 x 8, its cells 6 x 8. The apple, 20 x 20, is fitted into the left one: 6 x 6, one row of white above
    # and below. The fish covers the right one. Latent cells are 2 x 2 pixels, so all of them show something: no tint is
    # missing, though rows 0 and 7 of the apple's cell are white.
    canvas, mask = (
        np.asarray(Image.open(tmp_path / "made" / "dry_run" / f"{key}_{name}.png")) for name in ("canvas", "mask")
    )
    assert canvas.shape == mask.shape == (640, 960, 3)
    assert np.array_equal(middle(canvas, 0, 2), (255, 255, 255))
    assert np.array_equal(middle(mask, 0, 2), tinted((255, 255, 255)))
    check_tints(canvas, mask, known=np.ones((4, 6), bool))


def middle(image, row, column, scale=80):
    """A canvas pixel in a picture of 80 times the size, away from the outlines."""
    return image[row * scale + scale // 2, column * scale + scale // 2]


def tinted(colour):
    return np.round(0.6 * np.array(colour) + 0.4 * np.array((230, 60, 40)))


def faded(colour):
    return np.round(255 - 0.25 * (255 - np.array(colour, float)))


def check_tints(canvas, mask, known):
    for row in range(8):
        for column in range(12):
            colour, found = middle(canvas, row, column), middle(mask, row, column)
            expected = (tinted if known[row // 2, column // 2] else faded)(colour)
            np.testing.assert_allclose(found, expected, atol=1, err_msg=f"row {row}, column {column}")


def test_the_mask_is_tinted_where_a_reference_is_and_only_there(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "lower", lambda *args, **kwargs: {})  # no program, no memory: pictures alone
    plan("--prompt", "the apple", "--ref", "apple.png", "--layout", "v1")
    canvas, mask = (
        np.asarray(Image.open(tmp_path / "outputs" / "dry_run" / f"the_apple_{name}.png"))
        for name in ("canvas", "mask")
    )
    # The middle column, 4 x 8 pixels, holds the square image 4 x 4: rows 2 to 5, columns 4 to 7.
    known = np.zeros((4, 6), bool)
    known[1:3, 2:4] = True
    check_tints(canvas, mask, known)
    assert np.array_equal(middle(mask, 0, 0), (255, 255, 255))
    assert not np.array_equal(middle(mask, 3, 5), faded(middle(canvas, 3, 5)))


def test_a_plan_for_many_devices_and_several_sizes(plan, tmp_path):
    cases = [
        {"key": "a", "prompt": "the apple", "image": "apple.png:apple"},
        {"key": "b", "prompt": "the fish", "image": "fish.png", "size": "8x16", "frames": 7},
        {"key": "c", "prompt": "the fish and the apple", "images": ["fish.png:fish", "apple.png:apple"], "seed": 1},
    ]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, cases)))
    printed = plan("--prompts", "cases.jsonl", "--mesh", "data=8", "--batch_size", "2", "--steps", "2")
    pictures = {path.name for path in (tmp_path / "outputs").rglob("*.png")}
    assert pictures == {f"{key}_{name}.png" for key in "abc" for name in ("canvas", "mask")}
    first, second = blocks(printed)
    assert first["size"].startswith("12x8, 5 frames")
    assert first["cases"] == "2 in 1 batch"
    assert second["size"] == "8x16, 7 frames, 6 after the canvas is dropped"
    assert (second["cases"], second["latents"]) == ("1 in 1 batch", "4 x 8 x 4 x 16")
    assert second["tokens"].startswith("32 video")
    assert "sampling" in first["memory"]
    assert "sampling" in second["memory"]


def test_a_model_folder_without_weights_is_named(plan, model_folder, tmp_path):  # noqa: F811
    shutil.copytree(model_folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "dit")
    with pytest.raises(SystemExit, match="sample.py: .*dit does not exist; expected the parameters of a network"):
        plan("--prompt", "the apple", "--model", "model")


def test_operations_of_a_step_cache_and_of_no_guidance():
    config = pipeline.with_sampling(CONFIG, guidance_scale=1.0)
    plan = StepPlan((True, False, True), ((1.0, 0.0),) * 3)
    lines = dry_run.describe(config, [[None, None], [None]], 40, plan)
    assert lines["cases"] == "3 in 2 batches"
    assert lines["steps"] == "3 of unipc, 2 of them with the network, 1 branch of guidance"
    assert lines["operations"] == f"{number(FLOPS, 'FLOP')} per step and case, {number(6 * FLOPS, 'FLOP')} in all"


COLD = r"""
import resource, sys
import sample
sample.main(["--dry_run", *sys.argv[1:]])
print("\nkilobytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "torch" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is counted in other units elsewhere")
def test_a_cold_plan_of_the_bundled_model_takes_less_than_two_gigabytes(tmp_path):
    command = [sys.executable, "-c", COLD, "--out", str(tmp_path / "out"), "--compile_cache", "none"]
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    kilobytes = int(re.search(r"kilobytes (\d+)", done.stdout)[1])
    print(f"{seconds:.1f} s, {kilobytes / 1e6:.2f} GB\n{done.stdout}")
    assert kilobytes * 1024 < 2e9
    (lines,) = blocks(done.stdout)
    assert lines["cases"] == "2 in 2 batches"
