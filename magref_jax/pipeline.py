"""The Python door: a loaded model and what it can do.

    pipe = load("magref_jax/bundled/emoji")
    result = pipe.generate(["the red apple slides right over a meadow"], [[image]], subjects=[["red apple"]], seed=1)
    result.frames  # uint8 [B F H W 3]

`sample.py` is the command line of this module.

B batch · F H W frames, height, width of a video · f h w of its latents, C their channels · N solver steps
"""

import dataclasses
import functools
import hashlib
import math
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int32, UInt8
from PIL import Image

from magref_jax.checkpoint import NETWORKS, Params, restore_model
from magref_jax.conditioning import canvas
from magref_jax.conditioning.case import (
    Case,
    Encoders,
    check_size,
    encode_cases,
    encode_text,
    prepare_case,
    stack_cases,
)
from magref_jax.conditioning.inputs import Conditioning, concatenate_channels
from magref_jax.conditioning.region_mask import MODES
from magref_jax.conditioning.subjects import Subject
from magref_jax.config import ImageEncoderConfig, ModelConfig, load_model_config
from magref_jax.convert.lora import Lora, apply_loras, read_lora
from magref_jax.diffusion.flow import make_schedule
from magref_jax.diffusion.sampling import VelocityFn, denoise, guidance_branches
from magref_jax.models import vae
from magref_jax.models.dit import DiT, SubjectInjection
from magref_jax.models.image_encoder import ImageEncoder, preprocess
from magref_jax.models.text_encoder import TextEncoder
from magref_jax.sharding import PARAM_SPECS, batch_multiple, batch_sharding, param_shardings
from magref_jax.video import to_uint8

# Pixels of a clip from which on the VAE works through it piece by piece. Below, one pass is faster and its memory small.
STREAM_PIXELS = 2**20


def abstract_params(config: ModelConfig, only: Collection[str] = NETWORKS) -> dict[str, Params]:
    """Shapes and dtypes of all parameters, by network, without making any."""
    return jax.eval_shape(functools.partial(init_params, config, only=only), jax.random.key(0))


def init_params(config: ModelConfig, key: jax.Array, only: Collection[str] = NETWORKS) -> dict[str, Params]:
    """Random parameters of every network of the config. Call it inside `jax.jit`."""
    cfg, image = config.dit, config.image_encoder
    rows, columns = cfg.patch_size[1:]
    latents = jnp.zeros((1, cfg.patch_size[0], rows, columns, cfg.in_channels))
    text_embeddings = jnp.zeros((1, cfg.text_len, cfg.text_dim))
    image_embeddings = None if cfg.image_dim is None else jnp.zeros((1, 1, cfg.image_dim))
    tokens = jnp.zeros((1, 2), jnp.int32)
    size = 2 * config.vae.spatial_stride
    frames = jnp.zeros((1, 1 + config.vae.temporal_stride, size, size, 3))
    noise = jnp.zeros((1, 2, 2, 2, config.vae.latent_channels))
    networks: dict[str, tuple[nn.Module, tuple[Array | None, ...]]] = {
        "dit": (DiT(cfg), (latents, jnp.zeros((1,)), text_embeddings, image_embeddings)),
        "vae": (vae.VAE(config.vae), (frames, noise)),
        "text_encoder": (TextEncoder(config.text_encoder), (tokens, tokens)),
    }
    if image is not None:
        networks["image_encoder"] = ImageEncoder(image), (jnp.zeros((1, image.image_size, image.image_size, 3)),)
    keys = dict(zip(NETWORKS, jax.random.split(key, len(NETWORKS)), strict=True))
    return {
        name: module.init(keys[name], *inputs)["params"] for name, (module, inputs) in networks.items() if name in only
    }


def encoders(config: ModelConfig, params: dict[str, Params]) -> Encoders:
    """The frozen networks as functions, closed over their parameters."""

    def image(cfg: ImageEncoderConfig, frames: jax.Array) -> jax.Array:
        return ImageEncoder(cfg).apply({"params": params["image_encoder"]}, preprocess(frames, cfg.image_size))

    def latents(frames: jax.Array) -> jax.Array:
        encode = vae.encode_stream if _is_large(frames.shape[1:4]) else vae.encode
        return encode(config.vae, params["vae"], frames)

    return Encoders(
        text=lambda ids, mask: TextEncoder(config.text_encoder).apply({"params": params["text_encoder"]}, ids, mask),
        image=None if config.image_encoder is None else functools.partial(image, config.image_encoder),
        frames=latents,
        takes_references=takes_references(config),
    )


def takes_references(config: ModelConfig) -> bool:
    """Whether the DiT has channels for more than noise; a text-to-video model has not."""
    return config.dit.in_channels > config.vae.latent_channels


def decode(config: ModelConfig, vae_params: Params, latents: Float[Array, "B f h w C"]) -> Float[Array, "B F H W 3"]:
    """Frames in [-1, 1] of normalised latents."""
    _, frames, rows, columns, _ = latents.shape
    strides = config.vae.temporal_stride, config.vae.spatial_stride, config.vae.spatial_stride
    large = _is_large([size * stride for size, stride in zip((frames, rows, columns), strides, strict=True)])
    return (vae.decode_stream if large else vae.decode)(config.vae, vae_params, latents)


def _is_large(sizes: Sequence[int]) -> bool:
    return math.prod(sizes) > STREAM_PIXELS


def velocity_fn(
    config: ModelConfig,
    dit_params: Params,
    conditioning: Conditioning,
    frame_positions: Sequence[int] | None = None,
) -> VelocityFn:
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
            frame_positions=frame_positions,
        )

    return velocity


@dataclasses.dataclass(frozen=True)
class Model:
    """A model folder in memory; see `load`."""

    config: ModelConfig
    params: dict[str, Params]
    tokenizer: Any
    mesh: Mesh | None = None  # where to compute; the first device if not given

    def generate(
        self,
        prompts: Sequence[str],
        references: Sequence[Sequence[Image.Image]],
        negative_prompt: str | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        solver: str | None = None,
        layout: str | None = None,
        layout_order: Sequence[Sequence[int] | None] | None = None,
        seed: int = 3407,
        initial_noise: Float[np.ndarray, "B f h w C"] | None = None,
        *,
        mask_mode: str | None = None,
        subjects: Sequence[Sequence[Subject | str | None]] | None = None,
        on_step: Callable[[int], None] | None = None,
        return_trajectory: bool = False,
    ) -> "Result":
        """The videos of B prompts with their references, as one batch.

        What is None is as the model folder's `SamplingConfig` says. For the released weights: 81 frames, 480 x 832 pixels,
        40 steps of "unipc", guidance 5, shift 3, layout "v2", mask mode "region", Wan's negative prompt.

        Args:
            prompts: One per video. Their number is part of the compiled shape.
            references: The images of each video; an empty list for none.
            negative_prompt: What guidance leads away from.
            num_frames: Of the whole clip; the first `drop_frames` show the canvas and are not in the result.
            height: In pixels.
            width: In pixels.
            num_inference_steps: Solver steps.
            guidance_scale: 1 is without guidance, at half the work.
            flow_shift: Above 1, more steps are spent near noise.
            solver: "unipc", "dpm++" or "euler".
            layout: Of the canvas, "v1" or "v2".
            layout_order: `layout_order[b][k]` is the index in `canvas.layout_cells` of the block that reference k of
                video b goes into. None draws the order from the seed.
            seed: Video b is a function of the seed and b, whatever else is in the batch.
            initial_noise: In place of noise drawn from the seed.
            mask_mode: "region" marks the references in the DiT's mask, "full" the whole first frame.
            subjects: `subjects[b][k]` are the words of reference k in prompt b, or None.
            on_step: Called with the index of each finished solver step. Another function means another compilation.
            return_trajectory: Also return the latents after every step; a compilation of its own.

        Raises:
            ValueError: an option or a case that this model cannot take, or lists of different lengths.
        """
        given = {"references": references, "layout_order": layout_order, "subjects": subjects}
        for name, values in given.items():
            if values is not None and len(values) != len(prompts):
                raise ValueError(f"{name} has {len(values)} entries for {len(prompts)} prompts; give one each.")
        requests = [
            Request(
                prompt,
                images=references[index],
                subjects=() if subjects is None else subjects[index],
                seed=seed,
                order=None if layout_order is None else _order(layout_order[index], len(references[index])),
                key=str(index),
            )
            for index, prompt in enumerate(prompts)
        ]
        sampling = {
            "negative_prompt": negative_prompt,
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "flow_shift": flow_shift,
            "solver": solver,
            "layout": layout,
            "mask_mode": mask_mode,
        }
        return generate(
            self,
            requests,
            initial_noise=initial_noise,
            on_step=on_step,
            return_trajectory=return_trajectory,
            **{name: value for name, value in sampling.items() if value is not None},
        )


def _order(blocks: Sequence[int] | None, num_references: int) -> tuple[int | None, ...] | None:
    """From the block of each reference to the reference of each block, which `Request.order` is."""
    if blocks is None:
        return None
    reference_of = {int(block): reference for reference, block in enumerate(blocks)}
    if not len(reference_of) == len(blocks) == num_references or min(reference_of, default=0) < 0:
        raise ValueError(
            f"layout_order has {tuple(blocks)} for {num_references} references; must hold a block of its own for each."
        )
    return tuple(reference_of.get(block) for block in range(max(reference_of, default=-1) + 1))


def load(
    folder: str | pathlib.Path,
    mesh: Mesh | None = None,
    *,
    verify: bool = True,
    loras: Sequence[tuple[Lora | str | pathlib.Path, float]] = (),
) -> Model:
    """Reads a model folder; parameters come in the dtype they are stored in, straight to the devices of `mesh`.

    `loras` are files, or what `read_lora` made of them, with their strengths; they are merged into the transformer.

    Raises:
        FileNotFoundError: the folder, or a part of it, is missing.
        ValueError: a file is damaged, or parameters or a LoRA do not fit the config.
    """
    folder = pathlib.Path(folder)
    config = load_model_config(folder)
    abstract = abstract_params(config)
    found = [
        (lora if isinstance(lora, Lora) else read_lora(lora, config.dit, abstract["dit"]), strength)
        for lora, strength in loras
    ]
    if mesh is not None:
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            _param_shardings(mesh, abstract),
        )
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > config.text_encoder.vocab_size:  # the lookup would return NaN
        raise ValueError(
            f"{folder / 'tokenizer'} has {len(tokenizer)} tokens, more than text_encoder.vocab_size="
            f"{config.text_encoder.vocab_size}."
        )
    config, params = restore_model(folder, abstract, verify=verify)
    if found:
        params["dit"] = apply_loras(params["dit"], found, donate=True)
    return Model(config, params, tokenizer, mesh)


def load_tokenizer(folder: pathlib.Path) -> Any:
    if not (folder / "tokenizer").is_dir():  # transformers would take a missing folder for the name of a download
        raise FileNotFoundError(f"{folder / 'tokenizer'} does not exist; expected the files of a tokenizer there.")
    return transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


def _param_shardings(mesh: Mesh, params: dict[str, Params]) -> dict[str, Params]:
    return {name: param_shardings(mesh, tree, PARAM_SPECS[name]) for name, tree in params.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One video to make. `subjects[i]` are the words of reference i in the prompt, or None.

    Noise is a function of (seed, key). So is the order of the references on the canvas, unless it is given.
    """

    prompt: str
    images: Sequence[Image.Image] = ()
    subjects: Sequence[Subject | str | None] = ()
    seed: int = 0
    order: canvas.Order | None = None
    key: str = ""  # the name of this video among others of the same seed


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """A finished video, and the case it answers."""

    frames: UInt8[np.ndarray, "F H W 3"]  # without the leading frames that show the canvas
    case: Case


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """The finished videos of one batch: as arrays, or one by one when iterated over."""

    frames: UInt8[np.ndarray, "B F H W 3"]  # without the leading frames that show the canvas
    latents: Float32[np.ndarray, "B f h w C"]  # normalised, of all frames: what the VAE decodes
    cases: tuple[Case, ...]
    trajectory: Float32[np.ndarray, "N B f h w C"] | None = None  # the latents after every step, if asked for

    @property
    def canvas(self) -> UInt8[np.ndarray, "B H W 3"]:
        return np.stack([case.canvas.image for case in self.cases])

    @property
    def region_mask(self) -> Float32[np.ndarray, "B f h w 4"]:
        """The mask channels of the DiT input."""
        return np.stack([case.region_mask for case in self.cases])

    def __iter__(self) -> Iterator[Video]:
        return map(Video, self.frames, self.cases)


def _digest(request: Request) -> bytes:
    return hashlib.sha256(f"{request.seed}/{request.key}".encode()).digest()


def with_sampling(config: ModelConfig, **overrides: Any) -> ModelConfig:
    """The config with some of its `SamplingConfig` fields replaced.

    Raises:
        ValueError: an unknown field, or a value that this model cannot take.
    """
    known = [field.name for field in dataclasses.fields(config.sampling)]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a sampling option; there are {', '.join(known)}.")
    sampling = dataclasses.replace(config.sampling, **overrides)
    check_size(config, sampling.num_frames, sampling.height, sampling.width)
    if sampling.num_frames <= config.drop_frames:
        raise ValueError(
            f"num_frames={sampling.num_frames} leaves no video: the first {config.drop_frames} frames of this model show "
            "the canvas and are dropped."
        )
    make_schedule(sampling.solver, sampling.num_inference_steps, sampling.flow_shift)
    if not math.isfinite(sampling.guidance_scale):
        raise ValueError(f"guidance_scale={sampling.guidance_scale} must be a finite number.")
    for name, allowed in (("layout", canvas.LIMITS), ("mask_mode", MODES)):
        if getattr(sampling, name) not in allowed:
            raise ValueError(f"{name}={getattr(sampling, name)!r} is unknown; choose from {', '.join(allowed)}.")
    return dataclasses.replace(config, sampling=sampling)


def prepare(config: ModelConfig, tokenizer: Any, request: Request) -> Case:
    """The case of a request, on the host and without parameters: a request that passes here can be generated.

    Raises:
        ValueError: references that the model or the layout cannot take, or words that are not in the prompt.
    """
    if request.images and not takes_references(config):
        raise ValueError(f"{len(request.images)} reference images given, but this is a text-to-video model.")
    order = request.order
    return prepare_case(
        config,
        tokenizer,
        request.prompt,
        request.images,
        request.subjects,
        num_frames=config.sampling.num_frames,
        height=config.sampling.height,
        width=config.sampling.width,
        order=int.from_bytes(_digest(request)[8:12], "big") if order is None else order,
    )


@functools.partial(jax.jit, static_argnames="shape")
def _normal(key: Array, shape: tuple[int, ...]) -> Float32[Array, "f h w C"]:
    return jax.random.normal(key, shape)


def draw_noise(config: ModelConfig, request: Request) -> Float32[np.ndarray, "f h w C"]:
    """Unit normal latents: the same for this (seed, key, size) in any batch, on any number of devices."""
    # Not under the sampling program, where the compiler might fuse and round it differently for every batch size.
    words = jnp.asarray(np.frombuffer(_digest(request)[:8], ">u4").astype(np.uint32))
    with jax.threefry_partitionable(True):
        return np.asarray(_normal(jax.random.wrap_key_data(words, impl="threefry2x32"), _latent_shape(config)))


def _latent_shape(config: ModelConfig) -> tuple[int, ...]:
    sampling, stride = config.sampling, config.vae.spatial_stride
    num_latent_frames = config.vae.num_latent_frames(sampling.num_frames)
    return num_latent_frames, sampling.height // stride, sampling.width // stride, config.vae.latent_channels


@functools.partial(jax.jit, static_argnames=("config", "on_step", "return_trajectory"))
def _sample(
    params: dict[str, Params],
    arrays: dict[str, Array],
    negative: tuple[Int32[Array, "1 T"], Int32[Array, "1 T"]],
    noise: Float[Array, "B f h w C"],
    *,
    config: ModelConfig,
    on_step: Callable[[int], None] | None,
    return_trajectory: bool,
) -> tuple[UInt8[Array, "B F H W 3"], Float32[Array, "B f h w C"], Float32[Array, "N B f h w C"] | None]:
    """From prepared cases to frames, latents and trajectory, one program: encoders, solver loop, decoder."""
    sampling = config.sampling
    networks = encoders(config, params)
    conditioning = encode_cases(networks, arrays, sampling.num_frames)
    guidance = guidance_branches(sampling.guidance_scale)
    branches = {"conditional": conditioning}
    if "unconditional" in guidance:
        text = encode_text(networks, *negative)
        branches["unconditional"] = dataclasses.replace(
            conditioning,
            text_embeddings=jnp.broadcast_to(text, conditioning.text_embeddings.shape),
            subject_tokens=None,
            subject_regions=None,
        )
    latents = denoise(
        {name: velocity_fn(config, params["dit"], branch) for name, branch in branches.items()},
        noise,
        make_schedule(sampling.solver, sampling.num_inference_steps, sampling.flow_shift),
        solver=sampling.solver,
        guidance=guidance,
        on_step=on_step,
        return_trajectory=return_trajectory,
    )
    trajectory = latents if return_trajectory else None
    latents = latents if trajectory is None else trajectory[-1]
    frames = to_uint8(decode(config, params["vae"], latents)[:, config.drop_frames :])
    return jnp.asarray(frames), latents, trajectory


def generate(
    model: Model,
    requests: Sequence[Request],
    *,
    initial_noise: Float[np.ndarray, "B f h w C"] | None = None,
    on_step: Callable[[int], None] | None = None,
    return_trajectory: bool = False,
    **overrides: Any,
) -> Result:
    """The videos of the requests, as one batch: `Model.generate` with a seed, an order and a key for each.

    With a mesh, the number of requests is rounded up to what the mesh divides. `overrides` are fields of `SamplingConfig`.

    Raises:
        ValueError: an option or a request that this model cannot take, no request, or noise of a wrong shape.
    """
    config = with_sampling(model.config, **overrides)
    if not requests:
        raise ValueError("There is no video to make: the batch is empty.")
    cases = [prepare(config, model.tokenizer, request) for request in requests]
    if initial_noise is None:
        noise = [draw_noise(config, request) for request in requests]
    elif np.shape(initial_noise) == (expected := (len(requests), *_latent_shape(config))):
        noise = list(np.asarray(initial_noise, np.float32))
    else:
        raise ValueError(f"initial_noise has shape {np.shape(initial_noise)}, expected {expected}.")
    padding = -len(requests) % batch_multiple(model.mesh)
    batch = (stack_cases(cases + cases[-1:] * padding), np.stack(noise + noise[-1:] * padding))
    params = model.params
    if model.mesh is not None:
        batch = jax.device_put(batch, batch_sharding(model.mesh))
        params = jax.device_put(params, _param_shardings(model.mesh, params))
    negative = prepare(config, model.tokenizer, Request(config.sampling.negative_prompt))
    text = (negative.token_ids[None], negative.attention_mask[None])
    # The text is an argument of the program already; as a part of the config it would ask for another compilation.
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, negative_prompt=""))
    frames, latents, trajectory = _sample(
        params, batch[0], text, batch[1], config=config, on_step=on_step, return_trajectory=return_trajectory
    )
    return Result(
        frames=np.asarray(frames)[: len(requests)],
        latents=np.asarray(latents)[: len(requests)],
        cases=tuple(cases),
        trajectory=None if trajectory is None else np.asarray(trajectory)[:, : len(requests)],
    )
