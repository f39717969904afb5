"""What a run leaves behind: checked with hashlib and PyAV, with failures at every step of writing, and with kill -9."""

import contextlib
import copy
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tracemalloc

import av
import jax
import numpy as np
import pytest
from PIL import Image

from magref_jax import files, outputs, video
from magref_jax.conditioning.canvas import Canvas, compose_canvas
from magref_jax.config import ModelConfig, SamplingConfig
from magref_jax.outputs import CaseReport, CaseSettings

ROOT = pathlib.Path(__file__).parents[1]


def settings_of(key: str, seed: int = 1) -> CaseSettings:
    return {
        "key": key,
        "prompt": f'{key}: the "red" fox, 狐\nand the dog',
        "seed": seed,
        "references": [
            {"file": "fox.png", "sha256": "f0", "words": "fox", "role": "subject"},
            {"file": "hill.png", "sha256": "e1", "words": None, "role": "background"},
        ],
        "order": None,
        "sampling": vars(SamplingConfig(height=32, width=32, num_frames=5, num_inference_steps=4)),
        "model": {"file": "tiny", "sha256": "aa"},
        "dtype": "float32",
        "loras": [{"file": "fast.safetensors", "sha256": "bb", "strength": 0.5}],
        "step_plan": {"evaluate": [True, False], "scale": [1.0, 1.25]},
        "strict_parity": False,
        "fps": 16.0,
        "store_metadata": True,
    }


def references(key: str) -> list[Image.Image]:
    return [Image.new("RGB", (8, 16), (250, 20, len(key))), Image.new("RGB", (16, 16), (20, 20, 250))]


def made(settings: CaseSettings) -> tuple[np.ndarray, Canvas]:
    """Stands for a model: frames and canvas from the settings alone."""
    name = f"{settings['key']}/{settings['seed']}"
    values = np.frombuffer(hashlib.sha256(name.encode()).digest()[:12], np.uint8).reshape(1, 2, 2, 3)
    frames = np.repeat(values.repeat(16, axis=1).repeat(16, axis=2), 3, axis=0)
    frames[1, 4:8] = 255
    return frames, compose_canvas(references(settings["key"]), 32, 32)


CASES = [settings_of(f"case_{number:02}") for number in range(12)]


def run(out: pathlib.Path, cases: list[CaseSettings] = CASES, **flags: bool) -> frozenset[str]:
    """What sample.py does around the model."""
    kept = outputs.keep_finished(out, cases, **flags)
    files.remove_leftovers(out)
    for settings in cases:
        if settings["key"] not in kept:
            outputs.write_case(out, settings, *made(settings))
    digests = {settings["key"]: outputs.case_digest(settings) for settings in cases}
    outputs.write_contact_sheet(out, digests, references)
    return kept


def contents(out: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())} if out.exists() else {}


def write(out: pathlib.Path, settings: CaseSettings) -> outputs.Sidecar:
    return outputs.write_case(out, settings, *made(settings))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(out) == frozenset()
    return contents(out)


def test_a_run_leaves_three_files_per_case_and_a_sheet(whole):
    suffixes = (".json", ".mp4", "_canvas.png")
    assert set(whole) == {f"{case['key']}{suffix}" for case in CASES for suffix in suffixes} | {"contact_sheet.png"}


# --- The digest.


def test_the_digest_is_the_hash_of_canonical_json():
    expected = (
        '{"dtype":"bfloat16","fps":16.0,"key":"k","loras":[],"model":{"file":"m","sha256":"aa"},"order":null,"prompt":"狐\\n\\"","references":'
        '[],"sampling":{"height":8,"width":4},"seed":7,"step_plan":null,"store_metadata":true,"strict_parity":false}'
    )
    settings = json.loads(expected)
    shuffled = {name: settings[name] for name in reversed(settings)}
    shuffled["sampling"] = {"width": 4, "height": 8}
    assert outputs.case_digest(shuffled) == hashlib.sha256(expected.encode()).hexdigest()


def leaves(value, path=()):
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, below in items:
            yield from leaves(below, (*path, name))
    else:
        yield path


def test_every_single_setting_changes_the_digest():
    settings = json.loads(json.dumps(settings_of("case")))
    digests = {outputs.case_digest(settings)}
    paths = list(leaves(settings))
    assert len(paths) > 30
    for path in paths:
        changed = copy.deepcopy(settings)
        below = changed
        for name in path[:-1]:
            below = below[name]
        value = below[path[-1]]
        below[path[-1]] = not value if isinstance(value, bool) else f"{value}x" if isinstance(value, str) else 77
        digests.add(outputs.case_digest(changed))
    assert len(digests) == len(paths) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": "data=8"}, "'mesh' is missing or not one of them"),
        ({"seed": float("nan")}, "not JSON compliant"),
        ({"prompt": "half a fox: \ud83e"}, "'\\\\ud83e' in the prompt or a name is half a character"),
    ],
)
def test_what_has_no_digest_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        outputs.case_digest({**settings_of("case"), **change})
    incomplete = settings_of("case")
    del incomplete["seed"]
    with pytest.raises(ValueError, match="'seed' is missing"):
        outputs.case_digest(incomplete)


def test_a_file_is_known_by_its_contents(tmp_path):
    path = tmp_path / "fox.png"
    for content in (b"first", b"another"):
        path.write_bytes(content)
        assert outputs.file_settings(path) == {"file": "fox.png", "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "MANIFEST.json").write_bytes(b"{}")
    expected = {"file": "model", "sha256": hashlib.sha256(b"{}").hexdigest()}
    assert outputs.file_settings(tmp_path / "model" / ".") == expected


# --- The files of one case.


def test_the_sidecar_tells_what_is_in_the_files(tmp_path):
    settings = settings_of("fox")
    returned = write(tmp_path, settings)
    sidecar = json.loads((tmp_path / "fox.json").read_text(encoding="utf-8"))
    assert sidecar == json.loads(json.dumps(returned)) == outputs.read_sidecar(tmp_path, "fox")
    assert sidecar["settings"] == json.loads(json.dumps(settings))
    assert sidecar["digest"] == outputs.case_digest(sidecar["settings"])
    for part, name in (("video", "fox.mp4"), ("canvas", "fox_canvas.png")):
        content = (tmp_path / name).read_bytes()
        facts = {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert facts.items() <= sidecar[part].items()
    size = {"num_frames": 3, "height": 32, "width": 32, "fps": 16.0, "scale": 8}
    assert size.items() <= sidecar["video"].items()
    # Two cells of 16x32: the first image is 8x16 and fills its cell, the second is square and has white above and below.
    assert sidecar["references"] == [
        {"words": "fox", "role": "subject", "box": [0, 0, 16, 32], "cell": [0, 0, 16, 32]},
        {"words": None, "role": "background", "box": [16, 8, 32, 24], "cell": [16, 0, 32, 32]},
    ]


def tags(path: pathlib.Path) -> dict[str, str]:
    with av.open(path) as container:
        return dict(container.metadata)


def test_the_mp4_tells_its_settings_twice_or_not_at_all(tmp_path):
    settings = settings_of("fox")
    write(tmp_path, settings)
    stored = tags(tmp_path / "fox.mp4")
    assert json.loads(stored["comment"]) == json.loads(json.dumps(settings))
    negative = SamplingConfig().negative_prompt
    assert stored["parameters"] == (
        f'fox: the "red" fox, 狐\nand the dog\nNegative prompt: {negative}\n'
        "Steps: 4, Sampler: unipc, CFG scale: 5.0, Shift: 3.0, Seed: 1, Size: 32x32, Frames: 5, Model: tiny, "
        'Lora: "fast.safetensors: 0.5"'
    )
    write(tmp_path, {**settings, "key": "bare", "store_metadata": False})
    assert not {"comment", "parameters"} & set(tags(tmp_path / "bare.mp4"))
    for path in (tmp_path / "bare.mp4", tmp_path / "bare_canvas.png"):
        assert b"fox" not in path.read_bytes()


def test_parameters_of_a_plain_case():
    settings = settings_of("fox")
    sampling = {**settings["sampling"], "negative_prompt": ""}
    plain = {**settings, "prompt": "a fox", "sampling": sampling, "loras": [], "model": {"file": "a, b", "sha256": ""}}
    facts = 'Steps: 4, Sampler: unipc, CFG scale: 5.0, Shift: 3.0, Seed: 1, Size: 32x32, Frames: 5, Model: "a, b"'
    assert outputs.parameters_text(plain) == f"a fox\n{facts}"
    for scale, said in ((3.0, 3.0), (None, 5.0)):
        strict = {**plain, "sampling": {**sampling, "reference_guidance_scale": scale}}
        assert outputs.parameters_text(strict) == f"a fox\n{facts}, Reference CFG scale: {said}"


def test_is_finished_only_with_these_settings_and_undamaged_files(tmp_path):
    settings = settings_of("fox")
    digest = outputs.case_digest(settings)
    assert not outputs.is_finished(tmp_path, "fox", digest)
    write(tmp_path, settings)
    assert outputs.is_finished(tmp_path, "fox", digest)
    assert not outputs.is_finished(tmp_path, "fox", outputs.case_digest(settings_of("fox", seed=2)))
    for path in outputs.case_files(tmp_path, "fox"):
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (flipped, content[:-1], b""):
            path.write_bytes(damaged)
            # One bit of the sidecar may change a word that nothing depends on.
            assert path.suffix == ".json" or not outputs.is_finished(tmp_path, "fox", digest)
        path.unlink()
        assert not outputs.is_finished(tmp_path, "fox", digest)
        path.write_bytes(content)
    assert outputs.is_finished(tmp_path, "fox", digest)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"digest": "x"}', "[" * 100_000, '{"seed": \xff}', "null"])
def test_a_sidecar_that_is_something_else_is_none(tmp_path, text):
    (tmp_path / "fox.json").write_bytes(text.encode("latin-1"))
    assert outputs.read_sidecar(tmp_path, "fox") is None
    assert not outputs.is_finished(tmp_path, "fox", "x")
    parts = {"digest": "x", "settings": {}, "video": ["bytes", "sha256"], "canvas": {}, "references": []}
    (tmp_path / "fox.json").write_text(json.dumps(parts))
    assert not outputs.is_finished(tmp_path, "fox", "x")


@pytest.mark.parametrize("key", ["", ".", "..", "a/b", "../a", "a\\b", "a\0", "run", "RUN"])
def test_keys_that_are_no_names_of_a_case(tmp_path, key):
    with pytest.raises(ValueError, match="key="):
        outputs.write_case(tmp_path, {**settings_of("fox"), "key": key}, *made(settings_of("fox")))
    assert contents(tmp_path) == {}


def test_a_key_of_120_bytes_has_room_for_every_suffix(tmp_path):
    key = "狐" * 40
    run(tmp_path, [settings_of(key)])
    assert set(contents(tmp_path)) == {f"{key}.mp4", f"{key}_canvas.png", f"{key}.json", "contact_sheet.png"}


# --- What is in the way.


def test_files_in_the_way_are_named_with_what_can_be_done(tmp_path):
    out = tmp_path / "not yet" / "there"
    assert outputs.existing(out, ["a", "b"]) == []
    assert outputs.keep_finished(out, [settings_of("a")]) == frozenset()
    assert not out.exists()
    write(out, settings_of("a"))
    (out / "b.mp4").write_bytes(b"another film")
    names = ["a.mp4", "a_canvas.png", "a.json", "b.mp4"]
    assert outputs.existing(out, ["a", "b", "c"]) == [out / name for name in names]
    cases = [settings_of(key) for key in "abc"]
    with pytest.raises(ValueError, match="a.mp4, a_canvas.png, a.json, b.mp4 exist already. Give --resume to"):
        outputs.keep_finished(out, cases)
    assert outputs.keep_finished(out, cases, overwrite=True) == frozenset()
    assert outputs.keep_finished(out, cases, resume=True) == {"a"}  # b has no sidecar: a run was killed there
    (out / "b.json").write_text("{}")
    with pytest.raises(
        ValueError, match="b.json was not written by this program, or by another version of it. Give --overwrite too"
    ):
        outputs.keep_finished(out, cases, resume=True)
    assert outputs.keep_finished(out, cases, resume=True, overwrite=True) == {"a"}
    assert outputs.keep_finished(out, [settings_of("c")]) == frozenset()


def test_resume_with_other_settings_says_which(tmp_path):
    write(tmp_path, settings_of("a"))
    other = settings_of("a", seed=2)
    other["sampling"] = {**other["sampling"], "guidance_scale": 1.0, "negative_prompt": "blurry"}
    other["references"] = other["references"][:1]
    with pytest.raises(ValueError, match="other settings") as caught:
        outputs.keep_finished(tmp_path, [other], resume=True)
    for change in ("seed 1, now 2", "sampling.guidance_scale 5.0, now 1.0", "sampling.negative_prompt", "references"):
        assert change in str(caught.value)
    assert "sampling.solver" not in str(caught.value)
    before = contents(tmp_path)
    assert outputs.keep_finished(tmp_path, [other], resume=True, overwrite=True) == frozenset()
    assert contents(tmp_path) == before


def test_many_files_in_the_way_are_counted(tmp_path):
    for number in range(400):
        (tmp_path / f"{number}.mp4").touch()
    with pytest.raises(ValueError, match="0.mp4, 1.mp4, 2.mp4, 3.mp4, 4.mp4, and 395 more exist already"):
        outputs.keep_finished(tmp_path, [settings_of(f"{number}") for number in range(400)])


def test_a_folder_that_cannot_hold_the_files_is_an_error_before_anything_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="file is a file; it must be a folder"):
            outputs.keep_finished(out, CASES, overwrite=True)
    (tmp_path / "case_03.mp4").mkdir()
    with pytest.raises(ValueError, match="case_03.mp4 is a folder, where a file must go"):
        outputs.keep_finished(tmp_path, CASES, overwrite=True)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # tests may run as root, who may do anything
    with pytest.raises(ValueError, match="may not be written to"):
        outputs.keep_finished(tmp_path / "below", CASES)


# --- Failures half way.


class Stop(BaseException):
    """What happens to a run: as an exception, it lets `finally` clean up, which kill -9 does not."""


STEPS = {  # everything that writes: where it is called, and how often for one case
    "frame": (video, "_to_yuv", 3),
    "picture": (Image.Image, "save", 1),
    "json": (outputs, "_write_json", 1),
    "sync": (os, "fsync", 3),
    "rename": (os, "replace", 3),
}
CALLS = [(step, call) for step, (_, _, count) in STEPS.items() for call in range(count)]


@contextlib.contextmanager
def failing(step: str, call: int, how=Stop):
    """The call-th use of a step does not happen, nor does anything after it."""
    owner, name, _ = STEPS[step]
    original, count = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count > call:
            raise how(f"{step} {call}")
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    try:
        yield
    finally:
        setattr(owner, name, original)


@pytest.mark.parametrize(("step", "call"), CALLS)
def test_a_failure_leaves_no_half_files_and_the_earlier_ones_until_all_are_complete(tmp_path, step, call):
    new, old = settings_of("new"), settings_of("old")
    write(tmp_path, old)
    before = contents(tmp_path)
    with failing(step, call, OSError), pytest.raises(OSError, match=step):
        write(tmp_path, new)
    left = contents(tmp_path)
    assert not any(name.endswith(".part") for name in left)
    assert "new.json" not in left
    renamed = {"new.mp4", "new_canvas.png"} & set(left)
    assert left.keys() - renamed == before.keys()
    assert len(renamed) == (call if step in ("sync", "rename") else 0)

    with failing(step, call, OSError), pytest.raises(OSError, match=step):
        write(tmp_path, settings_of("old", seed=2))
    after = contents(tmp_path)
    if step in ("sync", "rename"):  # the first file may be in its place: no sidecar may speak for the other
        assert "old.json" not in after
        assert (after["old_canvas.png"], after["old.mp4"] == before["old.mp4"]) == (before["old_canvas.png"], not call)
    else:
        assert after == left


def test_a_full_disk_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    clip = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), np.uint8)
    settings = settings_of("fox")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    complete = outputs.write_case(tmp_path / "complete", settings, clip, made(settings)[1])["video"]["bytes"]
    for most in (0, complete // 2, complete - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                outputs.write_case(tmp_path / "full", settings, clip, made(settings)[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert contents(tmp_path / "full") == {}


# --- Resume.


def resumed_equals(out: pathlib.Path, whole: dict[str, bytes]) -> set[str]:
    """Resumes a run and compares; the keys that had been finished."""
    digests = {case["key"]: outputs.case_digest(case) for case in CASES}
    finished = {key for key, digest in digests.items() if outputs.is_finished(out, key, digest)}
    paths = [path for key in sorted(finished) for path in outputs.case_files(out, key)]
    before = [path.stat() for path in paths]
    assert run(out, resume=True) == finished
    assert contents(out) == whole
    for path, was in zip(paths, before, strict=True):
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (was.st_ino, was.st_mtime_ns)
    return finished


@pytest.mark.parametrize(("step", "call"), [*CALLS, ("sheet", 0)])
def test_a_run_interrupted_at_any_step_is_resumed_to_the_same_bytes(tmp_path, whole, step, call):
    # In the seventh case; the sheet comes after three files of twelve cases.
    first = {"sheet": ("rename", 36)}.get(step) or (step, 6 * STEPS[step][2] + call)
    with failing(*first), pytest.raises(Stop):
        run(tmp_path)
    finished = resumed_equals(tmp_path, whole)
    assert len(finished) == (12 if step == "sheet" else 6)


KILLED = """
import os, pathlib, signal, sys
from tests import test_outputs as t

def kill(message):
    os.kill(os.getpid(), signal.SIGKILL)

for moment in sys.argv[2:]:
    step, call = moment.split(":")
    if os.fork() == 0:
        with t.failing(step, int(call), kill):
            t.run(pathlib.Path(sys.argv[1]) / moment)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
"""


@pytest.mark.skipif(os.name != "posix", reason="there is no kill -9")
def test_a_run_killed_at_five_moments_is_resumed_to_the_same_bytes(tmp_path, whole):
    # In the middle of the first video; before, between and after the renames of a case; while the sheet is written.
    moments = {"frame:1": 0, "rename:9": 3, "rename:22": 7, "json:10": 10, "sync:36": 12}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", "-c", KILLED, tmp_path, *moments]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    for moment, count in moments.items():
        assert [path for path in (tmp_path / moment).iterdir() if path.name.endswith(".part")], moment
        assert len(resumed_equals(tmp_path / moment, whole)) == count, moment


def test_resume_makes_damaged_files_anew(tmp_path, whole):
    run(tmp_path)
    (tmp_path / "case_04.mp4").write_bytes(b"damaged")
    (tmp_path / "case_05_canvas.png").unlink()
    assert resumed_equals(tmp_path, whole) == {case["key"] for case in CASES} - {"case_04", "case_05"}


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    sleeping = subprocess.Popen(["sleep", "60"])
    dead = subprocess.Popen(["true"])
    dead.wait()
    stays = [
        f".a.mp4.{sleeping.pid}.part",
        f".a.mp4.{os.getpid()}.part",
        ".a.mp4.part",
        "a.mp4.1.part",
        f".a.{dead.pid}.mp4",
    ]
    goes = [f".a.mp4.{dead.pid}.part", f"..hidden.json.{dead.pid}.part", f".earlier.mp4.{os.getpid()}.part"]
    try:
        for name in (*stays, *goes):
            (tmp_path / name).touch()
        os.utime(tmp_path / goes[2], (0, 0))  # from before this process: a container gives every run the same number
        assert {path.name for path in files.remove_leftovers(tmp_path)} == set(goes)
        assert set(contents(tmp_path)) == set(stays)
        assert files.remove_leftovers(tmp_path / "not there") == []
    finally:
        sleeping.send_signal(signal.SIGTERM)
        sleeping.wait()


# --- The contact sheet.


def test_the_sheet_shows_finished_cases_in_order(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(outputs, "contact_sheet", lambda rows: seen.append(rows) or Image.new("RGB", (1, 1)))
    cases = [settings_of(key) for key in "dcba"]
    digests = {case["key"]: outputs.case_digest(case) for case in cases}
    assert outputs.write_contact_sheet(tmp_path, digests) is None
    assert contents(tmp_path) == {}
    for case in (cases[3], cases[0], settings_of("b", seed=2)):  # c is missing, b is of other settings
        write(tmp_path, case)
    assert outputs.write_contact_sheet(tmp_path, digests, references) == tmp_path / "contact_sheet.png"
    rows = seen[0]
    assert [row["caption"] for row in rows] == [f'{key}: {key}: the "red" fox, 狐\nand the dog' for key in "da"]
    for row, case in zip(rows, (cases[0], cases[3]), strict=True):
        frames = made(case)[0].repeat(4, axis=1).repeat(4, axis=2)  # 32 pixels fit four times into a tile of 128
        assert row["frames"].shape == frames.shape
        assert np.abs(row["frames"].astype(int) - frames).mean() < 4
        assert [image.size for image in row["references"]] == [(64, 128), (128, 128)]
        assert row["canvas"].size == (128, 128)


def test_a_sheet_has_at_most_24_rows(tmp_path, monkeypatch):
    count = []
    monkeypatch.setattr(outputs, "contact_sheet", lambda rows: count.append(len(rows)) or Image.new("RGB", (1, 1)))
    write(tmp_path, settings_of("a"))
    sidecar = outputs.read_sidecar(tmp_path, "a")
    monkeypatch.setattr(outputs, "read_sidecar", lambda out, key: sidecar)
    monkeypatch.setattr(outputs, "case_files", lambda out, key, find=outputs.case_files: find(out, "a"))
    outputs.write_contact_sheet(tmp_path, {str(number): sidecar["digest"] for number in range(30)})
    assert count == [24]


def test_memory_of_a_sheet_does_not_grow_with_the_number_of_frames(tmp_path):
    settings = settings_of("long")
    frames = np.zeros((61, 256, 256, 3), np.uint8)
    frames[:, :, 100:200] = np.arange(61, dtype=np.uint8)[:, None, None, None]
    outputs.write_case(tmp_path, settings, frames, made(settings)[1])
    tracemalloc.start()
    outputs.write_contact_sheet(tmp_path, {"long": outputs.case_digest(settings)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < frames.nbytes / 2  # 9 frames of 61, and what one of them needs to shrink


# --- What is said about the run.


REPORTS = [
    CaseReport("fox", "written", 480, 832, 77, 40, 61.24, 1.5, 1_400_000),
    CaseReport("狐_2", "kept", 32, 32, 3, 4, None, None, 3_210),
    CaseReport("dog", "failed: the latents are not finite after step 7 of 40", 480, 832, 77, 40, 10.5, 1.5),
]


def test_the_summary_is_aligned_on_a_terminal():
    assert outputs.summary_table(REPORTS).split("\n") == [
        "video  size x frames  steps  s/step  seconds  file",
        "fox       832x480x77     40    1.50     61.2  1.4 MB",
        "狐_2         32x32x3      4                   3 kB, kept",
        "dog       832x480x77     40    1.50     10.5  failed: the latents are not finite after step 7 of 40",
        "3 videos: 1 written, 1 kept, 1 failed; 71.7 s, 1.4 MB",
    ]


@pytest.mark.parametrize("count", [0, 1, 38, 39, 5000])
def test_the_summary_of_a_long_run_ends_and_shows_the_failures(count):
    reports = [CaseReport(f"case_{number}", "written", 8, 8, 1, 1, 1.0, 1.0, 1000) for number in range(count)]
    if count > 38:
        reports[-1] = CaseReport("last", "failed: because\nof this" + "!" * 200, 8, 8, 1, 1)
    lines = outputs.summary_table(reports).split("\n")
    assert len(lines) == min(count + 2, 40)
    shown = sum(line.startswith("case_") or line.startswith("last") for line in lines)
    assert shown == (count if count <= 38 else 37)
    if count > 38:
        assert lines[-3].startswith("last ")
        assert "failed: because of this!!" in lines[-3]
        assert lines[-2] == f"... and {count - 37} more"
        assert lines[-1].startswith(f"{count} videos: {count - 1} written, 1 failed;")
        assert max(map(len, lines)) < 140


def test_run_json_tells_how_it_went_and_on_what(tmp_path):
    settings = settings_of("fox")
    report = CaseReport.of(write(tmp_path, settings), "written", seconds=2.00049, seconds_per_step=0.5)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    arguments = ["--prompts", "cases.txt", "--out", "made"]
    for reports, on in (([report], mesh), ([report, REPORTS[2]], None)):
        timings = {"load": 1.23456}
        outputs.write_run(tmp_path, reports, arguments=arguments, config=ModelConfig(), timings=timings, mesh=on)
        told = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
        assert told["mesh"] == (None if on is None else {"data": 2})
    assert told["arguments"] == arguments
    assert told["seconds"] == {"load": 1.235}
    fox, dog = told["cases"]
    expected = {"key": "fox", "status": "written", "seconds": 2.0, "num_frames": 3, "num_inference_steps": 4}
    assert expected.items() <= fox.items()
    assert fox["num_bytes"] == (tmp_path / "fox.mp4").stat().st_size
    assert dog["status"] == "failed: the latents are not finite after step 7 of 40"
    assert told["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (told["versions"]["jax"], told["versions"]["numpy"]) == (jax.__version__, np.__version__)
    assert {"magref-jax", "flax"} <= set(told["versions"])
    assert told["device"] == {"kind": "cpu", "platform": "cpu", "count": 8}
    assert told["peak_memory_bytes"]["host"] > 50e6
    assert told["config"]["sampling"]["num_inference_steps"] == 40
    assert os.sep + "tmp" not in (tmp_path / "run.json").read_text()
