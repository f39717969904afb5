"""From videos to records: the right frames at the right times, whatever the file; what cannot be used is left out."""

import dataclasses
import fractions
import importlib
import io
import json
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from PIL import Image

from magref_jax.data import prepare as prepare_module
from magref_jax.data.prepare import ClipLine, Cut, cut_clip, find_labels, make_record, prepare, read_lines
from magref_jax.data.records import INDEX, Skipped, TooManySkippedError
from magref_jax.files import Claim
from magref_jax.video import read_video

LEVEL = 5  # grey levels between frames: what lossy codecs change is less than half of it
SIZES = [(64, 48), (48, 64), (96, 64), (80, 80), (128, 72), (66, 50)]
RATES = [8, 12, 15, 16, 24, 25, 30, fractions.Fraction(24000, 1001), fractions.Fraction(30000, 1001), 60]
FILES = [("mp4", "libx264", "yuv420p"), ("mkv", "ffv1", "yuv444p"), ("avi", "mpeg4", "yuv420p"), ("mov", "mjpeg", "yuvj444p")]  # fmt: skip


def write_clip(path, rate, length, size=(64, 48), codec="libx264", pixels="yuv420p", times=None, aspect=None, start=0):
    """Frame k is grey of level LEVEL·k all over. `times` are in milliseconds, `start` and `length` in frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if aspect is not None:
            stream.sample_aspect_ratio = aspect
        if codec == "libx264":
            stream.options = {"crf": "4", "g": "12", "bf": "2"}
        if codec in ("mpeg4", "mjpeg"):
            stream.options = {"qscale": "1"}
            stream.codec_context.flags |= av.codec.context.Flags.qscale
            stream.codec_context.global_quality = 118
        if times is not None:
            stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for index in range(length):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), LEVEL * index, np.uint8), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], fractions.Fraction(1, 1000)
            elif start:
                frame.pts = start + index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def shown(frames: np.ndarray) -> list[int]:
    """Which frame of the file each frame is."""
    levels = frames.astype(float).mean((1, 2, 3)) / LEVEL
    assert np.abs(levels - levels.round()).max() < 0.45
    return levels.round().astype(int).tolist()


def write_list(path: pathlib.Path, lines: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> pathlib.Path:
    """A list of 24 clips of all sizes, rates, lengths and containers, and two pictures."""
    folder = tmp_path_factory.mktemp("clips")
    red = Image.new("RGBA", (300, 200), (200, 0, 0, 255))
    red.putpixel((0, 0), (1, 2, 3, 0))
    red.save(folder / "red.png")
    Image.new("RGB", (20, 30), (0, 0, 200)).save(folder / "blue.jpg")
    lines = []
    for index in range(24):
        suffix, codec, pixels = FILES[index % len(FILES)]
        rate, size = RATES[index % len(RATES)], SIZES[index % len(SIZES)]
        rate = 25 if codec == "mpeg4" and index % len(RATES) > 6 else rate
        name = f"clip{index:02}.{suffix}"
        write_clip(folder / name, rate, int(1.7 * rate) + 1 if rate < 40 else 50, size, codec, pixels)
        start = 0.25 * (index % 3) if rate < 40 else 0.0
        reference = {"image": ["red.png", "blue.jpg"], "label": "red ball", "identity": f"ball{index}"}
        caption = f"a Red ball in clip {index}"
        lines.append({"video": name, "caption": caption, "start": start, "references": [reference]})
    write_list(folder / "clips.jsonl", lines)
    return folder / "clips.jsonl"


CUT = Cut(height=32, width=48, num_frames=9, fps=12.0, store="frames")


def rate_of(path: pathlib.Path) -> fractions.Fraction:
    with av.open(str(path)) as container:
        return container.streams.video[0].average_rate


def test_24_clips_become_their_frames(clips, tmp_path):
    source = prepare(clips, tmp_path, CUT, shard_records=5)
    source.verify()
    assert len(source) == 24
    assert set(source.sizes) == {(9, 32, 48)}
    for index, line in enumerate(read_lines(clips)):
        record = source[index]
        assert record.frames.shape == (9, 32, 48, 3)
        # On screen at t is frame ⌊t · rate⌋, or its neighbour where t is within a millisecond of both: mkv keeps no more.
        rate = rate_of(line.video)
        times = [fractions.Fraction(line.start) + fractions.Fraction(k, 12) for k in range(9)]
        for time_shown, number in zip(times, shown(record.frames), strict=True):
            assert number / rate - 0.001 <= time_shown < (number + 1) / rate + 0.001
        assert (record.id.split("@")[0], record.source) == (line.video.name, line.video.name)
        assert record.fps == 12
        assert record.captions[0].text == f"a Red ball in clip {index}"
        assert record.captions[0].label_spans == ((2, 10),)
        (reference,) = record.references
        assert (reference.label, reference.identity, reference.role) == ("red ball", f"ball{index}", "subject")
        assert [view.origin for view in reference.views] == ["in_pair", "cross_clip"]
        red, blue = (Image.open(io.BytesIO(view.image)) for view in reference.views)
        # Not larger than the canvas, which is 48x32; alpha stays.
        assert (red.mode, red.size, red.getpixel((20, 20))) == ("RGBA", (48, 32), (200, 0, 0, 255))
        assert red.getpixel((0, 0))[3] < 255
        assert (blue.mode, blue.size) == ("RGB", (20, 30))


def test_mp4_records_are_the_same_clips(clips, tmp_path):
    line = read_lines(clips)[0]
    record = make_record(line, dataclasses.replace(CUT, store="mp4"))
    assert record.frames is None
    video = read_video(io.BytesIO(record.video))
    assert video.fps == 12
    assert shown(video.frames) == shown(make_record(line, CUT).frames)


def test_killed_and_run_again_gives_the_same_files(clips, tmp_path):
    command = [sys.executable, "-m", "magref_jax.data.prepare", str(clips), "--num-frames", "9", "--size", "32x48"]
    command += ["--fps", "12", "--shard-records", "3", "--num-threads", "2", "--out"]
    straight = subprocess.run([*command, str(tmp_path / "straight")], capture_output=True, text=True, check=True)
    assert "24 records" in straight.stdout
    assert "records/s" in straight.stdout
    for shards in (1, 4):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
        part = f".records-{shards:05}.array_record.*.part"
        while process.poll() is None and not list((tmp_path / "killed").glob(part)):
            time.sleep(0.002)
        assert process.poll() is None, "it was done before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / INDEX).exists()
    subprocess.run([*command, str(tmp_path / "killed")], capture_output=True, check=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_variable_frame_rate_follows_the_time_stamps(tmp_path):
    times = [0, 40, 500, 520, 540, 1000, 1400, 1800]  # milliseconds
    write_clip(tmp_path / "a.mkv", 25, 8, codec="ffv1", pixels="yuv444p", times=times)
    frames = cut_clip(tmp_path / "a.mkv", Cut(48, 64, 9, 5.0))
    # At 0, 200, ... 1600 ms.
    assert shown(frames) == [0, 1, 1, 4, 4, 5, 5, 6, 6]


def test_time_counts_from_the_first_frame(tmp_path):
    write_clip(tmp_path / "late.mp4", 10, 20, start=70)
    assert shown(cut_clip(tmp_path / "late.mp4", Cut(48, 64, 5, 10.0))) == [0, 1, 2, 3, 4]
    assert shown(cut_clip(tmp_path / "late.mp4", Cut(48, 64, 5, 10.0), start=1.2)) == [12, 13, 14, 15, 16]


@pytest.mark.parametrize("suffix", ["mp4", "ts", "flv"])  # with an index, with none, with one at the end
def test_a_start_inside_a_group_of_pictures_is_exact(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write_clip(path, 24, 50)  # key frames are 12 apart
    for start in range(0, 40, 3):
        frames = cut_clip(path, Cut(48, 64, 4, 24.0), start=start / 24)
        assert shown(frames) == [start, start + 1, start + 2, start + 3]


def test_the_end_is_kept_to(tmp_path):
    write_clip(tmp_path / "a.mp4", 10, 20)
    cut = Cut(48, 64, 5, 10.0)
    assert shown(cut_clip(tmp_path / "a.mp4", cut, 0.5, 1.0)) == [5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="too short: 0.40 s from start=0.5; 5 frames at 10 a second are 0.50 s"):
        cut_clip(tmp_path / "a.mp4", cut, 0.5, 0.9)
    assert shown(cut_clip(tmp_path / "a.mp4", cut, 1.5)) == [15, 16, 17, 18, 19]
    with pytest.raises(ValueError, match="too short: 0.40 s from start=1.6"):
        cut_clip(tmp_path / "a.mp4", cut, 1.6)
    with pytest.raises(ValueError, match="too short: 0.00 s from start=7"):
        cut_clip(tmp_path / "a.mp4", cut, 7.0)


def test_frames_are_scaled_to_fill_and_cut_in_the_middle(tmp_path):
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, :40], image[:, 40:80], image[:, 80:] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 120, 40, "yuv444p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    (frame,) = cut_clip(tmp_path / "a.mkv", Cut(20, 20, 1, 8.0))
    left, middle = (cut_clip(tmp_path / "a.mkv", Cut(20, 20, 1, 8.0), crop=(x, 10, x + 20, 30))[0] for x in (5, 50))
    assert np.abs(left.astype(int) - (200, 0, 0)).max() <= 3
    assert np.abs(middle.astype(int) - (0, 200, 0)).max() <= 3
    with pytest.raises(ValueError, match=r"crop=\(0, 0, 121, 40\) is not inside its 120x40 pixels"):
        cut_clip(tmp_path / "a.mkv", Cut(20, 20, 1, 8.0), crop=(0, 0, 121, 40))
    # The middle third, but for the overshoot of LANCZOS at its edges.
    assert np.abs(frame[:, 3:-3].astype(int) - (0, 200, 0)).max() <= 5


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    # 40 columns of pixels twice as wide as high: a picture of 80x40.
    write_clip(tmp_path / "a.mp4", 8, 3, size=(40, 40), aspect=fractions.Fraction(2))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == 2
    assert cut_clip(tmp_path / "a.mp4", Cut(40, 80, 1, 8.0)).shape == (1, 40, 80, 3)


# Four fields of a picture, the upper two and the lower two, and the letters by which the cases below name them.
FIELDS = {"A": (200, 30, 40), "B": (30, 150, 60), "C": (40, 60, 210), "D": (190, 190, 60)}


def picture(width: int = 96, height: int = 64) -> np.ndarray:
    colours = np.array(list(FIELDS.values()), np.uint8).reshape(2, 2, 3)
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 2 // width
    return colours[rows][:, columns]


def fields_of(frame: np.ndarray, most: int = 6) -> str:
    """The letters of the fields of a frame, "?" where none is as near as `most` levels."""
    height, width = frame.shape[:2]
    letters = ""
    for y, x in ((1, 1), (1, 3), (3, 1), (3, 3)):
        distances = {k: np.abs(frame[y * height // 4, x * width // 4].astype(int) - v).max() for k, v in FIELDS.items()}
        letter = min(distances, key=distances.__getitem__)
        letters += letter if distances[letter] <= most else "?"
    return letters


def write_frames(path, frames, codec="libx264", pixels="yuv420p", rate=16, options=None, prepare=lambda stream: None):
    """Frames as they are, an `av.VideoFrame` or an array of RGB each."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or ({"crf": "4"} if codec == "libx264" else {}))
        first = frames[0]
        stream.width, stream.height = (
            (first.width, first.height) if isinstance(first, av.VideoFrame) else (first.shape[1], first.shape[0])
        )
        stream.pix_fmt = pixels
        prepare(stream)
        for frame in frames:
            if not isinstance(frame, av.VideoFrame):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def replace_in(path: pathlib.Path, kind: bytes, offset: int, values: bytes) -> None:
    """Overwrites bytes of a box of an mp4, counted from its type on."""
    data = bytearray(path.read_bytes())
    at = data.index(kind) + offset
    data[at : at + len(values)] = values
    path.write_bytes(data)


# Stored is AB over CD. x' = a x + c y, y' = b x + d y, with y downwards.
@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), "ABCD"),
        ((0, 1, -1, 0), "CADB"),  # a quarter clockwise
        ((-1, 0, 0, -1), "DCBA"),
        ((0, -1, 1, 0), "BDAC"),
        ((-1, 0, 0, 1), "BADC"),  # a front camera
        ((1, 0, 0, -1), "CDAB"),
        ((0, 1, 1, 0), "ACBD"),
        ((0, -1, -1, 0), "DBCA"),
        ((0, 0, 0, 0), "ABCD"),  # says nothing
        (
            (0.8, 0.6, -0.6, 0.8),
            "it is turned by -36 degrees; only multiples of 90 are read",
        ),
    ],
)
def test_videos_are_turned_and_mirrored_as_players_do(tmp_path, suffix, matrix, expected):
    path = tmp_path / f"a.{suffix}"
    write_frames(path, [picture()] * 3, options={"crf": "1"}, pixels="yuv444p")
    a, b, c, d = (round(value * 2**16) for value in matrix)
    replace_in(path, b"tkhd", 44, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30))
    if expected.isupper():
        size = (96, 64) if matrix[1] else (64, 96)
        assert fields_of(cut_clip(path, Cut(*size, 1, 16.0))[0]) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            cut_clip(path, Cut(64, 96, 1, 16.0))


MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}


def tagged(pixels: str, matrix: int | None, full: bool = False) -> av.VideoFrame:
    """`picture` by the formulas of ITU-T H.273, without FFmpeg. No matrix: that of BT.601, and no tag."""
    red, blue = MATRICES[matrix or 6]
    r, g, b = np.moveaxis(picture() / 255, -1, 0)
    y = red * r + (1 - red - blue) * g + blue * b
    planes = [y, (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)]
    bits = 10 if "10" in pixels else 8
    scales, offsets = ((2**bits - 1,) * 3, (0, 2**bits / 2, 2**bits / 2)) if full else ((219, 224, 224), (16, 128, 128))
    unit = 1 if full else 2 ** (bits - 8)
    frame = av.VideoFrame(96, 64, pixels)
    for plane, values, scale, offset in zip(frame.planes, planes, scales, offsets, strict=True):
        values = np.round((values * scale + offset) * unit).astype(np.uint16 if bits > 8 else np.uint8)
        padded = np.zeros((64, plane.line_size // values.itemsize), values.dtype)
        padded[:, :96] = values
        plane.update(padded.tobytes())
    return frame


@pytest.mark.parametrize(
    ("pixels", "matrix", "full", "primaries", "transfer", "refusal"),
    [
        ("yuv444p", None, False, 2, 2, None),
        ("yuv444p", 1, False, 1, 1, None),
        ("yuv444p", 5, False, 5, 6, None),
        ("yuv444p", 6, False, 6, 6, None),
        ("yuv444p", 7, False, 7, 7, None),
        ("yuv444p", 1, True, 1, 13, None),
        ("yuv444p", 6, True, 1, 13, None),
        ("yuv444p10le", 1, False, 1, 1, None),  # 10 bits do not make a video HDR
        ("yuv444p10le", 1, True, 1, 1, None),
        ("yuv444p10le", 9, False, 9, 16, "its colours are BT.2020 primaries, PQ, and only .*tonemap=hable"),
        ("yuv444p10le", 9, False, 9, 18, "its colours are BT.2020 primaries, HLG, and only .*tonemap=hable"),
        ("yuv444p10le", 9, False, 9, 14, "its colours are BT.2020 primaries, and only .* zscale=p=bt709"),
        ("yuv444p", 1, False, 12, 1, "its colours are Display P3 primaries"),
        ("yuv444p", 1, False, 1, 8, "its colours are linear light"),
    ],
)
def test_colours_are_those_of_the_tags(tmp_path, pixels, matrix, full, primaries, transfer, refusal):
    def prepare(stream):
        codec = stream.codec_context
        codec.colorspace, codec.color_range = matrix or 2, 2 if full else 1
        codec.color_primaries, codec.color_trc = primaries, transfer

    write_frames(tmp_path / "a.mkv", [tagged(pixels, matrix, full)] * 2, "ffv1", pixels, prepare=prepare)
    cut = Cut(64, 96, 1, 16.0)
    if refusal is None:
        (frame,) = cut_clip(tmp_path / "a.mkv", cut)
        assert np.abs(frame[8::16, 12::24].astype(int) - picture()[8::16, 12::24]).max() <= 2
    else:
        with pytest.raises(ValueError, match=refusal):
            cut_clip(tmp_path / "a.mkv", cut)


def boxes(data: bytes) -> dict[bytes, bytes]:
    """The boxes of an mp4 by their types."""
    found, at = {}, 0
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        found[kind], at = data[at : at + size], at + size
    return found


def box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", 8 + len(data)) + kind + data


def with_cover(path: pathlib.Path) -> None:
    """An mp4 whose stream 0 is a green cover picture."""
    write_frames(path, [picture()] * 4)
    cover = io.BytesIO()
    Image.new("RGB", (32, 32), (0, 255, 0)).save(cover, "JPEG")
    item = box(b"covr", box(b"data", struct.pack(">II", 13, 0) + cover.getvalue()))
    meta = b"\0" * 4 + box(b"hdlr", b"\0" * 8 + b"mdirappl" + b"\0" * 9) + box(b"ilst", item)
    top = boxes(path.read_bytes())
    inner = boxes(top[b"moov"][8:])
    inner = {b"mvhd": b"", b"udta": b""} | inner | {b"udta": box(b"udta", box(b"meta", meta))}  # before the track
    path.write_bytes(b"".join((top | {b"moov": box(b"moov", b"".join(inner.values()))}).values()))


def song(path: pathlib.Path, cover: bool = False) -> None:
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        if cover:
            art = container.add_stream("mjpeg", rate=1)
            art.width, art.height, art.pix_fmt, art.disposition = 32, 32, "yuvj420p", av.stream.Disposition.attached_pic
            container.mux(art.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))


def transparent(path: pathlib.Path, codec: str, pixels: str) -> None:
    """B is clear, over colours that nobody sees."""
    layered = np.dstack([picture(), np.full((64, 96), 255, np.uint8)])
    layered[:32, 48:, 3] = 0
    frames = [av.VideoFrame.from_ndarray(layered, format="rgba").reformat(format=pixels) for _ in range(4)]
    write_frames(path, frames, codec, pixels, options={"auto-alt-ref": "0"} if codec == "libvpx" else None)


def interlaced(path: pathlib.Path) -> None:
    """A bar that moves 2 pixels from field to field, the upper field first."""

    def prepare(stream):
        stream.codec_context.flags |= av.codec.context.Flags.interlaced_dct | av.codec.context.Flags.interlaced_me

    frames = np.full((8, 64, 96, 3), 30, np.uint8)
    for index, frame in enumerate(frames):
        for field in range(2):
            frame[field::2, 8 + 4 * index + 2 * field :][:, :16] = 200
    write_frames(path, list(frames), options={"crf": "4", "x264-params": "tff=1"}, prepare=prepare)


def edited(path: pathlib.Path, skipped: int) -> None:
    """Its edit list leaves out the first frames, inside a group of pictures."""
    write_clip(path, 10, 20)
    data = path.read_bytes()
    (timescale,) = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)
    (media_time,) = struct.unpack_from(">i", data, data.index(b"elst") + 16)
    replace_in(path, b"elst", 16, struct.pack(">i", media_time + skipped * timescale // 10))


def test_a_cover_picture_is_no_video(tmp_path):
    with_cover(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == ["mjpeg", "h264"]
    assert fields_of(cut_clip(tmp_path / "a.mp4", Cut(64, 96, 4, 16.0))[3]) == "ABCD"
    assert read_video(tmp_path / "a.mp4").frames.shape == (4, 64, 96, 3)


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.webm", "libvpx", "yuva420p"),
        ("a.mkv", "ffv1", "bgra"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mov", "qtrle", "argb"),
    ],
)
def test_what_is_transparent_is_white(tmp_path, name, codec, pixels):
    transparent(tmp_path / name, codec, pixels)
    frames = cut_clip(tmp_path / name, Cut(64, 96, 4, 16.0))
    for frame in frames:
        assert fields_of(frame) == "A?CD"
        assert frame[16, 72].min() >= 253


def test_interlaced_videos_have_no_combs(tmp_path):
    interlaced(tmp_path / "a.mp4")
    frames = cut_clip(tmp_path / "a.mp4", Cut(64, 96, 8, 16.0), crop=(0, 0, 96, 64))
    bars = frames.astype(int)[..., 1] > 115
    assert (bars[:, 1:] == bars[:, :-1]).all()  # lines are equal, as they are in each field
    for index, bar in enumerate(bars[:, 30]):  # where one of the two fields has it
        (first,) = set(np.flatnonzero(bar)[[0, -1]] - 4 * index - (8, 23))
        assert first in (0, 2)


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_an_edit_list_is_kept_to(tmp_path, start):
    edited(tmp_path / "a.mp4", skipped=3)
    first = 3 + round(start * 10)
    assert shown(cut_clip(tmp_path / "a.mp4", Cut(48, 64, 5, 10.0), start=start)) == [*range(first, first + 5)]


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "size"),
    [
        ("a.mkv", "ffv1", "yuv420p", (95, 63)),
        ("a.mov", "mjpeg", "yuvj422p", (97, 65)),
        ("a.mkv", "libx264", "yuv444p", (95, 63)),
        ("a.mpg", "mpeg2video", "yuv420p", (96, 64)),
        ("a.mkv", "libx265", "yuv420p10le", (96, 64)),
        ("a.gif", "gif", "rgb8", (96, 64)),
        ("a.avi", "rawvideo", "bgr24", (97, 63)),
    ],
)
def test_containers_codecs_and_odd_sizes(tmp_path, name, codec, pixels, size):
    frames = [picture(*size)] * 4
    if pixels == "rgb8":
        frames = [av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels) for frame in frames]
    options = (
        {"qscale": "1"}
        if codec in ("mjpeg", "mpeg2video")
        else {"x265-params": "log-level=none"}
        if codec == "libx265"
        else None
    )
    write_frames(tmp_path / name, frames, codec, pixels, rate=25, options=options)
    (frame,) = cut_clip(tmp_path / name, Cut(64, 96, 1, 25.0), start=0.04)
    assert fields_of(frame, most=64 if pixels == "rgb8" else 6) == "ABCD"  # 256 colours, mixed


def test_one_frame_is_a_clip_of_one_frame(tmp_path):
    write_frames(tmp_path / "a.mp4", [picture()], rate=8)
    assert fields_of(cut_clip(tmp_path / "a.mp4", Cut(64, 96, 1, 8.0))[0]) == "ABCD"
    with pytest.raises(ValueError, match=r"too short: 0.12 s from start=0; 2 frames at 8 a second are 0.25 s"):
        cut_clip(tmp_path / "a.mp4", Cut(64, 96, 2, 8.0))


def test_pixels_that_lie_on_their_side_are_made_square_first(tmp_path):
    # Stored 40x40 with pixels twice as wide as high, shown a quarter clockwise: 40 wide, 80 high.
    write_frames(
        tmp_path / "a.mp4",
        [picture(40, 40)] * 2,
        prepare=lambda s: setattr(s, "sample_aspect_ratio", fractions.Fraction(2)),
    )
    one = 2**16
    replace_in(tmp_path / "a.mp4", b"tkhd", 44, struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 2**30))
    (frame,) = cut_clip(tmp_path / "a.mp4", Cut(80, 40, 1, 16.0), crop=(0, 0, 40, 80))
    assert fields_of(frame) == "CADB"


def broken_lines(folder: pathlib.Path) -> list[tuple[dict, str]]:
    """Lines that cannot be used, and what is said about them."""
    rng = np.random.default_rng(0)
    (folder / "noise.mp4").write_bytes(rng.bytes(5000))
    (folder / "empty.mp4").write_bytes(b"")
    write_clip(folder / "short.mp4", 8, 3)
    write_clip(folder / "good.mp4", 8, 20)
    data = (folder / "good.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost:9/a.ts\n#EXT-X-ENDLIST\n")
    song(folder / "song.mp4")
    song(folder / "cover.mp4", cover=True)
    write_clip(folder / "known.avi", 8, 20, codec="mpeg4")
    (folder / "unknown.avi").write_bytes((folder / "known.avi").read_bytes().replace(b"FMP4", b"ZQX9"))
    (folder / "words.mp4").write_text("a dog runs\n" * 50)
    write_clip(folder / "whole.ts", 8, 20)
    data = (folder / "whole.ts").read_bytes()
    (folder / "cut.ts").write_bytes(data[: len(data) // 5])
    good = {"caption": "a dog runs", "video": "good.mp4"}
    return [
        (good | {"video": "nowhere.mp4"}, "no video file"),
        (good | {"video": "noise.mp4"}, "Invalid data"),
        (good | {"video": "empty.mp4"}, "is empty, no video file"),
        (good | {"video": "cut.mp4"}, "Invalid data|moov"),
        (good | {"video": "short.mp4"}, "too short: 0.38 s"),
        (good | {"video": "list.m3u8"}, "Invalid|not permitted|No such|Protocol|No video|Input/output"),
        (good | {"video": "."}, "is a folder, no video file"),
        (good | {"video": "song.mp4"}, "it has no video stream$"),
        (good | {"video": "cover.mp4"}, "it has no video stream, only a cover picture$"),
        (good | {"video": "unknown.avi"}, "a codec that FFmpeg, as PyAV brings it, cannot decode"),
        (good | {"video": "words.mp4"}, "Invalid data"),
        (good | {"video": "cut.ts"}, "too short: |a frame is damaged|Invalid data"),
        (good | {"references": [{"image": "image.png"}]}, "damaged image|no image"),
        (good | {"references": [{"image": "gone.png"}]}, "no image file"),
        (good | {"references": [{"image": "image.png", "label": "cat"}]}, "no caption has the label 'cat'"),
    ]


def test_what_cannot_be_used_says_why(tmp_path):
    broken = broken_lines(tmp_path)
    lines = read_lines(write_list(tmp_path / "a.jsonl", [line for line, _ in broken]))
    for line, (_, reason) in zip(lines, broken, strict=True):
        outcome = make_record(line, CUT)
        assert isinstance(outcome, Skipped), line
        assert re.search(reason, outcome.reason), outcome


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            AttributeError("'NoneType' object has no attribute 'x'"),
            "AttributeError: 'NoneType' object has no attribute 'x'",
        ),
        (MemoryError(), "MemoryError: MemoryError"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (ValueError("a frame is damaged."), "a frame is damaged"),
        (PermissionError(13, "Permission denied", "a.mp4"), "a.mp4: Permission denied"),
    ],
)
def test_whatever_ends_the_work_on_a_clip_leaves_out_that_clip(tmp_path, monkeypatch, error, reason):
    write_clip(tmp_path / "good.mp4", 12, 12)
    write_clip(tmp_path / "bad.mp4", 12, 12)
    lines = [{"caption": "a dog", "video": video} for video in ("good.mp4", "bad.mp4", "good.mp4")]
    open_video = prepare_module.open_video

    def fails_for_one(path, *args, **kwargs):
        if path.name == "bad.mp4":
            raise error
        return open_video(path, *args, **kwargs)

    monkeypatch.setattr(prepare_module, "open_video", fails_for_one)
    source = prepare(write_list(tmp_path / "a.jsonl", lines), tmp_path / "out", dataclasses.replace(CUT, num_frames=2))
    assert [source[index].id for index in range(len(source))] == ["good.mp4", "good.mp4"]
    assert source.skipped == [Skipped("bad.mp4", reason)]


def test_when_no_clip_can_be_used_the_reasons_are_named_and_nothing_is_written(tmp_path):
    clips = write_list(tmp_path / "a.jsonl", [{"caption": "a dog", "video": "gone.mp4"}])
    for _ in range(2):  # the second time too: nothing is remembered
        with pytest.raises(
            TooManySkippedError, match=r"none of 1 inputs has a record: gone.mp4: there is no video file"
        ):
            prepare(clips, tmp_path / "out", CUT)
        assert list((tmp_path / "out").iterdir()) == []


def test_flipped_bits_are_noticed(tmp_path):
    # A picture that moves, so that every byte tells something. Not all damage can be seen: the stream has no checksum.
    picture = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(tmp_path / "good.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for index in range(20):
            frame = np.ascontiguousarray(np.roll(picture, 4 * index, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    data = (tmp_path / "good.mp4").read_bytes()
    start, stop = data.index(b"mdat") + 700, data.index(b"moov") - 100
    cut = Cut(height=96, width=128, num_frames=20, fps=12.0, store="frames")
    outcomes = []
    for where in np.linspace(start, stop, 20).astype(int):
        (tmp_path / "bad.mp4").write_bytes(data[:where] + bytes([data[where] ^ 0x5A]) + data[where + 1 :])
        outcomes.append(make_record(ClipLine("a", tmp_path / "bad.mp4", ("a dog",), (), 0.0, None, "a"), cut))
    assert sum(isinstance(outcome, Skipped) for outcome in outcomes) >= 15
    assert not isinstance(
        make_record(ClipLine("a", tmp_path / "good.mp4", ("a dog",), (), 0.0, None, "a"), cut), Skipped
    )


def test_few_broken_clips_are_left_out_and_many_end_the_run(tmp_path):
    write_clip(tmp_path / "good.mp4", 12, 12)
    good = {"caption": "a dog runs", "video": "good.mp4"}
    bad = {"caption": "a dog runs", "video": "gone.mp4"}
    cut = Cut(height=32, width=48, num_frames=2, fps=12.0)
    three = write_list(tmp_path / "three.jsonl", [good, bad, good, bad, good, bad])
    source = prepare(three, tmp_path / "three", cut)
    assert len(source) == 3
    assert [skipped.id for skipped in source.skipped] == ["gone.mp4"] * 3
    # 3 of 300 are 1 %; there, a fourth is too much.
    four = write_list(tmp_path / "four.jsonl", [good] * 20 + [bad] * 4 + [good] * 276)
    with pytest.raises(TooManySkippedError, match="4 inputs have no record, at most 3 may: gone.mp4: there is no"):
        prepare(four, tmp_path / "four", cut)
    command = [sys.executable, "-m", "magref_jax.data.prepare", str(four), "--out", str(tmp_path / "four")]
    command += ["--size", "32x48", "--num-frames", "2", "--fps", "12"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "More than 1 % of the clips cannot be used" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object"),
        ('{"caption": "a"}', "has no 'video'"),
        ('{"video": "a", "caption": "a", "strat": 1}', "unknown name 'strat'; the names are video, caption"),
        ('{"video": 3, "caption": "a"}', "video=3; it must be text"),
        ('{"video": "a"}', "needs a 'caption'"),
        ('{"video": "a", "captions": []}', "needs a 'caption'"),
        ('{"video": "a", "captions": ["", "b"]}', "needs a 'caption'"),
        ('{"video": "a", "caption": "a", "start": 2, "end": 1}', "0 <= start < end"),
        ('{"video": "a", "caption": "a", "crop": [0, 0, 5]}', "x0, y0, x1, y1"),
        ('{"video": "a", "caption": "a", "crop": [5, 0, 5, 9]}', "x0, y0, x1, y1"),
        ('{"video": "a", "caption": "a", "start": -1}', "0 <= start < end"),
        ('{"video": "a", "caption": "a", "start": true}', "start=True; it must be a number"),
        ('{"video": "a", "caption": "a", "references": [{"label": "a"}]}', "a reference has no 'image'"),
        ('{"video": "a", "caption": "a", "references": [{"image": []}]}', "must be a path or some"),
        ('{"video": "a", "caption": "a", "references": [{"image": "a", "role": "x"}]}', "subject, background"),
        ('{"video": "a", "caption": "a", "references": [{"image": "a", "origin": "x"}]}', "in_pair, cross_clip"),
        ('{"video": "a", "caption": "a", "references": [{"image": "a", "origin": []}]}', "1 images and 0 origins"),
    ],
)
def test_wrong_lines_are_named_before_anything_is_made(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"video": "a", "caption": "a"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=f"line 3: .*{message}"):
        read_lines(path)


GOOD_LINE = '{"video": "a.mp4", "caption": "a café"}'


@pytest.mark.parametrize(
    "content",
    [
        f"{GOOD_LINE}\n{GOOD_LINE}\n".encode("utf-8-sig"),
        f"{GOOD_LINE}\r\n\r\n{GOOD_LINE}".encode(),
        f"\n \t\n{GOOD_LINE}\r{GOOD_LINE}\r".encode(),
        f"[{GOOD_LINE}, {GOOD_LINE}]".encode(),
        f"\ufeff\n[\n{GOOD_LINE},\n{GOOD_LINE}\n]\n".encode(),
    ],
)
def test_lists_are_read_however_they_were_saved(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert [(line.video, line.captions) for line in read_lines(tmp_path / "a.jsonl")] == [
        (tmp_path / "a.mp4", ("a café",))
    ] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{GOOD_LINE}\n{GOOD_LINE}".encode("cp1252"), "a.jsonl line 1 is not UTF-8: it has the byte 0xe9, which is é"),
        (GOOD_LINE.encode("utf-16"), "a.jsonl is UTF-16; save it as UTF-8"),
        (f"{GOOD_LINE},\n{GOOD_LINE}".encode(), "line 1: is not JSON: .*a line is one object, with no comma after it"),
        (f"[{GOOD_LINE},]".encode(), "a.jsonl is not JSON: "),
        (f"[{GOOD_LINE}, 3]".encode(), "a.jsonl entry 2: it must be an object, it is 3"),
        (b"[" * 100_000, "a.jsonl is not JSON: "),
        (b"", "a.jsonl is empty, no list of clips"),
        (b"[]", "a.jsonl lists no clip"),
        (b'{"video": "gs://bucket/a.mp4", "caption": "a"}', "line 1: video gs://bucket/a.mp4: gs:// cannot be read"),
        (
            b'{"video": "a", "caption": "a", "references": [{"image": "https://x/a.png"}]}',
            "line 1: image https://x/a.png: https:// cannot be read",
        ),
        (b'{"video": "a", "caption": "\\ud800"}', "line 1: it has half of a surrogate pair"),
        (
            b'{"video": "a", "caption": "a", "start": 1' + b"0" * 400 + b"}",
            "line 1: it has start=1000.* 0 <= start < end",
        ),
        (b'{"video": "a", "caption": "a", "start": NaN}', "line 1: it has start=nan"),
    ],
)
def test_lists_that_cannot_be_read_are_named_with_the_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_lines(tmp_path / "a.jsonl")


def test_tags_that_are_no_text_do_not_matter(tmp_path):
    write_clip(tmp_path / "a.mp4", 8, 3)
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "b.mp4"), "w") as target:
        target.metadata["title"] = "ABCDABCD"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = (tmp_path / "b.mp4").read_bytes()
    assert b"ABCDABCD" in data
    (tmp_path / "b.mp4").write_bytes(data.replace(b"ABCDABCD", b"\xce\xff\xfe\xce" * 2))
    assert shown(cut_clip(tmp_path / "b.mp4", Cut(48, 64, 3, 8.0))) == [0, 1, 2]


def test_captions_are_cleaned_and_labels_found_in_them(tmp_path):
    line = {"video": "a", "captions": ["two  dogs，a Dog &amp; a dog", "nothing"], "references": [{"image": "x"}] * 2}
    (read,) = read_lines(write_list(tmp_path / "a.jsonl", [line]))
    assert read.captions == ("two dogs,a Dog & a dog", "nothing")
    assert find_labels(read.captions[0], ["dog", "", "dog", "dog", "cat"]) == ((11, 14), None, (19, 22), (19, 22), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good.jsonl", "--size", "480"], "size='480' must be HEIGHTxWIDTH"),
        (["good.jsonl", "--size", "31x48"], "size=31x48 must have even sides with store=mp4"),
        (["good.jsonl", "--fps", "0"], "fps=0.0 must be 0.001 to 1000000"),
        (["good.jsonl", "--fps", "nan"], "fps=nan must be 0.001 to 1000000"),
        (["good.jsonl", "--num-frames", "0"], "num_frames=0 must be 1 or more"),
        (["good.jsonl", "--shard-records", "0"], "shard_records=0 must be 1 or more"),
        (["good.jsonl", "--num-threads", "0"], "num_threads=0 must be 1 or more"),
        (["no.jsonl"], "there is no list of clips no.jsonl"),
        (["gs://bucket/clips.jsonl"], "clips gs:/bucket/clips.jsonl: gs:// cannot be read"),
        (["good.jsonl", "--out", "gs://bucket/records"], "--out gs:/bucket/records: gs:// cannot be read"),
        (["good.jsonl", "--out", "good.jsonl"], "good.jsonl is a file, not a folder"),
        (["good.jsonl", "--out", "good.jsonl/x"], "good.jsonl is a file, not a folder"),
        (["videos"], '"video": "a dog.MOV", "caption": '),
        (["empty"], '"video": "dog.mp4", "caption": '),
        (
            ["videos/a dog.MOV"],
            'is a video; give a list of clips.*videos/clips.jsonl with the line\n{"video": "a dog.MOV"',
        ),
    ],
)
def test_what_is_asked_for_wrongly_is_said_and_nothing_made(tmp_path, monkeypatch, capsys, arguments, message):
    write_list(tmp_path / "good.jsonl", [{"video": "a", "caption": "a"}])
    (tmp_path / "videos").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "videos" / "a dog.MOV").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    out = [] if "--out" in arguments else ["--out", "out"]
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments, *out])
    with pytest.raises(SystemExit) as stopped:
        prepare_module.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("data.prepare: ")
    assert re.search(message, error), error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["prepare", "precompute", "open_s2v"])
def test_a_folder_that_another_run_writes_to_is_left_alone(tmp_path, monkeypatch, capsys, name):
    module = importlib.import_module(f"magref_jax.data.{name}")
    write_clip(tmp_path / "a.mp4", 12, 12)
    write_list(tmp_path / "a.jsonl", [{"video": "a.mp4", "caption": "a dog"}])
    (tmp_path / "a.json").write_text("{}")
    prepare(tmp_path / "a.jsonl", tmp_path / "records", CUT)
    bundled = pathlib.Path(module.__file__).parents[1] / "bundled" / "emoji"
    arguments = {
        "prepare": ["a.jsonl"],
        "precompute": ["records", "--model", str(bundled)],
        "open_s2v": ["a.json", "--videos", "."],
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments[name], "--out", "out"])
    other = Claim(tmp_path / "out")
    other.take()
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 2
    expected = (
        rf"^data.{name}: out is being written to by process {os.getpid()} on .*: wait until it has ended, or give"
    )
    assert re.search(expected, capsys.readouterr().err, re.MULTILINE)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [Claim.NAME]
    other.release()
    assert not (tmp_path / "out").exists()


def test_the_printed_example_for_a_folder_works(tmp_path):
    (tmp_path / "videos").mkdir()
    write_clip(tmp_path / "videos" / "a.mp4", 12, 12)
    with pytest.raises(ValueError, match="is a folder; give a list of clips") as refused:
        read_lines(tmp_path / "videos")
    (tmp_path / "videos" / "clips.jsonl").write_text(str(refused.value).split("\n")[1])
    assert len(prepare(tmp_path / "videos" / "clips.jsonl", tmp_path / "out", CUT)) == 1


def test_the_command_ends_in_a_sentence(tmp_path):
    command = [
        sys.executable,
        "-m",
        "magref_jax.data.prepare",
        str(tmp_path / "no.jsonl"),
        "--out",
        str(tmp_path / "out"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == f"data.prepare: there is no list of clips {tmp_path / 'no.jsonl'}.\n"
