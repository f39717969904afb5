"""Whole runs of the tiny model: what is trained, what stays, what comes out."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest

import train
from magref_jax import checkpoint, pipeline
from magref_jax.convert.lora import read_lora
from magref_jax.data.clips import Phase
from magref_jax.data.emoji_records import EmojiSource
from magref_jax.data.records import write_records
from magref_jax.models.adapters import LoraConfig
from magref_jax.sharding import make_mesh
from magref_jax.training.config import (
    DiTTask,
    EmojiData,
    Events,
    OptimizerConfig,
    RecordData,
    TrainConfig,
    VAEPhase,
    VAETask,
)
from magref_jax.training.dit_task import _Run, check_records, make_samples, validation_batches, why_no_validation
from magref_jax.training.job import Stopped
from magref_jax.training.step import TrainState
from tests.tiny_model import write_model
from tests.training.tiny_run import MODEL, WORLD, tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model", MODEL, dtype=None)


def run(config: TrainConfig, out: pathlib.Path) -> TrainState:
    """On one device: tests have eight."""
    return train.train(config, out, make_mesh("", jax.devices()[:1]))


def lines(out: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def dit_params(folder: pathlib.Path) -> dict[str, np.ndarray]:
    params = checkpoint.restore_params(folder / "dit", pipeline.abstract_params(MODEL, only=("dit",))["dit"])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params)}


def changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not np.array_equal(before[name], after[name])}


def test_full_training_changes_every_parameter_and_writes_a_model_folder(folder, tmp_path):
    config = dataclasses.replace(tiny_run(folder), accumulation_steps=2)
    state = run(config, tmp_path)
    before, after = dit_params(folder), dit_params(tmp_path / "model")
    unchanged = set(before) - changed(before, after)
    assert not unchanged
    # What is written is the average, not the last step.
    average = jax.tree.leaves(state.ema)
    for leaf, written in zip(average, jax.tree.leaves(checkpoint_tree(tmp_path / "model")), strict=True):
        np.testing.assert_array_equal(leaf, written)
    model = pipeline.load(tmp_path / "model")
    frozen = pipeline.load(folder)
    for name in ("vae", "text_encoder", "image_encoder"):
        jax.tree.map(np.testing.assert_array_equal, model.params[name], frozen.params[name])
    assert model.config == frozen.config
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def checkpoint_tree(folder: pathlib.Path) -> dict:
    return checkpoint.restore_params(folder / "dit", pipeline.abstract_params(MODEL, only=("dit",))["dit"])


def test_parts_by_name_leave_the_rest_bitwise_and_without_moments(folder, tmp_path):
    config = tiny_run(folder, trainable=r"blocks/cross_attention/.*|head/modulation")
    state = run(config, tmp_path)
    names = changed(dit_params(folder), dit_params(tmp_path / "model"))
    assert names
    assert all("cross_attention" in name or name == "['head']['modulation']" for name in names)
    trained = {name for name in dit_params(folder) if "['cross_attention']" in name} | {"['head']['modulation']"}
    assert names == trained
    # Adam holds two moments per trained parameter and nothing for the others.
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer_state) if leaf.ndim]
    assert len(moments) == 2 * len(trained)


def test_a_lora_of_records_leaves_the_base_and_loads_beside_it(folder, tmp_path, capsys):
    """As the recipe goes: records to train on, and no folder of others to validate on, which is said."""
    before = dit_params(folder)
    source = EmojiSource(WORLD, "train", seed=1, count=8)
    write_records(tmp_path / "data" / "train", [source[i] for i in range(8)])
    data = RecordData((tmp_path / "data" / "train",), (tmp_path / "data" / "validation",))
    config = tiny_run(folder, trainable=LoraConfig(rank=2), data=data)
    events = dataclasses.replace(config.events, validation=1, sample=1)
    state = run(dataclasses.replace(config, events=events), tmp_path)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py:")]
    assert said.startswith(
        f"train.py: no validation and no sample sheets: there is no folder at {tmp_path}/data/validation"
    )
    assert not any("validation_loss" in line for line in lines(tmp_path))
    assert not changed(before, dit_params(folder))
    assert not (tmp_path / "model").exists()
    assert {jax.tree_util.keystr(path[-1:]) for path, _ in jax.tree.leaves_with_path(state.params)} == {
        "['a']",
        "['b']",
    }
    assert all(float(np.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(state.params))
    abstract = pipeline.abstract_params(MODEL, only=("dit",))["dit"]
    lora = read_lora(tmp_path / "lora.safetensors", MODEL.dit, abstract)
    assert len(lora.deltas) > 0
    with_lora = pipeline.load(folder, loras=[(tmp_path / "lora.safetensors", 1.0)])
    assert not np.array_equal(
        with_lora.params["dit"]["blocks"]["self_attention"]["query"]["kernel"],
        before["['blocks']['self_attention']['query']['kernel']"],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ({}, {}),
        ({"overfit": True}, {}),
        ({"layouts": 2}, {}),
        ({"trainable": LoraConfig(rank=2)}, {}),
        # The third step begins a phase, and the schedule is on its way down.
        (
            {"phases": (Phase(2, 4, num_latent_frames=2, reach=2), Phase(9, 2))},
            {"optimizer": OptimizerConfig("muon", 1e-3, warmup_steps=1, cycle_steps=(2, 2), ema_decay=0.9)},
        ),
        ({}, {"accumulation_steps": 2, "events": Events(checkpoint=2, validation=1, sample=2)}),
    ],
    ids=["plain", "overfit", "layouts", "lora", "phases", "events"],
)
def test_a_run_goes_on_where_it_stands(folder, tmp_path, task, options):
    def config(num_steps: int) -> TrainConfig:
        return dataclasses.replace(tiny_run(folder, num_steps=num_steps, **task), **options)

    whole = run(config(4), tmp_path / "whole")
    run(config(2), tmp_path / "cut")
    state = run(config(4), tmp_path / "cut")
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)
    losses = [[line["loss"] for line in lines(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert len(set(losses[0])) == 4


@pytest.mark.slow
def test_encoded_once_is_what_every_step_encodes(folder, tmp_path):
    """With layouts=1 the case of a clip is drawn once; the losses are of the size of those with a case of its own a step."""
    task = {"phases": (Phase(num_steps=100, batch_size=4, num_latent_frames=2, reach=2),)}
    run(tiny_run(folder, num_steps=2, **task), tmp_path / "pixels")
    run(tiny_run(folder, num_steps=2, layouts=1, **task), tmp_path / "encoded")
    assert (tmp_path / "encoded" / "encoded").is_dir()
    pixels, encoded = (np.array([line["loss"] for line in lines(tmp_path / name)]) for name in ("pixels", "encoded"))
    np.testing.assert_allclose(encoded, pixels, rtol=0.5)
    # The same clips, latents and noise in the first step, but for the choice of views: not the same number.
    assert not np.array_equal(encoded, pixels)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (EmojiData(WORLD, validation_clips=1), None),
        (EmojiData(WORLD, validation_clips=0), "task.data.validation_clips is 0."),
        (RecordData((pathlib.Path("a"),)), "task.data.validation_folders is empty."),
        (RecordData((pathlib.Path("a"),), (pathlib.Path("b/*"),)), "there is no folder at b/*"),
        (RecordData((pathlib.Path("a"),), (pathlib.Path("b"), pathlib.Path("c"))), "there is no folder at b, c"),
        (RecordData((pathlib.Path("a"),), (pathlib.Path("here/?"),)), None),
        (
            RecordData((pathlib.Path("a"),), (pathlib.Path("b"), pathlib.Path("here"))),
            None,
        ),  # one is missing: a mistake
    ],
)
def test_why_there_is_no_validation(tmp_path, monkeypatch, data, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "x").mkdir(parents=True)
    found = why_no_validation(DiTTask(pathlib.Path("model"), data, ()))
    assert found == reason or (reason is not None and found is not None and found.startswith(reason))


def test_every_clip_of_the_fixed_set_is_validated_on():
    """Eleven clips of two sizes: batches of eight at most, and none is left out."""
    source = [type("Record", (), {"number": number}) for number in range(11)]
    sizes = [(5, 24, 32)] * 9 + [(5, 32, 24)] * 2
    found = validation_batches(
        type("Source", (), {"sizes": sizes, "__getitem__": lambda self, i: source[i], "__len__": lambda self: 11})(),
        lambda record, rng: {"subject_cells": np.zeros((2, 1, 1)), "number": np.array(record.number)},
        lambda host: host["number"].tolist(),
        seed=0,
    )
    assert found == [[0, 1, 2, 3, 4, 5, 6, 7], [8], [9, 10]]


@pytest.mark.parametrize(
    ("size", "change", "message"),
    [
        ((24, 32), {}, None),
        ((24, 30), {}, "there are clips of 30x24 pixels: width=30 must be a positive multiple of"),
        ((24, 32), {"clean_latents": (3, 3, 4, 99)}, "record 'r': its clean_latents have the shape (3, 3, 4, 99)"),
        ((24, 32), {"text_embeddings": (MODEL.dit.text_len, 99)}, "record 'r': its text_embeddings have the shape"),
        ((24, 32), {"image_embeddings": (5, 99)}, "record 'r': its image_embeddings have the shape (5, 99)"),
        ((24, 32), {"reference_latents": None}, "record 'r': its reference_latents have the shape (), which must end"),
    ],
)
def test_records_of_another_size_or_model_are_refused_by_name(size, change, message):
    height, width = size
    stride, channels = MODEL.vae.spatial_stride, MODEL.vae.latent_channels
    latents = (3, height // stride, width // stride, channels)
    shapes = {
        "clean_latents": latents,
        "reference_latents": latents,
        "text_embeddings": (MODEL.dit.text_len, MODEL.dit.text_dim),
        "image_embeddings": (5, MODEL.dit.image_dim),
    } | change
    row = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if shape is not None}
    record = type("Record", (), {"id": "r", "cases": (row,), "height": height, "width": width})()
    source = type("Source", (), {"sizes": [(5, height, width)], "__getitem__": lambda self, i: record})()
    if message is None:
        return check_records(MODEL, source, lambda record, rng: row)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_records(MODEL, source, lambda record, rng: row)


class AnyRun(_Run):
    """With an error of its own at each noise level."""

    def __init__(self) -> None:
        pass

    frozen = None  # pyrefly: ignore

    def level_error(self, trained, frozen, batch, sigma):
        return batch * sigma, 1.0


def test_validation_and_sheets_ask_between_their_parts_whether_to_go_on(monkeypatch):
    asked = []

    def check() -> None:
        asked.append(None)
        if len(asked) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        AnyRun().validate([1.0, 2.0], None, check)
    assert len(asked) == 3

    def generate(model, requests, on_step):
        for step in range(9):
            on_step(step)

    asked.clear()
    monkeypatch.setattr(pipeline, "generate", generate)
    with pytest.raises(Stopped):
        make_samples(None, [], check)
    assert len(asked) == 3


def test_validation_and_samples(folder, tmp_path):
    config = tiny_run(folder, num_steps=2)
    events = dataclasses.replace(config.events, validation=1, sample=2)
    run(dataclasses.replace(config, events=events), tmp_path)
    found = lines(tmp_path)
    for line in found:
        levels = line["validation_loss_by_sigma"]
        assert list(levels) == ["0.1", "0.3", "0.5", "0.7", "0.9"]
        np.testing.assert_allclose(line["validation_loss"], np.mean(list(levels.values())), rtol=1e-6)
    assert found[0]["validation_loss"] != found[1]["validation_loss"]
    assert (tmp_path / "samples" / "step_2.png").stat().st_size > 1000


@pytest.mark.slow
def test_vae_and_then_a_new_dit_on_it(tmp_path):
    vae = TrainConfig(
        task=VAETask(
            model=MODEL,
            data=EmojiData(WORLD, num_clips=8, validation_clips=8),
            phases=(VAEPhase(4, 2, num_frames=3, crop=8),),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, ema_decay=0.5),
        num_steps=4,
    )
    run(vae, tmp_path / "vae")
    stored = pipeline.load_model_config(tmp_path / "vae" / "model")
    # Statistics are those of the latents, not those that the preset starts from.
    assert stored.vae.latent_mean != MODEL.vae.latent_mean
    config = tiny_run(tmp_path / "vae" / "model", num_steps=2, model=MODEL, start="random")
    run(config, tmp_path / "dit")
    model = pipeline.load(tmp_path / "dit" / "model")
    assert set(model.params) == set(checkpoint.NETWORKS)
    assert model.config.vae == stored.vae

    # The decoder alone, from there: latents stay where they are.
    sharper = dataclasses.replace(
        vae,
        task=dataclasses.replace(vae.task, folder=tmp_path / "dit" / "model", trainable="(decoder|post_quant)/.*"),
        num_steps=2,
    )
    run(sharper, tmp_path / "sharper")
    before, after = pipeline.load(tmp_path / "dit" / "model"), pipeline.load(tmp_path / "sharper" / "model")
    for name in ("encoder", "quant"):
        jax.tree.map(np.testing.assert_array_equal, before.params["vae"][name], after.params["vae"][name])
    kernels = [model.params["vae"]["decoder"] for model in (before, after)]
    assert any(not np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, kernels), strict=True))
    jax.tree.map(np.testing.assert_array_equal, before.params["dit"], after.params["dit"])


def test_a_deeper_start_needs_more_layers_than_the_folder_has(folder, tmp_path):
    with pytest.raises(ValueError, match=r"start='deeper' with model.dit.num_layers=2: must be more than the 2 of"):
        run(tiny_run(folder, start="deeper", model=MODEL), tmp_path)


def test_a_wrong_name_is_refused_before_anything_is_read(folder, tmp_path):
    with pytest.raises(ValueError, match="trainable='decoder' matches no parameter"):
        run(tiny_run(folder, trainable="decoder"), tmp_path)
