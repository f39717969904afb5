"""Emoji world: clips of moving emoji drawn on the fly, every clip a pure function of (config, split, seed, index)."""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from magref_jax.descriptions import short_repr

Array = np.ndarray
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")


@dataclass(frozen=True)
class Identity:
    """One emoji: its code points joined by "-", the name used in captions and its Unicode group."""

    code_point: str
    name: str
    group: str


@short_repr
@dataclass(frozen=True)
class Atlas:
    """Drawings of every identity in every style, straight alpha; sprite = sprites[identity * len(styles) + style]."""

    sprites: UInt8[Array, "N S S 4"]
    identities: tuple[Identity, ...]
    styles: tuple[str, ...]

    def sprite(self, identity: int, style: str) -> UInt8[Array, "S S 4"]:
        return self.sprites[identity * len(self.styles) + self.styles.index(style)]


@functools.cache
def load_atlas() -> Atlas:
    """The atlas shipped with the package, read once per process."""
    folder = resources.files("magref_jax.data")
    listing = json.loads(folder.joinpath("emoji_atlas.json").read_text())
    with folder.joinpath("emoji_atlas.webp").open("rb") as file:
        sheet = np.asarray(Image.open(file).convert("RGBA"))
    identities = tuple(Identity(*entry) for entry in listing["identities"])
    size, styles = listing["tile_size"], tuple(listing["styles"])
    tiles = sheet.reshape(-1, size, listing["columns"], size, 4).swapaxes(1, 2).reshape(-1, size, size, 4)
    sprites = np.ascontiguousarray(tiles[: len(identities) * len(styles)])
    sprites.flags.writeable = False
    return Atlas(sprites, identities, styles)


def split_identities(atlas: Atlas) -> dict[Split, tuple[int, ...]]:
    """Identity indices of the two splits; about 10 % of the code points are held out, in every style.

    The split hashes the code point, so identities added to the atlas move no other identity across.
    """

    def is_held_out(identity: Identity) -> bool:
        return hashlib.sha256(identity.code_point.encode()).digest()[0] % 10 == 0

    indices = range(len(atlas.identities))
    return {
        "train": tuple(index for index in indices if not is_held_out(atlas.identities[index])),
        "held_out": tuple(index for index in indices if is_held_out(atlas.identities[index])),
    }


@functools.cache
def _splits() -> dict[Split, Int[Array, "I"]]:
    return {split: np.array(indices) for split, indices in split_identities(load_atlas()).items()}


@functools.cache
def _words() -> tuple[frozenset[str], ...]:
    return tuple(frozenset(identity.name.split()) for identity in load_atlas().identities)


@dataclass(frozen=True)
class Pose:
    """A subject in one frame, relative to its start: displacement in pixels, clockwise turn in degrees, scale.

    ``margin`` is the ratio of the box to the drawing.
    """

    x: float = 0.0
    y: float = 0.0
    angle: int = 0
    scale: float = 1.0
    margin: float = 1.0


def _progress(config: "EmojiWorldConfig", frame: int) -> float:
    return frame / max(config.num_frames - 1, 1)


MOTIONS: Mapping[str, Callable[["EmojiWorldConfig", int], Pose]] = {
    "slides right": lambda config, frame: Pose(x=config.horizontal_speed * frame),
    "slides left": lambda config, frame: Pose(x=-config.horizontal_speed * frame),
    "rises": lambda config, frame: Pose(y=-config.vertical_speed * frame),
    "falls": lambda config, frame: Pose(y=config.vertical_speed * frame),
    "stays still": lambda config, frame: Pose(),
    "bounces": lambda config, frame: Pose(
        y=-config.bounce_height * abs(math.sin(math.pi * frame / config.bounce_period))
    ),
    # A square tile turns inside its box only when it is smaller by √2.
    "spins": lambda config, frame: Pose(angle=45 * frame % 360, margin=math.sqrt(2)),
    "grows": lambda config, frame: Pose(scale=0.5 + 0.5 * _progress(config, frame)),
    "shrinks": lambda config, frame: Pose(scale=1.0 - 0.5 * _progress(config, frame)),
}
DEFAULT_MOTIONS = ("slides right", "slides left", "rises", "falls", "stays still", "bounces")

# Where a subject starts, as fractions (x, y) of the room that the frame leaves to it.
PLACES: Mapping[str, tuple[float, float]] = {
    "at the top left": (0, 0),
    "at the top": (0.5, 0),
    "at the top right": (1, 0),
    "on the left": (0, 0.5),
    "in the middle": (0.5, 0.5),
    "on the right": (1, 0.5),
    "at the bottom left": (0, 1),
    "at the bottom": (0.5, 1),
    "at the bottom right": (1, 1),
}

Params = Mapping[str, float]
Grid = tuple[Float[Array, "H 1"], Float[Array, "1 W"]]


def _ramp(top: Float[Array, "3"], bottom: Float[Array, "3"], position: Float[Array, "H W"]) -> Float[Array, "H W 3"]:
    return top + (bottom - top) * position[..., None].clip(0, 1)


def _colour(red: float, green: float, blue: float) -> Float[Array, "3"]:
    return np.array([red, green, blue])


def _meadow(params: Params, y: Array, x: Array) -> Array:
    horizon = params["horizon"] + 0.04 * np.sin(2 * np.pi * (params["scale"] * x + params["phase"]))
    sky = _ramp(_colour(150, 200, 240), _colour(205, 230, 245), y / horizon)
    grass = _ramp(_colour(130, 190, 90), _colour(85, 150, 60), (y - horizon) / (1 - horizon))
    return np.where((y < horizon)[..., None], sky, grass)


def _ocean(params: Params, y: Array, x: Array) -> Array:
    horizon = params["horizon"]
    depth = ((y - horizon) / (1 - horizon)).clip(0, 1)
    waves = np.sin(2 * np.pi * (5 * depth**0.7 + 0.25 * np.sin(2 * np.pi * (params["scale"] * x + params["phase"]))))
    sky = _ramp(_colour(175, 215, 240), _colour(220, 238, 245), y / horizon + 0 * x)
    water = _ramp(_colour(60, 140, 185), _colour(20, 80, 140), depth + 0 * x) + 9 * waves[..., None]
    return np.where((y < horizon)[..., None], sky, water)


def _desert(params: Params, y: Array, x: Array) -> Array:
    far = params["horizon"] + 0.06 * np.sin(2 * np.pi * (params["scale"] * x + params["phase"]))
    near = far + 0.22 + 0.06 * np.sin(2 * np.pi * (0.7 * params["scale"] * x + 0.3 - params["phase"]))
    sky = _ramp(_colour(165, 210, 235), _colour(245, 228, 190), y / far)
    sand = np.where((y < near)[..., None], _colour(228, 190, 125), _colour(208, 165, 100))
    return np.where((y < far)[..., None], sky, sand)


def _night_sky(params: Params, y: Array, x: Array) -> Array:
    image = _ramp(_colour(12, 14, 45), _colour(45, 45, 95), y + 0 * x)
    stars = np.random.default_rng(int(params["stars"]))
    height, width = image.shape[:2]
    rows, columns = stars.integers(0, height, 28), stars.integers(0, width, 28)
    image[rows, columns] = stars.uniform(130, 230, (28, 1))
    return image


def _snow_field(params: Params, y: Array, x: Array) -> Array:
    horizon = params["horizon"] + 0.05 * np.sin(2 * np.pi * (params["scale"] * x + params["phase"]))
    sky = _ramp(_colour(140, 160, 185), _colour(185, 200, 215), y / horizon)
    snow = _ramp(_colour(246, 249, 252), _colour(208, 222, 238), (y - horizon) / (1 - horizon))
    return np.where((y < horizon)[..., None], sky, snow)


def _sunset(params: Params, y: Array, x: Array) -> Array:
    horizon = params["horizon"] + 0.1
    height = y / horizon + 0 * x
    upper = _ramp(_colour(95, 60, 125), _colour(230, 105, 85), 2 * height)
    lower = _ramp(_colour(230, 105, 85), _colour(252, 190, 95), 2 * height - 1)
    sky = np.where((height < 0.5)[..., None], upper, lower)
    glow = np.exp(-(((x - params["phase"]) / 0.16) ** 2) - ((y - horizon) / 0.22) ** 2)
    sky = sky + (_colour(255, 235, 160) - sky) * glow[..., None]
    land = _ramp(_colour(85, 45, 75), _colour(55, 30, 60), (y - horizon) / (1 - horizon) + 0 * x)
    return np.where((y < horizon)[..., None], sky, land)


def _brick_wall(params: Params, y: Array, x: Array) -> Array:
    rows = 5 + params["scale"]
    row = np.floor(rows * y + params["phase"])
    along = 0.75 * rows * x + 0.5 * (row % 2)
    # Mortar 0.16 of a brick high; the same thickness along a brick twice as long as it is high.
    mortar = ((rows * y + params["phase"]) % 1 < 0.16) | (along % 1 < 0.08)
    shade = 7 * np.sin(12.9 * row + 78.2 * np.floor(along))
    brick = _colour(165, 85, 68) + shade[..., None]
    return np.where(mortar[..., None], _colour(180, 130, 112), brick)


def _checkered_floor(params: Params, y: Array, x: Array) -> Array:
    cells = 3 + params["scale"]
    odd = (np.floor(cells * y + params["phase"]) + np.floor(1.5 * cells * x + params["phase"])) % 2
    return np.where(odd[..., None] > 0, _colour(196, 192, 184), _colour(160, 158, 158))


def _forest(params: Params, y: Array, x: Array) -> Array:
    image = _ramp(_colour(70, 115, 75), _colour(45, 80, 50), y + 0 * x)
    position = (4 + params["scale"]) * x + params["phase"]
    trunk = np.abs(position % 1 - 0.5) < 0.1 + 0.06 * np.sin(9 * np.floor(position))
    image = np.where((trunk & (y > 0.12))[..., None], _colour(80, 62, 45), image)
    canopy = y < 0.2 + 0.05 * np.sin(2 * np.pi * (2 * position))
    image = np.where(canopy[..., None], _colour(40, 88, 45), image)
    return np.where((y > 0.86 + 0 * x)[..., None], _colour(95, 85, 50), image)


def _plain_wall(params: Params, y: Array, x: Array) -> Array:
    tone = 200 + 25 * np.cos(2 * np.pi * (params["phase"] + np.array([0, 1 / 3, 2 / 3])))
    return _ramp(tone + 12, tone - 12, y + 0 * x)


@dataclass(frozen=True)
class _Background:
    place: str
    draw: Callable[[Params, Array, Array], Array]


BACKGROUNDS: Mapping[str, _Background] = {
    "meadow": _Background("over a", _meadow),
    "ocean": _Background("over the", _ocean),
    "desert": _Background("over a", _desert),
    "night sky": _Background("in front of a", _night_sky),
    "snow field": _Background("over a", _snow_field),
    "sunset": _Background("in front of a", _sunset),
    "brick wall": _Background("in front of a", _brick_wall),
    "checkered floor": _Background("over a", _checkered_floor),
    "forest": _Background("in front of a", _forest),
    "plain wall": _Background("in front of a", _plain_wall),
}


def _draw_background_params(rng: np.random.Generator) -> dict[str, float]:
    horizon, scale, phase, red, green, blue = rng.random(6).tolist()
    return {
        "horizon": 0.4 + 0.2 * horizon,
        "scale": 0.8 + 0.8 * scale,
        "phase": phase,
        "stars": float(rng.integers(2**31)),
        "red": 0.94 + 0.12 * red,
        "green": 0.94 + 0.12 * green,
        "blue": 0.94 + 0.12 * blue,
    }


@functools.lru_cache(maxsize=16)
def _grid(width: int, height: int) -> Grid:
    return (np.arange(height)[:, None] + 0.5) / height, (np.arange(width)[None] + 0.5) / width


def background_image(name: str, params: Params, width: int, height: int) -> UInt8[Array, "H W 3"]:
    """A background drawn from its parameters, those of ``Clip.background_params``.

    Raises:
        ValueError: unknown background.
    """
    if name not in BACKGROUNDS:
        raise ValueError(f"background must be one of {tuple(BACKGROUNDS)}, got {name!r}")
    y, x = _grid(width, height)
    tint = _colour(params["red"], params["green"], params["blue"])
    return np.round(BACKGROUNDS[name].draw(params, y, x) * tint).clip(0, 255).astype(np.uint8)


CROSS_PAIR_KINDS = ("style", "rotated", "recoloured", "flipped")


@dataclass(frozen=True)
class EmojiWorldConfig:
    """Size of the clips and the distribution they are drawn from; sizes and distances in pixels, speeds per frame.

    ``place_words`` is the probability that the caption says where each subject starts. ``subject_counts`` weighs 1, 2, …
    subjects, cut at ``max_subjects``. ``cross_pair`` is the probability that a reference is another variant than the sprite
    of the clip, ``background_reference`` the probability that the background is given as the last reference.
    """

    width: int = 72
    height: int = 56
    num_frames: int = 8
    sprite_size: int = 24
    place_words: float = 0.85
    max_subjects: int = 3
    subject_counts: tuple[float, ...] = (0.3, 0.45, 0.25, 0.0)
    motions: tuple[str, ...] = DEFAULT_MOTIONS
    places: tuple[str, ...] = tuple(PLACES)
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    cross_pair: float = 0.0
    cross_pair_kinds: tuple[str, ...] = CROSS_PAIR_KINDS
    background_reference: float = 0.0
    horizontal_speed: int = 4
    vertical_speed: int = 4
    bounce_height: int = 12
    bounce_period: int = 4

    def __post_init__(self):
        allowed = {
            "motions": MOTIONS,
            "places": PLACES,
            "backgrounds": BACKGROUNDS,
            "cross_pair_kinds": CROSS_PAIR_KINDS,
        }
        for field, names in allowed.items():
            given = getattr(self, field)
            if not given or not set(given) <= set(names):
                raise ValueError(f"{field} must be a non-empty subset of {tuple(names)}, got {given!r}")
        for field in ("place_words", "cross_pair", "background_reference"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must lie in [0, 1], got {getattr(self, field)}")
        for field in ("num_frames", "sprite_size", "max_subjects", "bounce_period"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        weights = self.subject_counts[: self.max_subjects]
        if min(self.subject_counts, default=0) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"subject_counts must be weights >= 0, some > 0 up to max_subjects={self.max_subjects}, "
                f"got {self.subject_counts}"
            )
        _starts(self)


@functools.lru_cache(maxsize=16)
def _poses(config: EmojiWorldConfig) -> Mapping[str, tuple[Pose, ...]]:
    return {
        motion: tuple(MOTIONS[motion](config, frame) for frame in range(config.num_frames)) for motion in config.motions
    }


@functools.lru_cache(maxsize=16)
def _tracks(config: EmojiWorldConfig) -> Int[Array, "M T 4"]:
    """Boxes of every motion relative to the start position of the full-size box."""

    def box(pose: Pose) -> tuple[int, int, int, int]:
        side = max(round(config.sprite_size * pose.scale), 1)
        inset = (config.sprite_size - side) // 2
        x, y = round(pose.x) + inset, round(pose.y) + inset
        return x, y, x + side, y + side

    return np.array([[box(pose) for pose in poses] for poses in _poses(config).values()])


def place_positions(config: EmojiWorldConfig) -> dict[str, Int[Array, "2"]]:
    """The top left corner (x, y) of a sprite at each of the config's places, in pixels."""
    room = np.array([config.width, config.height]) - config.sprite_size
    return {name: np.round(room * PLACES[name]).astype(int) for name in config.places}


@functools.lru_cache(maxsize=16)
def _starts(config: EmojiWorldConfig) -> tuple[tuple[tuple[str, ...], Int[Array, "P 2"]], ...]:
    """Per motion, the places that keep all of it inside the frame: their names and their positions (x, y)."""
    frame_size = np.array([config.width, config.height])
    places = place_positions(config)
    starts = []
    for motion, track in zip(config.motions, _tracks(config), strict=True):
        fitting = {
            name: start
            for name, start in places.items()
            if (track[:, :2] + start).min() >= 0 and (track[:, 2:] + start <= frame_size).all()
        }
        if not fitting:
            raise ValueError(
                f"motion {motion!r} does not fit: a sprite of sprite_size={config.sprite_size} leaves "
                f"{config.width}x{config.height} within num_frames={config.num_frames}, whichever of places={config.places} it starts at"
            )
        starts.append((tuple(fitting), np.array(list(fitting.values()))))
    return tuple(starts)


Sprite = tuple[Float[Array, "S S 3"], Float[Array, "S S 1"]]  # premultiplied colour, 1 - alpha


@functools.lru_cache(maxsize=16384)
def _video_sprite(identity: int, style: str, size: int, margin: float, angle: int) -> Sprite:
    """A sprite as it stands in a box of the video, ``margin`` times smaller than the box and turned by ``angle``."""
    # Pillow's "RGBa" is premultiplied: transparent pixels would otherwise bleed black into the edges.
    image = Image.fromarray(load_atlas().sprite(identity, style)).convert("RGBa")
    side = round(size / margin)
    image = image.resize((side, side), Image.Resampling.LANCZOS)
    if side < size:
        start = (side - size) // 2
        image = image.crop((start, start, start + size, start + size))
    if angle:
        image = image.rotate(-angle, Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.float32)
    # LANCZOS overshoots; a colour above its own alpha would glow.
    return np.minimum(pixels[..., :3], pixels[..., 3:]), 1 - pixels[..., 3:] / 255


def _rotated(sprite: UInt8[Array, "S S 4"], rng: np.random.Generator) -> UInt8[Array, "S S 4"]:
    angle = int(rng.integers(15, 46)) * int(rng.choice([-1, 1]))
    image = Image.fromarray(sprite).rotate(angle, Image.Resampling.BICUBIC, expand=True)
    return np.asarray(image.resize(sprite.shape[:2], Image.Resampling.LANCZOS))


def _recoloured(sprite: UInt8[Array, "S S 4"], rng: np.random.Generator) -> UInt8[Array, "S S 4"]:
    # A light of another colour and strength: a larger change of hue would turn a red apple into a green one.
    gains = rng.uniform(0.6, 0.8) * rng.permutation([0.85, 1.0, 1.15])
    return np.round(sprite * np.append(gains, 1.0)).astype(np.uint8)


def _flipped(sprite: UInt8[Array, "S S 4"], rng: np.random.Generator) -> UInt8[Array, "S S 4"]:
    return np.ascontiguousarray(sprite[:, ::-1])


# Below this mean difference of uint8 values a sprite is symmetric and its mirror image no other variant.
MIN_FLIP_DIFFERENCE = 5.0
REFERENCE_CHANGES = {"rotated": _rotated, "recoloured": _recoloured, "flipped": _flipped}


def _reference_variant(
    identity: int, style: str, config: EmojiWorldConfig, rng: np.random.Generator
) -> tuple[UInt8[Array, "S S 4"], str, str]:
    """Reference image of a subject drawn in ``style``, its own style and the kind of variant."""
    atlas = load_atlas()
    if rng.random() >= config.cross_pair:
        return atlas.sprite(identity, style), style, "same"
    kind = str(rng.choice(config.cross_pair_kinds))
    if kind == "style":
        other = str(rng.choice([name for name in atlas.styles if name != style]))
        return atlas.sprite(identity, other), other, kind
    sprite = atlas.sprite(identity, style)
    if kind == "flipped" and np.abs(sprite.astype(int) - sprite[:, ::-1]).mean() < MIN_FLIP_DIFFERENCE:
        kind = "rotated"
    return REFERENCE_CHANGES[kind](sprite, rng), style, kind


MAX_OVERLAP = 0.1
PLACEMENT_TRIES = 50

TEMPLATES = ("{subjects} {place}", "{place}, {subjects}", "a video of {subjects} {place}")


@short_repr
@dataclass(frozen=True)
class Reference:
    """A reference image with the words of the caption it shows.

    ``image`` is RGBA with straight alpha for subjects, RGB in the size of the clip for the background, whose
    ``identity`` and ``style`` are None. ``variant`` is "same" or one of ``CROSS_PAIR_KINDS``.
    """

    image: UInt8[Array, "h w c"]
    label: str
    label_span: tuple[int, int]
    role: Literal["subject", "background"]
    identity: int | None
    style: str | None
    variant: str


@short_repr
@dataclass(frozen=True)
class SubjectTruth:
    """What a subject is and does in the video; boxes are (x0, y0, x1, y1) per frame, ends exclusive."""

    identity: int
    style: str
    motion: str
    place: str  # one of ``PLACES``, in the caption or not
    boxes: Int[Array, "T 4"]


@short_repr
@dataclass(frozen=True)
class Clip:
    """One sample: subjects in caption order, references in the same order with the background last."""

    frames: UInt8[Array, "T H W 3"]
    caption: str
    references: tuple[Reference, ...]
    subjects: tuple[SubjectTruth, ...]
    background: str
    background_params: Params


def _draw_identities(count: int, candidates: Int[Array, "I"], rng: np.random.Generator) -> list[int]:
    """Distinct identities, no name made of words of another one ("cat" next to "black cat" would be ambiguous)."""
    words = _words()
    chosen: list[int] = []
    while len(chosen) < count:
        identity = int(candidates[rng.integers(len(candidates))])
        if all(not words[identity] <= words[other] and not words[other] <= words[identity] for other in chosen):
            chosen.append(identity)
    return chosen


def box_iou(a: Int[Array, "*N 4"], b: Int[Array, "*N 4"]) -> Float[Array, "*N"]:
    """Intersection over union of boxes (x0, y0, x1, y1)."""
    overlap = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = overlap.clip(0).prod(-1)
    areas = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
    return intersection / (areas - intersection)


def _place_subjects(
    count: int, config: EmojiWorldConfig, rng: np.random.Generator
) -> tuple[list[str], list[str], Int[Array, "S T 4"]]:
    """Motions, places and boxes of the first draw that overlaps little, else of the least overlapping one."""
    starts, tracks = _starts(config), _tracks(config)
    draws = []
    for _ in range(PLACEMENT_TRIES):
        motions = rng.integers(len(config.motions), size=count)
        places = [int(rng.integers(len(starts[motion][0]))) for motion in motions]
        positions = np.array([starts[motion][1][place] for motion, place in zip(motions, places, strict=True)])
        boxes = tracks[motions] + np.tile(positions, 2)[:, None]
        pairs = itertools.combinations(boxes, 2)
        overlap = max((box_iou(first, second).max() for first, second in pairs), default=0.0)
        draws.append((overlap, motions, places, boxes))
        if overlap <= MAX_OVERLAP:
            break
    _, motions, places, boxes = min(draws, key=lambda draw: max(draw[0], MAX_OVERLAP))
    names = [starts[motion][0][place] for motion, place in zip(motions, places, strict=True)]
    return [config.motions[motion] for motion in motions], names, boxes


def _write_caption(
    names: list[str], predicates: list[str], background: str, template: str
) -> tuple[str, list[tuple[int, int]], tuple[int, int]]:
    """The caption, the character span of every subject's name and that of the background's name."""
    place = f"{BACKGROUNDS[background].place} {background}"
    joined, starts = "", []
    for position, (name, predicate) in enumerate(zip(names, predicates, strict=True)):
        joined += "" if position == 0 else " and " if position == len(names) - 1 else ", "
        starts.append(len(joined) + len("the "))
        joined += f"the {name} {predicate}"
    subjects_start = len(template[: template.index("{subjects}")].format(place=place))
    place_end = len(template[: template.index("{place}")].format(subjects=joined)) + len(place)
    spans = [
        (subjects_start + start, subjects_start + start + len(name)) for start, name in zip(starts, names, strict=True)
    ]
    return template.format(subjects=joined, place=place), spans, (place_end - len(background), place_end)


def sample_clip(config: EmojiWorldConfig, split: Split, seed: int, index: int) -> Clip:
    """Clip ``index`` of the stream ``seed``; the same arguments give the same bytes.

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    atlas = load_atlas()
    rng = np.random.default_rng([seed, index])

    weights = np.array(config.subject_counts[: config.max_subjects])
    count = 1 + int(np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(), side="right"))
    identities = _draw_identities(count, _splits()[split], rng)
    names = [atlas.identities[identity].name for identity in identities]
    styles = [atlas.styles[choice] for choice in rng.integers(len(atlas.styles), size=count)]
    motions, places, boxes = _place_subjects(count, config, rng)
    predicates = motions
    if rng.random() < config.place_words:
        predicates = [f"{place} {motion}" for place, motion in zip(places, motions, strict=True)]
    background = config.backgrounds[rng.integers(len(config.backgrounds))]
    params = _draw_background_params(rng)
    template = TEMPLATES[rng.integers(len(TEMPLATES))]

    backdrop = background_image(background, params, config.width, config.height)
    frames = np.repeat(backdrop[None], config.num_frames, axis=0)
    for identity, style, motion, track in zip(identities, styles, motions, boxes.tolist(), strict=True):
        for frame, (pose, (x0, y0, x1, y1)) in enumerate(zip(_poses(config)[motion], track, strict=True)):
            colour, transmission = _video_sprite(identity, style, x1 - x0, pose.margin, pose.angle)
            patch = frames[frame, y0:y1, x0:x1]
            np.rint(colour + transmission * patch, out=patch, casting="unsafe")

    caption, spans, background_span = _write_caption(names, predicates, background, template)
    references = []
    for identity, style, name, span in zip(identities, styles, names, spans, strict=True):
        image, reference_style, variant = _reference_variant(identity, style, config, rng)
        references.append(Reference(image, name, span, "subject", identity, reference_style, variant))
    if rng.random() < config.background_reference:
        references.append(Reference(backdrop, background, background_span, "background", None, None, "same"))
    subjects = tuple(map(SubjectTruth, identities, styles, motions, places, boxes))
    return Clip(frames, caption, tuple(references), subjects, background, params)


def vocabulary(config: EmojiWorldConfig) -> list[str]:
    """Every word a caption of either split can contain, sorted, with the comma as a word of its own."""
    texts = [identity.name for identity in load_atlas().identities]
    texts += [f"the {motion} and ," for motion in config.motions]
    texts += config.places
    texts += [f"{BACKGROUNDS[background].place} {background}" for background in config.backgrounds]
    texts += [template.format(subjects="", place="").replace(",", " , ") for template in TEMPLATES]
    return sorted({word for text in texts for word in text.split()})
