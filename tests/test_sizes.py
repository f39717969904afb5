"""Every size and length that people ask for, through a tiny model with Wan's strides: 8 pixels, 4 frames, patches of 2 x 2."""

import dataclasses

import numpy as np
import pytest

from magref_jax import pipeline
from magref_jax.config import VAEConfig
from tests.tiny_model import CONFIG, model_folder, picture, random_params  # noqa: F401

STRIDED = dataclasses.replace(
    CONFIG,
    dit=dataclasses.replace(CONFIG.dit, dim=12, ffn_dim=16, num_layers=1, attention="blockwise"),
    vae=VAEConfig(base_dim=2, dim_multipliers=(1, 2, 2, 2), num_res_blocks=1, convolution="taps"),
    drop_frames=4,
)
SIZES = [(832, 480), (480, 832), (624, 624), (448, 256)]  # width, height
LENGTHS = [5, 17, 49, 81]


@pytest.fixture(scope="module")
def model(model_folder):  # noqa: F811
    return pipeline.Model(STRIDED, random_params(STRIDED), pipeline.load_tokenizer(model_folder))


def check(model, width, height, num_frames):
    pictures = [picture((250, 20, 20), (60, 90)), picture((20, 20, 250))]
    result = model.generate(
        ["the red apple and the blue fish"],
        [pictures],
        subjects=[["red apple", "fish"]],
        width=width,
        height=height,
        num_frames=num_frames,
        num_inference_steps=1,
        guidance_scale=1.0,
        solver="euler",
    )
    assert result.failures == (None,)
    assert result.frames.shape == (1, num_frames - 4, height, width, 3)
    assert result.latents.shape == (1, (num_frames - 1) // 4 + 1, height // 8, width // 8, 16)
    assert result.region_mask.shape == (1, (num_frames - 1) // 4 + 1, height // 8, width // 8, 4)
    assert result.canvas.shape == (1, height, width, 3)
    assert np.ptp(result.frames) > 20


@pytest.mark.parametrize(
    ("width", "height", "num_frames"), [pytest.param(448, 256, 17, marks=pytest.mark.slow), (256, 448, 5)]
)
def test_landscape_and_portrait(model, width, height, num_frames):
    check(model, width, height, num_frames)


@pytest.mark.slow
@pytest.mark.parametrize("num_frames", LENGTHS)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_size_and_length(model, width, height, num_frames):
    check(model, width, height, num_frames)


@pytest.mark.parametrize("size", [(830, 480), (832, 488), (0, 480)])
@pytest.mark.parametrize("num_frames", [5, 18])
def test_other_sizes_and_lengths_are_refused_by_name(model, size, num_frames):
    names = ["width"] if size[0] != 832 else ["height"]
    with pytest.raises(ValueError, match="num_frames=18 must be 4n . 1" if num_frames == 18 else f"{names[0]}="):
        model.generate(["a"], [[]], width=size[0], height=size[1], num_frames=num_frames)
