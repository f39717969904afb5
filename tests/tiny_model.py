"""A model folder with everything in it and nothing learnt, small enough to write and run in seconds."""

import functools
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from magref_jax import checkpoint, pipeline
from magref_jax.config import (
    DiTConfig,
    ImageEncoderConfig,
    ModelConfig,
    SamplingConfig,
    TextEncoderConfig,
    VAEConfig,
)
from magref_jax.data.emoji_tokenizer import build_tokenizer
from magref_jax.data.emoji_world import EmojiWorldConfig, vocabulary

WORDS = ["red", "apple", "blue", "fish", *vocabulary(EmojiWorldConfig())]

CONFIG = ModelConfig(
    dit=DiTConfig(
        dim=24,
        ffn_dim=32,
        num_heads=2,
        num_layers=2,
        text_dim=16,
        text_len=40,
        image_dim=16,
        freq_dim=16,
        dtype="float32",
        remat="none",
    ),
    vae=VAEConfig(
        base_dim=4,
        dim_multipliers=(1, 2),
        num_res_blocks=1,
        temporal_downsample=(True,),
        latent_mean=(0.1,) * 16,
        latent_std=(0.5,) * 16,
    ),
    text_encoder=TextEncoderConfig(
        vocab_size=1024, dim=16, ffn_dim=16, num_heads=2, head_dim=8, num_layers=1, dtype="float32"
    ),
    image_encoder=ImageEncoderConfig(
        dim=16, ffn_dim=16, num_heads=2, num_layers=2, image_size=12, patch_size=6, dtype="float32"
    ),
    sampling=SamplingConfig(
        height=8,
        width=12,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=2.0,
        layout="v1",
        negative_prompt="blue",
    ),
    subject_alpha=1.0,
    drop_frames=1,
    fps=8.0,
)


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, checkpoint.Params]:
    """Parameters away from their initial values: a head of zeros would hide everything before it."""
    rng = np.random.default_rng(seed)

    def make(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + 0.2 * noise
        if "kernel" not in path[-1].key:
            return 0.2 * noise
        stacked = 1 if any(key.key == "blocks" for key in path) else 0
        return noise / np.sqrt(np.prod(leaf.shape[stacked:-1]))

    return jax.tree.map_with_path(make, pipeline.abstract_params(config))


def write_model(folder: pathlib.Path, config: ModelConfig = CONFIG, dtype: str | None = "bfloat16") -> pathlib.Path:
    write_tokenizer = functools.partial(build_tokenizer, WORDS, text_len=config.dit.text_len)
    checkpoint.save_model(folder, config, random_params(config), dtype, write_tokenizer)
    return folder


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (20, 20)) -> Image.Image:
    ramp = np.linspace(0, 1, size[0] * size[1]).reshape(size[1], size[0], 1)
    return Image.fromarray((ramp * np.array(colour)).astype(np.uint8))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model")
