"""CLIP's vision tower against transformers and its resize against torch, through the names of the original checkpoint."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from magref_jax.config import ImageEncoderConfig
from magref_jax.convert.image_encoder import image_encoder_rules, image_encoder_unused
from magref_jax.convert.rules import convert, to_torch, torch_shapes
from magref_jax.models.image_encoder import ImageEncoder, preprocess
from tests.parity.rounding import rounding_ratio
from tests.parity.torch_random import random_tensors

pytestmark = pytest.mark.parity

CONFIG = ImageEncoderConfig(dim=32, ffn_dim=48, num_heads=4, num_layers=4, image_size=24, patch_size=6, dtype="float32")
TEXT_DIM = 20
# CLIP's own constants, typed from the published preprocessor_config.json.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])

# Original name below `visual.` -> transformers name; the fused query/key/value is cut in `hf_state`.
HF_NAMES = (
    (r"patch_embedding\.weight", r"embeddings.patch_embedding.weight"),
    (r"pre_norm\.(weight|bias)", r"pre_layrnorm.\1"),
    (r"post_norm\.(weight|bias)", r"post_layernorm.\1"),
    (r"transformer\.(\d+)\.norm([12])\.(weight|bias)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"transformer\.(\d+)\.attn\.proj\.(weight|bias)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (r"transformer\.(\d+)\.mlp\.0\.(weight|bias)", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"transformer\.(\d+)\.mlp\.2\.(weight|bias)", r"encoder.layers.\1.mlp.fc2.\2"),
)


def original_shapes(config: ImageEncoderConfig) -> dict[str, tuple[int, ...]]:
    dim, ffn_dim, patch = config.dim, config.ffn_dim, config.patch_size
    block = {
        "norm1.weight": (dim,),
        "norm1.bias": (dim,),
        "attn.to_qkv.weight": (3 * dim, dim),
        "attn.to_qkv.bias": (3 * dim,),
        "attn.proj.weight": (dim, dim),
        "attn.proj.bias": (dim,),
        "norm2.weight": (dim,),
        "norm2.bias": (dim,),
        "mlp.0.weight": (ffn_dim, dim),
        "mlp.0.bias": (ffn_dim,),
        "mlp.2.weight": (dim, ffn_dim),
        "mlp.2.bias": (dim,),
    }
    shapes = {
        "cls_embedding": (1, 1, dim),
        "pos_embedding": (1, (config.image_size // patch) ** 2 + 1, dim),
        "patch_embedding.weight": (dim, 3, patch, patch),
        "pre_norm.weight": (dim,),
        "pre_norm.bias": (dim,),
        "post_norm.weight": (dim,),
        "post_norm.bias": (dim,),
        "head": (dim, TEXT_DIM),
    }
    for layer in range(config.num_layers):
        shapes |= {f"transformer.{layer}.{name}": shape for name, shape in block.items()}
    return {f"visual.{name}": shape for name, shape in shapes.items()}


def hf_state(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    state = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("visual.")
        if name == "cls_embedding":
            state["embeddings.class_embedding"] = tensor[0, 0]
        elif name == "pos_embedding":
            state["embeddings.position_embedding.weight"] = tensor[0]
        elif fused := re.fullmatch(r"transformer\.(\d+)\.attn\.to_qkv\.(weight|bias)", name):
            for letter, part in zip("qkv", np.split(tensor, 3), strict=True):
                state[f"encoder.layers.{fused[1]}.self_attn.{letter}_proj.{fused[2]}"] = part
        elif name != "head":
            (new_name,) = [match.expand(new) for old, new in HF_NAMES if (match := re.fullmatch(old, name))]
            state[new_name] = tensor
    return {name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(original_shapes(CONFIG))


@pytest.fixture(scope="module")
def abstract_params():
    pixels = jnp.zeros((1, CONFIG.image_size, CONFIG.image_size, 3))
    return jax.eval_shape(ImageEncoder(CONFIG).init, jax.random.key(0), pixels)["params"]


@pytest.fixture(scope="module")
def reference(tensors):
    torch.set_num_threads(1)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=CONFIG.dim,
            intermediate_size=CONFIG.ffn_dim,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            image_size=CONFIG.image_size,
            patch_size=CONFIG.patch_size,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
        )
    ).eval()
    # Some releases of transformers prefix every name.
    prefix = "vision_model." if next(iter(model.state_dict())).startswith("vision_model.") else ""
    model.load_state_dict({prefix + name: tensor for name, tensor in hf_state(tensors).items()}, strict=True)
    return model.double()  # so that the difference is our own rounding


def hidden_state(model, pixels):
    channels_first = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(model.dtype)
    with torch.no_grad():
        return model(channels_first, output_hidden_states=True).hidden_states[-2].double().numpy()


def test_equals_transformers_before_the_last_block(abstract_params, tensors, reference, close):
    pixels = np.random.default_rng(1).standard_normal((2, CONFIG.image_size, CONFIG.image_size, 3), dtype=np.float32)
    checkpoint = tensors | {"textual.token_embedding.weight": np.zeros((7, 3)), "log_scale": np.zeros(())}
    params = convert(image_encoder_rules(CONFIG), checkpoint, abstract_params)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(ImageEncoder(CONFIG).apply)({"params": params}, pixels))
    theirs = hidden_state(reference, pixels)
    assert np.std(theirs) > 0.5
    # Float32 rounding over 3 layers of values of size 1 to 10.
    close("CLIP vision tower", ours, theirs, 2e-5)


def test_bfloat16_is_closer_to_float32_than_that_of_transformers(abstract_params, tensors, reference):
    pixels = np.random.default_rng(2).standard_normal((8, CONFIG.image_size, CONFIG.image_size, 3), dtype=np.float32)
    params = convert(image_encoder_rules(CONFIG), tensors, abstract_params)
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    ours = np.asarray(jax.jit(ImageEncoder(half).apply)({"params": params}, pixels), np.float64)
    # Measured 0.76: transformers adds up its layers in bfloat16.
    ratio = rounding_ratio(
        [(ours, hidden_state(copy.deepcopy(reference).bfloat16(), pixels), hidden_state(reference, pixels))]
    )
    assert ratio < 0.85, ratio


def test_table_names_the_original_tensors(abstract_params):
    kept = torch_shapes(image_encoder_rules(CONFIG), abstract_params)
    original = original_shapes(CONFIG)
    assert kept == {name: original[name] for name in kept}
    last = f"visual.transformer.{CONFIG.num_layers - 1}."
    dropped = {name for name in original if name not in kept}
    assert dropped == {name for name in original if name.startswith((last, "visual.post_norm.", "visual.head"))}


def test_table_renames_as_this_file(abstract_params, tensors):
    params = convert(image_encoder_rules(CONFIG), tensors, abstract_params)
    hf = to_torch(image_encoder_rules(CONFIG, "hf"), params)
    theirs = hf_state(tensors)
    assert hf.keys() | image_encoder_unused(CONFIG, "hf").keys() == theirs.keys()
    for name, tensor in hf.items():
        np.testing.assert_array_equal(tensor, theirs[name].numpy(), err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, convert(image_encoder_rules(CONFIG, "hf"), hf, abstract_params), params)


@pytest.mark.parametrize(("height", "width", "size"), [(480, 832, 224), (48, 72, 48), (13, 97, 48), (31, 5, 48)])
def test_preprocess_equals_torch_bicubic(height, width, size, close):
    frames = np.random.default_rng(2).uniform(-1, 1, (1, height, width, 3)).astype(np.float32)
    resized = F.interpolate(torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()), (size, size), mode="bicubic")
    resized = resized.numpy().transpose(0, 2, 3, 1).astype(np.float64)
    ours = np.asarray(preprocess(jnp.asarray(frames), size), np.float64)
    assert np.abs(resized).max() > 1.05  # the overshoot that must not be clipped
    # Undo the normalisation, so that the tolerance is that of the resize in [-1, 1]. torch builds without fused
    # multiply-add round coordinates twice, which alone is 4.5e-5 at 480x832; with it we measure 2e-6.
    close("bicubic resize", (ours * STD + MEAN - 0.5) / 0.5, resized, 5e-5)
