"""What a config holds, what it refuses, and how it is read: which folders are model folders, and what is said of the others."""

import dataclasses
import pathlib

import pytest

from magref_jax import config
from magref_jax.config import ModelConfig, load_model_config, with_dtype

BUNDLED = pathlib.Path(config.__file__).parent / "bundled" / "emoji"
NETWORKS = ("dit", "vae", "text_encoder", "image_encoder")


# As their authors published them: Wan2.1-I2V-14B's config.json and code, google/umt5-xxl, OpenCLIP's ViT-H/14, MAGREF's generate.py.
RELEASED = {
    "dit": {
        "dim": 5120,
        "ffn_dim": 13824,
        "num_heads": 40,
        "num_layers": 40,
        "in_channels": 16 + 4 + 16,
        "out_channels": 16,
        "text_dim": 4096,
        "text_len": 512,
        "image_dim": 1280,
        "freq_dim": 256,
        "patch_size": (1, 2, 2),
        "norm_eps": 1e-6,
        "rope_theta": 1e4,
    },
    "vae": {
        "base_dim": 96,
        "dim_multipliers": (1, 2, 4, 4),
        "num_res_blocks": 2,
        "latent_channels": 16,
        "temporal_downsample": (False, True, True),
    },
    "text_encoder": {
        "vocab_size": 256384,
        "dim": 4096,
        "ffn_dim": 10240,
        "num_heads": 64,
        "head_dim": 64,
        "num_layers": 24,
        "num_buckets": 32,
        "max_distance": 128,
        "norm_eps": 1e-6,
    },
    "image_encoder": {
        "dim": 1280,
        "ffn_dim": 5120,
        "num_heads": 16,
        "num_layers": 32,
        "image_size": 224,
        "patch_size": 14,
        "norm_eps": 1e-5,
    },
    "sampling": {
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "num_inference_steps": 40,
        "flow_shift": 3.0,
        "guidance_scale": 5.0,
        "solver": "unipc",
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_defaults_are_those_of_the_released_model(name):
    config = getattr(ModelConfig(), name)
    assert {field: getattr(config, field) for field in RELEASED[name]} == RELEASED[name]


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


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two model folders, a training run with one in it, weights of others, and things that are none."""
    monkeypatch.chdir(tmp_path)
    text = (BUNDLED / "config.json").read_text()
    for name in ("models/magref", "models/wan", "runs/smoke/model"):
        pathlib.Path(name, "dit").mkdir(parents=True)
        pathlib.Path(name, "config.json").write_text(text)
    pathlib.Path("runs/smoke/config.json").write_text('{"num_steps": 3}')
    for name in (
        "hub/Wan-I2V/transformer/model.safetensors",
        "hub/MAGREF/diffusion.safetensors",
        "hub/vae.pth",
        "a.txt",
    ):
        pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(name).touch()
    pathlib.Path("hub/MAGREF/config.json").write_text('{"_class_name": "WanModel"}')
    pathlib.Path("empty").mkdir()
    pathlib.Path("old/damaged/dit").mkdir(parents=True)
    pathlib.Path("old/damaged/config.json").write_text(text[:-20])


@pytest.mark.parametrize(
    ("folder", "error", "start", "end"),
    [
        ("models/magreff", FileNotFoundError, "models/magreff does not exist; a model folder holds config.json,", "models/magref."),
        ("models/wam", FileNotFoundError, "models/wam does not exist", "models/wan."),
        ("model/wan", FileNotFoundError, "model/wan does not exist", "models/wan."),
        ("magref", FileNotFoundError, "magref does not exist", "models/magref."),
        ("runs/smoke", ValueError, "runs/smoke is no model folder: its config.json is not", "runs/smoke/model."),
        ("runs/smok/model", FileNotFoundError, "runs/smok/model does not exist", "runs/smoke/model."),
        ("empty", FileNotFoundError, "empty is no model folder: it has no config.json", "models/magref."),
        ("a.txt", FileNotFoundError, "a.txt is a file", "models/wan."),
        ("hub/Wan-I2V", ValueError, "hub/Wan-I2V is no model folder, it holds PyTorch weights", "models/wan-i2v`."),
        ("hub/MAGREF", ValueError, "hub/MAGREF is no model folder, it holds PyTorch", "_weights.py hub/MAGREF models/magref`."),
        ("hub/vae.pth", ValueError, "hub/vae.pth is no model folder, it holds PyTorch", "_weights.py hub/vae.pth models/vae`."),
        ("gs://bucket/model", ValueError, "the model folder gs://bucket/model: gs:// cannot", "bucket."),
        ("old/damaged", ValueError, "old/damaged/config.json: Expecting", ")"),
    ],
)  # fmt: skip
def test_what_is_no_model_folder_is_named_with_the_nearest_one(folders, folder, error, start, end):
    with pytest.raises(error) as refused:
        load_model_config(folder)
    assert str(refused.value).startswith(start)
    assert str(refused.value).endswith(end)
    assert "Errno" not in str(refused.value)


def test_without_any_model_folder_the_bundled_one_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"The nearest model folder is .*bundled.emoji\.$"):
        load_model_config(pathlib.Path("models/magref"))
