"""The emoji world: its closed-form motions, its spans and boxes, and the split between seen and unseen identities."""

import re
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from magref_jax.data.emoji_world import (
    BACKGROUNDS,
    CROSS_PAIR_KINDS,
    DEFAULT_MOTIONS,
    MOTIONS,
    EmojiWorldConfig,
    background_image,
    load_atlas,
    sample_clip,
    split_identities,
    vocabulary,
)

EVERYTHING = EmojiWorldConfig(
    motions=tuple(MOTIONS), cross_pair=0.5, background_reference=0.5, subject_counts=(1, 1, 1, 1), max_subjects=4
)
ONE_SUBJECT = EmojiWorldConfig(subject_counts=(1,))

# Displacement (x, y) of the box after `frame` frames at the default speeds.
DISPLACEMENTS = {
    "slides right": lambda frame: (4 * frame, 0),
    "slides left": lambda frame: (-4 * frame, 0),
    "rises": lambda frame: (0, -4 * frame),
    "falls": lambda frame: (0, 4 * frame),
    "stays still": lambda frame: (0, 0),
    "bounces": lambda frame: (0, -(0, 8, 12, 8)[frame % 4]),  # 12 |sin(π frame / 4)| in whole pixels
    "spins": lambda frame: (0, 0),
}

# The sprite is 24x24 in a frame of 72x56: 48 pixels of room to the right, 32 to the bottom.
STARTS = {
    "at the top left": (0, 0),
    "at the top": (24, 0),
    "at the top right": (48, 0),
    "on the left": (0, 16),
    "in the middle": (24, 16),
    "on the right": (48, 16),
    "at the bottom left": (0, 32),
    "at the bottom": (24, 32),
    "at the bottom right": (48, 32),
}

# Recorded when the data set was published.
GOLDEN_HELD_OUT = ["mahjong tile", "thermometer", "hibiscus", "tangerine", "banana", "pineapple"]
GOLDEN_CAPTIONS = [
    "in front of a sunset, the devil face slides right and the honeybee slides right",
    "a video of the envelope at the bottom right stays still, the monorail at the top stays still and the horse face at the "
    "bottom left rises in front of a night sky",
    "over a snow field, the poodle on the right slides left",
    "the hot coffee at the bottom bounces, the banjo at the top right slides left and the goggles at the top left falls over "
    "a desert",
]


def clips(config, split, count, seed=0):
    return [sample_clip(config, split, seed, index) for index in range(count)]


def test_atlas_is_small_and_complete():
    atlas = load_atlas()
    files = [resources.files("magref_jax.data").joinpath(f"emoji_atlas.{suffix}") for suffix in ("webp", "json")]
    assert sum(len(file.read_bytes()) for file in files) <= 5 * 2**20
    assert atlas.styles == ("noto", "twemoji", "fluent")
    assert 600 <= len(atlas.identities) <= 800
    assert atlas.sprites.shape == (3 * len(atlas.identities), 48, 48, 4)
    assert atlas.sprites.dtype == np.uint8
    # Every drawing fills its tile but for the margin of one pixel.
    boxes = np.array([Image.fromarray(sprite[..., 3]).getbbox() for sprite in atlas.sprites])
    assert boxes.min() >= 1
    assert boxes.max() <= 47
    assert (boxes[:, 2:] - boxes[:, :2]).max(1).min() >= 44


def test_known_sprites_have_their_colours():
    atlas = load_atlas()
    index = {identity.name: position for position, identity in enumerate(atlas.identities)}
    assert atlas.identities[index["red apple"]].code_point == "1f34e"
    for style in atlas.styles:
        for name, channel in (("red apple", 0), ("frog", 1), ("droplet", 2)):
            sprite = atlas.sprite(index[name], style).astype(float)
            mean = (sprite[..., :3] * sprite[..., 3:]).sum((0, 1)) / sprite[..., 3].sum()
            assert mean.argmax() == channel, (name, style)


def test_names_are_short_unique_ascii_words():
    names = [identity.name for identity in load_atlas().identities]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9]+( [a-z0-9]+){0,3}", name) for name in names)


def test_no_drawing_is_in_both_splits():
    atlas = load_atlas()
    splits = split_identities(atlas)
    assert sorted(splits["train"] + splits["held_out"]) == list(range(len(atlas.identities)))
    assert 0.07 <= len(splits["held_out"]) / len(atlas.identities) <= 0.13
    drawings = {
        split: {atlas.sprite(identity, style).tobytes() for identity in identities for style in atlas.styles}
        for split, identities in splits.items()
    }
    assert not drawings["train"] & drawings["held_out"]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_clips_show_only_identities_of_their_split(split):
    allowed = set(split_identities(load_atlas())[split])
    seen = set()
    for clip in clips(EVERYTHING, split, 500):
        seen |= {subject.identity for subject in clip.subjects}
        seen |= {reference.identity for reference in clip.references if reference.role == "subject"}
    assert seen <= allowed
    assert len(seen) > 0.75 * len(allowed)


def test_split_is_stable():
    atlas = load_atlas()
    held_out = [atlas.identities[index].name for index in split_identities(atlas)["held_out"]]
    assert held_out[:6] == GOLDEN_HELD_OUT


def test_same_arguments_give_the_same_bytes():
    for index in range(10):
        first, second = (sample_clip(EVERYTHING, "train", 3, index) for _ in range(2))
        assert first.caption == second.caption
        assert first.frames.tobytes() == second.frames.tobytes()
        assert [r.image.tobytes() for r in first.references] == [r.image.tobytes() for r in second.references]
    assert sample_clip(EVERYTHING, "train", 4, 0).caption != sample_clip(EVERYTHING, "train", 3, 0).caption


def test_captions_stay_as_they_were():
    # Recorded: a change here changes every clip of every seed, and with it the meaning of published results.
    assert [clip.caption for clip in clips(EmojiWorldConfig(), "train", 4)] == GOLDEN_CAPTIONS


def test_label_spans_cut_the_labels_out_of_the_caption():
    names = [identity.name for identity in load_atlas().identities]
    for clip in clips(EVERYTHING, "train", 300):
        for reference in clip.references:
            start, end = reference.label_span
            assert clip.caption[start:end] == reference.label
        subject_references = clip.references[: len(clip.subjects)]
        for subject, reference in zip(clip.subjects, subject_references, strict=True):
            assert reference.label == names[subject.identity]
            assert clip.caption[: reference.label_span[0]].endswith("the ")
            rest = clip.caption[reference.label_span[1] :]
            assert rest.startswith((f" {subject.motion}", f" {subject.place} {subject.motion}"))
        if len(clip.references) > len(clip.subjects):
            background = clip.references[-1]
            assert (background.role, background.label) == ("background", clip.background)
            place = BACKGROUNDS[clip.background].place
            assert clip.caption[: background.label_span[0]].endswith(f"{place} ")
            np.testing.assert_array_equal(
                background.image, background_image(clip.background, clip.background_params, 72, 56)
            )


@pytest.mark.parametrize("motion", DISPLACEMENTS)
def test_boxes_move_as_the_caption_says(motion):
    config = EmojiWorldConfig(motions=(motion,))
    for clip in clips(config, "train", 40):
        for subject in clip.subjects:
            start = subject.boxes[0]
            assert tuple(start[:2]) == STARTS[subject.place]
            for frame, box in enumerate(subject.boxes):
                expected = start + np.tile(DISPLACEMENTS[motion](frame), 2)
                np.testing.assert_array_equal(box, expected)
                assert tuple(box[2:] - box[:2]) == (24, 24)


@pytest.mark.parametrize(("motion", "sides"), [("grows", (12, 24)), ("shrinks", (24, 12))])
def test_growing_boxes_keep_their_centre(motion, sides):
    for clip in clips(EmojiWorldConfig(motions=(motion,)), "train", 10):
        for subject in clip.subjects:
            assert tuple((subject.boxes[:, 2] - subject.boxes[:, 0])[[0, -1]]) == sides
            centre = (subject.boxes[:, :2] + subject.boxes[:, 2:]) / 2
            assert np.abs(centre - centre[0]).max() <= 0.5


def test_subjects_start_at_every_place_that_leaves_room_for_their_motion():
    config = EmojiWorldConfig(subject_counts=(1,), motions=("slides left", "rises", "stays still"))
    found = {motion: set() for motion in config.motions}
    for clip in clips(config, "train", 400):
        found[clip.subjects[0].motion].add(clip.subjects[0].place)
    # 28 pixels to the left, or up, must be free.
    assert found["slides left"] == {place for place, (x, _) in STARTS.items() if x >= 28}
    assert found["rises"] == {place for place, (_, y) in STARTS.items() if y >= 28}
    assert found["stays still"] == set(STARTS)


def test_captions_say_places_as_often_as_asked():
    for share in (0.0, 0.5, 1.0):
        config = EmojiWorldConfig(place_words=share)
        told = [
            all(
                f"{reference.label} {subject.place} {subject.motion}" in clip.caption
                for reference, subject in zip(clip.references, clip.subjects, strict=True)
            )
            for clip in clips(config, "train", 200)
        ]
        # Four standard deviations of a share of 0.5 over 200 clips.
        assert np.mean(told) == pytest.approx(share, abs=0.14 if share == 0.5 else 0)


@pytest.mark.parametrize(
    "config",
    [EVERYTHING, EmojiWorldConfig(width=75, height=59), EmojiWorldConfig(128, 112, 16, 40)],
    ids=["everything", "odd", "large"],
)
def test_boxes_stay_inside_the_frame(config):
    for clip in clips(config, "train", 200):
        assert clip.frames.shape == (config.num_frames, config.height, config.width, 3)
        boxes = np.stack([subject.boxes for subject in clip.subjects])
        assert boxes.min() >= 0
        assert boxes[..., [0, 2]].max() <= config.width
        assert boxes[..., [1, 3]].max() <= config.height


def test_two_subjects_hardly_overlap():
    for clip in clips(EmojiWorldConfig(subject_counts=(0, 1)), "train", 200):
        first, second = (subject.boxes for subject in clip.subjects)
        sides = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])
        intersection = sides.clip(0).prod(1)
        assert (intersection / (2 * 24**2 - intersection)).max() <= 0.1


def test_frames_are_the_background_with_the_sprite_composited():
    atlas = load_atlas()
    for clip in clips(ONE_SUBJECT, "train", 60):
        (subject,) = clip.subjects
        backdrop = Image.fromarray(background_image(clip.background, clip.background_params, 72, 56)).convert("RGBA")
        sprite = Image.fromarray(atlas.sprite(subject.identity, subject.style)).resize(
            (24, 24), Image.Resampling.LANCZOS
        )
        for frame, (x0, y0, x1, y1) in zip(clip.frames, subject.boxes, strict=True):
            expected = backdrop.copy()
            expected.alpha_composite(sprite, (int(x0), int(y0)))
            expected = np.asarray(expected.convert("RGB")).astype(int)
            # Outside the box exact; inside, the round trip through straight alpha costs Pillow a few levels at edges.
            difference = np.abs(frame - expected)
            assert difference[y0:y1, x0:x1].max() <= 3
            difference[y0:y1, x0:x1] = 0
            assert difference.max() == 0


def test_subjects_stand_out_from_every_background():
    for name in BACKGROUNDS:
        config = EmojiWorldConfig(subject_counts=(1,), backgrounds=(name,), motions=("stays still",))
        differences = []
        for clip in clips(config, "train", 40):
            x0, y0, x1, y1 = clip.subjects[0].boxes[0]
            backdrop = background_image(name, clip.background_params, 72, 56).astype(int)
            difference = np.abs(clip.frames[0] - backdrop).max(-1)[y0:y1, x0:x1]
            differences.append((difference > 32).mean())
        assert np.median(differences) > 0.35, name


def test_backgrounds_differ_from_each_other_and_between_clips():
    means = []
    for name in BACKGROUNDS:
        config = EmojiWorldConfig(backgrounds=(name,))
        images = [
            background_image(name, clip.background_params, 72, 56).astype(float) for clip in clips(config, "train", 8)
        ]
        assert all(np.abs(images[0] - image).max() > 4 for image in images[1:])
        means.append(np.mean(images, axis=0))
    for first in range(len(means)):
        for second in range(first):
            assert np.abs(means[first] - means[second]).mean() > 10


@pytest.mark.parametrize("kind", CROSS_PAIR_KINDS)
def test_cross_paired_references_are_other_pictures_of_the_same_identity(kind):
    atlas = load_atlas()
    config = EmojiWorldConfig(cross_pair=1.0, cross_pair_kinds=(kind,))
    variants = []
    for clip in clips(config, "train", 60):
        for subject, reference in zip(clip.subjects, clip.references, strict=True):
            assert reference.identity == subject.identity
            assert (reference.style != subject.style) == (reference.variant == "style")
            shown = atlas.sprite(subject.identity, subject.style).astype(int)
            assert reference.image.shape == (48, 48, 4)
            assert np.abs(shown - reference.image).mean() > 1
            variants.append(reference.variant)
    # A mirror image of a symmetric sprite is no other picture: those are turned instead.
    assert set(variants) == ({"flipped", "rotated"} if kind == "flipped" else {kind})


def test_references_are_the_shown_sprite_without_cross_pairing():
    atlas = load_atlas()
    for clip in clips(EmojiWorldConfig(), "train", 50):
        for subject, reference in zip(clip.subjects, clip.references, strict=True):
            assert (reference.variant, reference.style, reference.role) == ("same", subject.style, "subject")
            np.testing.assert_array_equal(reference.image, atlas.sprite(subject.identity, subject.style))


def test_no_name_of_a_clip_is_part_of_another():
    for clip in clips(EVERYTHING, "train", 500):
        words = [set(r.label.split()) for r in clip.references if r.role == "subject"]
        assert all(not words[i] <= words[j] for i in range(len(words)) for j in range(len(words)) if i != j)


def test_subject_counts_follow_their_weights():
    config = EmojiWorldConfig(subject_counts=(1, 2, 1, 5), max_subjects=3)
    counts = np.bincount([len(clip.subjects) for clip in clips(config, "train", 800)], minlength=5)[1:] / 800
    # Standard deviation of a share of 0.5 over 800 clips: 0.018.
    np.testing.assert_allclose(counts, [0.25, 0.5, 0.25, 0], atol=0.07)


def test_vocabulary_covers_the_captions():
    words = set(vocabulary(EVERYTHING))
    for split in ("train", "held_out"):
        for clip in clips(EVERYTHING, split, 300):
            assert set(re.findall(r"[a-z0-9]+|,", clip.caption)) <= words
            assert re.sub(r"[a-z0-9]+|[, ]", "", clip.caption) == ""
    assert {"apple", "slides", "meadow", "the", ","} <= words
    assert set(vocabulary(EmojiWorldConfig(motions=DEFAULT_MOTIONS))) == words - {"spins", "grows", "shrinks"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("motions", ("flies",)),
        ("backgrounds", ()),
        ("cross_pair", 1.5),
        ("cross_pair_kinds", ("blurred",)),
        ("place_words", -0.1),
        ("subject_counts", (0.0, 0.0, 0.0, 1.0)),
        ("num_frames", 32),
        ("sprite_size", 80),
    ],
)
def test_config_names_the_wrong_field(field, value):
    with pytest.raises(ValueError, match=field):
        EmojiWorldConfig(**{field: value})


def test_unknown_split_and_background_are_named():
    with pytest.raises(ValueError, match="'test'"):
        sample_clip(EmojiWorldConfig(), "test", 0, 0)
    with pytest.raises(ValueError, match="'moon'"):
        background_image("moon", {}, 72, 56)
