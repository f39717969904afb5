"""Runs of several processes on this machine: what they train, sample and write is what one process does."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import train
from magref_jax import distributed, pipeline
from magref_jax.convert.lora import read_lora
from magref_jax.distributed import BatchShare, batch_share, check_equal, initialise, on_first, on_host, shard_rows
from magref_jax.models.adapters import LoraConfig
from magref_jax.sharding import PARAM_SPECS, make_mesh
from magref_jax.training.checkpoints import Checkpoints
from magref_jax.training.config import TrainConfig
from magref_jax.training.optimizer import make_optimizer
from magref_jax.training.step import TrainState, init_state, state_shardings
from tests.tiny_model import picture, write_model
from tests.training.test_kill import SMALL
from tests.training.tiny_run import MODEL, tiny_run

ROOT = pathlib.Path(__file__).parents[1]
PROMPTS = ["the red apple slides right over a meadow", "the blue fish in the middle bounces"]
STEPS = 3

# What every process does, one thing after another. Process 0 writes what it finds beside the models.
WORKER = """
import json, pathlib, sys
import jax
import numpy as np

jax.config.update("jax_default_matmul_precision", "highest")
from magref_jax import distributed

coordinator, count, index, folder, mesh, *tasks = sys.argv[1:]
distributed.initialise(coordinator, int(count), int(index))
folder, index = pathlib.Path(folder), int(index)

import train
from magref_jax.sharding import make_mesh
from tests import test_distributed as tests

mesh = make_mesh(mesh)
for task in tasks:
    name, _, argument = task.partition(":")
    found = getattr(tests, name)(folder, mesh, *filter(None, argument.split(",")))
    if distributed.is_first():
        (folder / f"{name}.json").write_text(json.dumps(found))
distributed.wait_for_all("the end of a test")
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@dataclasses.dataclass
class Processes:
    """The processes of one run, and the files that hold what they say."""

    running: list[subprocess.Popen]
    logs: list[pathlib.Path]

    def wait(self, seconds: float) -> list[int]:
        """Their exit statuses; what still runs after so long is killed."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.running]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.running:
            process.kill()

    def said(self, index: int) -> str:
        return self.logs[index].read_text(errors="replace")

    def succeed(self, seconds: float = 900) -> None:
        assert self.wait(seconds) == [0] * len(self.running), "\n".join(
            self.said(i)[-3000:] for i in range(len(self.logs))
        )


def start(
    folder: pathlib.Path, commands: Sequence[Sequence[object]], devices: int = 1, slurm: bool = False
) -> Processes:
    """A process for each command line, told about each other by it or as `srun` tells them."""
    job = str(free_port())
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
        # Compiles in half the time.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    processes = Processes([], [folder / f"process_{index}.log" for index in range(len(commands))])
    for index, (command, path) in enumerate(zip(commands, processes.logs, strict=True)):
        step = {"JOB_ID": job, "STEP_NODELIST": "localhost", "NTASKS": len(commands), "PROCID": index, "LOCALID": index}
        task = {f"SLURM_{name}": str(value) for name, value in step.items()} if slurm else {}
        arguments = [sys.executable, "-u", *map(str, command)]
        with path.open("w") as log:
            processes.running.append(
                subprocess.Popen(arguments, cwd=ROOT, env=environment | task, stdout=log, stderr=log)
            )
    return processes


def start_workers(folder: pathlib.Path, count: int, mesh: str, *tasks: str, devices: int = 1) -> Processes:
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    address = f"localhost:{free_port()}"
    return start(folder, [(worker, address, count, index, folder, mesh, *tasks) for index in range(count)], devices)


# What workers do


def talk(folder, mesh):
    """The functions of `magref_jax.distributed`, one by one."""
    index, count = jax.process_index(), jax.process_count()
    found = {"first": on_first(lambda: {"process": index, "text": "x" * 5000})}
    assert found["first"] == {"process": 0, "text": "x" * 5000}
    try:
        on_first(lambda: {}["missing"])
    except KeyError as error:
        found["error"] = str(error)
    check_equal("it", {"a": np.arange(3), "b": np.float32(1)})
    try:
        check_equal("it", {"a": np.arange(3) + (index == count - 1)})
    except ValueError as error:
        found["unequal"] = str(error)
    share = batch_share(mesh)
    whole = np.arange(24).reshape(8, 3)
    placed = shard_rows(mesh, {"rows": whole[share.rows(8)]})["rows"]
    found["rows"] = on_host(placed).tolist()
    found["doubled"] = on_host(jax.jit(lambda rows: 2 * rows)(placed)).tolist()
    all_shares = [[] for _ in range(count)]
    for device, (piece,) in NamedSharding(mesh, P(("data", "fsdp"))).devices_indices_map((8,)).items():
        all_shares[device.process_index] += list(range(8))[piece]
    found["shares"] = all_shares
    assert sorted(set(all_shares[index])) == share.rows(8)
    return found


def config_of(folder: pathlib.Path, trainable: str = "all", steps: str | int = STEPS) -> TrainConfig:
    chosen = LoraConfig(2) if trainable == "lora" else ".*"
    config = tiny_run(folder / "model", int(steps), trainable=chosen)
    sample = STEPS if trainable == "lora" else None
    return dataclasses.replace(
        config,
        events=dataclasses.replace(config.events, validation=STEPS, sample=sample),
        # A first step of AdamW divides a gradient by its size: one below eps = 1e-8, as some are where others are 1e-2, is
        # mostly the rounding of its sum, which is another on another mesh.
        optimizer=dataclasses.replace(config.optimizer, eps=1e-5),
    )


def fit(folder, mesh, trainable="all", name="run", steps=STEPS):
    """Trains as train.py does."""
    train.train(config_of(folder, trainable, steps), folder / name, mesh)


def read_back(folder, mesh, name):
    """The parameters and the average of a run's newest checkpoint, restored onto the mesh."""
    config = config_of(folder)
    optimizer = make_optimizer(config.optimizer)
    state = jax.eval_shape(
        functools.partial(init_state, optimizer=optimizer, key=jax.random.key(0)),
        pipeline.abstract_params(MODEL)["dit"],
    )
    shardings = state_shardings(mesh, state, optimizer, PARAM_SPECS["dit"])
    with Checkpoints(folder / name / "checkpoints") as checkpoints:
        restored, _, _ = checkpoints.restore(checkpoints.latest_step(), train.abstract_state(state, shardings))
    assert not restored.params["blocks"]["feed_forward"]["up"]["kernel"].is_fully_replicated
    return [leaf.tolist() for leaf in jax.tree.leaves(on_host((restored.params, restored.ema)))]


def sample(folder, mesh):
    """Two videos of the model folder."""
    model = pipeline.load(folder / "model", mesh)
    references = [[picture((200, 40, 30))], [picture((20, 60, 220)), picture((90, 90, 10))]]
    result = model.generate(PROMPTS, references, seed=5)
    return {"latents": result.latents.tolist(), "frames": result.frames.tolist(), "failures": result.failures}


# What one process does


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """The folders and processes of a run of one and of a run of two, at the same time: most of it is compiling."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    write_model(folders[0] / "model", MODEL)
    (folders[1] / "model").symlink_to(folders[0] / "model")
    one = start_workers(folders[0], 1, "", "fit")
    two = start_workers(folders[1], 2, "fsdp=2", "talk", "fit")
    yield (folders[0], one), (folders[1], two)
    one.kill()
    two.kill()


@pytest.fixture(scope="module")
def one(running):
    """The folder of the run of one process on one device."""
    folder, processes = running[0]
    processes.succeed()
    return folder


@pytest.fixture(scope="module")
def videos(one):
    """Of one process on one device."""
    start_workers(one, 1, "", "sample").succeed()
    return json.loads((one / "sample.json").read_text())


def lines(run: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state_of(folder: pathlib.Path, name: str) -> TrainState:
    """Of the newest checkpoint, restored by this process."""
    optimizer = make_optimizer(config_of(folder).optimizer)
    init = functools.partial(init_state, optimizer=optimizer, key=jax.random.key(0))
    state = jax.eval_shape(init, pipeline.abstract_params(MODEL)["dit"])
    with Checkpoints(folder / name / "checkpoints") as checkpoints:
        restored, position, _ = checkpoints.restore(checkpoints.latest_step(), state)
    assert position["batches"] == int(restored.step)
    return restored


def params_of(state: TrainState) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.ema))]


def assert_same_run(folder: pathlib.Path, name: str, other_folder: pathlib.Path, other: str) -> None:
    found, expected = lines(folder / name), lines(other_folder / other)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, reference in zip(found, expected, strict=True):
        for key in {"loss", "loss_subjects", "validation_loss"} & reference.keys():
            np.testing.assert_allclose(line[key], reference[key], rtol=1e-5)
    state, expected_state = state_of(folder, name), state_of(other_folder, other)
    for leaf, reference in zip(params_of(state), params_of(expected_state), strict=True):
        np.testing.assert_allclose(leaf, reference, atol=1e-5)
    # The averaged gradients.
    moments = [jax.tree.leaves(optax.tree.get(each.optimizer_state, "mu")) for each in (state, expected_state)]
    for leaf, reference in zip(*moments, strict=True):
        np.testing.assert_allclose(leaf, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


def assert_same_videos(found: dict, expected: dict) -> None:
    latents = np.asarray(expected["latents"])
    np.testing.assert_allclose(found["latents"], latents, atol=1e-5 * np.abs(latents).max())
    assert np.abs(np.asarray(found["frames"]) - np.asarray(expected["frames"])).max() <= 1
    assert found["failures"] == [None, None]


@pytest.fixture(scope="module")
def two(running):
    running[1][1].succeed()
    return running[1]


def test_processes_agree_on_what_the_first_says(two):
    found = json.loads((two[0] / "talk.json").read_text())
    assert found["first"] == {"process": 0, "text": "x" * 5000}
    assert found["error"] == "'missing'"
    assert (
        "it must be the same in every process, but in process 1 it is not what it is in process 0" in found["unequal"]
    )
    assert found["rows"] == np.arange(24).reshape(8, 3).tolist()
    assert found["doubled"] == (2 * np.arange(24).reshape(8, 3)).tolist()
    assert found["shares"] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_two_processes_train_what_one_does_and_one_reads_their_checkpoint(two, one):
    assert_same_run(two[0], "run", one, "run")


def test_two_processes_write_everything_once(two, one):
    folder, processes = two
    ours, theirs = ({str(path.relative_to(run)) for path in run.glob("*/*")} for run in (one / "run", folder / "run"))
    assert ours == theirs
    assert (folder / "run" / "config.json").read_text()
    assert "goodput" in processes.said(0)
    assert "goodput" not in processes.said(1)
    assert "step/s" not in processes.said(1)
    assert pipeline.load(folder / "run" / "model").config == MODEL  # its manifest fits


@pytest.mark.slow
def test_two_processes_sample_what_one_does(two, videos):
    start_workers(two[0], 2, "fsdp=2", "sample").succeed()
    assert_same_videos(json.loads((two[0] / "sample.json").read_text()), videos)


def start_small(folder: pathlib.Path, count: int, slurm: bool = False) -> Processes:
    """`train.py` on a small task that takes hours."""
    (folder / "loop.py").write_text(SMALL)
    command = [folder / "loop.py", "configs/smoke.py", "--config.task.no-overfit", "--output-dir", folder / "run"]
    command += ["--num-steps", 100_000, "--config.events.checkpoint", 1000]
    address = f"localhost:{free_port()}"
    joined = ["--coordinator", address, "--num-processes", count, "--process-id"]
    commands = [command if slurm else [*command, *joined, index] for index in range(count)]
    return start(folder, commands, slurm=slurm)


def wait_for_lines(processes: Processes, run: pathlib.Path, count: int) -> None:
    path, end = run / "metrics.jsonl", time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes.running), processes.said(0)
        time.sleep(0.05)


def kill(folder: pathlib.Path, victim: int, count: int = 2) -> None:
    processes = start_small(folder, count)
    try:
        wait_for_lines(processes, folder / "run", 5)
        processes.running[victim].kill()
        killed = time.monotonic()
        statuses = processes.wait(120)
        assert time.monotonic() - killed < 120
    finally:
        processes.kill()
    for index, status in enumerate(statuses):
        if index == victim:
            assert status == -signal.SIGKILL
        else:
            assert status != 0
            assert "This most likely indicates that another task died" in processes.said(index)


@pytest.mark.slow  # nobody misses a process that is not the first for a minute
@pytest.mark.parametrize(("victim", "count"), [(0, 2), (1, 2), (2, 4)])
def test_when_a_process_is_killed_the_others_end(tmp_path, victim, count):
    kill(tmp_path, victim, count)


def test_sigterm_to_one_process_leaves_a_checkpoint_of_all(tmp_path):
    processes = start_small(tmp_path, 2, slurm=True)
    try:
        wait_for_lines(processes, tmp_path / "run", 5)
        processes.running[1].send_signal(signal.SIGTERM)
        statuses = processes.wait(120)
    finally:
        processes.kill()
    assert statuses == [143, 143], processes.said(0)
    (saved,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdecimal())
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, saved + 1))


@pytest.mark.slow
def test_four_processes_read_the_checkpoint_of_one(one, tmp_path):
    for name in ("model", "run"):
        (tmp_path / name).symlink_to(one / name)
    start_workers(tmp_path, 4, "fsdp=4", "read_back:run").succeed()
    found = json.loads((tmp_path / "read_back.json").read_text())
    for leaf, expected in zip(found, params_of(state_of(one, "run")), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), expected)


@pytest.mark.slow
def test_four_processes_train_and_sample_what_one_does(one, videos, tmp_path):
    (tmp_path / "model").symlink_to(one / "model")
    start_workers(tmp_path, 4, "data=2,fsdp=2", "talk", "fit", "sample").succeed()
    assert json.loads((tmp_path / "talk.json").read_text())["shares"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert_same_run(tmp_path, "run", one, "run")
    assert_same_videos(json.loads((tmp_path / "sample.json").read_text()), videos)


@pytest.mark.slow
def test_four_processes_continue_what_one_began_and_one_what_four_began(one, tmp_path):
    (tmp_path / "model").symlink_to(one / "model")
    mesh = make_mesh("", jax.devices()[:1])
    fit(tmp_path, mesh, name="one_then_four", steps=2)
    start_workers(tmp_path, 4, "fsdp=4", "fit:all,one_then_four,3").succeed()
    assert_same_run(tmp_path, "one_then_four", one, "run")
    start_workers(tmp_path, 4, "fsdp=4", "fit:all,four_then_one,2").succeed()
    fit(tmp_path, mesh, name="four_then_one", steps=3)
    assert_same_run(tmp_path, "four_then_one", one, "run")


@pytest.mark.slow
def test_two_processes_train_the_lora_that_one_does(one, tmp_path):
    (tmp_path / "model").symlink_to(one / "model")
    start_workers(tmp_path, 2, "data=2,fsdp=2", "fit:lora,two", devices=2).succeed()
    fit(tmp_path, make_mesh("", jax.devices()[:1]), "lora", "one")
    found, expected = (
        {
            (delta.path, delta.layer): delta.value
            for delta in read_lora(
                tmp_path / name / "lora.safetensors", MODEL.dit, pipeline.abstract_params(MODEL)["dit"]
            ).deltas
        }
        for name in ("two", "one")
    )
    assert found.keys() == expected.keys() != set()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key].down, value.down, atol=1e-5)
        np.testing.assert_allclose(found[key].up, value.up, atol=1e-5)


@pytest.mark.slow
def test_two_processes_of_sample_py_write_each_video_once(one, tmp_path):
    cases = [{"key": f"case_{i}", "prompt": prompt, "references": []} for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    port = free_port()
    options = ["--model", one / "model", "--prompts", tmp_path / "cases.json", "--out", tmp_path / "out"]
    options += ["--batch_size", 2, "--mesh", "data=2", "--compile_cache", "none"]
    joined = ["--coordinator", f"localhost:{port}", "--num_processes", 2, "--process_id"]
    processes = start(tmp_path, [["sample.py", *options, *joined, index] for index in range(2)])
    processes.succeed()
    assert sorted(path.name for path in (tmp_path / "out").glob("*.mp4")) == ["case_0.mp4", "case_1.mp4"]
    assert "next: python sample.py" in processes.said(0)
    assert processes.said(1).count("case_") == 0
    (tmp_path / "out" / "case_1.mp4").unlink()
    again = start(tmp_path, [["sample.py", *options, *joined, index, "--resume"] for index in range(2)])
    again.succeed()
    assert "kept" in again.said(0)


# Without other processes


def test_one_process_needs_no_flags_and_no_cluster(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("there is nobody to join"))
    initialise()
    initialise("localhost:1234", 1, 0)
    for name, value in {"JOB_ID": "1", "STEP_NODELIST": "n", "PROCID": "0", "LOCALID": "0", "NTASKS": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    initialise()
    assert on_first(lambda: 5) == 5
    check_equal("it", {"a": np.arange(3)})
    assert on_host({"a": jax.numpy.arange(3)})["a"].tolist() == [0, 1, 2]


def test_processes_are_found_by_slurm_and_on_tpus(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: joined.append(arguments))
    limits = {"heartbeat_timeout_seconds": 60, "shutdown_timeout_seconds": 60}
    initialise("host:1234", 4, 3)
    explicit = {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 3}
    assert joined.pop() == {**explicit, "cluster_detection_method": "deactivate", **limits}
    for name, value in {"JOB_ID": "1", "STEP_NODELIST": "n", "PROCID": "0", "LOCALID": "0", "NTASKS": "4"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    initialise()
    assert joined.pop() == {"cluster_detection_method": "slurm", **limits}
    monkeypatch.delenv("SLURM_STEP_NODELIST")  # an sbatch script that starts python without srun
    initialise()
    assert joined == []
    monkeypatch.setattr(distributed.jax, "config", type("Config", (), {"jax_platforms": "tpu,cpu"}))
    initialise()
    assert joined.pop() == limits


def test_a_single_tpu_host_without_metadata_is_one_process(monkeypatch):
    def refuse(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed.jax, "config", type("Config", (), {"jax_platforms": "tpu,cpu"}))
    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    initialise()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "num_processes and process_id not given"),
        (
            (None, 2, 0),
            "coordinator not given: processes are told all of coordinator, num_processes, process_id, or none",
        ),
        (("host", 2, 0), "coordinator='host' must be HOST:PORT"),
        (("host:port", 2, 0), "must be HOST:PORT"),
        (("host:1", 2, 2), r"process_id=2 must be in 0\.\.1 \(num_processes=2\)"),
        (("host:1", 2, -1), "process_id=-1"),
    ],
)
def test_flags_that_name_no_process_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        initialise(*arguments)


def test_rows_follow_the_pieces_of_a_process():
    assert BatchShare((1,), 2).rows(8) == [4, 5, 6, 7]
    assert BatchShare((0, 3), 4).rows(8) == [0, 1, 6, 7]  # neighbours on a torus
    assert BatchShare((0, 1), 2).rows(3) == [0, 1, 2]  # all of them, whatever divides them
    assert [BatchShare((0, 3), 4).batch_size(4), BatchShare((0, 1), 2).batch_size(3)] == [8, 3]
    with pytest.raises(
        ValueError, match="batch_size=6 must be a multiple of 4, the devices on the mesh axes data and fsdp"
    ):
        BatchShare((0,), 4).rows(6)
    assert batch_share(make_mesh("data=2,fsdp=2,context=2")) == BatchShare((0, 1, 2, 3), 4)
