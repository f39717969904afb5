"""From prompts and pictures to frames, against the torch modules put together as the official code does.

One folder in the official layout is read by both sides: by diffusers' and transformers' models under their own names, and
by the conversion into a model folder. The torch side is given our canvas, our region mask and the noise, nothing else.
"""

import json
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

import convert_torch_weights
from magref_jax import pipeline
from magref_jax.conditioning.case import encode_cases, stack_cases
from magref_jax.config import (
    DiTConfig,
    ImageEncoderConfig,
    ModelConfig,
    TextEncoderConfig,
    VAEConfig,
    load_model_config,
)
from magref_jax.convert.dit import dit_rules
from magref_jax.convert.rules import torch_shapes
from magref_jax.convert.text_encoder import text_encoder_rules
from magref_jax.convert.vae import vae_rules
from magref_jax.data.emoji_tokenizer import build_tokenizer
from tests.parity.test_image_encoder import MEAN, STD, hf_state, original_shapes
from tests.parity.test_text_encoder import hf_name
from tests.parity.torch_random import random_tensors
from tests.tiny_model import picture
from tests.torch_folders import WAN_FILES, save_sharded

pytestmark = pytest.mark.parity

# Everything that is not a width, a depth or a vocabulary is as released.
CONFIG = ModelConfig(
    dit=DiTConfig(dim=48, ffn_dim=72, num_heads=3, num_layers=2, text_dim=32, image_dim=160, freq_dim=32),
    vae=VAEConfig(base_dim=10),
    text_encoder=TextEncoderConfig(vocab_size=160, dim=32, ffn_dim=48, num_heads=5, head_dim=8, num_layers=2),
    image_encoder=ImageEncoderConfig(dim=160, ffn_dim=96, num_heads=2, num_layers=3, image_size=24, patch_size=6),
)
TOKENIZER = "google/umt5-xxl"

PROMPTS = ["A red  fox jumps &amp; runs", "“the cat”，a hat and a boat on the sea"]
NEGATIVE_PROMPT = "a blurry，grey sea"
REFERENCES = [
    [picture((250, 60, 20), (30, 20))],
    [picture((20, 250, 80)), picture((40, 90, 250), (9, 30)), picture((9, 200, 210))],
]
SAMPLING = {
    "num_frames": 9,
    "height": 32,
    "width": 48,
    "num_inference_steps": 6,
    "guidance_scale": 5.0,
    "flow_shift": 3.0,
}


def to_model_folder(official: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    convert_torch_weights.main([str(official), str(out)])
    return out


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> pathlib.Path:
    """A folder as it is published, of small random weights."""
    folder = tmp_path_factory.mktemp("official")
    abstract = pipeline.abstract_params(CONFIG)

    dit = random_tensors(torch_shapes(dit_rules(CONFIG.dit), abstract["dit"]), seed=1)
    save_sharded(folder / WAN_FILES["dit"], {name: torch.from_numpy(tensor) for name, tensor in dit.items()})
    config = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": CONFIG.dit.dim,
        "eps": CONFIG.dit.norm_eps,
        "ffn_dim": CONFIG.dit.ffn_dim,
        "freq_dim": CONFIG.dit.freq_dim,
        "in_dim": CONFIG.dit.in_channels,
        "model_type": "i2v",
        "num_heads": CONFIG.dit.num_heads,
        "num_layers": CONFIG.dit.num_layers,
        "out_dim": CONFIG.dit.out_channels,
        "text_len": CONFIG.dit.text_len,
    }
    (folder / "config.json").write_text(json.dumps(config))

    shapes = {
        "vae": torch_shapes(vae_rules(CONFIG.vae), abstract["vae"]),
        "text_encoder": torch_shapes(text_encoder_rules(CONFIG.text_encoder), abstract["text_encoder"]),
        "image_encoder": original_shapes(CONFIG.image_encoder)
        | {"textual.token_embedding.weight": (7, 8), "log_scale": ()},  # a text tower, which neither side has a use for
    }
    for seed, (network, names) in enumerate(shapes.items(), start=2):
        tensors = random_tensors(names, seed)
        torch.save({name: torch.tensor(array) for name, array in tensors.items()}, folder / WAN_FILES[network])
    build_tokenizer(["fox jumps runs cat hat boat sea blurry grey"], folder / TOKENIZER, CONFIG.dit.text_len)
    return folder


def read_dit(official: pathlib.Path) -> dict[str, torch.Tensor]:
    shards = [safetensors.torch.load_file(file) for file in official.glob("*.safetensors")]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def read_pth(official: pathlib.Path, network: str) -> dict[str, torch.Tensor]:
    return torch.load(official / WAN_FILES[network], weights_only=True)


class Rungs(NamedTuple):
    """What both sides compute, in this order; channels last."""

    text_embeddings: np.ndarray
    image_embeddings: np.ndarray
    reference_latents: np.ndarray
    velocity: np.ndarray  # at the first step, without guidance
    trajectory: np.ndarray
    frames: np.ndarray


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 4, 6, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def model(official, tmp_path_factory) -> pipeline.Model:
    folder = to_model_folder(official, tmp_path_factory.mktemp("converted") / "model")
    assert load_model_config(folder).dit.dtype == "bfloat16"
    return pipeline.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def result(model, noise) -> pipeline.Result:
    return model.generate(
        PROMPTS,
        REFERENCES,
        NEGATIVE_PROMPT,
        **SAMPLING,
        solver="unipc",
        layout="v2",
        layout_order=[[0], [2, 0, 1]],
        initial_noise=noise,
        return_trajectory=True,
    )


@pytest.fixture(scope="module")
def ours(model, result, noise) -> Rungs:
    @jax.jit
    def first_step(params, arrays):
        conditioning = encode_cases(pipeline.encoders(model.config, params), arrays, SAMPLING["num_frames"])
        velocity = pipeline.velocity_fn(model.config, params["dit"], conditioning)(noise, np.full(2, 999.0, np.float32))
        return conditioning, velocity

    conditioning, velocity = first_step(model.params, stack_cases(result.cases))
    outputs = conditioning.text_embeddings, conditioning.image_embeddings, conditioning.reference_latents, velocity
    return Rungs(*map(np.asarray, outputs), result.trajectory, result.frames)


def channels_first(x: np.ndarray | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(x)).movedim(-1, 1)


def channels_last(x: torch.Tensor) -> np.ndarray:
    return x.movedim(1, -1).numpy()


def torch_text_embeddings(official: pathlib.Path, prompts: list[str]) -> torch.Tensor:
    cfg = CONFIG.text_encoder
    config = transformers.UMT5Config(
        vocab_size=cfg.vocab_size,
        d_model=cfg.dim,
        d_kv=cfg.head_dim,
        d_ff=cfg.ffn_dim,
        num_layers=cfg.num_layers,
        num_heads=cfg.num_heads,
        feed_forward_proj="gated-gelu",
    )
    encoder = transformers.UMT5EncoderModel(config).eval()
    tensors = read_pth(official, "text_encoder")
    state = {hf_name(name): tensor for name, tensor in tensors.items()}
    encoder.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]}, strict=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(official / TOKENIZER)
    embeddings = []
    for prompt in prompts:
        tokens = tokenizer(prompt_clean(prompt), padding="max_length", max_length=512, return_tensors="pt")
        length = int(tokens.attention_mask.sum())
        output = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0, :length]
        embeddings.append(F.pad(output, (0, 0, 0, 512 - length)))
    return torch.stack(embeddings)


def torch_image_embeddings(official: pathlib.Path, canvas: torch.Tensor) -> torch.Tensor:
    cfg = CONFIG.image_encoder
    config = transformers.CLIPVisionConfig(
        hidden_size=cfg.dim,
        intermediate_size=cfg.ffn_dim,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        hidden_act="gelu",
    )
    tower = transformers.CLIPVisionModel(config).eval()
    tensors = read_pth(official, "image_encoder")
    state = hf_state({name: tensor.numpy() for name, tensor in tensors.items() if name.startswith("visual.")})
    prefix = "vision_model." if next(iter(tower.state_dict())).startswith("vision_model.") else ""
    tower.load_state_dict({prefix + name: tensor for name, tensor in state.items()}, strict=True)
    pixels = F.interpolate(canvas, (cfg.image_size, cfg.image_size), mode="bicubic") * 0.5 + 0.5
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (MEAN, STD))
    return tower((pixels - mean) / std, output_hidden_states=True).hidden_states[-2]


def torch_dit(official: pathlib.Path) -> torch.nn.Module:
    cfg = CONFIG.dit
    model = WanTransformer3DModel(
        num_attention_heads=cfg.num_heads,
        attention_head_dim=cfg.head_dim,
        in_channels=cfg.in_channels,
        out_channels=cfg.out_channels,
        text_dim=cfg.text_dim,
        freq_dim=cfg.freq_dim,
        ffn_dim=cfg.ffn_dim,
        num_layers=cfg.num_layers,
        image_dim=cfg.image_dim,
        added_kv_proj_dim=cfg.dim,
    )
    model.load_state_dict(convert_wan_transformer_to_diffusers(read_dit(official)), strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def reference(official, result, noise) -> Rungs:
    torch.set_num_threads(1)
    with torch.no_grad():
        return run_reference(official, result.canvas, result.region_mask, noise)


def run_reference(official: pathlib.Path, canvas: np.ndarray, region_mask: np.ndarray, noise: np.ndarray) -> Rungs:
    """The official order of things: encode, sample with guidance in two passes per step, decode, cut."""
    texts = torch_text_embeddings(official, [*PROMPTS, NEGATIVE_PROMPT])
    text, negative = texts[:2], texts[2:].expand(2, -1, -1)
    pixels = channels_first(canvas).float() / 255
    pixels = (pixels - 0.5) / 0.5
    image = torch_image_embeddings(official, pixels)

    vae = AutoencoderKLWan(base_dim=CONFIG.vae.base_dim).eval()  # with its own statistics of the latents
    vae.load_state_dict(convert_wan_vae_to_diffusers(read_pth(official, "vae")), strict=True)
    mean, std = (torch.tensor(vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    grey = torch.zeros(2, 3, SAMPLING["num_frames"] - 1, SAMPLING["height"], SAMPLING["width"])
    clip = torch.cat([pixels[:, :, None], grey], dim=2)
    reference_latents = (vae.encode(clip).latent_dist.mean - mean) / std

    dit = torch_dit(official)
    conditions = torch.cat([channels_first(region_mask), reference_latents], dim=1)

    def velocity(latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return dit(torch.cat([latents, conditions], dim=1), timestep.expand(2), text, image, return_dict=False)[0]

    steps = SAMPLING["num_inference_steps"]
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SAMPLING["flow_shift"]
    )
    scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])
    latents, trajectory = channels_first(noise), []
    first_velocity = velocity(latents, scheduler.timesteps[0], text)
    for timestep in scheduler.timesteps:
        unconditional = velocity(latents, timestep, negative)
        conditional = velocity(latents, timestep, text)
        guided = unconditional + SAMPLING["guidance_scale"] * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
        trajectory.append(channels_last(latents))

    frames = vae.decode(latents * std + mean).sample.clamp(-1, 1)
    frames = ((frames + 1) / 2 * 255).to(torch.uint8)[:, :, 4:]  # truncated
    return Rungs(
        text.numpy(),
        image.numpy(),
        channels_last(reference_latents),
        channels_last(first_velocity),
        np.stack(trajectory),
        channels_last(frames),
    )


TOLERANCES = {
    "text_embeddings": 2e-5,
    "image_embeddings": 2e-5,
    "reference_latents": 2e-5,
    "velocity": 5e-5,  # diffusers computes the timestep embedding in float32, which is off by 3e-5 at t = 999
    "trajectory": 1e-4,
}


@pytest.mark.parametrize("rung", TOLERANCES)
def test_rung_equals_torch(ours, reference, rung, close):
    expected = getattr(reference, rung)
    assert np.std(expected[expected != 0]) > 0.3
    close(f"end to end, {rung.replace('_', ' ')}", getattr(ours, rung), expected, TOLERANCES[rung])


def test_frames_equal_torch(ours, reference, close):
    assert reference.frames.shape == (2, 5, 32, 48, 3)
    assert np.std(reference.frames) > 30
    assert np.mean((reference.frames == 0) | (reference.frames == 255)) < 0.25  # the clamp hides little
    close("end to end, frames (levels)", ours.frames.astype(int), reference.frames.astype(int), 1)
    close("end to end, frames (share off)", np.mean(ours.frames != reference.frames), 0, 1e-3)


def test_result_ends_with_what_was_compared(result):
    np.testing.assert_array_equal(result.latents, result.trajectory[-1])
