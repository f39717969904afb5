"""What a config holds, what it refuses, and how it is read."""

import dataclasses

import pytest

from magref_jax.config import ModelConfig, with_dtype

NETWORKS = ("dit", "vae", "text_encoder", "image_encoder")


def dtypes(config: ModelConfig) -> list[str]:
    return [getattr(config, name).dtype for name in NETWORKS if getattr(config, name) is not None]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", ["float32"] * 4),
        ("bfloat16", ["bfloat16"] * 4),
        (None, ["bfloat16", "float32", "bfloat16", "bfloat16"]),
    ],
)
def test_all_networks_compute_in_the_dtype_that_is_asked_for(dtype, expected):
    assert dtypes(with_dtype(ModelConfig(), dtype)) == expected
    text_to_video = dataclasses.replace(ModelConfig(), image_encoder=None)
    assert dtypes(with_dtype(text_to_video, dtype)) == expected[:3]
    assert with_dtype(with_dtype(ModelConfig(), dtype), None).sampling == ModelConfig().sampling


@pytest.mark.parametrize("dtype", ["float16", "fp32", "", 32, float])
def test_a_dtype_that_nothing_computes_in_is_refused(dtype):
    with pytest.raises(ValueError, match="^dtype=.* is unknown; choose from float32, bfloat16"):
        with_dtype(ModelConfig(), dtype)
