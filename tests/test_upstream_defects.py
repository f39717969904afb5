"""A test for each defect of the official scripts that this project must not have, by its number in our list."""

import ast
import hashlib
import os
import pathlib
import random
import re
import subprocess
import sys
import tomllib

import av
import numpy as np
import pytest
from PIL import Image

import sample
from magref_jax import pipeline, prompts, video
from magref_jax.conditioning.canvas import LIMITS, assign, compose_canvas
from magref_jax.config import ModelConfig
from magref_jax.data.emoji_tokenizer import build_tokenizer
from magref_jax.images import read_image
from magref_jax.pipeline import Request, prepare, with_sampling
from tests.tiny_model import CONFIG, WORDS, model_folder, picture  # noqa: F401

ROOT = pathlib.Path(sample.__file__).parent
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250), (250, 0, 250), (0, 0, 0), (90, 90, 90)]
IMAGES = [Image.new("RGB", (20, 20), colour) for colour in COLOURS]
KEYS = [f"case {index}" for index in range(12)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_tokenizer(WORDS, folder / "tokenizer", text_len=CONFIG.dit.text_len)
    return pipeline.load_tokenizer(folder)


def canvases(tokenizer, seed=3407, images=IMAGES):
    """The canvas of each key, as the command line composes it."""
    config = with_sampling(CONFIG, layout="v2", height=32, width=64)
    requests = [Request("the fish", images, seed=seed, key=key) for key in KEYS]
    return [prepare(config, tokenizer, request).canvas for request in requests]


def digest(found):
    return hashlib.sha256(b"".join(canvas.image.tobytes() + canvas.mask.tobytes() for canvas in found)).hexdigest()


@pytest.fixture
def refused(model_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Runs sample.py on something wrong, and returns what it says; it reads no weights and writes nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "load", lambda *args, **kwargs: pytest.fail("weights were read"))
    picture((250, 20, 20)).save("apple.png")

    def run(*arguments):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(SystemExit) as exit_info:
            sample.main(["--model", str(model_folder), "--compile_cache", "none", *arguments])
        assert exit_info.value.code == 2
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return capsys.readouterr().err

    return run


def test_defect_01_canvas_order_is_seeded(tokenizer):
    random.seed(0)
    before = random.getstate()
    first = digest(canvases(tokenizer))
    assert random.getstate() == before
    random.seed(1)
    assert digest(canvases(tokenizer)) == first
    assert digest(canvases(tokenizer, seed=3408)) != first
    orders = {canvas.cells for canvas in canvases(tokenizer)}
    assert len(orders) > 6  # the key counts too: not one order for all cases of a seed


def test_defect_02_every_process_composes_the_same_canvas(tokenizer):
    program = (
        "import pathlib, sys; from magref_jax import pipeline\n"
        "from tests.test_upstream_defects import canvases, digest\n"
        "print(digest(canvases(pipeline.load_tokenizer(pathlib.Path(sys.argv[1])))))"
    )
    folder = pathlib.Path(tokenizer.name_or_path).parent
    environment = {"PYTHONHASHSEED": "7", "JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(folder)]
    other = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert other.stdout.split() == [digest(canvases(tokenizer))], other.stderr


def test_defect_03_regions_belong_to_references_whatever_their_order(tokenizer):
    for canvas in canvases(tokenizer):
        for colour, (x0, y0, x1, y1) in zip(COLOURS, canvas.regions, strict=True):
            assert (canvas.image[y0:y1, x0:x1] == colour).all()
            assert canvas.mask[y0:y1, x0:x1].all()


def test_defect_04_too_many_references_are_an_error_with_the_limit(refused):
    assert LIMITS == {"v1": 3, "v2": 8}
    for layout, limit in LIMITS.items():
        with pytest.raises(ValueError, match=f"{limit + 1} reference images given, but layout '{layout}' .* {limit}"):
            compose_canvas([IMAGES[0]] * (limit + 1), 32, 64, layout)
        message = refused("--prompt", "the fish", "--layout", layout, *["--ref", "apple.png"] * (limit + 1))
        assert f"--prompt: {limit + 1} reference images given, but layout '{layout}' holds at most {limit}" in message


def test_defect_05_the_mask_has_the_frames_that_were_asked_for(tokenizer, refused):
    for num_frames in (3, 5, 17, 49, 81):
        case = prepare(with_sampling(CONFIG, num_frames=num_frames), tokenizer, Request("the fish", IMAGES[:2]))
        assert len(case.region_mask) == (num_frames - 1) / CONFIG.vae.temporal_stride + 1
        assert case.region_mask[0].any()
        assert not case.region_mask[1:].any()
    assert "num_frames=6 must be 2n + 1" in refused("--prompt", "the fish", "--frames", "6")


def test_defect_06_any_size_that_the_networks_can_take(tokenizer, refused):
    for name, size in {
        "480p": (832, 480),
        "480p-portrait": (480, 832),
        "720p": (1280, 720),
        "624x624": (624, 624),
    }.items():
        width, height = prompts.size_of(name)
        assert (width, height) == size
        case = prepare(with_sampling(CONFIG, width=width, height=height), tokenizer, Request("the fish", IMAGES[:2]))
        assert case.canvas.image.shape == (height, width, 3)
        stride = CONFIG.vae.spatial_stride
        assert case.region_mask.shape[1:3] == (height // stride, width // stride)
        with_sampling(ModelConfig(), width=width, height=height)
    with pytest.raises(ValueError, match="height=472 must be a positive multiple of 16"):
        with_sampling(ModelConfig(), height=472)
    assert "width=70 must be a positive multiple of 4" in refused("--prompt", "the fish", "--size", "70x8")


def test_defect_07_cut_outs_lie_on_white(tmp_path):
    path = tmp_path / "cut_out.png"
    Image.new("RGBA", (8, 8), (200, 10, 10, 0)).save(path)
    assert compose_canvas([read_image(path)], 8, 8).image.min() == 255
    strict = compose_canvas([read_image(path, strict_parity=True)], 8, 8).image
    np.testing.assert_array_equal(strict, np.broadcast_to((200, 10, 10), (8, 8, 3)))


def test_defect_08_photographs_stand_upright(tmp_path):
    path = tmp_path / "portrait.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # held so that it must be turned by 90 degrees clockwise
    Image.new("RGB", (40, 20)).save(path, exif=exif)
    assert compose_canvas([read_image(path)], 80, 80).regions == ((20, 0, 60, 80),)
    assert compose_canvas([read_image(path, strict_parity=True)], 80, 80).regions == ((0, 20, 80, 60),)


def test_defect_09_a_prompt_file_is_read_whole_and_as_utf_8_before_the_weights(tmp_path, refused):
    # Blank lines, and a locale whose encoding is another one.
    (tmp_path / "cases.txt").write_bytes("\n一@@一只猫\n\n \nb@@the fish@@apple.png\n".encode())
    program = (
        "import pathlib; from magref_jax import prompts; checks = prompts.Checks()\n"
        "entries = prompts.read_entries(pathlib.Path('cases.txt'), checks)\n"
        "prompts.check_entries(entries, checks, lambda **fields: prompts.SamplingConfig())\n"
        "print(ascii([(entry.key, entry.prompt) for entry in entries]), checks.problems, checks.notes, sep='\\n')"
    )
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    entries, problems, notes = done.stdout.splitlines()
    assert ast.literal_eval(entries) == [("一", "一只猫"), ("b", "the fish")]
    assert ast.literal_eval(problems) == []
    assert ast.literal_eval(notes) == ["cases.txt line 2: has no reference; its canvas stays white."]
    # All that is wrong, at once and with its line.
    (tmp_path / "wrong.txt").write_text("a\n\nb@@the fish@@pear.png\nc@@the fish@@apple.png\nd@@@@apple.png")
    message = refused("--prompts", "wrong.txt")
    assert re.findall("wrong.txt line ([0-9]):", message) == ["1", "3", "5"]


def test_defect_10_a_video_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, refused):
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    video.write_video(tmp_path / "new" / "folder" / "a.mp4", frames, 16)  # the folder is made
    before = (tmp_path / "new" / "folder" / "a.mp4").read_bytes()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        video.write_video(tmp_path / "file" / "a.mp4", frames, 16)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video.av, "open", full)
    with pytest.raises(OSError, match="No space left"):
        video.write_video(tmp_path / "new" / "folder" / "a.mp4", frames + 1, 16)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["a.mp4"]
    assert (tmp_path / "new" / "folder" / "a.mp4").read_bytes() == before
    assert "--out file: " in refused("--prompt", "the fish", "--out", "file")


def test_defect_11_names_stay_in_the_folder_and_nothing_is_overwritten_unasked(tmp_path, refused):
    out = tmp_path / "out"
    for key in ("../../x", "/abs/p", "..\\..\\x", "C:\\x", "a/../../b", "\0", "con", "x" * 300, "～/x", "$HOME/x"):
        name = prompts.safe_key(key)
        assert (out / f"{name}.mp4").resolve().parent == out
        assert len(os.fsencode(f"{name}_canvas.png")) < 255
    (tmp_path / "two.txt").write_text("demo_1@@the fish\nDemo_1@@the red fish")
    assert "two.txt line 2: the key 'Demo_1' is taken by two.txt line 1" in refused("--prompts", "two.txt")
    # The same keys in a second file, to the same folder.
    (tmp_path / "other.txt").write_text("demo_1@@the fish")
    out.mkdir()
    (out / "demo_1.mp4").write_text("an hour of work")
    message = refused("--prompts", "other.txt", "--out", "out")
    assert "demo_1" in message
    assert "--overwrite" in message


def test_defect_12_no_shell_script_makes_the_names_of_folders():
    scripts = [path for path in ROOT.rglob("*.sh") if not {".git", ".venv", "build"} & set(path.parts)]
    assert scripts == []
    # What a shell would have expanded stays as it is.
    assert sample.parser().parse_args(["--out", "single_id_${now}"]).out == pathlib.Path("single_id_${now}")
    assert not re.search(r"expandvars|os\.system|shell=True", "".join(path.read_text() for path in SOURCES))


def test_defect_13_sixteen_frames_per_second(tmp_path):
    assert ModelConfig().fps == 16
    video.write_video(tmp_path / "a.mp4", np.zeros((3, 16, 16, 3), np.uint8), ModelConfig().fps)
    with av.open(tmp_path / "a.mp4") as container:
        assert container.streams.video[0].average_rate == 16
        assert [frame.time for frame in container.decode(video=0)] == [0, 1 / 16, 2 / 16]


SOURCES = [
    *sorted((ROOT / "magref_jax").rglob("*.py")),
    *sorted(ROOT.glob("*.py")),
    *sorted((ROOT / "configs").glob("*.py")),
]
# Calls that may run what a file says.
UNSAFE = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "marshal.loads", "dill.load"}


def test_defect_14_no_file_can_run_code():
    loads = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert name not in UNSAFE, f"{path} line {node.lineno}"
            assert keywords.get("allow_pickle", "False") == "False", f"{path} line {node.lineno}"
            if name == "torch.load":
                loads.append((path.name, keywords.get("weights_only")))
    assert loads
    assert all(weights_only == "True" for _, weights_only in loads)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (torch,) = [requirement for requirement in extras["convert"] if requirement.startswith("torch")]
    assert tuple(map(int, torch.removeprefix("torch>=").split("."))) >= (2, 10)


def test_a_seed_is_the_shuffle_of_the_official_code():
    # `random.seed(s)`, then two shuffles: what the official code would have drawn, had it been seeded.
    for seed in range(20):
        random.seed(seed)
        references, cells = list(range(5)), list(range(6))
        random.shuffle(references)
        random.shuffle(cells)
        cell_of = assign(5, "v2", seed)
        assert [cell_of[reference] for reference in references] == cells[:5]
