"""What a training run says about itself: a line of metrics per step, where its time went, how fast it was, and pictures.

Metrics are fetched when the device has computed them, `LATE` steps after they were logged, so that it never waits for the
host. Every process fetches, so that all of them stop at the same step; only the first one writes.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from magref_jax.config import ModelConfig
from magref_jax.distributed import on_first
from magref_jax.files import naming, replacing
from magref_jax.models.dit import context_flops, dit_flops

LATE = 2  # steps the host may be ahead of the metrics it has fetched

Bucket = Literal["init", "compile", "data", "step", "checkpoint", "validation", "sample", "other"]
BUCKETS: tuple[Bucket, ...] = ("init", "compile", "data", "step", "checkpoint", "validation", "sample", "other")
Clock = Callable[[], float]  # seconds from any start

# Dense bfloat16 FLOP/s of one device by `jax.Device.device_kind`, as the vendors state them: cloud.google.com/tpu/docs
# (v4, v5e, v5p, v6e) and Nvidia's data sheets of L4, A100, H100 and H200, whose figures with sparsity are twice these.
PEAK_FLOPS: Mapping[str, float] = {
    r"TPU v4": 275e12,
    r"TPU v5( lite|e)": 197e12,
    r"TPU v5p?": 459e12,
    r"TPU v6( lite|e)": 918e12,
    r"NVIDIA L4": 121e12,
    r"NVIDIA A100[ -].*": 312e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H100 80GB HBM3": 989e12,  # SXM
    r"NVIDIA H200": 989e12,  # SXM
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of `PEAK_FLOPS`; None for a device that is not there, such as a CPU."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if re.fullmatch(kind, device_kind)), None)


def train_flops(
    config: ModelConfig,
    latents: tuple[int, ...],
    text_tokens: int,
    image_tokens: int,
    *,
    frozen_kernels: bool = False,
) -> float:
    """Floating point operations that training the DiT on one batch of latents [B F h w C] takes, at least.

    Of the matrix products, the backward pass costs twice the forward pass: gradients of inputs and of kernels. The latter
    are not needed where `frozen_kernels` (a LoRA, whose own products are left out). What remat computes again and what
    frozen encoders do is not counted: these are the operations of the model, not those of an implementation.
    """
    dit, (batch, *sizes) = config.dit, latents[:4]
    tokens, context_tokens = math.prod(sizes) // math.prod(dit.patch_size), text_tokens + image_tokens
    forward = dit_flops(dit, tokens, context_tokens) + context_flops(dit, text_tokens, image_tokens)
    kernel_gradients = 0 if frozen_kernels else forward
    # Products of two activations, the logits and the weighted sums, have gradients of both whatever is frozen.
    attention = dit.num_layers * 4 * tokens * (tokens + context_tokens) * dit.dim if frozen_kernels else 0
    return float(batch * (2 * forward + kernel_gradients + attention))


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step does, over all devices; None: not counted."""

    samples: int
    video_tokens: int | None = None
    flops: float | None = None


def dit_work(config: ModelConfig, latents: tuple[int, ...], *, frozen_kernels: bool = False) -> Work:
    """The work of a step of the DiT on latents [B F h w C] of the whole batch."""
    batch, *sizes = latents[:4]
    image_tokens = 0
    if config.dit.image_dim is not None and config.image_encoder is not None:
        image_tokens = config.image_encoder.num_tokens
    return Work(
        samples=batch,
        video_tokens=batch * math.prod(sizes) // math.prod(config.dit.patch_size),
        flops=train_flops(config, latents, config.dit.text_len, image_tokens, frozen_kernels=frozen_kernels),
    )


class CompileTime:
    """Seconds that JAX spent on tracing, lowering and compiling in the thread that made this object."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._spans: collections.deque[tuple[float, float]] = collections.deque(maxlen=1000)
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def listen(self) -> None:
        jax.monitoring.register_event_time_span_listener(self.add)

    def stop(self) -> None:
        jax.monitoring.unregister_event_time_span_listener(self.add)

    def add(self, event: str, start_time: float, end_time: float, **_: str | int) -> None:
        if not event.startswith("/jax/core/compile/") or threading.get_ident() != self._thread:
            return
        # A trace holds those of the functions it calls, which were reported before it: no second counts twice.
        while self._spans and self._spans[-1][0] >= start_time:
            inner_start, inner_end = self._spans.pop()
            self.seconds -= inner_end - inner_start
        self._spans.append((start_time, end_time))
        self.seconds += end_time - start_time


class Goodput:
    """Where the wall-clock time of this process went; what earlier processes of the run did is not known to it.

    Every second is in exactly one bucket, that which was opened last, and compilation in its own wherever it happens.
    """

    def __init__(self, clock: Clock = time.perf_counter, compile_time: Clock = lambda: 0.0) -> None:
        self._clock, self._compile_time = clock, compile_time
        self._open: list[Bucket] = ["init"]
        self._seconds: dict[Bucket, float] = dict.fromkeys(BUCKETS, 0.0)
        self._since, self._compiled = clock(), compile_time()

    def _settle(self) -> None:
        now, compiled = self._clock(), self._compile_time()
        elapsed = now - self._since
        compiling = min(compiled - self._compiled, elapsed)
        self._seconds[self._open[-1]] += elapsed - compiling
        self._seconds["compile"] += compiling
        self._since, self._compiled = now, compiled

    @contextlib.contextmanager
    def time(self, bucket: Bucket) -> Iterator[None]:
        """Puts the time of a block into a bucket, but for what blocks inside it take for theirs."""
        if bucket not in BUCKETS:
            raise ValueError(f"bucket={bucket!r} must be one of {', '.join(BUCKETS)}.")
        self._settle()
        self._open.append(bucket)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def end_init(self) -> None:
        """From here on, time in no bucket is "other" instead of "init"."""
        self._settle()
        self._open[0] = "other"

    @property
    def seconds(self) -> dict[Bucket, float]:
        self._settle()
        return dict(self._seconds)

    @property
    def fraction(self) -> float:
        """Share of all time that went into training steps."""
        seconds = self.seconds
        return seconds["step"] / max(sum(seconds.values()), 1e-9)

    def table(self) -> str:
        """One line of a Markdown table, below its header."""
        seconds = self.seconds
        cells = [f"{value:.1f} s" for value in (*seconds.values(), sum(seconds.values()))]
        return "\n".join(
            (
                f"| {' | '.join(seconds)} | total | goodput |",
                "| --: " * (len(seconds) + 2) + "|",
                f"| {' | '.join(cells)} | {self.fraction:.1%} |",
            )
        )


class TooManySkipped(ValueError):
    """Too many steps in a row had gradients that are not finite."""

    def __init__(self, step: int, in_a_row: int, max_skipped: int) -> None:
        super().__init__(
            f"step {step}: {in_a_row} steps in a row had gradients that are not finite, and max_skipped={max_skipped} "
            f"allows no more. They changed nothing: the weights are those of step {step - in_a_row}. Try a lower "
            "learning_rate or clip_norm, more warmup_steps or dtype float32, and look at the batches of these steps."
        )
        self.step = step
        self.in_a_row = in_a_row


@dataclasses.dataclass
class _Line:
    """A step whose metrics may still be on their way."""

    step: int
    metrics: dict[str, Any]
    work: Work | None
    seconds: float | None = None  # None: not arrived
    data_seconds: float = 0.0


class Monitor:
    """Follows a run from its first step to its last.

        with Monitor(folder, num_steps) as monitor:
            ...  # load and restore
            monitor.begin(step)
            for step in range(step + 1, num_steps + 1):
                with monitor.time("data"):
                    batch = next(batches)
                with monitor.time("step"):
                    state, metrics = train_step(state, batch)
                monitor.log(step, metrics, work)

    Steps count from 1. A line of `metrics.jsonl` has `step`, the metrics, `seconds` (from the arrival of the metrics before
    to that of these, without compilation, checkpoints, validation and samples) and `data_seconds`, which of these the host
    waited for data. Those of every `report_every` steps and the last also have what was measured since the line before:
    rates, the share `data_wait`, MFU if the device is known, and goodput with its buckets, of the whole process.

    Args:
        folder: `metrics.jsonl`, `tensorboard/` and `profile/` are written there.
        num_steps: of the whole run.
        report_every: steps.
        max_skipped: how many steps in a row may have a metric `skipped`, a running total, that is larger than before.
        tensorboard: needs tensorboardX.
        profile: first step and number of steps that `jax.profiler` records.
        progress_bar: on stderr.
        clock: seconds.

    Raises:
        ModuleNotFoundError: `tensorboard` without tensorboardX.
        ValueError: an impossible `report_every` or `profile`.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        num_steps: int,
        *,
        report_every: int = 50,
        max_skipped: int = 10,
        tensorboard: bool = False,
        profile: tuple[int, int] | None = None,
        progress_bar: bool = True,
        clock: Clock = time.perf_counter,
    ) -> None:
        if tensorboard and importlib.util.find_spec("tensorboardX") is None:
            raise ModuleNotFoundError("tensorboard=True needs tensorboardX: pip install 'magref-jax[train]'.")
        if report_every < 1:
            raise ValueError(f"report_every={report_every} must be at least 1.")
        if profile is not None and min(profile) < 1:
            raise ValueError(f"profile={profile} must be a first step and a number of steps, both at least 1.")
        self._folder, self._num_steps = folder, num_steps
        self._report_every, self._max_skipped = report_every, max_skipped
        self._tensorboard, self._profile = tensorboard, profile
        self._progress_bar = progress_bar
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._writes = jax.process_index() == 0

        self._compile_time = CompileTime()
        self._compile_time.listen()
        self.goodput = Goodput(clock, self._compile_time)

        self._lines: collections.deque[_Line] = collections.deque()
        self._skipped, self._in_a_row = 0, 0
        self._window: list[tuple[_Line, dict[str, Any]]] = []  # since the last report
        self._file: io.TextIOBase | None = None
        self._bar: Any = None
        self._events: Any = None
        self._is_profiling = False
        self._last = 0
        self._arrived = 0.0, 0.0

    # A run's life

    def begin(self, step: int, skipped: int = 0) -> None:
        """The run goes on after `step`, `skipped` of which were: lines after it are of steps to be done again, and go.

        Raises:
            ValueError: `metrics.jsonl` is damaged before its last line.
        """
        self._last, self._skipped = step, skipped
        if self._writes:
            path = self._folder / "metrics.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                cut_lines(path, step)
                self._in_a_row = skipped_in_a_row(path)
            self._file = path.open("a", encoding="utf-8")
            if self._tensorboard:
                import tensorboardX

                # Tells the viewer to forget later steps.
                purge_step = step + 1 if step else None
                self._events = tensorboardX.SummaryWriter(str(self._folder / "tensorboard"), purge_step=purge_step)
            if self._progress_bar:
                self._bar = tqdm(total=self._num_steps, initial=step, unit="step")
        self._in_a_row = on_first(lambda: self._in_a_row)  # all of several processes stop at the same step
        self.goodput.end_init()
        self._arrived = self._training_seconds()
        self._profile_from(step + 1)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if kind is not None:  # what ends the run is known already
            self._max_skipped = self._num_steps
        self.close()

    def close(self) -> None:
        """Writes what is left. Nothing can be logged any more."""
        try:
            self.flush()
        finally:
            if self._is_profiling:
                jax.profiler.stop_trace()
                self._is_profiling = False
            for each in (self._file, self._events, self._bar):
                if each is not None:
                    each.close()
            self._file = self._events = self._bar = None
            with contextlib.suppress(ValueError, AssertionError):  # closed before
                self._compile_time.stop()

    # Time

    @contextlib.contextmanager
    def time(self, bucket: Bucket) -> Iterator[None]:
        """Puts the time of a block into a bucket of `goodput`.

        All but "data" and "step" need what the steps before computed, so these are waited for first, as their own time; a
        checkpoint also finds their lines in the file.
        """
        if bucket == "checkpoint":
            self.flush()
        elif bucket not in ("data", "step"):
            self._wait()
        with self.goodput.time(bucket):
            yield

    def _training_seconds(self) -> tuple[float, float]:
        seconds = self.goodput.seconds
        return seconds["step"] + seconds["data"] + seconds["other"], seconds["data"]

    # Metrics

    def log(self, step: int, metrics: Mapping[str, Any], work: Work | None = None) -> None:
        """Notes the metrics of a step that was started, and writes those of the step `LATE` before it.

        Given a second time for the newest step, such as after a validation, they are added to its line. Metrics are scalars
        or arrays of JAX or NumPy, numbers, strings, and mappings of these.

        Raises:
            TooManySkipped: see `max_skipped`; the line is written.
            ValueError: a step that has its line already.
        """
        if self._lines and self._lines[-1].step == step:
            self._lines[-1].metrics |= metrics
            return
        if step <= self._last:
            raise ValueError(f"step={step} must be later than {self._last}, whose line is closed.")
        for leaf in jax.tree.leaves(metrics):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        self._lines.append(_Line(step, dict(metrics), work))
        self._last = step
        while len(self._lines) > LATE:
            self._write_oldest()
        self._profile_from(step + 1)

    def flush(self) -> None:
        """Waits for all steps and has their lines on the disk."""
        while self._lines:
            self._write_oldest()
        if self._file is not None:
            with naming(self._folder / "metrics.jsonl"):
                self._file.flush()
                os.fsync(self._file.fileno())

    def _wait(self, count: int | None = None) -> None:
        """For the first `count` steps that were logged and not yet written."""
        for line in list(self._lines)[:count]:
            if line.seconds is None:
                with self.goodput.time("step"):
                    jax.block_until_ready(line.metrics)
                arrived = self._training_seconds()
                line.seconds, line.data_seconds = (
                    now - before for now, before in zip(arrived, self._arrived, strict=True)
                )
                self._arrived = arrived

    def _write_oldest(self) -> None:
        self._wait(1)
        line = self._lines.popleft()
        metrics = jax.tree.map(to_json, jax.device_get(line.metrics))
        self._window.append((line, metrics))
        values = {"step": line.step, **metrics, "seconds": line.seconds, "data_seconds": line.data_seconds}
        if line.step % self._report_every == 0 or line.step == self._num_steps:
            values |= self._report()
        if self._file is not None:
            with naming(self._folder / "metrics.jsonl"):
                self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
                self._file.flush()
        if self._bar is not None:
            self._bar.update()
        if "skipped" in metrics:
            self._in_a_row = self._in_a_row + 1 if metrics["skipped"] > self._skipped else 0
            self._skipped = metrics["skipped"]
            if self._in_a_row > self._max_skipped:
                raise TooManySkipped(line.step, self._in_a_row, self._max_skipped)

    def _report(self) -> dict[str, Any]:
        """Rates of the steps since the last report; shown and drawn, together with the means of their metrics."""
        lines = [line for line, _ in self._window]
        seconds = max(sum(line.seconds or 0.0 for line in lines), 1e-9)
        works = [line.work for line in lines if line.work is not None]
        report: dict[str, Any] = {}
        if len(works) == len(lines):
            report["samples_per_second"] = sum(work.samples for work in works) / seconds
            tokens = [work.video_tokens for work in works if work.video_tokens is not None]
            if len(tokens) == len(lines):
                report["video_tokens_per_second"] = sum(tokens) / seconds
            flops = [work.flops for work in works if work.flops is not None]
            if len(flops) == len(lines):
                rate = sum(flops) / seconds
                report["tflops_per_second"] = rate / 1e12
                if self._peak is not None:
                    report["mfu"] = rate / (self._peak * jax.device_count())
        report["data_wait"] = sum(line.data_seconds for line in lines) / seconds
        report["goodput"] = self.goodput.fraction
        report["buckets"] = self.goodput.seconds

        means: dict[str, list[float]] = {}
        for _, metrics in self._window:
            for name, value in _scalars(metrics):
                means.setdefault(name, []).append(value)
        scalars = {name: float(np.mean(values)) for name, values in means.items()} | dict(_scalars(report))
        self._window = []
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, lines[-1].step)
        if self._bar is not None:
            shown = {"loss": "loss", "samples/s": "samples_per_second"}
            postfix = {label: f"{scalars[name]:.4g}" for label, name in shown.items() if name in scalars}
            self._bar.set_postfix(postfix | {"data": f"{report['data_wait']:.1%}"}, refresh=False)
        return report

    # Pictures

    def image(self, tag: str, step: int, image: UInt8[np.ndarray, "H W 3"]) -> None:
        if self._events is not None:
            self._events.add_image(tag, image, step, dataformats="HWC")

    def video(self, tag: str, step: int, frames: UInt8[np.ndarray, "F H W 3"], fps: float) -> None:
        """Shown as a moving picture. Written as a summary of ours: tensorboardX would need moviepy to encode it."""
        if self._events is None:
            return
        from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute]

        height, width = frames.shape[1:3]
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encode_gif(frames, fps))
        # The first call makes the writer of the files; nothing public gives it.
        self._events._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]), step)

    # Profile

    def _profile_from(self, step: int) -> None:
        """Starts or stops recording before the step that comes next."""
        if self._profile is None or not self._writes:
            return
        first, count = self._profile
        wanted = first <= step < min(first + count, self._num_steps + 1)
        if wanted == self._is_profiling:
            return
        self._wait()  # steps that are still running belong to the side they were started on
        with self.goodput.time("other"):
            if wanted:
                jax.profiler.start_trace(str(self._folder / "profile"))
            else:
                jax.profiler.stop_trace()
        self._is_profiling = wanted


def cut_lines(path: pathlib.Path, step: int) -> None:
    """Removes the lines after `step`, and a last line that is not whole.

    Raises:
        ValueError: another line is not whole.
    """
    text = path.read_bytes()
    lines, kept = text.splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is damaged: it must be a JSON object with a step.") from None
    if b"".join(kept) != text:
        with replacing(path) as part:
            part.write_bytes(b"".join(kept))


def skipped_in_a_row(path: pathlib.Path) -> int:
    """How many of the last lines are of steps that were skipped: a run of them may go on after a restart."""
    totals = [0, *(json.loads(line).get("skipped", 0) for line in path.read_bytes().splitlines())]
    rising = [now > before for before, now in itertools.pairwise(totals)]
    return len(list(itertools.takewhile(bool, reversed(rising))))


def to_json(value: Any) -> Any:
    """An array as numbers that JSON can hold, every digit of it."""
    if isinstance(value, str):
        return value
    value = np.asarray(value)
    # bfloat16 is no floating type to NumPy.
    return (value.astype(np.float64) if value.dtype.kind in "fV" else value).tolist()


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings, under slash-separated names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


def encode_gif(frames: UInt8[np.ndarray, "F H W 3"], fps: float) -> bytes:
    """An endless GIF, every frame with a palette of its own. A frame equal to the one before becomes time of that one."""
    images = [Image.fromarray(frame).quantize(256) for frame in frames]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return file.getvalue()
