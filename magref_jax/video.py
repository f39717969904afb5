"""Reads and writes video files, and lays many videos out on one picture.

F frames, H height, W width. Frames of a file are uint8 [F H W 3] RGB; frames of a model are [-1, 1].
"""

import fractions
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict, cast

import av
import av.filter
import jax
import jax.numpy as jnp
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from magref_jax.files import replacing

# One thread and no macroblock tree: with more threads the bytes depend on the machine, with the tree even two runs on
# one machine differ. Quality 16 without the tree is as good and as large as 13 with it: 40 dB at 480p.
X264 = {"crf": "16", "threads": "1", "x264-params": "mbtree=0"}
MIN_SHORT_SIDE = 256  # pixels; players show smaller videos as a stamp or blur them


class Video(NamedTuple):
    """What a video file holds; `metadata` is None where the file has none of ours."""

    frames: UInt8[np.ndarray, "F H W 3"]
    fps: float
    metadata: dict[str, Any] | None


def to_uint8(frames: Float[jax.Array | np.ndarray, "*shape"]) -> UInt8[jax.Array | np.ndarray, "*shape"]:
    """Frames in [-1, 1] as bytes: ⌊255 (x + 1) / 2⌋, clamped. Truncated, not rounded, as the reference does."""
    xp = jnp if isinstance(frames, jax.Array) else np
    # float32: bfloat16 has 8 bits of mantissa and would lose the last one.
    unit = (xp.clip(xp.asarray(frames, dtype=xp.float32), -1.0, 1.0) + 1.0) / 2.0
    return (unit * 255.0).astype(xp.uint8)


def default_scale(height: int, width: int) -> int:
    """The smallest whole factor that brings the short side to at least 256 pixels; 1 for real video sizes."""
    return math.ceil(MIN_SHORT_SIDE / min(height, width))


def frame_rate(fps: float) -> fractions.Fraction:
    """The rate that a file of `fps` frames per second has; a film at 24000/1001 keeps that.

    Raises:
        ValueError: a rate that files do not hold.
    """
    if not 0.001 <= fps <= 1e6:
        raise ValueError(f"fps={fps} must be 0.001 to 1000000.")
    return fractions.Fraction(fps).limit_denominator(1001)


def write_video(
    path: str | os.PathLike[str],
    frames: UInt8[np.ndarray, "F H W 3"],
    fps: float,
    metadata: dict[str, Any] | None = None,
    *,
    parameters: str | None = None,
    scale: int | None = None,
) -> None:
    """Writes an H.264 mp4 that any browser plays: yuv420p, BT.709, index in front, metadata as JSON in `comment`.

    The file appears under its name when it is complete, or not at all. Equal arguments give equal bytes.

    Args:
        path: Its folder is made where there is none.
        frames: See the module docstring.
        fps: Frames per second.
        metadata: Anything JSON can hold.
        parameters: The settings once more, as the text that image and video sites look for under this name.
        scale: Whole factor by which pixels are repeated; `default_scale` if not given.

    Raises:
        ValueError: Frames that are not uint8 [F H W 3], an odd height or width, or an fps or scale out of range.
    """
    with replacing(pathlib.Path(path)) as part:
        encode_video(part, frames, fps, metadata, parameters=parameters, scale=scale)


def encode_video(
    path: pathlib.Path,
    frames: UInt8[np.ndarray, "F H W 3"],
    fps: float,
    metadata: dict[str, Any] | None = None,
    *,
    parameters: str | None = None,
    scale: int | None = None,
) -> None:
    """`write_video` for a path inside `files.replacing`: what a failure leaves there is not a video."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 [F H W 3] with at least one frame, not {frames.dtype} {frames.shape}.")
    rate = frame_rate(fps)
    if scale is None:
        scale = default_scale(*frames.shape[1:3])
    if scale < 1:
        raise ValueError(f"scale={scale} must be 1 or more.")
    height, width = frames.shape[1] * scale, frames.shape[2] * scale
    if height % 2 or width % 2:
        raise ValueError(
            f"frames of {width}x{height} pixels (width x height) must have even sides: H.264 halves the colours."
        )
    tags = {} if metadata is None else {"comment": _to_json(metadata)}
    if parameters is not None:
        # The container would end the text at a NUL, and holds no halves of surrogate pairs, which names of files may have.
        tags["parameters"] = parameters.replace("\0", " ").encode(errors="replace").decode()

    # use_metadata_tags: without it mp4 drops every tag it has no field for.
    options = {"movflags": "faststart+use_metadata_tags"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        container.metadata.update(tags)
        stream = container.add_stream("libx264", rate=rate, options=X264)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.color_range = ColorRange.MPEG
        for frame in frames:
            container.mux(stream.encode(_to_yuv(frame.repeat(scale, axis=0).repeat(scale, axis=1))))
        container.mux(stream.encode(None))


def _to_json(metadata: dict[str, Any]) -> str:
    text = json.dumps(metadata, ensure_ascii=False)
    # A file name that is not UTF-8 is text that cannot be encoded: escaped, it comes back as it was.
    return text if _is_unicode(text) else json.dumps(metadata)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_video(path: str | os.PathLike[str], **options: Any) -> InputContainer:
    """The container of a video file, whatever its tags hold.

    Raises:
        OSError, ValueError: the file cannot be read, or its format is unknown; both are also `av.FFmpegError`.
    """
    try:
        return av.open(path, "r", metadata_errors="replace", **options)
    except TypeError:  # PyAV 19 and later never fail at a tag, and no longer take this argument
        return av.open(path, "r", **options)


def video_stream(container: InputContainer) -> av.VideoStream:
    """The stream that players show: the one marked as default, or else the first; no cover picture, no preview.

    Raises:
        ValueError: there is none, or nothing here can decode it.
    """
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        raise ValueError(f"it has no video stream{', only a cover picture' if container.streams.video else ''}")
    stream = max(streams, key=lambda stream: bool(stream.disposition & Disposition.default))
    # None is not in PyAV's types; it is what a codec without a decoder leaves.
    if cast(Any, stream.codec_context) is None:
        raise ValueError("its video has a codec that FFmpeg, as PyAV brings it, cannot decode")
    return stream


def read_video(path: str | os.PathLike[str]) -> Video:
    """Reads the video stream of a file, and the metadata that `write_video` put there.

    Raises:
        ValueError: it holds no video, or colours that `to_rgb` refuses.
    """
    with open_video(path) as container:
        stream = video_stream(container)
        stream.thread_type = "AUTO"
        frames = [to_rgb(frame) for frame in decode(container, stream)]
        if not frames or not stream.average_rate:
            raise ValueError(f"{path} holds no video frames.")
        try:
            # PyAV 19 leaves half surrogate pairs for bytes that are no text, which nobody could print or write again.
            comment = container.metadata["comment"].encode(errors="surrogateescape").decode(errors="replace")
            metadata = json.loads(comment)
        except (KeyError, ValueError):  # no comment, or somebody else's
            metadata = None
        return Video(np.stack(frames), float(stream.average_rate), metadata if isinstance(metadata, dict) else None)


def read_frames(path: str | os.PathLike[str], indices: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
    """Some frames of a file. The others are decoded, because these depend on them, but not kept.

    Raises:
        ValueError: a frame that the file does not have.
    """
    wanted, found, count = set(indices), {}, 0
    with open_video(path) as container:
        for count, frame in enumerate(decode(container, video_stream(container)), start=1):
            if count - 1 in wanted:
                found[count - 1] = to_rgb(frame)
            if len(found) == len(wanted):
                break
    if missing := sorted(wanted - set(found)):
        raise ValueError(f"{path} has no frame {missing[0]}: it holds {count}, counted from 0.")
    return np.stack([found[index] for index in indices])


def decode(container: InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """The frames of a stream as they are shown: VP8 and VP9 with their transparency, two interlaced fields as one picture."""
    frames = container.decode(stream)
    library = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    if library is not None and stream.metadata.get("alpha_mode") == "1":  # which FFmpeg's own decoders leave out
        decoder = cast(av.VideoCodecContext, av.CodecContext.create(library, "r"))
        frames = (frame for packet in container.demux(stream) for frame in decoder.decode(packet))
    filters: av.filter.Graph | None = None
    for frame in frames:
        if filters is None and not frame.interlaced_frame:
            yield frame
            continue
        if filters is None:  # from here on all go through it, so that none is lost where it ends
            filters = _deinterlacer(stream)
        filters.push(frame)
        yield from _filtered(filters)
    if filters is not None:
        filters.push(None)
        yield from _filtered(filters)


def _deinterlacer(stream: av.VideoStream) -> av.filter.Graph:
    graph = av.filter.Graph()
    # From the lines of one field, without the frames before and after: those differ where reading began elsewhere, and the
    # first frame of a file, which has none, would keep its combs.
    nodes = graph.add_buffer(template=stream), graph.add("estdif", "mode=frame:deint=interlaced")
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    return graph


def _filtered(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    try:
        while True:
            yield cast(av.VideoFrame, graph.vpull())
    except (av.BlockingIOError, av.EOFError):  # until more is pushed, or for ever
        return


# By the numbers of ITU-T H.273: what has other colours than those of BT.709 to every eye. Primaries, transfer functions, and
# matrices that swscale does not know.
_OTHER_COLOURS: dict[str, dict[int, str]] = {
    "color_primaries": {9: "BT.2020 primaries", 10: "XYZ", 11: "DCI-P3 primaries", 12: "Display P3 primaries"},
    "color_trc": {
        8: "linear light",
        9: "a logarithmic curve",
        10: "a logarithmic curve",
        16: "PQ",
        17: "DCI",
        18: "HLG",
    },
    "colorspace": {8: "YCgCo", 10: "BT.2020 with constant luminance", 11: "YDzDx", 14: "ICtCp", 15: "IPT"},
}
_HDR = (16, 18)
WIDE_TO_709 = "zscale=p=bt709:t=bt709:m=bt709:r=tv"  # a filter of ffmpeg
HDR_TO_709 = f"zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable,{WIDE_TO_709}"


def to_rgb(frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
    """The stored pixels of a frame: BT.601 where its tags name no matrix, as with ffmpeg; white behind what is transparent.

    Raises:
        ValueError: the frame is HDR or has wide colours; names them, and a filter that makes them BT.709.
    """
    others = [names[value] for field, names in _OTHER_COLOURS.items() if (value := int(getattr(frame, field))) in names]
    if others:
        remedy = HDR_TO_709 if frame.color_trc in _HDR else WIDE_TO_709
        raise ValueError(
            f"its colours are {', '.join(others)}, and only those of BT.709 are read; ffmpeg converts them: "
            f"-vf {remedy},format=yuv420p"
        )
    # Without these two flags the conversion is a shortcut that darkens every channel by one level.
    exact = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    if not any(component.is_alpha for component in frame.format.components):
        return frame.reformat(format="rgb24", interpolation=exact).to_ndarray()
    pixels = frame.reformat(format="rgba", interpolation=exact).to_ndarray().astype(np.uint16)
    colours, alpha = pixels[..., :3], pixels[..., 3:]
    return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def upright(pixels: UInt8[np.ndarray, "H W 3"], frame: av.VideoFrame) -> UInt8[np.ndarray, "H2 W2 3"]:
    """The pixels of a frame, turned and mirrored as its file says that they are shown.

    Raises:
        ValueError: they are turned by an angle that is no multiple of 90 degrees.
    """
    matrix = cast(Any, frame.side_data).get(SideDataType.DISPLAYMATRIX)
    if matrix is None:
        return pixels
    # x' = a x + c y and y' = b x + d y, to the right and down, but for a shift.
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(float)
    along, across = abs(a) + abs(d), abs(b) + abs(c)
    if min(along, across) > 0.02 * max(along, across):  # a degree
        raise ValueError(f"it is turned by {frame.rotation} degrees; only multiples of 90 are read")
    if across > along:
        pixels, to_right, down = pixels.swapaxes(0, 1), c, b
    else:
        to_right, down = a, d
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if to_right < 0 else 1])


def _to_yuv(frame: UInt8[np.ndarray, "H W 3"]) -> av.VideoFrame:
    # Named here because the default matrix is BT.601, whatever the stream's tags say.
    return av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )


class SheetRow(TypedDict):
    """One video of a contact sheet."""

    references: Sequence[Image.Image]
    canvas: Image.Image
    frames: UInt8[np.ndarray, "F H W 3"]
    caption: str


GAP = 6  # pixels between tiles
TILE_HEIGHT = 128  # pixels
MAX_FRAMES = 9  # of one video
CAPTION_SIZE = 15  # pixels
HEADER = ("references", "canvas", "frames")


def evenly_spaced(count: int, most: int = MAX_FRAMES) -> list[int]:
    """Indices of at most `most` frames out of `count`, the first and the last among them."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()


def contact_sheet(
    rows: Sequence[SheetRow], *, tile_height: int = TILE_HEIGHT, max_frames: int = MAX_FRAMES
) -> Image.Image:
    """One row per video: its references, its canvas, evenly spaced frames, and the caption below.

    Small frames are enlarged by repeating pixels, so that what the model drew is what one sees.
    """
    if not rows:
        raise ValueError("rows is empty: a contact sheet needs at least one video.")
    font = ImageFont.load_default(size=CAPTION_SIZE)
    line_height = math.ceil(CAPTION_SIZE * 1.35)

    strips = []
    for row in rows:
        references = [fit_tile(image, tile_height, tile_height) for image in row["references"]]
        indices = evenly_spaced(len(row["frames"]), max_frames)
        frames = [fit_tile(Image.fromarray(row["frames"][index]), tile_height) for index in indices]
        strips.append((references, [fit_tile(row["canvas"], tile_height)], frames))

    # Columns line up over all rows.
    widths = [max(sum(tile.width + GAP for tile in strip[column]) for strip in strips) for column in range(3)]
    widths = [
        max(width, math.ceil(font.getlength(name)) + 2 * GAP) if width else 0
        for name, width in zip(HEADER, widths, strict=True)
    ]
    lefts = [GAP + sum(widths[:column]) for column in range(3)]
    captions = [_wrap(row["caption"], font, sum(widths)) for row in rows]
    heights = [
        max(tile.height for tiles in strip for tile in tiles) + len(lines) * line_height + 3 * GAP
        for strip, lines in zip(strips, captions, strict=True)
    ]

    sheet = Image.new("RGB", (sum(widths) + GAP, line_height + 2 * GAP + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for name, left, width in zip(HEADER, lefts, widths, strict=True):
        if width:
            draw.text((left, GAP), name, fill="gray", font=font)
    top = line_height + 2 * GAP
    for strip, lines, height in zip(strips, captions, heights, strict=True):
        for tiles, left in zip(strip, lefts, strict=True):
            for tile in tiles:
                sheet.paste(tile, (left, top))
                # References and canvases are white on white without it.
                draw.rectangle((left - 1, top - 1, left + tile.width, top + tile.height), outline="silver")
                left += tile.width + GAP
        text_top = top + height - 2 * GAP - len(lines) * line_height
        for number, line in enumerate(lines):
            draw.text((GAP, text_top + number * line_height), line, fill="black", font=font)
        top += height
    return sheet


def fit_tile(image: Image.Image, height: int = TILE_HEIGHT, width: int | None = None) -> Image.Image:
    """Fits an image into a box: whole-number enlargement for small ones, reduction for large ones, white behind alpha.

    What fits already comes back as it is, so that tiles can be made one by one and the large images let go.
    """
    if image.mode != "RGB":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    ratio = min(height / image.height, math.inf if width is None else width / image.width)
    if ratio >= 1:
        return image.resize((image.width * int(ratio), image.height * int(ratio)), Image.Resampling.NEAREST)
    size = max(1, round(image.width * ratio)), max(1, round(image.height * ratio))
    return image.resize(size, Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; a word that is longer, such as a Chinese sentence, is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
