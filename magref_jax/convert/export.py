"""From a model folder back to what other programs load: the official code, diffusers, ComfyUI."""

import dataclasses
import functools
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from magref_jax.checkpoint import NETWORKS, open_params, verify_manifest
from magref_jax.config import (
    DiTConfig,
    ImageEncoderConfig,
    ModelConfig,
    TextEncoderConfig,
    VAEConfig,
    load_model_config,
)
from magref_jax.convert.conversion import RULES, SPIECE, check_place
from magref_jax.convert.image_encoder import image_encoder_unused
from magref_jax.convert.rules import Layout, Rule, torch_sources
from magref_jax.convert.sources import SENTENCEPIECE
from magref_jax.convert.tensor_files import write_safetensors

To = Literal["wan", "diffusers", "comfy"]


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a network goes and under whose names."""

    layout: Layout
    stem: str  # path below OUT without suffix; {name} is the name of the model folder
    max_bytes: float = math.inf  # of one file, above which it is cut into several with an index
    prefix: str = ""
    sentencepiece: str = ""  # the tensor that holds the bytes of spiece.model


CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
TARGETS: dict[To, dict[str, Target]] = {
    "wan": {
        "dit": Target("wan", "diffusion_pytorch_model", 10e9),
        "vae": Target("wan", "Wan2.1_VAE"),
        "text_encoder": Target("wan", "models_t5_umt5-xxl-enc-bf16"),
        "image_encoder": Target("wan", CLIP_FILE),
    },
    "diffusers": {
        "dit": Target("hf", "transformer/diffusion_pytorch_model", 5e9),
        "vae": Target("hf", "vae/diffusion_pytorch_model"),
        "text_encoder": Target("hf", "text_encoder/model", 5e9),
        "image_encoder": Target("hf", "image_encoder/model"),
    },
    "comfy": {
        "dit": Target("wan", "diffusion_models/{name}"),
        "vae": Target("wan", "vae/{name}_vae"),
        "text_encoder": Target("hf", "text_encoders/{name}_umt5", sentencepiece=SENTENCEPIECE),
        "image_encoder": Target("hf", "clip_vision/{name}_clip_vision", prefix="vision_model."),
    },
}
TOKENIZERS: dict[To, str | None] = {"wan": "google/umt5-xxl", "diffusers": "tokenizer", "comfy": None}


def export(
    folder: pathlib.Path,
    out: pathlib.Path,
    to: To,
    *,
    only: tuple[str, ...] = (),
    verify: bool = True,
    progress: Callable[[int], object] = lambda count: None,
    say: Callable[[str], object] = print,
) -> list[pathlib.Path]:
    """Writes the networks of a model folder under another layout's names, in the dtypes they are stored in.

    Returns the files, relative to OUT, which appears when all is written.

    Raises:
        FileExistsError: OUT is there already.
        ValueError: the model folder is damaged, or lacks one of `only`; or OUT cannot be written.
    """
    if out.exists():
        raise FileExistsError(f"OUT {out} exists already; give another name.")
    check_place(out, exported_bytes(folder, only))
    verify_manifest(folder, contents=verify)
    config = load_model_config(folder)
    names = _networks(folder, only)
    partial = out.absolute().with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name in names:
            _export_network(folder, name, config, to, partial, out.name, progress, say)
        tokenizer = TOKENIZERS[to]
        if tokenizer is not None and (folder / "tokenizer").is_dir():
            shutil.copytree(folder / "tokenizer", partial / tokenizer, ignore=shutil.ignore_patterns(".*"))
        if to == "diffusers":
            _write_pipeline(config, names, partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())


def exported_bytes(folder: pathlib.Path, only: tuple[str, ...] = ()) -> int:
    """How much `export` reads."""
    stores = [store for name in _networks(folder, only) for store in open_params(folder / name).values()]
    return sum(math.prod(store.shape) * store.dtype.numpy_dtype.itemsize for store in stores)


def _networks(folder: pathlib.Path, only: tuple[str, ...]) -> list[str]:
    there = [name for name in NETWORKS if (folder / name).is_dir()]
    if missing := [name for name in only if name not in there]:
        raise ValueError(f"--only {','.join(missing)}: not in {folder}, which has {', '.join(there) or 'no network'}.")
    return [name for name in there if not only or name in only]


def _export_network(
    model: pathlib.Path,
    name: str,
    config: ModelConfig,
    to: To,
    out: pathlib.Path,
    model_name: str,
    progress: Callable[[int], object],
    say: Callable[[str], object],
) -> None:
    target = TARGETS[to][name]
    stores = open_params(model / name)
    network_config = getattr(config, name)
    sources = torch_sources(RULES[name](network_config, target.layout), stores)
    unused: dict[str, tuple[int, ...]] = {}
    if name == "image_encoder":
        # Our tower ends before its last block. One that does nothing stands in for it, because others load by name; what is
        # read of them comes from before it.
        unused = image_encoder_unused(network_config, target.layout)
    zeros_dtype = next(iter(stores.values())).dtype.numpy_dtype
    specs = {
        target.prefix + key: (stores[source.rule.flax_paths[0]].dtype.numpy_dtype, source.shape)
        for key, source in sources.items()
    } | {target.prefix + key: (zeros_dtype, shape) for key, shape in unused.items()}
    extra: dict[str, np.ndarray] = {}
    if target.sentencepiece:
        file = model / "tokenizer" / SPIECE
        if file.is_file():
            extra[target.sentencepiece] = np.fromfile(file, np.uint8)
        else:
            say(f"{file} does not exist: ComfyUI will not turn prompts into tokens with this text encoder alone.")
    specs |= {key: (array.dtype, array.shape) for key, array in extra.items()}

    # Of one rule at a time: its layers follow each other, and a stacked parameter of 14B has gigabytes.
    @functools.lru_cache(maxsize=1)
    def whole(paths: tuple[str, ...]) -> list[np.ndarray]:
        return [stores[path].read().result() for path in paths]

    def arrays(paths: tuple[str, ...], layer: int | None) -> list[np.ndarray]:
        if layer is None:
            return [stores[path].read().result() for path in paths]
        # Where a chunk holds all layers, reading one of them unpacks them all.
        chunks = stores[paths[0]].chunk_layout.read_chunk.shape
        if chunks is not None and chunks[0] == 1:
            return [stores[path][layer].read().result() for path in paths]
        return [array[layer] for array in whole(paths)]

    def read(key: str) -> np.ndarray:
        if key in extra:
            return extra[key]
        key = key.removeprefix(target.prefix)
        if key in unused:
            return np.zeros(unused[key], zeros_dtype)
        rule: Rule = sources[key].rule
        tensor = rule.transform.inverse(*arrays(rule.flax_paths, sources[key].layer))
        progress(tensor.nbytes)
        return tensor

    path = out / target.stem.format(name=model_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(specs, target.max_bytes))
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        suffix = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        file = path.with_name(f"{path.name}{suffix}.safetensors")
        write_safetensors(file, {key: specs[key] for key in shard}, read, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file.name)
    if len(shards) > 1:
        total = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(path.with_name(f"{path.name}.safetensors.index.json"), index)
    if to == "diffusers" or (to == "wan" and name == "dit"):
        _write_json(path.parent / "config.json", CONFIG_FILES[to][name](network_config))


def _shards(specs: dict[str, tuple[Any, Any]], max_bytes: float) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, (dtype, shape) in specs.items():
        count = math.prod(shape) * np.dtype(dtype).itemsize
        if shard and size + count > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += count
    yield shard


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# What the other side's config.json says


def _wan_dit(config: DiTConfig) -> dict[str, Any]:
    return {
        "_class_name": "WanModel",
        "model_type": "t2v" if config.image_dim is None else "i2v",
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "out_dim": config.out_channels,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "text_len": config.text_len,
        "eps": config.norm_eps,
    }


def _diffusers_dit(config: DiTConfig) -> dict[str, Any]:
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.norm_eps,
        "image_dim": config.image_dim,
        "added_kv_proj_dim": None if config.image_dim is None else config.dim,
        "rope_max_seq_len": 1024,
    }


def _diffusers_vae(config: VAEConfig) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": config.base_dim,
        "z_dim": config.latent_channels,
        "dim_mult": list(config.dim_multipliers),
        "num_res_blocks": config.num_res_blocks,
        "temperal_downsample": list(config.temporal_downsample),
        "latents_mean": list(config.latent_mean),
        "latents_std": list(config.latent_std),
    }


def _transformers_umt5(config: TextEncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": config.vocab_size,
        "d_model": config.dim,
        "d_kv": config.head_dim,
        "d_ff": config.ffn_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": True,
    }


def _transformers_clip(config: ImageEncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps,
    }


CONFIG_FILES: dict[str, dict[str, Callable[[Any], dict[str, Any]]]] = {
    "wan": {"dit": _wan_dit},
    "diffusers": {
        "dit": _diffusers_dit,
        "vae": _diffusers_vae,
        "text_encoder": _transformers_umt5,
        "image_encoder": _transformers_clip,
    },
}
PIPELINE_CLASSES = {
    "dit": ("transformer", "diffusers", "WanTransformer3DModel"),
    "vae": ("vae", "diffusers", "AutoencoderKLWan"),
    "text_encoder": ("text_encoder", "transformers", "UMT5EncoderModel"),
    "image_encoder": ("image_encoder", "transformers", "CLIPVisionModel"),
}


def _write_pipeline(config: ModelConfig, names: list[str], out: pathlib.Path) -> None:
    """The files that tie a diffusers folder together."""
    image_to_video = config.dit.image_dim is not None
    index: dict[str, Any] = {"_class_name": "WanImageToVideoPipeline" if image_to_video else "WanPipeline"}
    for name in names:
        component, library, cls = PIPELINE_CLASSES[name]
        index[component] = [library, cls]
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    tokenizer_config = out / "tokenizer" / "tokenizer_config.json"
    if tokenizer_config.is_file():
        cls = json.loads(tokenizer_config.read_text(encoding="utf-8")).get("tokenizer_class", "T5TokenizerFast")
        index["tokenizer"] = ["transformers", cls]
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": config.sampling.flow_shift,
        "num_train_timesteps": 1000,
    }
    _write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    if image_to_video and config.image_encoder is not None:
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
        size = config.image_encoder.image_size
        processor = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
            "do_center_crop": True,
            "resample": 3,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
        _write_json(out / "image_processor" / "preprocessor_config.json", processor)
    _write_json(out / "model_index.json", index)
