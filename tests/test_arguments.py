"""What the Python door takes, in how many forms, and what it refuses by name."""

import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from PIL import Image

from magref_jax import arguments, pipeline
from magref_jax.arguments import per_video, picture_of, seed_of
from magref_jax.conditioning.subjects import Subject
from tests.tiny_model import CONFIG, model_folder, picture  # noqa: F401

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 5, 4), np.uint8)
RGB, GREY = PIXELS[..., :3], PIXELS[..., 0]
UNIT = RGB.astype(np.float32) / 255


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Image.fromarray(RGB), RGB),
        (RGB, RGB),
        (PIXELS, PIXELS),
        (GREY, GREY),
        (RGB[::-1], RGB[::-1]),
        (RGB.transpose(2, 0, 1), RGB),
        (PIXELS.transpose(2, 0, 1), PIXELS),
        (UNIT, RGB),
        (UNIT.astype(np.float64), RGB),
        (UNIT.transpose(2, 0, 1), RGB),
        (jnp.asarray(RGB), RGB),
        (torch.from_numpy(RGB.copy()), RGB),
        (torch.from_numpy(UNIT).permute(2, 0, 1), RGB),
        (torch.from_numpy(UNIT).requires_grad_(), RGB),
    ],
    ids=map(str, range(14)),
)
def test_a_picture_may_come_as_an_image_an_array_or_a_tensor(given, expected):
    found = picture_of(given, "references[0][0]")
    assert isinstance(found, Image.Image)
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_a_picture_may_come_as_a_path(tmp_path, kind):
    Image.fromarray(PIXELS).save(tmp_path / "a b.png")
    opaque = Image.fromarray(RGB)
    opaque.putalpha(Image.fromarray(PIXELS[..., 3]))
    expected = Image.new("RGB", opaque.size, "white")
    expected.paste(opaque, mask=opaque)
    np.testing.assert_array_equal(np.asarray(picture_of(kind(tmp_path / "a b.png"), "x")), np.asarray(expected))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.png", "x: there is no image file nowhere.png"),
        (pathlib.Path("tests"), "x: tests is a folder, no image file"),
        ("gs://bucket/a.png", "x gs://bucket/a.png: gs:// cannot be read"),
        ("https://example.org/a.png", "https:// cannot be read"),
        (b"a.png", "x=b'a.png' must be a PIL image, an array, a tensor or a path"),
        (None, "x=None must be a PIL image"),
        ([[1, 2], [3, 4]], "x=[[1, 2], [3, 4]] must be a PIL image"),
        (RGB.astype(np.int64), "x has dtype int64; must be uint8, or floats from 0 to 1"),
        (RGB > 5, "x has dtype bool"),
        (RGB.astype(np.float32), "must be from 0 to 1, or uint8 from 0 to 255"),
        (UNIT * 2 - 1, "x has floats from -"),
        (np.full((4, 4, 3), np.nan), "x has floats from nan to nan"),
        (RGB[None], "x has shape (1, 6, 5, 3); must be [H W 3]"),
        (RGB[..., :2], "x has shape (6, 5, 2); must be [H W 3]"),
        (RGB[:3], "x has shape (3, 5, 3), which may be either of two"),
        (RGB[:0], "x has shape (0, 5, 3)"),
        (np.zeros(4, np.uint8), "x has shape (4,)"),
        (torch.zeros(4, 4, 3, dtype=torch.bfloat16), "x=Tensor torch.bfloat16 [4 4 3] cannot be read as an array"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_picture_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        picture_of(given, "x")


@pytest.mark.parametrize("seed", [0, 3, np.int64(3), np.uint8(3), 2**63 - 1])
def test_a_seed_is_a_whole_number(seed):
    assert seed_of(seed) == int(seed)
    assert type(pipeline.Request("a", seed=seed).seed) is int


@pytest.mark.parametrize(
    "seed",
    [3.0, 0.5, np.float64(3), True, np.True_, "3", None, -1, 2**63, [3], torch.Generator(), jax.random.key(3), object],
    # Not by repr: addresses differ between the workers of pytest-xdist.
    ids=lambda seed: type(seed).__name__,
)
def test_anything_else_is_no_seed(seed):
    allowed = re.escape("must be a whole number from 0 to 9223372036854775807")
    for ask in (seed_of, lambda seed: pipeline.Request("a", seed=seed)):
        with pytest.raises(ValueError, match=f"^seed=.*{allowed}"):
            ask(seed)


@pytest.mark.parametrize(
    ("value", "count", "expected"),
    [
        ("a", None, [["a"]]),
        (["a", "b"], None, [["a", "b"]]),
        ([["a", "b"]], None, [["a", "b"]]),
        ([], None, [[]]),
        ([None, "b"], None, [[None, "b"]]),
        ([None], None, [None]),
        ("a", 1, [["a"]]),
        (["a", "b"], 1, [["a", "b"]]),
        (("a",), 1, [["a"]]),
        ([[]], 1, [[]]),
        ([["a"], ("b", "c")], 2, [["a"], ["b", "c"]]),
        ([None, ["a"]], 2, [None, ["a"]]),
        ([], 1, "x has 0 entries for 1 prompts"),
        ([["a"]], 2, "x has 1 entries for 2 prompts"),
        ([["a"], ["b"]], None, "x has 2 entries for 1 prompts"),
        (["a", "b"], 2, "x[0]='a' must be a list of things; each prompt has its own"),
        ("a", 2, "x='a' must be a list of things, one list for each prompt"),
        ({"a": 1}, 1, "x=dict of 1 must be a list of things"),
        ([[1], 5], 2, "x[1]=5 must be a list of things"),
    ],
)
def test_one_video_needs_no_list_around_its_list(value, count, expected):
    def ask():
        return per_video(value, "x", count, "things", lambda entry: entry is None or isinstance(entry, str))

    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            ask()
    else:
        assert ask() == expected


@pytest.fixture(scope="module")
def asked(model_folder):  # noqa: F811
    """The requests that a call of `Model.generate` comes to."""
    model = pipeline.Model(CONFIG, {}, pipeline.load_tokenizer(model_folder))

    def ask(*args, **kwargs):
        found = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "generate", lambda model, requests, **options: found.extend(requests))
            model.generate(*args, **kwargs)
        return found

    return ask


def test_one_prompt_or_many_and_their_references(asked, tmp_path):
    red, blue = picture((250, 20, 20)), picture((20, 20, 250))
    red.save(tmp_path / "red.png")
    forms = [
        (["the red apple"], [[red, blue]], [["red apple", None]], [[1, 0]]),
        ("the red apple", [red, blue], ["red apple", None], [1, 0]),
        (["the red apple"], (np.asarray(red), tmp_path / "red.png"), ["red apple", None], np.array([1, 0])),
        (np.array(["the red apple"]), [[red, blue]], [("red apple", None)], ((1, 0),)),
    ]
    for prompts, references, subjects, order in forms:
        (one,) = asked(prompts, references, subjects=subjects, layout_order=order, seed=np.int32(5))
        assert (one.prompt, one.subjects, one.order, one.seed, one.key) == (
            "the red apple",
            ("red apple", None),
            (1, 0),
            5,
            "0",
        )
        assert one.images[0].getpixel((19, 19)) == red.getpixel((19, 19))
    (alone,) = asked("a fish", red, subjects="fish")
    assert (len(alone.images), alone.subjects) == (1, ("fish",))
    assert [(one.prompt, len(one.images), one.key) for one in asked(("a fish", "b"), [[], [red]])] == [
        ("a fish", 0, "0"),
        ("b", 1, "1"),
    ]
    assert [one.images for one in asked("a fish")] == [()]


NOISE = np.zeros((1, 3, 4, 6, 16), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": 3}, "prompts=3 must be a list of texts, or one text"),
        ({"prompts": b"a"}, "prompts=b'a' must be a list"),
        ({"prompts": ["a", None]}, "prompts[1]=None must be a text"),
        ({"references": ["a.png"]}, "references[0][0]: there is no image file a.png"),
        ({"references": [[3]]}, "references[0][0]=3 must be a PIL image"),
        ({"prompts": ["a", "b"], "references": ["a.png", "b.png"]}, "references[0]='a.png' must be a list of PIL"),
        ({"subjects": [["a", 3]]}, "subjects[1]=3 must be words of the prompt, or a Subject"),
        ({"prompts": ["a", "b"], "subjects": ["a", "b"]}, "subjects[0]='a' must be a list of words"),
        ({"layout_order": [[1.5]]}, "layout_order[0][0]=1.5 must be a whole number"),
        ({"layout_order": "0"}, "layout_order='0' must be a list"),
        ({"seed": 3.0}, "seed=3.0 must be a whole number"),
        ({"seed": [1, 2]}, "seed=[1, 2] must be a whole number"),
        ({"num_frames": 5.0}, "num_frames=5.0 must be a whole number"),
        ({"height": "8"}, "height='8' must be a whole number"),
        ({"width": True}, "width=True must be a whole number"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5 must be a whole number"),
        ({"guidance_scale": "5"}, "guidance_scale='5' must be a finite number"),
        ({"flow_shift": [3]}, "flow_shift=[3] must be a finite number"),
        ({"negative_prompt": 3}, "negative_prompt=3 must be a text"),
        ({"negative_prompt": ["a"]}, "negative_prompt=['a'] must be a text"),
        ({"solver": 1}, "solver=1 is unknown; choose from unipc"),
        ({"layout": ["v2"]}, "layout=['v2'] is unknown; choose from v1, v2"),
        ({"on_step": 3}, "on_step=3 must be a function of the step's index"),
        ({"return_trajectory": "no"}, "return_trajectory='no' must be True or False"),
        ({"step_plan": (True, True)}, "step_plan=(True, True) must be a StepPlan"),
        ({"step_plan": pipeline.StepPlan.full(4)}, "step_plan is for 4 steps, the schedule has 3"),
        ({"initial_noise": "noise"}, "initial_noise has shape (), expected (1, 3, 4, 6, 16)"),
        ({"initial_noise": NOISE.astype(int)}, "initial_noise has dtype int64, expected floats"),
        ({"initial_noise": NOISE.astype(complex)}, "initial_noise has dtype complex128, expected floats"),
        ({"initial_noise": NOISE[0]}, "initial_noise has shape (3, 4, 6, 16), expected (1, 3, 4, 6, 16)"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused_before_anything_is_computed(model_folder, changes, message):  # noqa: F811
    model = pipeline.Model(CONFIG, {}, pipeline.load_tokenizer(model_folder))
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(**{"prompts": ["a fish"]} | changes)


@pytest.mark.parametrize(
    ("requests", "options", "message"),
    [
        ("a fish", {}, "requests='a fish' must be a list of Requests"),
        (["a fish"], {}, "requests[0]='a fish' must be a Request"),
        ([], {"batch_size": 0}, "There is no video to make"),
        (pipeline.Request("a fish"), {"batch_size": 2.0}, "batch_size=2.0 must be a whole number"),
        (pipeline.Request("a fish"), {"batch_size": 0}, "batch_size=0 must be at least 1"),
        (pipeline.Request("a fish"), {"text_tokens": "40"}, "text_tokens='40' must be a whole number"),
        (pipeline.Request("a fish"), {"num_frames": None}, "num_frames=None must be a whole number"),
    ],
)
def test_requests_are_checked_too(model_folder, requests, options, message):  # noqa: F811
    model = pipeline.Model(CONFIG, {}, pipeline.load_tokenizer(model_folder))
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline.generate(model, requests, **options)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", None, "prompt=None must be a text"),
        ("key", 3, "key=3 must be a text"),
        ("images", "a.png", "images='a.png' must be a list of PIL images"),
        ("images", [3], "images[0]=3 must be a PIL image"),
        ("subjects", "fish", "subjects='fish' must be a list of words"),
        ("roles", "background", "roles='background' must be a list"),
        ("order", 1.5, "order=1.5 must be a seed, 'input', or a list of references"),
        ("order", [0, "1"], "order[1]='1' must be a whole number, or None"),
        ("negative_prompt", 0, "negative_prompt=0 must be a text, or None"),
    ],
)
def test_a_request_names_the_field_that_is_wrong(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline.Request(**{"prompt": "a fish"} | {field: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folder": 3}, "folder=3 must be a path"),
        ({"folder": "gs://bucket/model"}, "folder gs://bucket/model: gs:// cannot be read"),
        ({"mesh": "fsdp=2"}, "mesh='fsdp=2' must be a jax.sharding.Mesh"),
        ({"verify": "yes"}, "verify='yes' must be True or False"),
        ({"dtype": 32}, "dtype=32 is unknown; choose from float32, bfloat16"),
        ({"loras": "a.safetensors"}, "loras='a.safetensors' must be a list of (file, strength)"),
        ({"loras": ["a.safetensors"]}, "loras[0]='a.safetensors' must be a pair"),
        ({"loras": [("a.safetensors", "1")]}, "loras[0][1]='1' must be a finite number"),
        ({"loras": [(None, 1.0)]}, "loras[0][0]=None must be a path"),
    ],
)
def test_loading_names_the_argument_that_is_wrong(model_folder, options, message):  # noqa: F811
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline.load(**{"folder": model_folder} | options)


def test_words_of_a_subject_pass_as_they_are():
    assert pipeline.Request("a fish", subjects=[Subject("fish"), None]).subjects == (Subject("fish"), None)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_noise_may_have_any_float_type(dtype):
    assert arguments.array_of(NOISE.astype(dtype), "initial_noise").dtype == dtype
