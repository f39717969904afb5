"""Times the DiT and the VAE beside those of diffusers: same shapes, same weights, same cores, in turns.

    python -m magref_jax.benchmark                          # a CPU: 8 layers at 3,510 and 8,190 tokens, and the VAE
    python -m magref_jax.benchmark --preset 14b --part dit  # an accelerator: the full size at 81 frames of 480p

Every side is a process of its own, so that its peak memory is its own. On a CPU all of them live on the same `threads`
cores and run strictly one at a time, one call each in turn; on an accelerator one comes after the other, for want of memory.
Columns of the table:

    wall s       median of the calls after a first one, which compiles and is not counted
    busy s       on a CPU, median CPU seconds per core: what a neighbour on the machine changes least
    TFLOP/s      FLOPs of the matrix products (`dit_flops`) per busy second, or per wall second of an accelerator
    share        of the best rate that a large square product in the same dtype reaches there
    peak MiB     largest memory during those calls, of the accelerator, or on a CPU of the whole process
    difference   largest, from the first side, where both have the same weights
"""

import contextlib
import ctypes
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from magref_jax.command import check_local, check_output_folder, program
from magref_jax.config import DiTConfig, DType, VAEConfig
from magref_jax.convert.dit import dit_rules
from magref_jax.convert.rules import Rule, convert, torch_shapes
from magref_jax.convert.vae import vae_rules
from magref_jax.files import replacing
from magref_jax.models import vae
from magref_jax.models.attention import IMPLEMENTATIONS, automatic
from magref_jax.models.dit import DiT, context_flops, dit_flops, encode_context

Part = Literal["dit", "vae_encode", "vae_decode"]
Side = Literal["jax", "jax, economies", "torch"]

SMALL = DiTConfig(dim=512, ffn_dim=1408, num_heads=8, num_layers=8, dtype="float32")
IMAGE_TOKENS = 257  # of the CLIP tower
# Above this many parameters, the weights of each side are made on its device and not the same.
SHARED_PARAMETERS = 2**29


@dataclasses.dataclass(frozen=True)
class Preset:
    dit: DiTConfig
    latent_size: tuple[int, int]  # rows, columns
    tokens: tuple[int, ...]


PRESETS = {
    "tiny": Preset(SMALL, (30, 52), (3510, 8190)),  # 9 and 21 latent frames
    "14b": Preset(DiTConfig(), (60, 104), (32760,)),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    part: Literal["dit", "vae", "all"] = "all"
    preset: Literal["tiny", "14b"] = "tiny"
    tokens: tuple[int, ...] = ()  # of the video; the preset's if none are given
    vae_size: tuple[int, int, int] = (9, 96, 160)  # frames, height, width in pixels
    dtype: DType | None = None  # of the DiT; the preset's if not given
    attention: str = "auto"  # or a name in models.attention.IMPLEMENTATIONS
    convolution: Literal["3d", "taps"] | None = None  # of the VAE; chosen by platform if not given
    economies: bool = False  # also a step with keys and values of the context made before, and its padding as one token
    prompt_tokens: int = 128  # text tokens that are not padding
    repeats: int = 5
    threads: int = 1  # cores that either side has on a CPU
    no_torch: bool = False
    json: pathlib.Path | None = None

    def __post_init__(self) -> None:
        for name in ("repeats", "threads", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.attention not in ("auto", *IMPLEMENTATIONS):
            raise ValueError(f"attention={self.attention!r} is unknown; there are auto, {', '.join(IMPLEMENTATIONS)}.")
        preset = PRESETS[self.preset]
        if self.prompt_tokens >= preset.dit.text_len:
            raise ValueError(f"prompt_tokens={self.prompt_tokens} must be below text_len={preset.dit.text_len}.")
        per_frame = math.prod(preset.latent_size) // math.prod(preset.dit.patch_size)
        for tokens in self.tokens:
            if tokens < 1 or tokens % per_frame:
                raise ValueError(f"tokens={tokens} must be a multiple of {per_frame}, the tokens of a latent frame.")
        frames, *size = self.vae_size
        VAEConfig().num_latent_frames(frames)
        if any(pixels < 1 or pixels % VAEConfig().spatial_stride for pixels in size):
            raise ValueError(f"vae_size={self.vae_size} must have multiples of {VAEConfig().spatial_stride} pixels.")


@dataclasses.dataclass(frozen=True)
class Task:
    """What one side is to compute; goes to its process."""

    part: Part
    side: Side
    config: DiTConfig | VAEConfig
    size: tuple[int, int, int]  # latent frames, rows, columns of a DiT; frames, height, width of a VAE
    threads: int = 1
    prompt_tokens: int = 128
    convolution_is_chosen: bool = True  # if not, it is the platform's

    @property
    def label(self) -> str:
        frames, rows, columns = self.size
        if isinstance(self.config, DiTConfig):
            return f"DiT step, {num_tokens(self.config, self.size):,} tokens, {self.config.dtype}"
        return f"VAE {self.part.removeprefix('vae_')}, {frames} frames of {rows}x{columns}, {self.config.dtype}"


@dataclasses.dataclass(frozen=True)
class Start:
    """What a side says before its first call: the machine, and the choices that were left to it."""

    platform: str
    device: str
    choice: str
    matmul_peak: float | None  # FLOP/s


@dataclasses.dataclass(frozen=True)
class Measurement:
    task: Task
    start: Start
    wall: tuple[float, ...]  # seconds
    cpu: tuple[float, ...]  # seconds of all threads
    peak_bytes: int | None
    flops: float | None
    difference: float | None

    @property
    def busy(self) -> float:
        """Median seconds of the device, or of each of the cores."""
        on_cpu = self.start.platform == "cpu"
        return statistics.median(self.cpu) / self.task.threads if on_cpu else statistics.median(self.wall)


def num_tokens(config: DiTConfig, size: tuple[int, int, int]) -> int:
    return math.prod(size) // math.prod(config.patch_size)


def _flops(task: Task) -> int | None:
    config = task.config
    if not isinstance(config, DiTConfig):
        return None
    image_tokens = 0 if config.image_dim is None else IMAGE_TOKENS
    tokens = num_tokens(config, task.size)
    if task.side == "jax, economies":
        return dit_flops(config, tokens, task.prompt_tokens + 1 + image_tokens)
    once = context_flops(config, config.text_len, image_tokens)
    return dit_flops(config, tokens, config.text_len + image_tokens) + once


# What both sides are given


def _rules_and_params(config: DiTConfig | VAEConfig) -> tuple[Sequence[Rule], Any]:
    """Conversion rules for the names of diffusers, and abstract parameters."""
    if isinstance(config, DiTConfig):
        abstract = jax.eval_shape(
            DiT(config).init, jax.random.key(0), *_abstract(_dit_inputs(config, config.patch_size))
        )
        return dit_rules(config, "hf"), abstract["params"]
    frames = jax.ShapeDtypeStruct((1, 1, config.spatial_stride, config.spatial_stride, 3), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, 1, 1, 1, config.latent_channels), jnp.float32)
    return vae_rules(config, "hf"), jax.eval_shape(vae.VAE(config).init, jax.random.key(0), frames, latents)["params"]


def _abstract(arrays: Sequence[np.ndarray | None]) -> list[jax.ShapeDtypeStruct | None]:
    return [None if array is None else jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]


def random_weights(config: DiTConfig | VAEConfig) -> dict[str, np.ndarray]:
    """Float32 tensors under the names of diffusers, the same in every process; signals keep their size."""
    rules, abstract = _rules_and_params(config)
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in torch_shapes(rules, abstract).items():
        fan_in = math.prod(shape[1:])
        normal = rng.standard_normal(shape, np.float32)
        is_scale = fan_in == 1 and name.endswith(("weight", "gamma"))
        weights[name] = 1 + 0.1 * normal if is_scale else normal * (0.1 if fan_in == 1 else fan_in**-0.5)
    return weights


def _shares_weights(config: DiTConfig | VAEConfig) -> bool:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_rules_and_params(config)[1])) <= SHARED_PARAMETERS


def _dit_inputs(
    config: DiTConfig, size: tuple[int, int, int], prompt_tokens: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Latents, timesteps, text embeddings of which all but the first are padding, image embeddings."""
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((1, *size, config.in_channels), np.float32)
    text = rng.standard_normal((1, config.text_len, config.text_dim), np.float32)
    text[:, prompt_tokens:] = 0
    image = None if config.image_dim is None else rng.standard_normal((1, IMAGE_TOKENS, config.image_dim), np.float32)
    return latents, np.array([500.0], np.float32), text, image


def _vae_input(task: Task, config: VAEConfig) -> np.ndarray:
    """Frames to encode, or latents to decode."""
    frames, height, width = task.size
    rng = np.random.default_rng(1)
    if task.part == "vae_encode":
        return rng.uniform(-1, 1, (1, frames, height, width, 3)).astype(np.float32)
    stride = config.spatial_stride
    shape = (1, config.num_latent_frames(frames), height // stride, width // stride, config.latent_channels)
    return rng.standard_normal(shape, np.float32)


# A side


@dataclasses.dataclass(frozen=True)
class Call:
    """Computes once and returns when all is done."""

    function: Callable[[], Any]
    program_bytes: int | None = None  # what XLA has planned for arguments, results and all between

    def __call__(self) -> Any:
        return self.function()


def _for_platform(task: Task) -> Task:
    """With the names of what the platform chooses."""
    config = task.config
    if isinstance(config, DiTConfig) and config.attention == "auto":
        config = dataclasses.replace(config, attention=automatic(config.dtype))
    elif isinstance(config, VAEConfig) and not task.convolution_is_chosen:
        config = dataclasses.replace(config, convolution="taps" if jax.default_backend() == "cpu" else "3d")
    return dataclasses.replace(task, config=config)


def _jax_params(config: DiTConfig | VAEConfig) -> Any:
    rules, abstract = _rules_and_params(config)

    def stored(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_kernel = path[-1].key == "kernel"
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.dtype) if is_kernel else leaf.dtype)

    abstract = jax.tree_util.tree_map_with_path(stored, abstract)
    if _shares_weights(config):
        return jax.tree.map(jnp.asarray, convert(rules, random_weights(config), abstract))

    leaves, structure = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(structure, list(map(_on_device, keys, leaves)))


@functools.partial(jax.jit, static_argnums=1)
def _on_device(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Random values on the scale of `random_weights`, layer by layer: a stack of layers may be half of the memory."""
    if leaf.ndim > 2:
        layer = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return jax.lax.map(lambda key: _on_device(key, layer), jax.random.split(key, leaf.shape[0]))
    scale = leaf.shape[0] ** -0.5 if leaf.ndim == 2 else 0.1
    return jax.random.normal(key, leaf.shape, leaf.dtype) * jnp.asarray(scale, leaf.dtype)


def _compiled(function: Callable[..., jax.Array], *args: Any) -> Call:
    args = jax.tree.map(jnp.asarray, args)
    program = jax.jit(function).lower(*args).compile()
    memory = program.memory_analysis()
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return Call(lambda: program(*args).block_until_ready(), sum(getattr(memory, part, 0) for part in parts))


def _jax_dit(config: DiTConfig, task: Task) -> Call:
    params = _jax_params(config)
    latents, timesteps, text, image = _dit_inputs(config, task.size, task.prompt_tokens)
    if task.side == "jax":
        return _compiled(DiT(config).apply, {"params": params}, latents, timesteps, text, image)
    # The prompt and one token for all its padding; with a compilation of its own, as sampling does it.
    text = text[:, : task.prompt_tokens + 1]
    context = jax.jit(lambda *args: encode_context(config, *args))(params, text, image)
    padding_repeats = config.text_len - task.prompt_tokens

    def step(params: Any, latents: jax.Array, timesteps: jax.Array, context: Any) -> jax.Array:
        return DiT(config).apply(
            {"params": params}, latents, timesteps, context=context, padding_repeats=padding_repeats
        )

    return _compiled(step, params, latents, timesteps, context)


def _jax_vae(config: VAEConfig, task: Task) -> Call:
    stream = vae.encode_stream if task.part == "vae_encode" else vae.decode_stream
    return _compiled(lambda *args: stream(config, *args), _jax_params(config), _vae_input(task, config))


def _torch_call(function: Callable[[], Any], device: str, order: Sequence[int]) -> Call:
    import torch

    def call() -> np.ndarray:
        with torch.inference_mode():
            out = function()
        if device == "cuda":
            torch.cuda.synchronize()
        return out.permute(*order).float().cpu().numpy()

    return Call(call)


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _torch_weights(model: Any, config: DiTConfig | VAEConfig) -> None:
    import torch

    if _shares_weights(config):
        weights = {name: torch.from_numpy(array) for name, array in random_weights(config).items()}
        model.load_state_dict(weights, strict=True)


def _torch_dit(config: DiTConfig, task: Task) -> Call:
    import torch

    device, dtype = _torch_device(), getattr(torch, config.dtype)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = torch_dit(config).eval()
    torch.set_default_dtype(torch.float32)
    if importlib.util.find_spec("diffusers") is not None:
        _torch_weights(model, config)
    latents, *rest = _dit_inputs(config, task.size, task.prompt_tokens)
    latents = latents.transpose(0, 4, 1, 2, 3)
    inputs = [None if x is None else torch.from_numpy(x).to(device, dtype) for x in (latents, *rest)]
    return _torch_call(lambda: model(*inputs, return_dict=False)[0], device, (0, 2, 3, 4, 1))


def torch_dit(config: DiTConfig) -> Any:
    """The transformer of diffusers, or where it is not installed its blocks, written out."""
    if importlib.util.find_spec("diffusers") is None:
        return torch_blocks(config)
    import diffusers

    return diffusers.WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        image_dim=config.image_dim,
        added_kv_proj_dim=None if config.image_dim is None else config.dim,
    )


def torch_blocks(config: DiTConfig) -> Any:
    """A torch module with the blocks of the DiT, its embeddings of patches and context, and a plain projection behind.

    For timing only: it computes what the DiT does at the same cost, but for a time embedding and the modulation of the head.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    dim, heads = config.dim, config.num_heads

    def split(x: Any) -> Any:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    class Attention(nn.Module):
        def __init__(self, contexts: int) -> None:
            super().__init__()
            self.query, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.query_norm = nn.RMSNorm(dim, config.norm_eps)
            self.keys = nn.ModuleList(nn.Linear(dim, dim) for _ in range(contexts))
            self.values = nn.ModuleList(nn.Linear(dim, dim) for _ in range(contexts))
            self.key_norms = nn.ModuleList(nn.RMSNorm(dim, config.norm_eps) for _ in range(contexts))

        def forward(self, x: Any, contexts: Sequence[Any], rotations: Any = None) -> Any:
            query = split(self.query_norm(self.query(x)))
            outs = []
            for to_key, to_value, norm, context in zip(self.keys, self.values, self.key_norms, contexts, strict=True):
                key, value = split(norm(to_key(context))), split(to_value(context))
                if rotations is not None:
                    query, key = rotate(query, rotations), rotate(key, rotations)
                outs.append(functional.scaled_dot_product_attention(query, key, value))
            return self.out(sum(outs[1:], outs[0]).transpose(1, 2).flatten(2))

    def rotate(x: Any, rotations: Any) -> Any:
        real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rotations
        return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2).type_as(x)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attention = Attention(1)
            self.cross_attention = Attention(1 if config.image_dim is None else 2)
            self.cross_attention_norm = nn.LayerNorm(dim, config.norm_eps)
            self.norm = nn.LayerNorm(dim, config.norm_eps, elementwise_affine=False)
            self.up, self.down = nn.Linear(dim, config.ffn_dim), nn.Linear(config.ffn_dim, dim)
            self.modulation = nn.Parameter(0.1 * torch.randn(6, dim))

        def forward(self, x: Any, contexts: Sequence[Any], rotations: Any) -> Any:
            shift, scale, gate, shift_out, scale_out, gate_out = self.modulation
            y = self.norm(x) * (1 + scale) + shift
            x = x + self.self_attention(y, [y], rotations) * gate
            x = x + self.cross_attention(self.cross_attention_norm(x), contexts)
            y = self.norm(x) * (1 + scale_out) + shift_out
            return x + self.down(functional.gelu(self.up(y), approximate="tanh")) * gate_out

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            patch = config.patch_size
            self.patch = nn.Conv3d(config.in_channels, dim, patch, patch)
            self.text_in, self.text_out = nn.Linear(config.text_dim, dim), nn.Linear(dim, dim)
            if config.image_dim is not None:
                self.image_in = nn.Linear(config.image_dim, config.image_dim)
                self.image_out = nn.Linear(config.image_dim, dim)
            self.blocks = nn.ModuleList(Block() for _ in range(config.num_layers))
            self.out = nn.Linear(dim, config.out_channels * math.prod(patch))

        def forward(self, latents: Any, timesteps: Any, text: Any, image: Any, return_dict: bool = False) -> tuple[Any]:
            patches = self.patch(latents)
            x = patches.flatten(2).transpose(1, 2)
            angles = torch.outer(
                torch.arange(x.shape[1], device=x.device, dtype=torch.float32),
                config.rope_theta ** -torch.linspace(0, 1, config.head_dim // 2, device=x.device),
            )
            contexts = [self.text_out(functional.gelu(self.text_in(text)))]
            if image is not None:
                contexts.append(self.image_out(functional.gelu(self.image_in(image))))
            for block in self.blocks:
                x = block(x, contexts, (angles.cos(), angles.sin()))
            return (self.out(x).transpose(1, 2).unflatten(2, patches.shape[2:]),)

    return Blocks()


def torch_vae(config: VAEConfig) -> Any:
    """The autoencoder of diffusers."""
    import diffusers

    return diffusers.AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.latent_channels,
        dim_mult=list(config.dim_multipliers),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
    )


def _torch_vae(config: VAEConfig, task: Task) -> Call:
    import torch

    device = _torch_device()
    with torch.device(device):
        model = torch_vae(config).eval()
    _torch_weights(model, config)
    x = torch.from_numpy(_vae_input(task, config)).to(device).permute(0, 4, 1, 2, 3).contiguous()
    mean, std = (
        torch.tensor(values, device=device)[:, None, None, None] for values in (config.latent_mean, config.latent_std)
    )
    if task.part == "vae_encode":
        return _torch_call(lambda: (model.encode(x).latent_dist.mean - mean) / std, device, (0, 2, 3, 4, 1))
    return _torch_call(lambda: model.decode(x * std + mean).sample.clamp(-1, 1), device, (0, 2, 3, 4, 1))


def _call(task: Task) -> Call:
    is_torch = task.side == "torch"
    if isinstance(task.config, DiTConfig):
        return (_torch_dit if is_torch else _jax_dit)(task.config, task)
    return (_torch_vae if is_torch else _jax_vae)(task.config, task)


def matmul_peak(dtype: DType, size: int, threads: int, repeats: int = 5) -> float:
    """FLOP/s of the fastest of some products of two square matrices, in busy seconds."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32).astype(a.dtype))
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        product(a, a).block_until_ready()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        seconds.append(cpu / threads if jax.default_backend() == "cpu" else wall)
    return 2 * size**3 / min(seconds)


# The processes


class Memory:
    """Peak memory since `reset`, of the accelerator or else of the process; None where the system does not tell."""

    def __init__(self, is_torch: bool) -> None:
        self.on_device = _torch_device() == "cuda" if is_torch else jax.default_backend() != "cpu"
        self.is_torch = is_torch

    def reset(self) -> None:
        if self.on_device and self.is_torch:
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif os.access("/proc/self/clear_refs", os.W_OK):
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):  # what loading and compiling have left free goes back
                ctypes.CDLL(None).malloc_trim(0)
            pathlib.Path("/proc/self/clear_refs").write_text("5")

    def peak(self, call: Call) -> int | None:
        if not self.on_device:
            return _status("VmHWM")
        if not self.is_torch:  # the peak that the allocator remembers is that of making the weights
            return call.program_bytes
        import torch

        return torch.cuda.max_memory_allocated()


def _status(name: str) -> int | None:
    """A size in bytes that Linux tells about this process."""
    path = pathlib.Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _work(task: Task, connection: Connection) -> None:
    """The process of a side: says `Start`, computes once, and then as often as it is asked to."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if hasattr(os, "sched_setaffinity"):  # XLA has a thread for every core that it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.threads])
    is_torch = task.side == "torch"
    if is_torch:
        import torch

        torch.set_num_threads(task.threads)
        device = _torch_device()
        start = Start("cpu" if device == "cpu" else "gpu", device, "", None)
    else:
        task = _for_platform(task)
        kind, choice = jax.default_backend(), getattr(task.config, "attention", getattr(task.config, "convolution", ""))
        peak = matmul_peak(task.config.dtype, 1024 if kind == "cpu" else 8192, task.threads)
        start = Start(kind, jax.devices()[0].device_kind, choice, peak)
    memory = Memory(is_torch)
    connection.send(start)
    call = _call(task)
    connection.send(np.asarray(call()))
    memory.reset()
    while connection.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        connection.send((time.perf_counter() - wall, time.process_time() - cpu))
    connection.send(memory.peak(call))


class Process:
    """A side at work."""

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.task = task
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(task, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.start: Start = self._receive()
        self.first: np.ndarray = self._receive()
        self.seconds: list[tuple[float, float]] = []

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            raise RuntimeError(
                f"{self.task.label}: the process of {self.task.side} ended; see its message above."
            ) from None

    def call(self) -> None:
        self.connection.send(True)
        self.seconds.append(self._receive())

    def finish(self, expected: np.ndarray | None) -> Measurement:
        """Ends the process."""
        self.connection.send(False)
        peak = self._receive()
        self.process.join()
        is_comparable = expected is not None and expected is not self.first and _shares_weights(self.task.config)
        difference = float(np.max(np.abs(self.first - expected))) if is_comparable else None
        wall, cpu = zip(*self.seconds, strict=True)
        return Measurement(self.task, self.start, wall, cpu, peak, _flops(self.task), difference)


def measure(tasks: Sequence[Task], repeats: int) -> list[Measurement]:
    """One measurement per task, in turns on a CPU. The first is the one that the others are compared with."""
    processes = [Process(tasks[0])]
    expected = processes[0].first
    in_turns = processes[0].start.platform == "cpu"
    if in_turns:
        processes += [Process(task) for task in tasks[1:]]
    measurements = []
    for number in range(1 if in_turns else len(tasks)):
        group = processes if in_turns else [processes[0] if number == 0 else Process(tasks[number])]
        for _ in range(repeats):
            for process in group:
                process.call()
        measurements += [process.finish(expected) for process in group]
    return measurements


# The report


def tasks(arguments: Arguments) -> Iterator[list[Task]]:
    """The tasks to compare with each other."""
    preset = PRESETS[arguments.preset]
    with_torch = not arguments.no_torch and importlib.util.find_spec("torch") is not None
    threads, prompt_tokens = arguments.threads, arguments.prompt_tokens
    if arguments.part in ("dit", "all"):
        config = dataclasses.replace(preset.dit, dtype=arguments.dtype or preset.dit.dtype, remat="none")
        config = dataclasses.replace(config, attention=arguments.attention)
        sides = _sides(arguments.economies, with_torch)
        per_frame = math.prod(preset.latent_size) // math.prod(config.patch_size)
        for count in arguments.tokens or preset.tokens:
            size = (count // per_frame * config.patch_size[0], *preset.latent_size)
            yield [Task("dit", side, config, size, threads, prompt_tokens) for side in sides]
    if arguments.part in ("vae", "all"):
        config = VAEConfig() if arguments.convolution is None else VAEConfig(convolution=arguments.convolution)
        sides = _sides(False, with_torch and importlib.util.find_spec("diffusers") is not None)
        parts: tuple[Part, ...] = ("vae_encode", "vae_decode")
        for part in parts:
            chosen = arguments.convolution is not None
            yield [Task(part, side, config, arguments.vae_size, threads, prompt_tokens, chosen) for side in sides]


def _sides(economies: bool, torch: bool) -> list[Side]:
    there: dict[Side, bool] = {"jax": True, "jax, economies": economies, "torch": torch}
    return [side for side, is_there in there.items() if is_there]


COLUMNS = ("", "wall s", "busy s", "TFLOP/s", "share", "peak MiB", "difference")


def table(measurements: Sequence[Measurement]) -> str:
    """Markdown: one line per side, then the ratios to the first torch side."""
    peak = next((m.start.matmul_peak for m in measurements if m.start.matmul_peak), None)
    rows = []
    for m in measurements:
        rate = None if m.flops is None else m.flops / m.busy
        rows.append(
            (
                f"{m.task.side}, {m.start.choice}" if m.start.choice else m.task.side,
                f"{statistics.median(m.wall):.3f}",
                f"{m.busy:.3f}",
                "" if rate is None else f"{rate / 1e12:.3g}",
                "" if rate is None or peak is None else f"{rate / peak:.0%}",
                "" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:,.0f}",
                "" if m.difference is None else f"{m.difference:.1e}",
            )
        )
    lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, ("---",) * len(COLUMNS), *rows)]
    return "\n".join([measurements[0].task.label, "", *lines, *ratios(measurements)])


def ratios(measurements: Sequence[Measurement]) -> list[str]:
    """How each side compares with torch, below 1 where it needs less."""
    torch = next((m for m in measurements if m.task.side == "torch"), None)
    lines = []
    for m in measurements:
        if torch is None or m is torch:
            continue
        busy = [mine / theirs for mine, theirs in zip(_seconds(m), _seconds(torch), strict=True)]
        memory = f", memory {m.peak_bytes / torch.peak_bytes:.2f}" if m.peak_bytes and torch.peak_bytes else ""
        spread = f"{min(busy):.2f} to {max(busy):.2f}"
        lines.append(f"\n{m.task.side} / torch: time {m.busy / torch.busy:.2f} ({spread}){memory}")
    return lines


def _seconds(m: Measurement) -> tuple[float, ...]:
    return m.cpu if m.start.platform == "cpu" else m.wall


def environment() -> dict[str, str]:
    """Date, versions and processor, for the head of a report."""
    names = ("jax", "jaxlib", "flax", "torch", "diffusers")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **versions,
        "processor": f"{model}, {os.cpu_count()} cores",
        "load": load,
    }


def to_json(measurements: Sequence[Measurement]) -> list[Mapping[str, Any]]:
    return [{"label": m.task.label, **dataclasses.asdict(m)} for m in measurements]


def main() -> None:
    with program("benchmark"):
        run(tyro.cli(Arguments, description=__doc__))


def run(arguments: Arguments) -> None:
    """Measures what is asked for and prints it, and writes it where one says."""
    if arguments.json is not None:
        check_local("--json", arguments.json)
        check_output_folder("--json", arguments.json.parent)
    about = environment()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if importlib.util.find_spec("torch") is None and not arguments.no_torch:
        print("torch is not installed: nothing to compare with.")
    results = []
    for group in tasks(arguments):
        measurements = measure(group, arguments.repeats)
        device, peak = measurements[0].start.device, measurements[0].start.matmul_peak
        print(f"\n{table(measurements)}\n\n{device}: square products at {(peak or 0) / 1e12:.3g} TFLOP/s", flush=True)
        results += to_json(measurements)
    if arguments.json is not None:
        text = json.dumps({"environment": about, "command": sys.argv[1:], "measurements": results}, indent=1) + "\n"
        with replacing(arguments.json) as path:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
