"""The README's training command on the smoke preset, as a user runs it."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from magref_jax import checkpoint, pipeline
from magref_jax.data import clips
from magref_jax.data.precompute import encode_batch
from magref_jax.sharding import make_mesh
from magref_jax.training.config import Events
from magref_jax.training.dit_task import open_sources

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = ROOT / "configs" / "smoke.py"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, float, str]:
    """The folder of a finished run, the seconds it took, and what it said."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    command = [sys.executable, "train.py", "configs/smoke.py", "--output-dir", str(out), "--num-steps", "20"]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, time.perf_counter() - started, done.stdout


def lines(out: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_it_takes_less_than_two_minutes(smoke):
    assert smoke[1] < 120


def test_there_is_one_line_a_step_with_the_loss_in_full(smoke):
    found = lines(smoke[0])
    assert [line["step"] for line in found] == list(range(1, 21))
    for line in found:
        assert np.float32(line["loss"]) == line["loss"]  # every bit of it


def test_the_first_loss_is_that_of_a_network_that_predicts_nothing(smoke):
    """The mean square of noise minus latents: 1 and the mean square of the latents, with independent noise."""
    config = train.load_config(str(SMOKE))
    task = config.task
    source, _ = open_sources(task, config.seed)
    model = pipeline.load(task.folder)
    _, numbers = clips.Batches(source, task.phases, lambda record, rng: {}, config.seed).schedule[0]
    rows = [
        clips.example_arrays(
            clips.make_example(
                model.config, model.tokenizer, source[number], np.random.default_rng(0), task.choice, "canvas"
            )
        )
        for number in numbers
    ]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    batch.pop("subject_cells")
    params = {name: tree for name, tree in model.params.items() if name != "dit"}
    latents = jax.jit(lambda batch: encode_batch(model.config, params, batch))(batch)["clean_latents"][:, 1:]
    # Two percent: noise and latents are not quite uncorrelated in 97,000 values.
    np.testing.assert_allclose(lines(smoke[0])[0]["loss_video"], 1 + float(jnp.mean(latents**2)), rtol=0.02)


def test_the_loss_falls_toward_its_floor(smoke):
    """One batch with one noise can be learnt by heart: the floor is 0. Twenty steps come a third of the way."""
    losses = [line["loss"] for line in lines(smoke[0])]
    assert losses[-1] < losses[0] / 1.4
    assert losses[-1] > 0


def test_what_it_writes_is_a_model_folder_that_samples(smoke):
    out, _, said = smoke
    assert f"python sample.py --model {out / 'model'}" in said
    model = pipeline.load(out / "model")
    assert set(model.params) == set(checkpoint.NETWORKS)
    result = model.generate(["the panda rises"], [[]], num_inference_steps=1, seed=0)
    assert result.frames.shape == (1, 8, 56, 72, 3)


def test_a_longer_run_goes_on_from_a_finished_one(smoke):
    out = smoke[0]
    before = lines(out)
    config = train.load_config(str(SMOKE))
    train.train(dataclasses.replace(config, num_steps=22), out, make_mesh("", jax.devices()[:1]))
    after = lines(out)
    assert after[:20] == before
    assert [line["step"] for line in after[20:]] == [21, 22]
    # It learns on, from where it was and not from the start.
    assert after[-1]["loss"] < before[14]["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python train.py configs/NAME.py"),
        (["configs/missing.py"], "configs/missing.py is not a Python file"),
    ],
)
def test_wrong_arguments_are_said_in_one_line(arguments, message):
    done = subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_continued_run_does_differently_is_said():
    config = train.load_config(str(SMOKE))
    before = train.as_json(config)
    longer = dataclasses.replace(config, num_steps=config.num_steps + 1)
    assert train.config_changes(before, train.as_json(longer)) == []
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.5)
    changed = train.as_json(dataclasses.replace(longer, optimizer=optimizer))
    assert train.config_changes(before, changed) == ["config.optimizer.learning_rate is 0.5, was 0.01"]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.py")))
def test_every_preset_loads(name):
    config = train.load_config(str(ROOT / "configs" / name))
    assert config.num_steps >= 1


@pytest.mark.parametrize("name", ["checkpoint", "keep", "keep_every", "validation", "sample", "report"])
def test_an_event_after_no_steps_is_refused(name):
    with pytest.raises(ValueError, match=f"Events.{name}=0 must be 1 or more"):
        Events(**{name: 0})
