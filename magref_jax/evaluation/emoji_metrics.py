"""What a video of emoji world shows, measured against the case it was made for. No network, no randomness.

A sprite is looked for by template matching: the part of a window's variance that "this sprite on a plain background"
explains, after a slight blur. One plain colour explains nothing, so neither an empty sky nor a large shape of the right
colour counts as a sprite; the window's own background is fitted, so that only what the sprite covers has to be known.

F frames, H height, W width, S side of a sprite in pixels, K = (S/2)² samples of a window, N templates, P positions.
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from magref_jax.data.emoji_world import (
    MOTIONS,
    Clip,
    EmojiWorldConfig,
    background_image,
    box_iou,
    load_atlas,
    place_positions,
    sample_clip,
    split_identities,
)

Array = np.ndarray
Frames = UInt8[Array, "F H W 3"]
Videos = Sequence[Frames] | UInt8[Array, "N F H W 3"]
Scores = dict[str, Float[Array, "n"]]

NUM_CANDIDATES = 32  # identities a subject is picked from, itself included
STRIDE = 2  # pixels, of the positions searched and of the samples inside a window
BLUR = 0.85  # pixels; enough for samples two pixels apart, little enough to tell two faces apart
OUTSIDE_WEIGHT = 0.25  # of pixels the sprite leaves open: they show its outline, but also what else is in the video
NOISE = 0.2  # variance a window must have to count, summed over K samples of three colours in [0, 1]
# Explained variance from which a subject counts as present: 99 % of the subjects of true videos reach it, and 8 % of
# those of another case.
PRESENT = 0.18


class Metric(NamedTuple):
    label: str
    chance: Callable[[EmojiWorldConfig], float] | None  # of a guess; None where guessing has no meaning


METRICS: Mapping[str, Metric] = {
    "identity_top1": Metric("identity, top 1 of 32", lambda config: 1 / NUM_CANDIDATES),
    "identity_top5": Metric("identity, top 5 of 32", lambda config: 5 / NUM_CANDIDATES),
    "similarity": Metric("similarity to the reference", None),
    "region_iou": Metric("region IoU", None),
    "present": Metric("subjects present", None),
    "all_present": Metric("videos with every subject", None),
    "motion": Metric("motion, mean of all motions", lambda config: 1 / len(config.motions)),
    "place": Metric("place, of those the prompt says", lambda config: 1 / len(config.places)),
    "background": Metric("background", lambda config: 1 / len(config.backgrounds)),
}


class Template(NamedTuple):
    """One sprite or, with a leading axis N, several; everything that does not depend on the window."""

    weights: Float[Array, "*N K"]
    outside: Float[Array, "*N K"]  # weights · (1 - α)
    outside_energy: Float[Array, "*N 1"]
    drawing: Float[Array, "*N 3K"]  # weights · (what of the sprite a plain background does not explain)
    drawing_energy: Float[Array, "*N 1"]
    colour: Float[Array, "*N S S 3"]  # straight colour in [0, 1], as drawn
    alpha: Float[Array, "*N S S"]


def _gaussian_blur(images: Float[Array, "N H W C"], mode: Literal["constant", "edge"]) -> Float[Array, "N H W C"]:
    radius = int(3 * BLUR + 0.5)
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * BLUR**2)).astype(np.float32)
    kernel /= kernel.sum()
    for axis in (1, 2):
        padding = [(radius, radius) if dimension == axis else (0, 0) for dimension in range(4)]
        padded, length = np.pad(images, padding, mode=mode), images.shape[axis]
        cut = [slice(None)] * axis
        images = np.zeros_like(images)
        for k, tap in enumerate(kernel):
            images += tap * padded[(*cut, slice(k, k + length))]
    return images


@functools.cache
def _template(identity: int, style: str, size: int) -> Template:
    # "RGBa" is premultiplied, the form in which sprites are resized for the video.
    image = Image.fromarray(load_atlas().sprite(identity, style)).convert("RGBa")
    pixels = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS), np.float32) / 255
    alpha = pixels[..., 3]
    straight = pixels[..., :3].clip(0, alpha[..., None]) / np.maximum(alpha, 1e-3)[..., None]

    samples = _gaussian_blur(np.minimum(pixels, alpha[..., None])[None], "constant")[0, ::STRIDE, ::STRIDE]
    samples = samples.reshape(-1, 4).T
    colour, open_ = samples[:3], 1 - samples[3]
    weights = OUTSIDE_WEIGHT * open_ + samples[3]
    outside = weights * open_
    energy = (outside * open_).sum() + 1e-6
    drawing = colour - (colour @ outside / energy)[:, None] * open_
    return Template(
        weights,
        outside,
        energy[None],
        (weights * drawing).ravel(),
        (weights * drawing**2).sum()[None],
        straight,
        alpha,
    )


def _stack(templates: Sequence[Template]) -> Template:
    return Template(*map(np.stack, zip(*templates, strict=True)))


def _windows(frames: Frames, size: int) -> Float[Array, "F Y X 3 s s"]:
    """Every window of the blurred frames, as a view."""
    blurred = _gaussian_blur(frames.astype(np.float32) / 255, "edge")
    return np.lib.stride_tricks.sliding_window_view(blurred, (size, size), (1, 2))[..., ::STRIDE, ::STRIDE]


def _explained(windows: Float[Array, "*B P 3 K"], template: Template) -> Float[Array, "*B P N"]:
    """Share of each window's weighted variance that sprite plus best plain background explain; below 0 for worse than a mean."""
    flat = windows.reshape(*windows.shape[:-2], -1)
    mean = np.square(windows @ template.weights.swapaxes(-1, -2)[..., None, :, :]).sum(-2)
    background = np.square(windows @ template.outside.swapaxes(-1, -2)[..., None, :, :]).sum(-2)
    sprite = flat @ template.drawing.swapaxes(-1, -2)
    energy = np.square(windows).sum(-2) @ template.weights.swapaxes(-1, -2)

    def per_template(values: Float[Array, "*N 1"]) -> Float[Array, "*N"]:
        return values.swapaxes(-1, -2)

    mean /= per_template(template.weights.sum(-1, keepdims=True))
    gain = (
        background / per_template(template.outside_energy) + 2 * sprite - per_template(template.drawing_energy) - mean
    )
    return gain / (energy - mean + NOISE)


class Match(NamedTuple):
    """The best window per frame and template."""

    score: Float[Array, "F N"]
    row: Int[Array, "F N"]
    column: Int[Array, "F N"]


def _search(
    windows: Float[Array, "F Y X 3 s s"], template: Template, coarse: Float[Array, "F P N"], columns: int
) -> Match:
    """From the best coarse position to the best of its neighbours at full resolution."""
    frames, _, count = coarse.shape
    row, column = np.divmod(coarse.argmax(1), columns)
    step = np.array(list(itertools.product((-1, 0, 1), repeat=2)))
    row = (STRIDE * row[..., None] + step[:, 0]).clip(0, windows.shape[1] - 1).swapaxes(0, 1)  # [N, F, 9]
    column = (STRIDE * column[..., None] + step[:, 1]).clip(0, windows.shape[2] - 1).swapaxes(0, 1)
    near = windows[np.arange(frames)[None, :, None], row, column]
    near = near.reshape(count, frames * len(step), 3, -1)
    score = _explained(near, Template(*(field[:, None] for field in template))).reshape(row.shape)
    best = score.argmax(-1, keepdims=True)
    return Match(*(np.take_along_axis(field, best, -1)[..., 0].T for field in (score, row, column)))


def _candidates(clip: Clip, subject: int) -> list[int]:
    """The subject's identity, then distractors of its split; none of them is another subject of the clip."""
    identity, present = clip.subjects[subject].identity, {truth.identity for truth in clip.subjects}
    split = next(members for members in split_identities(load_atlas()).values() if identity in members)
    rng = np.random.default_rng([zlib.crc32(clip.caption.encode()), identity])
    others = [other for other in split if other not in present]
    return [identity, *map(int, rng.choice(others, NUM_CANDIDATES - 1, replace=False))]


def _similarity(frames: Frames, match: Match, template: Template) -> float:
    """Lin's concordance of the pixels under the sprite with the sprite, α-weighted, mean over frames, cut at 0.

    2 cov / (var + var + (difference of means)²): 1 for equal pixels, lower for other colours, contrast or shapes.
    """
    size = len(template.alpha)
    weights = np.repeat(template.alpha[..., None], 3, -1) / (3 * template.alpha.sum())
    expected, values = template.colour, []
    for frame, row, column in zip(frames, match.row[:, 0], match.column[:, 0], strict=True):
        found = frame[row : row + size, column : column + size] / 255
        means = (weights * found).sum(), (weights * expected).sum()
        covariance = (weights * (found - means[0]) * (expected - means[1])).sum()
        variances = (weights * (found - means[0]) ** 2).sum() + (weights * (expected - means[1]) ** 2).sum()
        values.append(2 * covariance / (variances + (means[0] - means[1]) ** 2 + 1e-6))
    return max(float(np.mean(values)), 0.0)


def _region_iou(match: Match, boxes: Int[Array, "F 4"]) -> float:
    """Of the best window with the subject's true box, mean over frames."""
    corners = np.stack([match.column[:, 0], match.row[:, 0]], -1)
    return float(box_iou(np.concatenate([corners, corners + boxes[:, 2:] - boxes[:, :2]], -1), boxes).mean())


@functools.cache
def _paths(config: EmojiWorldConfig) -> Mapping[str, Int[Array, "F 2"]]:
    """(row, column) of every motion in steps of the coarse search, from its smallest on."""
    paths = {}
    for motion in config.motions:
        poses = [MOTIONS[motion](config, frame) for frame in range(config.num_frames)]
        if any(pose.scale != 1 or pose.angle or pose.margin != 1 for pose in poses):
            raise ValueError(f"motions has {motion!r}, which turns or resizes sprites; only shifts can be recognised.")
        path = np.array([(round(pose.y / STRIDE), round(pose.x / STRIDE)) for pose in poses])
        paths[motion] = path - path.min(0)
    return paths


def _motion(maps: Float[Array, "F Y X"], paths: Mapping[str, Int[Array, "F 2"]]) -> str:
    """The motion whose path, at its best start, runs over the highest scores."""
    # exp: one frame without the sprite, far below 0, must not outvote the others.
    likelihood = np.exp(maps)
    evidence = {}
    for motion, path in paths.items():
        rows, columns = np.array(maps.shape[1:]) - path.max(0)
        total = np.zeros((rows, columns))
        for frame, (row, column) in zip(likelihood, path, strict=True):
            total += frame[row : row + rows, column : column + columns]
        evidence[motion] = float(total.max())
    return max(evidence, key=evidence.__getitem__)


def _nearest_place(column: int, row: int, config: EmojiWorldConfig) -> str:
    positions = place_positions(config)
    return min(positions, key=lambda place: int(np.abs(positions[place] - (column, row)).sum()))


CELL = 8  # pixels
RENDERINGS = 32  # of each background
TEXTURE_WEIGHT = 2.0
MAX_DIFFERENCE = 0.25  # of a cell: what a sprite hides must not outvote what it leaves


def _layout(image: Float[Array, "H W 3"]) -> Float[Array, "h w 4"]:
    """Mean colour and deviation of brightness of every cell."""
    rows, columns = image.shape[0] // CELL, image.shape[1] // CELL
    cells = image[: rows * CELL, : columns * CELL].reshape(rows, CELL, columns, CELL, 3).swapaxes(1, 2) / 255
    texture = cells.mean(-1).std((2, 3))
    return np.concatenate([cells.mean((2, 3)), TEXTURE_WEIGHT * texture[..., None]], -1)


@functools.cache
def _background_bank(config: EmojiWorldConfig) -> Float[Array, "B R h w 4"]:
    plain = dataclasses.replace(config, cross_pair=0.0, background_reference=0.0)
    params = [sample_clip(plain, "train", 0, index).background_params for index in range(RENDERINGS)]
    return np.array(
        [
            [_layout(background_image(name, given, config.width, config.height)) for given in params]
            for name in config.backgrounds
        ]
    )


def _background(frames: Frames, config: EmojiWorldConfig) -> str:
    """The background with the nearest rendering. The median over time has already lost what moves."""
    difference = np.linalg.norm(_background_bank(config) - _layout(np.median(frames, axis=0)), axis=-1)
    distance = difference.clip(max=MAX_DIFFERENCE).mean((-1, -2)).min(-1)
    return config.backgrounds[int(distance.argmin())]


def score_clip(frames: Frames, clip: Clip, config: EmojiWorldConfig) -> Scores:
    """Every metric of one video: one value per subject, or a single one for the metrics of the whole video.

    Motions are kept apart, as "motion/rises" and so on.

    Raises:
        ValueError: frames of another size than the config's, or motions that turn or resize sprites.
    """
    expected = (config.num_frames, config.height, config.width, 3)
    if frames.shape != expected or frames.dtype != np.uint8:
        raise ValueError(
            f"frames must be uint8 {list(expected)} like the clips, got {frames.dtype} {list(frames.shape)}."
        )
    paths, size = _paths(config), config.sprite_size
    windows = _windows(frames, size)
    coarse = windows[:, ::STRIDE, ::STRIDE]
    rows, columns = coarse.shape[1:3]
    coarse = np.ascontiguousarray(coarse).reshape(len(frames), rows * columns, 3, -1)
    every_second = slice(None, None, 2)  # neighbouring frames say the same again

    names = [name for name in METRICS if name != "motion"] + [f"motion/{motion}" for motion in paths]
    scores: dict[str, list[float]] = {name: [] for name in names}
    subjects = zip(clip.subjects, clip.references, strict=False)  # a background reference comes last
    for index, (truth, reference) in enumerate(subjects):
        style = reference.style or truth.style
        template = _stack([_template(identity, style, size) for identity in _candidates(clip, index)])
        coarse_scores = _explained(coarse[every_second].reshape(-1, 3, coarse.shape[-1]), template)
        coarse_scores = coarse_scores.reshape(-1, rows * columns, NUM_CANDIDATES)
        match = _search(windows[every_second], template, coarse_scores, columns)
        score = match.score.mean(0)
        rank = (score[1:] >= score[0]).sum()
        true_template = _template(truth.identity, style, size)
        maps = _explained(coarse, _stack([true_template])).reshape(len(frames), rows, columns)
        scores["identity_top1"].append(rank < 1)
        scores["identity_top5"].append(rank < 5)
        scores["similarity"].append(_similarity(frames[every_second], match, true_template))
        scores["region_iou"].append(_region_iou(match, truth.boxes[every_second]))
        scores["present"].append(score[0] >= PRESENT)
        scores[f"motion/{truth.motion}"].append(_motion(maps, paths) == truth.motion)
        if f"{reference.label} {truth.place} {truth.motion}" in clip.caption:
            place = _nearest_place(match.column[0, 0], match.row[0, 0], config)
            scores["place"].append(place == truth.place)
    scores["all_present"].append(all(scores["present"]))
    scores["background"].append(_background(frames, config) == clip.background)
    return {name: np.array(values, np.float64) for name, values in scores.items()}


class Estimate(NamedTuple):
    """A mean with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def summarise(scores: Sequence[Scores], num_resamples: int = 1000) -> dict[str, Estimate]:
    """Means over subjects, or videos; intervals from resampling videos, as the subjects of one are not independent.

    The mean of motions weighs each motion alike: a quarter of all subjects stay still, and a model that never moves
    anything shall get no more than a guess.
    """
    draws = np.random.default_rng(0).integers(len(scores), size=(num_resamples, len(scores)))
    estimates = {}
    for metric in METRICS:
        means = []
        for name in [name for name in scores[0] if name.partition("/")[0] == metric]:
            sums = np.array([score[name].sum() for score in scores])
            counts = np.array([len(score[name]) for score in scores])
            totals = np.stack([np.append(x.sum(), x[draws].sum(1)) for x in (sums, counts)])
            if totals[1, 0]:
                means.append(np.divide(*totals, where=totals[1] > 0, out=np.full(num_resamples + 1, np.nan)))
        value, *resampled = np.nanmean(means, axis=0)
        low, high = np.quantile(resampled, (0.025, 0.975))
        estimates[metric] = Estimate(float(value), float(low), float(high))
    return estimates


def evaluate(videos: Videos, clips: Sequence[Clip], config: EmojiWorldConfig) -> dict[str, Estimate]:
    """Every metric of `METRICS`, video i judged against clip i.

    Raises:
        ValueError: no videos, not one clip per video, or what `score_clip` refuses.
    """
    if not len(videos) == len(clips) > 0:
        raise ValueError(f"{len(videos)} videos and {len(clips)} clips given; one clip for each of at least one video.")
    return summarise([score_clip(video, clip, config) for video, clip in zip(videos, clips, strict=True)])


def other_case(clip: Clip, config: EmojiWorldConfig, seed: int, index: int) -> Clip:
    """A held-out clip with as many references, none of whose subjects is in `clip`: what shuffled references show."""
    identities = {truth.identity for truth in clip.subjects}

    def is_other(other: Clip) -> bool:
        sizes = len(other.references) == len(clip.references) and len(other.subjects) == len(clip.subjects)
        return sizes and identities.isdisjoint(truth.identity for truth in other.subjects)

    # Far from the clips that a benchmark numbers 0, 1, 2, …
    draws = (sample_clip(config, "held_out", seed, (index + 1) * 1_000_003 + attempt) for attempt in itertools.count())
    return next(filter(is_other, draws))
