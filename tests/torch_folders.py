"""Checkpoints in every layout that people hold, small and random, written by torch and the safetensors library."""

import functools
import json
import pathlib
from collections.abc import Mapping

import safetensors.torch
import torch

from magref_jax import pipeline
from magref_jax.config import DiTConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig, VAEConfig
from magref_jax.convert.conversion import RULES
from magref_jax.convert.image_encoder import image_encoder_unused
from magref_jax.convert.rules import torch_shapes
from magref_jax.data.emoji_tokenizer import build_tokenizer
from tests.parity.torch_random import random_tensors

Tensors = dict[str, torch.Tensor]

CONFIG = ModelConfig(
    dit=DiTConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=2, text_dim=20, text_len=16, image_dim=160, freq_dim=16),
    vae=VAEConfig(base_dim=4, dim_multipliers=(1, 2, 4), num_res_blocks=1, temporal_downsample=(False, True)),
    text_encoder=TextEncoderConfig(vocab_size=64, dim=20, ffn_dim=24, num_heads=3, head_dim=8, num_layers=2),
    # 80 per head, as in ViT-H: files of single networks do not say how many heads there are.
    image_encoder=ImageEncoderConfig(dim=160, ffn_dim=36, num_heads=2, num_layers=3, image_size=12, patch_size=6),
)
# What a DiT's tensors do not say; official folders have it in their config.json.
SETTINGS = ("dit.num_heads=2", "dit.text_len=16")
WAN_CONFIG = {"_class_name": "WanModel", "dim": 24, "num_heads": 2, "text_len": 16, "in_dim": 36, "model_type": "i2v"}
HF_CONFIGS = {
    "dit": {"_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "num_layers": 2, "text_len": 16},
    "vae": {"_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 16, "dim_mult": [1, 2, 4]},
    "text_encoder": {"architectures": ["UMT5EncoderModel"], "d_model": 20, "num_heads": 3},
    "image_encoder": {"architectures": ["CLIPVisionModel"], "hidden_size": 160, "num_attention_heads": 2},
}
HF_FILES = {
    "dit": "transformer/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model",
    "text_encoder": "text_encoder/model",
    "image_encoder": "image_encoder/model",
}
WAN_FILES = {
    "dit": "diffusion_pytorch_model",
    "vae": "Wan2.1_VAE.pth",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
}
COMFY = {  # layout, prefix and file
    "dit": ("wan", "model.diffusion_model.", "wan_i2v.safetensors"),
    "vae": ("wan", "", "wan_2.1_vae.safetensors"),
    "text_encoder": ("hf", "", "umt5_xxl.safetensors"),
    "image_encoder": ("hf", "vision_model.", "clip_vision_h.safetensors"),
}


@functools.cache
def abstract_params():
    return pipeline.abstract_params(CONFIG)


def tensors(network: str, layout: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """A whole checkpoint of a network: what our model leaves out is there too."""
    shapes = torch_shapes(RULES[network](getattr(CONFIG, network), layout), abstract_params()[network])
    if network == "image_encoder":
        shapes |= image_encoder_unused(CONFIG.image_encoder, layout)
        if layout == "wan":
            shapes |= {"textual.token_embedding.weight": (7, 3), "log_scale": ()}
    return {name: torch.tensor(array).to(dtype) for name, array in random_tensors(shapes, seed).items()}


def save_sharded(stem: pathlib.Path, content: Mapping[str, torch.Tensor], count: int = 2) -> None:
    """`count` files and the index that says what is where."""
    names = sorted(content)
    weight_map = {}
    for number in range(count):
        file = stem.with_name(f"{stem.name}-{number + 1:05d}-of-{count:05d}.safetensors")
        part = {name: content[name].contiguous() for name in names[number::count]}
        safetensors.torch.save_file(part, file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file.name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in content.values())}, "weight_map": weight_map}
    stem.with_name(f"{stem.name}.safetensors.index.json").write_text(json.dumps(index))


def write_official(folder: pathlib.Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensors]:
    folder.mkdir(parents=True)
    made = {network: tensors(network, "wan", dtype) for network in WAN_FILES}
    for network, name in WAN_FILES.items():
        if network == "dit":
            save_sharded(folder / name, made[network])
        else:
            torch.save(made[network], folder / name)
    (folder / "config.json").write_text(json.dumps(WAN_CONFIG))
    build_tokenizer(["a", "fish"], folder / "google" / "umt5-xxl", 16)
    return made


def write_diffusers(folder: pathlib.Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensors]:
    made = {network: tensors(network, "hf", dtype) for network in HF_FILES}
    for network, name in HF_FILES.items():
        (folder / name).parent.mkdir(parents=True)
        if network == "dit":
            save_sharded(folder / name, made[network], 3)
        else:
            safetensors.torch.save_file(made[network], folder / f"{name}.safetensors")
        ((folder / name).parent / "config.json").write_text(json.dumps(HF_CONFIGS[network]))
    build_tokenizer(["a", "fish"], folder / "tokenizer", 16)
    return made


def write_comfy(folder: pathlib.Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensors]:
    folder.mkdir(parents=True)
    made = {network: tensors(network, layout, dtype) for network, (layout, _, _) in COMFY.items()}
    for network, (_, prefix, name) in COMFY.items():
        safetensors.torch.save_file({prefix + key: t for key, t in made[network].items()}, folder / name)
    return made


WRITERS = {"official": write_official, "diffusers": write_diffusers, "comfy": write_comfy}
