"""The README's training command on the smoke preset, as a user runs it."""

import dataclasses
import fcntl
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import train
from magref_jax import checkpoint, pipeline
from magref_jax.data import clips
from magref_jax.data.precompute import encode_batch
from magref_jax.models.adapters import LoraConfig
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


def saved_state(out: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(out / f"checkpoints/{step}/items/state")
    return {name: np.asarray(leaf) for name, leaf in found.items()}


def test_the_same_command_goes_on_to_the_bit_and_a_longer_one_from_there(smoke, tmp_path):
    """From the checkpoint of step 15 of 20, in another folder than the one that its preset is in, as if step 20 never was."""
    finished, out = smoke[0], tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "20")
    command = [sys.executable, str(ROOT / "train.py"), "configs/smoke.py", "--output-dir", "run", "--num-steps", "22"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = lines(finished), lines(out)
    assert after[:15] == before[:15]
    for name in ("step", "loss", "gradient_norm", "skipped"):
        assert [line[name] for line in after[15:20]] == [line[name] for line in before[15:]]
    one, other = saved_state(finished, 20), saved_state(out, 20)
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        assert leaf.tobytes() == other[name].tobytes(), name
    assert [line["step"] for line in after[20:]] == [21, 22]
    # It learns on, from where it was and not from the start.
    assert after[-1]["loss"] < before[14]["loss"]


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """What train.py says when it refuses a request."""
    with pytest.raises(SystemExit) as exit:
        train.main([str(argument) for argument in arguments])
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())  # tyro puts what it says into a box
    assert exit.value.code == 2
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        (None, "preset.py is not a Python file; the presets in"),
        ("x = (", "preset.py, line 1: SyntaxError: '(' was never closed"),
        (
            "import magref_jax\n\nconfig = magref_jax.nothing",
            "preset.py, line 3: AttributeError: module 'magref_jax' has",
        ),
        ("from configs.smoke import config as other", "must have a `config` that is a TrainConfig; it has none"),
        ("config = {}", "must have a `config` that is a TrainConfig; it has one of type dict"),
        (
            "from magref_jax.training.config import Events\nconfig = Events(keep=0)",
            "preset.py, line 2: Events.keep=0 must be 1 or more",
        ),
    ],
)
def test_a_preset_that_is_none_is_refused_with_its_line(tmp_path, capsys, preset, message):
    if preset is not None:
        (tmp_path / "preset.py").write_text(preset)
    assert message in refused(capsys, tmp_path / "preset.py")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-steps 0", "num_steps=0 must be 1 or more"),
        ("--config.seed -1", "seed=-1 must be 0 or more"),
        ("--config.accumulation-steps 3", "accumulation_steps=3 must divide the batch_size=8 of phase 0"),
        ("--config.events.keep 0", "Events.keep=0 must be 1 or more"),
        ("--config.task.objective.text-dropout 1.5", "ObjectiveConfig.text_dropout=1.5 must be in [0, 1]"),
        ("--config.task.objective.flow-shift 0", "ObjectiveConfig.flow_shift=0.0 must be greater than 0"),
        ("--config.task.no-such-option 3", "no-such-option"),
        ("--config.optimizer.learning-rate fast", "fast"),
        ("--mesh fsdp=3", "mesh='fsdp=3' means fsdp=3, which does not use the 8 devices"),
        ("--output-dir gs://bucket/runs", "--output-dir gs:/bucket/runs: gs:// cannot be read or written"),
        ("--compile-cache s3://bucket/programs", "--compile-cache s3://bucket/programs: s3:// cannot be"),
        ("--plan v5p:2x2x1 --plan-json gs://bucket/plan", "--plan-json gs:/bucket/plan: gs:// cannot be"),
        ("--config.task.folder gs://bucket/model", "--config.task.folder gs:/bucket/model: gs:// cannot be"),
        ("--plan v5p-what", "topology='v5p-what'"),
        ("--output-dir a_file", "a_file is a file, not a folder"),
        ("--output-dir a_file/run", "a_file is a file, not a folder"),
        ("--config.task.folder missing", "missing"),
        ("--config.task.folder torch_folder", "torch_folder"),
        ("--config.task.trainable decoder", "trainable='decoder' matches no parameter"),
        ("--config.task.data.num-clips 4", "phase 0 has batch_size=8, but there are only 4 clips"),
        ("--coordinator localhost:1", "num_processes and process_id not given"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("here")
    (tmp_path / "torch_folder").mkdir()
    (tmp_path / "torch_folder" / "model_index.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(checkpoint, "restore_model", lambda *_, **__: pytest.fail("weights were read"))
    assert message in refused(capsys, SMOKE, "--compile-cache", "none", *options.split())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not pathlib.Path("/proc").is_dir(), reason="to see what is loaded")
@pytest.mark.parametrize("arguments", [[], ["--num-steps", "3"]])
def test_without_a_preset_the_usage_is_told(capsys, arguments):
    assert "usage: python train.py configs/NAME.py" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-steps 10", "num_steps=10: the run in {out} has done 20 steps; give more"),
        ("--config.task.model.dit.dim 32", "20 is of another training state: "),
        ("--config.optimizer.method muon", "20 is of another training state: "),
        ("--config.task.data.num-clips 17", "a run goes on with the records, their order and the seed"),
        ("--config.seed 1", "a run goes on with the records, their order and the seed"),
        ("--config.task.trainable head/.*", "20 is of another training state: "),
        ("--config.optimizer.ema-decay None", "20 is of another training state: "),
    ],
)
def test_a_run_that_cannot_go_on_is_refused_and_left_as_it_is(smoke, monkeypatch, capsys, options, message):
    out = smoke[0]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(checkpoint, "restore_model", lambda *_, **__: pytest.fail("weights were read"))
    said = refused(capsys, SMOKE, "--output-dir", out, "--compile-cache", "none", *options.split())
    assert message.format(out=out) in said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_what_a_continued_run_does_differently_is_said():
    config = train.load_config(str(SMOKE))
    before = train.as_json(config)
    longer = dataclasses.replace(config, num_steps=config.num_steps + 1)
    assert train.config_changes(before, train.as_json(longer)) == []
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.5)
    changed = train.as_json(dataclasses.replace(longer, optimizer=optimizer))
    assert train.config_changes(before, changed) == ["config.optimizer.learning_rate is 0.5, was 0.01"]


def test_a_second_run_into_the_same_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "restore_model", lambda *_, **__: pytest.fail("weights were read"))
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("a+") as file:
        file.write("process 5 on elsewhere")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        said = refused(capsys, SMOKE, "--output-dir", tmp_path / "run", "--compile-cache", "none")
    assert "run is being written to by process 5 on elsewhere" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_model_folder_of_other_weights_is_said(smoke, tmp_path):
    config = train.load_config(str(SMOKE))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        saved = checkpointer.restore(smoke[0] / "checkpoints" / "20" / "items" / "config")
    assert saved["weights"] == hashlib.sha256((config.task.folder / "MANIFEST.json").read_bytes()).hexdigest()
    now = train.as_json(config)
    assert train.changes(saved, now | {"weights": saved["weights"]}) == []
    (change,) = train.changes(saved, now | {"weights": train.weights_digest(smoke[0] / "model")})
    assert change == f"what config.task.folder holds: {config.task.folder} has other files"
    assert train.changes({**now}, now | {"weights": saved["weights"]}) == []  # a checkpoint of before knows of none


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.py")))
def test_every_preset_loads(name):
    config = train.load_config(str(ROOT / "configs" / name))
    assert config.num_steps >= 1


@pytest.mark.parametrize("name", ["smoke.py", "emoji_vae.py", "magref_14b_480p.py", "magref_14b_lora.py"])
def test_a_word_that_is_no_option_is_refused(name, capsys):
    """It used to be taken for the names of what is trained, which had no option."""
    assert "Unrecognized options: 50" in refused(capsys, f"configs/{name}", "50")


def test_what_is_trained_has_an_option():
    assert train.parse([str(SMOKE), "--config.task.trainable", "head/.*"]).config.task.trainable == "head/.*"
    lora = train.parse(["configs/magref_14b_lora.py", "--config.task.trainable.rank", "8"])
    assert lora.config.task.trainable == LoraConfig(rank=8)


@pytest.mark.parametrize("name", ["checkpoint", "keep", "keep_every", "validation", "sample", "report"])
def test_an_event_after_no_steps_is_refused(name):
    with pytest.raises(ValueError, match=f"Events.{name}=0 must be 1 or more"):
        Events(**{name: 0})
