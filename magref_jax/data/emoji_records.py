"""Emoji world as records, drawn when they are asked for. `emoji_dataset` writes them to files.

    source = EmojiSource(EmojiWorldConfig(), "train", seed=0, count=10_000)

Record i is clip i of `sample_clip`. Its references have every kind of view, so that what is paired with what is decided when
a training example is made.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Sequence
from importlib import resources

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from magref_jax.data.emoji_world import (
    MIN_FLIP_DIFFERENCE,
    REFERENCE_CHANGES,
    EmojiWorldConfig,
    Reference,
    Split,
    load_atlas,
    sample_clip,
)
from magref_jax.data.records import Caption, ClipRecord, Origin, ReferenceRecord, Size, View

FPS = 8.0  # speeds of emoji world are per frame; at this rate they look right

# Where a picture of each kind would come from in the world: another style is the same thing seen somewhere else.
ORIGINS: dict[str, Origin] = {
    "same": "in_pair",
    "style": "cross_clip",
    "rotated": "generated",
    "recoloured": "generated",
    "flipped": "generated",
}


def _png(image: UInt8[np.ndarray, "h w c"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


@functools.lru_cache(maxsize=4096)
def _sprite(identity: int, style: str) -> bytes:
    return _png(load_atlas().sprite(identity, style))


def _views(reference: Reference, style: str, kinds: Sequence[str], rng: np.random.Generator) -> tuple[View, ...]:
    """What the clip gives as the reference, then the sprite it shows, if that is another, and one view of each other kind."""
    first = View(_png(reference.image), ORIGINS[reference.variant])
    identity = reference.identity
    if identity is None:
        return (first,)
    atlas = load_atlas()
    sprite = atlas.sprite(identity, style)
    is_symmetric = np.abs(sprite.astype(int) - sprite[:, ::-1]).mean() < MIN_FLIP_DIFFERENCE
    views = [first]
    for kind in ("same", *kinds):
        if kind == reference.variant or (kind == "flipped" and is_symmetric):
            continue
        if kind == "same":
            image = _sprite(identity, style)
        elif kind == "style":
            image = _sprite(identity, str(rng.choice([name for name in atlas.styles if name != style])))
        else:
            image = _png(REFERENCE_CHANGES[kind](sprite, rng))
        views.append(View(image, ORIGINS[kind]))
    return tuple(views)


def make_record(config: EmojiWorldConfig, split: Split, seed: int, index: int) -> ClipRecord:
    """Clip `index` of the stream `seed` as a record; the same arguments give the same bytes."""
    clip = sample_clip(config, split, seed, index)
    # Of its own: what is drawn for further views must not move the clips.
    rng = np.random.default_rng([seed, index, 1])
    styles = [subject.style for subject in clip.subjects]
    references = []
    for number, reference in enumerate(clip.references):
        style = styles[number] if reference.role == "subject" else ""
        code_point = "" if reference.identity is None else load_atlas().identities[reference.identity].code_point
        views = _views(reference, style, config.cross_pair_kinds, rng)
        references.append(ReferenceRecord(reference.label, views, reference.role, code_point))
    return ClipRecord(
        id=f"{split}-{seed}-{index}",
        num_frames=config.num_frames,
        height=config.height,
        width=config.width,
        fps=FPS,
        captions=(Caption(clip.caption, tuple(reference.label_span for reference in clip.references)),),
        references=tuple(references),
        source="emoji world",
        frames=clip.frames,
        subject_boxes=np.stack([subject.boxes for subject in clip.subjects]).astype(np.int32),
    )


@functools.cache
def _atlas_digest() -> str:
    folder = resources.files("magref_jax.data")
    names = ("emoji_atlas.json", "emoji_atlas.webp")
    return hashlib.sha256(b"".join(folder.joinpath(name).read_bytes() for name in names)).hexdigest()


class EmojiSource:
    """Clips 0..count-1 of emoji world, drawn when they are asked for: no files."""

    num_references = None

    def __init__(self, config: EmojiWorldConfig, split: Split = "train", seed: int = 0, count: int = 10_000) -> None:
        if count < 1:
            raise ValueError(f"count={count} must be at least 1.")
        self.config, self.split, self.seed, self.count = config, split, seed, count
        self.sizes: Sequence[Size] = [(config.num_frames, config.height, config.width)] * count
        drawn_from = [dataclasses.asdict(config), split, seed, count, _atlas_digest()]
        self.fingerprint = hashlib.sha256(json.dumps(drawn_from).encode()).hexdigest()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> ClipRecord:
        if not 0 <= index < self.count:
            raise IndexError(f"clip {index} of {self.count}.")
        return make_record(self.config, self.split, self.seed, index)
