"""OpenS2V's annotations, made here for a video with known shapes: the right cut-outs, names, times and pairs."""

import json
import re
import sys

import av
import numpy as np
import pytest
from PIL import Image

from magref_jax.data import open_s2v
from magref_jax.data.open_s2v import decode_mask
from magref_jax.data.prepare import Cut, make_record, read_lines

WIDTH, HEIGHT, RATE = 96, 64, 12.0


def encode_mask(mask: np.ndarray) -> dict:
    """COCO's run lengths as its own encoder writes them."""
    values = mask.T.reshape(-1).astype(int)
    edges = np.flatnonzero(np.diff(values)) + 1
    lengths = np.diff([0, *edges, len(values)]).tolist()
    lengths = [0, *lengths] if values[0] else lengths
    text = ""
    for index, length in enumerate(lengths):
        value = length - lengths[index - 2] if index > 2 else length
        while True:
            group, value = value & 31, value >> 5
            more = value != (-1 if group & 16 else 0)
            text += chr(48 + group + 32 * more)
            if not more:
                break
    return {"size": list(mask.shape), "counts": text, "score": [0.9]}


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y0:y1, x0:x1] = True
    return mask


DOG, HAT, SPECK, GRASS = (8, 8, 40, 56), (60, 4, 84, 24), (90, 60, 93, 63), (0, 0, 96, 60)


def entry(path: str) -> dict:
    masks = {"dog": DOG, "animal": DOG, "hat": HAT, "speck": SPECK, "grass": GRASS, "cat": (60, 30, 80, 60)}
    names = list(masks)
    return {
        "metadata": {
            "cut": [0, 20],
            "face_cut": [6, 18],
            "crop": [4, WIDTH + 4, 2, HEIGHT + 2],
            "fps": RATE,
            "path": path,
            "cap": ["A dog, an animal,  with a speck and a hat on grass."],
        },
        "word_tags": {"background": ["grass"], "subject": ["dog", "animal"], "object": ["hat", "speck", "cat"]},
        "annotation": {
            "ann_frame_data": {"ann_frame_idx": 6},
            "mask_map": {str(number): {"class_name": name} for number, name in enumerate(names, start=1)},
            "mask_annotation": {
                "6": {str(n): encode_mask(rectangle(*masks[name])) for n, name in enumerate(names, start=1)}
            },
        },
    }


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """The list made of two clips, one of a broken video, and a pair."""
    folder = tmp_path_factory.mktemp("s2v")
    with av.open(str(folder / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=12)
        stream.width, stream.height, stream.pix_fmt = WIDTH + 8, HEIGHT + 6, "bgr0"
        for index in range(24):
            frame = np.full((HEIGHT + 6, WIDTH + 8, 3), 10 * index, np.uint8)
            for (x0, y0, x1, y1), colour in ((DOG, (200, 0, index)), (HAT, (0, 200, index))):
                frame[y0 + 2 : y1 + 2, x0 + 4 : x1 + 4] = colour  # the crop begins at (4, 2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode(None))
    entries = {"one/a": entry("a.mkv"), "two": entry("a.mkv"), "gone": entry("gone.mkv")}
    (folder / "d.json").write_text(json.dumps(entries))
    pair = {"cur_id": "one/a", "aft_id": "two", "cur_class_name": "dog", "aft_class_name": "dog"}
    pairs = [
        pair | {"text_similarity": 0.9, "image_similarity": 0.7},
        pair | {"text_similarity": 0.9, "image_similarity": 0.5, "cur_class_name": "hat", "aft_class_name": "hat"},
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    arguments = ["x", "d.json", "--videos", ".", "--out", "list", "--pairs", "pairs.json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", arguments)
        open_s2v.main()
    return folder / "list"


def test_masks_come_back():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((rng.integers(1, 40), rng.integers(1, 40))) < rng.random()
        np.testing.assert_array_equal(decode_mask(encode_mask(mask)), mask)
    # By hand: of 4 rows and 3 columns, row 1 of column 1 and row 2 of column 2, so runs of 5, 1, 4, 1, 1. The fourth and fifth
    # are written as 1 - 1 = 0 and 1 - 4 = -3, which is 29 in 5 bits: character 48 + 29 = "M".
    expected = np.zeros((4, 3), bool)
    expected[1, 1] = expected[2, 2] = True
    np.testing.assert_array_equal(decode_mask({"size": [4, 3], "counts": "5140M"}), expected)
    with pytest.raises(ValueError, match="runs for 12 pixels, its size is 3x5"):
        decode_mask({"size": [5, 3], "counts": "5140M"})


def test_what_the_caption_names_is_cut_out(listed):
    lines = {line.id: line for line in read_lines(listed / "clips.jsonl")}
    assert list(lines) == ["one/a", "two"]  # the third has no video
    line = lines["one/a"]
    assert line.captions == ("A dog, an animal, with a speck and a hat on grass.",)
    assert (line.start, line.end, line.crop) == (0.5, 1.5, (4, 2, WIDTH + 4, HEIGHT + 2))
    # No second name for the dog, nothing tiny, no background, nothing that the caption does not name.
    assert [reference.label for reference in line.references] == ["dog", "hat"]
    for reference, box, colour in zip(line.references, (DOG, HAT), ((200, 0, 6), (0, 200, 6)), strict=True):
        image = np.asarray(Image.open(reference.images[0]))
        assert image.shape == (box[3] - box[1], box[2] - box[0], 4)
        assert (image == (*colour, 255)).all()
        assert reference.images[0].resolve().is_relative_to(listed.resolve())


def test_pairs_are_views_of_both(listed):
    lines = {line.id: line for line in read_lines(listed / "clips.jsonl")}
    for key, other in (("one/a", "two"), ("two", "one/a")):
        dog, hat = lines[key].references
        assert dog.origins == ("in_pair", "cross_clip")
        assert dog.images[1] == lines[other].references[0].images[0]
        assert hat.origins == ("in_pair",)  # not similar enough


def test_the_list_becomes_records(listed):
    record = make_record(read_lines(listed / "clips.jsonl")[0], Cut(HEIGHT, WIDTH, 12, RATE, "frames"))
    assert record.frames[:, 60, 50].tolist() == [[10 * index] * 3 for index in range(6, 18)]
    assert [record.captions[0].text[slice(*span)] for span in record.captions[0].label_spans] == ["dog", "hat"]


def run(monkeypatch, folder, *arguments: str) -> int:
    """The exit status of the command in a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["open_s2v", *arguments])
    try:
        open_s2v.main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def changed(path: tuple[str, ...], value) -> dict:
    """A good entry with another value in one place."""
    made = place = entry("a.mkv")
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return made


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("metadata", "cap"), None, "TypeError: "),
        (("metadata", "cap"), [], "it has no caption"),
        (("metadata", "cap"), ["  "], "it has no caption"),
        (("metadata", "cap"), [None], "AttributeError: |TypeError: |it has no caption"),
        (("metadata", "fps"), None, "TypeError: "),
        (("metadata", "fps"), 0, "ZeroDivisionError: "),
        (("metadata", "crop"), None, "TypeError: "),
        (("metadata", "crop"), [4, 900, 2, 66], "is not inside its 104x70 pixels"),
        (("metadata", "cut"), [20, 0], "0 <= start < end"),
        (("metadata", "path"), None, "TypeError: "),
        (("metadata", "path"), "gone.mkv", "there is no video file"),
        (("annotation",), None, "TypeError: "),
        (("annotation", "mask_annotation"), {}, "KeyError: '6'"),
        (("annotation", "mask_annotation", "6", "1"), None, "TypeError: "),
        (("annotation", "mask_annotation", "6", "1", "counts"), "5140M", "a mask has runs for 12 pixels"),
        (("word_tags",), None, "AttributeError: "),
        (("metadata",), [], "TypeError: "),
    ],
)
def test_a_wrong_annotation_leaves_out_its_clip(listed, tmp_path, monkeypatch, capsys, path, value, reason):
    wrong = changed(path, value)
    if path == ("metadata", "cut"):
        del wrong["metadata"]["face_cut"]
    (tmp_path / "d.json").write_text(json.dumps({"one": entry("a.mkv"), "two": wrong}))
    assert (
        run(monkeypatch, listed.parent, str(tmp_path / "d.json"), "--videos", ".", "--out", str(tmp_path / "out")) == 0
    )
    assert [line.id for line in read_lines(tmp_path / "out" / "clips.jsonl")] == ["one"]
    assert sorted(folder.name for folder in (tmp_path / "out" / "references").iterdir()) == ["one"]
    assert re.search(f"left out: two: .*{reason}", capsys.readouterr().out)


def test_a_caption_may_be_a_text(listed, tmp_path, monkeypatch):
    given = changed(("metadata", "cap"), "A dog &amp; a  hat.")
    (tmp_path / "d.json").write_text(json.dumps({"one": given}))
    assert (
        run(monkeypatch, listed.parent, str(tmp_path / "d.json"), "--videos", ".", "--out", str(tmp_path / "out")) == 0
    )
    (line,) = read_lines(tmp_path / "out" / "clips.jsonl")
    assert line.captions == ("A dog & a hat.",)


def test_wrong_pairs_are_left_out_and_counted(listed, tmp_path, monkeypatch, capsys):
    pair = {"cur_id": "one/a", "aft_id": "two", "cur_class_name": "dog", "aft_class_name": "dog"}
    good = pair | {"text_similarity": 0.9, "image_similarity": 0.7}
    wrong = [None, {}, good | {"text_similarity": None}, good | {"cur_id": ["x"]}]
    (tmp_path / "pairs.json").write_text(json.dumps([*wrong, good]))
    arguments = ["d.json", "--videos", ".", "--out", str(tmp_path / "out"), "--pairs", str(tmp_path / "pairs.json")]
    assert run(monkeypatch, listed.parent, *arguments) == 0
    printed = capsys.readouterr().out
    assert "2 clips, 4 references, 2 views from pairs; 1 clips and 4 pairs left out" in printed
    assert "left out: pair 1: KeyError: 'text_similarity'" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.json"], "there is no file of annotations no.json"),
        (["empty.json"], "empty.json is empty"),
        (
            ["list.json"],
            r"list.json is no file of annotations: it must hold a JSON object of clips by their keys, not \[3\]",
        ),
        (["words.json"], "words.json is not JSON: "),
        (["latin.json"], "latin.json line 1 is not UTF-8: it has the byte 0xe9"),
        (["bad.json"], "bad.json: none of 1 clips can be used: one: TypeError: "),
        (["d.json", "--videos", "nowhere"], "--videos nowhere: there is no such folder"),
        (["d.json", "--pairs", "d.json"], "d.json is no file of pairs: it must hold a JSON list, not {"),
        (["d.json", "--pairs", "no.json"], "there is no file of pairs no.json"),
        (["gs://x/d.json"], "annotations gs:/x/d.json: gs:// cannot be read"),
        (["d.json", "--videos", "gs://x"], "--videos gs:/x: gs:// cannot be read"),
        (["d.json", "--out", "s3://x"], "--out s3:/x: s3:// cannot be read"),
        (["d.json", "--pairs", "s3://x/p.json"], "--pairs s3:/x/p.json: s3:// cannot be read"),
        (["d.json", "--out", "d.json"], "d.json is a file, not a folder"),
    ],
)
def test_what_is_asked_for_wrongly_is_said_and_nothing_made(tmp_path, monkeypatch, capsys, arguments, message):
    for name, text in (("empty", ""), ("list", "[3]"), ("words", "a dog"), ("bad", '{"one": null}')):
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "d.json").write_text(json.dumps({"one": entry("a.mkv")}))
    (tmp_path / "latin.json").write_bytes('{"one": "café"}'.encode("latin-1"))
    before = sorted(tmp_path.rglob("*"))
    for option, value in (("--videos", "."), ("--out", "out")):
        arguments = arguments if option in arguments else [*arguments, option, value]
    assert run(monkeypatch, tmp_path, *arguments) == 2
    error = capsys.readouterr().err.split("clip/s]")[-1].strip()  # behind the progress bar
    assert error.startswith("data.open_s2v: ")
    assert re.search(message, error)
    assert sorted(tmp_path.rglob("*")) == before


def test_cut_outs_stay_below_their_folder_and_apart(tmp_path):
    keys = ["clip_1", "a/b", "..", "../..", "", "-x", "x", ".x", "\ufe0f", "y" * 200 + "1", "y" * 200 + "2"]
    files = [open_s2v.reference_file(key, name) for key in keys for name in ("red ball", "..", "ball")]
    assert str(files[0]) == "references/clip_1/red_ball.png"
    assert str(files[3]) == "references/a_b/red_ball.png"
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch(exist_ok=False)
        assert (tmp_path / file).resolve().parent.parent == tmp_path / "references"
        assert all(part[0].isalnum() for part in file.parts)
