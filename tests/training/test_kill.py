"""Runs that are killed end where a run ends that was left alone: the same bits in every leaf and every line.

The loop is `train.py`'s. In the fast tests it trains a small network that starts in seconds; in the slow ones, `configs/smoke.py`.
"""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Moment:
    """So many seconds after `metrics.jsonl` changed and has so many lines."""

    lines: int = 0
    seconds: float = 0.0


# Batches come from a generator whose position cannot be told from the step: only the checkpoint knows it.
SMALL = """
import sys, time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import train
from magref_jax.training.monitor import Work
from magref_jax.training.job import Job


class Batches:
    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __next__(self):
        time.sleep(0.04)
        return {"inputs": self.rng.standard_normal((8, 16)).astype(np.float32)}

    def state(self):
        return self.rng.bit_generator.state

    def restore(self, state):
        self.rng.bit_generator.state = state

    def close(self):
        pass


def loss(params, frozen, batch, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, (16,)))(keys)
    error = jnp.tanh(batch["inputs"] + noise) @ params["layer"]["kernel"] + params["layer"]["bias"] - noise @ frozen
    return {"loss": (jnp.sum(error**2), jnp.float32(error.size))}


def open_job(config, out, mesh, accept):
    rng = np.random.default_rng(1)
    params = {"layer": {"kernel": jnp.zeros((16, 2**12)), "bias": jnp.zeros(2**12)}}
    frozen = jnp.asarray(rng.standard_normal((16, 2**12)), jnp.float32)
    specs = ((r"layer/\\w+", P()),)
    accept(params, None)

    def take_a_minute(check):
        out.mkdir(parents=True, exist_ok=True)
        (out / "slow").touch()
        for _ in range(600):
            time.sleep(0.1)
            check()

    if out.name.startswith("setup"):
        take_a_minute(lambda: None)
    return Job(
        params, frozen, specs, loss, Batches(), lambda batch: batch, lambda batch: Work(8), lambda params: "done",
        validate=lambda params, check: take_a_minute(check), sample=lambda params, check: take_a_minute(check),
    )


train.open_job = open_job
train.main()
"""


@dataclasses.dataclass
class Runs:
    """Starts the same command again and again, with a folder of its own for every name."""

    command: list[str]
    folder: pathlib.Path
    num_steps: int = 20

    def start(self, name: str, *options: str) -> subprocess.Popen:
        command = [*self.command, "--output-dir", self.folder / name, "--num-steps", self.num_steps, *options]
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }
        with (self.folder / f"{name}.log").open("a") as log:
            return subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=os.environ | settings, stdout=log, stderr=log
            )

    def finish(self, name: str, *options: str) -> None:
        status = self.start(name, *options).wait(600)
        assert status == 0, (self.folder / f"{name}.log").read_text()

    def stop(self, name: str, number: signal.Signals, after: Moment, *options: str) -> int:
        """Sends a signal; the exit status."""
        path = self.folder / name / "metrics.jsonl"
        before = path.read_bytes() if path.exists() else b""
        process = self.start(name, *options)
        try:
            while process.poll() is None:
                lines = path.read_bytes() if path.exists() else b""
                if lines.count(b"\n") >= after.lines and lines != before:
                    break
                time.sleep(0.005)
            time.sleep(after.seconds)
            process.send_signal(number)
            return process.wait(600)
        finally:
            process.kill()

    def stop_while_slow(self, name: str, number: signal.Signals, *options: str) -> tuple[int, float]:
        """Sends a signal while something takes a minute; the exit status, and the seconds that it took to end."""
        process = self.start(name, *options)
        try:
            while process.poll() is None and not (self.folder / name / "slow").exists():
                time.sleep(0.01)
            sent = time.monotonic()
            process.send_signal(number)
            return process.wait(600), time.monotonic() - sent
        finally:
            process.kill()

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def num_lines(self, name: str) -> int:
        return (self.folder / name / "metrics.jsonl").read_bytes().count(b"\n")

    def steps(self, name: str) -> list[int]:
        """The complete checkpoints, as file names tell."""
        folder = self.folder / name / "checkpoints"
        return sorted(int(path.name) for path in folder.glob("[0-9]*")) if folder.exists() else []

    def assert_equal(self, name: str, other: str) -> None:
        assert self.column(name, "step") == list(range(1, self.num_steps + 1))
        for key in ("loss", "gradient_norm", "skipped"):
            assert self.column(name, key) == self.column(other, key)
        one, two = (self.folder / run / f"checkpoints/{self.num_steps}/items" for run in (name, other))
        assert (one / "data/metadata").read_bytes() == (two / "data/metadata").read_bytes()
        with ocp.StandardCheckpointer() as checkpointer:
            found, expected = (checkpointer.restore(folder / "state") for folder in (one, two))
        assert set(found) == set(expected)
        assert {leaf.split("/")[0] for leaf in found} == {"step", "key", "params", "ema", "optimizer_state", "skipped"}
        for leaf, value in found.items():
            assert np.asarray(value).tobytes() == np.asarray(expected[leaf]).tobytes(), leaf
        assert int(found["step"]) == self.num_steps
        assert any(
            np.any(np.asarray(value)) for leaf, value in found.items() if leaf.startswith("optimizer_state/1/0/nu")
        )

    def column(self, name: str, key: str) -> list[float]:
        return [json.loads(line)[key] for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]


def small_runs(folder: pathlib.Path, num_steps: int = 20) -> Runs:
    (folder / "loop.py").write_text(SMALL)
    command = [sys.executable, str(folder / "loop.py"), "configs/smoke.py", "--config.task.no-overfit"]
    runs = Runs(command, folder, num_steps)
    runs.finish("straight", "--config.events.checkpoint", "5")
    return runs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return small_runs(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    command = [sys.executable, "train.py", "configs/smoke.py", "--config.task.no-overfit"]
    runs = Runs(command, tmp_path_factory.mktemp("smoke"))
    runs.finish("straight", "--config.events.checkpoint", "5")
    return runs


def check_kills(runs: Runs, name: str, kills: list[Moment], every: int) -> None:
    """Kills a run again and again, then lets it end."""
    options = "--config.events.checkpoint", str(every)
    for after in kills:
        before = max(runs.steps(name), default=0)
        status = runs.stop(name, signal.SIGKILL, after, *options)
        assert status == -signal.SIGKILL, (runs.folder / f"{name}.log").read_text()
        reached, kept = runs.num_lines(name), max(runs.steps(name), default=0)
        # What was saved last may still have been written; it was begun when the one before was complete.
        assert kept >= (reached - 1) // every * every - every
        assert kept >= before
    runs.finish(name, *options)
    runs.assert_equal(name, "straight")
    assert all(path.name.isdecimal() for path in (runs.folder / name / "checkpoints").iterdir())


def check_signal(runs: Runs, number: signal.Signals, status: int) -> None:
    name = number.name
    assert runs.stop(name, number, Moment(lines=7), "--config.events.checkpoint", "100") == status
    (stopped,) = runs.steps(name)
    assert 7 <= stopped < runs.num_steps
    assert runs.column(name, "step") == list(range(1, stopped + 1))
    runs.finish(name, "--config.events.checkpoint", "5")
    runs.assert_equal(name, "straight")


def test_two_kills_change_no_bit(small):
    check_kills(small, "killed", [Moment(lines=10), Moment(seconds=0.1)], every=5)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_of_the_current_step(small, number, status):
    check_signal(small, number, status)


def test_what_is_being_drawn_is_dropped_and_the_next_start_goes_on_or_ends_the_run(small):
    """A validation after ten steps, and a sheet after the last, when what is left is the export."""
    for event, step in (("validation", 10), ("sample", 20)):
        status, seconds = small.stop_while_slow("drawn", signal.SIGTERM, f"--config.events.{event}", str(step))
        assert status == 143, small.said("drawn")
        assert seconds < 20
        assert small.steps("drawn")[-1] == step
        assert f"SIGTERM: stopped at step {step} of 20, which is saved" in small.said("drawn")
        (small.folder / "drawn" / "slow").unlink()
    assert "Traceback" not in small.said("drawn")
    assert "done" not in small.said("drawn")
    small.finish("drawn")
    small.assert_equal("drawn", "straight")
    assert "done" in small.said("drawn")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_before_the_first_step_a_signal_ends_the_run_at_once(small, number, status):
    name = f"setup_{number.name}"
    ended, seconds = small.stop_while_slow(name, number)
    assert ended == status, small.said(name)
    assert seconds < 20
    assert "Traceback" not in small.said(name)
    assert {path.name for path in (small.folder / name).iterdir()} == {"slow"}


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path):
    rng = random.Random(0)
    kills = [Moment(seconds=rng.uniform(0, 0.25)) for _ in range(20)]
    check_kills(small_runs(tmp_path, num_steps=120), "killed", kills, every=2)


@pytest.mark.slow
def test_ten_steps_a_kill_and_ten_more_of_the_smoke_preset_change_no_bit(smoke):
    check_kills(smoke, "killed", [Moment(lines=10)], every=5)


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_of_the_smoke_preset(smoke):
    check_signal(smoke, signal.SIGTERM, 143)
