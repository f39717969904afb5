"""What a config holds, what it refuses, and how it is read: which folders are model folders, and what is said of the others."""

import dataclasses
import pathlib
import re

import pytest

from magref_jax import config, pipeline
from magref_jax.config import NETWORKS, ModelConfig, from_dict, load_model_config, with_dtype
from magref_jax.convert.conversion import make_plan
from magref_jax.convert.sources import Source
from magref_jax.training import dit_task
from magref_jax.training.config import DiTTask, EmojiData

BUNDLED = pathlib.Path(config.__file__).parent / "bundled" / "emoji"


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
        "latent_mean": (
            *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
            *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
        ),
        "latent_std": (
            *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
            *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
        ),
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
        ("old/damaged", ValueError, "old/damaged/config.json: is not JSON: Expecting", ")."),
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


def changed(config: ModelConfig, **changes) -> ModelConfig:
    """The config with fields by dotted path replaced."""
    for path, value in changes.items():
        network, _, field = path.partition("__")
        part = dataclasses.replace(getattr(config, network), **{field: value}) if field else value
        config = dataclasses.replace(config, **{network: part})
    return config


@pytest.mark.parametrize(
    ("changes", "networks", "message"),
    [
        ({"dit__in_channels": 48}, NETWORKS, "dit.in_channels=48 cannot be fed: must be 16 (noise alone, of text-to-video) or 36"),
        ({"dit__in_channels": 48}, ("dit",), "48 is 3 times the latents: probably a control model such as Wan Fun-Control"),
        ({"dit__in_channels": 52}, ("dit",), "dit.in_channels=52 cannot be fed"),
        ({"dit__in_channels": 32}, ("dit",), "32 is 2 times the latents"),
        ({"dit__out_channels": 32}, NETWORKS, "dit.out_channels=32 must be 16 for this model, as vae.latent_channels=16 is"),
        ({"dit__text_dim": 512}, NETWORKS, "dit.text_dim=512 must be 4096 for this model, as text_encoder.dim=4096 is"),
        ({"image_encoder__dim": 160}, NETWORKS, "dit.image_dim=1280 must be 160 for this model, as image_encoder.dim=160 is"),
        ({"image_encoder": None}, NETWORKS, "dit.image_dim=1280 must be None for this model, as image_encoder=None is"),
        ({"dit__image_dim": None}, NETWORKS, "dit.image_dim=None must be 1280 for this model"),
        ({}, NETWORKS, None),
        ({"dit__in_channels": 16, "dit__image_dim": None, "image_encoder": None}, NETWORKS, None),
        ({"dit__in_channels": 36, "dit__image_dim": None, "image_encoder": None}, NETWORKS, None),
        # What is not there yet may still come in another size.
        ({"dit__text_dim": 512, "image_encoder__dim": 160}, ("dit", "vae"), None),
        ({"dit__in_channels": 48}, ("vae", "text_encoder"), None),
    ],
)  # fmt: skip
def test_networks_that_do_not_fit_together_are_refused(changes, networks, message):
    config = changed(ModelConfig(), **changes)
    if message is None:
        config.check(networks)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        config.check(networks)


def test_every_stage_refuses_a_model_that_cannot_be_fed(tmp_path):
    config = changed(ModelConfig(), dit__in_channels=48)
    (tmp_path / "dit").mkdir()
    (tmp_path / "config.json").write_text(config.to_json())
    stages = {
        "load": lambda: pipeline.load(tmp_path),
        "sample": lambda: pipeline.with_sampling(config),
        "train": lambda: dit_task.model_config(DiTTask(tmp_path, EmojiData(), ())),
        "convert": lambda: make_plan(Source({"dit": None}, None), config, {}),
    }
    for stage in stages.values():
        with pytest.raises(ValueError, match="dit.in_channels=48 cannot be fed"):
            stage()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "config=[] must be an object with the fields of ModelConfig"),
        ({"colour": 1}, "config: unknown name 'colour'; ModelConfig has"),
        ({"dit": None}, "config.dit=None must be an object with the fields of DiTConfig"),
        ({"dit": {"dim": "48"}}, "config.dit.dim='48' must be a whole number"),
        ({"dit": {"dim": 48.0}}, "config.dit.dim=48.0 must be a whole number"),
        ({"dit": {"dim": None}}, "config.dit.dim=None must be a whole number"),
        ({"dit": {"dim": True}}, "config.dit.dim=True must be a whole number"),
        ({"dit": {"image_dim": "none"}}, "config.dit.image_dim='none' must be a whole number, or None"),
        ({"dit": {"num_heads": 0}}, "DiTConfig.num_heads=0 must be greater than 0"),
        ({"dit": {"dim": -24, "num_heads": 2}}, "DiTConfig.dim=-24 must be greater than 0"),
        ({"dit": {"norm_eps": "1e-6"}}, "config.dit.norm_eps='1e-6' must be a finite number"),
        ({"dit": {"rope_theta": float("nan")}}, "config.dit.rope_theta=nan must be a finite number"),
        ({"dit": {"dtype": "float16"}}, "config.dit.dtype='float16' is unknown; choose from float32, bfloat16"),
        ({"dit": {"dtype": None}}, "config.dit.dtype=None is unknown; choose from"),
        ({"dit": {"remat": "all"}}, "config.dit.remat='all' is unknown; choose from none, block, dots"),
        ({"dit": {"patch_size": 2}}, "config.dit.patch_size=2 must be a list"),
        ({"dit": {"patch_size": [2, 2]}}, "config.dit.patch_size=[2, 2] must have 3 entries, not 2"),
        ({"dit": {"patch_size": [1, 2, "2"]}}, "config.dit.patch_size[2]='2' must be a whole number"),
        ({"dit": {"patch_size": [1, 0, 2]}}, "DiTConfig.patch_size=(1, 0, 2) must be greater than 0"),
        ({"vae": {"latent_std": [0.0] * 16}}, "VAEConfig.latent_std=(0.0, 0.0"),
        ({"vae": {"temporal_downsample": [0, 1, 1]}}, "config.vae.temporal_downsample[0]=0 must be True or False"),
        ({"text_encoder": "umt5"}, "config.text_encoder='umt5' must be an object"),
        ({"image_encoder": {"num_heads": 7}}, "ImageEncoderConfig.dim=1280 does not split into num_heads=7"),
        ({"sampling": {"solver": "ddim"}}, "config.sampling.solver='ddim' is unknown; choose from unipc, dpm++, euler"),
        ({"sampling": {"negative_prompt": 0}}, "config.sampling.negative_prompt=0 must be a text"),
        ({"drop_frames": -1}, "ModelConfig.drop_frames=-1 must be 0 or more"),
        ({"fps": 0}, "fps=0.0 above 0"),
    ],
)
def test_values_of_another_type_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_dict(ModelConfig, values, "config")


def test_a_config_is_what_its_json_says():
    assert ModelConfig.from_json(ModelConfig().to_json()) == ModelConfig()
    found = from_dict(ModelConfig, {"fps": 8, "image_encoder": None, "dit": {"patch_size": [1, 1, 1]}}, "config")
    assert (found.fps, type(found.fps), found.image_encoder, found.dit.patch_size) == (8.0, float, None, (1, 1, 1))
