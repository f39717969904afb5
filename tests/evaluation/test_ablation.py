"""The ablation: what each row changes, what it is scored on, and how results become a table and a plot."""

import dataclasses
import json
import pathlib
import shutil
import sys
import types
import xml.etree.ElementTree as ET

import jax
import numpy as np
import pytest

from configs.emoji import config as emoji
from configs.smoke import config as smoke
from magref_jax import pipeline
from magref_jax.config import ModelConfig
from magref_jax.data.clips import make_example
from magref_jax.data.emoji_records import make_record
from magref_jax.data.emoji_world import sample_clip
from magref_jax.evaluation import ablation
from magref_jax.evaluation.ablation import MARKERS, ROWS, Result, Run, Spread, Table
from magref_jax.evaluation.emoji_metrics import METRICS, evaluate
from magref_jax.training.dit_task import model_config

BUNDLED = pathlib.Path(pipeline.__file__).parent / "bundled" / "emoji"
WORLD = emoji.task.data.world
CASES = 3
# So few cases that a resampling may hold none for some metric.
pytestmark = pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")


def flat(value, path: str = "") -> dict[str, object]:
    """The fields of nested dataclasses by dotted path."""
    if not dataclasses.is_dataclass(value):
        return {path: value}
    fields: dict[str, object] = {}
    for field in dataclasses.fields(value):
        fields |= flat(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    return fields


# Rows

CHANGES = {
    "region": {},
    "full_mask": {"task.model.sampling.mask_mode": "full"},
    "no_injection": {"task.model.subject_alpha": 0.0},
    "no_cross_pair": {"task.choice.cross_pair": 0.0},
    "video_first": {
        "task.objective.first_frame_target": "video",
        "task.model.drop_frames": 0,
        "task.data.world.num_frames": 9,
    },
}
CHANGES["token_concat"] = CHANGES["video_first"] | {
    "task.model.dit.in_channels": 16,
    "task.model.reference_concat": "token",
}


@pytest.mark.parametrize("row", CHANGES)
def test_a_row_changes_what_it_says_and_nothing_else(row):
    base, config = (flat(ablation.row_config(emoji, name, 3, 2900, 500)) for name in ("region", row))
    assert {path: value for path, value in config.items() if value != base[path]} == CHANGES[row]


def test_every_row_is_known():
    assert set(ROWS) == {*CHANGES, "no_canvas"} == set(ablation.RowName.__args__)


def test_the_budget_is_a_share_of_the_preset():
    config = ablation.row_config(emoji, "region", seed=3, num_steps=2900, num_clips=500)
    assert (config.seed, config.num_steps, config.task.data.num_clips) == (3, 2900, 500)
    assert [phase.num_steps for phase in config.task.phases] == [400, 300, 200, 2000]
    assert config.optimizer.cycle_steps == (2880,)
    assert config.optimizer.warmup_steps == 20
    assert [dataclasses.replace(phase, num_steps=1) for phase in config.task.phases] == [
        dataclasses.replace(phase, num_steps=1) for phase in emoji.task.phases
    ]


def test_a_wrong_path_is_an_error():
    with pytest.raises(ValueError, match=r"task.model.mask: ModelConfig has no field 'mask'"):
        ablation.override(emoji, {"task.model.mask": 1})
    with pytest.raises(ValueError, match=r"seed.low: int has no field 'low'"):
        ablation.override(emoji, {"seed.low": 1})


def test_a_preset_without_a_dit_is_refused():
    other = dataclasses.replace(emoji, task=dataclasses.replace(emoji.task, model=None))
    with pytest.raises(ValueError, match="the preset must be one that trains a DiT"):
        ablation.row_config(other, "region", 0, 10, 10)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_trains_on_and_makes_the_frames_that_are_scored(row):
    task = ablation.row_config(smoke, row, 0, 4, 16).task
    model = model_config(task)
    target = task.objective.first_frame_target
    record = make_record(task.data.world, "train", 1, 0)
    tokenizer = pipeline.load_tokenizer(BUNDLED)
    example = make_example(model, tokenizer, record, np.random.default_rng(0), task.choice, target)

    assert len(example.frames) == model.sampling.num_frames == 9  # as the model's latents hold
    shown = example.frames[model.drop_frames :]
    world = WORLD.num_frames
    assert len(shown) >= world
    assert np.array_equal(shown[:world], record.frames[:world])  # the canvas is what is dropped
    assert np.array_equal(example.frames[0], example.case.canvas.image) == (target == "canvas")


def test_no_canvas_sees_nothing_of_the_references():
    task = ablation.row_config(smoke, "no_canvas", 0, 4, 16).task
    model = model_config(task)
    assert not pipeline.takes_references(model)
    assert model.image_encoder is None
    assert model.subject_alpha == 0
    params = pipeline.abstract_params(model)["dit"]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    assert not [path for path in paths if "image" in path]
    assert params["patch_embedding"]["kernel"].shape[0] == 4 * 16  # noise alone, in patches of 2x2


# Scores


@pytest.fixture
def truthful(monkeypatch):
    """In place of sampling: the true videos, with one frame too many; keeps the requests."""
    asked: list[pipeline.Request] = []

    def generate_videos(model, requests, batch_size, description, **overrides):
        asked.extend(requests)
        cross_pair = {"references: same": 0.0, "references: cross_pair": 1.0}[description]
        world = dataclasses.replace(WORLD, cross_pair=cross_pair)
        clips = [sample_clip(world, "held_out", 0, index) for index in range(len(requests))]
        videos = np.stack([clip.frames for clip in clips])
        return np.concatenate([videos, np.zeros_like(videos[:, :1])], axis=1), []

    monkeypatch.setattr(ablation, "generate_videos", generate_videos)
    return asked


def test_true_videos_score_as_such(truthful):
    model = pipeline.Model(emoji.task.model, {}, None)
    scores = ablation.score_model(model, WORLD, CASES, 2)
    assert set(scores) == {"same", "cross_pair"}
    assert set(scores["same"]) == set(METRICS)
    for metric in ("identity_top1", "present", "background", "place"):
        assert scores["same"][metric][0] == 1.0
    clips = [sample_clip(WORLD, "held_out", 0, index) for index in range(CASES)]
    direct = evaluate([clip.frames for clip in clips], clips, WORLD)
    assert scores["same"] == {metric: pytest.approx(list(estimate), nan_ok=True) for metric, estimate in direct.items()}
    assert len(truthful) == 2 * CASES
    assert all(request.images and len(request.subjects) == len(request.images) for request in truthful)
    # The same cases, shown by other pictures.
    same, crossed = truthful[:CASES], truthful[CASES:]
    assert [request.prompt for request in same] == [request.prompt for request in crossed]
    assert not all(
        np.array_equal(np.asarray(first.images[0]), np.asarray(second.images[0]))
        for first, second in zip(same, crossed, strict=True)
    )


def test_text_to_video_is_asked_without_references(truthful):
    model = pipeline.Model(ablation.row_config(emoji, "no_canvas", 0, 4, 16).task.model, {}, None)
    scores = ablation.score_model(model, WORLD, CASES, 2)
    assert scores["same"]["identity_top1"][0] == 1.0
    assert all(len(request.images) == len(request.subjects) == 0 for request in truthful)


# Runs


@pytest.fixture
def script(monkeypatch):
    """In place of train.py: notes what it was to train, and leaves what a training leaves."""
    module = types.ModuleType("train")
    module.trained = []
    module.load_config = lambda path: {"configs/emoji_ablation.py": emoji}[path]

    def train(config, out):
        module.trained.append((config, out))
        (out / "model").mkdir(parents=True)
        (out / "encoded").mkdir()
        lines = [{"step": step, "loss": 1 / step, "seconds": 0.5} for step in range(1, 5)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    module.train = train
    monkeypatch.setitem(sys.modules, "train", module)
    monkeypatch.setattr(pipeline, "load", lambda folder: pipeline.Model(emoji.task.model, {}, None))
    return module


def test_a_run_leaves_a_result_and_is_not_run_again(tmp_path, script, truthful, capsys):
    run = Run("no_injection", tmp_path, seed=2, num_steps=290, num_clips=64, cases=CASES)
    run()
    folder = tmp_path / "no_injection" / "seed_2"
    ((config, out),) = script.trained
    assert out == folder
    assert config == ablation.row_config(emoji, "no_injection", 2, 290, 64)
    result = ablation.read_result(folder / "result.json")
    assert (result.row, result.seed) == ("no_injection", 2)
    assert result.budget == {"preset": "emoji_ablation.py", "num_steps": 290, "num_clips": 64, "cases": CASES}
    assert result.scores["cross_pair"]["background"][0] == 1.0
    assert result.training == {"seconds": 2.0, "loss": pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)}
    assert not (folder / "encoded").exists()

    run()
    assert len(script.trained) == 1
    with pytest.raises(ValueError, match="result of another budget"):
        dataclasses.replace(run, num_steps=300)()


@pytest.mark.parametrize("name", ["num_steps", "num_clips", "cases", "batch_size"])
def test_an_empty_budget_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        Run("region", tmp_path, **{name: 0})


# Table and plot

BUDGET = {"preset": "emoji.py", "num_steps": 6000, "num_clips": 5000, "cases": 200}
IDENTITY = {"region": (0.50, 0.54, 0.58), "full_mask": (0.40, 0.44, 0.42), "no_canvas": (0.03, 0.05, 0.04)}


def make_result(row: str, seed: int, identity: float, budget: dict = BUDGET) -> Result:
    def scores(top1: float) -> dict[str, list[float]]:
        return {metric: [top1 if metric == "identity_top1" else 0.9, 0.0, 1.0] for metric in METRICS}

    return Result(row, seed, budget, {"same": scores(identity), "cross_pair": scores(identity / 2)}, {"seconds": 1.0})


def write_results(folder: pathlib.Path, values: dict[str, tuple[float, ...]], budget: dict = BUDGET) -> None:
    for row, identities in values.items():
        for seed, identity in enumerate(identities):
            path = folder / row / f"seed_{seed}" / "result.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(make_result(row, seed, identity, budget)._asdict()))


def results(**identities: tuple[float, ...]) -> dict[str, list[Result]]:
    return {row: [make_result(row, seed, value) for seed, value in enumerate(v)] for row, v in identities.items()}


def test_means_and_spreads():
    found = results(region=(0.50, 0.54, 0.58), full_mask=(0.4,))
    mean, deviation = ablation.spread(found["region"], "identity_top1")
    assert (mean, deviation) == (pytest.approx(0.54), pytest.approx(0.04))  # over n - 1
    assert str(ablation.spread(found["region"], "identity_top1")) == "0.540 ± 0.040"
    assert str(ablation.spread(found["region"], "identity_top1", "cross_pair")) == "0.270 ± 0.020"
    assert str(ablation.spread(found["full_mask"], "identity_top1")) == "0.400"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (Spread(0.5, 0.04), Spread(0.3, 0.05), 4.0),
        (Spread(0.3, 0.05), Spread(0.5, 0.04), -4.0),
        (Spread(0.5, 0.0), Spread(0.3, 0.0), np.inf),
        (Spread(0.5, 0.0), Spread(0.5, 0.0), 0.0),
        (Spread(0.5, None), Spread(0.3, 0.1), None),
    ],
)
def test_separation(first, second, expected):
    assert ablation.separation(first, second) == (None if expected is None else pytest.approx(expected))


def test_the_table_says_what_came_out():
    text = ablation.write_table(results(**IDENTITY))
    lines = text.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == [ROWS[row].label for row in IDENTITY]
    assert len({line.count("|") for line in lines[:5]}) == 1
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[1:5] == ["3", "0.540 ± 0.040", "0.270 ± 0.020", "0.900 ± 0.000"]
    assert cells[-2:] == ["0.587", "0.627"]
    assert "6,000 steps on 5,000 clips" in text
    assert "chance of identity is 0.031" in text
    assert "+0.120 over 'vanilla mask', 3.0 spreads" in text
    assert "+0.500 over 'no canvas: text-to-video', 12.5 spreads" in text
    order = "`region` > `full_mask` > `no_canvas`"
    assert f"Order of the masks: {order} in the paper, {order} here by identity: the same." in text


def test_the_table_says_where_it_contradicts_the_paper():
    text = ablation.write_table(results(region=(0.5, 0.5), no_injection=(0.6, 0.62), video_first=(0.3, 0.3)))
    assert "-0.110 over 'no subject disentanglement', 7.8 spreads" in text
    expected = "`region` > `no_injection` in the paper, `no_injection` > `region` here by identity: another."
    assert f"Order of the parts: {expected}" in text
    assert "Order of the masks" not in text


def test_the_plot_shows_every_seed_where_it_is():
    svg = ET.fromstring(ablation.draw_plot(results(**IDENTITY)))
    space = "{http://www.w3.org/2000/svg}"
    height = float(svg.get("height"))
    texts = [(each.text, float(each.get("x")), float(each.get("y"))) for each in svg.iter(f"{space}text")]
    scale = {float(text): x for text, x, y in texts if y == height - ablation.BOTTOM + 16}
    assert list(scale) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert (scale[0], scale[0.6]) == (ablation.LABELS, ablation.WIDTH - ablation.RIGHT)
    zero, unit = scale[0], (scale[0.5] - scale[0]) / 0.5

    dots = [(float(c.get("cx")), float(c.get("cy")), c.get("fill")) for c in svg.iter(f"{space}circle")][2:]
    assert len(dots) == 2 * 9
    for kind, factor in (("same", 1), ("cross_pair", 0.5)):
        drawn = [(x, y) for x, y, colour in dots if colour == ablation.COLOURS[kind]]
        values = [factor * value for row in IDENTITY.values() for value in row]
        assert [(x - zero) / unit for x, _ in drawn] == pytest.approx(values, abs=1e-3)
        assert len({y for _, y in drawn}) == 3
    # Each dot is on the line of its row's label.
    labels = {text: y for text, _, y in texts}
    for index, row in enumerate(IDENTITY):
        assert all(abs(y - labels[ROWS[row].label]) < ablation.LINE / 2 for _, y, _ in dots[6 * index : 6 * index + 6])
    (chance,) = [x for text, x, _ in texts if text == "chance"]
    assert (chance - zero) / unit == pytest.approx(1 / 32, abs=1e-3)


def test_the_page_gets_its_table_between_the_markers(tmp_path):
    runs, docs = tmp_path / "runs", tmp_path / "docs"
    write_results(runs, {"full_mask": IDENTITY["full_mask"], "region": IDENTITY["region"]})
    docs.mkdir()
    page = docs / "emoji_world.md"
    page.write_text(f"before\n\n{MARKERS[0]}\nold\n{MARKERS[1]}\n\nafter\n", encoding="utf-8")
    Table(runs, docs)()
    first = page.read_text(encoding="utf-8")
    Table(runs, docs)()
    assert page.read_text(encoding="utf-8") == first
    assert first.startswith(f"before\n\n{MARKERS[0]}\n\n| row |")
    assert first.endswith(f"(emoji_world/ablation.svg)\n\n{MARKERS[1]}\n\nafter\n")
    assert "old" not in first
    assert first.index(ROWS["region"].label) < first.index(ROWS["full_mask"].label)  # as in ROWS
    ET.parse(docs / "emoji_world" / "ablation.svg")


@pytest.mark.parametrize("text", ["", MARKERS[0], f"{MARKERS[1]}{MARKERS[0]}", f"{MARKERS[0]}{MARKERS[1]}" * 2])
def test_a_page_without_the_markers_is_an_error(text):
    with pytest.raises(ValueError, match="page must have one line <!-- ablation --> and, below it, one line"):
        ablation.replace_between(text, "new", "page")


def test_results_that_cannot_be_compared_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        ablation.read_results(tmp_path)
    write_results(tmp_path, {"region": (0.5,)})
    write_results(tmp_path, {"full_mask": (0.5,)}, BUDGET | {"num_steps": 7000})
    with pytest.raises(ValueError, match="results of several budgets"):
        ablation.read_results(tmp_path)
    shutil.rmtree(tmp_path / "full_mask")
    path = tmp_path / "region" / "seed_0" / "result.json"
    path.write_text(json.dumps(make_result("gone", 0, 0.5)._asdict()))
    with pytest.raises(ValueError, match="row 'gone' is unknown; the rows are region"):
        ablation.read_results(tmp_path)
    path.write_text('{"row": "region"')
    with pytest.raises(ValueError, match=r"result\.json is not the result of a run"):
        ablation.read_results(tmp_path)


@pytest.mark.slow
def test_rows_train_and_are_scored(tmp_path, monkeypatch):
    root = pathlib.Path(pipeline.__file__).parent.parent
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root))
    for row in ("region", "no_canvas"):
        Run(row, tmp_path, preset=pathlib.Path("configs/smoke.py"), num_steps=3, num_clips=16, cases=2, batch_size=2)()
    found = ablation.read_results(tmp_path)
    assert list(found) == ["region", "no_canvas"]
    for (result,) in found.values():
        assert result.training["seconds"] > 0
        assert 0 <= result.scores["same"]["background"][0] <= 1
    model = ModelConfig.from_json((tmp_path / "no_canvas/seed_0/model/config.json").read_text())
    assert model.dit.in_channels == 16
