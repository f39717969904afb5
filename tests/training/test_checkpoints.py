"""Checkpoints: what is written comes back on any mesh, to the bit; what is damaged, unfinished or of another run does not."""

import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from magref_jax.checkpoint import MANIFEST, verify_manifest
from magref_jax.sharding import make_mesh
from magref_jax.training import checkpoints as module
from magref_jax.training.checkpoints import Checkpoints, SaveError, StopSignal

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


@flax.struct.dataclass
class State:
    """Everything a training state may hold: a random key, moments in tuples, nothing where there is no average."""

    step: jax.Array
    key: jax.Array
    params: dict
    ema: dict | None
    optimizer_state: optax.OptState


def make_state(step: int = 3, dtype: str = "float32", with_ema: bool = True, width: int = 8) -> State:
    rng = np.random.default_rng(step)
    params = {
        "blocks": {"up": {"kernel": jnp.asarray(rng.standard_normal((16, width)), dtype)}},
        "table": jnp.asarray(rng.standard_normal(16), jnp.bfloat16),
    }
    # 2⁻¹⁴⁰ is subnormal, -0.0 and NaN have bits of their own.
    params["odd"] = jnp.array([2.0**-140, -0.0, np.nan, np.inf], jnp.float32)
    ema = jax.tree.map(lambda leaf: leaf * 2, params) if with_ema else None
    return State(jnp.int32(step), jax.random.key(step), params, ema, OPTIMIZER.init(params))


def abstract(state: State, sharding: jax.sharding.Sharding | None = None) -> State:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


def leaf_bytes(state: State) -> dict[str, bytes]:
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        ).tobytes()
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def save_all(folder: pathlib.Path, *steps: int, **options: int) -> None:
    with Checkpoints(folder, **{"keep": 10} | options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"position": step}, {"seed": 0})


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_comes_back_to_the_bit(tmp_path):
    state = make_state(7)
    data, config = {"position": [7, 2**70], "of": None}, {"sizes": (1, 2), "folder": pathlib.Path("x")}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(7, state, data, config)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 7
        restored, stored_data, stored_config = checkpoints.restore(7, abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert [leaf.dtype for leaf in jax.tree.leaves(restored)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    assert leaf_bytes(restored) == leaf_bytes(state)
    assert jax.random.bits(restored.key) == jax.random.bits(jax.random.key(7))
    assert stored_data == {"position": [7, 2**70], "of": None}
    assert stored_config == {"sizes": [1, 2], "folder": "x"}


def test_the_writer_keeps_what_the_loop_goes_on_changing(tmp_path):
    change = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {"params": jnp.arange(2.0**20)}
    data = {"position": 1}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, data, {})
        data["position"] = 2
        for _ in range(3):
            state = change(state)
        jax.block_until_ready(state)
        restored, stored, _ = checkpoints.restore(1, abstract(state))
    np.testing.assert_array_equal(restored["params"], np.arange(2.0**20, dtype=np.float32))
    assert stored == {"position": 1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep": 2}, [6, 7]),
        ({"keep": 1, "keep_every": 3}, [3, 6, 7]),
        ({"keep": 3, "keep_every": 2}, [2, 4, 5, 6, 7]),
    ],
)
def test_newest_and_every_nth_stay(tmp_path, options, expected):
    save_all(tmp_path, *range(1, 8), **options)
    assert names(tmp_path) == list(map(str, expected))


@pytest.mark.parametrize("name", ["keep", "keep_every"])
def test_numbers_below_one_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}=0 must be 1 or more"):
        Checkpoints(tmp_path, **{name: 0})


def test_the_same_step_twice_is_one_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        first = checkpoints.save(3, make_state(), {"try": 1}, {})
        second = checkpoints.save(3, make_state(), {"try": 2}, {})
        third = checkpoints.save(3, make_state(), {"try": 3}, {}, wait=True)
        assert names(tmp_path) == ["3"]
        assert checkpoints.seconds_blocked == pytest.approx(first + second + third)
        assert checkpoints.restore(3, abstract(make_state()))[1] == {"try": 1}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, make_state(), {"try": 4}, {}, wait=True)
        assert checkpoints.restore(3, abstract(make_state()))[1] == {"try": 1}


def test_checkpoints_hold_nothing_of_the_machine_and_coreutils_agree(tmp_path):
    save_all(tmp_path / "checkpoints", 3)
    for path in (tmp_path / "checkpoints").rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path
    verify_manifest(tmp_path / "checkpoints/3/items")
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "MANIFEST.sha256"], cwd=tmp_path / "checkpoints/3", check=True)


def test_files_that_are_added_are_no_damage(tmp_path):
    state = make_state(3)
    save_all(tmp_path, 3)
    for name in (".DS_Store", "3/.DS_Store", "3/items/.DS_Store", "3/items/state/.DS_Store", "3/items/README.md"):
        (tmp_path / name).write_text("x")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [3]
        restored, _, _ = checkpoints.restore(3, abstract(state))
        assert restored.step == state.step
        next((tmp_path / "3/items/state").rglob("[!.]*")).unlink()
        with pytest.raises(ValueError, match="Checkpoint 3 is damaged: .* is missing"):
            checkpoints.restore(3, abstract(state))


def test_a_flipped_bit_in_any_file_is_reported_by_its_name(tmp_path):
    save_all(tmp_path, 2, 3)
    files = sorted(path for path in (tmp_path / "3").rglob("*") if path.is_file())
    found = {path.relative_to(tmp_path / "3").parts[:2] for path in files}
    assert {("items", "state"), ("items", "data"), ("items", "config"), ("items", MANIFEST), (module._SEAL,)} <= found
    rng = np.random.default_rng(0)
    with Checkpoints(tmp_path) as checkpoints:
        for path in files:
            whole = path.read_bytes()
            assert whole, path
            for position in {0, len(whole) - 1, int(rng.integers(len(whole)))}:
                damaged = bytearray(whole)
                damaged[position] ^= 1 << int(rng.integers(8))
                path.write_bytes(damaged)
                with pytest.raises(ValueError, match="Checkpoint 3 is damaged") as caught:
                    checkpoints.restore(3, abstract(make_state()))
                name = (
                    path.relative_to(tmp_path / "3/items") if path.is_relative_to(tmp_path / "3/items") else path.name
                )
                assert f"{name} is damaged" in str(caught.value)
                assert f"Checkpoint 2 is whole: to continue from there, delete {tmp_path / '3'}." in str(caught.value)
            path.write_bytes(whole)
        assert checkpoints.latest_step() == 3
        checkpoints.restore(3, abstract(make_state()))


def test_every_bit_of_manifest_and_seal_is_their_own(tmp_path):
    save_all(tmp_path, 3)
    with Checkpoints(tmp_path) as checkpoints:
        for path in (tmp_path / "3/items" / MANIFEST, tmp_path / "3" / module._SEAL):
            whole = path.read_bytes()
            for position in range(0, len(whole), 1 if path.name == module._SEAL else 41):
                path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
                assert checkpoints._problem(3) == f"{path} is damaged."
            path.write_bytes(whole)


@pytest.mark.parametrize("name", ["items/MANIFEST.json", "MANIFEST.sha256", "items/state/_METADATA"])
def test_a_lost_file_is_reported_and_no_reason_to_fall_back(tmp_path, name):
    save_all(tmp_path, 2, 3)
    (tmp_path / "3" / name).unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 3
        with pytest.raises(ValueError, match=f"{pathlib.Path(name).name} is missing") as caught:
            checkpoints.restore(3, abstract(make_state()))
        shutil.rmtree(tmp_path / "3")
        assert "Checkpoint 2 is whole" in str(caught.value)
        assert checkpoints.latest_step() == 2
        checkpoints.restore(2, abstract(make_state()))


def test_the_way_out_leads_to_the_newest_whole_checkpoint(tmp_path):
    save_all(tmp_path, 1, 2, 3)
    for step in (2, 3):
        (tmp_path / str(step) / "items/data/metadata").write_text("{}")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"data/metadata has 2 bytes, expected 15.*Checkpoint 1 is whole"):
            checkpoints.restore(3, abstract(make_state()))
        shutil.rmtree(tmp_path / "1")
        with pytest.raises(ValueError, match="No older checkpoint is whole"):
            checkpoints.restore(3, abstract(make_state()))


def test_contents_are_compared_unless_asked_not_to_and_sizes_always(tmp_path):
    save_all(tmp_path, 3)
    path = tmp_path / "3/items/data/metadata"
    path.write_text(path.read_text().replace("3", "4"))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="data/metadata is damaged"):
            checkpoints.restore(3, abstract(make_state()))
        assert checkpoints.restore(3, abstract(make_state()), verify=False)[1] == {"position": 4}
        path.write_text(path.read_text() + " ")
        with pytest.raises(ValueError, match="data/metadata has 16 bytes, expected 15"):
            checkpoints.restore(3, abstract(make_state()), verify=False)


@pytest.mark.parametrize("moment", ["write_manifest", "_seal"])
def test_a_checkpoint_without_digests_is_unfinished_and_removed(tmp_path, monkeypatch, moment):
    """A process that is killed after orbax and before the digests leaves what this one leaves."""
    save_all(tmp_path, 2)

    def killed(path: pathlib.Path) -> None:
        shutil.copytree(tmp_path / ".3.new", tmp_path / "copy")
        raise OSError("killed")

    monkeypatch.setattr(module, moment, killed)
    with pytest.raises(SaveError, match="killed"):
        save_all(tmp_path, 3)
    monkeypatch.undo()
    (tmp_path / "copy").rename(tmp_path / ".3.new")
    assert (tmp_path / ".3.new/items/state/_METADATA").is_file()
    with Checkpoints(tmp_path) as checkpoints:
        assert names(tmp_path) == ["2"]
        assert checkpoints.latest_step() == 2
        checkpoints.save(3, make_state(), {}, {}, wait=True)
        checkpoints.restore(3, abstract(make_state()))


def test_what_json_does_not_know_is_refused_at_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(3, make_state(), {"position": np.arange(2)}, {})
        assert checkpoints.latest_step() is None


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    save_all(tmp_path, 2)
    for leftover in (".3.new", ".1.old"):
        (tmp_path / leftover / "items.orbax-checkpoint-tmp").mkdir(parents=True)
    for other in (".git", "notes", ".3.newer"):
        (tmp_path / other).mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2]
    assert names(tmp_path) == [".3.newer", ".git", "2", "notes"]


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    # A power loss cannot be had in a test: what the system is asked for, in order, can.
    asked = []

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        asked.append((status.st_ino, status.st_size))
        flush(descriptor)

    def rename(source: pathlib.Path, target: pathlib.Path) -> None:
        asked.append(pathlib.Path(target).name)
        move(source, target)

    flush, move = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save_all(tmp_path, 4)
    files = [path.stat() for path in (tmp_path / "4").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert {(file.st_ino, file.st_size) for file in files} <= set(asked[: asked.index("4")])


def test_an_old_checkpoint_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    seen = []

    def watch(items: pathlib.Path) -> None:
        seen.append(names(tmp_path))
        original(items)

    original = module.write_manifest
    monkeypatch.setattr(module, "write_manifest", watch)
    save_all(tmp_path, 1, 2, 3, keep=1)
    assert seen == [[".1.new"], [".2.new", "1"], [".3.new", "2"]]
    assert names(tmp_path) == ["3"]


def test_a_failing_write_is_told_at_the_next_call_and_costs_no_checkpoint(tmp_path, monkeypatch):
    save_all(tmp_path, 1, keep=1)

    def fail(folder: pathlib.Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_manifest", fail)
    told = r"Checkpoint {} could not be written to .*, the newest one is 1: .*No space left"
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, make_state(2), {}, {})
        with pytest.raises(SaveError, match=told.format(2)):
            checkpoints.save(3, make_state(3), {}, {})
        with pytest.raises(SaveError, match=told.format(3)):  # it was begun all the same
            checkpoints.restore(1, abstract(make_state()))
        with pytest.raises(SaveError, match=told.format(4)):
            checkpoints.save(4, make_state(4), {}, {}, wait=True)
        assert names(tmp_path) == ["1"]
        checkpoints.save(5, make_state(5), {}, {})
        checkpoints._pending.exception()  # it is over, and nobody was told
        monkeypatch.undo()
        checkpoints.save(6, make_state(6), {}, {}, wait=True)  # now there is a newer one
        assert names(tmp_path) == ["6"]


def test_close_tells_of_a_failing_write(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "write_manifest", lambda folder: folder / 0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, make_state(2), {}, {})
    with pytest.raises(SaveError, match="Checkpoint 2 could not be written .*there is no other one"):
        checkpoints.close()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_state(with_ema=False), r"\['ema/blocks/up/kernel'\] is unknown; \['ema/odd'\] is unknown"),
        (
            make_state(width=9),
            r"\['params/blocks/up/kernel'\] has shape \(16, 8\) and dtype float32, expected \(16, 9\) and",
        ),
        (
            make_state(dtype="float16"),
            r"\['params/blocks/up/kernel'\] has shape .* and dtype float32, expected .* float16",
        ),
        (make_state().replace(key=jax.random.key(0, impl="rbg")), r"\['key'\] has shape \(2,\) and .* expected \(4,\)"),
        (make_state().replace(optimizer_state=()), r"\['optimizer_state/1/0/count'\] is unknown.*and 2 more"),
        (make_state().replace(ema={"table": jnp.zeros(16), "new": jnp.zeros(1)}), r"\['ema/new'\] is missing"),
    ],
    ids=["no average", "width", "dtype", "key", "optimiser", "names"],
)
def test_a_state_that_differs_is_refused_by_the_name_of_its_leaves(tmp_path, other, message):
    save_all(tmp_path, 3)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=f"{tmp_path / '3'} is of another training state: .*{message}"),
    ):
        checkpoints.restore(3, abstract(other))


def test_unknown_checkpoints_are_refused_with_those_there_are(tmp_path):
    save_all(tmp_path, 2, 4)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(FileNotFoundError, match="step=3 is not a checkpoint in .*; there are: 2, 4"),
    ):
        checkpoints.restore(3, abstract(make_state()))


def on_mesh(state: State, num_devices: int) -> State:
    """Where the state goes on so many devices: matrices cut in two directions, the rest whole."""
    mesh = make_mesh("fsdp=-1" if num_devices < 8 else "fsdp=4,tensor=2", jax.devices()[:num_devices])
    return jax.tree.map(lambda leaf: NamedSharding(mesh, P("fsdp", "tensor") if leaf.ndim == 2 else P()), state)


def test_eight_four_and_one_device_hold_the_same_bits(tmp_path):
    state = make_state()
    expected = leaf_bytes(state)
    state = jax.device_put(state, on_mesh(state, 8))
    for num_devices in (4, 1, 8):
        with Checkpoints(tmp_path / str(num_devices)) as checkpoints:
            checkpoints.save(3, state, {}, {})
            shardings = on_mesh(state, num_devices)
            target = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
            )
            state, _, _ = checkpoints.restore(3, target)
        assert leaf_bytes(state) == expected
        kernel = state.params["blocks"]["up"]["kernel"]
        assert kernel.sharding == shardings.params["blocks"]["up"]["kernel"]
        assert len(kernel.sharding.device_set) == num_devices
        assert len({shard.data.shape for shard in kernel.addressable_shards}) == 1
        assert len(state.key.sharding.device_set) == num_devices


DISK_FULL = """
import pathlib, resource, sys
import jax.numpy as jnp
from magref_jax.training.checkpoints import Checkpoints, SaveError

folder = pathlib.Path(sys.argv[1])
state = {"params": jnp.arange(2.0**16).reshape(256, 256) ** 2}
with Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(1, state, {}, {}, wait=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))
    try:
        checkpoints.save(2, state, {}, {}, wait=True)
    except SaveError as error:
        print(sorted(path.name for path in folder.iterdir()), error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.save(3, state, {}, {}, wait=True)
    print(sorted(path.name for path in folder.iterdir()))
"""


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_file_that_cannot_grow_fails_the_save_and_not_the_run(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", DISK_FULL, tmp_path / "checkpoints"],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    told, after = run.stdout.split("\n", 1)[0], run.stdout.rstrip().splitlines()[-1]
    assert told.startswith("['1'] Checkpoint 2 could not be written to")
    assert "File too large" in run.stdout
    assert after == "['3']"


def test_signals_are_noted_once_and_then_do_what_they_did():
    heard = []
    before = {
        number: signal.signal(number, lambda number, _: heard.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        with StopSignal() as stop:
            assert stop.received is None
            signal.raise_signal(signal.SIGTERM)
            assert (stop.received, heard) == (signal.SIGTERM, [])
            assert 128 + stop.received == 143
            signal.raise_signal(signal.SIGINT)
            assert (stop.received, heard) == (signal.SIGTERM, [])
            signal.raise_signal(signal.SIGTERM)
            assert heard == [signal.SIGTERM]
        with StopSignal() as stop:
            pass
        signal.raise_signal(signal.SIGINT)
        assert (stop.received, heard) == (None, [signal.SIGTERM, signal.SIGINT])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_one_process_is_not_preempted_by_a_cluster(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.reached_preemption() is None


def test_several_processes_stop_at_the_same_step(tmp_path, monkeypatch):
    """There the cluster's notice counts, and the handler that JAX has for SIGTERM stays."""
    monkeypatch.setattr(module.ocp.multihost, "reached_preemption", lambda question: question == 5)
    with Checkpoints(tmp_path) as checkpoints:
        assert [checkpoints.reached_preemption() for _ in range(5)] == [None] * 4 + [signal.SIGTERM]
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(module.jax, "process_count", lambda: 2)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) is before
