"""From videos to records: the right frames at the right times, whatever the file; what cannot be used is left out."""

import dataclasses
import fractions
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from PIL import Image

from magref_jax.data.prepare import ClipLine, Cut, cut_clip, find_labels, make_record, prepare, read_lines
from magref_jax.data.records import INDEX, Skipped, TooManySkippedError
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


@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_videos_of_telephones_are_turned_upright(tmp_path, degrees):
    upright = np.zeros((40, 80, 3), np.uint8)
    upright[:20], upright[20:, :40] = (200, 0, 0), (0, 0, 200)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stored = np.rot90(upright, -degrees // 90)  # `degrees` counter-clockwise bring it back
        stream.width, stream.height, stream.pix_fmt = stored.shape[1], stored.shape[0], "yuv444p"
        stream.set_display_rotation(degrees)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(stored), format="rgb24")))
        container.mux(stream.encode(None))
    (frame,) = cut_clip(tmp_path / "a.mp4", Cut(40, 80, 1, 8.0))
    for point in ((5, 5), (5, 75), (35, 5), (35, 75)):
        assert np.abs(frame[point].astype(int) - upright[point]).max() < 30


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
    with av.open(str(folder / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    good = {"caption": "a dog runs", "video": "good.mp4"}
    return [
        (good | {"video": "nowhere.mp4"}, "no video file"),
        (good | {"video": "noise.mp4"}, "Invalid data"),
        (good | {"video": "empty.mp4"}, "is empty, no video file"),
        (good | {"video": "cut.mp4"}, "Invalid data|moov"),
        (good | {"video": "short.mp4"}, "too short: 0.38 s"),
        (good | {"video": "list.m3u8"}, "Invalid|not permitted|No such|Protocol|No video|Input/output"),
        (good | {"video": "."}, "is a folder, no video file"),
        (good | {"video": "sound.wav"}, "no video stream"),
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
    assert done.returncode == 1
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


def test_a_list_in_another_encoding_is_named_with_the_line(tmp_path):
    path = tmp_path / "clips.jsonl"
    path.write_bytes('{"video": "a", "caption": "a"}\n{"video": "a", "caption": "café"}\n'.encode("cp1252"))
    with pytest.raises(ValueError, match=r"clips.jsonl line 2 is not UTF-8: it has the byte 0xe9, which is é"):
        read_lines(path)


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


def test_the_command_says_what_is_wrong(tmp_path):
    environment = os.environ | {"COLUMNS": "200"}
    command = [sys.executable, "-m", "magref_jax.data.prepare", str(tmp_path / "no.jsonl"), "--out", str(tmp_path)]
    done = subprocess.run([*command, "--size", "480"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "size='480' must be HEIGHTxWIDTH" in done.stderr
    assert "Traceback" not in done.stderr
