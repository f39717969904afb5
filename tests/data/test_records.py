"""Records on disk: every byte comes back, interrupted writing ends as uninterrupted, and what is damaged is named."""

import dataclasses
import hashlib
import io
import itertools
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import msgpack
import numpy as np
import pytest
from PIL import Image

from magref_jax.data.emoji_records import EmojiSource
from magref_jax.data.emoji_world import CROSS_PAIR_KINDS, EmojiWorldConfig, load_atlas, sample_clip
from magref_jax.data.records import (
    INDEX,
    PROGRESS,
    Caption,
    ClipRecord,
    EncodedCase,
    Latents,
    ReferenceRecord,
    Skipped,
    TooManySkippedError,
    View,
    decode_record,
    encode_record,
    open_records,
    write_records,
)

RNG = np.random.default_rng(0)


def noise(*shape: int, dtype=np.float16) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


FULL = ClipRecord(
    id="ünï-😀",
    num_frames=3,
    height=4,
    width=6,
    fps=24000 / 1001,
    captions=(
        Caption("the red apple and a dog", ((4, 13), None), noise(5, 8, dtype=ml_dtypes.bfloat16)),
        Caption("a dog", (None, (2, 5)), None),
    ),
    references=(
        ReferenceRecord("red apple", (View(b"\x89PNG\0\xff", "in_pair"), View(b"", "generated")), "subject", "1f34e"),
        ReferenceRecord("dog", (View(bytes(range(256)), "cross_clip"),), "background"),
    ),
    source="somewhere",
    frames=RNG.integers(0, 256, (3, 4, 6, 3), np.uint8),
    video=b"\0mp4",
    subject_boxes=RNG.integers(0, 6, (2, 3, 4), np.int32),
    latents=Latents(noise(1, 2, 3, 16, dtype=ml_dtypes.bfloat16), noise(1, 2, 3, 16, dtype=np.float32)),
    cases=(
        EncodedCase(
            1, noise(1, 2, 3, 16), noise(1, 2, 3), noise(1, 2, 3, 16), noise(1, 2, 3, 4), None, noise(2, 5), noise(2, 6)
        ),
        EncodedCase(0, noise(1, 2, 3, 16), noise(1, 2, 3), None, None, noise(2, 4), noise(2, 5), noise(2, 0)),
    ),
)


def small(index: int) -> ClipRecord:
    """A record of about a kilobyte; sizes change every five records."""
    height = 4 + 2 * (index // 5)
    frames = np.random.default_rng(index).integers(0, 256, (2, height, 8, 3), np.uint8)
    return ClipRecord(str(index), 2, height, 8, 8.0, (Caption(f"clip {index}", ()),), (), frames=frames)


def assert_equal(actual, expected):
    """Equal in type, dtype, shape and bytes, to the last leaf."""
    assert type(actual) is type(expected)
    if isinstance(expected, np.ndarray):
        assert (actual.dtype, actual.shape, actual.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    elif dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            assert_equal(getattr(actual, field.name), getattr(expected, field.name))
    elif isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_equal(*pair)
    else:
        assert actual == expected


def contents(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_every_field_comes_back_bitwise():
    assert_equal(decode_record(encode_record(FULL)), FULL)
    assert encode_record(FULL) == encode_record(decode_record(encode_record(FULL)))
    bare = dataclasses.replace(FULL, frames=None, video=None, subject_boxes=None, latents=None, source="")
    assert_equal(decode_record(encode_record(bare)), bare)


@pytest.mark.parametrize(
    "array",
    [noise(2, 3).T, noise(4, 6)[::2, ::-1], np.zeros((0, 3), np.int64), np.array(True), noise(3).astype(">f4")],
    ids=["transposed", "sliced", "empty", "scalar", "big endian"],
)
def test_arrays_of_any_layout_come_back(array):
    latents = Latents(array, array)
    back = decode_record(encode_record(dataclasses.replace(FULL, latents=latents))).latents
    np.testing.assert_array_equal(back.mean, array)
    assert back.mean.shape == array.shape


def test_the_bytes_are_msgpack_with_a_version():
    # Somebody without this package can read them, and a later version can tell them apart.
    version, fields = msgpack.unpackb(encode_record(FULL), ext_hook=lambda code, data: msgpack.unpackb(data))
    assert version == 1
    assert fields["captions"][0]["text"] == "the red apple and a dog"
    assert fields["frames"][:2] == ["uint8", [3, 4, 6, 3]]
    assert fields["frames"][2] == FULL.frames.tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no record"),
        (encode_record(FULL)[:-5], "no record"),
        (b"\xc1" * 30, "no record"),
        (msgpack.packb([2, {}]), "version 2; this program reads version 1"),
        (msgpack.packb([1, {"id": "x"}]), "other fields"),
        (msgpack.packb([1, 5]), "other fields"),
        (msgpack.packb(5), "no record"),
    ],
)
def test_other_bytes_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        decode_record(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": None, "video": None, "latents": None, "cases": ()}, "none of frames, video, latents and cases"),
        ({"height": 5}, r"has frames \(3, 4, 6, 3\), its sizes say \(3, 5, 6, 3\)"),
        ({"captions": ()}, "no caption"),
        ({"captions": (Caption("dog", (None,)),)}, "2 references and a caption with 1 label_spans"),
        ({"captions": (Caption("dog", ((0, 4), None)),)}, r"span \(0, 4\) is not inside 'dog'"),
        ({"captions": (FULL.captions[0],)}, "case of caption 1, of 1"),
        ({"references": (FULL.references[0], ReferenceRecord("dog", ()))}, "'dog' has no view"),
    ],
)
def test_contradicting_records_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"ünï.*{message}"):
        encode_record(dataclasses.replace(FULL, **changes))


def test_a_folder_gives_back_its_records_at_random(tmp_path):
    records = [small(index) for index in range(23)]
    source = write_records(tmp_path / "records", records, shard_records=10)
    shards = [f"records-0000{number}.array_record" for number in range(3)]
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == [*shards, INDEX]
    assert len(source) == 23
    assert source.sizes == [(2, record.height, 8) for record in records]
    for index in (22, 0, 10, 9, 13):
        assert_equal(source[index], records[index])
    with pytest.raises(IndexError, match="record 23 of 23"):
        source[23]
    # Threads share a source; a process gets a pickle of it.
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(source.__getitem__, [index % 23 for index in range(200)]))
    assert [record.id for record in read] == [str(index % 23) for index in range(200)]
    assert_equal(pickle.loads(pickle.dumps(source))[17], records[17])


def test_a_shard_is_closed_after_so_many_bytes(tmp_path):
    size = len(encode_record(small(0)))
    write_records(tmp_path, [small(0)] * 7, shard_bytes=2 * size + 1)
    assert [shard["inputs"] for shard in json.loads((tmp_path / INDEX).read_text())["shards"]] == [3, 3, 1]


def test_the_fingerprint_says_whether_records_are_the_same(tmp_path):
    records = [small(index) for index in range(4)]
    prints = [
        write_records(tmp_path / name, given).fingerprint
        for name, given in {"a": records, "b": records, "c": records[::-1], "d": records[:3]}.items()
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_several_folders_are_one_source(tmp_path):
    for number, name in enumerate(("b", "a", "c")):
        write_records(tmp_path / name, [small(10 * number + index) for index in range(3)])
    source = open_records([tmp_path / "b", str(tmp_path / "[ac]")])
    assert [source[index].id for index in range(9)] == ["0", "1", "2", "10", "11", "12", "20", "21", "22"]
    assert source.fingerprint != open_records(str(tmp_path / "*")).fingerprint


class Interrupted(Exception):
    pass


def test_interrupted_writing_ends_as_uninterrupted(tmp_path):
    def inputs(stop: int):
        def make(start: int):
            for index in itertools.count(start):
                if index == stop:
                    raise Interrupted
                yield Skipped(str(index), "no picture") if index == 6 else small(index)

        return make

    options = {"shard_records": 4, "settings": {"size": (4, 8)}, "max_skipped": 1}
    write_records(tmp_path / "straight", inputs(-1), 14, **options)
    for stop in range(14):  # each attempt gets one input further
        with pytest.raises(Interrupted):
            write_records(tmp_path / "halting", inputs(stop), 14, **options)
        assert not (tmp_path / "halting" / INDEX).exists()
    source = write_records(tmp_path / "halting", inputs(-1), 14, **options)
    assert contents(tmp_path / "halting") == contents(tmp_path / "straight")
    assert source.skipped == [Skipped("6", "no picture")]
    assert [record.id for record in source] == [str(index) for index in range(14) if index != 6]
    # A complete folder is opened: nothing is made again.
    assert len(write_records(tmp_path / "halting", inputs(0), 14, **options)) == 13


def test_a_folder_of_other_records_is_not_continued(tmp_path):
    write_records(tmp_path, [small(0)], settings={"fps": 8})
    with pytest.raises(ValueError, match="made with fps=8, now it is 16; remove the folder"):
        write_records(tmp_path, [small(0)], settings={"fps": 16})
    with pytest.raises(ValueError, match="inputs=1, now it is 2"):
        write_records(tmp_path, [small(0)] * 2, settings={"fps": 8})
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ValueError, match=f"{INDEX} is damaged"):
        write_records(tmp_path, [small(0)], settings={"fps": 8})


def test_too_many_skipped_inputs_stop(tmp_path):
    def make(start):
        return [small(0), Skipped("a.mp4", "too short"), small(2), Skipped("b.mp4", "no video")][start:]

    with pytest.raises(TooManySkippedError, match="2 inputs have no record, at most 1 may: a.mp4: too short; b.mp4"):
        write_records(tmp_path / "one", make, 4, max_skipped=1)
    assert len(write_records(tmp_path / "two", make, 4, max_skipped=2)) == 2
    # Also a shard of nothing but skipped ones, and the count goes over shards.
    assert [record.id for record in write_records(tmp_path / "each", make, 4, shard_records=1, max_skipped=2)] == [
        "0",
        "2",
    ]
    with pytest.raises(ValueError, match="inputs ended after 4 of count=5"):
        write_records(tmp_path / "five", make, 5, max_skipped=2)
    with pytest.raises(ValueError, match="no inputs"):
        write_records(tmp_path / "none", [])


def test_when_all_inputs_are_skipped_nothing_is_kept(tmp_path):
    def make(start):
        return [Skipped("a.mp4", "too short"), Skipped("b.mp4", "no video")][start:]

    with pytest.raises(TooManySkippedError, match="none of 2 inputs has a record: a.mp4: too short; b.mp4: no video"):
        write_records(tmp_path / "new", make, 2, max_skipped=2)
    assert contents(tmp_path / "new") == {}
    with pytest.raises(ValueError, match="shard_records=0 must be 1 or more"):
        write_records(tmp_path / "new", [small(0)], shard_records=0)


def test_a_full_disk_is_an_error_of_the_system_and_leaves_whole_shards(tmp_path):
    resource = pytest.importorskip("resource")
    large = np.random.default_rng(0).integers(0, 256, (2, 200, 200, 3), np.uint8)
    records = [small(0), dataclasses.replace(small(1), frames=large, height=200, width=200)]
    whole = write_records(tmp_path / "whole", records, shard_records=1)
    first, second = ((tmp_path / "whole" / f"records-0000{n}.array_record").stat().st_size for n in range(2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most, kept in ((first - 1, set()), (second - 1, {PROGRESS, "records-00000.array_record"})):
        folder = tmp_path / str(most)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            with pytest.raises(
                OSError, match=r"records-0000\d.array_record cannot be written: write\(\) failed: File too"
            ):
                write_records(folder, records, shard_records=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert set(contents(folder)) == kept
        assert write_records(folder, records, shard_records=1).fingerprint == whole.fingerprint


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder of records is at .*nowhere"):
        open_records(tmp_path / "nowhere*")
    with pytest.raises(FileNotFoundError, match=f"has no records: there is no {INDEX}"):
        open_records(tmp_path)
    write_records(tmp_path / "records", [small(index) for index in range(6)], shard_records=3)
    (tmp_path / "records" / INDEX).rename(tmp_path / "records" / PROGRESS)
    with pytest.raises(FileNotFoundError, match="unfinished, 6 of 6 inputs are there"):
        open_records(tmp_path / "records")
    (tmp_path / "records" / PROGRESS).rename(tmp_path / "records" / INDEX)
    (tmp_path / "records/records-00001.array_record").unlink()
    with pytest.raises(FileNotFoundError, match="records-00001.array_record is missing"):
        open_records(tmp_path / "records")


def test_damage_is_named(tmp_path):
    source = write_records(tmp_path, [small(index) for index in range(30)], shard_records=10)
    source.verify()
    path = tmp_path / "records-00001.array_record"
    data = bytearray(path.read_bytes())
    where = data.index(small(13).frames.tobytes()[100:120])  # incompressible, so it stands there as it is
    data[where] ^= 1
    path.write_bytes(data)
    source = open_records(tmp_path)
    with pytest.raises(ValueError, match=r"records-00001.array_record: record 3 is damaged: .*hash mismatch"):
        source[13]
    assert_equal(source[12], small(12))
    with pytest.raises(ValueError, match=r"damaged: \S*records-00001.array_record\."):
        source.verify()
    index = (tmp_path / INDEX).read_text()
    for damaged in ("", "[]", index.replace('"sha256"', '"sha"'), index.replace('"shards": [', '"shards": [3, ')):
        (tmp_path / INDEX).write_text(damaged)
        with pytest.raises(ValueError, match=f"{INDEX} is damaged"):
            open_records(tmp_path)
    (tmp_path / INDEX).write_text(index)
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"records-00001.array_record has {len(data) - 1} bytes, {INDEX} says"):
        open_records(tmp_path)


WORLD = EmojiWorldConfig(background_reference=0.5)


def pixels(view: View) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(view.image)))


def test_emoji_records_are_the_clips_of_emoji_world():
    source = EmojiSource(WORLD, "train", seed=5, count=20)
    assert len(source) == 20
    assert source.sizes == [(8, 56, 72)] * 20
    roles = set()
    for index, record in enumerate(source):
        clip = sample_clip(WORLD, "train", 5, index)
        np.testing.assert_array_equal(record.frames, clip.frames)
        assert record.captions[0].text == clip.caption
        assert record.captions[0].label_spans == tuple(reference.label_span for reference in clip.references)
        np.testing.assert_array_equal(record.subject_boxes, [subject.boxes for subject in clip.subjects])
        for reference, drawn in zip(record.references, clip.references, strict=True):
            roles.add(reference.role)
            assert (reference.label, reference.role) == (drawn.label, drawn.role)
            assert reference.views[0].origin == "in_pair"
            np.testing.assert_array_equal(pixels(reference.views[0]), drawn.image)
        encode_record(record)
    assert roles == {"subject", "background"}


def test_emoji_views_show_the_identity_in_other_ways():
    atlas = load_atlas()
    identities = {identity.code_point: number for number, identity in enumerate(atlas.identities)}
    for index, record in enumerate(EmojiSource(WORLD, count=30)):
        subjects = sample_clip(WORLD, "train", 0, index).subjects
        for reference, subject in zip(record.references, subjects, strict=False):
            assert identities[reference.identity] == subject.identity
            _, style, *others = reference.views
            styles = [atlas.sprite(subject.identity, name) for name in atlas.styles if name != subject.style]
            assert style.origin == "cross_clip"
            assert any(np.array_equal(pixels(style), sprite) for sprite in styles)
            assert {view.origin for view in others} == {"generated"}
            assert len(others) in (2, 3)  # a symmetric sprite has no mirror image
            images = [view.image for view in reference.views]
            assert len(set(images)) == len(images)
        background = [reference for reference in record.references if reference.role == "background"]
        assert all(len(reference.views) == 1 and not reference.identity for reference in background)


def test_a_world_with_cross_pairs_gives_the_drawn_view_first_and_its_pair():
    world = EmojiWorldConfig(cross_pair=0.5)
    origins = set()
    for index, record in enumerate(EmojiSource(world, seed=1, count=20)):
        clip = sample_clip(world, "train", 1, index)
        for reference, drawn, subject in zip(record.references, clip.references, clip.subjects, strict=True):
            np.testing.assert_array_equal(pixels(reference.views[0]), drawn.image)
            (in_pair,) = [view for view in reference.views if view.origin == "in_pair"]
            np.testing.assert_array_equal(pixels(in_pair), load_atlas().sprite(subject.identity, subject.style))
            origins.add(reference.views[0].origin)
            assert len(reference.views) in (len(CROSS_PAIR_KINDS), len(CROSS_PAIR_KINDS) + 1)
    assert origins == {"in_pair", "cross_clip", "generated"}


def test_emoji_sources_repeat_and_differ():
    first, second = (EmojiSource(WORLD, seed=2, count=5) for _ in range(2))
    assert encode_record(first[3]) == encode_record(second[3])
    assert first.fingerprint == second.fingerprint
    others = [
        EmojiSource(WORLD, seed=3, count=5),
        EmojiSource(WORLD, seed=2, count=6),
        EmojiSource(WORLD, "held_out", seed=2, count=5),
        EmojiSource(EmojiWorldConfig(), seed=2, count=5),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 5
    with pytest.raises(ValueError, match="count=0"):
        EmojiSource(WORLD, count=0)


def test_emoji_as_a_tensorflow_dataset_without_tensorflow(tmp_path):
    code = f"""if True:
        import sys
        from magref_jax.data.emoji_dataset import DatasetSource, EmojiDataset, EmojiDatasetConfig
        from magref_jax.data.emoji_records import EmojiSource
        from magref_jax.data.emoji_world import EmojiWorldConfig
        from magref_jax.data.records import encode_record

        world = EmojiWorldConfig(background_reference=0.5, cross_pair=0.2)
        config = EmojiDatasetConfig(name="small", world=world, num_clips=12, num_held_out=3, seed=4)
        builder = EmojiDataset(config=config, data_dir={str(tmp_path)!r}, file_format="array_record")
        builder.download_and_prepare()
        sources = [DatasetSource(builder.as_data_source(split)) for split in ("train", "held_out")]
        for split, source, count in zip(("train", "held_out"), sources, (12, 3), strict=True):
            expected = EmojiSource(world, split, 4, count)
            assert source.sizes == expected.sizes
            for index in range(count):
                assert encode_record(source[index]) == encode_record(expected[index]), (split, index)
        assert sources[0].fingerprint != sources[1].fingerprint
        assert "tensorflow" not in sys.modules
        import tensorflow_datasets as tfds
        folder = builder.data_dir
        again = DatasetSource(tfds.builder_from_directory(folder).as_data_source("train"))
        assert again.fingerprint == sources[0].fingerprint
        print("done", builder.info.splits["train"].num_bytes // 12)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path.parent)
    assert "done" in done.stdout, done.stderr[-3000:]


def test_drawing_emoji_needs_no_library_of_data_sets():
    code = (
        "import sys; from magref_jax.data.emoji_records import EmojiSource, EmojiWorldConfig; "
        "EmojiSource(EmojiWorldConfig(), count=1)[0]; "
        "print({'array_record', 'tensorflow_datasets', 'tensorflow', 'torch', 'grain'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
