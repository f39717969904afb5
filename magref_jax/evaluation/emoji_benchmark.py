"""Generates held-out cases of emoji world with a model folder and measures the videos.

    python -m magref_jax.evaluation.emoji_benchmark --model magref_jax/bundled/emoji --cases 200 --out outputs/benchmark

Writes results.md and results.json (the table), videos.npz and contact_sheet.png (true frames above generated ones).
Columns of the table:

    model            its videos, with 95 % intervals
    shuffled         videos made from the references of another case, judged by the references of this one
    another case     the model's videos judged by another case: what is scored without any relation
    VAE              true videos, encoded and decoded: no model on this VAE can do better
    ground truth     true videos: what the metrics themselves miss
    chance           of a guess

An identity in the video may be among the distractors, which puts the two floors a little below chance.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from magref_jax import pipeline
from magref_jax.command import check_local_fields, check_output_folder, program
from magref_jax.conditioning.canvas import compose_canvas
from magref_jax.conditioning.subjects import Subject
from magref_jax.config import ModelConfig, SamplingConfig
from magref_jax.data.emoji_clips import clip_images
from magref_jax.data.emoji_world import Clip, EmojiWorldConfig, sample_clip
from magref_jax.evaluation.emoji_metrics import METRICS, Estimate, Scores, evaluate, other_case, score_clip, summarise
from magref_jax.models import vae
from magref_jax.video import SheetRow, contact_sheet, to_uint8

Videos = UInt8[np.ndarray, "N F H W 3"]
Columns = Mapping[str, Mapping[str, Estimate]]

SHEET_ROWS = 24
TILE_HEIGHT = 256  # pixels of the contact sheet; two frames of 64 on top of each other, doubled


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: pathlib.Path  # model folder
    out: pathlib.Path
    cases: int = 200
    shuffled_cases: int = 64  # generated a second time from the references of another case
    batch_size: int = 8
    seed: int = 0  # of cases and noise
    steps: int | None = None
    guidance: float | None = None
    reference_guidance: float | None = None
    shift: float | None = None
    # Sizes and number of frames are the model's.
    data: EmojiWorldConfig = dataclasses.field(default_factory=EmojiWorldConfig)

    def __post_init__(self) -> None:
        for name, low in (("cases", 1), ("shuffled_cases", 0), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}.")

    @property
    def overrides(self) -> dict[str, Any]:
        names = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "reference_guidance_scale": self.reference_guidance,
            "flow_shift": self.shift,
        }
        return {name: value for name, value in names.items() if value is not None}


def of_model_size(data: EmojiWorldConfig, config: ModelConfig) -> EmojiWorldConfig:
    """The world with clips of the model's size and length, and sprites as wide as a cell of its canvas, a third of it."""
    width, height = config.sampling.width, config.sampling.height
    num_frames = config.sampling.num_frames - config.drop_frames
    return dataclasses.replace(data, width=width, height=height, num_frames=num_frames, sprite_size=width // 3)


def make_request(clip: Clip, seed: int, index: int, shown: Clip | None = None) -> pipeline.Request:
    """The clip's prompt with its own references, or with those of the clip `shown` in their place."""
    subjects = [Subject(reference.label, span=reference.label_span) for reference in clip.references]
    return pipeline.Request(clip.caption, clip_images(shown or clip), subjects, seed=seed, key=str(index))


def generate_videos(
    model: pipeline.Model, requests: Sequence[pipeline.Request], batch_size: int, description: str, **overrides: Any
) -> tuple[Videos, list[Image.Image]]:
    """The videos and canvases of many requests; the last batch is filled up, so that one program fits all."""
    videos: list[pipeline.Video] = []
    for start in tqdm(range(0, len(requests), batch_size), desc=description, unit="batch"):
        batch = list(requests[start : start + batch_size])
        batch += batch[-1:] * (min(batch_size, len(requests)) - len(batch))
        videos += pipeline.generate(model, batch, **overrides)
    del videos[len(requests) :]
    return np.stack([video.frames for video in videos]), [Image.fromarray(video.case.canvas.image) for video in videos]


def reconstruct_videos(model: pipeline.Model, clips: Sequence[Clip], batch_size: int) -> Videos:
    """Encoded and decoded as in training: the canvas in front, and dropped afterwards."""
    config, drop_frames = model.config, model.config.drop_frames

    @jax.jit
    def reconstruct(params: Any, frames: jax.Array) -> jax.Array:
        latents = vae.encode(config.vae, params, frames.astype(jnp.float32) / 127.5 - 1)
        return pipeline.decode(config, params, latents)[:, drop_frames:]

    def with_canvas(clip: Clip) -> UInt8[np.ndarray, "F H W 3"]:
        height, width = clip.frames.shape[1:3]
        canvas = compose_canvas(clip_images(clip), height, width, config.sampling.layout, "input").image
        return np.concatenate([np.repeat(canvas[None], drop_frames, axis=0), clip.frames])

    videos = []
    for start in tqdm(range(0, len(clips), batch_size), desc="VAE", unit="batch"):
        batch = [with_canvas(clip) for clip in clips[start : start + batch_size]]
        batch += batch[-1:] * (min(batch_size, len(clips)) - len(batch))
        videos.append(to_uint8(np.asarray(reconstruct(model.params["vae"], np.stack(batch)))))
    return np.concatenate(videos)[: len(clips)]


def write_table(columns: Columns, data: EmojiWorldConfig) -> str:
    """The results as a Markdown table, metrics down and columns across."""
    names = [*columns, "chance"]
    lines = ["| metric | " + " | ".join(names) + " |", "| :-- |" + " --: |" * len(names)]
    for key, metric in METRICS.items():
        cells = [f"{estimates[key].value:.3f}" for estimates in columns.values()]
        first = next(iter(columns.values()))[key]
        cells[0] += f" ({first.low:.3f} to {first.high:.3f})"
        cells.append("" if metric.chance is None else f"{metric.chance(data):.3f}")
        lines.append(f"| {metric.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _guidance(sampling: SamplingConfig) -> str:
    of_references = sampling.reference_guidance_scale
    if of_references in (None, sampling.guidance_scale):
        return f"{sampling.guidance_scale:g} toward prompt and references"
    return f"{sampling.guidance_scale:g} toward the prompt and {of_references:g} toward the references"


def _sheet_row(clip: Clip, frames: UInt8[np.ndarray, "F H W 3"], canvas: Image.Image, scores: Scores) -> SheetRow:
    marks = []
    for metric in ("identity_top1", "present", "motion", "background"):
        values = np.concatenate([scores[name] for name in scores if name.partition("/")[0] == metric])
        marks.append(f"{metric} {values.sum():.0f}/{len(values)}")
    return SheetRow(
        references=clip_images(clip),
        canvas=canvas,
        frames=np.concatenate([clip.frames, frames], axis=1),
        caption=f"{clip.caption} ({', '.join(marks)})",
    )


def run_benchmark(arguments: Arguments, model: pipeline.Model) -> Columns:
    """Generates, measures and writes everything; the columns of the table by name."""
    # A wrong option is refused before an hour of generating, not after.
    config = pipeline.with_sampling(model.config, **arguments.overrides)
    sampling = config.sampling
    data = of_model_size(arguments.data, config)
    seed, count = arguments.seed, min(arguments.shuffled_cases, arguments.cases)
    clips = [sample_clip(data, "held_out", seed, index) for index in range(arguments.cases)]
    others = [other_case(clip, data, seed, index) for index, clip in enumerate(clips)]
    truth = [clip.frames for clip in clips]
    ceiling = evaluate(truth, clips, data)  # refuses data that cannot be measured, before anything is generated
    arguments.out.mkdir(parents=True, exist_ok=True)

    def generated(name: str, requests: Sequence[pipeline.Request]) -> tuple[Videos, list[Image.Image]]:
        return generate_videos(model, requests, arguments.batch_size, name, **arguments.overrides)

    requests = [make_request(clip, seed, index) for index, clip in enumerate(clips)]
    videos, canvases = generated("model", requests)
    saved = {"model": videos}
    if count:
        requests = [make_request(clip, seed, index, others[index]) for index, clip in enumerate(clips[:count])]
        saved["shuffled"], _ = generated("shuffled", requests)
    np.savez_compressed(arguments.out / "videos.npz", **saved)

    scores = [score_clip(video, clip, data) for video, clip in zip(videos, clips, strict=True)]
    columns = {"model": summarise(scores)}
    if count:
        columns["shuffled"] = evaluate(saved["shuffled"], clips[:count], data)
    columns["another case"] = evaluate(videos, others, data)
    columns["VAE"] = evaluate(reconstruct_videos(model, clips, arguments.batch_size), clips, data)
    columns["ground truth"] = ceiling

    table = write_table(columns, data)
    settings = {
        "model": arguments.model.name,
        "cases": arguments.cases,
        "shuffled_cases": count,
        "seed": seed,
        "sampling": dataclasses.asdict(sampling),
        "data": dataclasses.asdict(data),
    }
    results = {name: {key: list(estimate) for key, estimate in column.items()} for name, column in columns.items()}
    chance = {key: metric.chance(data) for key, metric in METRICS.items() if metric.chance is not None}
    report = {"settings": settings, "estimate": list(Estimate._fields), "columns": results, "chance": chance}
    (arguments.out / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    summary = (
        f"{arguments.cases} held-out cases ({count} for shuffled references), seed {seed}; {sampling.solver}, "
        f"{sampling.num_inference_steps} steps, guidance {_guidance(sampling)}, shift {sampling.flow_shift:g}. "
        "In brackets: 95 % interval, videos resampled."
    )
    (arguments.out / "results.md").write_text(f"{table}\n\n{summary}\n", encoding="utf-8")
    rows = map(_sheet_row, clips[:SHEET_ROWS], videos, canvases, scores)
    contact_sheet(list(rows), tile_height=TILE_HEIGHT).save(arguments.out / "contact_sheet.png")
    print(f"{table}\n\n{summary}\nwrote {arguments.out}")
    return columns


def main() -> None:
    with program("evaluation.emoji_benchmark"):
        arguments = tyro.cli(Arguments, description=__doc__)
        check_local_fields("arguments", arguments)
        check_output_folder("--out", arguments.out)
        run_benchmark(arguments, pipeline.load(arguments.model))


if __name__ == "__main__":
    main()
