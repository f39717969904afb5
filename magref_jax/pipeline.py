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
import importlib
import math
import os
import pathlib
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8
from PIL import Image

from magref_jax import arguments
from magref_jax.checkpoint import NETWORKS, Params, restore_model
from magref_jax.command import check_devices
from magref_jax.conditioning import canvas
from magref_jax.conditioning.case import (
    Case,
    Encoders,
    check_size,
    encode_cases,
    encode_text,
    prepare_case,
    stack_cases,
    tokenize,
)
from magref_jax.conditioning.inputs import (
    Conditioning,
    canvas_frames,
    concatenate_channels,
    concatenate_tokens,
    drop_references,
    drop_text,
)
from magref_jax.conditioning.subjects import Subject, clean_prompt
from magref_jax.config import (
    DType,
    ImageEncoderConfig,
    ModelConfig,
    SamplingConfig,
    conform,
    conform_fields,
    load_model_config,
    with_dtype,
)
from magref_jax.convert.lora import Lora, apply_loras, read_lora
from magref_jax.descriptions import describe, short_repr
from magref_jax.diffusion.flow import make_schedule
from magref_jax.diffusion.sampling import (
    FINITE,
    PlanArrays,
    SamplingState,
    VelocityFn,
    advance,
    check_plan,
    guidance_branches,
    plan_arrays,
    start,
)
from magref_jax.diffusion.step_cache import StepPlan
from magref_jax.distributed import check_equal, on_host
from magref_jax.images import WHITE
from magref_jax.models import vae
from magref_jax.models.dit import Context, DiT, SubjectInjection, encode_context
from magref_jax.models.image_encoder import ImageEncoder, preprocess
from magref_jax.models.layers import LORA
from magref_jax.models.text_encoder import TextEncoder
from magref_jax.sharding import PARAM_SPECS, batch_multiple, constrain_batch, on_mesh, param_shardings, shard_batch
from magref_jax.video import to_uint8

Picture = Image.Image | np.ndarray | Array | str | os.PathLike[str] | Any  # and tensors; see `arguments.picture_of`

# Pixels of a clip from which on the VAE works through it piece by piece. Below, one pass is faster and its memory small.
STREAM_PIXELS = 2**20


def abstract_params(config: ModelConfig, only: Collection[str] = NETWORKS) -> dict[str, Params]:
    """Shapes and dtypes of all parameters, by network, without making any."""
    return jax.eval_shape(functools.partial(init_params, config, only=only), jax.random.key(0))


def init_params(config: ModelConfig, key: jax.Array, only: Collection[str] = NETWORKS) -> dict[str, Params]:
    """Random parameters of every network of the config. Call it inside `jax.jit`."""
    cfg, image = config.dit, config.image_encoder
    rows, columns = cfg.patch_size[1:]
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    latents = zeros((1, cfg.patch_size[0], rows, columns, cfg.in_channels))
    text_embeddings = zeros((1, cfg.text_len, cfg.text_dim))
    image_embeddings = None if cfg.image_dim is None else zeros((1, 1, cfg.image_dim))
    tokens = jnp.zeros((1, 2), jnp.int32)
    size = 2 * config.vae.spatial_stride
    frames = zeros((1, 1 + config.vae.temporal_stride, size, size, 3))
    noise = zeros((1, 2, 2, 2, config.vae.latent_channels))
    networks: dict[str, tuple[nn.Module, tuple[Array | None, ...]]] = {
        "dit": (DiT(cfg), (latents, zeros((1,)), text_embeddings, image_embeddings)),
        "vae": (vae.VAE(config.vae), (frames, noise)),
        "text_encoder": (TextEncoder(config.text_encoder), (tokens, tokens)),
    }
    if image is not None:
        networks["image_encoder"] = ImageEncoder(image), (zeros((1, image.image_size, image.image_size, 3)),)
    keys = dict(zip(NETWORKS, jax.random.split(key, len(NETWORKS)), strict=True))
    params = {
        name: module.init(keys[name], *inputs)["params"] for name, (module, inputs) in networks.items() if name in only
    }
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)  # also of layers that leave the dtype to JAX


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
    """Whether the DiT sees the canvas; a text-to-video model does not."""
    return config.reference_concat == "token" or config.dit.in_channels > config.vae.latent_channels


def decode(
    config: ModelConfig,
    vae_params: Params,
    latents: Float[Array, "B f h w C"],
    finish: Callable[[Array], Any] | None = None,
) -> Any:
    """Frames [B F H W 3] in [-1, 1] of normalised latents, or what `finish` makes of them, piece by piece if they are many."""
    _, frames, rows, columns, _ = latents.shape
    strides = config.vae.temporal_stride, config.vae.spatial_stride, config.vae.spatial_stride
    large = _is_large([size * stride for size, stride in zip((frames, rows, columns), strides, strict=True)])
    return (vae.decode_stream if large else vae.decode)(config.vae, vae_params, latents, finish)


def _is_large(sizes: Sequence[int]) -> bool:
    return math.prod(sizes) > STREAM_PIXELS


def velocity_fn(
    config: ModelConfig,
    dit_params: Params,
    conditioning: Conditioning,
    frame_positions: Sequence[int] | None = None,
    context: Context | None = None,
    lora: Params | None = None,
) -> VelocityFn:
    """The DiT as a function of noisy latents and timesteps.

    Fewer text tokens than the model's `text_len` end with one that stands for all the padding. `context` is what
    `encode_context` made of the conditioning's text and image. `lora` see `models.adapters`.
    """
    variables = {"params": dit_params} if lora is None else {"params": dit_params, LORA: lora}
    padding_repeats = config.dit.text_len - conditioning.text_embeddings.shape[1] + 1

    def velocity(latents: jax.Array, timesteps: jax.Array) -> jax.Array:
        subjects = None
        if conditioning.subject_tokens is not None and conditioning.subject_regions is not None:
            subjects = SubjectInjection(conditioning.subject_tokens, conditioning.subject_regions)
        by_token, positions = config.reference_concat == "token", frame_positions
        if by_token:
            latents, timesteps, positions = concatenate_tokens(latents, timesteps, conditioning, positions)
        else:
            latents = concatenate_channels(latents, conditioning)
        output = DiT(config.dit).apply(
            variables,
            latents,
            timesteps,
            conditioning.text_embeddings if context is None else None,
            conditioning.image_embeddings if context is None else None,
            context=context,
            padding_repeats=padding_repeats,
            subjects=subjects,
            subject_alpha=config.subject_alpha,
            frame_positions=positions,
        )
        return output[:, 1:] if by_token else output

    return velocity


@short_repr
@dataclasses.dataclass(frozen=True)
class Model:
    """A model folder in memory; see `load`."""

    config: ModelConfig
    params: dict[str, Params]
    tokenizer: Any
    mesh: Mesh | None = None  # where to compute; the first device if not given

    def generate(
        self,
        prompts: str | Sequence[str],
        references: Picture | Sequence[Picture] | Sequence[Sequence[Picture] | None] | None = None,
        negative_prompt: str | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        reference_guidance_scale: float | None = None,
        flow_shift: float | None = None,
        solver: str | None = None,
        layout: str | None = None,
        layout_order: Sequence[int] | Sequence[Sequence[int] | None] | None = None,
        seed: int = 3407,
        initial_noise: Float[np.ndarray, "B f h w C"] | None = None,
        *,
        mask_mode: str | None = None,
        subjects: Sequence[Subject | str | None] | Sequence[Sequence[Subject | str | None] | None] | None = None,
        on_step: Callable[[int], None] | None = None,
        return_trajectory: bool = False,
        step_plan: StepPlan | None = None,
    ) -> "Result":
        """The videos of B prompts with their references, as one batch; of one prompt, a text alone will do.

        What is None is as the model folder's `SamplingConfig` says. For the released weights: 81 frames, 480 x 832 pixels,
        40 steps of "unipc", guidance 5, shift 3, layout "v2", mask mode "region", Wan's negative prompt.

        Args:
            prompts: One per video. Their number is part of the compiled shape.
            references: The pictures of each video, an empty list for none; of a single video the pictures alone will do.
                PIL images, paths, or arrays and tensors: [H W 3], [H W 4] with alpha, [3 H W], [4 H W] or [H W], uint8 or
                floats from 0 to 1.
            negative_prompt: What guidance leads away from.
            num_frames: Of the whole clip; the first `drop_frames` show the canvas and are not in the result.
            height: In pixels.
            width: In pixels.
            num_inference_steps: Solver steps.
            guidance_scale: Toward the prompt; 1 is without guidance, at half the work.
            reference_guidance_scale: Toward the references. 1 is without; the same as `guidance_scale` guides toward both at
                once; any other number is half as much work again.
            flow_shift: Above 1, more steps are spent near noise.
            solver: "unipc", "dpm++" or "euler".
            layout: Of the canvas, "v1" or "v2".
            layout_order: `layout_order[b][k]` is the index in `canvas.layout_cells` of the block that reference k of
                video b goes into. None draws the order from the seed.
            seed: Video b is a function of the seed and b, whatever else is in the batch.
            initial_noise: In place of noise drawn from the seed.
            mask_mode: "region" marks the references in the DiT's mask, "full" the whole first frame.
            subjects: `subjects[b][k]` are the words of reference k in prompt b, or None; of a single video a list will do.
            on_step: Called with the index of each finished solver step.
            return_trajectory: Also return the latents and the velocity after every step.
            step_plan: In which steps the network is not evaluated; see `magref_jax.diffusion.step_cache`.

        Raises:
            ValueError: an option or a case that this model cannot take, or lists of different lengths.
        """
        texts = arguments.text_list(prompts, "prompts")
        count = None if isinstance(prompts, str) else len(texts)

        def lists(name: str, values: Any, what: str, is_entry: Callable[[Any], bool]) -> list[Any]:
            per_video = None if values is None else arguments.per_video(values, name, count, what, is_entry)
            return per_video or [None] * len(texts)

        pictures = [
            [arguments.picture_of(value, f"references[{b}][{k}]") for k, value in enumerate(of_video or ())]
            for b, of_video in enumerate(lists("references", references, arguments.PICTURES, arguments.is_picture))
        ]
        words = lists(
            "subjects", subjects, "words of the prompt, or None", lambda x: x is None or isinstance(x, str | Subject)
        )
        orders = lists("layout_order", layout_order, "blocks", lambda x: isinstance(x, int | np.integer))
        requests = [
            Request(
                prompt,
                images=pictures[index],
                subjects=words[index] or (),
                seed=seed,
                order=_order(orders[index], len(pictures[index]), f"layout_order[{index}]"),
                key=str(index),
            )
            for index, prompt in enumerate(texts)
        ]
        sampling: dict[str, Any] = {
            "negative_prompt": negative_prompt,
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "reference_guidance_scale": reference_guidance_scale,
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
            step_plan=step_plan,
            **{name: value for name, value in sampling.items() if value is not None},
        )


def _order(blocks: Sequence[int] | None, num_references: int, name: str) -> tuple[int | None, ...] | None:
    """From the block of each reference to the reference of each block, which `Request.order` is."""
    if blocks is None:
        return None
    blocks = [conform(int, block, f"{name}[{k}]") for k, block in enumerate(blocks)]
    reference_of = {block: reference for reference, block in enumerate(blocks)}
    if not len(reference_of) == len(blocks) == num_references or min(reference_of, default=0) < 0:
        raise ValueError(
            f"layout_order has {tuple(blocks)} for {num_references} references; must hold a block of its own for each."
        )
    return tuple(reference_of.get(block) for block in range(max(reference_of, default=-1) + 1))


def load(
    folder: str | pathlib.Path,
    mesh: Mesh | None = None,
    *,
    dtype: DType | None = None,
    verify: bool = True,
    loras: Sequence[tuple[Lora | str | pathlib.Path, float]] = (),
) -> Model:
    """Reads a model folder; parameters come in the dtype they are stored in, straight to the devices of `mesh`.

    `dtype` is what all networks compute in; None is what the folder's config says of each. `loras` are files, or what
    `read_lora` made of them, with their strengths; they are merged into the transformer.

    Raises:
        FileNotFoundError: the folder, or a part of it, is missing.
        ValueError: an unknown dtype, a damaged file, or parameters or a LoRA that do not fit the config.
    """
    folder = pathlib.Path(arguments.path_of(folder, "folder"))
    arguments.one_of(mesh, "mesh", Mesh, "a jax.sharding.Mesh, such as sharding.make_mesh('fsdp=2') makes")
    verify = conform(bool, verify, "verify")
    pairs = [
        _lora_and_strength(i, pair) for i, pair in enumerate(arguments.list_of(loras, "loras", "(file, strength)"))
    ]
    config = with_dtype(load_model_config(folder), dtype)
    check_devices()
    abstract = place_params(mesh, abstract_params(config))
    found = [
        (lora if isinstance(lora, Lora) else read_lora(lora, config.dit, abstract["dit"]), strength)
        for lora, strength in pairs
    ]
    tokenizer = load_tokenizer(folder, config)
    _, params = restore_model(folder, abstract, verify=verify)
    if found:
        params["dit"] = apply_loras(params["dit"], found, donate=True)
    return Model(config, params, tokenizer, mesh)


def _lora_and_strength(index: int, pair: Any) -> tuple[Lora | pathlib.Path, float]:
    name = f"loras[{index}]"
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(f"{name}={describe(pair)} must be a pair, of a file and a strength.")
    lora, strength = pair
    file = lora if isinstance(lora, Lora) else pathlib.Path(arguments.path_of(lora, f"{name}[0]"))
    return file, conform(float, strength, f"{name}[1]")


def load_tokenizer(folder: pathlib.Path, config: ModelConfig | None = None) -> Any:
    """The tokenizer of a model folder, for the text encoder of `config`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its files cannot be read, or it has more tokens than the text encoder.
    """
    path = folder / "tokenizer"
    if not path.is_dir():  # transformers would take a missing folder for the name of a download
        raise FileNotFoundError(f"{path} does not exist; expected the files of a tokenizer there.")
    transformers = import_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # of whatever type the library that reads the damaged file has for it
        raise ValueError(f"{path} holds no tokenizer that can be read: {str(error).splitlines()[0]}") from None
    if config is not None and len(tokenizer) > config.text_encoder.vocab_size:  # the lookup would return NaN
        raise ValueError(
            f"{path} has {len(tokenizer)} tokens, more than text_encoder.vocab_size={config.text_encoder.vocab_size}."
        )
    return tokenizer


def import_transformers() -> types.ModuleType:
    """The library, without its advice that there is no PyTorch, which nothing here needs."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # what the library itself asks before it gives advice
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return importlib.import_module("transformers")
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def place_params(mesh: Mesh | None, abstract: dict[str, Params]) -> dict[str, Params]:
    """Shapes and dtypes of parameters with where a mesh holds them."""
    if mesh is None:
        return abstract
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        _param_shardings(mesh, abstract),
    )


def _param_shardings(mesh: Mesh, params: dict[str, Params]) -> dict[str, Params]:
    return {name: param_shardings(mesh, tree, PARAM_SPECS[name]) for name, tree in params.items()}


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One video to make. `subjects[i]` are the words of reference i in the prompt, or None.

    Noise is a function of (seed, key). So is the order of the references on the canvas, unless it is given. `roles` see
    `canvas.compose_canvas`.
    """

    prompt: str
    images: Sequence[Image.Image] = ()  # or of what else `arguments.picture_of` takes
    subjects: Sequence[Subject | str | None] = ()
    seed: int = 0
    order: canvas.Order | None = None
    key: str = ""  # the name of this video among others of the same seed
    roles: Sequence[canvas.Role] = ()
    negative_prompt: str | None = None  # that of the sampling options if None

    def __post_init__(self) -> None:
        checked = {
            "prompt": conform(str, self.prompt, "prompt"),
            "images": tuple(
                arguments.picture_of(image, f"images[{i}]")
                for i, image in enumerate(arguments.list_of(self.images, "images", arguments.PICTURES))
            ),
            "subjects": tuple(
                arguments.one_of(subject, f"subjects[{i}]", (str, Subject), "words of the prompt, or a Subject")
                for i, subject in enumerate(
                    arguments.list_of(self.subjects, "subjects", "words of the prompt, or None")
                )
            ),
            "seed": arguments.seed_of(self.seed),
            "order": arguments.order_of(self.order, "order"),
            "key": conform(str, self.key, "key"),
            "roles": tuple(arguments.list_of(self.roles, "roles", "'subject' or 'background'")),
            "negative_prompt": conform(str | None, self.negative_prompt, "negative_prompt"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """A finished video, and the case it answers. `failure` says why the frames mean nothing, if they do not."""

    frames: UInt8[np.ndarray, "F H W 3"]  # without the leading frames that show the canvas
    case: Case
    failure: str | None = None


@short_repr
@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """The finished videos of one batch: as arrays, or one by one when iterated over."""

    frames: UInt8[np.ndarray, "B F H W 3"]  # without the leading frames that show the canvas
    latents: Float32[np.ndarray, "B f h w C"]  # normalised, of all frames: what the VAE decodes
    cases: tuple[Case, ...]
    failures: tuple[str | None, ...]  # where NaN or infinity appeared first; None for a good video
    trajectory: Float32[np.ndarray, "N B f h w C"] | None = None  # the latents after every step, if asked for
    velocities: Float32[np.ndarray, "N B f h w C"] | None = None  # guided, of every step, if asked for

    @property
    def canvas(self) -> UInt8[np.ndarray, "B H W 3"]:
        return np.stack([case.canvas.image for case in self.cases])

    @property
    def region_mask(self) -> Float32[np.ndarray, "B f h w 4"]:
        """The mask channels of the DiT input."""
        return np.stack([case.region_mask for case in self.cases])

    def __iter__(self) -> Iterator[Video]:
        return map(Video, self.frames, self.cases, self.failures)


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
    sampling = conform_fields(dataclasses.replace(config.sampling, **overrides))
    config.check()
    check_size(config, sampling.num_frames, sampling.height, sampling.width)
    if sampling.num_frames <= config.drop_frames:
        raise ValueError(
            f"num_frames={sampling.num_frames} leaves no video: the first {config.drop_frames} frames of this model show "
            "the canvas and are dropped."
        )
    make_schedule(sampling.solver, sampling.num_inference_steps, sampling.flow_shift)
    if "blank" in guidance(dataclasses.replace(config, sampling=sampling)) and not takes_references(config):
        raise ValueError(
            f"reference_guidance_scale={sampling.reference_guidance_scale} must be 1: this is a text-to-video model."
        )
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
        roles=request.roles,
    )


@functools.partial(jax.jit, static_argnames="shape")
def _normal(key: Array, shape: tuple[int, ...]) -> Float32[Array, "f h w C"]:
    return jax.random.normal(key, shape, jnp.float32)


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


TEXT_BUCKET = 64  # tokens; prompts of different lengths share a compilation


def count_text_tokens(config: ModelConfig, lengths: Iterable[int]) -> int:
    """How many text tokens the DiT must see for prompts of these lengths, in tokens, the last standing for the padding."""
    needed = max(lengths, default=0) + 1
    return min(-(-needed // TEXT_BUCKET) * TEXT_BUCKET, config.dit.text_len)


@short_repr
@struct.dataclass
class DiTInputs:
    """What every step reads besides noise and time, of K·B samples: the branches of guidance one after the other."""

    conditioning: Conditioning
    context: Context


def guidance(config: ModelConfig) -> dict[str, float]:
    """The weight of every branch that a step computes."""
    return guidance_branches(config.sampling.guidance_scale, config.sampling.reference_guidance_scale)


def _static(config: ModelConfig, mesh: Mesh | None) -> dict[str, dict[str, Any]]:
    """The static arguments of each program: no sampling option that it does not depend on, which would be another compilation."""

    def only(*names: str) -> ModelConfig:
        kept = {name: getattr(config.sampling, name) for name in names}
        return dataclasses.replace(config, sampling=SamplingConfig(**kept), fps=1.0)

    loop = only("solver", "num_inference_steps", "flow_shift", "guidance_scale", "reference_guidance_scale")
    return {
        "encode": {"config": only("num_frames", "solver"), "branches": tuple(guidance(config)), "mesh": mesh},
        "advance": {"config": loop, "mesh": mesh},
        "decode": {"config": only(), "mesh": mesh},
    }


@functools.partial(jax.jit, static_argnames=("config", "branches", "mesh"))
def _encode(
    params: dict[str, Params],
    arrays: dict[str, Array],
    noise: Float[Array, "B f h w C"],
    *,
    config: ModelConfig,
    branches: tuple[str, ...],
    mesh: Mesh | None,
) -> tuple[DiTInputs, SamplingState, dict[str, Bool[Array, "B"]]]:
    """What the DiT reads of prepared cases, the state to begin with, and whether each part is finite, per case."""
    networks = encoders(config, params)
    negative = {name: arrays.pop(f"negative_{name}") for name in ("token_ids", "attention_mask")}
    with on_mesh(mesh):
        conditioning = encode_cases(networks, arrays, config.sampling.num_frames)
        made = {"conditional": conditioning}
        nobody = jnp.zeros(len(noise), bool)
        if "unconditional" in branches or "blank" in branches:
            null_text = encode_text(networks, negative["token_ids"], negative["attention_mask"])
            made["unconditional"] = drop_text(conditioning, nobody, null_text)
        if "blank" in branches:
            white = jnp.full((1, *arrays["canvas"].shape[1:]), WHITE, jnp.uint8)
            frames = canvas_frames(white, config.sampling.num_frames)
            image_embeddings = None if networks.image is None else networks.image(frames[:, 0])[0]
            made["blank"] = drop_references(made["unconditional"], nobody, networks.frames(frames)[0], image_embeddings)
        chosen = [made[name] for name in branches]
    finite = {
        name: jnp.stack([_is_finite(getattr(branch, name)) for branch in chosen]).all(axis=0)
        for name in ("text_embeddings", "image_embeddings", "reference_latents")
        if getattr(conditioning, name) is not None
    }
    stacked = constrain_batch(mesh, jax.tree.map(lambda *parts: jnp.concatenate(parts), *chosen))
    with on_mesh(mesh):
        context = encode_context(config.dit, params["dit"], stacked.text_embeddings, stacked.image_embeddings)
    state = constrain_batch(mesh, start(noise, config.sampling.solver))
    return DiTInputs(stacked, context), state, finite


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _advance(
    dit_params: Params,
    inputs: DiTInputs,
    state: SamplingState,
    stop: Int32[Array, ""],
    step_plan: PlanArrays | None,
    *,
    config: ModelConfig,
    mesh: Mesh | None,
) -> SamplingState:
    """The solver's steps until `stop`, all branches of guidance in one batch."""
    sampling = config.sampling
    network = velocity_fn(config, dit_params, inputs.conditioning, context=inputs.context)
    with on_mesh(mesh):
        state = advance(
            lambda latents, timesteps: network(constrain_batch(mesh, latents), timesteps),
            state,
            make_schedule(sampling.solver, sampling.num_inference_steps, sampling.flow_shift),
            stop,
            solver=sampling.solver,
            guidance=guidance(config),
            step_plan=step_plan,
        )
    # As it came: the next call is to find the program of this one.
    return constrain_batch(mesh, state)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _decode(
    vae_params: Params, latents: Float[Array, "B f h w C"], *, config: ModelConfig, mesh: Mesh | None
) -> tuple[UInt8[Array, "B F H W 3"], Bool[Array, "B"]]:
    """The frames of a clip, without those that show the canvas, and whether all of a clip's values were finite."""

    def finish(frames: Array) -> tuple[Array, Array]:
        return jnp.asarray(to_uint8(frames)), jnp.isfinite(frames).all(axis=(2, 3, 4))

    with on_mesh(mesh):
        frames, is_finite = decode(config, vae_params, latents, finish)
    return frames[:, config.drop_frames :], is_finite.all(axis=1)


def _is_finite(values: Float[Array, "B *rest"]) -> Bool[Array, "B"]:
    return jnp.isfinite(values).all(axis=tuple(range(1, values.ndim)))


def _prepare_batch(
    config: ModelConfig,
    tokenizer: Any,
    requests: Sequence[Request],
    initial_noise: Float[np.ndarray, "B f h w C"] | None,
    mesh: Mesh | None,
    batch_size: int | None,
    text_tokens: int | None,
) -> tuple[list[Case], dict[str, Array], Float32[Array, "B f h w C"]]:
    """The cases, and the arrays and the noise of a batch that is filled up with the last of them."""
    if not requests:
        raise ValueError("There is no video to make: the batch is empty.")
    cases = [prepare(config, tokenizer, request) for request in requests]
    default = config.sampling.negative_prompt
    texts = [default if request.negative_prompt is None else request.negative_prompt for request in requests]
    negatives = [tokenize(config, tokenizer, clean_prompt(text)) for text in texts]
    needed = count_text_tokens(
        config,
        [
            *(int(case.attention_mask.sum()) for case in cases),
            *(int(text["attention_mask"].sum()) for text in negatives),
        ],
    )
    text_tokens = arguments.count_of(text_tokens, "text_tokens") or needed
    if not needed <= text_tokens <= config.dit.text_len:
        raise ValueError(f"text_tokens={text_tokens} must be {needed} to {config.dit.text_len} for these prompts.")
    if initial_noise is None:
        noise = [draw_noise(config, request) for request in requests]
    else:
        given, expected = arguments.array_of(initial_noise, "initial_noise"), (len(requests), *_latent_shape(config))
        if given.shape != expected:
            raise ValueError(f"initial_noise has shape {given.shape}, expected {expected}.")
        if not jax.dtypes.issubdtype(given.dtype, np.floating):
            raise ValueError(f"initial_noise has dtype {given.dtype}, expected floats.")
        noise = list(given.astype(np.float32))

    rows = max(len(requests), arguments.count_of(batch_size, "batch_size") or 1)
    rows += -rows % batch_multiple(mesh, len(guidance(config)))
    chosen = [min(row, len(requests) - 1) for row in range(rows)]
    arrays = stack_cases([cases[row] for row in chosen])
    for name in ("token_ids", "attention_mask"):
        arrays[f"negative_{name}"] = np.stack([negatives[row][name] for row in chosen])
    for name in ("token_ids", "attention_mask", "subject_tokens", "negative_token_ids", "negative_attention_mask"):
        arrays[name] = arrays[name][..., :text_tokens]
    stacked = np.stack([noise[row] for row in chosen])
    check_equal("what a batch is made of", (arrays, stacked))
    return cases, *shard_batch(mesh, (arrays, stacked))


def lower(
    config: ModelConfig,
    tokenizer: Any,
    params: dict[str, Params],
    request: Request,
    *,
    mesh: Mesh | None = None,
    batch_size: int = 1,
    text_tokens: int | None = None,
    step_plan: StepPlan | None = None,
) -> dict[str, jax.stages.Lowered]:
    """The programs that `generate` would run for requests of this size; `params` may be shapes and dtypes alone."""
    _, arrays, noise = _prepare_batch(config, tokenizer, [request], None, mesh, batch_size, text_tokens)
    static, plan, step = _static(config, mesh), plan_arrays(step_plan), np.int32(1)
    encode = functools.partial(_encode, **static["encode"])
    inputs, state, _ = jax.eval_shape(encode, params, arrays, noise)
    return {
        "encoding": _encode.lower(params, arrays, noise, **static["encode"]),
        "sampling": _advance.lower(params["dit"], inputs, state, step, plan, **static["advance"]),
        "decoding": _decode.lower(params["vae"], state.latents, **static["decode"]),
    }


def generate(
    model: Model,
    requests: Request | Sequence[Request],
    *,
    initial_noise: Float[np.ndarray, "B f h w C"] | None = None,
    on_step: Callable[[int], None] | None = None,
    return_trajectory: bool = False,
    step_plan: StepPlan | None = None,
    batch_size: int | None = None,
    text_tokens: int | None = None,
    **overrides: Any,
) -> Result:
    """The videos of one or more requests, as one batch: `Model.generate` with a seed, an order and a key for each.

    Requests of one size share one compilation, if `text_tokens` is the same (see `count_text_tokens`; by default as many as
    these requests need). A batch of fewer than `batch_size` is filled up, and so is one that the mesh does not divide.
    `overrides` are fields of `SamplingConfig`. A video in which NaN appears does not touch the others; see `Result.failures`.

    Raises:
        ValueError: an option or a request that this model cannot take, no request, or noise of a wrong shape.
    """
    requests = [requests] if isinstance(requests, Request) else arguments.list_of(requests, "requests", "Requests")
    for i, request in enumerate(requests):
        if not isinstance(request, Request):
            raise ValueError(f"requests[{i}]={describe(request)} must be a Request.")
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step={describe(on_step)} must be a function of the step's index, or None.")
    return_trajectory = conform(bool, return_trajectory, "return_trajectory")
    config = with_sampling(model.config, **overrides)
    arguments.one_of(step_plan, "step_plan", StepPlan, "a StepPlan")
    check_plan(step_plan, config.sampling.num_inference_steps)
    cases, arrays, noise = _prepare_batch(
        config, model.tokenizer, requests, initial_noise, model.mesh, batch_size, text_tokens
    )
    params, mesh = model.params, model.mesh
    if mesh is not None:
        params = jax.device_put(params, _param_shardings(mesh, params))

    static = _static(config, mesh)
    inputs, state, finite = _encode(params, arrays, noise, **static["encode"])
    num_steps, plan = config.sampling.num_inference_steps, plan_arrays(step_plan)
    trajectory, velocities, previous = [], [], state
    for step in range(num_steps):
        state = _advance(params["dit"], inputs, state, np.int32(step + 1), plan, **static["advance"])
        if return_trajectory:
            trajectory.append(on_host(state.latents)[: len(requests)])
            velocities.append(on_host(state.velocity)[: len(requests)])
        # The device has this step in its queue while the host waits for the one before.
        if step and _report(previous, step - 1, on_step):
            break
        previous = state
    else:
        _report(state, num_steps - 1, on_step)
    frames, frames_are_finite = _decode(params["vae"], state.latents, **static["decode"])

    failures: list[str | None] = [None] * len(requests)
    failed_step = on_host(state.failed_step)
    checks = {f"the {name.replace('_', ' ')} are not finite": ~on_host(ok) for name, ok in finite.items()}
    checks |= {
        f"the latents are not finite after step {step + 1} of {num_steps}": failed_step == step
        for step in sorted({int(step) for step in failed_step} - {FINITE})
    }
    checks["the decoded frames are not finite"] = ~on_host(frames_are_finite)
    for failure, has_failed in checks.items():
        failures = [earlier or (failure if has_failed[row] else None) for row, earlier in enumerate(failures)]
    return Result(
        frames=on_host(frames)[: len(requests)],
        latents=on_host(state.latents)[: len(requests)],
        cases=tuple(cases),
        failures=tuple(failures),
        trajectory=np.stack(trajectory) if return_trajectory else None,
        velocities=np.stack(velocities) if return_trajectory else None,
    )


def _report(state: SamplingState, step: int, on_step: Callable[[int], None] | None) -> bool:
    """Waits for a step and reports it; whether there is no sample left to go on with."""
    has_failed = on_host(state.failed_step) != FINITE
    if on_step is not None:
        on_step(step)
    return bool(has_failed.all())
