"""Measures a step cache for a model: which solver steps can do without the network, and what that costs.

    python -m magref_jax.evaluation.step_cache --model magref_jax/bundled/emoji --out outputs/step_cache.json
    python -m magref_jax.evaluation.step_cache --model models/magref --prompts cases.txt --cases 4 --out magref.json
    python sample.py --model models/magref --prompts cases.txt --step_cache magref.json:0.01

Every case is made in full, then once per threshold with the cache, and once in as many plain steps as the cache evaluates:
whoever wants to save time can also ask for fewer steps, so a cache is worth its error only where it beats those. The table
is printed, and written with the ratios and the settings they belong to.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import tyro
from jaxtyping import Float, UInt8
from tqdm import tqdm

from magref_jax import images, pipeline
from magref_jax.command import check_local_fields, check_output_folder, program
from magref_jax.config import ModelConfig, SamplingConfig, load_model_config
from magref_jax.data.emoji_world import EmojiWorldConfig, sample_clip
from magref_jax.descriptions import short_repr
from magref_jax.diffusion.step_cache import KEEP_FIRST, MAX_SKIPS, Measured, StepPlan, StepTable, plan_steps
from magref_jax.evaluation.emoji_benchmark import make_request, of_model_size
from magref_jax.files import replacing
from magref_jax.prompts import Checks, check_entries, read_entries

SHOWN = 20  # problems with a prompt file, at most


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: pathlib.Path  # model folder
    out: pathlib.Path  # the file to write
    prompts: pathlib.Path | Literal["emoji"] = "emoji"  # a prompt file as sample.py takes it, or held-out emoji cases
    cases: int = 16  # the first ones of a prompt file
    batch_size: int = 8
    seed: int = 0
    thresholds: tuple[float, ...] = (0.005, 0.01, 0.02, 0.04)
    max_skips: int = MAX_SKIPS  # in a row
    keep_first: float = KEEP_FIRST  # share of the steps that are never skipped
    # The rest are the model's if not given.
    steps: int | None = None
    guidance: float | None = None
    reference_guidance: float | None = None
    shift: float | None = None
    solver: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        for name in ("cases", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields of `SamplingConfig` that were given."""
        fields = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "reference_guidance_scale": self.reference_guidance,
            "flow_shift": self.shift,
            "solver": self.solver,
            "num_frames": self.frames,
            "height": self.height,
            "width": self.width,
        }
        return {name: value for name, value in fields.items() if value is not None}


def length_ratios(velocities: Float[np.ndarray, "N B f h w C"]) -> Float[np.ndarray, "N B"]:
    """How much longer or shorter the velocity of each step is than that of the step before; the first row is 1.

    The length is over the channels of a latent position, the ratio is averaged over positions.
    """
    lengths = np.linalg.norm(velocities.astype(np.float64), axis=-1)
    ratios = (lengths[1:] / lengths[:-1]).mean(axis=(2, 3, 4))
    return np.concatenate([np.ones((1, velocities.shape[1])), ratios])


def relative_error(latents: Float[np.ndarray, "B *rest"], truth: Float[np.ndarray, "B *rest"]) -> float:
    """‖latents − truth‖ / ‖truth‖, averaged over the batch."""
    axes = tuple(range(1, truth.ndim))
    difference, truth = latents.astype(np.float64) - truth, truth.astype(np.float64)
    return float(np.sqrt((difference**2).sum(axes) / (truth**2).sum(axes)).mean())


def psnr(frames: UInt8[np.ndarray, "B F H W 3"], truth: UInt8[np.ndarray, "B F H W 3"]) -> float | None:
    """Peak signal-to-noise ratio over all frames, dB; None where they are the same."""
    error = np.mean((frames.astype(np.float64) - truth) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else None


def emoji_requests(config: ModelConfig, count: int, seed: int) -> list[pipeline.Request]:
    """Held-out cases of emoji world, as `emoji_benchmark` makes them."""
    data = of_model_size(EmojiWorldConfig(), config)
    return [make_request(sample_clip(data, "held_out", seed, index), seed, index) for index in range(count)]


def read_requests(path: pathlib.Path, config: ModelConfig, count: int, seed: int) -> list[pipeline.Request]:
    """The first cases of a prompt file.

    Raises:
        ValueError: one of them is wrong, or is of a size of its own.
    """

    def resolve(**overrides: Any) -> SamplingConfig:
        size = {name: value for name, value in overrides.items() if name != "negative_prompt"}
        if any(getattr(config.sampling, name) != value for name, value in size.items()):
            raise ValueError(f"{size}: one table is for one size; leave it out, or give it as an option.")
        return pipeline.with_sampling(config, **overrides).sampling

    checks = Checks()
    entries = read_entries(path, checks)[:count]
    takes_references = pipeline.takes_references(config)
    requests = [
        pipeline.Request(
            prompt=checked.entry.prompt,
            images=[images.read_image(reference.path) for reference in checked.entry.references],
            subjects=checked.subjects,
            seed=checked.entry.overrides.get("seed", seed),
            key=checked.entry.key,
            roles=[reference.role for reference in checked.entry.references],
            negative_prompt=checked.entry.overrides.get("negative_prompt"),
        )
        for checked in check_entries(entries, checks, resolve, takes_references=takes_references)
    ]
    if checks.problems:
        raise ValueError("\n  ".join(["cannot use these prompts:", *checks.problems[:SHOWN]]))
    return requests


def make_requests(arguments: Arguments, config: ModelConfig) -> list[pipeline.Request]:
    """The cases to measure. What is wrong is found here, before weights are read.

    Raises:
        ValueError: an option or a case that the model cannot take.
    """
    if arguments.out.is_dir():
        raise ValueError(f"out={arguments.out} is a folder; name the file to write.")
    config = pipeline.with_sampling(config, **arguments.overrides)
    steps = (1.0,) * config.sampling.num_inference_steps
    for threshold in arguments.thresholds:
        plan_steps(steps, config.sampling, threshold, arguments.max_skips, arguments.keep_first)
    if arguments.prompts == "emoji":
        return emoji_requests(config, arguments.cases, arguments.seed)
    return read_requests(arguments.prompts, config, arguments.cases, arguments.seed)


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """All cases, made in one way."""

    latents: Float[np.ndarray, "B f h w C"]
    frames: UInt8[np.ndarray, "B F H W 3"]
    ratios: Float[np.ndarray, "N B"]


def run_cases(
    model: pipeline.Model,
    requests: Sequence[pipeline.Request],
    batch_size: int,
    description: str,
    step_plan: StepPlan | None = None,
    **overrides: Any,
) -> Run:
    """Makes the videos; `overrides` are fields of `SamplingConfig`.

    Raises:
        ValueError: a case that failed.
    """
    latents, frames, ratios = [], [], []
    for first in tqdm(range(0, len(requests), batch_size), desc=description, unit="batch"):
        batch = requests[first : first + batch_size]
        result = pipeline.generate(
            model, batch, batch_size=batch_size, return_trajectory=True, step_plan=step_plan, **overrides
        )
        for request, failure in zip(batch, result.failures, strict=True):
            if failure is not None:
                raise ValueError(f"case {request.key!r}, {description}: {failure}.")
        assert result.velocities is not None  # asked for
        latents.append(result.latents)
        frames.append(result.frames)
        # Not kept for all cases: velocities are N times as large as latents.
        ratios.append(length_ratios(result.velocities))
    return Run(np.concatenate(latents), np.concatenate(frames), np.concatenate(ratios, axis=1))


def measure(arguments: Arguments, model: pipeline.Model, requests: Sequence[pipeline.Request]) -> StepTable:
    """Runs everything, writes the table to `arguments.out` and prints it.

    Raises:
        ValueError: a case that failed.
    """
    sampling = pipeline.with_sampling(model.config, **arguments.overrides).sampling
    num_steps = sampling.num_inference_steps
    limits = {"max_skips": arguments.max_skips, "keep_first": arguments.keep_first}

    def run(description: str, num_inference_steps: int, step_plan: StepPlan | None = None) -> Run:
        overrides = arguments.overrides | {"num_inference_steps": num_inference_steps}
        return run_cases(model, requests, arguments.batch_size, description, step_plan, **overrides)

    full = run(f"full, {num_steps} steps", num_steps)
    ratios = tuple(full.ratios.mean(axis=1).tolist())
    cached, shorter = {StepPlan.full(num_steps): full}, {num_steps: full}
    measured = []
    for threshold in arguments.thresholds:
        plan = plan_steps(ratios, sampling, threshold, **limits)
        count = plan.num_evaluations
        if plan not in cached:
            cached[plan] = run(f"threshold {threshold:g}, {count} evaluations", num_steps, plan)
        if count not in shorter:
            shorter[count] = run(f"{count} steps", count)
        measured.append(
            Measured(
                threshold,
                count,
                error=relative_error(cached[plan].latents, full.latents),
                psnr=psnr(cached[plan].frames, full.frames),
                fewer_steps_error=relative_error(shorter[count].latents, full.latents),
                fewer_steps_psnr=psnr(shorter[count].frames, full.frames),
            )
        )
    table = StepTable(
        model=arguments.model.resolve().name,
        sampling=sampling,
        cases=len(requests),
        ratios=ratios,
        spread=tuple(full.ratios.std(axis=1).tolist()),
        measured=tuple(measured),
        **limits,
    )
    with replacing(arguments.out) as part:
        part.write_text(table.to_json(), encoding="utf-8")
    print(f"{write_table(table)}\nwrote {arguments.out}")
    return table


def write_table(table: StepTable) -> str:
    """The measurements as a Markdown table, with a line of settings."""
    lines = [
        "| threshold | evaluations | error, cache | error, as many steps | PSNR, cache | PSNR, as many steps |",
        "| --: " * 6 + "|",
    ]
    for row in table.measured:
        decibels = ["same frames" if value is None else f"{value:.1f} dB" for value in (row.psnr, row.fewer_steps_psnr)]
        lines.append(
            f"| {row.threshold:g} | {row.num_evaluations} of {len(table.ratios)} | {row.error:.4f} | "
            f"{row.fewer_steps_error:.4f} | {decibels[0]} | {decibels[1]} |"
        )
    sampling = table.sampling
    settings = (
        f"{table.model}, {table.cases} cases of {sampling.num_frames} frames, {sampling.width}x{sampling.height}; "
        f"{sampling.solver}, {sampling.num_inference_steps} steps, shift {sampling.flow_shift:g}, guidance "
        f"{sampling.guidance_scale:g}; at most {table.max_skips} skips in a row, none in the first {table.keep_first:.0%} "
        "of the steps."
    )
    return "\n".join([*lines, "", settings])


def main() -> None:
    with program("evaluation.step_cache"):
        arguments = tyro.cli(Arguments, description=__doc__)
        check_local_fields("arguments", arguments)
        check_output_folder("--out", arguments.out.parent)
        requests = make_requests(arguments, load_model_config(arguments.model))
        measure(arguments, pipeline.load(arguments.model), requests)


if __name__ == "__main__":
    main()
