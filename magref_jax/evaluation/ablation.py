"""The ablation of the paper, small: emoji world, one budget for every row, scored on emoji that training never shows.

    python -m magref_jax.evaluation.ablation run region --seed 0 --out runs/ablation
    python -m magref_jax.evaluation.ablation table runs/ablation --out docs

`run` trains one row with one seed and scores it; it is called from the repository root, once for each row and seed, and
continues what was cut off. `table` puts means and spreads into `emoji_world.md`, between `<!-- ablation -->` and
`<!-- end of ablation -->`, and draws `emoji_world/ablation.svg`.

A row is a list of what it changes in the preset. All rows of a seed draw from the same stream of clips, and all models are
asked for the same videos, judged over the same frames.
"""

import dataclasses
import importlib
import json
import pathlib
import shutil
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar
from xml.sax.saxutils import escape

import numpy as np
import tyro

from magref_jax import pipeline
from magref_jax.command import check_local_fields, check_output_folder, program
from magref_jax.data.emoji_world import EmojiWorldConfig, sample_clip
from magref_jax.evaluation.emoji_benchmark import generate_videos, make_request
from magref_jax.evaluation.emoji_metrics import METRICS, NUM_CANDIDATES, evaluate
from magref_jax.files import replacing
from magref_jax.training.config import DiTTask, EmojiData, TrainConfig

RowName = Literal["region", "full_mask", "no_canvas", "no_cross_pair", "no_injection", "video_first", "token_concat"]


class Row(NamedTuple):
    """A line of the table; the paper's totals are those of its two ablations, where it has this line."""

    label: str
    overrides: Mapping[str, Any]  # fields of the `TrainConfig`, by dotted path
    paper_mask: float | None = None  # T2V backbone, vanilla mask, region-aware mask
    paper_parts: float | None = None  # the full model, and each part taken away


# Trained toward the clip from latent frame 0 on, a model makes no canvas to drop.
_VIDEO_FIRST = {"task.objective.first_frame_target": "video", "task.model.drop_frames": 0}

# Totals: MAGREF, arXiv:2505.23742v2.
ROWS: Mapping[RowName, Row] = {
    "region": Row("region-aware mask: all parts", {}, 0.587, 0.627),
    "full_mask": Row("vanilla mask", {"task.model.sampling.mask_mode": "full"}, 0.558, 0.570),
    "no_canvas": Row(
        "no canvas: text-to-video",
        _VIDEO_FIRST
        | {
            "task.model.dit.in_channels": 16,
            "task.model.dit.image_dim": None,
            "task.model.image_encoder": None,
            "task.model.subject_alpha": 0.0,  # it would say where on the canvas they were
        },
        0.550,
    ),
    "no_injection": Row("no subject disentanglement", {"task.model.subject_alpha": 0.0}, None, 0.580),
    "no_cross_pair": Row("no cross-pairs", {"task.choice.cross_pair": 0.0}, None, 0.574),
    "video_first": Row("latent frame 0 toward the video", _VIDEO_FIRST),
    "token_concat": Row(
        "the same, canvas as tokens, not channels",
        _VIDEO_FIRST | {"task.model.dit.in_channels": 16, "task.model.reference_concat": "token"},
    ),
}
BASE: RowName = "region"

REFERENCES = {"same": 0.0, "cross_pair": 1.0}  # how a case shows its subjects: probability of another variant

T = TypeVar("T")


def override(config: T, overrides: Mapping[str, Any]) -> T:
    """The config with other values at some dotted paths.

    Raises:
        ValueError: a path that is not there.
    """
    for path, value in overrides.items():
        config = _replace(config, path.split("."), value, path)
    return config


def _replace(config: Any, names: Sequence[str], value: Any, path: str) -> Any:
    name, *rest = names
    if not dataclasses.is_dataclass(config) or not hasattr(config, name):
        raise ValueError(f"{path}: {type(config).__name__} has no field {name!r}.")
    value = _replace(getattr(config, name), rest, value, path) if rest else value
    return dataclasses.replace(config, **{name: value})


def row_config(preset: TrainConfig, row: RowName, seed: int, num_steps: int, num_clips: int) -> TrainConfig:
    """The preset as this row trains it: phases and learning rate cycles in proportion to the budget, without samples.

    Raises:
        ValueError: a preset that does not train the DiT of emoji world.
    """
    task = preset.task
    if not isinstance(task, DiTTask) or not isinstance(task.data, EmojiData) or task.model is None:
        raise ValueError("the preset must be one that trains a DiT with a model of its own on EmojiData.")
    share = num_steps / preset.num_steps
    phases = tuple(dataclasses.replace(each, num_steps=max(1, round(share * each.num_steps))) for each in task.phases)
    cycles = tuple(max(1, round(share * steps)) for steps in preset.optimizer.cycle_steps)
    budget = {
        "seed": seed,
        "num_steps": num_steps,
        "task.phases": phases,
        "task.data.num_clips": num_clips,
        "optimizer.cycle_steps": cycles,
        "optimizer.warmup_steps": round(share * preset.optimizer.warmup_steps),
        "events.sample": None,
        "events.keep": 1,
        "save_dtype": "float32",
    }
    config = override(preset, budget | dict(ROWS[row].overrides))
    if _VIDEO_FIRST.items() <= ROWS[row].overrides.items():  # a frame of the clip takes the place of the canvas
        config = override(config, {"task.data.world.num_frames": task.model.sampling.num_frames})
    return config


def score_model(
    model: pipeline.Model, world: EmojiWorldConfig, cases: int, batch_size: int
) -> dict[str, dict[str, list[float]]]:
    """Every metric of held-out cases with its 95 % interval, for references of either kind.

    The cases are the same for every model, and so are the frames: a clip of `world`, from its first one.
    """
    scores = {}
    for kind, cross_pair in REFERENCES.items():
        data = dataclasses.replace(world, cross_pair=cross_pair)
        clips = [sample_clip(data, "held_out", 0, index) for index in range(cases)]
        requests = [make_request(clip, 0, index) for index, clip in enumerate(clips)]
        if not pipeline.takes_references(model.config):
            requests = [dataclasses.replace(request, images=(), subjects=()) for request in requests]
        videos, _ = generate_videos(model, requests, batch_size, f"references: {kind}")
        estimates = evaluate(videos[:, : data.num_frames], clips, data)
        scores[kind] = {name: list(estimate) for name, estimate in estimates.items()}
    return scores


@dataclasses.dataclass(frozen=True)
class Run:
    """Trains and scores one row with one seed."""

    row: tyro.conf.Positional[RowName]
    out: pathlib.Path  # OUT/ROW/seed_SEED is the training's folder; result.json in it is what `table` reads
    seed: int = 0
    preset: pathlib.Path = pathlib.Path("configs/emoji_ablation.py")
    num_steps: int = 3000
    num_clips: int = 2500
    cases: int = 200  # of either kind of references
    batch_size: int = 8  # in sampling

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_clips", "cases", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    def budget(self) -> dict[str, Any]:
        """What must be equal for rows to be compared."""
        names = ("num_steps", "num_clips", "cases")
        return {"preset": self.preset.name} | {name: getattr(self, name) for name in names}

    def __call__(self) -> None:
        check_output_folder("--out", self.out)
        folder = self.out / self.row / f"seed_{self.seed}"
        if (folder / "result.json").exists():
            if read_result(folder / "result.json").budget != self.budget:
                raise ValueError(f"{folder} holds a result of another budget; remove it, or choose another --out.")
            print(f"{folder} is done.")
            return
        # The loop is a script beside the package, in the repository root.
        script = importlib.import_module("train")
        preset = script.load_config(str(self.preset))
        script.train(row_config(preset, self.row, self.seed, self.num_steps, self.num_clips), folder)
        scores = score_model(pipeline.load(folder / "model"), preset.task.data.world, self.cases, self.batch_size)
        result = {
            "row": self.row,
            "seed": self.seed,
            "budget": self.budget,
            "scores": scores,
            "training": training_summary(folder / "metrics.jsonl"),
        }
        with replacing(folder / "result.json") as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        # Encoded clips are the largest part of a run, and soon made again.
        shutil.rmtree(folder / "encoded", ignore_errors=True)
        identity, low, high = scores["same"]["identity_top1"]
        print(f"{self.row}, seed {self.seed}: identity {identity:.3f} ({low:.3f} to {high:.3f}); wrote {folder}")


def training_summary(metrics: pathlib.Path, last: int = 500) -> dict[str, float]:
    """How the training ended: means of its last steps, and its seconds."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    summary = {"seconds": sum(line["seconds"] for line in lines)}
    for name in ("loss", "loss_subjects"):
        values = [line[name] for line in lines[-last:] if name in line]
        if values:
            summary[name] = statistics.fmean(values)
    return summary


class Result(NamedTuple):
    """`result.json` of a run."""

    row: RowName
    seed: int
    budget: dict[str, Any]
    scores: dict[str, dict[str, list[float]]]
    training: dict[str, float]


def read_result(path: pathlib.Path) -> Result:
    """Reads `result.json`.

    Raises:
        ValueError: it is not one, or of a row that is not there any more.
    """
    try:
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the result of a run: {error}.") from None
    if result.row not in ROWS:
        raise ValueError(f"{path}: row {result.row!r} is unknown; the rows are {', '.join(ROWS)}.")
    return result


def read_results(runs: pathlib.Path) -> dict[RowName, list[Result]]:
    """All results by row, in the order of `ROWS`, seeds in order.

    Raises:
        ValueError: none, or some of another budget.
    """
    results = [read_result(path) for path in sorted(runs.glob("*/seed_*/result.json"))]
    if not results:
        raise ValueError(f"{runs} holds no results: no ROW/seed_SEED/result.json.")
    budgets = {json.dumps(result.budget) for result in results}
    if len(budgets) > 1:
        raise ValueError(f"{runs} holds results of several budgets, which no table compares: {', '.join(budgets)}.")
    by_row = {row: [result for result in results if result.row == row] for row in ROWS}
    return {row: sorted(found, key=lambda result: result.seed) for row, found in by_row.items() if found}


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; one seed has no spread."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.deviation is None else f"{self.mean:.3f} ± {self.deviation:.3f}"


def spread(results: Sequence[Result], metric: str, kind: str = "same") -> Spread:
    values = seed_values(results, metric, kind)
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def seed_values(results: Sequence[Result], metric: str, kind: str) -> list[float]:
    return [result.scores[kind][metric][0] for result in results]


def separation(first: Spread, second: Spread) -> float | None:
    """By how many spreads, of the row with the larger one, the first mean is above the second; None: there are none."""
    if first.deviation is None or second.deviation is None:
        return None
    larger = max(first.deviation, second.deviation)
    difference = first.mean - second.mean
    return difference / larger if larger else float(np.copysign(np.inf, difference)) if difference else 0.0


# Columns of the table: metric, kind of references, heading.
COLUMNS = (
    ("identity_top1", "same", f"identity, top 1 of {NUM_CANDIDATES}"),
    ("identity_top1", "cross_pair", "with cross-pair references"),
    ("similarity", "same", "similarity"),
    ("region_iou", "same", "region IoU"),
    ("present", "same", "present"),
    ("motion", "same", "motion"),
    ("place", "same", "place"),
    ("background", "same", "background"),
)


def write_table(results: Mapping[RowName, Sequence[Result]]) -> str:
    """The table, what it is of, and how the ordering compares with the paper's, as Markdown."""
    headings = ["row", "seeds", *[heading for _, _, heading in COLUMNS], "paper, masks", "paper, parts"]
    lines = ["| " + " | ".join(headings) + " |", "| :-- |" + " --: |" * (len(headings) - 1)]
    for row, found in results.items():
        cells = [str(spread(found, metric, kind)) for metric, kind, _ in COLUMNS]
        paper = ["" if value is None else f"{value:.3f}" for value in (ROWS[row].paper_mask, ROWS[row].paper_parts)]
        lines.append("| " + " | ".join([ROWS[row].label, str(len(found)), *cells, *paper]) + " |")

    budget = next(iter(results.values()))[0].budget
    notes = [
        f"Every run: {budget['preset']} with {budget['num_steps']:,} steps on {budget['num_clips']:,} clips, scored on "
        f"{budget['cases']} cases of held-out emoji, and as many whose references are cross-pairs. Mean ± standard deviation "
        f"over seeds; chance of identity is {METRICS['identity_top1'].chance(EmojiWorldConfig()):.3f}."  # pyrefly: ignore
        " The paper's columns are its totals, means of other metrics over other data: what can be compared is the order."
    ]
    identities = {row: spread(found, "identity_top1") for row, found in results.items()}
    if BASE in results:
        differences = []
        for row, identity in identities.items():
            spreads = separation(identities[BASE], identity)
            in_spreads = "" if spreads is None else f", {abs(spreads):.1f} spreads"
            if row != BASE:
                difference = identities[BASE].mean - identity.mean
                differences.append(f"{difference:+.3f} over {ROWS[row].label!r}{in_spreads}")
        if differences:
            notes.append(
                f"Identity of {ROWS[BASE].label!r}: {'; '.join(differences)}. A spread is the larger of the two."
            )
    for field, name in (("paper_mask", "masks"), ("paper_parts", "parts")):
        rows = [row for row in results if getattr(ROWS[row], field) is not None]
        if len(rows) > 1:
            paper = sorted(rows, key=lambda row: -getattr(ROWS[row], field))
            ours = sorted(rows, key=lambda row: -identities[row].mean)
            verdict = "the same" if paper == ours else "another"
            notes.append(
                f"Order of the {name}: {_order(paper)} in the paper, {_order(ours)} here by identity: {verdict}."
            )
    return "\n".join([*lines, "", "\n\n".join(notes)])


def _order(rows: Sequence[RowName]) -> str:
    return " > ".join(f"`{row}`" for row in rows)


WIDTH, LABELS, RIGHT = 760, 270, 30  # pixels of the plot; of the labels on its left; right of the axis
LINE, TOP, BOTTOM = 34, 44, 40
COLOURS = {"same": "#1f5fbf", "cross_pair": "#d9730d"}
LEGEND = {"same": "references as in the video", "cross_pair": "cross-pair references"}


def draw_plot(results: Mapping[RowName, Sequence[Result]], metric: str = "identity_top1") -> str:
    """An SVG: a dot for every seed, a bar from mean − to mean + standard deviation, a dashed line at chance."""
    values = {(row, kind): seed_values(found, metric, kind) for row, found in results.items() for kind in REFERENCES}
    ticks = np.arange(0, max(max(each) for each in values.values()) + 0.1, 0.1)
    axis, height = WIDTH - LABELS - RIGHT, TOP + LINE * len(results) + BOTTOM

    def x(value: float) -> str:
        return f"{LABELS + axis * value / float(ticks[-1]):.1f}"

    bottom = height - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for tick in ticks:
        parts.append(f'<path d="M{x(tick)} {TOP}V{bottom}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x(tick)}" y="{bottom + 16}" text-anchor="middle">{tick:.1f}</text>')
    parts.append(
        f'<text x="{LABELS + axis / 2:.1f}" y="{height - 6}" text-anchor="middle">{METRICS[metric].label}</text>'
    )
    chance = METRICS[metric].chance
    if chance is not None:
        guess = x(chance(EmojiWorldConfig()))
        parts.append(f'<path d="M{guess} {TOP}V{bottom}" stroke="#888888" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{guess}" y="{TOP - 6}" text-anchor="middle" fill="#666666">chance</text>')
    for number, (kind, text) in enumerate(LEGEND.items()):
        left = LABELS + 70 + 200 * number
        parts.append(f'<circle cx="{left}" cy="16" r="4" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{left + 9}" y="20">{text}</text>')
    for number, (row, found) in enumerate(results.items()):
        middle = TOP + LINE * (number + 0.5)
        parts.append(f'<text x="{LABELS - 10}" y="{middle + 4}" text-anchor="end">{escape(ROWS[row].label)}</text>')
        for kind, offset in zip(REFERENCES, (-6, 6), strict=True):
            y, colour, (mean, deviation) = middle + offset, COLOURS[kind], spread(found, metric, kind)
            ends = x(mean - (deviation or 0)), x(mean + (deviation or 0))
            parts.append(f'<path d="M{ends[0]} {y}H{ends[1]}" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<path d="M{x(mean)} {y - 5}V{y + 5}" stroke="{colour}" stroke-width="2"/>')
            for value in values[row, kind]:
                parts.append(f'<circle cx="{x(value)}" cy="{y}" r="4" fill="{colour}" fill-opacity="0.5"/>')
    return "\n".join([*parts, "</svg>", ""])


MARKERS = ("<!-- ablation -->", "<!-- end of ablation -->")


def replace_between(text: str, content: str, where: str) -> str:
    """The text with other lines between the two markers.

    Raises:
        ValueError: the markers are not there, once and in order.
    """
    before, begin, rest = text.partition(MARKERS[0])
    old, end, after = rest.partition(MARKERS[1])
    if not begin or not end or any(marker in part for marker in MARKERS for part in (before, old, after)):
        raise ValueError(f"{where} must have one line {MARKERS[0]} and, below it, one line {MARKERS[1]}.")
    return f"{before}{begin}\n{content}\n{end}{after}"


@dataclasses.dataclass(frozen=True)
class Table:
    """Draws what the runs gave into the documentation."""

    runs: tyro.conf.Positional[pathlib.Path]  # the `--out` of the runs
    out: pathlib.Path = pathlib.Path("docs")  # with emoji_world.md

    def __call__(self) -> None:
        check_output_folder("--out", self.out)
        page, plot = self.out / "emoji_world.md", self.out / "emoji_world" / "ablation.svg"
        results = read_results(self.runs)
        table = write_table(results)
        picture = f"![{METRICS['identity_top1'].label}, of every row and seed](emoji_world/{plot.name})"
        text = replace_between(page.read_text(encoding="utf-8"), f"\n{table}\n\n{picture}\n", str(page))
        for path, content in ((plot, draw_plot(results)), (page, text)):
            with replacing(path) as part:
                part.write_text(content, encoding="utf-8")
        print(f"{table}\nwrote {page} and {plot}")


def main() -> None:
    with program("evaluation.ablation"):
        command = tyro.cli(Run | Table, description=__doc__)
        check_local_fields("arguments", command)
        command()


if __name__ == "__main__":
    main()
