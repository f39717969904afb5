"""From checked entries to batches of one shape, and through the pipeline to files: what `sample.py` runs.

A batch holds cases of one size, in the order of the file, whatever is finished already: so a run that goes on after an
interruption makes the same batches, and with them the same bytes. All batches see equally many text tokens, so that there is
one compilation per size.
"""

import contextlib
import dataclasses
import difflib
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import tokenizers
from PIL import Image

from magref_jax import images, outputs, pipeline
from magref_jax.command import sentence
from magref_jax.conditioning.canvas import Order
from magref_jax.conditioning.subjects import align_subject, clean_prompt
from magref_jax.config import ModelConfig, SamplingConfig
from magref_jax.diffusion.step_cache import StepPlan
from magref_jax.distributed import on_first
from magref_jax.prompts import Checked, Checks


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What all cases of a run have in common, besides the sampling options."""

    seed: int
    fps: float
    model: outputs.FileSettings
    dtype: str  # see `outputs.compute_dtype`
    order: Order | None = None  # of the references on the canvas; None draws it from seed and key
    loras: tuple[outputs.LoraSettings, ...] = ()
    step_plan: StepPlan | None = None
    strict_parity: bool = False
    store_metadata: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedCase:
    """A case that can be made, and everything its files depend on."""

    checked: Checked
    settings: outputs.CaseSettings
    digest: str

    @property
    def key(self) -> str:
        return self.settings["key"]

    @property
    def sampling(self) -> SamplingConfig:
        return self.checked.sampling

    def read_images(self) -> list[Image.Image]:
        """The references as they go onto the canvas.

        Raises:
            ValueError: a file is damaged, or no longer what it was when the run began.
        """
        strict = self.settings["strict_parity"]
        references = self.checked.entry.references
        for reference, known in zip(references, self.settings["references"], strict=True):
            if outputs.file_settings(reference.path)["sha256"] != known["sha256"]:
                raise ValueError(f"{reference.path} has changed since it was checked.")
        return [images.read_image(reference.path, strict_parity=strict) for reference in references]

    def request(self) -> pipeline.Request:
        """What the pipeline is asked for."""
        entry = self.checked.entry
        return pipeline.Request(
            entry.prompt,
            self.read_images(),
            self.checked.subjects,
            self.settings["seed"],
            self.settings["order"],
            self.key,
            tuple(reference.role for reference in entry.references),
            self.sampling.negative_prompt,
        )


def plan_case(checked: Checked, run: RunSettings) -> PlannedCase:
    """The case of a checked entry.

    Raises:
        OSError: a reference cannot be read.
    """
    entry = checked.entry
    settings: outputs.CaseSettings = {
        "key": entry.key,
        "prompt": entry.prompt,
        "seed": entry.overrides.get("seed", run.seed),
        "references": [
            {**outputs.file_settings(reference.path), "words": reference.words, "role": reference.role}
            for reference in entry.references
        ],
        "order": run.order,
        "sampling": dataclasses.asdict(checked.sampling),
        "model": run.model,
        "dtype": run.dtype,
        "loras": list(run.loras),
        "step_plan": None if run.step_plan is None else dataclasses.asdict(run.step_plan),
        "strict_parity": run.strict_parity,
        "fps": run.fps,
        "store_metadata": run.store_metadata,
    }
    return PlannedCase(checked, settings, outputs.case_digest(settings))


def check_tokens(config: ModelConfig, tokenizer: Any, checked: Sequence[Checked], checks: Checks) -> int:
    """How many text tokens the model must see for all of these; words that it would not see go to `checks`."""
    limit = config.dit.text_len
    prompts = {entry.entry.prompt for entry in checked} | {entry.sampling.negative_prompt for entry in checked}
    ordered = sorted(prompts)
    texts = [clean_prompt(prompt) for prompt in ordered]
    encodings = tokenizer(texts, truncation=True, max_length=limit, return_offsets_mapping=True) if texts else {}
    lengths = {prompt: len(ids) for prompt, ids in zip(ordered, encodings.get("input_ids", ()), strict=True)}
    offsets = dict(zip(ordered, encodings.get("offset_mapping", ()), strict=True))
    for case in checked:
        where = case.entry.where
        for name, prompt in (("prompt", case.entry.prompt), ("negative prompt", case.sampling.negative_prompt)):
            cleaned, read = clean_prompt(prompt), max((stop for _, stop in offsets[prompt]), default=0)
            if lengths[prompt] < limit or not (unseen := cleaned[read:].strip()):
                continue
            checks.notes.append(
                f"{where}: the model reads {limit} tokens of the {name}; not seen are its last {len(unseen)} characters, "
                f"from {unseen[:40]!r} on."
            )
            for subject in case.subjects if name == "prompt" else ():
                if subject is not None:
                    checks.attempt(where, align_subject, cleaned, subject, offsets[prompt])
    return pipeline.count_text_tokens(config, lengths.values())


def check_words(tokenizer: Any, checked: Sequence[Checked], default_negative: str, checks: Checks) -> None:
    """Puts into `checks` a note for each entry with words that the tokenizer has no token for and spells.

    Only of tokenizers whose vocabulary is words: those of the released models build most words of pieces, and know them all the
    same. The negative prompt of the model folder, which nobody has typed, is not looked at.
    """
    known = whole_words(tokenizer)
    if not known:
        return
    texts = [[clean_prompt(case.entry.prompt)] for case in checked]
    for case, its in zip(checked, texts, strict=True):
        if case.sampling.negative_prompt != default_negative:
            its.append(clean_prompt(case.sampling.negative_prompt))
    cleaned = sorted(set(itertools.chain(*texts)))
    encodings = tokenizer(cleaned, add_special_tokens=False, return_offsets_mapping=True) if cleaned else None
    unknown = {text: _spelled_words(text, encodings, row, tokenizer) for row, text in enumerate(cleaned)}
    nearest = functools.cache(functools.partial(_nearest_words, known=sorted(known)))
    for case, its in zip(checked, texts, strict=True):
        words = list(dict.fromkeys(word for text in its for word in unknown[text]))
        if words:
            hints = [f"{word!r} ({near})" if (near := nearest(word)) else repr(word) for word in words]
            checks.notes.append(
                f"{case.entry.where}: the model does not know {', '.join(hints)}, and sees them spelled out."
            )


def whole_words(tokenizer: Any) -> frozenset[str]:
    """The words in the vocabulary of a tokenizer that can only spell all others; none, if it has parts of words too."""
    pieces = set(tokenizer.get_vocab()) - {"", *tokenizer.all_special_tokens}
    model = tokenizer.backend_tokenizer.model
    if isinstance(model, tokenizers.models.WordLevel):
        beginning, continuing = pieces, set()
    elif mark := getattr(model, "continuing_subword_prefix", None):  # ##ing
        continuing = {piece.removeprefix(mark) for piece in pieces if piece.startswith(mark) and piece != mark}
        beginning = {piece for piece in pieces if not piece.startswith(mark)}
    else:  # what begins a word has the space before it: ▁the, Ġthe
        beginning = {piece[1:] for piece in pieces if piece[0] in "▁Ġ"}
        continuing = {piece for piece in pieces if piece[0] not in "▁Ġ"}
    if any(len(piece) > 1 for piece in continuing):
        return frozenset()
    return frozenset(piece for piece in beginning if len(piece) > 1 and piece.isalnum())


def _spelled_words(text: str, encodings: Any, row: int, tokenizer: Any) -> list[str]:
    """The words of a text that became several tokens, or the one that stands for what is unknown."""
    found: dict[int, tuple[int, int, bool]] = {}  # first and last character of each word, and whether it is unknown
    columns = encodings.word_ids(row), encodings["offset_mapping"][row], encodings["input_ids"][row]
    for word, (start, end), token in zip(*columns, strict=True):
        if word in found:
            found[word] = found[word][0], end, True
        elif word is not None:
            found[word] = start, end, token == tokenizer.unk_token_id
    return [text[start:end].strip() for start, end, is_unknown in found.values() if is_unknown]


def _nearest_words(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word.lower(), known, n=3, cutoff=0.6)
    return f"near it: {', '.join(near)}" if near else ""


def make_batches(cases: Sequence[PlannedCase], batch_size: int) -> list[list[PlannedCase]]:
    """Cases of one compiled shape side by side, in the order in which each shape first appears."""
    groups: dict[SamplingConfig, list[PlannedCase]] = {}
    for case in cases:
        groups.setdefault(dataclasses.replace(case.sampling, negative_prompt=""), []).append(case)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


class Clock:
    """Seconds of a run by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _out_of_memory(error: Exception) -> str:
    reason = str(error).removeprefix("RESOURCE_EXHAUSTED: ").partition("\n")[0].strip().rstrip(".")
    return (
        f"memory is exhausted ({reason}); less is needed by a smaller --size, fewer --frames, --guidance 1, a smaller "
        "--batch_size or more devices in --mesh."
    )


def run_batches(
    model: pipeline.Model | None,
    batches: Iterable[Sequence[PlannedCase]],
    out: pathlib.Path,
    *,
    kept: frozenset[str] = frozenset(),
    batch_size: int,
    text_tokens: int,
    step_plan: StepPlan | None,
    clock: Clock,
    on_batch: Callable[[Sequence[PlannedCase]], None] = lambda batch: None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Iterator[outputs.CaseReport]:
    """Makes and writes the cases that are not kept, and reports each. A case that fails does not stop the others.

    The model may be None where all cases are kept.
    """
    for batch in batches:
        made = [case for case in batch if case.key not in kept]
        for case in batch:
            read = functools.partial(outputs.read_sidecar, out, case.key)
            sidecar = on_first(read) if case.key in kept else None
            if sidecar is not None:
                yield outputs.CaseReport.of(sidecar, "kept")
        if not made:
            continue
        assert model is not None
        on_batch(made)
        # Kept ones are computed again beside the others: alone, these might be rounded differently.
        ready, failures = [], {}
        for case in batch:
            try:
                ready.append((case, case.request()))
            except (ValueError, OSError) as error:
                failures[case.key] = sentence(error)
        start, ends = time.perf_counter(), []

        def note(step: int, ends: list[float] = ends) -> None:
            ends.append(time.perf_counter())
            on_step(step)

        videos: dict[str, pipeline.Video] = {}
        if ready:
            sampling = dataclasses.asdict(ready[0][0].sampling)
            try:
                with clock.measure("sampling"):
                    result = pipeline.generate(
                        model,
                        [request for _, request in ready],
                        on_step=note,
                        step_plan=step_plan,
                        batch_size=batch_size,
                        text_tokens=text_tokens,
                        **sampling,
                    )
                videos = {case.key: video for (case, _), video in zip(ready, result, strict=True)}
            except jax.errors.JaxRuntimeError as error:
                # One process may go on with smaller cases; of several, the others would wait for it.
                if not str(error).startswith("RESOURCE_EXHAUSTED") or jax.process_count() > 1:
                    raise
                failures |= {case.key: _out_of_memory(error) for case, _ in ready}
        seconds = (time.perf_counter() - start) / len(batch)
        per_step = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else None
        for case in made:
            failure = failures.get(case.key) or videos[case.key].failure
            if failure is None:
                video = videos[case.key]
                try:
                    with clock.measure("writing"):
                        write = functools.partial(outputs.write_case, out, case.settings)
                        sidecar = on_first(functools.partial(write, video.frames, video.case.canvas))
                    yield outputs.CaseReport.of(sidecar, "written", seconds, per_step)
                    continue
                except OSError as error:
                    failure = sentence(error)
            sampling = case.sampling
            yield outputs.CaseReport(
                case.key,
                f"failed: {failure}",
                sampling.height,
                sampling.width,
                sampling.num_frames - model.config.drop_frames,
                sampling.num_inference_steps,
                seconds,
                per_step,
            )
