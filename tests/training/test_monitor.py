"""What a run reports: one line per step whatever happened, time that adds up, rates that follow from them."""

import contextlib
import dataclasses
import io
import json
import math
import pathlib
import statistics
import struct
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from PIL import Image

from magref_jax.config import DiTConfig, ImageEncoderConfig, ModelConfig
from magref_jax.models.dit import DiT, context_flops, dit_flops
from magref_jax.training import monitor
from magref_jax.training.monitor import Goodput, Monitor, TooManySkipped, Work


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def open_monitor(tmp_path):
    """A monitor of `tmp_path` without a bar, closed in the end."""
    opened = []

    def make(num_steps: int = 100, **options) -> Monitor:
        opened.append(Monitor(tmp_path, num_steps, **{"progress_bar": False} | options))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def read_lines(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Lines


def test_every_digit_is_written(tmp_path, open_monitor):
    follow = open_monitor()
    follow.begin(0)
    per_level = jnp.array([0.25, 1 / 3], jnp.float32)
    metrics = {
        "loss": jnp.float32(0.1),
        "gradient_norm": jnp.float32(jnp.nan),
        "scale": jnp.bfloat16(1.5),
        "skipped": jnp.int32(0),
        "host": 1 / 3,
    }
    follow.log(1, metrics)
    follow.log(1, {"validation": {"loss": np.float64(0.7), "levels": per_level}, "sampled": "yes"})
    follow.flush()

    (line,) = read_lines(tmp_path)
    assert next(iter(line)) == "step"
    assert line["loss"] == float(np.float32(0.1)) != 0.1
    assert math.isnan(line["gradient_norm"])
    assert (line["scale"], line["skipped"], line["host"]) == (1.5, 0, 1 / 3)
    assert isinstance(line["skipped"], int)
    assert line["validation"] == {"loss": 0.7, "levels": [0.25, float(np.float32(1 / 3))]}
    assert line["sampled"] == "yes"


def test_a_restart_leaves_one_line_per_step(tmp_path, open_monitor):
    first = open_monitor()
    first.begin(0)
    for step in range(1, 8):
        first.log(step, {"loss": 1 / step})
    first.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 8, "lo')  # killed in the middle of a line

    second = open_monitor()
    second.begin(5)
    kept = path.read_bytes()
    assert whole.startswith(kept)
    assert kept.count(b"\n") == 5
    for step in range(6, 9):
        second.log(step, {"loss": -1.0})
    second.close()
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["loss"] for line in lines] == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, -1, -1, -1]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_last_line_without_its_end_is_kept_if_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    monitor.cut_lines(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_nothing_to_cut_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n')
    before = path.stat().st_ino
    monitor.cut_lines(path, 1)
    assert path.stat().st_ino == before


@pytest.mark.parametrize("damaged", [b'{"step": 2, "lo', b"[]", b'{"loss": 1}', b'{"step": "x"}'])
def test_a_damaged_line_before_the_last_is_an_error(tmp_path, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is damaged"):
        monitor.cut_lines(path, 3)
    assert path.read_bytes().count(b"\n") == 3


def test_a_closed_line_takes_no_more(open_monitor):
    follow = open_monitor()
    follow.begin(4)
    with pytest.raises(ValueError, match="step=4 must be later than 4"):
        follow.log(4, {})
    follow.log(5, {})
    follow.flush()
    with pytest.raises(ValueError, match="step=5 must be later than 5"):
        follow.log(5, {"validation": 1.0})


class Pending:
    """A metric that is on its way; says when somebody waits for it."""

    def __init__(self, step: int, waited: list[int]) -> None:
        self.step, self.waited = step, waited

    def block_until_ready(self) -> "Pending":
        self.waited.append(self.step)
        return self

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(float(self.step))


def test_metrics_are_fetched_late_and_in_order(tmp_path, open_monitor):
    follow, waited = open_monitor(), []
    follow.begin(0)
    for step in range(1, 6):
        follow.log(step, {"loss": Pending(step, waited)})
        assert waited == list(range(1, step - 1))  # two steps may be on the device
        assert [line["loss"] for line in read_lines(tmp_path)] == waited
    with follow.time("data"), follow.time("step"):
        assert waited == [1, 2, 3]
    with follow.time("validation"):
        assert waited == [1, 2, 3, 4, 5]
        assert len(read_lines(tmp_path)) == 3  # the line of step 5 waits for what validation finds
    follow.log(5, {"validation": {"loss": 0.5}})
    with follow.time("checkpoint"):
        assert read_lines(tmp_path)[-1]["validation"] == {"loss": 0.5}
    assert waited == [1, 2, 3, 4, 5]


def test_an_error_in_the_loop_leaves_the_lines_of_all_steps(tmp_path):
    def loop():
        with Monitor(tmp_path, 10, max_skipped=0, progress_bar=False) as follow:
            follow.begin(0)
            follow.log(1, {"skipped": 1})
            follow.log(2, {"skipped": 2})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2]


def test_only_the_first_process_writes(tmp_path, monkeypatch, open_monitor):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    follow = open_monitor(tensorboard=True, max_skipped=1, profile=(1, 2))
    follow.begin(0)
    follow.image("canvas", 1, np.zeros((2, 2, 3), np.uint8))
    follow.log(1, {"skipped": 1})
    follow.log(2, {"skipped": 2})
    with pytest.raises(TooManySkipped):  # as the first one does, at the same step
        follow.flush()
    assert list(tmp_path.iterdir()) == []


# Skipped steps


def test_too_many_skipped_in_a_row_end_the_run(tmp_path, open_monitor):
    follow = open_monitor(max_skipped=2)
    follow.begin(10, skipped=4)
    for step, total in zip(range(11, 19), [4, 5, 6, 6, 7, 8, 9, 9], strict=True):
        follow.log(step, {"skipped": jnp.int32(total)})
    message = (
        "step 17: 3 steps in a row had gradients that are not finite, and max_skipped=2.*weights are those of step 14"
    )
    with pytest.raises(TooManySkipped, match=message) as raised:
        follow.log(19, {"skipped": 9})
    assert (raised.value.step, raised.value.in_a_row) == (17, 3)
    assert [line["step"] for line in read_lines(tmp_path)] == list(range(11, 18))


def test_skipped_steps_of_before_a_restart_do_not_count(open_monitor):
    follow = open_monitor(max_skipped=0)
    follow.begin(10, skipped=4)
    follow.log(11, {"skipped": 4})
    follow.flush()


def test_a_row_of_skipped_steps_goes_on_over_a_restart(open_monitor):
    follow = open_monitor(max_skipped=2)
    follow.begin(0)
    for step, total in enumerate([1, 1, 2, 3], start=1):
        follow.log(step, {"skipped": total})
    follow.close()
    follow = open_monitor(max_skipped=2)
    follow.begin(4, skipped=3)  # steps 3 and 4 were skipped
    follow.log(5, {"skipped": 4})
    with pytest.raises(TooManySkipped, match="step 5: 3 steps in a row .* weights are those of step 2"):
        follow.flush()


# Time


def test_every_second_is_in_one_bucket(clock):
    compiled = FakeClock()
    goodput = Goodput(clock, compiled)
    clock.passes(3)
    with goodput.time("init"):
        clock.passes(4)
    goodput.end_init()
    clock.passes(0.5)
    with goodput.time("step"):
        clock.passes(10)
        compiled.passes(6)
        with goodput.time("data"):
            clock.passes(2)
            with goodput.time("step"):
                clock.passes(1)
            clock.passes(0.25)
        clock.passes(20)
    with contextlib.suppress(KeyError), goodput.time("checkpoint"):
        clock.passes(7)
        raise KeyError
    with goodput.time("validation"):
        clock.passes(1)
        compiled.passes(1)
    with goodput.time("sample"):
        clock.passes(0.125)
        assert goodput.seconds["sample"] == 0.125  # also while it runs
    seconds = goodput.seconds
    assert seconds == {
        "init": 7.0,
        "compile": 7.0,
        "data": 2.25,
        "step": 25.0,
        "checkpoint": 7.0,
        "validation": 0.0,
        "sample": 0.125,
        "other": 0.5,
    }
    assert sum(seconds.values()) == clock.now - 100
    assert goodput.fraction == 25 / 48.875
    header, rule, cells = goodput.table().splitlines()
    assert header.count("|") == rule.count("|") == cells.count("|") == 11
    assert "| 25.0 s |" in cells
    assert cells.endswith("| 48.9 s | 51.2% |")
    with pytest.raises(ValueError, match="bucket='idle' must be one of init, compile, data"), goodput.time("idle"):
        pass


def test_nested_compilation_counts_once():
    compile_time = monitor.CompileTime()
    event = "/jax/core/compile/jaxpr_trace_duration"
    for start, end in [(11, 12), (12.5, 13), (10, 15), (15, 18), (21, 22), (20, 24)]:
        compile_time.add(event, start, end, fun_name="f")
    compile_time.add("/jax/checkpoint/write", 30, 40)
    thread = threading.Thread(target=compile_time.add, args=(event, 50, 60))
    thread.start()
    thread.join()
    assert compile_time() == 5 + 3 + 4


def test_compilation_is_taken_out_of_the_bucket_it_happens_in(open_monitor):
    follow = open_monitor()
    follow.begin(0)
    started = time.perf_counter()
    with follow.time("step"):
        jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) * 3.25 + x**3)(jnp.ones(7)))
    passed = time.perf_counter() - started
    seconds = follow.goodput.seconds
    assert 0.002 < seconds["compile"] < passed
    assert seconds["compile"] + seconds["step"] == pytest.approx(passed, rel=0.05)


def test_a_closed_monitor_listens_no_more(tmp_path):
    follow = Monitor(tmp_path, 1, progress_bar=False)
    follow.close()
    follow.close()
    before = follow.goodput.seconds["compile"]
    jax.block_until_ready(jax.jit(lambda x: jnp.cos(x) * 1.125)(jnp.ones(5)))
    assert follow.goodput.seconds["compile"] == before


def test_seconds_and_rates_follow_from_the_clock(tmp_path, monkeypatch, clock, open_monitor):
    monkeypatch.setattr(monitor, "peak_flops", lambda kind: 1e12)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    follow = open_monitor(6, report_every=4, clock=clock)
    clock.passes(9)
    follow.begin(0)

    class Computed:
        """Takes two seconds of the device after the host has asked for it."""

        def block_until_ready(self):
            clock.passes(2)
            return self

        def __array__(self, dtype=None, copy=None):
            return np.array(0.5)

    for step in range(1, 7):
        with follow.time("data"):
            clock.passes(0.5)
        with follow.time("step"):
            clock.passes(0.25)
        follow.log(step, {"loss": Computed()}, Work(samples=8, video_tokens=100, flops=3e12))
        if step == 3:
            with follow.time("validation"):
                clock.passes(50)
    follow.close()

    lines = read_lines(tmp_path)
    # The first metrics arrive when three steps have been begun; validation and the end wait for the two after them.
    assert [line["seconds"] for line in lines] == [4.25, 2, 2, 4.25, 2, 2]
    assert [line["data_seconds"] for line in lines] == [1.5, 0, 0, 1.5, 0, 0]
    assert ["goodput" in line for line in lines] == [False, False, False, True, False, True]

    for line, first in ((lines[3], 0), (lines[5], 4)):
        window = lines[first : line["step"]]
        seconds = sum(each["seconds"] for each in window)
        assert line["samples_per_second"] == pytest.approx(8 * len(window) / seconds)
        assert line["video_tokens_per_second"] == pytest.approx(100 * len(window) / seconds)
        assert line["tflops_per_second"] == pytest.approx(3 * len(window) / seconds)
        assert line["mfu"] == pytest.approx(3 * len(window) / seconds / 4)
        assert line["data_wait"] == pytest.approx(sum(each["data_seconds"] for each in window) / seconds)
    assert lines[5]["buckets"] == follow.goodput.seconds
    assert lines[5]["buckets"]["init"] == 9
    assert lines[5]["buckets"]["validation"] == 50
    assert lines[5]["goodput"] == pytest.approx(6 * 2.25 / (9 + 50 + 6 * 2.75))


def test_rates_that_are_not_known_are_left_out(tmp_path, open_monitor):
    follow = open_monitor(2, report_every=1)
    follow.begin(0)
    follow.log(1, {}, Work(samples=8))
    follow.log(2, {})
    follow.close()
    rates = {"samples_per_second", "video_tokens_per_second", "tflops_per_second", "mfu"}
    assert [rates & set(line) for line in read_lines(tmp_path)] == [{"samples_per_second"}, set()]


# FLOPs

CONFIG = ModelConfig(
    dit=DiTConfig(
        dim=24,
        ffn_dim=32,
        num_heads=2,
        num_layers=3,
        in_channels=6,
        out_channels=4,
        text_dim=10,
        text_len=12,
        image_dim=14,
        freq_dim=16,
        dtype="float32",
        remat="none",
        attention="reference",
    ),
    image_encoder=ImageEncoderConfig(image_size=12, patch_size=6),
)
LATENTS = (2, 3, 4, 6, 4)
TEXT_TOKENS, IMAGE_TOKENS = 12, 5


def product_flops(jaxpr: core.Jaxpr) -> int:
    """Two operations for every multiplication that the matrix products of a program need."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        for inner in _jaxprs(equation.params):
            total += equation.params.get("length", 1) * product_flops(inner)
    return total


def _jaxprs(params: dict) -> list[core.Jaxpr]:
    inner = [getattr(value, "jaxpr", value) for value in params.values()]
    return [value for value in inner if isinstance(value, core.Jaxpr)]


@pytest.fixture(scope="module")
def dit_inputs():
    dit = CONFIG.dit
    batch, frames, height, width, _ = LATENTS
    inputs = (
        jax.ShapeDtypeStruct((batch, frames, height, width, dit.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.float32),
        jax.ShapeDtypeStruct((batch, TEXT_TOKENS, dit.text_dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, IMAGE_TOKENS, dit.image_dim), jnp.float32),
    )
    return jax.eval_shape(DiT(dit).init, jax.random.key(0), *inputs), inputs


def test_train_flops_are_those_of_the_gradient(dit_inputs):
    """Every product of the differentiated program is counted, but for the gradients of inputs that nobody asks for."""
    params, inputs = dit_inputs
    gradient = jax.make_jaxpr(jax.grad(lambda params, *inputs: DiT(CONFIG.dit).apply(params, *inputs).sum()))
    counted = product_flops(gradient(params, *inputs).jaxpr)
    dit, tokens = CONFIG.dit, 3 * 2 * 3
    inputs_only = 2 * dit.dim * (tokens * 4 * dit.in_channels + TEXT_TOKENS * dit.text_dim + dit.freq_dim)
    assert monitor.train_flops(CONFIG, LATENTS, TEXT_TOKENS, IMAGE_TOKENS) == counted + 2 * inputs_only


def test_train_flops_with_frozen_kernels_are_those_of_the_input_gradient(dit_inputs):
    params, inputs = dit_inputs

    def total(latents, text, image, params, timesteps):
        return DiT(CONFIG.dit).apply(params, latents, timesteps, text, image).sum()

    latents, timesteps, text, image = inputs
    gradient = jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(latents, text, image, params, timesteps)
    dit = CONFIG.dit
    time_embedding = 2 * dit.dim * (dit.freq_dim + 7 * dit.dim)  # has no gradient here
    ours = monitor.train_flops(CONFIG, LATENTS, TEXT_TOKENS, IMAGE_TOKENS, frozen_kernels=True)
    assert ours == product_flops(gradient.jaxpr) + 2 * time_embedding


def test_work_of_a_step():
    work = monitor.dit_work(CONFIG, LATENTS)
    assert (work.samples, work.video_tokens) == (2, 36)
    assert work.flops == monitor.train_flops(CONFIG, LATENTS, 12, 5)
    forward = dit_flops(CONFIG.dit, 18, 17) + context_flops(CONFIG.dit, 12, 5)
    assert work.flops == 3 * 2 * forward

    text_only = dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, image_dim=None))
    assert monitor.dit_work(text_only, LATENTS).flops == monitor.train_flops(text_only, LATENTS, 12, 0)
    assert monitor.dit_work(CONFIG, LATENTS, frozen_kernels=True).flops < work.flops


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("NVIDIA L4", 121),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("cpu", None),
        ("TPU v4 lite", None),
        ("NVIDIA L40S", None),
        ("NVIDIA H100 NVL", None),
    ],
)
def test_peaks(kind, tflops):
    assert monitor.peak_flops(kind) == (None if tflops is None else tflops * 1e12)


# TensorBoard


def read_events(folder: pathlib.Path) -> list:
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.iterdir()):
        file = io.BytesIO(path.read_bytes())
        while header := file.read(12):
            (length,) = struct.unpack("<Q", header[:8])
            events.append(Event.FromString(file.read(length)))
            file.read(4)
    return events


def moving_square(count: int) -> np.ndarray:
    frames = np.full((count, 12, 16, 3), (200, 220, 240), np.uint8)
    for index, frame in enumerate(frames):
        frame[2:6, index : index + 4] = (255, 40, 10 * index)
    return frames


def test_events_hold_means_and_pictures(tmp_path, open_monitor):
    follow = open_monitor(4, report_every=2, tensorboard=True)
    follow.begin(0)
    for step, loss in enumerate([1.0, 2.0, 4.0, 8.0], start=1):
        follow.log(step, {"loss": jnp.float32(loss)})
    follow.log(4, {"validation": {"loss": 0.25}})
    frames = moving_square(5)
    follow.image("canvas", 4, frames[2])
    follow.video("sample", 4, frames, fps=8)
    follow.close()

    values = {}
    for event in read_events(tmp_path / "tensorboard"):
        values |= {(value.tag, event.step): value for value in event.summary.value}
    assert values["loss", 2].simple_value == 1.5
    assert values["loss", 4].simple_value == 6
    assert values["validation/loss", 4].simple_value == 0.25
    assert ("buckets/step", 4) in values
    assert ("goodput", 2) in values
    canvas = np.asarray(Image.open(io.BytesIO(values["canvas", 4].image.encoded_image_string)))
    assert np.array_equal(canvas, frames[2])
    sample = Image.open(io.BytesIO(values["sample", 4].image.encoded_image_string))
    assert (sample.format, sample.n_frames, sample.size) == ("GIF", 5, (16, 12))


def test_a_restart_hides_the_events_after_it(tmp_path, open_monitor):
    follow = open_monitor(tensorboard=True)
    follow.begin(20)
    follow.close()
    starts = [event.step for event in read_events(tmp_path / "tensorboard") if event.HasField("session_log")]
    assert starts == [21]


def test_pictures_go_nowhere_without_tensorboard(tmp_path, open_monitor):
    follow = open_monitor()
    follow.begin(0)
    follow.image("canvas", 1, moving_square(1)[0])
    follow.video("sample", 1, moving_square(2), fps=8)
    follow.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_missing_library_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"tensorboardX: pip install 'magref-jax\[train\]'"):
        Monitor(tmp_path / "run", 1, tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_gif_shows_every_frame_at_its_time():
    frames = moving_square(7)
    gif = Image.open(io.BytesIO(monitor.encode_gif(frames, fps=8)))
    assert gif.n_frames == 7
    assert gif.info["loop"] == 0
    for index, frame in enumerate(frames):
        gif.seek(index)
        assert np.array_equal(np.asarray(gif.convert("RGB")), frame)  # fewer colours than a palette holds
        assert gif.info["duration"] == 120  # GIF counts hundredths of a second


def test_gif_of_a_still_lasts_as_long():
    frames = np.repeat(moving_square(2), 3, axis=0)
    gif = Image.open(io.BytesIO(monitor.encode_gif(frames, fps=10)))
    durations = []
    for index in range(gif.n_frames):
        gif.seek(index)
        durations.append(gif.info["duration"])
    assert durations == [300, 300]


# Profile


@pytest.fixture
def traces(monkeypatch) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(f"start {pathlib.Path(folder).name}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize(
    ("begin", "profile", "last", "expected"),
    [
        (0, (3, 2), 6, ["log 1", "log 2", "start profile", "log 3", "log 4", "stop", "log 5", "log 6"]),
        (0, (1, 1), 2, ["start profile", "log 1", "stop", "log 2"]),
        (3, (3, 2), 5, ["start profile", "log 4", "stop", "log 5"]),  # a restart inside
        (4, (3, 2), 5, ["log 5"]),
        (0, (2, 9), 3, ["log 1", "start profile", "log 2", "log 3", "stop"]),  # the run is over before
    ],
)
def test_the_profile_is_of_the_steps_asked_for(open_monitor, traces, begin, profile, last, expected):
    follow = open_monitor(profile=profile)
    follow.begin(begin)
    for step in range(begin + 1, last + 1):
        traces.append(f"log {step}")
        follow.log(step, {})
    follow.close()
    assert traces == expected


def test_steps_before_a_profile_are_done_when_it_starts(open_monitor, traces):
    follow, waited = open_monitor(profile=(3, 1)), []
    follow.begin(0)
    follow.log(1, {"loss": Pending(1, waited)})
    follow.log(2, {"loss": Pending(2, waited)})
    assert (waited, traces) == ([1, 2], ["start profile"])
    follow.close()


def test_a_profile_is_written(tmp_path, open_monitor):
    follow = open_monitor(2, profile=(1, 1))
    follow.begin(0)
    follow.log(1, {"loss": jnp.ones(3).sum()})
    follow.close()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("options", [{"report_every": 0}, {"profile": (0, 3)}, {"profile": (3, 0)}])
def test_impossible_options_are_refused(tmp_path, options):
    (name, _), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}=.*at least 1"):
        Monitor(tmp_path, 10, **options)


# Cost


def test_a_step_costs_less_than_a_millisecond(tmp_path, open_monitor):
    follow = open_monitor(600, tensorboard=True)
    follow.begin(0)
    metrics = {f"metric_{index}": jnp.float32(index) for index in range(8)} | {"skipped": jnp.int32(0)}
    jax.block_until_ready(metrics)
    seconds = []
    for step in range(1, 601):
        started = time.perf_counter()
        with follow.time("data"):
            pass
        with follow.time("step"):
            pass
        follow.log(step, metrics, Work(8, 100, 1e9))
        seconds.append(time.perf_counter() - started)
    assert statistics.median(seconds) < 1e-3
    follow.close()
    assert len(read_lines(tmp_path)) == 600
