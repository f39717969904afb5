"""Solver steps that do without the network, planned ahead from a table of measurements.

From one step to the next the guided velocity changes little. How much its length changes belongs to the model and the
schedule rather than to the video, so a table of these ratios, measured once, says which steps may be skipped:

    skip while the sum of |1 − (product of the ratios since the last evaluation)| over the skipped steps < threshold

That is the rule of MagCache, arXiv:2506.09045, which reuses the residual of the transformer blocks. Here it decides over the
guided velocity, of the size of the latents, and a skipped step takes the straight line in σ through the last two that
were evaluated. `magref_jax.evaluation.step_cache` measures a table, and what a plan costs in accuracy.

N solver steps
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

from magref_jax.config import SamplingConfig, from_dict
from magref_jax.diffusion.flow import make_schedule

THRESHOLD = 0.01
MAX_SKIPS = 3  # in a row
KEEP_FIRST = 0.2  # share of the steps

# Fields of `SamplingConfig` that a run must share with the table it is planned by.
SETTINGS = ("solver", "num_inference_steps", "flow_shift", "guidance_scale", "reference_guidance_scale")


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Which solver steps evaluate the network, and what the others make of the velocities it gave before."""

    evaluate: tuple[bool, ...]  # N; the first is True
    weights: tuple[tuple[float, float], ...]  # N, of the last evaluated velocity and of the one evaluated before it

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.evaluate):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.evaluate)} steps; give one each.")
        if not self.evaluate or not self.evaluate[0]:
            raise ValueError(f"evaluate={self.evaluate} must begin with True: there is no velocity to reuse yet.")
        for step, pair in enumerate(self.weights):
            if len(pair) != 2 or not math.isclose(sum(pair), 1, abs_tol=1e-6):  # NaN is not close to anything
                raise ValueError(f"weights[{step}]={pair} must be two numbers that add up to 1.")
            if not self.evaluate[step] and sum(self.evaluate[:step]) == 1 and pair[1]:
                raise ValueError(f"weights[{step}]={pair} needs two evaluated velocities; there is one by then.")

    @classmethod
    def full(cls, num_inference_steps: int) -> "StepPlan":
        """Every step evaluates the network."""
        return cls((True,) * num_inference_steps, ((1.0, 0.0),) * num_inference_steps)

    @property
    def num_evaluations(self) -> int:
        return sum(self.evaluate)


def choose_steps(
    ratios: Sequence[float], threshold: float, max_skips: int = MAX_SKIPS, keep_first: float = KEEP_FIRST
) -> tuple[bool, ...]:
    """The steps that evaluate the network: MagCache's rule, and always the last step.

    `ratios[i]` is the length of the velocity of step i over that of step i − 1; the first is not read. At most `max_skips`
    steps in a row are skipped, and none in the share `keep_first` of the steps.

    Raises:
        ValueError: a ratio that is not positive, or an option outside of its range.
    """
    if not ratios or not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
        raise ValueError(f"ratios={tuple(ratios)} must be positive numbers, one per solver step.")
    if not threshold >= 0 or math.isinf(threshold):
        raise ValueError(f"threshold={threshold} must be a number from 0 on, such as {THRESHOLD}.")
    if max_skips < 0:
        raise ValueError(f"max_skips={max_skips} must be at least 0.")
    if not 0 <= keep_first <= 1:
        raise ValueError(f"keep_first={keep_first} must be a share of the steps, from 0 to 1.")
    first = max(1, int(len(ratios) * keep_first))
    evaluate = [True] * len(ratios)
    product, error, skips = 1.0, 0.0, 0
    for step in range(first, len(ratios) - 1):
        product *= ratios[step]
        error += abs(1 - product)
        skips += 1
        if error < threshold and skips <= max_skips:
            evaluate[step] = False
        else:
            product, error, skips = 1.0, 0.0, 0
    return tuple(evaluate)


def extrapolate(evaluate: Sequence[bool], sigmas: Sequence[float]) -> StepPlan:
    """The plan whose skipped steps lie on the line in σ through the last two evaluated velocities.

    `sigmas` are the noise levels at which the steps begin. With only one velocity evaluated, it is held.
    """
    weights, known = [], []
    for is_evaluated, sigma in zip(evaluate, sigmas, strict=True):
        if is_evaluated:
            known.append(sigma)
        beyond = 0.0 if is_evaluated or len(known) < 2 else (sigma - known[-1]) / (known[-1] - known[-2])
        weights.append((1 + beyond, -beyond))
    return StepPlan(tuple(evaluate), tuple(weights))


def plan_steps(
    ratios: Sequence[float],
    sampling: SamplingConfig,
    threshold: float = THRESHOLD,
    max_skips: int = MAX_SKIPS,
    keep_first: float = KEEP_FIRST,
) -> StepPlan:
    """The plan for one sampling run.

    Raises:
        ValueError: as `choose_steps`, or ratios of another number of steps.
    """
    schedule = make_schedule(sampling.solver, sampling.num_inference_steps, sampling.flow_shift)
    if len(ratios) != schedule.num_inference_steps:
        raise ValueError(f"{len(ratios)} ratios do not fit num_inference_steps={schedule.num_inference_steps}.")
    return extrapolate(choose_steps(ratios, threshold, max_skips, keep_first), schedule.sigmas[:-1].tolist())


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one threshold saves and costs, and what the same number of evaluations spent on a shorter run costs.

    Errors are of the final latents, ‖x − full run‖ / ‖full run‖, averaged over the cases. PSNR is of the frames against
    those of the full run, in dB; None where they are the same.
    """

    threshold: float
    num_evaluations: int
    error: float
    psnr: float | None
    fewer_steps_error: float
    fewer_steps_psnr: float | None


@dataclasses.dataclass(frozen=True)
class StepTable:
    """The contents of a `step_cache.json`: ratios, what they were measured with, and what the plans made of them cost."""

    model: str  # name of the model folder
    sampling: SamplingConfig
    cases: int  # that were measured
    max_skips: int
    keep_first: float
    ratios: tuple[float, ...]  # N, means over cases; the first is 1
    spread: tuple[float, ...]  # N, standard deviations over cases
    measured: tuple[Measured, ...] = ()

    def __post_init__(self) -> None:
        if len(self.spread) != len(self.ratios):
            raise ValueError(f"spread has {len(self.spread)} entries for {len(self.ratios)} ratios.")
        self.plan(self.sampling)  # refuses values that no plan can be made of

    def plan(self, sampling: SamplingConfig, threshold: float = THRESHOLD) -> StepPlan:
        """The plan for a run with the settings that the table was measured with.

        A table for another number of steps is not resampled: a ratio belongs to the distance between two steps, and the
        measured errors belong to the whole run. To measure a table costs a few videos.

        Raises:
            ValueError: a setting differs, or the threshold is no number from 0 on.
        """
        for name in SETTINGS:
            given, expected = getattr(sampling, name), getattr(self.sampling, name)
            if given != expected:
                raise ValueError(
                    f"was measured with {name}={expected!r}, the run has {name}={given!r}; "
                    "python -m magref_jax.evaluation.step_cache measures another one."
                )
        return plan_steps(self.ratios, sampling, threshold, self.max_skips, self.keep_first)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "StepTable":
        """Raises ValueError where the text is not what `to_json` writes."""
        return from_dict(cls, json.loads(text), "step_cache")


def load_plan(text: str | pathlib.Path, sampling: SamplingConfig) -> StepPlan:
    """The plan of FILE[:THRESHOLD] for a run with these sampling options; the file may have colons of its own.

    Raises:
        ValueError: there is no such file, it is no table, or one for another run, or the threshold is no number.
    """
    path, (name, _, number) = pathlib.Path(text), str(text).rpartition(":")
    threshold = THRESHOLD
    if not path.is_file():
        path = pathlib.Path(name)
        if not name or not path.is_file():
            raise ValueError(f"there is no step cache file {str(text)!r}.")
        try:
            threshold = float(number)
        except ValueError:
            raise ValueError(f"{number!r} after {name}: must be a number from 0 on, such as {THRESHOLD}.") from None
    try:
        table = StepTable.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no step cache: {error}") from None
    try:
        return table.plan(sampling, threshold)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
