"""Every command of README.md and docs: on tiny inputs, with its inputs missing, and where its output cannot be written.

Commands are read from the pages. One that is new or changed fails here until `ROWS` says how to run it.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import pathlib
import re
import runpy
import shlex
import shutil
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import pytest

import sample
from magref_jax.convert.tensor_files import write_safetensors
from magref_jax.data.prepare import Cut, prepare
from magref_jax.video import write_video
from tests import torch_folders
from tests.data.test_open_s2v import entry
from tests.tiny_model import picture, write_model
from tests.training import tiny_run

ROOT = pathlib.Path(sample.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODEL = dataclasses.replace(tiny_run.MODEL, dit=dataclasses.replace(tiny_run.MODEL.dit, attention="auto"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# --- Reading the pages.


def blocks(page: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Language and content of the code blocks."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def split(text: str) -> Iterator[list[str]]:
    """The commands of a block as words, without comments, variables and what starts them elsewhere."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
                continue
            while words and (words[0] == "srun" or re.match(r"\w+=", words[0])):
                words.pop(0)
            if "--command" in words:  # of gcloud: what runs on the machines
                yield from split(words[words.index("--command") + 1])
            if words:
                yield words
            words = []


def commands() -> list[tuple[str, list[str]]]:
    """Every command with its page: lines of `sh` and `text` blocks, and what stands between backticks in the prose."""
    found = []
    for page in PAGES:
        for language, content in blocks(page):
            parts = list(split(content)) if language in ("sh", "text") else []
            if parts and not parts[0][0].endswith("/"):  # that is a list of files
                found += [(page.name, words) for words in parts]
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for text in re.findall(r"`([^`]+)`", prose):
            if re.match(r"(\w+=\S* )?(python3?|pip|pytest|uv)\s", text):
                found += [(page.name, words) for words in split(" ".join(text.split()))]
    return found


# What stands for something else on the pages.
STANDS_FOR = {"MODEL": "models/magref", "PRESET": "configs/smoke.py", "ROW": "region", "S": "0"}
FRAGMENTS = {
    "magref_jax.data.precompute --part 0/8": "magref_jax.data.precompute records --model models/magref --out encoded --part 0/8",
}


def filled(words: Sequence[str]) -> tuple[str, ...]:
    """The words as one would type them."""
    text = " ".join(words[2:]) if words[1] == "-m" else ""
    if text in FRAGMENTS:
        words = [*words[:2], *FRAGMENTS[text].split()]
    subjects = " and ".join(f"the {word.rpartition(':')[2]}" for word in words if word.endswith(":dog"))
    typed = []
    for before, word in itertools.pairwise(["", *words]):
        if word in ("…", "...") and before != "--prompt":
            continue  # options of one's own
        word = subjects if word == "…" else STANDS_FOR.get(word, word)
        typed.append(re.sub(r"^/(mnt/)?shared/", "shared/", word))
    return tuple(typed)


ALL = commands()
FOREIGN = ("zero_to_fp32.py",)  # scripts of others, which DeepSpeed leaves beside its checkpoints
PYTHON = sorted({filled(words) for _, words in ALL if words[0] == "python" and words[1] not in FOREIGN})


# --- Inputs, by the names that they have on the pages.

INPUTS: dict[str, Callable[[pathlib.Path], object]] = {}  # each writes into a folder that becomes the working directory


def is_input(name: str) -> bool:
    return name in INPUTS or name.endswith(".png")


def write_input(folder: pathlib.Path, name: str) -> None:
    if name in INPUTS:
        INPUTS[name](folder)
    else:
        picture((200, 40, 40)).save(folder / name)


def makes(*names: str) -> Callable[[Callable[[pathlib.Path, str], object]], None]:
    def register(write: Callable[[pathlib.Path, str], object]) -> None:
        for name in names:
            INPUTS[name] = functools.partial(write, name=name)

    return register


@makes("models/magref", "magref_jax/bundled/emoji", "OUT")
def _(folder: pathlib.Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_model(folder / name, MODEL)


@makes("cases.json")
def _(folder: pathlib.Path, name: str) -> None:
    picture((200, 40, 40)).save(folder / "apple.png")
    case = {"prompt": "the red apple rises", "img_paths": ["apple.png"], "class_label": ["red apple"]}
    (folder / name).write_text(json.dumps({"one": case}))


@makes("cases.txt")
def _(folder: pathlib.Path, name: str) -> None:
    picture((200, 40, 40)).save(folder / "apple.png")
    (folder / name).write_text("".join(f"case_{n}@@the red apple rises@@apple.png:apple\n" for n in range(4)))


@makes("magref_cache.json")
def _(folder: pathlib.Path, name: str) -> None:
    steps = MODEL.sampling.num_inference_steps
    table = {"model": "tiny", "sampling": dataclasses.asdict(MODEL.sampling), "cases": 1, "max_skips": 3}
    table |= {"keep_first": 0.0, "ratios": [1.0] * steps, "spread": [0.0] * steps, "measured": []}
    (folder / name).write_text(json.dumps(table))


@makes("style.safetensors", "few_step.safetensors", "runs/lora/lora.safetensors")
def _(folder: pathlib.Path, name: str) -> None:
    dim = MODEL.dit.dim
    shapes = {
        f"blocks.0.self_attn.q.{end}.weight": shape for end, shape in (("lora_A", (2, dim)), ("lora_B", (dim, 2)))
    }
    specs = {key: (np.dtype(np.float32), shape) for key, shape in shapes.items()}
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / name, specs, lambda key: np.ones(shapes[key], np.float32))


@makes("MAGREF")
def _(folder: pathlib.Path, name: str) -> None:
    torch_folders.write_official(folder / name)


def write_clips(folder: pathlib.Path) -> pathlib.Path:
    ramp = np.linspace(0, 255, 24, dtype=np.uint8)[:, None, None, None]
    write_video(folder / "dog.mp4", np.broadcast_to(ramp, (24, 48, 64, 3)), 8.0)
    picture((200, 40, 40)).save(folder / "clip.png")
    line = {"video": "dog.mp4", "caption": "a red apple rises", "references": [{"image": "clip.png", "label": "apple"}]}
    (folder / "clips.jsonl").write_text("".join(json.dumps(line | {"start": n / 8}) + "\n" for n in range(8)))
    return folder / "clips.jsonl"


@makes("clips.jsonl")
def _(folder: pathlib.Path, name: str) -> None:
    write_clips(folder)


@makes("records", "data/train", "data/encoded")
def _(folder: pathlib.Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (clips := folder / "clips").mkdir()
    prepare(write_clips(clips), folder / name, Cut(24, 32, 4, 8.0, "frames"))
    shutil.rmtree(clips)


@makes("annotations.json")
def _(folder: pathlib.Path, name: str) -> None:
    (folder / name).write_text(json.dumps({"one": entry("a.mp4")}))


@makes("VIDEOS")
def _(folder: pathlib.Path, name: str) -> None:
    (folder / name).mkdir()
    write_video(folder / name / "a.mp4", np.zeros((24, 70, 104, 3), np.uint8), 12.0)


@makes("pairs.json")
def _(folder: pathlib.Path, name: str) -> None:
    (folder / name).write_text("[]")


# --- How each is run.


@dataclasses.dataclass(frozen=True)
class Row:
    """How commands are run that begin as `pattern` says."""

    pattern: str
    output: str | int | None  # the option, or the place, of what it writes to; None: nothing
    tiny: str = ""  # options that make it small
    also: tuple[str, ...] = ()  # inputs that the command does not name
    covered: str = ""  # the test that runs it, where it takes too long for here
    slow: bool = False


DIT_SETTINGS = " ".join(
    f"--set dit.{name}={getattr(MODEL.dit, name)}"
    for name in ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len", "image_dim", "freq_dim")
)
TINY_TRAINING = "--num-steps 1 --config.task.folder models/magref --config.task.phases.0.batch-size 8"
TRAINS_A_TASK = "tests/training/test_tasks.py::test_full_training_changes_every_parameter_and_writes_a_model_folder"
PINNED = "tests/convert/test_conversion.py::test_repositories_of_the_hub_are_pinned_and_bring_no_code"
FITS = "tests/test_machines.py::test_it_fits"
ROWS = (
    Row("sample.py --model magref-14b --plan", None, covered=FITS),
    Row("sample.py .*--plan", None, "--plan h100:8", slow=True),
    Row("sample.py .*--mesh", "--out", slow=True),
    Row("sample.py .*--prompts", "--out", "--model models/magref --compile_cache none"),
    Row("sample.py", "--out", "--model models/magref --compile_cache none"),
    Row("convert_torch_weights.py MAGREF-Video/MAGREF@COMMIT", None, also=("a repository",), covered=PINNED),
    Row("convert_torch_weights.py .* --verify", None),
    Row("convert_torch_weights.py .*.safetensors", 3, DIT_SETTINGS),
    Row("convert_torch_weights.py", 3),
    Row("train.py configs/smoke.py --help", None),
    Row(
        "train.py configs/smoke.py .*--coordinator", "--output-dir", covered="tests/test_distributed.py::test_two_proc"
    ),
    Row("train.py configs/smoke.py", "--output-dir", covered="tests/test_train.py::test_the_first_loss_is_that"),
    Row("train.py configs/emoji_vae.py", "--output-dir", covered="tests/training/test_tasks.py::test_vae_and_then"),
    Row("train.py configs/emoji", "--output-dir", covered=TRAINS_A_TASK),
    Row("train.py configs/magref_14b.*--plan", None, also=("models/magref",), covered=FITS),
    Row("train.py configs/magref_14b", "--output-dir", TINY_TRAINING, ("models/magref", "data/train"), slow=True),
    Row("-m magref_jax.data.prepare", "--out", "--size 24x32 --num-frames 4 --fps 8"),
    Row("-m magref_jax.data.open_s2v", "--out"),
    Row("-m magref_jax.data.precompute", "--out", "--layouts 1 --mesh data=-1", slow=True),
    Row("-m magref_jax.benchmark", "--json", covered="tests/test_benchmark.py::test_"),
    Row("-m magref_jax.machines", 3, covered=FITS),
    Row("-m magref_jax.evaluation.cost_growth", 3, covered="tests/evaluation/test_cost_growth.py::test_counted"),
    Row("-m magref_jax.evaluation.step_cache .*--prompts", "--out", slow=True),
    Row(
        "-m magref_jax.evaluation.step_cache",
        "--out",
        covered="tests/evaluation/test_step_cache.py::test_the_table_has",
    ),
    Row(
        "-m magref_jax.evaluation.emoji_benchmark",
        "--out",
        covered="tests/evaluation/test_emoji_metrics.py::test_bench",
    ),
    Row("-m magref_jax.evaluation.ablation run", "--out", covered="tests/evaluation/test_ablation.py::test_rows_train"),
)


def row_of(words: Sequence[str]) -> Row:
    return next(row for row in ROWS if re.match(row.pattern, " ".join(words[1:])))


def is_known(words: Sequence[str]) -> bool:
    return any(re.match(row.pattern, " ".join(words[1:])) for row in ROWS)


def output_place(words: Sequence[str], row: Row) -> int | None:
    """Where among the words the output stands."""
    if isinstance(row.output, int):
        return row.output if row.output < len(words) else None
    return words.index(row.output) + 1 if row.output in words else None


def inputs_of(words: Sequence[str], row: Row, options: Sequence[str] = ()) -> list[str]:
    """The inputs that a command names, with those that it does not."""
    place = output_place(words, row)
    named = [*(word for index, word in enumerate(words) if index != place), *options]
    names = [name for word in named for name in (word.rstrip("/"), word.partition(":")[0]) if is_input(name)]
    return list(dict.fromkeys([*names, *row.also]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], None]:
    """Puts an input into the working directory; each is made once."""

    @functools.cache
    def made(name: str) -> pathlib.Path:
        write_input(folder := tmp_path_factory.mktemp("input"), name)
        return folder

    return lambda name: shutil.copytree(made(name), pathlib.Path(), dirs_exist_ok=True)


@pytest.fixture(autouse=True)
def _work(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    settings = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_platforms")}
    yield
    for name, value in settings.items():
        jax.config.update(name, value)


@dataclasses.dataclass
class Done:
    """What came of a command."""

    status: int
    text: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str]], Done]:
    """Runs a command as `python` does, in this process: an exception would be a traceback there, and is one here."""

    def start(words: Sequence[str]) -> Done:
        is_module = words[1] == "-m"
        monkeypatch.setattr(sys, "argv", [words[2], *words[3:]] if is_module else [*words[1:]])
        capsys.readouterr()
        status, said = 0, ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the module has been imported before
            try:
                if is_module:
                    runpy.run_module(words[2], run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(str(ROOT / words[1]), run_name="__main__")
            except SystemExit as stop:
                # A text is printed by the interpreter, and the status is 1.
                status, said = (1, stop.code) if isinstance(stop.code, str) else (stop.code or 0, "")
        printed = capsys.readouterr()
        return Done(status, f"{printed.out}{printed.err}{said}")

    return start


def everything() -> set[str]:
    return {str(path) for path in pathlib.Path().rglob("*")}


def check_sentence(done: Done, before: set[str], at_most: int = 3) -> None:
    assert done.status in (1, 2), done.text
    assert 1 <= len(done.text.strip().splitlines()) <= at_most, done.text
    assert "Traceback" not in done.text
    assert "Errno" not in done.text
    assert everything() == before


def name(words: Sequence[str]) -> str:
    return shlex.join(words[1:])


KNOWN = [words for words in PYTHON if is_known(words)]


def test_it_is_known_how_to_run_each():
    assert len(PYTHON) > 30
    unknown = [shlex.join(words) for words in PYTHON if not is_known(words)]
    assert not unknown, "new on the pages; say in ROWS how to run it"
    for row in ROWS:
        assert any(row_of(words) is row for words in KNOWN), f"no page has {row.pattern}"


@pytest.mark.parametrize("words", [words for words in KNOWN if inputs_of(words, row_of(words))], ids=name)
def test_with_its_inputs_missing_it_says_so_in_a_sentence(words, run):
    # sample.py has a line for each that is missing.
    check_sentence(run(words), set(), at_most=max(3, 1 + len(inputs_of(words, row_of(words)))))


@pytest.mark.parametrize("words", [words for words in KNOWN if row_of(words).output is not None], ids=name)
def test_where_its_output_cannot_be_written_it_says_so_in_a_sentence(words, run, place):
    """Below a file nobody can make a folder; permissions would not stop the superuser."""
    row = row_of(words)
    options = row.tiny.split()
    for each in inputs_of(words, row, options):
        place(each)
    pathlib.Path("taken").touch()
    if (index := output_place(words, row)) is not None:
        words = [*words[:index], "taken/out", *words[index + 1 :]]
    else:
        words = [*words, "taken/out"] if isinstance(row.output, int) else [*words, str(row.output), "taken/out"]
    before = everything()
    done = run([*words, *options])
    check_sentence(done, before)
    assert "taken" in done.text


HERE = [words for words in KNOWN if not row_of(words).covered]


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, id=name(words), marks=pytest.mark.slow if row_of(words).slow else ()) for words in HERE],
)
def test_on_tiny_inputs_it_runs(words, run, place):
    row = row_of(words)
    options = row.tiny.split()
    for each in inputs_of(words, row, options):
        place(each)
    before = everything()
    done = run([*words, *options])
    assert done.status == 0, done.text
    assert "Traceback" not in done.text
    made = {path for path in everything() - before if pathlib.Path(path).is_file()}
    if row.output is None:
        assert not made
    else:
        index = output_place(words, row)
        where = "" if index is None else words[index].rstrip("/")
        assert any(path.startswith(where) and pathlib.Path(path).stat().st_size for path in made)


def test_what_is_said_to_be_run_elsewhere_is():
    for row in ROWS:
        if row.covered:
            file, _, test = row.covered.partition("::")
            assert re.search(rf"^def {test}", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), row.covered


# --- The others.


def test_what_is_installed_and_tested_exists():
    """Extras, markers, options of the suite and paths that the pages name."""
    extras = set(PROJECT["project"]["optional-dependencies"])
    markers = {text.partition(":")[0] for text in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    for page, words in ALL:
        text = f"{page}: {shlex.join(words)}"
        if "pip" in words:
            for wanted in re.findall(r"(?:^|\s)\.\[(\w+)\]", " ".join(words)):
                assert wanted in extras, text
        elif words[0] == "pytest":
            for before, word in itertools.pairwise(words):
                if before == "-m":
                    assert set(re.findall(r"\w+", word)) - {"or", "not", "and"} <= markers, text
                elif before == "-k":
                    assert word in (ROOT / words[1]).read_text(encoding="utf-8"), text
                elif word.endswith(".py"):
                    assert (ROOT / word).is_file(), text
        else:
            # Programs that are not ours, and `python3 -m venv`.
            assert words[0] in ("python", "uv", "gcloud", ".", "cd") or words[:3] == ["python3", "-m", "venv"], text
    for page in PAGES:
        for extra in re.findall(r"`\"\.\[(\w+)\]\"`", page.read_text(encoding="utf-8")):
            assert extra in extras, f"{page.name}: {extra}"


def test_python_blocks_are_valid_and_import_what_is_there():
    imported = 0
    for page in PAGES:
        for language, content in blocks(page):
            if language != "python":
                continue
            compile(content, page.name, "exec")
            for module, names in re.findall(r"^from (magref_jax[\w.]*) import ([\w, ]+)", content, re.MULTILINE):
                found = importlib.import_module(module)
                for each in map(str.strip, names.split(",")):
                    imported += 1
                    assert hasattr(found, each) or importlib.import_module(f"{module}.{each}"), f"{page.name}: {each}"
    assert imported
