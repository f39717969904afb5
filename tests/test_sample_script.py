"""sample.py from outside: the files it writes, and that whatever is wrong is said by name before anything is done."""

import json
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import sample
from magref_jax import pipeline
from magref_jax.data import emoji_examples, emoji_world
from magref_jax.prompts import Checks, read_image, read_prompt_file, safe_key, split_reference
from magref_jax.video import read_video
from tests.tiny_model import model_folder, picture  # noqa: F401


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture((250, 20, 20)).save("apple.png")
    picture((20, 20, 250)).save("fish.png")
    return tmp_path


def test_without_arguments_the_bundled_examples_become_videos(model_folder, tmp_path):  # noqa: F811
    command = [sys.executable, sample.__file__, "--model", model_folder, "--steps", "2"]
    environment = {"PYTHONPATH": str(pathlib.Path(sample.__file__).parent), "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    keys = [key for key, _, _ in emoji_examples.EXAMPLES]
    expected = {f"{key}{suffix}" for key in keys for suffix in (".mp4", "_canvas.png")} | {"contact_sheet.png"}
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == expected
    assert "4/4" in done.stderr  # two steps of two videos on the progress bar

    video = read_video(tmp_path / "outputs" / f"{keys[0]}.mp4")
    assert len(video.frames) == 4
    assert video.fps == 8
    assert video.metadata["prompt"] == emoji_examples.EXAMPLES[0][1]
    assert (video.metadata["seed"], video.metadata["num_inference_steps"]) == (3407, 2)
    with Image.open(tmp_path / "outputs" / f"{keys[0]}_canvas.png") as canvas:
        assert canvas.width >= 960
    # The last line is a command that would run.
    *_, last = done.stdout.splitlines()
    program, script, *arguments = shlex.split(last.removeprefix("next: "))
    assert (program, script) == ("python", "sample.py")
    parsed = sample.parser().parse_args(arguments)
    assert "penguin" in parsed.prompt
    assert split_reference(parsed.ref[0], tmp_path)[1] == "penguin"


def test_a_prompt_file_becomes_one_video_per_line(model_folder, work, capsys):  # noqa: F811
    lines = (
        "# two cases\n\nfirst@@the red apple rises@@apple.png:red apple\n ../é 2@@the blue fish@@fish.png@@apple.png\n"
    )
    (work / "cases.txt").write_text(lines, encoding="utf-8-sig")
    arguments = "--prompts cases.txt --out made --seed 5 --steps 1 --guidance 1 --shift 5 --solver euler --frames 3"
    arguments += " --size 16x8 --layout v2:input --mesh data=8 --no_metadata --model"
    sample.main([*arguments.split(), str(model_folder)])
    names = ["contact_sheet.png", "first.mp4", "first_canvas.png", "é_2.mp4", "é_2_canvas.png"]
    assert sorted(path.name for path in (work / "made").iterdir()) == names
    video = read_video("made/first.mp4")
    assert video.frames.shape == (2, 256, 512, 3)
    assert video.metadata is None
    assert "next: python sample.py --model" in capsys.readouterr().out


def refused(arguments, model_folder, capsys, monkeypatch):  # noqa: F811
    """Runs sample.py on wrong arguments and returns what it says."""
    monkeypatch.setattr(pipeline, "load", lambda *args, **kwargs: pytest.fail("weights were read"))
    before = sorted(pathlib.Path().rglob("*"))
    with pytest.raises(SystemExit) as exit_info:
        sample.main(["--model", str(model_folder), *arguments])
    assert exit_info.value.code == 2
    assert sorted(pathlib.Path().rglob("*")) == before
    return capsys.readouterr().err


APPLE = ["--prompt", "the red apple rises", "--ref", "apple.png:red apple"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "the apple", "--ref", "pear.png:apple"], "--ref: there is no image file 'pear.png:apple'"),
        (["--prompt", "the apple", "--ref", "apple.png:"], "--ref: 'apple.png:' has no words"),
        (["--prompt", "the apple", "--ref", "text.png"], "--ref: text.png is no image that can be read"),
        (["--prompt", "the apple", "--ref", "cut.png"], "--ref: cut.png is no image that can be read"),
        (
            ["--prompt", "the fish", "--ref", "apple.png:apple"],
            "'apple' is not in the prompt. Words of the prompt: the, fish",
        ),
        (
            ["--prompt", "the fish", *["--ref", "fish.png"] * 4],
            "4 reference images given, but layout 'v1' holds at most 3",
        ),
        (["--prompt", "  "], "--prompt: there are no words in it"),
        (["--ref", "apple.png"], "--ref apple.png: needs --prompt"),
        ([*APPLE, "--prompts", "cases.txt"], "--prompt and --prompts: give one of the two"),
        (["--prompts", "missing.txt"], "missing.txt"),
        (["--prompts", "empty.txt"], "empty.txt: there is no line in it"),
        (["--prompts", "latin.txt"], "latin.txt: 'utf-8' codec can't decode"),
        ([*APPLE, "--size", "70x8"], "--size 70x8: width=70 must be a positive multiple of 4"),
        ([*APPLE, "--size", "big"], "--size big: must be WIDTHxHEIGHT in pixels"),
        ([*APPLE, "--frames", "6"], "--frames 6: num_frames=6 must be 2n + 1"),
        ([*APPLE, "--frames", "1"], "--frames 1: num_frames=1 leaves no video"),
        ([*APPLE, "--steps", "0"], "--steps 0: num_inference_steps=0 must be at least 1"),
        ([*APPLE, "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        ([*APPLE, "--shift", "-1"], "--shift -1.0: flow_shift=-1.0 must be positive"),
        ([*APPLE, "--guidance", "inf"], "--guidance inf: guidance_scale=inf must be a finite number"),
        ([*APPLE, "--solver", "ddim"], "--solver ddim: solver='ddim' is unknown; choose from unipc"),
        ([*APPLE, "--layout", "v3"], "--layout v3: layout='v3' is unknown; choose from v1, v2"),
        ([*APPLE, "--layout", "v2:1,2"], "order=(1, 2) must name each of the 1 references"),
        ([*APPLE, "--mesh", "pipe=8"], "--mesh pipe=8: mesh='pipe=8' names the axis 'pipe'"),
        ([*APPLE, "--out", "apple.png"], "--out apple.png: is a file"),
        ([*APPLE, "--model", "nowhere"], "--model nowhere: "),
        ([*APPLE, "--step", "3"], "unrecognized arguments: --step 3"),
    ],
)
def test_wrong_arguments_are_named(model_folder, work, capsys, monkeypatch, arguments, message):  # noqa: F811
    (work / "text.png").write_text("no picture")
    (work / "cut.png").write_bytes((work / "apple.png").read_bytes()[:-60])
    (work / "empty.txt").write_text("# nothing\n\n")
    (work / "latin.txt").write_bytes("a@@caf\xe9".encode("latin-1"))
    (work / "cases.txt").write_text("a@@the fish")
    assert message in refused(arguments, model_folder, capsys, monkeypatch)


def test_all_problems_of_a_run_are_reported_together_with_their_lines(model_folder, work, capsys, monkeypatch):  # noqa: F811
    (work / "cases.txt").write_text(
        "\n".join(
            (
                "good@@the red apple@@apple.png",
                "no prompt",
                "missing@@the fish@@pear.png@@plum.png",
                "words@@the fish@@apple.png:apple",
                "Good@@the fish",
                "../@@the fish",
            )
        )
    )
    message = refused(["--prompts", "cases.txt"], model_folder, capsys, monkeypatch)
    for expected in (
        "cases.txt line 2: must be key@@prompt@@image@@image..., it is 'no prompt'",
        "cases.txt line 3: there is no image file 'pear.png'",
        "cases.txt line 3: there is no image file 'plum.png'",
        "cases.txt line 4: Subject 'apple' is not in the prompt",
        "cases.txt line 5: the key 'Good' is taken by cases.txt line 1",
        "cases.txt line 6: the key '../' has no letter or digit",
    ):
        assert expected in message
    assert "line 1:" not in message
    message = refused(["--prompts", "cases.txt", "--frames", "6", "--size", "7x8"], model_folder, capsys, monkeypatch)
    assert "--frames 6" in message
    assert "--size 7x8" in message
    assert "line 3" in message


def test_damaged_weights_are_named_and_nothing_is_written(model_folder, work, capsys):  # noqa: F811
    manifest = json.loads((model_folder / "MANIFEST.json").read_text())
    name = next(name for name in manifest if name.startswith("dit/"))
    path = model_folder / name
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(SystemExit, match=f"{name} is damaged"):
            sample.main(["--model", str(model_folder), *APPLE])
    finally:
        path.write_bytes(content)
    assert list((work / "outputs").iterdir()) == []


def test_references_may_have_colons_in_their_names(work):
    (work / "C:").mkdir()
    for name in ("C:/red:one.png", "plain:apple", "fish.png:red"):
        picture((9, 9, 9)).save(work / name, format="PNG")
    for text, file, words in (
        ("apple.png", "apple.png", None),
        ("apple.png:red apple", "apple.png", "red apple"),
        ("C:/red:one.png", "C:/red:one.png", None),
        ("C:/red:one.png: it: red", "C:/red:one.png", "it: red"),
        ("plain:apple", "plain:apple", None),
        ("fish.png:red:fish", "fish.png:red", "fish"),  # though there is a fish.png too
    ):
        assert split_reference(text, pathlib.Path()) == (pathlib.Path(file), words)


def test_files_beside_the_prompt_file_come_before_those_in_the_working_directory(work):
    (work / "cases").mkdir()
    picture((1, 1, 1)).save(work / "cases" / "apple.png")
    assert split_reference("apple.png", work / "cases") == (work / "cases" / "apple.png", None)
    assert split_reference("fish.png", work / "cases") == (pathlib.Path("fish.png"), None)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("demo_1", "demo_1"),
        ("../../etc/passwd", "etc_passwd"),
        ("/abs/path", "abs_path"),
        ("..\\..\\x", "x"),
        (".hidden", "hidden"),
        ("a\0b\nc", "a_b_c"),
        ("猫 and 犬", "猫_and_犬"),
        ("..", ""),
        ("x" * 500, "x" * 120),
    ],
)
def test_keys_are_file_names_that_stay_in_the_folder(text, key):
    assert safe_key(text) == key


def test_a_prompt_file_is_read_like_the_official_one(tmp_path):
    path = tmp_path / "cases.txt"
    path.write_bytes(
        "\ufeff# 说明\r\n\r\n一@@ 一只猫，在海边 @@ a b.png @@@@c.png\r\nplain@@no image\u2028here".encode()
    )
    checks = Checks()
    first, second = read_prompt_file(path, checks)
    assert checks.problems == []
    assert (first.where, first.key, first.prompt) == (f"{path} line 3", "一", "一只猫，在海边")
    assert first.references == ("a b.png", "c.png")
    assert (second.prompt, second.references) == ("no image\u2028here", ())


def test_cut_outs_are_read_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    image = read_image(tmp_path / "clear.png")
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 255, 255))


def test_bundled_examples_are_held_out_and_what_their_command_writes(tmp_path):
    emoji_examples.write_examples(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in emoji_examples.FOLDER.iterdir())
    for name in names:
        if name.endswith(".png"):
            with Image.open(tmp_path / name) as made, Image.open(emoji_examples.FOLDER / name) as shipped:
                assert made.size == (96, 96)
                assert made.mode == "RGBA"
                np.testing.assert_array_equal(np.asarray(made), np.asarray(shipped))
    assert (tmp_path / "examples.txt").read_text() == (emoji_examples.FOLDER / "examples.txt").read_text()
    atlas = emoji_world.load_atlas()
    trained = {atlas.identities[index].name for index in emoji_world.split_identities(atlas)["train"]}
    assert not trained & {pathlib.Path(name).stem for name in names}
    assert [len(references) for _, _, references in emoji_examples.EXAMPLES] == [2, 3]
