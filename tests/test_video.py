"""Video files read back through PyAV, bytes against the reference's golden values, and the layout of contact sheets."""

import json
import re

import av
import jax.numpy as jnp
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from magref_jax import video

METADATA = {"prompt": 'a "red" fox, 狐\nand a dog\\', "seed": 3407, "sigmas": [1.0, 0.5]}
PARAMETERS = 'a "red" fox, 狐\nNegative prompt: 模糊\nSteps: 40, Seed: 3407'


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """A smooth moving gradient, 9 frames of 72x48."""
    frame, row, column = np.meshgrid(np.arange(9), np.arange(48), np.arange(72), indexing="ij")
    waves = [np.sin(column / 9 + frame / 4), np.cos(row / 7 - frame / 5), np.sin((row + column) / 11)]
    return np.round(127.5 + 110 * np.stack(waves, axis=-1)).astype(np.uint8)


def test_to_uint8_truncates_as_the_reference():
    # Golden values of the torch code: the middle is 127, not 128; outside the range is clamped.
    values = np.array([-7.0, -1.0, 0.0, 0.5, 1.0, 2.0], np.float32)
    golden = np.array([0, 0, 127, 191, 255, 255], np.uint8)
    for given in (values, values.astype(np.float64), jnp.asarray(values), jnp.asarray(values, jnp.bfloat16)):
        result = video.to_uint8(given)
        assert isinstance(result, np.ndarray) == isinstance(given, np.ndarray)
        np.testing.assert_array_equal(result, golden, strict=isinstance(given, np.ndarray))


def test_round_trip(tmp_path, clip):
    path = tmp_path / "new folder" / "clip.mp4"
    video.write_video(path, clip, 16, METADATA)
    frames, fps, metadata = video.read_video(path)

    expected = clip.repeat(6, axis=1).repeat(6, axis=2)  # 48 rows need 6 copies to be 256 or more
    error = frames.astype(np.float64) - expected
    assert 10 * np.log10(255**2 / np.mean(error**2)) >= 35  # dB
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 0.5  # no colour cast
    assert (fps, metadata) == (16.0, METADATA)


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (250, 200, 40)])
def test_colours_survive(tmp_path, colour):
    video.write_video(tmp_path / "flat.mp4", np.full((2, 64, 64, 3), colour, np.uint8), 8, scale=1)
    np.testing.assert_allclose(video.read_video(tmp_path / "flat.mp4").frames[1, 32, 32], colour, atol=2)


@pytest.mark.parametrize(("fps", "rate"), [(8, (8, 1)), (15.5, (31, 2)), (24000 / 1001, (24000, 1001))])
def test_a_player_is_told_all_it_needs(tmp_path, clip, fps, rate):
    path = tmp_path / "clip.mp4"
    video.write_video(path, clip, fps, METADATA, scale=2)
    with av.open(path) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, codec.width, codec.height, stream.frames) == ("h264", "yuv420p", 144, 96, 9)
        assert (stream.average_rate.numerator, stream.average_rate.denominator) == rate
        tags = (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range)
        assert tags == (Colorspace.ITU709, ColorPrimaries.BT709, ColorTrc.BT709, ColorRange.MPEG)
    contents = path.read_bytes()
    assert contents.index(b"moov") < contents.index(b"mdat")  # the index comes first: plays while it loads


def test_equal_arguments_give_equal_bytes(tmp_path, clip):
    contents = set()
    for number in range(6):
        path = tmp_path / f"{number}.mp4"
        video.write_video(path, clip, 16, METADATA)
        contents.add(path.read_bytes())
        video.read_video(path)  # leaves other memory behind, which x264's macroblock tree would read
    assert len(contents) == 1
    settings = contents.pop()  # x264 notes them; with these two, other machines agree
    assert b" threads=1 " in settings
    assert b" mbtree=0 " in settings


def tags(path) -> dict[str, str]:
    with av.open(path) as container:
        return dict(container.metadata)


def test_settings_are_stored_under_both_names(tmp_path, clip):
    video.write_video(tmp_path / "clip.mp4", clip, 16, METADATA, parameters=PARAMETERS, scale=1)
    stored = tags(tmp_path / "clip.mp4")
    assert json.loads(stored["comment"]) == METADATA
    assert stored["parameters"] == PARAMETERS
    video.write_video(tmp_path / "zero.mp4", clip, 16, parameters="before\0after", scale=1)
    assert tags(tmp_path / "zero.mp4")["parameters"] == "before after"


def test_a_file_without_our_metadata(tmp_path, clip):
    video.write_video(tmp_path / "clip.mp4", clip, 16, scale=1)
    assert video.read_video(tmp_path / "clip.mp4").metadata is None
    # What is left names the format and the program that wrote it.
    assert set(tags(tmp_path / "clip.mp4")) == {"major_brand", "minor_version", "compatible_brands", "encoder"}


@pytest.mark.parametrize(
    "text",
    [
        "caf\udce9.png",  # a file name that is not UTF-8, as Python has it
        "\ud800",
        "a\0b\x01\x1b\u2028\ufeff\uffff",
        "=;#\\\n[chapter]",
        "ü" * 2**20,
    ],
)
def test_metadata_come_back_whatever_they_hold(tmp_path, clip, text):
    metadata = {text: [text, float("inf"), None], "狐": 2**80}
    video.write_video(tmp_path / "clip.mp4", clip, 16, metadata, parameters=text, scale=1)
    assert video.read_video(tmp_path / "clip.mp4").metadata == metadata
    printable = re.sub("[\ud800-\udfff]", "?", text.replace("\0", " "))
    assert tags(tmp_path / "clip.mp4")["parameters"] == printable


@pytest.mark.parametrize("fps", [0.001, 0.5, 23.976, 30000 / 1001, 240, 999.9, 1e6])
def test_rates_come_back(tmp_path, fps):
    video.write_video(tmp_path / "clip.mp4", np.zeros((2, 16, 16, 3), np.uint8), fps, scale=1)
    assert video.read_video(tmp_path / "clip.mp4").fps == pytest.approx(fps, rel=1e-6)


@pytest.mark.parametrize("newer", [False, True])
def test_tags_that_are_no_text_do_not_matter_to_any_pyav(tmp_path, clip, monkeypatch, newer):
    video.write_video(tmp_path / "clip.mp4", clip, 16, {"a": "ABCDABCD"}, scale=1)
    data = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(data.replace(b"ABCDABCD", b"\xce\xff\xfe\xce" * 2))
    this_open = av.open

    def as_since_19(*arguments, **options):
        if "metadata_errors" in options:
            raise TypeError("open() got an unexpected keyword argument 'metadata_errors'")
        escaped = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "surrogateescape"}
        return this_open(*arguments, **options, **escaped)

    if newer:
        monkeypatch.setattr(video.av, "open", as_since_19)
    frames, fps, metadata = video.read_video(tmp_path / "clip.mp4")
    assert (frames.shape, fps) == (clip.shape, 16.0)
    assert metadata == {"a": "\N{REPLACEMENT CHARACTER}" * 8}
    assert video.read_frames(tmp_path / "clip.mp4", [8]).shape == (1, *clip.shape[1:])


def test_some_frames_are_those_of_the_whole_video(tmp_path, clip):
    path = tmp_path / "clip.mp4"
    video.write_video(path, clip, 16)
    whole = video.read_video(path).frames
    np.testing.assert_array_equal(video.read_frames(path, [8, 0, 3, 3]), whole[[8, 0, 3, 3]])
    with pytest.raises(ValueError, match="has no frame 9: it holds 9, counted from 0"):
        video.read_frames(path, [2, 9, 12])


@pytest.mark.parametrize(
    ("count", "indices"), [(1, [0]), (3, [0, 1, 2]), (9, [*range(9)]), (77, [0, 10, 19, 28, 38, 48, 57, 66, 76])]
)
def test_evenly_spaced_has_both_ends(count, indices):
    assert video.evenly_spaced(count) == indices


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, clip, monkeypatch):
    path = tmp_path / "clip.mp4"
    video.write_video(path, clip, 16)
    before = path.read_bytes()
    to_yuv, parts = video._to_yuv, []

    def fails_once_the_file_exists(frame):
        parts.extend(tmp_path.glob(".*.part"))
        if parts:
            raise OSError("disk full")
        return to_yuv(frame)

    monkeypatch.setattr(video, "_to_yuv", fails_once_the_file_exists)
    many_frames = np.tile(clip, (12, 1, 1, 1))  # more than the encoder holds back
    for target in (path, tmp_path / "new.mp4"):
        parts.clear()
        with pytest.raises(OSError, match="disk full"):
            video.write_video(target, many_frames, 16, scale=1)
        assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("frames", "arguments", "message"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), {}, "frames must be uint8"),
        (np.zeros((8, 8, 3), np.uint8), {}, "frames must be uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), {}, "at least one frame"),
        (np.zeros((1, 481, 832, 3), np.uint8), {}, "832x481 .* even"),
        (np.zeros((1, 8, 8, 3), np.uint8), {"fps": 0}, "fps=0"),
        (np.zeros((1, 8, 8, 3), np.uint8), {"fps": 1e-4}, "fps=0.0001 must be 0.001 to 1000000"),  # FFmpeg makes it 24
        (np.zeros((1, 8, 8, 3), np.uint8), {"fps": 1e10}, "fps=1"),
        (np.zeros((1, 8, 8, 3), np.uint8), {"fps": float("nan")}, "fps=nan"),
        (np.zeros((1, 8, 8, 3), np.uint8), {"scale": 0}, "scale=0"),
    ],
)
def test_bad_arguments_are_named(tmp_path, frames, arguments, message):
    with pytest.raises(ValueError, match=message):
        video.write_video(tmp_path / "clip.mp4", frames, **{"fps": 16, **arguments})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(48, 72, 6), (480, 832, 1), (832, 480, 1), (256, 256, 1), (128, 400, 2)]
)
def test_default_scale(height, width, scale):
    assert video.default_scale(height, width) == scale


def test_contact_sheet_shows_every_part_where_it_belongs(clip):
    red, blue = (Image.new("RGBA", size, colour) for size, colour in (((32, 32), "red"), ((300, 150), "blue")))
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    canvas = Image.new("RGB", (72, 48), "lime")
    frames = np.full((21, 48, 72, 3), 200, np.uint8)
    frames[10] = (255, 0, 255)
    rows = [
        video.SheetRow(references=[red, blue, clear], canvas=canvas, frames=frames, caption="first " * 60),
        video.SheetRow(references=[red], canvas=canvas, frames=clip, caption="second"),
    ]
    sheet = np.asarray(video.contact_sheet(rows, tile_height=96, max_frames=9))

    def box(colour):
        ys, xs = np.nonzero((sheet == colour).all(axis=-1))
        return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1

    left, top, right, _ = box((255, 0, 0))  # both rows: 32 pixels enlarged 3 times, in one column
    assert right - left == 96
    blue_left, blue_top, blue_right, blue_bottom = box((0, 0, 255))
    assert (blue_right - blue_left, blue_bottom - blue_top, blue_top) == (96, 48, top)  # reduced to fit
    canvas_left, canvas_top, canvas_right, _ = box((0, 255, 0))
    assert (canvas_right - canvas_left, canvas_top) == (144, top)
    middle = box((255, 0, 255))  # frame 10 of 0..20 is the fifth of nine tiles
    assert (middle[2] - middle[0], middle[3] - middle[1]) == (144, 96)
    first = middle[0] - 4 * (144 + video.GAP)
    assert left < blue_left < canvas_left < canvas_right < first
    assert sheet.shape[1] == first + 9 * (144 + video.GAP)
    # The second row is the first one, lower: no tile overlaps the wrapped caption.
    second = sheet[:, first : first + 144]
    match = [y for y in range(len(sheet) - 96) if (second[y : y + 96] == clip[0].repeat(2, 0).repeat(2, 1)).all()]
    assert len(match) == 1
    assert match[0] > top + 96 + 2 * video.CAPTION_SIZE


def test_tiles_made_beforehand_give_the_same_sheet():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in ((30, 20), (300, 200), (99, 500))]
    for image in images:
        for width in (None, 112):
            tile = video.fit_tile(image, 112, width)
            np.testing.assert_array_equal(np.asarray(video.fit_tile(tile, 112, width)), np.asarray(tile))


def test_captions_without_spaces_stay_on_the_sheet(clip):
    row = video.SheetRow(references=[], canvas=Image.new("RGB", (72, 48)), frames=clip[:1], caption="")
    empty = np.asarray(video.contact_sheet([row]))
    full = np.asarray(video.contact_sheet([{**row, "caption": "W" * 60}]))
    assert full.shape[0] > empty.shape[0] + 2 * video.CAPTION_SIZE  # several lines
    assert full.shape[1] == empty.shape[1]
    assert (full[:, -2:] == 255).all()  # no letter touches the edge


def test_contact_sheet_needs_a_row():
    with pytest.raises(ValueError, match="rows is empty"):
        video.contact_sheet([])
