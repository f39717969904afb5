"""Cases, batches and what happens to them, with a stand-in for the model."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from magref_jax import batches, outputs, pipeline, prompts
from magref_jax.batches import RunSettings, make_batches, plan_case
from magref_jax.conditioning.canvas import compose_canvas
from magref_jax.conditioning.case import Case
from magref_jax.diffusion.step_cache import StepPlan
from magref_jax.prompts import Checks, Entry, Reference
from tests.tiny_model import CONFIG, model_folder, picture  # noqa: F401

RUN = RunSettings(seed=7, fps=8.0, model={"file": "tiny", "sha256": "aa"}, dtype="float32")


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture((250, 20, 20)).save("apple.png")
    picture((20, 20, 250)).save("fish.png")
    return tmp_path


def checked(*entries, config=CONFIG):
    """Entries as sample.py has checked them."""
    checks = Checks()
    found = prompts.check_entries(entries, checks, lambda **given: pipeline.with_sampling(config, **given).sampling)
    assert checks.problems == []
    return found


APPLE = Reference(pathlib.Path("apple.png"), "apple")


def entry(key, prompt="the apple", references=(APPLE,), **overrides):
    return Entry(f"line {key}", key, prompt, tuple(references), overrides)


def plan(*entries, run=RUN):
    return [plan_case(case, run) for case in checked(*entries)]


# --- One case.


def test_a_case_knows_all_its_files_depend_on(work):
    (case,) = plan(
        entry("a", "the red apple", [Reference(pathlib.Path("apple.png"), "red apple", "background")], seed=3)
    )
    run = dataclasses.replace(RUN, order="input", step_plan=StepPlan.full(3), strict_parity=True, store_metadata=False)
    (other,) = plan(entry("b", num_frames=3, negative_prompt="fish"), run=run)
    assert case.settings["references"] == [
        outputs.file_settings(work / "apple.png") | {"words": "red apple", "role": "background"}
    ]
    assert (case.key, case.settings["seed"], case.settings["order"], case.settings["step_plan"]) == ("a", 3, None, None)
    assert case.sampling == CONFIG.sampling
    assert case.digest == outputs.case_digest(case.settings)
    settings = other.settings
    assert (settings["seed"], settings["order"], settings["step_plan"]["evaluate"]) == (7, "input", (True,) * 3)
    assert (settings["strict_parity"], settings["store_metadata"]) == (True, False)
    assert settings["sampling"] == vars(CONFIG.sampling) | {"num_frames": 3, "negative_prompt": "fish"}
    request = case.request()
    assert (request.prompt, request.key, request.seed, request.roles) == ("the red apple", "a", 3, ("background",))
    assert [subject.words for subject in request.subjects] == ["red apple"]
    assert (other.request().negative_prompt, other.request().order) == ("fish", "input")
    assert json.loads(json.dumps(settings))["sampling"] == settings["sampling"]


def test_another_picture_under_the_same_name_is_another_case_and_not_read_as_the_first(work):
    (before,) = plan(entry("a"))
    assert before.read_images()[0].getpixel((19, 19)) == (250, 20, 20)
    picture((20, 250, 20), (21, 21)).save("apple.png")
    (after,) = plan(entry("a"))
    assert after.digest != before.digest
    with pytest.raises(ValueError, match="apple.png has changed since it was checked"):
        before.request()
    (work / "apple.png").unlink()
    with pytest.raises(OSError, match="apple.png"):
        after.request()


def test_strict_parity_reads_what_is_under_transparent_pixels(work):
    image = picture((250, 20, 20)).convert("RGBA")
    image.putalpha(0)
    image.save("apple.png")
    (case,) = plan(entry("a"))
    (strict,) = plan(entry("a"), run=dataclasses.replace(RUN, strict_parity=True))
    assert case.read_images()[0].getpixel((19, 19)) == (255, 255, 255)
    assert strict.read_images()[0].getpixel((19, 19)) == (250, 20, 20)


# --- Batches.


def keys(work):
    return [[case.key for case in batch] for batch in work]


def test_batches_hold_one_shape_in_the_order_of_the_lines(work):
    small = {"num_frames": 3}
    cases = plan(
        *(entry(str(index)) for index in range(3)),
        entry("s0", **small),
        entry("3", negative_prompt="fish", seed=9),  # neither is part of the shape
        entry("s1", **small),
        entry("4"),
        entry("tall", height=12, width=8),
    )
    assert keys(make_batches(cases, 2)) == [["0", "1"], ["2", "3"], ["4"], ["s0", "s1"], ["tall"]]
    assert keys(make_batches(cases, 8)) == [["0", "1", "2", "3", "4"], ["s0", "s1"], ["tall"]]
    assert make_batches([], 2) == []


# --- Text tokens.


@pytest.fixture(scope="module")
def tokenizer(model_folder):  # noqa: F811
    return pipeline.load_tokenizer(model_folder)


def with_text_len(text_len):
    return dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, text_len=text_len))


@pytest.mark.parametrize(
    ("words", "expected"),
    [(10, 64), (62, 64), (63, 128), (120, 128), (199, 200), (500, 200)],  # a bucket more where the end of text needs it
)
def test_all_cases_see_as_many_tokens_as_the_longest_needs(work, tokenizer, words, expected):
    config, checks = with_text_len(200), Checks()
    entries = [entry("a"), entry("b", "red " * words, ())]
    assert batches.check_tokens(config, tokenizer, checked(*entries, config=config), checks) == expected
    negative = [entry("a", negative_prompt="red " * words)]
    assert batches.check_tokens(config, tokenizer, checked(*negative, config=config), checks) == expected
    assert checks.problems == []


def test_words_that_no_token_is_left_for_are_refused_and_a_cut_prompt_is_told(work, tokenizer):
    checks = Checks()
    entries = [entry("early", f"apple {'red ' * 60}"), entry("late", f"{'red ' * 60}apple")]
    assert batches.check_tokens(CONFIG, tokenizer, checked(*entries), checks) == 40
    assert [note.partition(":")[0] for note in checks.notes] == ["line early", "line late"]
    # Forty tokens are "apple", 38 times "red" and the end.
    assert checks.notes[0].endswith(
        f"the model reads 40 tokens of the prompt; not seen are its last {22 * 4 - 1} characters, "
        "from 'red red red red red red red red red red ' on."
    )
    (problem,) = checks.problems
    assert problem.startswith("line late: Subject 'apple'")
    assert batches.check_tokens(CONFIG, tokenizer, [], Checks()) == 40
    checks = Checks()
    negative = checked(entry("negative", negative_prompt="red " * 39), entry("fits", "red " * 39, ()))
    assert batches.check_tokens(CONFIG, tokenizer, negative, checks) == 40
    assert checks.notes == []
    negative = checked(entry("negative", negative_prompt="red " * 40))
    assert batches.check_tokens(CONFIG, tokenizer, negative, checks) == 40
    assert checks.notes == [
        "line negative: the model reads 40 tokens of the negative prompt; not seen are its last 3 characters, from 'red' on."
    ]


# --- Runs.


@dataclasses.dataclass
class Stage:
    """In place of a model: what it was asked for, and what it is to do."""

    config = CONFIG
    asked: list = dataclasses.field(default_factory=list)
    failing: dict = dataclasses.field(default_factory=dict)

    def generate(self, model, requests, *, on_step, step_plan, batch_size, text_tokens, **sampling):
        assert model is self
        self.asked.append(([request.key for request in requests], batch_size, text_tokens, sampling["num_frames"]))
        for step in range(sampling["num_inference_steps"]):
            on_step(step)
        for request in requests:
            canvas = compose_canvas(request.images, sampling["height"], sampling["width"])
            frames = np.full((sampling["num_frames"] - 1, 8, 12, 3), sum(request.key.encode()) % 256, np.uint8)
            yield pipeline.Video(frames, Case("", canvas, *[None] * 5), self.failing.get(request.key))


@pytest.fixture
def stage(monkeypatch, work):
    stage = Stage()
    monkeypatch.setattr(pipeline, "generate", stage.generate)
    return stage


def run(stage, cases, out, batch_size=2, **options):
    clock = batches.Clock()
    work = make_batches(cases, batch_size)
    reports = list(
        batches.run_batches(
            stage, work, out, batch_size=batch_size, text_tokens=40, step_plan=None, clock=clock, **options
        )
    )
    return {report.key: report for report in reports}, clock.seconds


def test_a_run_makes_batches_and_reports_every_case(stage, work):
    cases, seen, steps = plan(*map(entry, "abcde")), [], []
    options = {"on_batch": lambda batch: seen.append([case.key for case in batch]), "on_step": steps.append}
    reports, seconds = run(stage, cases, work / "out", **options)
    assert stage.asked == [(["a", "b"], 2, 40, 5), (["c", "d"], 2, 40, 5), (["e"], 2, 40, 5)]
    assert seen == [["a", "b"], ["c", "d"], ["e"]]
    assert steps == [0, 1, 2] * 3
    assert list(reports) == list("abcde")
    assert {report.status for report in reports.values()} == {"written"}
    assert set(seconds) == {"sampling", "writing"}
    for case in cases:
        assert outputs.is_finished(work / "out", case.key, case.digest)
    report = reports["c"]
    assert (report.height, report.width, report.num_frames, report.num_inference_steps) == (8, 12, 4, 3)
    assert report.num_bytes == (work / "out" / "c.mp4").stat().st_size
    assert report.seconds > 0
    assert report.seconds_per_step > 0


def test_finished_cases_are_computed_beside_the_others_of_their_batch_and_left_alone(stage, work):
    cases = plan(*map(entry, "abcd"))
    run(stage, cases, work / "out")
    before = {path: path.stat().st_mtime_ns for path in (work / "out").iterdir()}
    stage.asked.clear()
    seen = []
    reports, _ = run(
        stage,
        cases,
        work / "out",
        kept=frozenset("abc"),
        on_batch=lambda batch: seen.append([case.key for case in batch]),
    )
    assert [asked[0] for asked in stage.asked] == [["c", "d"]]  # nothing for a batch that is finished
    assert seen == [["d"]]
    assert [report.status for report in reports.values()] == ["kept", "kept", "kept", "written"]
    after = {path: path.stat().st_mtime_ns for path in (work / "out").iterdir()}
    assert {path.name for path in after if after[path] != before[path]} == {"d.mp4", "d.json", "d_canvas.png"}


def test_what_fails_is_reported_and_the_others_are_made(stage, work, monkeypatch):
    shared = [Reference(pathlib.Path("fish.png"))]
    cases = plan(
        entry("good"), entry("nan"), entry("gone", references=shared), entry("full"), entry("alone", references=shared)
    )
    (work / "fish.png").unlink()
    stage.failing["nan"] = "the latents are not finite after step 2 of 3"
    write = outputs.write_case

    def write_case(out, settings, *args):
        if settings["key"] == "full":
            raise OSError(28, "No space left on device")
        return write(out, settings, *args)

    monkeypatch.setattr(outputs, "write_case", write_case)
    reports, _ = run(stage, cases, work / "out")
    assert {key: report.status.partition(": ")[0] for key, report in reports.items()} == {
        "good": "written",
        "nan": "failed",
        "gone": "failed",
        "full": "failed",
        "alone": "failed",
    }
    assert reports["nan"].status == "failed: the latents are not finite after step 2 of 3"
    assert "fish.png" in reports["gone"].status
    assert "No space left" in reports["full"].status
    assert (reports["nan"].num_frames, reports["nan"].num_bytes) == (4, None)
    assert [asked[0] for asked in stage.asked] == [["good", "nan"], ["full"]]  # the last batch had nothing left to make
    assert {path.name for path in (work / "out").iterdir()} == {"good.mp4", "good.json", "good_canvas.png"}
    assert outputs.summary_table(list(reports.values())).splitlines()[-1].startswith("5 videos: 1 written, 4 failed")


def test_a_clock_adds_up_also_when_something_fails(monkeypatch):
    times = iter([0.0, 1.0, 10.0, 12.5, 20.0, 20.25])
    monkeypatch.setattr(batches.time, "perf_counter", lambda: next(times))
    clock = batches.Clock()
    with clock.measure("a"):
        pass
    with pytest.raises(KeyError), clock.measure("a"):
        raise KeyError
    with clock.measure("b"):
        pass
    assert clock.seconds == {"a": 3.5, "b": 0.25}


# --- Words.


def unigram(*pieces):
    return models.Unigram([("<unk>", 0.0), *((piece, -float(len(piece))) for piece in pieces)], unk_id=0)


LETTERS = [*"abcdefghijklmnopqrstuvwxyz"]
VOCABULARIES = {
    "words and marked letters": (
        models.WordPiece(
            {piece: index for index, piece in enumerate(["<unk>", "a", "fox", "globe", "rises", *LETTERS[1:]])}
            | {f"##{letter}": 100 + index for index, letter in enumerate(LETTERS)},
            unk_token="<unk>",
        ),
        pre_tokenizers.BertPreTokenizer(),
    ),
    "words alone": (
        models.WordLevel({"<unk>": 0, "a": 1, "fox": 2, "globe": 3, "rises": 4}, unk_token="<unk>"),
        pre_tokenizers.Whitespace(),
    ),
    "words and letters of a unigram model": (
        unigram("▁a", "▁fox", "▁globe", "▁rises", "▁", *LETTERS),
        pre_tokenizers.Metaspace(),
    ),
    # As umT5's and CLIP's: most words are made of pieces, and known all the same.
    "pieces": (unigram("▁a", "▁fox", "▁globe", "▁rises", "▁", "bix", "lor", *LETTERS), pre_tokenizers.Metaspace()),
    "pieces of bytes": (
        models.BPE(
            {piece: index for index, piece in enumerate([*LETTERS, "Ġ", "fo", "fox"])}, [("f", "o"), ("fo", "x")]
        ),
        pre_tokenizers.ByteLevel(),
    ),
}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_words_that_a_tokenizer_of_words_does_not_know_are_noted_with_the_nearest(work, vocabulary):
    model, splitter = VOCABULARIES[vocabulary]
    made = Tokenizer(model)
    made.pre_tokenizer = splitter
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    cases = checked(
        entry("one", "a fox rises", ()),
        entry("two", "a glorbe moves", (), negative_prompt="a fox xylem"),
    )
    checks = Checks()
    assert CONFIG.sampling.negative_prompt == "blue"  # which nobody has typed, and no vocabulary here has
    batches.check_words(tokenizer, cases, "blue", checks)
    if vocabulary.startswith("pieces"):
        assert checks.notes == []
    else:
        (note,) = checks.notes
        assert note.startswith("line two: the model does not know 'glorbe' (near it: globe), 'moves', 'xylem', ")


def test_the_bundled_tokenizer_knows_the_words_of_its_world_and_no_others(work):
    tokenizer = pipeline.load_tokenizer(pathlib.Path(pipeline.__file__).parent / "bundled" / "emoji")
    known = batches.whole_words(tokenizer)
    assert {"fox", "slides", "meadow", "bounces"} <= known
    assert not {"glorbix", "cathedral", "moves", "foxes"} & known
    checks = Checks()
    batches.check_words(tokenizer, checked(entry("a", "the Foxes, the fox on the left", ())), "blue", checks)
    (note,) = checks.notes
    assert "does not know 'Foxes' (near it: fox" in note
    assert "'fox'" not in note
