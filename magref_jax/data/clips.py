"""From records to batches: how a record becomes an example, and which records make a batch.

Everything random is a function of the seed and of the number of the global batch: neither how many processes and
threads there are nor how often a run was interrupted changes what is trained on.

N frames of a clip · F latent frames · h/w latent height, width · T text tokens · S subjects · B batch
"""

import bisect
import dataclasses
import functools
import io
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import grain
import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from magref_jax.conditioning.canvas import GRIDS, LIMITS, Order
from magref_jax.conditioning.case import Case, prepare_case, stack_cases
from magref_jax.conditioning.region_mask import region_mask
from magref_jax.conditioning.subjects import Subject, clean_prompt
from magref_jax.config import Layout, ModelConfig
from magref_jax.data.records import Caption, ClipRecord, ReferenceRecord, Size, Source, View
from magref_jax.descriptions import short_repr
from magref_jax.images import FORMATS, WHITE
from magref_jax.video import read_frames

FirstFrameTarget = Literal["canvas", "video"]
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a record becomes an example; the first three are probabilities."""

    cross_pair: float = 0.5  # that a reference is shown by a picture from elsewhere, where there is one
    drop_reference: float = 0.1  # that a reference other than the first is left out
    larger_layout: float = 0.2  # that the canvas has more cells than the references need
    num_subjects: int = 4  # subject slots of a case, and most references of a record

    def __post_init__(self) -> None:
        for name in ("cross_pair", "drop_reference", "larger_layout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Choice.{name}={getattr(self, name)} must be in [0, 1].")
        if not 1 <= self.num_subjects <= LIMITS["v2"]:
            raise ValueError(f"Choice.num_subjects={self.num_subjects} must be in 1..{LIMITS['v2']}.")


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A case, the frames to train toward, and the latent cells where a subject is in them."""

    case: Case
    frames: UInt8[np.ndarray, "N H W 3"]
    subject_cells: Bool[np.ndarray, "F h w"]
    caption: int  # which of the record's


def make_example(
    config: ModelConfig,
    tokenizer: Any,
    record: ClipRecord,
    rng: np.random.Generator,
    choice: Choice,
    first_frame_target: FirstFrameTarget,
) -> Example:
    """One way to train on a record: a caption, pictures of references, and their places on the canvas are drawn.

    The frames are the canvas and then the clip's, or the clip's alone; as many as the model makes, or as the clip has.

    Raises:
        ValueError: a record that this model or this choice cannot take.
    """
    if not record.captions:
        raise ValueError("it has no caption.")
    if len(record.references) > choice.num_subjects:
        raise ValueError(
            f"it has {len(record.references)} references, more than Choice.num_subjects={choice.num_subjects}. "
            f"Raise that (to {LIMITS['v2']} at most), or leave such records out by Phase.max_references."
        )
    boxes = np.zeros((0, record.num_frames, 4), int) if record.subject_boxes is None else record.subject_boxes
    if boxes.shape[1] != record.num_frames:
        raise ValueError(f"its subject_boxes are of {boxes.shape[1]} frames; it says {record.num_frames}.")
    number = int(rng.integers(len(record.captions)))
    subjects = caption_subjects(record, record.captions[number])
    kept = [i for i in range(len(record.references)) if i == 0 or rng.random() >= choice.drop_reference]
    references = [record.references[i] for i in kept]
    images = [view_image(choose_view(reference, rng, choice.cross_pair)) for reference in references]
    layout = choose_layout(config, len(kept))
    num_frames = example_frames(config, record, first_frame_target)
    case = _case_with_free_cells(
        config,
        tokenizer,
        record.captions[number].text,
        images,
        [subjects[i] for i in kept],
        draw_order(len(kept), layout, rng, choice.larger_layout),
        num_subjects=choice.num_subjects,
        num_frames=num_frames,
        height=record.height,
        width=record.width,
        roles=[reference.role for reference in references],
        layout=layout,
    )
    with_canvas = first_frame_target == "canvas"
    frames = clip_frames(record, num_frames - with_canvas)
    if with_canvas:
        frames = np.concatenate([case.canvas.image[None], frames])
        boxes = np.concatenate([np.zeros_like(boxes[:, :1]), boxes], 1)  # empty: no subject moves on the canvas
    cells = subject_cells(config, boxes[:, :num_frames], record.height, record.width)
    return Example(case, frames, cells, number)


def caption_subjects(record: ClipRecord, caption: Caption) -> list[Subject | None]:
    """For each reference of the record, where the caption names it; None where it does not.

    Raises:
        ValueError: spans that belong to another text.
    """
    if len(caption.label_spans) != len(record.references):
        raise ValueError(
            f"the caption {caption.text!r} has {len(caption.label_spans)} label_spans for "
            f"{len(record.references)} references."
        )
    if any(caption.label_spans) and caption.text != clean_prompt(caption.text):
        raise ValueError(f"the caption {caption.text!r} is not as clean_prompt leaves it: its label_spans would shift.")
    return [
        None if span is None else Subject(reference.label, span=(span[0], span[1]))
        for reference, span in zip(record.references, caption.label_spans, strict=True)
    ]


def choose_view(reference: ReferenceRecord, rng: np.random.Generator, cross_pair: float) -> View:
    """A picture from elsewhere with probability `cross_pair`, else one from the clip; any, where one kind is missing.

    Raises:
        ValueError: the reference has no picture.
    """
    crossed = rng.random() < cross_pair
    views = [view for view in reference.views if (view.origin != "in_pair") == crossed] or list(reference.views)
    if not views:
        raise ValueError(f"its reference {reference.label!r} has no views.")
    return views[int(rng.integers(len(views)))]


def view_image(view: View) -> Image.Image:
    """The picture, with its alpha."""
    image = Image.open(io.BytesIO(view.image), formats=FORMATS)
    image.load()
    return image


def choose_layout(config: ModelConfig, count: int) -> Layout:
    """The model's layout, or v2 for more references than it holds."""
    return config.sampling.layout if count <= LIMITS[config.sampling.layout] else "v2"


def draw_order(count: int, layout: Layout, rng: np.random.Generator, larger_layout: float) -> Order:
    """A seed for `compose_canvas` or, with probability `larger_layout`, the cells of the next larger layout, some free.

    v1 keeps the order of the references, and has three columns for any count: there, more room is to take any of them.
    """
    seed, larger = int(rng.integers(2**31)), rng.random() < larger_layout
    cells = {"v1": [LIMITS["v1"]], "v2": [size for size in sorted(GRIDS) if size > _smallest_grid(count)]}[layout]
    if not larger or not cells or not 0 < count < cells[0]:
        return seed
    order: list[int | None] = [None] * cells[0]
    taken = rng.permutation(cells[0])[:count].tolist()
    for reference, cell in enumerate(sorted(taken) if layout == "v1" else taken):
        order[cell] = reference
    return order


def _smallest_grid(count: int) -> int:
    return min(size for size in GRIDS if size >= count)


def _case_with_free_cells(
    config: ModelConfig,
    tokenizer: Any,
    prompt: str,
    images: Sequence[Image.Image],
    subjects: Sequence[Subject | None],
    order: Order,
    *,
    num_subjects: int,
    roles: Sequence[Any],
    **arguments: Any,
) -> Case:
    """`prepare_case` for an order with more free cells than the smallest layout has: white pictures hold them free."""
    free = 0 if isinstance(order, int | str) else sum(reference is None for reference in order)
    if not isinstance(order, int | str):
        white = itertools.count(len(images))
        order = [next(white) if reference is None else reference for reference in order]
    case = prepare_case(
        config,
        tokenizer,
        prompt,
        [*images, *[Image.new("RGB", (1, 1), (WHITE,) * 3)] * free],
        [*subjects, *[None] * free],
        order=order,
        roles=[*roles, *["subject"] * free],
        num_subjects=num_subjects + free,
        **arguments,
    )
    if not free:
        return case
    mask = case.canvas.mask.copy()
    for x0, y0, x1, y1 in case.canvas.regions[len(images) :]:
        mask[y0:y1, x0:x1] = 0
    canvas = dataclasses.replace(
        case.canvas, mask=mask, regions=case.canvas.regions[: len(images)], cells=case.canvas.cells[: len(images)]
    )
    return dataclasses.replace(
        case,
        canvas=canvas,
        region_mask=region_mask(mask, len(case.region_mask), config.vae.spatial_stride, config.sampling.mask_mode),
        subject_tokens=case.subject_tokens[:num_subjects],
        subject_regions=case.subject_regions[:num_subjects],
    )


def example_frames(config: ModelConfig, record: ClipRecord, first_frame_target: FirstFrameTarget) -> int:
    """Frames of an example: the model's, or the most that the VAE takes of a clip with fewer.

    Raises:
        ValueError: nothing of the clip would be in the example.
    """
    before = int(first_frame_target == "canvas")
    stride = config.vae.temporal_stride
    num_frames = (min(config.sampling.num_frames, record.num_frames + before) - 1) // stride * stride + 1
    if num_frames <= before:
        raise ValueError(
            f"it has {record.num_frames} frames; first_frame_target={first_frame_target!r} needs "
            f"{stride if before else 1}, and as many in the model's num_frames={config.sampling.num_frames}."
        )
    return num_frames


def clip_frames(record: ClipRecord, count: int) -> UInt8[np.ndarray, "N H W 3"]:
    """The first frames of a clip, decoded where it is a video.

    Raises:
        ValueError: the record holds no pixels, or fewer or others than it says.
    """
    if record.frames is not None:
        frames = record.frames[:count]
    elif record.video is not None:
        frames = read_frames(cast(Any, io.BytesIO(record.video)), range(count))
    else:
        raise ValueError("it has neither frames nor a video.")
    if frames.shape != (count, record.height, record.width, 3):
        raise ValueError(
            f"its first {count} frames are an array of {frames.shape}; it says {record.num_frames} frames of "
            f"{record.width}x{record.height} pixels."
        )
    return frames


def subject_cells(
    config: ModelConfig, boxes: Int[np.ndarray, "S N 4"], height: int, width: int
) -> Bool[np.ndarray, "F h w"]:
    """Whether a subject's box reaches into a latent cell in any of the frames that the latent frame stands for."""
    x0, y0, x1, y1 = np.moveaxis(np.asarray(boxes), -1, 0)[..., None]
    stride = config.vae.spatial_stride
    top, left = np.arange(0, height, stride), np.arange(0, width, stride)
    # A box and a cell share a pixel; an empty box shares none.
    rows = np.maximum(y0, top) < np.minimum(y1, top + stride)
    columns = np.maximum(x0, left) < np.minimum(x1, left + stride)
    cells = (rows[..., :, None] & columns[..., None, :]).any(0)
    # The first frame is a latent frame of its own.
    starts = [0, *range(1, boxes.shape[1], config.vae.temporal_stride)]
    return np.logical_or.reduceat(cells, starts)


def example_arrays(example: Example) -> Arrays:
    """One row of a batch of pixels: what `stack_cases` gives, `frames` and `subject_cells`."""
    arrays = {name: values[0] for name, values in stack_cases([example.case]).items()}
    return arrays | {"frames": example.frames, "subject_cells": example.subject_cells.astype(np.float32)}


def choose_case(record: ClipRecord, rng: np.random.Generator, text_len: int) -> Arrays:
    """One row of an encoded batch, float32: one of the record's cases, its text embeddings padded with zeros.

    Raises:
        ValueError: the record was not encoded, or its text is longer than `text_len` tokens.
    """
    if not record.cases:
        raise ValueError("it has no encoded cases.")
    case = record.cases[int(rng.integers(len(record.cases)))]
    embeddings = record.captions[case.caption].embeddings
    if embeddings is None or len(embeddings) > text_len:
        found = "no embeddings" if embeddings is None else f"embeddings of {len(embeddings)} tokens"
        raise ValueError(f"its caption {case.caption} has {found}; at most text_len={text_len} are read.")
    text = np.zeros((text_len, embeddings.shape[1]), np.float32)
    text[: len(embeddings)] = embeddings
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case) if field.name != "caption"}
    arrays = {name: np.asarray(value, np.float32) for name, value in fields.items() if value is not None}
    return arrays | {"text_embeddings": text}


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run with batches of one kind. The last phase goes on for as long as the run does."""

    num_steps: int
    batch_size: int  # over all processes
    num_latent_frames: int | None = None  # the first and, drawn anew for every batch, some others: fewer are cheaper
    reach: int | None = None  # latent frames from the start of a clip to draw from: early ones are easier; None: all
    max_references: int | None = None  # clips with more are left out: one is the easiest to learn to copy

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < (0 if field.name == "max_references" else 1):
                raise ValueError(f"Phase.{field.name}={value} is too small.")
        if self.reach is not None and self.num_latent_frames is not None and self.reach < self.num_latent_frames:
            raise ValueError(f"Phase.reach={self.reach} must be at least num_latent_frames={self.num_latent_frames}.")

    def draw_frames(self, num_latent_frames: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Positions of latent frames of a clip that has `num_latent_frames`: the first, and others in their order."""
        stop = min(num_latent_frames, self.reach or num_latent_frames)
        others = min(stop, self.num_latent_frames or stop) - 1
        return (0, *np.sort(rng.choice(np.arange(1, stop), others, replace=False)).tolist())


# Arrays of a batch with an axis of latent frames, the first axis of a row.
TIMED = ("clean_latents", "subject_cells", "reference_latents", "region_mask")
# What a random stream is for: streams with the same seed and batch number must not be the same.
_EPOCH, _ROW, _FRAMES = 1, 2, 3


class Schedule:
    """Which records make which global batch.

    A batch holds clips of one size. In an epoch of a phase every record is drawn once, but for a remainder: fewer than
    `batch_size` clips of each size, other ones in every epoch. A phase begins with an epoch of its own.

    Raises:
        ValueError: a phase that has fewer clips of some size than a batch needs.
    """

    def __init__(self, source: Source, phases: Sequence[Phase], seed: int) -> None:
        if not phases:
            raise ValueError("phases is empty: there must be one at least.")
        self.phases = tuple(phases)
        self._starts = [0, *itertools.accumulate(phase.num_steps for phase in self.phases[:-1])]
        self._seed = seed
        filtered = any(phase.max_references is not None for phase in self.phases)
        counts = reference_counts(source) if filtered else None
        self._buckets = [_buckets(source.sizes, counts, phase, number) for number, phase in enumerate(self.phases)]
        self._last: tuple[int, int, np.ndarray] | None = None

    def __getitem__(self, number: int) -> tuple[Phase, list[int]]:
        """The phase of a global batch and the numbers of its records, row by row."""
        which = bisect.bisect_right(self._starts, number) - 1
        phase = self.phases[which]
        per_epoch = sum(len(bucket) // phase.batch_size for bucket in self._buckets[which])
        epoch, place = divmod(number - self._starts[which], per_epoch)
        return phase, self._epoch(which, epoch)[place].tolist()

    def _epoch(self, which: int, epoch: int) -> Int[np.ndarray, "batches B"]:
        last = self._last  # one read: another thread may be in another epoch
        if last is None or last[:2] != (which, epoch):
            rng = np.random.default_rng([_EPOCH, self._seed, which, epoch])
            size = self.phases[which].batch_size
            shuffled = [rng.permutation(bucket) for bucket in self._buckets[which]]
            batches = [bucket[: len(bucket) // size * size].reshape(-1, size) for bucket in shuffled]
            last = self._last = which, epoch, rng.permutation(np.concatenate(batches))
        return last[2]


def _buckets(
    sizes: Sequence[Size], counts: Sequence[int] | None, phase: Phase, number: int
) -> list[Int[np.ndarray, "records"]]:
    """The records of a phase, by the size of their clips."""
    buckets: dict[Size, list[int]] = {}
    for index, size in enumerate(sizes):
        if counts is None or phase.max_references is None or counts[index] <= phase.max_references:
            buckets.setdefault(tuple(size), []).append(index)
    if not buckets:
        raise ValueError(f"no record is left for phase {number} with max_references={phase.max_references}.")
    for (frames, height, width), indices in buckets.items():
        if len(indices) < phase.batch_size:
            raise ValueError(
                f"phase {number} has batch_size={phase.batch_size}, but there are only {len(indices)} clips of "
                f"{frames} frames of {width}x{height} pixels (max_references={phase.max_references})."
            )
    return [np.array(buckets[size]) for size in sorted(buckets)]


def reference_counts(source: Source) -> Sequence[int]:
    """How many references each record has, from the source's index or by reading every record once."""
    counts = source.num_references
    return [len(source[i].references) for i in range(len(source))] if counts is None else counts


Make = Callable[[ClipRecord, np.random.Generator], Arrays]
Rows = Callable[[int], Sequence[int]]  # from the size of a global batch to the rows that this process reads


def _block(index: int, count: int, batch_size: int) -> range:
    if batch_size % count:
        raise ValueError(f"batch_size={batch_size} must be a multiple of process_count={count}.")
    return range(batch_size * index // count, batch_size * (index + 1) // count)


class _Reader:
    """Global batches by their number, the rows of one process: what Grain's threads read."""

    def __init__(self, source: Source, schedule: Schedule, make: Make, seed: int, rows: Rows) -> None:
        self._source, self._schedule, self._make, self._seed, self._rows = source, schedule, make, seed, rows

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, Any]:
        phase, numbers = self._schedule[index]
        names, rows = [], []
        for row in self._rows(phase.batch_size):
            number = numbers[row]
            name = f"record {number} of the source"
            try:
                record = self._source[number]
                name = f"record {record.id!r}"
                rows.append(self._make(record, np.random.default_rng([_ROW, self._seed, index, row])))
            except Exception as error:
                raise ValueError(f"batch {index}: {name}: {error}") from error
            names.append(name)
        _check_alike(names, rows)
        batch: dict[str, Any] = {}
        timed = [name for name in TIMED if name in rows[0]]
        if timed:
            rng = np.random.default_rng([_FRAMES, self._seed, index])
            batch["frame_positions"] = phase.draw_frames(len(rows[0][timed[0]]), rng)
        for name in rows[0]:
            values = [row[name] for row in rows]
            if name in timed:
                values = [value[list(batch["frame_positions"])] for value in values]
            batch[name] = np.stack(values)
        return batch


def _check_alike(names: Sequence[str], rows: Sequence[Arrays]) -> None:
    """Rows become one array per name: all must have the same names and shapes."""
    shapes = [{name: np.shape(value) for name, value in row.items()} for row in rows]
    for name, other in zip(names, shapes, strict=True):
        if other != shapes[0]:
            wrong = sorted(key for key in {*other, *shapes[0]} if other.get(key) != shapes[0].get(key))
            raise ValueError(
                f"{name} does not fit into a batch with {names[0]}: {wrong[0]} is {other.get(wrong[0])} and "
                f"{shapes[0].get(wrong[0])}."
            )


class Batches:
    """The batches of a run, one after another, as dictionaries of arrays: this process' rows of each global batch.

    `make` turns a record into one row; its generator is a function of the seed, of the number of the batch and of the
    row's place in the global batch. Processes hold blocks of rows, in their order. The arrays in `TIMED` are cut to the
    latent frames drawn for the batch, which `frame_positions` lists; a step that encodes pixels has to cut its latents.

    Args:
        source: The records.
        phases: What the batches of a run are like, in order.
        make: Such as `choose_case`, or `make_example` and `example_arrays`.
        seed: Of the order and of everything that `make` draws.
        process_index: Which rows to read.
        process_count: Divides every `batch_size`.
        rows: In place of these two: which rows to read of a batch of so many, such as `distributed.BatchShare.rows`.
        num_threads: That read and make batches; 0 does it in the caller's.
        prefetch: Batches that are made ahead, with `num_workers` those of each worker.
        num_workers: Processes to read in, where Python code in threads is too slow; source and `make` are pickled.

    Raises:
        ValueError: phases that this source or this number of processes cannot fill; later, what went wrong with which
            record.
    """

    def __init__(
        self,
        source: Source,
        phases: Sequence[Phase],
        make: Make,
        seed: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
        rows: Rows | None = None,
        num_threads: int = 4,
        prefetch: int = 4,
        num_workers: int = 0,
    ) -> None:
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index} must be in 0..{process_count - 1}.")
        rows = functools.partial(_block, process_index, process_count) if rows is None else rows
        for number, phase in enumerate(phases):
            try:
                rows(phase.batch_size)
            except ValueError as error:
                raise ValueError(f"phase {number}: {error}") from None
        self.schedule = Schedule(source, phases, seed)
        self._reader = _Reader(source, self.schedule, make, seed, rows)
        self._identity = {
            "source": source.fingerprint,
            "seed": seed,
            "phases": [dataclasses.asdict(phase) for phase in phases],
        }
        self._options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        self._workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=max(1, prefetch))
        self._count = 0
        self._iterator: grain.DatasetIterator[dict[str, Any]] | None = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            self._iterator = self._start()
        try:
            batch = next(self._iterator)
        except BaseException:
            self.close()  # Grain's iterator would skip the batch that failed
            raise
        self._count += 1
        return batch

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A batch by its number, read now; does not move the iterator."""
        return self._reader[number]

    def _start(self) -> grain.DatasetIterator[dict[str, Any]]:
        batches = grain.MapDataset.source(self._reader).slice(slice(self._count, None))
        read = batches.to_iter_dataset(self._options)
        if self._workers.num_workers:
            _parse_grain_flags()
            read = read.mp_prefetch(self._workers)
        return iter(read)

    def state(self) -> dict[str, Any]:
        """How many batches were handed out, and what they were drawn from; JSON values."""
        return {"batches": self._count, **self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on after the last batch that was handed out before `state` was taken, here or in another run.

        The phases may differ in what is still to come.

        Raises:
            ValueError: other records, seed or phases; names which.
        """
        count = state["batches"]
        for name in ("source", "seed"):
            if state[name] != self._identity[name]:
                raise ValueError(
                    f"the {name} of these batches is {self._identity[name]!r}, that of the saved state {state[name]!r}: a run "
                    "goes on with the records, their order and the seed that it began with."
                )
        past, saved = _past(self._identity["phases"], count), _past(state["phases"], count)
        if past != saved:
            ours, theirs = next(pair for pair in zip(past, saved, strict=False) if pair[0] != pair[1])
            raise ValueError(
                f"the first {count} batches had other phases in the saved state: {theirs} there, {ours} here. Only phases that "
                "are still to come may change."
            )
        self.close()
        self._count = count

    def close(self) -> None:
        """Stops the threads; each ends with the batch it is at. The next `next` starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _past(phases: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """The phases of the first `count` batches, with the steps of each that are among them."""
    past = []
    for number, phase in enumerate(phases):
        steps = count if number == len(phases) - 1 else min(count, phase["num_steps"])
        count -= steps
        if steps:
            past.append({**phase, "num_steps": steps})
    return past


def _parse_grain_flags() -> None:
    """Grain's worker processes read absl flags, which nobody parses here: they keep their defaults."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
