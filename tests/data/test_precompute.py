"""Encoded records hold what the encoders say of the examples that training would have made, however the work was cut."""

import dataclasses
import hashlib
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from magref_jax import pipeline
from magref_jax.conditioning.case import encode_cases, stack_cases
from magref_jax.data import precompute as module
from magref_jax.data.clips import Choice, make_example
from magref_jax.data.emoji_records import EmojiSource
from magref_jax.data.emoji_tokenizer import build_tokenizer
from magref_jax.data.emoji_world import EmojiWorldConfig
from magref_jax.data.precompute import precompute
from magref_jax.data.records import open_records, write_records
from magref_jax.sharding import make_mesh
from tests import tiny_model

MODEL = dataclasses.replace(
    tiny_model.CONFIG, sampling=dataclasses.replace(tiny_model.CONFIG.sampling, height=24, width=32, num_frames=5)
)
WORLD = EmojiWorldConfig(width=32, height=24, num_frames=4, sprite_size=8, max_subjects=2, horizontal_speed=1, vertical_speed=1, bounce_height=4)  # fmt: skip
CHOICE = Choice(drop_reference=0.0)


class TwoSizes:
    """Emoji clips of two sizes in turns."""

    def __init__(self, count: int) -> None:
        self.parts = [EmojiSource(WORLD, count=count), EmojiSource(dataclasses.replace(WORLD, width=40), count=count)]
        self.sizes = [self.parts[index % 2].sizes[0] for index in range(count)]
        self.fingerprint = "two sizes"

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int):
        return self.parts[index % 2][index]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config, tokenizer, params = make_world(tmp_path_factory.mktemp("tiny"))
    return config, tokenizer, jax.tree.map(jax.numpy.asarray, params)


def make_world(folder: pathlib.Path):
    """What `precompute` takes besides a source and a folder: config, tokenizer and parameters."""
    build_tokenizer(tiny_model.WORDS, folder / "tokenizer", text_len=MODEL.dit.text_len)
    params = tiny_model.random_params(MODEL)
    params.pop("dit")
    return MODEL, pipeline.load_tokenizer(folder), params


def run(source, out: pathlib.Path, world, **changes):
    arguments = {"layouts": 2, "choice": CHOICE, "first_frame_target": "canvas", "seed": 3, "batch_size": 2}
    return precompute(source, out, *world, **(arguments | changes))


def contents(folder: pathlib.Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def encoded(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    return TwoSizes(5), folder, run(TwoSizes(5), folder, world)


def test_cases_are_the_encoded_examples(world, encoded):
    config, tokenizer, params = world
    source, _, records = encoded
    encoders = pipeline.encoders(config, params)
    conditioning_of = jax.jit(lambda arrays: encode_cases(encoders, arrays, 5))
    latents_of = jax.jit(lambda frames: encoders.frames(frames))
    assert len(records) == 5
    for index in (0, 4):
        record, original = records[index], source[index]
        assert (record.frames, record.video, len(record.cases)) == (None, None, 2)
        assert record.references == original.references
        for layout, case in enumerate(record.cases):
            rng = np.random.default_rng([3, index, layout])
            example = make_example(config, tokenizer, original, rng, CHOICE, "canvas")
            expected = vars(conditioning_of(stack_cases([example.case])))
            text = expected.pop("text_embeddings")[0]
            embeddings = record.captions[case.caption].embeddings
            tokens = int(example.case.attention_mask.sum())
            assert embeddings.shape == (tokens, 16)
            np.testing.assert_allclose(embeddings, text[:tokens], atol=2e-3)
            assert not text[tokens:].any()
            expected["clean_latents"] = latents_of(example.frames[None] / np.float32(127.5) - 1)
            expected["subject_cells"] = example.subject_cells[None]
            for name, value in expected.items():
                stored = getattr(case, name)
                assert stored.dtype == np.float16
                np.testing.assert_allclose(stored, value[0], rtol=1e-3, atol=4e-3, err_msg=name)


def test_layouts_differ_and_repeat(encoded, world, tmp_path):
    _, folder, records = encoded
    assert not np.array_equal(records[1].cases[0].reference_latents, records[1].cases[1].reference_latents)
    run(TwoSizes(5), tmp_path, world)
    assert contents(tmp_path) == contents(folder)


def test_what_is_stopped_goes_on_to_the_same_files(world, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_RECORDS", 2)
    run(TwoSizes(5), tmp_path / "straight", world)

    class Stopped(TwoSizes):
        def __getitem__(self, index):
            if index == 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        run(Stopped(5), tmp_path / "halting", world)
    assert (tmp_path / "halting/records-00000.array_record").exists()
    run(TwoSizes(5), tmp_path / "halting", world)
    assert contents(tmp_path / "halting") == contents(tmp_path / "straight")


def test_parts_are_the_whole(world, encoded, tmp_path):
    _, _, records = encoded
    for part in range(2):
        run(TwoSizes(5), tmp_path / f"part-{part}", world, part=(part, 2))
    joined = open_records(str(tmp_path / "part-*"))
    assert [record.id for record in joined] == [record.id for record in records]
    np.testing.assert_allclose(joined[4].cases[1].clean_latents, records[4].cases[1].clean_latents, atol=4e-3)


def test_a_mesh_changes_nothing(world, encoded, tmp_path):
    config, tokenizer, params = world
    _, _, records = encoded
    mesh = make_mesh("data=2,fsdp=2", jax.devices()[:4])
    abstract = pipeline.place_params(mesh, jax.eval_shape(lambda: params))
    params = jax.tree.map(lambda leaf, placed: jax.device_put(leaf, placed.sharding), params, abstract)
    meshed = run(EmojiSource(WORLD, count=5), tmp_path, (config, tokenizer, params), mesh=mesh, batch_size=4)
    for index in (0, 4):  # those that both sources have
        for name in ("clean_latents", "reference_latents", "image_embeddings"):
            actual, expected = (getattr(source[index].cases[0], name) for source in (meshed, records))
            np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=4e-3)


PROCESS = """
import sys
import jax

number, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_default_matmul_precision", "highest")
jax.distributed.initialize(f"localhost:{port}", 2, number)

import pathlib
from tests.data.test_precompute import *

config, tokenizer, params = make_world(pathlib.Path(folder) / f"tokenizer{number}")
mesh = make_mesh("data=2,fsdp=2")
abstract = pipeline.place_params(mesh, jax.eval_shape(lambda: params))
place = lambda leaf, placed: jax.make_array_from_callback(leaf.shape, placed.sharding, lambda index: leaf[index])
params = jax.tree.map(place, params, abstract)
source = EmojiSource(WORLD, count=5)
for _ in range(2):  # the second time, all is there
    records = run(source, pathlib.Path(folder) / "out", (config, tokenizer, params), mesh=mesh, batch_size=4)
print(number, len(records), records.fingerprint)
"""


@pytest.mark.slow
def test_processes_encode_together(world, tmp_path):
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    commands = [[sys.executable, "-c", PROCESS, str(number), str(port), str(tmp_path)] for number in range(2)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][1][-3000:] + outputs[1][1][-3000:]
    lines = [output.split()[-3:] for output, _ in outputs]  # after what the transport says
    assert [line[:2] for line in lines] == [["0", "5"], ["1", "5"]]
    assert lines[0][2] == lines[1][2]
    together, alone = open_records(tmp_path / "out"), run(EmojiSource(WORLD, count=5), tmp_path / "alone", world)
    for record, expected in zip(together, alone, strict=True):
        for case, other in zip(record.cases, expected.cases, strict=True):
            assert case.caption == other.caption
            for name in ("clean_latents", "reference_latents", "image_embeddings"):
                np.testing.assert_allclose(getattr(case, name), getattr(other, name), rtol=1e-3, atol=4e-3)


def test_records_of_other_weights_or_choices_are_not_reused(world, encoded):
    config, tokenizer, params = world
    _, folder, _ = encoded
    assert len(run(TwoSizes(5), folder, world)) == 5  # as it is: opened
    with pytest.raises(ValueError, match="made with layouts=2, now it is 3"):
        run(TwoSizes(5), folder, world, layouts=3)
    with pytest.raises(ValueError, match="made with inputs=5, now it is 4"):
        run(TwoSizes(4), folder, world)
    others = jax.tree.map(lambda leaf: leaf + 1e-3, params)
    with pytest.raises(ValueError, match="made with weights="):
        run(TwoSizes(5), folder, (config, tokenizer, others))


def test_what_cannot_be_encoded_is_named(world, tmp_path):
    with pytest.raises(ValueError, match="record 0, 'train-0-0': .*Choice.num_subjects=1"):
        run(EmojiSource(dataclasses.replace(WORLD, subject_counts=(0, 1)), count=2), tmp_path, world, choice=Choice(num_subjects=1))  # fmt: skip
    with pytest.raises(ValueError, match="part=2/2"):
        run(TwoSizes(5), tmp_path, world, part=(2, 2))
    with pytest.raises(ValueError, match="layouts=0"):
        run(TwoSizes(5), tmp_path, world, layouts=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere has no records: there is no records.json|no folder of records is at nowhere"),
        (["gs://x/records"], "records gs://x/records: gs:// cannot be read"),
        (["records", "--model", "nowhere"], "nowhere does not exist; a model folder holds config.json"),
        (["records", "--model", "s3://x"], "--model s3:/x: s3:// cannot be read"),
        (["records", "--out", "gs://x"], "--out gs:/x: gs:// cannot be read"),
        (["records", "--out", "file"], "file is a file, not a folder"),
        (["records", "--part", "1"], "part='1' must be K/N"),
        (["records", "--part", "1/1"], "part=1/1 must be one of 0/N to N-1/N, with N at most 1 records"),
        (["records", "--layouts", "0"], "layouts=0 must be at least 1"),
        (["records", "--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["records", "--mesh", "planes=2"], "planes"),
    ],
)
def test_what_is_asked_for_wrongly_is_said_before_weights_are_read(tmp_path, monkeypatch, capsys, arguments, message):
    write_records(tmp_path / "records", [EmojiSource(WORLD, count=1)[0]])
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    bundled = pathlib.Path(module.__file__).parents[1] / "bundled" / "emoji"
    for option, value in (("--model", str(bundled)), ("--out", "out")):
        arguments = arguments if option in arguments else [*arguments, option, value]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["precompute", *arguments])
    monkeypatch.setattr(module.checkpoint, "restore_model", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 2
    assert re.search(f"^data.precompute: .*(?:{message})", capsys.readouterr().err, re.MULTILINE)
    assert sorted(tmp_path.rglob("*")) == before
