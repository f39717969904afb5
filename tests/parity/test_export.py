"""What other libraries load of a folder written for them: every weight, and configs that compute the same."""

import pathlib

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import convert_torch_weights
from tests import torch_folders
from tests.parity.test_dit import torch_dit
from tests.torch_folders import CONFIG

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Official weights through our model folder into the layout of diffusers."""
    root = tmp_path_factory.mktemp("exported")
    tensors = torch_folders.write_diffusers(root / "source")
    settings = [word for setting in torch_folders.SETTINGS for word in ("--set", setting)]
    convert_torch_weights.main([str(root / "source"), str(root / "model"), *settings])
    convert_torch_weights.main([str(root / "model"), str(root / "out"), "--to", "diffusers"])
    return root / "out", tensors


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def reference(network: str) -> torch.nn.Module:
    """The module as this test knows it, with random weights."""
    vae, text, image = CONFIG.vae, CONFIG.text_encoder, CONFIG.image_encoder
    if network == "dit":
        return torch_dit(CONFIG.dit)
    if network == "vae":
        return diffusers.AutoencoderKLWan(
            base_dim=vae.base_dim, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True]
        )
    if network == "text_encoder":
        config = transformers.UMT5Config(
            vocab_size=text.vocab_size,
            d_model=text.dim,
            d_kv=text.head_dim,
            d_ff=text.ffn_dim,
            num_layers=text.num_layers,
            num_heads=text.num_heads,
            feed_forward_proj="gated-gelu",
        )
        return transformers.UMT5EncoderModel(config)
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=image.dim,
            intermediate_size=image.ffn_dim,
            num_hidden_layers=image.num_layers,
            num_attention_heads=image.num_heads,
            image_size=image.image_size,
            patch_size=image.patch_size,
            hidden_act="gelu",
        )
    )


MODELS = {
    "dit": ("transformer", diffusers.WanTransformer3DModel),
    "vae": ("vae", diffusers.AutoencoderKLWan),
    "text_encoder": ("text_encoder", transformers.UMT5EncoderModel),
    "image_encoder": ("image_encoder", transformers.CLIPVisionModel),
}
RUN = {
    "dit": lambda model: (
        model(random(1, 36, 2, 4, 4), torch.tensor([500.0]), random(1, 512, 20), random(1, 5, 160)).sample
    ),
    "vae": lambda model: model.encode(random(1, 3, 5, 16, 16)).latent_dist.mean,
    "text_encoder": lambda model: model(torch.arange(1, 9)[None]).last_hidden_state,
    "image_encoder": lambda model: model(random(1, 3, 12, 12), output_hidden_states=True).hidden_states[-2],
}


def load_transformer(folder: pathlib.Path) -> diffusers.WanTransformer3DModel:
    """As `from_pretrained` does, which for this class insists on one more library."""
    cls = diffusers.WanTransformer3DModel
    model = cls.from_config(cls.load_config(folder / "transformer"))
    (file,) = (folder / "transformer").glob("*.safetensors")
    model.load_state_dict(safetensors.torch.load_file(file))
    return model


@pytest.mark.parametrize("network", MODELS)
def test_from_pretrained_finds_everything(network, exported):
    folder, tensors = exported
    name, cls = MODELS[network]
    if network == "dit":
        loaded = load_transformer(folder)
    else:
        loaded, info = cls.from_pretrained(folder / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]

    expected = reference(network)
    state = {key.removeprefix("vision_model."): tensor for key, tensor in expected.state_dict().items()}
    known = {key: tensors[network].get(key) for key in state}
    known |= {key: tensors[network]["shared.weight"] for key in known if "embed_tokens" in key}
    prefix = "vision_model." if "vision_model.pre_layrnorm.weight" in expected.state_dict() else ""
    assert all(tensor is not None for tensor in known.values())
    expected.load_state_dict({prefix + key: tensor for key, tensor in known.items()})
    with torch.no_grad():
        assert torch.equal(RUN[network](loaded.eval()), RUN[network](expected.eval()))


def test_the_folder_is_a_pipeline(exported):
    transformer = load_transformer(exported[0])
    pipe = diffusers.WanImageToVideoPipeline.from_pretrained(exported[0], transformer=transformer)
    assert isinstance(pipe.scheduler, diffusers.UniPCMultistepScheduler)
    assert pipe.vae.config.latents_mean == pytest.approx(CONFIG.vae.latent_mean)
    assert pipe.tokenizer("a fish")["input_ids"]
