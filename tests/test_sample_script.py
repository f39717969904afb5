"""sample.py from outside: the files it writes, what it refuses and how, what kills it and what does not."""

import contextlib
import csv
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import sample
from magref_jax import batches, dry_run, files, outputs, pipeline, prompts, sharding
from magref_jax.config import DiTConfig, ModelConfig, SamplingConfig
from magref_jax.data import emoji_examples
from magref_jax.data.emoji_world import BACKGROUNDS, PLACES, EmojiWorldConfig
from magref_jax.prompts import ALIASES, Checks
from magref_jax.video import read_video
from tests.tiny_model import CONFIG, picture, write_model

ROOT = pathlib.Path(sample.__file__).parent

# Room for prompts of 5 and of 100 tokens.
LONG = dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, text_len=150))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("long") / "model", LONG)


# One shape, 12 prompts of 5 to 82 tokens.
PROMPTS = {f"case_{n:02}": f"the {'red blue ' * (n // 3 * n)}apple rises" for n in range(12)}
LINES = [f"{key}@@{prompt}@@apple.png:apple" for key, prompt in PROMPTS.items()]


def write_inputs(folder):
    picture((250, 20, 20)).save(folder / "apple.png")
    picture((20, 20, 250), (30, 20)).save(folder / "fish.png")
    (folder / "twelve.txt").write_text("\n".join(LINES))
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_inputs(tmp_path)


def make(model_folder, *arguments):
    """Runs sample.py in this process, without leaving a compilation cache behind for the tests that follow."""
    sample.main(["--model", str(model_folder), "--compile_cache", "none", *map(str, arguments)])


def files_of(keys):
    """What a finished case leaves: three files each, and two for all."""
    suffixes = (".mp4", ".json", "_canvas.png")
    return {f"{key}{suffix}" for key in keys for suffix in suffixes} | {"run.json", "contact_sheet.png"}


def names(out):
    return {path.name for path in out.iterdir()}


def contents(out):
    """All files but run.json, which knows the time."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != "run.json"}


def identities(out):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()}


def statuses(out):
    run = json.loads((out / "run.json").read_text())
    return {case["key"]: case["status"] for case in run["cases"]}


def sizes_of_caches():
    return [program._cache_size() for program in (pipeline._encode, pipeline._advance, pipeline._decode)]


@pytest.fixture(scope="module")
def twelve(model_folder, tmp_path_factory):
    """Twelve cases one at a time, and how many programs that compiled."""
    folder = write_inputs(tmp_path_factory.mktemp("twelve"))
    jax.clear_caches()
    make(model_folder, "--prompts", folder / "twelve.txt", "--out", folder / "out")
    return folder / "out", sizes_of_caches()


# --- What a run makes.


def test_twelve_cases_are_twelve_videos_and_one_compilation(twelve):
    out, compiled = twelve
    assert names(out) == files_of(PROMPTS)
    assert statuses(out) == dict.fromkeys(PROMPTS, "written")
    assert compiled == [1, 1, 1]
    for key, prompt in PROMPTS.items():
        sidecar = json.loads((out / f"{key}.json").read_text())
        content = (out / f"{key}.mp4").read_bytes()
        assert sidecar["settings"]["prompt"] == prompt
        assert sidecar["video"]["sha256"] == hashlib.sha256(content).hexdigest()
        assert read_video(out / f"{key}.mp4").metadata == sidecar["settings"]
    videos = [(out / f"{key}.mp4").read_bytes() for key in PROMPTS]
    assert len(set(videos)) == 12


def test_the_order_of_the_lines_changes_nothing(twelve, model_folder, work):
    shuffled = [LINES[index] for index in np.random.default_rng(0).permutation(12)]
    (work / "shuffled.txt").write_text("\n".join(shuffled))
    before = sizes_of_caches()
    make(model_folder, "--prompts", "shuffled.txt", "--out", "out")
    assert sizes_of_caches() == before
    made, expected = contents(work / "out"), contents(twelve[0])
    # The rows of the sheet are in the order of the lines.
    assert made.pop("contact_sheet.png") != expected.pop("contact_sheet.png")
    assert made == expected


def test_other_lines_change_nothing(twelve, model_folder, work):
    others = ["new@@the fish@@fish.png", *LINES[7:], "newer@@the apple and the fish@@fish.png@@apple.png"]
    (work / "others.txt").write_text("\n".join(others))
    make(model_folder, "--prompts", "others.txt", "--out", "out")
    assert names(work / "out") == files_of(["new", "newer", *list(PROMPTS)[7:]])
    made = contents(work / "out")
    for name, content in contents(twelve[0]).items():
        if name in files_of(list(PROMPTS)[7:]) - {"contact_sheet.png"}:
            assert made[name] == content


def next_command(printed, out):
    """The arguments of the last line, parsed; it must not write where the run has written."""
    program, script, *arguments = shlex.split(printed.splitlines()[-1].removeprefix("next: "))
    assert (program, script) == ("python", "sample.py")
    parsed = sample.parser().parse_args(arguments)
    assert parsed.out.resolve() != pathlib.Path(out).resolve()
    assert not parsed.out.exists()
    return parsed


def test_without_arguments_the_bundled_examples_become_videos(model_folder, work, capsys):
    make(model_folder)
    keys = [key for key, _, _ in emoji_examples.EXAMPLES]
    assert names(work / "outputs") == files_of(keys)
    printed = capsys.readouterr()
    assert "6/6" in printed.err  # three steps of two videos on the progress bar
    assert "s/step" in printed.out
    assert "2 videos: 2 written" in printed.out
    parsed = next_command(printed.out, "outputs")
    file, _, words = parsed.ref[0].rpartition(":")
    assert pathlib.Path(file).is_file()
    assert words in parsed.prompt
    assert (parsed.model, parsed.prompts) == (model_folder, None)

    video = read_video(work / "outputs" / f"{keys[0]}.mp4")
    assert len(video.frames) == 4
    assert video.fps == 8
    assert video.metadata["prompt"] == emoji_examples.EXAMPLES[0][1]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--prompt", "the apple rises", "--ref", "apple.png:apple", "--out", "one"], "the_apple_rises"),
        (["--prompt=-- the apple's --seed rises", "--src_ref_images", "apple.png,fish.png", "--out", "one/"], None),
        (["--prompt=--seed", "--background", "apple.png", "--subjects", "seed", "--save_dir=./one"], "seed"),
    ],
)
def test_one_prompt_is_one_video_and_the_next_command_another(model_folder, work, capsys, arguments, key):
    make(model_folder, *arguments)
    key = key or prompts.safe_key(arguments[0].partition("=")[2])
    assert names(work / "one") == files_of([key])
    parsed = next_command(capsys.readouterr().out, "one")
    settings = json.loads((work / "one" / f"{key}.json").read_text())["settings"]
    assert settings["prompt"] == parsed.prompt
    assert settings["seed"] + 1 == parsed.seed
    references = sample.read_entries(parsed, checks := Checks())[0].references
    assert checks.problems == []
    assert [(r.path.name, r.words, r.role) for r in references] == [
        (r["file"], r["words"], r["role"]) for r in settings["references"]
    ]


ALL_FLAGS = (
    "--prompts cases.jsonl --seed 5 --size 16x8 --frames 3 --fps 12 --layout v2:input --strict_parity --negative fish "
    "--steps 4 --guidance 1 --reference_guidance 2 --shift 5 --solver euler --batch_size 2 --mesh data=8 --out a/made --no_metadata"
)


def test_every_option_reaches_the_videos(model_folder, work, capsys):
    cases = [
        {"key": "first", "prompt": "the red apple rises", "references": ["apple.png:red apple"]},
        {"key": " ../é 2", "prompt": "the blue fish", "references": ["fish.png", "apple.png"], "seed": 7},
        # Defects 5 and 6 of the official scripts: another number of frames, and portrait.
        {"key": "tall", "prompt": "the blue fish", "references": "fish.png", "size": "8x16", "frames": 7},
    ]
    (work / "cases.jsonl").write_text("\n".join(map(json.dumps, cases)), encoding="utf-8-sig")
    make(model_folder, *ALL_FLAGS.split())
    # Defect 10 of the official scripts: the folder is made. Defect 11: keys stay in it.
    out = work / "a" / "made"
    assert names(out) == files_of(["first", "é_2", "tall"])
    shapes = {"first": (2, 256, 512, 3), "é_2": (2, 256, 512, 3), "tall": (6, 512, 256, 3)}
    for key, shape in shapes.items():
        video = read_video(out / f"{key}.mp4")
        assert (video.frames.shape, video.fps, video.metadata) == (shape, 12, None)
    settings = {key: json.loads((out / f"{key}.json").read_text())["settings"] for key in shapes}
    assert [settings[key]["seed"] for key in shapes] == [5, 7, 5]
    assert settings["first"]["sampling"] == {
        "height": 8,
        "width": 16,
        "num_frames": 3,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "reference_guidance_scale": 2.0,
        "flow_shift": 5.0,
        "solver": "euler",
        "layout": "v2",
        "mask_mode": "region",
        "negative_prompt": "fish",
    }
    assert (settings["first"]["order"], settings["first"]["strict_parity"]) == ("input", True)
    run = json.loads((out / "run.json").read_text())
    assert run["mesh"]["data"] == 8
    assert run["arguments"][-len(ALL_FLAGS.split()) :] == ALL_FLAGS.split()
    printed = capsys.readouterr()
    assert "8/8" in printed.err  # two batches of four steps
    table = printed.out.splitlines()[-7:]
    assert [line.split()[:2] for line in table[:4]] == [
        ["video", "size"],
        ["first", "16x8x2"],
        ["é_2", "16x8x2"],
        ["tall", "8x16x6"],
    ]
    assert next_command(printed.out, out).seed == 6


def test_the_four_formats_make_the_same_files(model_folder, work):
    rows = [
        {"key": "one", "prompt": "the red apple rises", "image": "apple.png:red apple"},
        {"key": "two", "prompt": "the fish, and an apple", "image": "fish.png:fish;apple.png"},
    ]
    own = {"seed": 11, "negative": "meadow"}
    (work / "c.txt").write_text(
        "\n".join("@@".join((row["key"], row["prompt"], *row["image"].split(";"))) for row in rows)
    )
    (work / "c.jsonl").write_text("\n".join(json.dumps(row | own) for row in rows))
    benchmark = {
        "one": {"prompt": rows[0]["prompt"], "img_paths": ["apple.png"], "class_label": ["red apple"]},
        "two": {"prompt": rows[1]["prompt"], "img_paths": ["fish.png", "apple.png"], "class_label": ["fish", ""]},
    }
    (work / "c.json").write_text(json.dumps({key: row | own for key, row in benchmark.items()}))
    with (work / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *own])
        writer.writeheader()
        writer.writerows(row | own for row in rows)
    make(model_folder, "--prompts", "c.txt", "--out", "txt", "--base_seed", "11", "--n_prompt", "meadow")
    expected = contents(work / "txt")
    assert set(expected) == files_of(["one", "two"]) - {"run.json"}
    for suffix in ("json", "jsonl", "csv"):
        make(model_folder, "--prompts", f"c.{suffix}", "--out", suffix)
        assert contents(work / suffix) == expected, suffix


def table_for(folder, steps=3, **changes):
    """A step cache by hand: lengths that hardly change, so that every step between the first and the last is skipped."""
    sampling = json.loads((folder / "config.json").read_text())["sampling"] | {"num_inference_steps": steps}
    ratios = [1.0, *[1.001] * (steps - 1)]
    table = {"model": "tiny", "sampling": sampling, "cases": 1, "max_skips": 3, "keep_first": 0.0}
    return json.dumps(table | {"ratios": ratios, "spread": [0.0] * steps, "measured": []} | changes)


def test_a_step_cache_spares_evaluations_and_changes_the_video(model_folder, work, twelve):
    (work / "table.json").write_text(table_for(model_folder))
    (work / "one.txt").write_text(LINES[3])
    for out, threshold, evaluate in (("some", ":0.01", [True, False, True]), ("all", ":0", [True] * 3)):
        make(model_folder, "--prompts", "one.txt", "--step_cache", f"table.json{threshold}", "--out", out)
        settings = json.loads((work / out / "case_03.json").read_text())["settings"]
        assert settings["step_plan"]["evaluate"] == evaluate
    frames = {out: read_video(work / out / "case_03.mp4").frames for out in ("some", "all")}
    whole = read_video(twelve[0] / "case_03.mp4").frames
    np.testing.assert_array_equal(frames["all"], whole)
    assert np.abs(frames["some"].astype(int) - whole).max() > 1


# --- Options and their other names.


def parsed(*words):
    return sample.parser().parse_args(sample.spelled_as_ours(words))


OPTIONS = {
    "ref": ("apple.png:apple", ["apple.png:apple"]),
    "seed": ("7", 7),
    "height": ("480", 480),
    "width": ("832", 832),
    "frames": ("49", 49),
    "negative": ("blurred, --steps", "blurred, --steps"),
    "prompts": ("a.json", pathlib.Path("a.json")),
    "out": ("results", pathlib.Path("results")),
    "steps": ("50", 50),
    "guidance": ("4.5", 4.5),
    "reference_guidance": ("2", 2.0),
    "shift": ("3", 3.0),
    "solver": ("unipc", "unipc"),
    "fps": ("24", 24.0),
    "lora": ("fast.safetensors:0.5", ["fast.safetensors:0.5"]),
    "compile_cache": ("folder", "folder"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_have_the_names_of_wan_magref_and_diffusers(option):
    text, value = OPTIONS[option]
    spelled = [option, *ALIASES["references" if option == "ref" else option]]
    for name in spelled:
        for words in ((f"--{name}", text), (f"--{name}={text}",)):
            assert getattr(parsed("--prompt", "x", *words, "--dry_run"), option) == value
            assert parsed(*words, "--dry_run").dry_run


def test_no_alias_is_left_untested():
    ours = {action.dest for action in sample.parser()._actions}
    assert {option for option in ours if ALIASES.get(option)} | {"ref", "height", "width"} == set(OPTIONS)


def test_a_command_line_of_the_official_script():
    words = (
        "--frame_num 81 --sample_steps 50 --sample_shift 5.0 --sample_guide_scale 5.0 --base_seed 42 --save_dir samples "
        "--sample_solver unipc --prompt_path prompts.txt"
    )
    found = parsed(*words.split())
    assert (found.frames, found.steps, found.shift, found.guidance, found.seed) == (81, 50, 5.0, 5.0, 42)
    assert (found.out, found.solver, found.prompts) == (
        pathlib.Path("samples"),
        "unipc",
        pathlib.Path("prompts.txt"),
    )


def test_a_value_is_never_an_option():
    assert parsed("--prompt", "sample_steps", "--negative", "num_frames=3").negative == "num_frames=3"
    assert parsed("--prompt=--sample_steps=3").prompt == "--sample_steps=3"
    assert parsed("--prompt", "--sample_steps of a fox").prompt == "--sample_steps of a fox"
    assert parsed("--prompt=--sample_steps").steps is None
    for words in (["--prompt", "--sample_steps"], ["--step", "3"], ["--class_label", "fox"], ["--num_infer", "3"]):
        with pytest.raises(SystemExit):
            parsed(*words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("832*480", (832, 480)),
        ("480x832", (480, 832)),
        ("480p-portrait", (480, 832)),
        ("720p", (1280, 720)),
        ("832x472", "height=472 must be a positive multiple of 16"),
        ("832", "must be WIDTHxHEIGHT in pixels"),
    ],
)
def test_sizes_of_the_released_model(text, expected):
    """Multiples of 16: 8 of the VAE by 2 of the patches."""
    released = ModelConfig(dit=DiTConfig())
    checks = Checks()
    found = sample.read_overrides(parsed("--size", text), released, checks)
    if isinstance(expected, tuple):
        assert (found["width"], found["height"]) == expected
        assert checks.problems == []
    else:
        (problem,) = checks.problems
        assert problem.startswith(f"--size {text}: {expected}")


# --- What is refused.


@pytest.fixture
def refused(model_folder, work, capsys, monkeypatch):
    """Runs sample.py on wrong arguments; what it says. It must end with 2, leave nothing, and read no weight."""
    monkeypatch.setattr(pipeline, "load", lambda *args, **kwargs: pytest.fail("weights were read"))

    def run(*arguments):
        before = sorted(work.rglob("*"))
        with pytest.raises(SystemExit) as exit_info:
            make(model_folder, *arguments)
        assert exit_info.value.code == 2
        assert sorted(work.rglob("*")) == before
        return capsys.readouterr().err

    return run


APPLE = ["--prompt", "the red apple rises", "--ref", "apple.png:red apple"]
WRONG = {
    "missing image": (["--prompt", "the apple", "--ref", "pear.png:apple"], "there is no image file 'pear.png:apple'"),
    "no words": (["--prompt", "the apple", "--ref", "apple.png:"], "'apple.png:' has no words after its last colon"),
    "no image": (["--prompt", "the apple", "--ref", "text.png"], "text.png is no image"),
    "damaged image": (["--prompt", "the apple", "--ref", "cut.png"], "cut.png is a damaged image"),
    "words": (
        ["--prompt", "the fish", "--ref", "apple.png:apple"],
        "'apple' is not in the prompt. Words of the prompt",
    ),
    "background words": (["--prompt", "the fish", "--background", "apple.png:hill"], "'hill' is not in the prompt"),
    "too many": (["--prompt", "a", *["--ref", "fish.png"] * 4], "4 reference images given, but layout 'v1' holds at"),
    "too many of both": (
        ["--prompt", "a", *["--ref", "fish.png"] * 3, "--background", "apple.png"],
        "4 reference images given, but layout 'v1' holds at",
    ),
    "empty prompt": (["--prompt", "  "], "--prompt: prompt='  ' has no words"),
    "no prompt": (["--ref", "apple.png"], "--ref, --background and --subjects need --prompt"),
    "background without prompt": (["--background", "apple.png"], "--ref, --background and --subjects need --prompt"),
    "subjects": ([*APPLE, "--subjects", "apple,fish"], "two names: 'red apple' and 'apple,fish'"),
    "number of subjects": (
        ["--prompt", "an apple", "--ref", "apple.png,fish.png", "--subjects", "apple"],
        "subjects='apple' has 1 for 2 references; give one each, or ''",
    ),
    "two sources": ([*APPLE, "--prompts", "twelve.txt"], "--prompt and --prompts: give one of the two"),
    "missing file": (["--prompts", "missing.txt"], "there is no prompt file missing.txt"),
    "suffix": (["--prompts", "apple.png"], "the suffix '.png' is unknown; a prompt file is one of .txt, .json"),
    "empty file": (["--prompts", "empty.txt"], "empty.txt: no video is asked for in it"),
    "latin-1": (["--prompts", "latin.txt"], "latin.txt line 2 is not UTF-8: it has the byte 0xe9"),
    "size": ([*APPLE, "--size", "70x8"], "--size 70x8: width=70 must be a positive multiple of 4"),
    "size in words": ([*APPLE, "--size", "big"], "--size big: must be WIDTHxHEIGHT in pixels"),
    "size and height": ([*APPLE, "--size", "8x8", "--height", "8"], "--size, and also --height or --width"),
    "height": ([*APPLE, "--height", "0"], "--height 0: height=0 must be a positive multiple of 4"),
    "width": ([*APPLE, "--width", "6"], "--width 6: width=6 must be a positive multiple of 4"),
    "frames": ([*APPLE, "--frames", "6"], "--frames 6: num_frames=6 must be 2n + 1"),
    "one frame": ([*APPLE, "--num_frames", "1"], "--frames 1: num_frames=1 leaves no video"),
    "steps": ([*APPLE, "--num_inference_steps", "0"], "--steps 0: num_inference_steps=0 must be at least 1"),
    "steps in words": ([*APPLE, "--steps", "many"], "argument --steps: invalid int value: 'many'"),
    "shift": ([*APPLE, "--shift", "-1"], "--shift -1.0: flow_shift=-1.0 must be positive"),
    "reference guidance": (
        [*APPLE, "--reference_guidance", "inf"],
        "--reference_guidance inf: reference_guidance_scale=inf must be a finite number",
    ),
    "guidance": ([*APPLE, "--guidance", "inf"], "--guidance inf: guidance_scale=inf must be a finite number"),
    "solver": ([*APPLE, "--solver", "ddim"], "--solver ddim: solver='ddim' is unknown; choose from unipc"),
    "layout": ([*APPLE, "--layout", "v3"], "--layout v3: layout='v3' is unknown; choose from v1, v2"),
    "order": ([*APPLE, "--layout", "v2:1,2"], "order=(1, 2) must name each of the 1 references"),
    "order of a line": (
        ["--prompts", "orders.txt", "--layout", "v2:1,0"],
        "orders.txt line 2: --layout v2:1,0: order=(1, 0) must name each of the 1 references",
    ),
    "seed": ([*APPLE, "--seed", "-1"], "--seed -1: must be 0 to 9223372036854775807"),
    "fps": ([*APPLE, "--fps", "0"], "--fps 0.0: fps=0.0 must be 0.001 to 1000000."),
    "fps nan": ([*APPLE, "--fps", "nan"], "--fps nan: fps=nan must be 0.001 to 1000000."),
    "fps that no file holds": ([*APPLE, "--fps", "0.0005"], "--fps 0.0005: fps=0.0005 must be 0.001 to 1000000."),
    "attention": ([*APPLE, "--attention", "flash"], "--attention flash: is unknown; choose one of auto, xla, cudnn"),
    "batch size": ([*APPLE, "--batch_size", "0"], "--batch_size 0: must be 1 to 4096"),
    "mesh": ([*APPLE, "--mesh", "pipe=8"], "--mesh pipe=8: mesh='pipe=8' names the axis 'pipe'"),
    "mesh size": ([*APPLE, "--mesh", "data=3"], "--mesh data=3: mesh='data=3' means data=3, which does not use the 8"),
    "step cache": ([*APPLE, "--step_cache", "nothing.json"], "there is no step cache file 'nothing.json'"),
    "step cache of other steps": (
        [*APPLE, "--step_cache", "four.json"],
        "four.json: was measured with num_inference_steps=4, the run has num_inference_steps=3",
    ),
    "lora": ([*APPLE, "--lora", "nothing.safetensors:2"], "--lora: there is no LoRA file 'nothing.safetensors:2'"),
    "past the limit": (
        ["--prompts", "long.txt"],
        "long.txt line 1: Subject 'apple' at characters 800..805 has no token: the 150 tokens end",
    ),
    "out is a file": ([*APPLE, "--out", "apple.png"], "--out apple.png: apple.png is a file; it must be a folder"),
    "out below a file": (
        [*APPLE, "--out", "apple.png/x"],
        "apple.png is a file; it must be a folder",
    ),
    "model": ([*APPLE, "--model", "nowhere"], "--model: nowhere does not exist; a model folder holds config.json"),
    "dtype": ([*APPLE, "--dtype", "fp16"], "--dtype fp16: dtype='fp16' is unknown; choose from float32, bfloat16"),
    "platform of a plan": ([*APPLE, "--plan", "v6e-8"], "in chips, it is v6e:2x4"),
    "model of a plan": (["--plan", "cpu:8", "--model", "nowhere"], "nowhere does not exist; a model folder holds"),
    "dtype of a plan": (["--plan", "cpu:8", "--dtype", "half"], "dtype='half' is unknown"),
    "half of a distributed run": ([*APPLE, "--num_processes", "2"], "not given: processes are told all of"),
    "unknown option": ([*APPLE, "--step", "3"], "unrecognized arguments: --step 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(model_folder, work, refused, case):
    (work / "text.png").write_text("no picture")
    (work / "cut.png").write_bytes((work / "apple.png").read_bytes()[:-60])
    (work / "empty.txt").write_text("# nothing\n\n")
    (work / "latin.txt").write_bytes("a@@the fish\nb@@caf\xe9".encode("latin-1"))
    (work / "orders.txt").write_text("a@@the fish@@fish.png@@apple.png\nb@@the fish@@fish.png")
    (work / "long.txt").write_text(f"a@@{'red ' * 200}apple@@apple.png:apple")
    (work / "four.json").write_text(table_for(model_folder, 4))
    arguments, message = WRONG[case]
    assert message in refused(*arguments)


def test_all_problems_are_reported_together_with_their_lines(work, refused):
    lines = (
        "good@@the red apple@@apple.png",
        "no prompt",
        "missing@@the fish@@pear.png@@plum.png",
        "words@@the fish@@apple.png:apple",
        "Good@@the fish",
        "../@@the fish",
    )
    (work / "cases.txt").write_text("\n".join(lines))
    message = refused("--prompts", "cases.txt")
    for expected in (
        "cases.txt line 2: must be key@@prompt@@image@@image..., it is 'no prompt'",
        "cases.txt line 3: there is no image file 'pear.png'",
        "cases.txt line 3: there is no image file 'plum.png'",
        "cases.txt line 4: Subject 'apple' is not in the prompt",
        "cases.txt line 5: the key 'Good' is taken by cases.txt line 1",
        "cases.txt line 6: key='../' has no letter or digit",
    ):
        assert expected in message
    assert "line 1:" not in message
    options = "--frames 6 --size 7x8 --batch_size 0 --fps -1 --seed -3 --mesh x=1 --out apple.png --solver ddim"
    message = refused("--prompts", "cases.txt", *options.split())
    for words in (
        "frames 6",
        "size 7x8",
        "batch_size 0",
        "fps -1",
        "seed -3",
        "mesh x=1",
        "out apple.png",
        "solver ddim",
    ):
        assert f"--{words}" in message
    assert "line 3" in message


def test_a_folder_that_may_not_be_written_to_is_named(refused, monkeypatch):
    monkeypatch.setattr(outputs.os, "access", lambda path, mode: False)  # tests may run as root, who may do anything
    assert "may not be written to" in refused(*APPLE, "--out", "results")


def test_damaged_weights_end_the_run_before_anything_is_made(model_folder, work):
    manifest = json.loads((model_folder / "MANIFEST.json").read_text())
    name = next(name for name in manifest if name.startswith("dit/"))
    path = model_folder / name
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(SystemExit, match=f"{name} is damaged"):
            make(model_folder, *APPLE)
    finally:
        path.write_bytes(content)
    assert not (work / "outputs").exists()


# --- What is there already.


@pytest.fixture
def finished(model_folder, work, capsys):
    """Three finished cases in `out`, and the arguments that made them."""
    (work / "three.txt").write_text("\n".join(LINES[:3]))
    arguments = ["--prompts", "three.txt", "--out", "out"]
    make(model_folder, *arguments)
    capsys.readouterr()
    return arguments


def refusal(capsys, function, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        function(*arguments)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def test_existing_files_are_kept_or_replaced_as_one_says(model_folder, work, finished, capsys, monkeypatch):
    out = work / "out"
    expected, before = contents(out), identities(out)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "load", lambda *args, **kwargs: pytest.fail("weights were read"))
        message = refusal(capsys, make, model_folder, *finished)
        assert "case_00.mp4" in message
        assert "--resume" in message
        assert "--overwrite" in message
        message = refusal(capsys, make, model_folder, *finished, "--resume", "--seed", "9")
        assert "case_00 was made with other settings (seed 3407, now 9)" in message
        assert identities(out) == before
        # Where nothing is left to do, no weights are needed for it.
        make(model_folder, *finished, "--resume")
    assert statuses(out) == dict.fromkeys(list(PROMPTS)[:3], "kept")
    assert contents(out) == expected
    after = identities(out)
    for name in set(before) - {"run.json", "contact_sheet.png"}:
        assert after[name] == before[name], name

    # A damaged video, and one that is gone, are made again; what is whole stays.
    (out / "case_01.mp4").write_bytes(expected["case_01.mp4"][:-1] + b"?")
    (out / "case_02_canvas.png").unlink()
    (out / ".case_02.mp4.999999999.part").write_bytes(b"left by a process that was killed")
    make(model_folder, *finished, "--resume")
    assert statuses(out) == {"case_00": "kept", "case_01": "written", "case_02": "written"}
    assert contents(out) == expected
    assert identities(out)["case_00.mp4"] == before["case_00.mp4"]

    make(model_folder, *finished, "--overwrite")
    assert contents(out) == expected
    assert identities(out)["case_00.mp4"] != before["case_00.mp4"]
    make(model_folder, *finished, "--resume", "--overwrite", "--seed", "9")
    assert statuses(out) == dict.fromkeys(list(PROMPTS)[:3], "written")
    assert not set(contents(out).items()) & {(name, expected[name]) for name in expected if name.endswith(".mp4")}


# sample.py in a process of its own, that says what the latents are and may be killed after so many videos.
DRIVER = """
import hashlib, os, signal, sys
import sample
from magref_jax import pipeline

generate, replace, left = pipeline.generate, os.replace, int(sys.argv[1])

def generate_and_tell(*args, **kwargs):
    result = generate(*args, **kwargs)
    print("latents", hashlib.sha256(result.latents.tobytes()).hexdigest())
    return result

def replace_and_die(source, target):
    global left
    replace(source, target)
    if str(target).endswith(".mp4"):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

pipeline.generate, os.replace = generate_and_tell, replace_and_die
sample.main(sys.argv[2:])
"""


def process(model_folder, *arguments, videos_before_death=0):
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, videos_before_death, "--model", model_folder, *arguments]
    # Everything that is compiled goes into the cache, however fast this machine compiles.
    more = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.run(
        list(map(str, command)), env=os.environ | more, cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def uninterrupted(model_folder, tmp_path_factory):
    """The arguments of a run in threes, its folder and what it printed."""
    folder = write_inputs(tmp_path_factory.mktemp("uninterrupted"))
    arguments = ["--prompts", folder / "twelve.txt", "--batch_size", 3]
    done = process(model_folder, *arguments, "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return arguments, folder / "out", done.stdout


def latents(printed):
    return [line for line in printed.splitlines() if line.startswith("latents")]


@pytest.mark.skipif(os.name != "posix", reason="there is no kill -9")
@pytest.mark.parametrize(
    "videos", [pytest.param(count, marks=[] if count == 2 else pytest.mark.slow) for count in (1, 2, 3, 5, 8, 11)]
)
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(model_folder, uninterrupted, tmp_path, videos):
    arguments, whole, printed = uninterrupted
    assert names(whole) == files_of(PROMPTS)
    assert len(latents(printed)) == 4
    out = tmp_path / "out"
    killed = process(model_folder, *arguments, "--out", out, videos_before_death=videos)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = [key for key in PROMPTS if (out / f"{key}.json").exists()]
    assert done == list(PROMPTS)[: videos - 1]  # the last one had only its video
    before = {name: identity for name, identity in identities(out).items() if name in files_of(done)}
    assert len(before) == 3 * len(done)

    resumed = process(model_folder, *arguments, "--out", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert names(out) == names(whole)
    assert contents(out) == contents(whole)
    assert before.items() <= identities(out).items()
    assert statuses(out) == {key: "kept" if key in done else "written" for key in PROMPTS}
    # Three processes, and the latents of what was made are the same to the bit.
    assert latents(resumed.stdout) == latents(printed)[len(done) // 3 :]


def test_programs_are_kept_for_the_next_process(uninterrupted):
    kept = pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "magref_jax"
    assert {"jit__encode", "jit__advance", "jit__decode"} <= {path.name.split("-")[0] for path in kept.iterdir()}


# --- What goes wrong on the way.


def spoiled(model, network, part):
    """The model with one NaN in the first kernel below a part of a network."""
    leaves, tree = jax.tree.flatten_with_path(model.params[network])
    paths = ["/".join(key.key for key in path) for path, _ in leaves]
    index = next(index for index, path in enumerate(paths) if path.startswith(part) and path.endswith("kernel"))
    values = [leaf for _, leaf in leaves]
    values[index] = values[index].at[(0,) * values[index].ndim].set(np.nan)
    return dataclasses.replace(model, params=model.params | {network: jax.tree.unflatten(tree, values)})


@pytest.mark.parametrize(
    ("network", "part", "failure"),
    [
        ("dit", "blocks/feed_forward", "the latents are not finite after step 1 of 3"),
        ("vae", "decoder", "the decoded frames are not finite"),
        ("vae", "encoder", "the reference latents are not finite"),
        ("text_encoder", "blocks", "the text embeddings are not finite"),
        ("image_encoder", "blocks", "the image embeddings are not finite"),
    ],
)
def test_nan_in_the_weights_makes_no_video(model_folder, work, capsys, monkeypatch, network, part, failure):
    load = pipeline.load
    monkeypatch.setattr(pipeline, "load", lambda *args, **kwargs: spoiled(load(*args, **kwargs), network, part))
    (work / "two.txt").write_text("\n".join(LINES[:2]))
    with pytest.raises(SystemExit) as exit_info:
        make(model_folder, "--prompts", "two.txt", "--out", "out")
    assert exit_info.value.code == 3
    assert names(work / "out") == {"run.json"}
    assert statuses(work / "out") == dict.fromkeys(("case_00", "case_01"), f"failed: {failure}")
    printed = capsys.readouterr().out
    assert f"case_00: failed: {failure}" in printed
    assert "2 videos: 2 failed" in printed
    assert "next:" not in printed


@pytest.fixture
def three(model_folder, work):
    """Three cases as one batch: their arguments, and the files of a run in which all goes well."""
    lines = ["a@@the apple@@apple.png", "b@@the apple and the fish@@apple.png@@fish.png", "c@@the fish@@fish.png"]
    (work / "three.txt").write_text("\n".join(lines))
    arguments = ["--prompts", "three.txt", "--batch_size", "3", "--out"]
    make(model_folder, *arguments, "good")
    return arguments, contents(work / "good")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_one_case_does_not_touch_the_others(model_folder, work, three, monkeypatch, capsys, value):
    arguments, good = three
    draw = pipeline.draw_noise

    def noise(config, request):
        drawn = np.array(draw(config, request))
        drawn[0, 0, 0, 0] = value if request.key == "b" else drawn[0, 0, 0, 0]
        return drawn

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "draw_noise", noise)
        with pytest.raises(SystemExit) as exit_info:
            make(model_folder, *arguments, "out")
    assert exit_info.value.code == 3
    out = work / "out"
    failure = "failed: the latents are not finite after step 1 of 3"
    assert statuses(out) == {"a": "written", "b": failure, "c": "written"}
    assert names(out) == files_of(["a", "c"])
    assert {name: content for name, content in contents(out).items() if name[0] != "c" or name[1] != "o"} == {
        name: good[name] for name in files_of(["a", "c"]) - {"run.json", "contact_sheet.png"}
    }
    assert "3 videos: 2 written, 1 failed" in capsys.readouterr().out
    # What failed is made when the reason is gone.
    make(model_folder, *arguments, "out", "--resume")
    assert statuses(out) == {"a": "kept", "b": "written", "c": "kept"}
    assert contents(out) == good


@pytest.mark.parametrize(
    ("change", "message"),
    [(pathlib.Path.unlink, "fish.png"), (lambda path: path.write_bytes(b"?"), "fish.png has changed")],
)
def test_a_reference_that_changes_after_it_was_checked_fails_its_cases(
    model_folder, work, three, monkeypatch, change, message
):
    arguments, good = three
    load = pipeline.load

    def load_slowly(*args, **kwargs):
        change(work / "fish.png")
        return load(*args, **kwargs)

    monkeypatch.setattr(pipeline, "load", load_slowly)
    with pytest.raises(SystemExit) as exit_info:
        make(model_folder, *arguments, "out")
    assert exit_info.value.code == 3
    found = statuses(work / "out")
    assert found["a"] == "written"
    for key in "bc":
        assert found[key].startswith("failed: ")
        assert message in found[key]
    assert names(work / "out") == files_of("a")
    for name in files_of("a") - {"run.json", "contact_sheet.png"}:
        assert (work / "out" / name).read_bytes() == good[name]


def test_a_reference_that_disappears_when_its_video_is_made_is_not_on_the_sheet(model_folder, work, three, monkeypatch):
    arguments, good = three
    write_run = outputs.write_run
    monkeypatch.setattr(
        outputs, "write_run", lambda *args, **kwargs: [write_run(*args, **kwargs), (work / "fish.png").unlink()]
    )
    make(model_folder, *arguments, "out")
    made = contents(work / "out")
    assert set(made) == set(good)
    assert {name for name in made if made[name] != good[name]} == {"contact_sheet.png"}


# --- What is full, taken or interrupted.


def full_disk(*names):
    """`files.os.replace`, but for files of these names the disk is full."""
    replace = os.replace

    def refuse(source, target):
        if pathlib.Path(target).name in names:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    return refuse


@pytest.mark.parametrize(
    ("file", "status", "message", "table"),
    [
        ("contact_sheet.png", 0, "no contact sheet: contact_sheet.png: No space left", "1 video: 1 written"),
        ("run.json", 0, "no run.json: run.json: No space left", "1 video: 1 written"),
        ("the_red_apple_rises.mp4", 3, "", "1 video: 1 failed"),
    ],
)
def test_a_full_disk_is_one_line_and_what_was_made_stays(
    model_folder, work, capsys, monkeypatch, file, status, message, table
):
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full_disk(file))
        with contextlib.ExitStack() as stack:
            if status:
                exit_info = stack.enter_context(pytest.raises(SystemExit))
            make(model_folder, *APPLE, "--out", "out")
    assert not status or exit_info.value.code == status
    printed = capsys.readouterr()
    assert message in printed.err.replace(f"{pathlib.Path('out')}{os.sep}", "")
    assert "Errno" not in printed.err + printed.out
    assert table in printed.out
    left = {file, "contact_sheet.png"} | files_of(["the_red_apple_rises"]) if status else {file}
    assert names(work / "out") == files_of(["the_red_apple_rises"]) - (left - {"run.json"} if status else left)


def test_a_full_disk_in_a_dry_run_is_one_sentence(model_folder, work, capsys, monkeypatch):
    monkeypatch.setattr(files.os, "replace", full_disk("the_red_apple_rises_mask.png"))
    message = refusal(capsys, make, model_folder, *APPLE, "--out", "out", "--dry_run")
    assert "sample.py: out/dry_run/the_red_apple_rises_mask.png: No space left on device" in message.replace("\\", "/")
    assert [path.name for path in (work / "out").rglob("*.*")] == ["the_red_apple_rises_canvas.png"]


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_a_folder_that_another_run_writes_to_is_refused(refused, work, more):
    held = files.Claim(work / "out")
    held.take()
    assert f"--out out: out is being written to by process {os.getpid()} on" in refused(*APPLE, "--out", "out", *more)
    held.release()


def test_a_run_that_is_interrupted_says_so_and_leaves_what_it_made(model_folder, work, capsys, monkeypatch):
    (work / "two.txt").write_text("\n".join(LINES[:2]))
    generate, calls = pipeline.generate, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(pipeline, "generate", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        make(model_folder, "--prompts", "two.txt", "--out", "out")
    assert exit_info.value.code == 130
    assert "sample.py: interrupted" in capsys.readouterr().err
    assert names(work / "out") == files_of(["case_00"]) - {"contact_sheet.png"}
    assert statuses(work / "out") == {"case_00": "written"}


@pytest.mark.parametrize(
    ("more", "free", "message"),
    [
        (["--size", "48x32"], 300_000, "48x32 pixels, 5 frames: encoding takes"),
        (["--size", "48x32"], 300_000, "are free; this model is made for 12x8, 5 frames. Less is needed by a smaller"),
        ([], 1000, "memory: the parameters of"),
    ],
)
def test_what_needs_more_memory_than_there_is_is_refused(refused, monkeypatch, more, free, message):
    monkeypatch.setattr(dry_run, "free_memory", lambda mesh: free)
    assert message in refused(*APPLE, "--out", "out", *more)


def test_what_fits_is_made_and_the_usual_size_is_not_compiled_twice(model_folder, work, monkeypatch):
    lowered = []
    monkeypatch.setattr(pipeline, "lower", lambda *args, **kwargs: lowered.append(args) or {})
    monkeypatch.setattr(pipeline, "load", lambda *args, **kwargs: sys.exit(0))
    for words, expected in (([], 0), (["--size", "24x16"], 1)):
        with pytest.raises(SystemExit):
            make(model_folder, *APPLE, *words)
        assert len(lowered) == expected
    assert dry_run.free_memory(None) > 50e6  # of this machine, which runs the tests
    assert dry_run.free_memory(sharding.make_mesh("data=8")) < dry_run.free_memory(None) / 4


def test_a_case_for_which_memory_is_exhausted_fails_and_the_others_are_made(model_folder, work, capsys, monkeypatch):
    (work / "sizes.jsonl").write_text(
        "\n".join(
            json.dumps({"key": key, "prompt": "the apple", "size": size})
            for key, size in {"a": "16x8", "b": "12x8"}.items()
        )
    )
    generate = pipeline.generate

    def exhausted(model, requests, **kwargs):
        if kwargs["width"] == 16:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 46725120000 bytes.")
        return generate(model, requests, **kwargs)

    monkeypatch.setattr(pipeline, "generate", exhausted)
    with pytest.raises(SystemExit) as exit_info:
        make(model_folder, "--prompts", "sizes.jsonl", "--out", "out")
    assert exit_info.value.code == 3
    found = statuses(work / "out")
    assert found["b"] == "written"
    assert found["a"].startswith(
        "failed: memory is exhausted (Out of memory allocating 46725120000 bytes); less is needed by"
    )


# --- What it computes in, and which words it knows.


def test_the_dtype_is_recorded_and_never_mixed(model_folder, work, capsys):
    make(model_folder, *APPLE, "--out", "out", "--dtype", "bfloat16")
    key = "the_red_apple_rises"
    sidecar = json.loads((work / "out" / f"{key}.json").read_text())
    assert sidecar["settings"]["dtype"] == "bfloat16"
    assert read_video(work / "out" / f"{key}.mp4").metadata["dtype"] == "bfloat16"
    run = json.loads((work / "out" / "run.json").read_text())
    networks = ("dit", "vae", "text_encoder", "image_encoder")
    assert (run["dtype"], {run["config"][name]["dtype"] for name in networks}) == ("bfloat16", {"bfloat16"})
    message = refusal(capsys, make, model_folder, *APPLE, "--out", "out", "--resume")
    assert 'made with other settings (dtype "bfloat16", now "float32")' in message

    # What the folder says, said again, is the same.
    make(model_folder, *APPLE, "--out", "float32")
    make(model_folder, *APPLE, "--out", "float32", "--dtype", "float32", "--resume")
    assert statuses(work / "float32") == {key: "kept"}
    assert contents(work / "float32")[f"{key}.mp4"] != contents(work / "out")[f"{key}.mp4"]


def test_unknown_words_are_noted_before_sampling_and_in_a_dry_run(model_folder, work, capsys, monkeypatch):
    words = ["--prompt", "a glorbix moves over the red apple"]
    make(model_folder, *words, "--out", "out", "--dry_run")
    expected = "--prompt: the model does not know 'glorbix' (near it: globe"
    assert expected in capsys.readouterr().err
    monkeypatch.setattr(pipeline, "load", lambda *args, **kwargs: sys.exit(0))
    with pytest.raises(SystemExit):
        make(model_folder, *words, "--out", "out")
    assert expected in capsys.readouterr().err


def test_what_is_documented_is_in_words_that_the_bundled_model_knows(work):
    """The README's places, motions and backgrounds, and every example prompt for the bundled model."""
    root = ROOT.joinpath
    pages = [root("README.md").read_text(encoding="utf-8"), sample.__doc__]
    examples = [
        prompt for page in pages for prompt in re.findall(r'^ *python sample.py --prompt "(.*?)"', page, re.MULTILINE)
    ]
    assert len(examples) >= 2
    world = EmojiWorldConfig()
    listed = {" ".join(words.split()) for words in re.findall(r"[^*]\*([^*]+)\*[^*]", pages[0])}
    backgrounds = {f"{background.place} {name}" for name, background in BACKGROUNDS.items()}
    assert {*PLACES, *world.motions, *backgrounds} <= listed
    examples += [prompt for _, prompt, _ in emoji_examples.EXAMPLES]
    arguments = sample.parser().parse_args([])
    examples += re.findall(r"--prompt '(.*?)'", sample.what_next(None, arguments))
    cases = [
        prompts.Checked(prompts.Entry("", str(index), prompt), SamplingConfig(negative_prompt=""), (), ())
        for index, prompt in enumerate([*examples, *listed])
        if index < len(examples) or prompt.startswith(("at ", "on ", "in ", "over "))
    ]
    checks = Checks()
    batches.check_words(pipeline.load_tokenizer(sample.BUNDLED / "emoji"), cases, "", checks)
    assert checks.notes == []


@pytest.mark.parametrize("option", sample.PATHS)
def test_a_path_of_a_bucket_is_refused_before_anything_runs(refused, option):
    path = "gs://bucket/x.png:fox" if option in ("ref", "background") else "gs://bucket/x"
    given = [] if option in ("prompts", "ref", "background") else APPLE
    more = ["--prompt", "a fox"] if option in ("ref", "background") else []
    for plan in ([], ["--plan", "cpu:8"]):
        assert f"--{option} gs:/" in refused(*given, *more, f"--{option}", path, *plan)


def test_every_path_option_is_known_as_one():
    paths = {action.dest for action in sample.parser()._actions if action.type is pathlib.Path}
    assert paths < set(sample.PATHS)


# --- What is imported.

IMPORTS = """
import contextlib, io, runpy, sys, time
import jax
start = time.perf_counter()
import magref_jax
seconds = time.perf_counter() - start
import magref_jax.pipeline
sys.argv = ["sample.py", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as help, contextlib.suppress(SystemExit):
    runpy.run_path("sample.py", run_name="__main__")
assert "--num_inference_steps" in help.getvalue()
print(jax.config.jax_compilation_cache_dir, seconds < 1.5, *{"torch", "tensorflow", "grain", "gradio"} & set(sys.modules))
"""


def test_help_imports_no_other_framework_and_changes_no_setting():
    command = [sys.executable, "-W", "ignore", "-c", IMPORTS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None", "True"]


def test_where_and_how_python_runs_changes_no_byte(model_folder, work):
    """From another folder, with -O and -W error, without HOME, with spaces, commas, umlauts and colons in names."""
    here = work / "ein Ördner, neu: 1"
    here.mkdir()
    picture((250, 20, 20)).save(here / "ein Äpfel, rot.png")
    options = "--prompt", "the apple rises", "--seed", "5", "--steps", "2", "--no_metadata"
    make(model_folder, *options, "--ref", here / "ein Äpfel, rot.png:apple", "--out", "plain")

    command = [sys.executable, "-O", "-W", "error", str(ROOT / "sample.py"), "--model", str(model_folder), *options]
    command += ["--ref", "ein Äpfel, rot.png:apple", "--out", "aus gabe: 2"]
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    # What conftest.py sets in this process.
    kept |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    done = subprocess.run(
        [*command, "--compile_cache", "none"], cwd=here, env=kept, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "PyTorch" not in done.stdout + done.stderr
    (video,), (expected,) = (here / "aus gabe: 2").glob("*.mp4"), (work / "plain").glob("*.mp4")
    assert video.name == expected.name
    assert video.read_bytes() == expected.read_bytes()


def test_the_compilation_cache_is_where_one_says(model_folder, work, monkeypatch):
    found = []
    monkeypatch.setattr(sample, "keep_compiled_programs", found.append)
    monkeypatch.setattr(pipeline, "load", lambda *args, **kwargs: sys.exit(0))
    for words in ([], ["--compile_cache", "here"], ["--compile_cache=none"]):
        with pytest.raises(SystemExit):
            sample.main(["--model", str(model_folder), *words])
    assert found == [pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "magref_jax", "here"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sample.default_cache() == pathlib.Path.home() / ".cache" / "magref_jax"
