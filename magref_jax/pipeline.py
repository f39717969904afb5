"""The Python door: a loaded model and what it can do.

    model = load("magref_jax/bundled/emoji")
    videos = generate(model, [Request("the red apple slides right over a meadow", images=[image], subjects=["red apple"])])

`sample.py` is the command line of this module.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import transformers

from magref_jax.checkpoint import Params, restore_model
from magref_jax.conditioning.case import Encoders
from magref_jax.conditioning.inputs import Conditioning, concatenate_channels
from magref_jax.config import ModelConfig, load_model_config
from magref_jax.diffusion.sampling import VelocityFn
from magref_jax.models import vae
from magref_jax.models.dit import DiT, SubjectInjection
from magref_jax.models.image_encoder import ImageEncoder, preprocess
from magref_jax.models.text_encoder import TextEncoder


def abstract_params(config: ModelConfig) -> dict[str, Params]:
    """Shapes and dtypes of all parameters, by network, without making any."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Params]:
    """Random parameters of every network of the config. Call it inside `jax.jit`."""
    dit, autoencoder, text, image = jax.random.split(key, 4)
    cfg = config.dit
    rows, columns = cfg.patch_size[1:]
    latents = jnp.zeros((1, cfg.patch_size[0], rows, columns, cfg.in_channels))
    text_embeddings = jnp.zeros((1, cfg.text_len, cfg.text_dim))
    image_embeddings = None if cfg.image_dim is None else jnp.zeros((1, 1, cfg.image_dim))
    tokens = jnp.zeros((1, 2), jnp.int32)
    size = 2 * config.vae.spatial_stride
    frames = jnp.zeros((1, 1 + config.vae.temporal_stride, size, size, 3))
    noise = jnp.zeros((1, 2, 2, 2, config.vae.latent_channels))
    params = {
        "dit": DiT(cfg).init(dit, latents, jnp.zeros((1,)), text_embeddings, image_embeddings),
        "vae": vae.VAE(config.vae).init(autoencoder, frames, noise),
        "text_encoder": TextEncoder(config.text_encoder).init(text, tokens, tokens),
    }
    if config.image_encoder is not None:
        side = config.image_encoder.image_size
        params["image_encoder"] = ImageEncoder(config.image_encoder).init(image, jnp.zeros((1, side, side, 3)))
    return {name: tree["params"] for name, tree in params.items()}


def encoders(config: ModelConfig, params: dict[str, Params]) -> Encoders:
    """The frozen networks as functions, closed over their parameters."""
    image_config = config.image_encoder

    def image(frames: jax.Array) -> jax.Array:
        pixels = preprocess(frames, image_config.image_size)
        return ImageEncoder(image_config).apply({"params": params["image_encoder"]}, pixels)

    return Encoders(
        text=lambda ids, mask: TextEncoder(config.text_encoder).apply({"params": params["text_encoder"]}, ids, mask),
        image=None if image_config is None else image,
        frames=lambda frames: vae.encode(config.vae, params["vae"], frames),
    )


def velocity_fn(config: ModelConfig, dit_params: Params, conditioning: Conditioning) -> VelocityFn:
    """The DiT as a function of noisy latents and timesteps."""

    def velocity(latents: jax.Array, timesteps: jax.Array) -> jax.Array:
        subjects = None
        if conditioning.subject_tokens is not None and conditioning.subject_regions is not None:
            subjects = SubjectInjection(conditioning.subject_tokens, conditioning.subject_regions)
        return DiT(config.dit).apply(
            {"params": dit_params},
            concatenate_channels(latents, conditioning),
            timesteps,
            conditioning.text_embeddings,
            conditioning.image_embeddings,
            subjects=subjects,
            subject_alpha=config.subject_alpha,
        )

    return velocity


@dataclasses.dataclass(frozen=True)
class Model:
    """A model folder in memory."""

    config: ModelConfig
    params: dict[str, Params]
    tokenizer: Any


def load(folder: str | pathlib.Path, *, verify: bool = True) -> Model:
    """Reads a model folder; parameters come in the dtype they are stored in.

    Raises:
        FileNotFoundError: the folder, or a part of it, is missing.
        ValueError: a file is damaged, or parameters do not fit the config.
    """
    folder = pathlib.Path(folder)
    config = load_model_config(folder)
    config, params = restore_model(folder, abstract_params(config), verify=verify)
    return Model(config, params, load_tokenizer(folder))


def load_tokenizer(folder: pathlib.Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
