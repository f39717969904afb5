"""How a record becomes an example, and which records make a batch."""

import dataclasses
import io
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from magref_jax.conditioning.canvas import compose_canvas, layout_cells
from magref_jax.conditioning.case import prepare_case
from magref_jax.conditioning.region_mask import region_mask
from magref_jax.config import DiTConfig, ModelConfig, SamplingConfig, VAEConfig
from magref_jax.data import clips
from magref_jax.data.clips import Batches, Choice, Phase
from magref_jax.data.emoji_tokenizer import build_tokenizer
from magref_jax.data.records import Caption, ClipRecord, EncodedCase, ReferenceRecord, View
from magref_jax.pipeline import load_tokenizer
from magref_jax.video import read_video, write_video

SMALL, LARGE = (5, 8, 12), (9, 16, 24)


class ListSource:
    """Records 0, 1, … with one size each; nothing in them but their number."""

    def __init__(self, sizes, references=None, fingerprint="a"):
        self.sizes, self.num_references, self.fingerprint = sizes, None, fingerprint
        self.references = references or [0] * len(sizes)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        references = (ReferenceRecord("red", ()),) * self.references[index]
        return ClipRecord(str(index), *self.sizes[index], 8.0, (Caption("red", ()),), references)


def make_row(record, rng):
    return {
        "number": np.array(int(record.id)),
        "size": np.array([record.num_frames, record.height, record.width]),
        "draw": rng.integers(2**40, size=2),
    }


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def take(batches, count):
    with batches:
        return [next(batches) for _ in range(count)]


SIZES = [SMALL] * 14 + [LARGE] * 9 + [SMALL] * 5  # 19 small and 9 large ones: 4 + 2 batches of 4, 3 + 1 left over


def test_an_epoch_is_every_record_once_in_batches_of_one_size():
    whole = take(Batches(ListSource(SIZES), [Phase(1, 4)], make_row, 3), 24)
    epochs = [np.concatenate([batch["number"] for batch in whole[i : i + 6]]) for i in range(0, 24, 6)]
    for epoch in epochs:
        assert len(set(epoch)) == 24  # none twice
        assert sum(SIZES[number] == SMALL for number in epoch) == 16
    # What is left over and the order differ between epochs; over some epochs every record has its turn.
    assert len({tuple(epoch) for epoch in epochs}) == len({frozenset(epoch) for epoch in epochs}) == 4
    assert set(np.concatenate(epochs)) == set(range(28))
    for batch in whole:
        assert len(np.unique(batch["size"], axis=0)) == 1
    orders = {tuple(len(batch["size"]) and int(batch["size"][0, 0]) for batch in whole[i : i + 6]) for i in (0, 6, 12)}
    assert len(orders) > 1  # sizes do not come in blocks, nor in the same order every time
    other = take(Batches(ListSource(SIZES), [Phase(1, 4)], make_row, 4), 6)
    assert not np.array_equal(epochs[0], np.concatenate([batch["number"] for batch in other]))
    # No two rows, batches or seeds draw the same.
    draws = np.concatenate([batch["draw"] for batch in (*whole, *other)])
    assert len(np.unique(draws[:, 0])) == len(draws) == 30 * 4


def test_records_are_drawn_alike_often_in_every_place():
    # 400 epochs of 12 records: a record is in each of the 12 places 33 times on average, with a deviation of 5.5.
    batches = Batches(ListSource([SMALL] * 12), [Phase(1, 4)], make_row, 0, num_threads=0)
    order = np.concatenate([batches.schedule[i][1] for i in range(1200)]).reshape(400, 12)
    counts = np.array([np.bincount(order[:, place], minlength=12) for place in range(12)])
    np.testing.assert_array_equal(np.sort(order, 1), np.tile(np.arange(12), (400, 1)))
    assert counts.min() >= 10
    assert counts.max() <= 60


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_global_batch_without_overlap(processes):
    whole = take(Batches(ListSource(SIZES), [Phase(5, 4), Phase(1, 8)], make_row, 3), 12)
    parts = [
        take(
            Batches(
                ListSource(SIZES),
                [Phase(5, 4), Phase(1, 8)],
                make_row,
                3,
                process_index=process,
                process_count=processes,
            ),
            12,
        )
        for process in range(processes)
    ]
    for number, batch in enumerate(whole):
        joined = {name: np.concatenate([part[number][name] for part in parts]) for name in batch}
        assert equal(joined, batch)  # records, their order and what was drawn for them
        assert {len(part[number]["number"]) for part in parts} == {len(batch["number"]) // processes}


def test_threads_and_prefetching_change_nothing():
    def slow(record, rng):
        time.sleep(0.002 * (int(record.id) % 3))  # later batches are ready before earlier ones
        return make_row(record, rng)

    runs = []
    for num_threads, prefetch in ((0, 0), (1, 1), (4, 16)):
        batches = Batches(ListSource(SIZES), [Phase(1, 4)], slow, 3, num_threads=num_threads, prefetch=prefetch)
        runs.append(take(batches, 10))
        assert batches.state()["batches"] == 10  # handed out, not prefetched
    for run in runs[1:]:
        assert all(equal(a, b) for a, b in zip(run, runs[0], strict=True))
    assert equal(batches[7], runs[0][7])


PHASES = [Phase(3, 4), Phase(4, 2), Phase(1, 8)]


def test_goes_on_with_the_very_next_batch_from_every_state():
    whole = take(Batches(ListSource(SIZES), PHASES, make_row, 3), 14)
    assert [len(batch["number"]) for batch in whole] == [4] * 3 + [2] * 4 + [8] * 7
    batches = Batches(ListSource(SIZES), PHASES, make_row, 3, num_threads=2, prefetch=8)
    for position in range(12):
        state = json.loads(json.dumps(batches.state()))
        assert state["batches"] == position
        again = Batches(ListSource(SIZES), PHASES, make_row, 3, process_index=1, process_count=2, num_threads=1)
        again.restore(state)
        for number in (position, position + 1):
            half = len(whole[number]["number"]) // 2
            assert equal(next(again), {name: value[half:] for name, value in whole[number].items()})
        again.close()
        assert equal(next(batches), whole[position])
    # Also backwards, in an iterator that has batches waiting.
    batches.restore({**state, "batches": 2})
    assert equal(next(batches), whole[2])
    batches.close()


def test_another_order_of_the_data_is_refused():
    batches = Batches(ListSource(SIZES), PHASES, make_row, 3, num_threads=0)
    for _ in range(5):
        next(batches)
    state = batches.state()

    def restored(phases=PHASES, seed=3, fingerprint="a"):
        other = Batches(ListSource(SIZES, fingerprint=fingerprint), phases, make_row, seed, num_threads=0)
        other.restore(state)
        return other.state()["batches"]

    with pytest.raises(ValueError, match="the source of these batches is 'b', that of the saved state 'a'"):
        restored(fingerprint="b")
    with pytest.raises(ValueError, match="the seed of these batches is 4, that of the saved state 3"):
        restored(seed=4)
    for changed in (
        [Phase(3, 8), *PHASES[1:]],
        [Phase(2, 4), *PHASES[1:]],
        [PHASES[0], Phase(4, 2, reach=2)],
        [Phase(3, 4)],
    ):
        with pytest.raises(ValueError, match="the first 5 batches had other phases in the saved state"):
            restored(changed)
    # What is still to come may change: the phases begun may go on for longer, and others may follow.
    for changed in ([*PHASES, Phase(1, 4)], [PHASES[0], Phase(9, 2), Phase(2, 4)], PHASES[:2]):
        assert restored(changed) == 5


def test_phases_that_cannot_be_filled_are_refused():
    source = ListSource(SIZES, references=[1] * 26 + [3] * 2)
    with pytest.raises(ValueError, match="phase 1 has batch_size=10, but there are only 9 clips of 9 frames of 24x16"):
        Batches(source, [Phase(1, 4), Phase(1, 10)], make_row, 0)
    with pytest.raises(ValueError, match="phase 0: batch_size=4 must be a multiple of process_count=3"):
        Batches(source, [Phase(1, 4)], make_row, 0, process_count=3)
    with pytest.raises(ValueError, match=r"process_index=2 must be in 0\.\.1"):
        Batches(source, [Phase(1, 4)], make_row, 0, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="no record is left for phase 0 with max_references=0"):
        Batches(source, [Phase(1, 4, max_references=0)], make_row, 0)
    with pytest.raises(ValueError, match="phases is empty"):
        Batches(source, [], make_row, 0)
    with pytest.raises(ValueError, match=r"Phase\.batch_size=0"):
        Phase(1, 0)
    with pytest.raises(ValueError, match=r"Phase\.reach=2 must be at least num_latent_frames=3"):
        Phase(1, 1, num_latent_frames=3, reach=2)


def test_a_phase_leaves_out_clips_with_more_references():
    source = ListSource([SMALL] * 12, references=[1, 2, 3] * 4)
    batches = take(Batches(source, [Phase(2, 4, max_references=2), Phase(1, 4)], make_row, 0), 8)
    early = np.concatenate([batch["number"] for batch in batches[:2]])
    assert sorted(early % 3) == [0] * 4 + [1] * 4
    assert len(set(np.concatenate([batch["number"] for batch in batches[2:5]]))) == 12
    # A source that knows the numbers is not read for them.
    source.num_references = [0, 9, 9] * 4
    schedule = clips.Schedule(source, [Phase(1, 4, max_references=2)], 0)
    assert sorted(schedule[0][1]) == [0, 3, 6, 9]


def test_an_error_in_a_thread_names_the_record_and_does_not_skip_it():
    def fails(record, rng):
        if record.id == "7":
            raise RuntimeError("no picture")
        return make_row(record, rng)

    good = take(Batches(ListSource([SMALL] * 8), [Phase(1, 2)], make_row, 0), 4)
    where = next(number for number, batch in enumerate(good) if 7 in batch["number"])
    batches = Batches(ListSource([SMALL] * 8), [Phase(1, 2)], fails, 0)
    for number in range(where):
        assert equal(next(batches), good[number])
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"batch {where}: record '7': no picture"):
            next(batches)
    assert batches.state()["batches"] == where

    class Damaged(ListSource):
        def __getitem__(self, index):
            raise OSError("bad shard")

    with pytest.raises(ValueError, match=r"batch 0: record \d of the source: bad shard"):
        next(Batches(Damaged([SMALL] * 8), [Phase(1, 2)], make_row, 0))

    def ragged(record, rng):
        return {"same": np.zeros(2), "other": np.zeros(3 + (record.id == "7"))}

    batches = Batches(ListSource([SMALL] * 8), [Phase(1, 8)], ragged, 0)
    with pytest.raises(ValueError, match=r"record '\d' does not fit .* other is \(\d,\) and \(\d,\)"):
        next(batches)


def test_closing_ends_the_threads():
    before = set(threading.enumerate())

    def slow(record, rng):
        time.sleep(0.02)
        return make_row(record, rng)

    batches = Batches(ListSource(SIZES), [Phase(1, 2)], slow, 3, num_threads=4, prefetch=64)
    next(batches)
    threads = set(threading.enumerate()) - before
    assert len(threads) == 4
    start = time.monotonic()
    batches.close()
    for thread in threads:
        thread.join(5)
    assert time.monotonic() < start + 1  # the batches at hand, not the 64 that were asked for
    assert batches.state()["batches"] == 1


@pytest.mark.slow
def test_worker_processes_change_nothing():
    whole = take(Batches(ListSource(SIZES), [Phase(3, 4), Phase(1, 2)], make_row, 3), 9)
    batches = Batches(ListSource(SIZES), [Phase(3, 4), Phase(1, 2)], make_row, 3, num_workers=2, prefetch=2)
    first = [next(batches) for _ in range(5)]
    batches.restore({**batches.state(), "batches": 4})
    rest = [next(batches) for _ in range(5)]
    batches.close()
    assert all(equal(a, b) for a, b in zip([*first[:4], *rest], whole, strict=True))


# Examples: pictures in plain colours, so that a canvas says which picture it shows.

RED, GREEN, BLUE, ORANGE = (200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 120, 0)
COLOURS = {"red fish": RED, "apple": GREEN, "blue bird": BLUE, "fox": ORANGE}
CAPTION = "the red fish and the apple"
MODEL = ModelConfig(
    dit=DiTConfig(text_len=16),
    vae=VAEConfig(dim_multipliers=(1, 2, 4), temporal_downsample=(True, True)),  # strides of 4
    sampling=SamplingConfig(height=24, width=48, num_frames=9, layout="v2"),
)
V1 = dataclasses.replace(MODEL, sampling=dataclasses.replace(MODEL.sampling, layout="v1"))
PLAIN = Choice(cross_pair=0.0, drop_reference=0.0, larger_layout=0.0)


def png(colour, alpha=255):
    file = io.BytesIO()
    Image.new("RGBA", (6, 6), (*colour, alpha)).save(file, "PNG")
    return file.getvalue()


def fade(colour):
    """What the cross-pair picture of a colour looks like."""
    return tuple(value // 2 for value in colour)


def reference(label, role="subject"):
    views = (View(png(fade(COLOURS[label])), "generated"), View(png(COLOURS[label])))
    return ReferenceRecord(label, views, role)


def clip_record(labels=("red fish", "apple"), caption=CAPTION, **fields):
    spans = tuple((caption.index(label), caption.index(label) + len(label)) for label in labels)
    frames = np.random.default_rng(0).integers(0, 256, (9, 24, 48, 3)).astype(np.uint8)
    boxes = np.stack([np.arange(9), np.arange(9), np.arange(9) + 8, np.arange(9) + 6], -1)[None]
    record = ClipRecord(
        "clip 7", 9, 24, 48, 8.0, (Caption(caption, spans),), tuple(map(reference, labels)), "", frames, None, boxes
    )
    return dataclasses.replace(record, **fields)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    words = sorted({*" ".join(COLOURS).split(), "the", "and"})
    build_tokenizer(words, folder / "tokenizer", MODEL.dit.text_len)
    return load_tokenizer(folder)


@pytest.fixture
def example(tokenizer):
    def make(record, seed=0, choice=PLAIN, config=MODEL, target="canvas"):
        return clips.make_example(config, tokenizer, record, np.random.default_rng(seed), choice, target)

    return make


def shown(example):
    """The colour in the middle of each region."""
    canvas = example.case.canvas
    return [tuple(canvas.image[(y0 + y1) // 2, (x0 + x1) // 2].tolist()) for x0, y0, x1, y1 in canvas.regions]


@pytest.mark.parametrize("target", ["canvas", "video"])
def test_an_example_is_the_case_of_its_pictures_and_the_frames(example, tokenizer, target):
    record = clip_record()
    made = example(record, config=V1, target=target)
    case = prepare_case(
        V1,
        tokenizer,
        CAPTION,
        [Image.new("RGB", (6, 6), RED), Image.new("RGB", (6, 6), GREEN)],
        ["red fish", "apple"],
        num_frames=9,
        height=24,
        width=48,
        num_subjects=4,
    )
    for name in ("token_ids", "attention_mask", "region_mask", "subject_tokens", "subject_regions"):
        np.testing.assert_array_equal(getattr(made.case, name), getattr(case, name))
    np.testing.assert_array_equal(made.case.canvas.image, case.canvas.image)
    np.testing.assert_array_equal(made.case.canvas.mask, case.canvas.mask)
    frames = record.frames if target == "video" else np.concatenate([case.canvas.image[None], record.frames[:8]])
    np.testing.assert_array_equal(made.frames, frames)
    # A box of 8x6 pixels on the 4-pixel grid of latents, one pixel further to the right and down in every frame.
    cells = np.zeros((3, 6, 12), bool)
    offset = 0 if target == "video" else -1
    for frame in range(9):
        time_cell, moved = -(-frame // 4), frame + offset
        if moved >= 0:
            cells[time_cell, moved // 4 : (moved + 5) // 4 + 1, moved // 4 : (moved + 7) // 4 + 1] = True
    np.testing.assert_array_equal(made.subject_cells, cells)
    assert made.subject_cells[0].any() == (target == "video")
    arrays = clips.example_arrays(made)
    assert {name: (value.dtype.name, value.shape) for name, value in arrays.items()} == {
        "token_ids": ("int32", (16,)),
        "attention_mask": ("int32", (16,)),
        "canvas": ("uint8", (24, 48, 3)),
        "region_mask": ("float32", (3, 6, 12, 4)),
        "subject_tokens": ("float32", (4, 16)),
        "subject_regions": ("float32", (4, 6 // 2 * 12 // 2)),
        "frames": ("uint8", (9, 24, 48, 3)),
        "subject_cells": ("float32", (3, 6, 12)),
    }


def test_references_stand_in_any_cell_but_for_the_first_layout(example):
    regions = {example(clip_record(), seed).case.canvas.regions for seed in range(20)}
    left, right = (0, 0, 24, 24), (24, 0, 48, 24)
    assert regions == {(left, right), (right, left)}
    regions = {example(clip_record(), seed, config=V1).case.canvas.regions for seed in range(20)}
    assert regions == {((0, 4, 16, 20), (16, 4, 32, 20))}
    # More references than its three columns: the layout of the current release.
    four = clip_record(tuple(COLOURS), "the red fish and the apple and the blue bird and the fox")
    assert len(set(example(four, config=V1).case.canvas.regions)) == 4
    assert {y1 - y0 for _, y0, _, y1 in example(four, config=V1).case.canvas.regions} == {12}


def test_the_canvas_shows_the_views_that_were_chosen(example):
    assert shown(example(clip_record())) == [RED, GREEN]
    assert shown(example(clip_record(), choice=dataclasses.replace(PLAIN, cross_pair=1.0))) == [fade(RED), fade(GREEN)]
    choice = dataclasses.replace(PLAIN, cross_pair=0.3)
    pairs = [shown(example(clip_record(), seed, choice)) for seed in range(300)]
    crossed = np.array([[pair[0] == fade(RED), pair[1] == fade(GREEN)] for pair in pairs])
    assert np.all(np.abs(crossed.mean(0) - 0.3) < 0.08)  # three deviations
    assert abs(crossed.all(1).mean() - 0.09) < 0.05  # each for itself
    # Where there is one kind only, that is shown.
    fish = reference("red fish")
    for views, colour in ((fish.views[:1], fade(RED)), (fish.views[1:], RED)):
        record = clip_record(("red fish",), references=(dataclasses.replace(fish, views=views),))
        for cross_pair in (0.0, 1.0):
            assert shown(example(record, choice=dataclasses.replace(PLAIN, cross_pair=cross_pair))) == [colour]


def test_references_but_the_first_are_left_out_at_random(example):
    record = clip_record(("red fish", "apple", "fox"), "the red fish and the apple and the fox")
    choice = dataclasses.replace(PLAIN, drop_reference=0.25)
    seen = [tuple(shown(example(record, seed, choice))) for seed in range(300)]
    assert {colours[0] for colours in seen} == {RED}
    assert set(seen) == {(RED, GREEN, ORANGE), (RED, GREEN), (RED, ORANGE), (RED,)}
    for colour in (GREEN, ORANGE):
        assert abs(np.mean([colour in colours for colours in seen]) - 0.75) < 0.08
    # Their words are marked in the order of the regions: of nine words the second and third, and the last. The clip is whole.
    made = example(record, seen.index((RED, ORANGE)), choice)
    assert [np.flatnonzero(row).tolist() for row in made.case.subject_tokens] == [[1, 2], [8], [], []]
    np.testing.assert_array_equal(made.frames[1:], record.frames[:8])


@pytest.mark.parametrize("config", [MODEL, V1])
def test_a_larger_layout_leaves_cells_white(example, config):
    record, choice = clip_record(), dataclasses.replace(PLAIN, larger_layout=1.0)
    offered = layout_cells(3, 24, 48, config.sampling.layout)
    taken = set()
    for seed in range(60):
        case = example(record, seed, choice, config).case
        assert set(case.canvas.cells) <= set(offered)
        assert len(case.canvas.regions) == len(case.canvas.cells) == 2
        taken.add(tuple(offered.index(cell) for cell in case.canvas.cells))
        mask = np.zeros((24, 48), np.uint8)
        for (x0, y0, x1, y1), colour in zip(case.canvas.regions, (RED, GREEN), strict=True):
            mask[y0:y1, x0:x1] = 1
            assert (case.canvas.image[y0:y1, x0:x1] == colour).all()
        np.testing.assert_array_equal(case.canvas.mask, mask)
        assert (case.canvas.image[mask == 0] == 255).all()
        np.testing.assert_array_equal(case.region_mask, region_mask(mask, 3, 4))
        assert case.subject_tokens.shape[0] == case.subject_regions.shape[0] == 4
        assert case.subject_tokens.sum(1).tolist() == [2, 1, 0, 0]
        assert (case.subject_regions.sum(1) > 0).tolist() == [True, True, False, False]
    every = {(0, 1), (0, 2), (1, 2)}
    assert taken == (every if config is V1 else every | {(b, a) for a, b in every})


def test_a_larger_layout_is_the_next_one_and_as_frequent_as_chosen():
    rng = np.random.default_rng(0)
    orders = [clips.draw_order(2, "v2", rng, 0.2) for _ in range(1000)]
    larger = [order for order in orders if not isinstance(order, int)]
    assert abs(len(larger) / 1000 - 0.2) < 0.04  # three deviations
    for count, layout, cells in ((1, "v2", 2), (3, "v2", 4), (4, "v2", 6), (5, "v2", 8), (6, "v2", 8), (1, "v1", 3)):
        order = clips.draw_order(count, layout, rng, 1.0)
        assert len(order) == cells
        assert sorted(reference for reference in order if reference is not None) == list(range(count))
    for count, layout in ((0, "v2"), (7, "v2"), (8, "v2"), (0, "v1"), (3, "v1")):  # there is none
        assert isinstance(clips.draw_order(count, layout, rng, 1.0), int)


def test_clips_without_words_or_pictures(example):
    # A reference that the caption does not name has a place, but no subject.
    record = clip_record(captions=(Caption(CAPTION, ((4, 12), None)),))
    case = example(record).case
    assert case.subject_tokens.sum(1).tolist() == [2, 0, 0, 0]
    assert (case.subject_regions.sum(1) > 0).tolist() == [True, False, False, False]
    assert case.canvas.mask.sum() > 24 * 24
    # Without references the canvas is white; without boxes no cell shows a subject.
    made = example(clip_record((), references=(), subject_boxes=None), choice=Choice())
    assert (made.case.canvas.image == 255).all()
    assert not made.case.region_mask.any()
    assert not made.subject_cells.any()
    # Any of the captions.
    captions = (Caption("the red fish", ((4, 12), None)), Caption("the apple", (None, (4, 9))))
    made = [example(clip_record(captions=captions), seed) for seed in range(20)]
    assert {(each.caption, each.case.prompt) for each in made} == {(0, "the red fish"), (1, "the apple")}


def test_a_background_fills_its_cell(example):
    record = clip_record(references=(reference("red fish"), reference("apple", "background")))
    case = example(record, config=V1).case
    assert case.canvas.regions == ((0, 4, 16, 20), (16, 0, 32, 24))
    expected = compose_canvas(
        [Image.new("RGB", (6, 6), RED), Image.new("RGB", (6, 6), GREEN)], 24, 48, "v1", roles=["subject", "background"]
    )
    np.testing.assert_array_equal(case.canvas.image, expected.image)


def test_transparent_pictures_are_put_on_white(example):
    fish = ReferenceRecord("red fish", (View(png(RED, alpha=0)),))
    assert shown(example(clip_record(("red fish",), references=(fish,)))) == [(255, 255, 255)]


def test_videos_are_decoded_and_short_clips_cut(example, tmp_path):
    ramp = np.linspace(0, 255, 9).astype(np.uint8)[:, None, None, None] * np.ones((1, 24, 48, 3), np.uint8)
    write_video(tmp_path / "clip.mp4", ramp, 8.0, scale=1)
    video = (tmp_path / "clip.mp4").read_bytes()
    record = clip_record(frames=None, video=video, subject_boxes=np.zeros((1, 9, 4), int))
    decoded = read_video(tmp_path / "clip.mp4").frames
    np.testing.assert_array_equal(example(record).frames[1:], decoded[:8])
    np.testing.assert_array_equal(example(record, target="video").frames, decoded)
    # As many frames as the VAE takes, four and one more: of 7 and the canvas 5, of 7 alone 5.
    short = dataclasses.replace(record, num_frames=7, subject_boxes=record.subject_boxes[:, :7])
    for target, own in (("canvas", 4), ("video", 5)):
        made = example(short, target=target)
        assert made.frames.shape[0] == 5
        assert made.subject_cells.shape[0] == made.case.region_mask.shape[0] == 2
        np.testing.assert_array_equal(made.frames[5 - own :], decoded[:own])
    assert example(dataclasses.replace(record, num_frames=1, subject_boxes=None), target="video").frames.shape[0] == 1
    with pytest.raises(ValueError, match=r"it has 3 frames; first_frame_target='canvas' needs 4"):
        example(dataclasses.replace(record, num_frames=3, subject_boxes=None))
    config = dataclasses.replace(MODEL, sampling=dataclasses.replace(MODEL.sampling, num_frames=13))
    with pytest.raises(ValueError, match="has no frame 9"):
        example(dataclasses.replace(record, num_frames=13, subject_boxes=None), config=config, target="video")


def test_records_that_cannot_be_taken_are_refused(example):
    with pytest.raises(ValueError, match="has no caption"):
        example(clip_record(captions=()))
    with pytest.raises(ValueError, match=r"has 2 references, more than Choice\.num_subjects=1"):
        example(clip_record(), choice=Choice(num_subjects=1))
    with pytest.raises(ValueError, match="has 1 label_spans for 2 references"):
        example(clip_record(captions=(Caption(CAPTION, ((4, 12),)),)))
    with pytest.raises(ValueError, match="not as clean_prompt leaves it"):
        example(clip_record(captions=(Caption("the  red fish", ((5, 13), None)),)))
    with pytest.raises(ValueError, match="neither frames nor a video"):
        example(clip_record(frames=None))
    with pytest.raises(ValueError, match=r"first 8 frames are an array of \(8, 24, 48, 3\)"):
        example(clip_record(height=48))
    with pytest.raises(ValueError, match="its subject_boxes are of 9 frames; it says 8"):
        example(clip_record(num_frames=8))
    with pytest.raises(ValueError, match="'apple' has no views"):
        example(clip_record(references=(reference("red fish"), ReferenceRecord("apple", ()))))
    with pytest.raises(ValueError, match=r"Choice\.cross_pair=1\.5"):
        Choice(cross_pair=1.5)
    with pytest.raises(ValueError, match=r"Choice\.num_subjects=9 must be in 1\.\.8"):
        Choice(num_subjects=9)


def test_subject_cells_are_those_that_a_box_reaches_into():
    boxes = np.random.default_rng(0).integers(-6, 54, (40, 9, 4))  # empty ones and ones beyond the frame among them
    expected = np.zeros((3, 6, 12), bool)
    for frame in range(9):
        pixels = np.zeros((24, 48), bool)
        for x0, y0, x1, y1 in boxes[:3, frame].clip(0):
            pixels[y0:y1, x0:x1] = True
        expected[-(-frame // 4)] |= pixels.reshape(6, 4, 12, 4).any((1, 3))
    np.testing.assert_array_equal(clips.subject_cells(MODEL, boxes[:3], 24, 48), expected)
    assert expected.any()
    assert not expected.all()


# Encoded records.


def encoded_record(number=0, frames=5, cases=2, **fields):
    def case(which):
        value = 10 * number + which
        return EncodedCase(
            caption=which,
            clean_latents=np.arange(frames, dtype=np.float16)[:, None, None, None] + np.full((frames, 2, 3, 4), value),
            subject_cells=np.arange(frames)[:, None, None] * np.ones((frames, 2, 3), np.float16),
            reference_latents=np.full((frames, 2, 3, 4), value, np.float16),
            region_mask=np.arange(frames)[:, None, None, None] * np.ones((frames, 2, 3, 4), np.float16),
            image_embeddings=np.full((3, 2), value, np.float16),
            subject_tokens=np.ones((4, 6), np.float16),
            subject_regions=np.ones((4, 1), np.float16),
        )

    captions = tuple(Caption("x", (), np.full((2 + which, 5), which + 1, np.float16)) for which in range(2))
    record = ClipRecord(str(number), *SMALL, 8.0, captions, (), cases=tuple(map(case, range(cases))))
    return dataclasses.replace(record, **fields)


def test_a_case_of_an_encoded_record_is_a_row(tokenizer):
    rows = [clips.choose_case(encoded_record(), np.random.default_rng(seed), 6) for seed in range(20)]
    assert {int(row["reference_latents"][0, 0, 0, 0]) for row in rows} == {0, 1}
    for row in rows:
        which = int(row["reference_latents"][0, 0, 0, 0])
        # The caption of that case, then zeros.
        assert row["text_embeddings"][:, 0].tolist() == [which + 1.0] * (2 + which) + [0.0] * (4 - which)
        assert set(row) == {
            *("text_embeddings", "image_embeddings", "reference_latents", "region_mask"),
            *("subject_tokens", "subject_regions", "clean_latents", "subject_cells"),
        }
        assert {value.dtype.name for value in row.values()} == {"float32"}
    record = encoded_record(cases=1)
    text_only = dataclasses.replace(
        record.cases[0], image_embeddings=None, reference_latents=None, region_mask=None, clean_latents=np.zeros(3)
    )
    row = clips.choose_case(dataclasses.replace(record, cases=(text_only,)), np.random.default_rng(0), 6)
    assert set(row) == {"text_embeddings", "subject_tokens", "subject_regions", "clean_latents", "subject_cells"}
    with pytest.raises(ValueError, match="no encoded cases"):
        clips.choose_case(encoded_record(cases=0), np.random.default_rng(0), 6)
    with pytest.raises(ValueError, match="caption 0 has embeddings of 2 tokens; at most text_len=1"):
        clips.choose_case(record, np.random.default_rng(0), 1)
    with pytest.raises(ValueError, match="caption 0 has no embeddings"):
        clips.choose_case(dataclasses.replace(record, captions=(Caption("x", ()),) * 2), np.random.default_rng(0), 6)


class EncodedSource(ListSource):
    def __getitem__(self, index):
        return encoded_record(index)


def choose(record, rng):
    return clips.choose_case(record, rng, 6)


def test_latent_frames_are_drawn_for_a_whole_batch():
    source = EncodedSource([SMALL] * 8)
    seen = set()
    for batch in take(Batches(source, [Phase(1, 4, num_latent_frames=3)], choose, 0), 60):
        positions = batch["frame_positions"]
        assert positions[0] == 0
        assert list(positions) == sorted(set(positions))
        seen.add(positions)
        for name in ("clean_latents", "reference_latents", "region_mask", "subject_cells"):
            assert batch[name].shape[:2] == (4, 3)
        np.testing.assert_array_equal(batch["region_mask"][:, :, 0, 0, 0], np.tile(positions, (4, 1)))
        np.testing.assert_array_equal(batch["subject_cells"][:, :, 0, 0], np.tile(positions, (4, 1)))
        moved = batch["clean_latents"] - batch["reference_latents"]
        np.testing.assert_array_equal(moved[:, :, 1, 2, 3], np.tile(positions, (4, 1)))
    assert seen == {(0, a, b) for a in range(1, 5) for b in range(a + 1, 5)}

    def positions(count, **phase):
        return {batch["frame_positions"] for batch in take(Batches(source, [Phase(1, 4, **phase)], choose, 0), count)}

    assert positions(3) == {(0, 1, 2, 3, 4)}
    assert positions(30, num_latent_frames=2, reach=3) == {(0, 1), (0, 2)}
    assert positions(3, reach=2) == {(0, 1)}
    assert positions(3, num_latent_frames=1) == {(0,)}
    assert positions(3, num_latent_frames=9) == {(0, 1, 2, 3, 4)}  # all that a shorter clip has


def test_processes_draw_the_same_latent_frames():
    parts = [
        take(
            Batches(
                EncodedSource([SMALL] * 8),
                [Phase(1, 4, num_latent_frames=2)],
                choose,
                0,
                process_index=process,
                process_count=2,
            ),
            10,
        )
        for process in range(2)
    ]
    assert len({batch["frame_positions"] for batch in parts[0]}) > 1
    for a, b in zip(*parts, strict=True):
        assert a["frame_positions"] == b["frame_positions"]


def test_needs_neither_torch_nor_tensorflow():
    code = "import sys, magref_jax.data.clips; sys.exit(any(name in sys.modules for name in ('torch', 'tensorflow')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
