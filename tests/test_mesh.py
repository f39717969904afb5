"""Whatever the mesh, the training step and the sampler compute what one device does, and the devices share the work."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from magref_jax import pipeline
from magref_jax.conditioning.inputs import Conditioning
from magref_jax.config import ModelConfig, VAEConfig
from magref_jax.models import vae
from magref_jax.models.dit import DiT, SubjectInjection
from magref_jax.sharding import MESH_AXES, PARAM_SPECS, make_mesh, on_mesh, param_shardings, param_specs, shard_batch
from magref_jax.training.config import ObjectiveConfig
from magref_jax.training.objective import Batch, Null, flow_matching
from magref_jax.training.step import init_state, state_shardings, train_step
from tests.tiny_model import CONFIG, model_folder, picture, random_params  # noqa: F401

# Four heads: with context=8 or tensor=4 there are too few of them for Ulysses alone, and for tensor=8 altogether.
MODEL = dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, dim=48, num_heads=4, text_len=8, remat="block"))
DIT = MODEL.dit
BATCH, LATENTS = 8, (3, 2, 6)  # nine tokens: no mesh divides them
# Optimising what runs once in a millisecond takes seconds.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

MESHES = [
    ",".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True) if size > 1)
    for sizes in itertools.product((1, 2, 4, 8), repeat=4)
    if math.prod(sizes) == 8
]
# The one where XLA went wrong when left to itself, and three axes; all of them below.
SOME = ["data=2,fsdp=2,tensor=2", "fsdp=2,context=2,tensor=2"]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@functools.cache
def batch() -> Batch:
    rng = np.random.default_rng(0)
    conditioning = Conditioning(
        text_embeddings=normal(rng, BATCH, DIT.text_len, DIT.text_dim),
        image_embeddings=normal(rng, BATCH, 5, DIT.image_dim),
        reference_latents=normal(rng, BATCH, *LATENTS, 16),
        region_mask=normal(rng, BATCH, *LATENTS, 4),
        subject_tokens=np.ones((BATCH, 2, DIT.text_len), np.float32),
        subject_regions=np.tile(np.eye(2, 3, dtype=np.float32), (BATCH, 1, 1)),
    )
    cells = (rng.random((BATCH, *LATENTS)) < 0.5).astype(np.float32)
    return Batch(normal(rng, BATCH, *LATENTS, 16), cells, conditioning, (0, 2, 5))


@functools.cache
def null() -> Null:
    rng = np.random.default_rng(1)
    texts, image = normal(rng, DIT.text_len, DIT.text_dim), normal(rng, 5, DIT.image_dim)
    return Null(texts, normal(rng, 6, *LATENTS[1:], 16), image)


def velocity_loss(mesh, params, frozen, batch, keys):
    """A level of noise of its own for every frame. The velocity itself is among the sums."""
    timesteps = jnp.linspace(0, 1000, BATCH * LATENTS[0]).reshape(BATCH, LATENTS[0])
    with on_mesh(mesh):
        velocity = pipeline.velocity_fn(MODEL, params, batch.conditioning, batch.frame_positions)(
            batch.clean_latents, timesteps
        )
    one = jnp.ones(())
    return {"loss": (jnp.sum(velocity * batch.clean_latents), one), "velocity": (velocity, one)}


def training_loss(mesh, params, frozen, batch, keys):
    objective = ObjectiveConfig(text_dropout=0.3, reference_dropout=0.3, injection_dropout=0.3)
    with on_mesh(mesh):
        return flow_matching(MODEL, objective, params, None, frozen, batch, keys)


def run_step(loss, spec: str | None, parts: int = 1) -> tuple[dict, dict]:
    """Gradients of all parameters, and what the step measures."""
    mesh = None if spec is None else make_mesh(spec)
    params = random_params(MODEL)["dit"]
    optimizer = optax.trace(0.0)  # its state is the gradient
    state = init_state(params, optimizer, jax.random.key(0))
    shardings = None
    if mesh is not None:
        shardings = state_shardings(mesh, jax.eval_shape(lambda: state), optimizer, PARAM_SPECS["dit"])
        state = jax.device_put(state, shardings)
    step = jax.jit(
        functools.partial(train_step, functools.partial(loss, mesh), optimizer, 0.9, parts),
        out_shardings=shardings and (shardings, None),
        compiler_options=FAST,
    )
    state, metrics = step(state, null(), shard_batch(mesh, batch()))
    return jax.tree.map(np.asarray, (state.optimizer_state.trace, metrics))


@functools.cache
def on_one_device(loss) -> tuple[dict, dict]:
    return run_step(loss, None)


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def assert_step_is_that_of_one_device(spec: str) -> tuple[float, float]:
    gradients, metrics = run_step(velocity_loss, spec)
    expected_gradients, expected_metrics = on_one_device(velocity_loss)
    forward = distance(metrics["velocity"], expected_metrics["velocity"])
    backward = max(jax.tree.leaves(jax.tree.map(distance, gradients, expected_gradients)))
    print(f"{spec}: forward {forward:.1e}, gradients {backward:.1e}")
    assert forward <= 1e-5
    assert backward <= 1e-4
    return forward, backward


@pytest.mark.parametrize("spec", SOME)
def test_step_is_that_of_one_device(spec: str):
    assert_step_is_that_of_one_device(spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", MESHES)
def test_step_is_that_of_one_device_on_every_mesh(spec: str):
    assert_step_is_that_of_one_device(spec)


@pytest.mark.slow
def test_noise_dropout_and_parts_of_a_batch_do_not_depend_on_the_mesh():
    gradients, metrics = run_step(training_loss, "data=2,context=2,tensor=2", parts=2)
    expected_gradients, expected_metrics = on_one_device(training_loss)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    assert max(jax.tree.leaves(jax.tree.map(distance, gradients, expected_gradients))) <= 1e-4


def sample(model: pipeline.Model, spec: str | None) -> np.ndarray:
    model = dataclasses.replace(model, mesh=None if spec is None else make_mesh(spec))
    red = picture((200, 30, 30))
    requests = [pipeline.Request("the red apple", [red], ["red apple"], key=str(i)) for i in range(2)]
    return pipeline.generate(model, requests, num_inference_steps=2).latents


SAMPLER_MESHES = ["data=2,context=4", "fsdp=2,context=2,tensor=2", "context=8"]


@pytest.mark.parametrize(
    "spec", [SAMPLER_MESHES[0], *(pytest.param(spec, marks=pytest.mark.slow) for spec in SAMPLER_MESHES[1:])]
)
def test_sampler_is_that_of_one_device(model_folder, spec: str):  # noqa: F811
    model = pipeline.load(model_folder)
    expected = sample(model, None)
    assert distance(sample(model, spec), expected) <= 1e-5


LONG = (4, 32, 32)  # latents of 1024 tokens, more than there are numbers in any parameter of a layer


@functools.cache
def compiled_step(spec: str) -> str:
    """Forward and backward of the DiT as XLA compiles it for one device of a mesh."""
    mesh = make_mesh(spec)
    cfg = dataclasses.replace(DIT, attention="blockwise")

    def abstract(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))

    frame_tokens = LONG[1] * LONG[2] // 4
    inputs = {
        "latents": abstract(4, *LONG, cfg.in_channels),
        "timesteps": abstract(4, LONG[0]),
        "text_embeddings": abstract(4, cfg.text_len, cfg.text_dim),
        "image_embeddings": abstract(4, 5, cfg.image_dim),
        "subjects": SubjectInjection(abstract(4, 2, cfg.text_len), abstract(4, 2, frame_tokens)),
    }
    params = pipeline.place_params(mesh, pipeline.abstract_params(MODEL, only=("dit",)))["dit"]

    def loss(params, inputs):
        with on_mesh(mesh):
            out = DiT(cfg).apply({"params": params}, **inputs, subject_alpha=1.0)
        return jnp.mean(jnp.square(out))

    return jax.jit(jax.grad(loss)).lower(params, inputs).compile(compiler_options=FAST).as_text()


def gathered_sizes(program: str, where: str = "") -> list[int]:
    """How many numbers each all-gather of a compiled program returns."""
    lines = [line for line in program.splitlines() if re.search(r" all-gather(-start)?\(", line) and where in line]
    shapes = [shape for line in lines for shape in re.findall(r"\w+\[([\d,]+)\]", line.split(" all-gather")[0])]
    return [math.prod(map(int, shape.split(","))) for shape in shapes]


# Ulysses; a ring, one head being on each device; heads that are cut as well.
@pytest.mark.parametrize("spec", ["fsdp=2,context=2,tensor=2", "context=2,tensor=4"])
def test_no_block_gathers_the_tokens_of_a_sample(spec: str):
    program, mesh = compiled_step(spec), make_mesh(spec).shape
    rows = 4 // (mesh["data"] * mesh["fsdp"])
    inside, anywhere = gathered_sizes(program, "blocks/"), gathered_sizes(program)
    assert inside, "nothing is gathered at all, so that this test sees nothing"
    # Not even the tokens that a device has: neither is their width gathered over `tensor`.
    share = rows * math.prod(LONG) // 4 // mesh["context"] * DIT.dim
    assert max(inside) < share
    assert max(anywhere) < share * mesh["context"]


@functools.cache
def full_size() -> dict:
    return pipeline.abstract_params(ModelConfig())


@pytest.mark.parametrize(
    "spec",
    [
        "fsdp=8",
        "fsdp=4,tensor=2",
        "fsdp=2,tensor=4",
        "data=2,fsdp=2,tensor=2",
        "tensor=8",
        "context=8",
        "fsdp=2,context=4",
    ],
)
def test_a_device_holds_its_share_of_the_released_model(spec: str):
    mesh, dit = make_mesh(spec), full_size()["dit"]
    shardings = param_shardings(mesh, dit, PARAM_SPECS["dit"])
    leaves = list(zip(jax.tree.leaves(dit), jax.tree.leaves(shardings), strict=True))
    held = sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in leaves)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf, _ in leaves)
    assert held <= 1.05 * total / (mesh.size / mesh.shape["data"])


@pytest.mark.parametrize("spec", ["fsdp=8", "fsdp=4,tensor=2", "tensor=8"])
@pytest.mark.parametrize("network", ["dit", "text_encoder", "image_encoder"])
def test_nothing_large_that_the_table_cuts_is_whole_on_every_device(network: str, spec: str):
    mesh = make_mesh(spec)
    specs = param_specs(full_size()[network], PARAM_SPECS[network])
    shardings = param_shardings(mesh, full_size()[network], PARAM_SPECS[network])

    def check(path, leaf, spec, sharding):
        is_meant = any(
            mesh.shape[axis] > 1 for names in spec if names for axis in ([names] if isinstance(names, str) else names)
        )
        if is_meant and leaf.size * leaf.dtype.itemsize > 2**20:
            assert sharding.shard_shape(leaf.shape) != leaf.shape, f"{path} of shape {leaf.shape} is on every device"

    jax.tree.map_with_path(check, full_size()[network], specs, shardings)


# Released strides: three times half the height and width, twice half the frames.
VAE = VAEConfig(base_dim=4, dim_multipliers=(1, 2, 2, 2), num_res_blocks=1, temporal_downsample=(False, True, True))
# Batch, frames, height, width. On eight devices each has one column, or row, of the latents; in "part" six columns of
# latents are for as many devices as divide them; with the samples of "many", it depends on the mesh what is cut.
CLIPS = {"wide": (2, 9, 16, 64), "high": (2, 5, 64, 16), "part": (1, 5, 16, 48), "many": (4, 5, 16, 32)}


@functools.cache
def vae_arrays(clip: str) -> tuple[dict, np.ndarray, np.ndarray]:
    """Parameters, frames, latents."""
    rng = np.random.default_rng(2)
    batch, frames, height, width = CLIPS[clip]
    latents = normal(rng, batch, VAE.num_latent_frames(frames), height // 8, width // 8, VAE.latent_channels)
    pixels = rng.uniform(-1, 1, (batch, frames, height, width, 3)).astype(np.float32)
    return random_params(dataclasses.replace(MODEL, vae=VAE))["vae"], pixels, latents


def vae_program(name: str, convolution: str, mesh, params, frames, latents):
    config = dataclasses.replace(VAE, convolution=convolution)

    def loss(params, frames, latents):
        reconstruction, mean, log_variance = vae.VAE(config).apply({"params": params}, frames, latents)
        return jnp.sum(jnp.sin(reconstruction)) + jnp.sum(jnp.square(mean)) + jnp.sum(log_variance)

    with on_mesh(mesh):
        if name == "gradients":
            return jax.grad(loss, argnums=(0, 1, 2))(params, frames, latents)
        return getattr(vae, name)(config, params, frames if name.startswith("encode") else latents)


def compile_vae(name: str, clip: str, spec: str | None, convolution: str = "3d"):
    """The program and its arguments, on the devices where the sampler and the training have them."""
    mesh, arrays = None if spec is None else make_mesh(spec), vae_arrays(clip)
    if mesh is not None:
        params = jax.device_put(arrays[0], NamedSharding(mesh, P()))
        arrays = params, *shard_batch(mesh, arrays[1:])
    program = jax.jit(functools.partial(vae_program, name, convolution, mesh))
    return program.lower(*arrays).compile(compiler_options=FAST), arrays


@functools.cache
def vae_on_one_device(name: str, clip: str, convolution: str = "3d"):
    program, arrays = compile_vae(name, clip, None, convolution)
    return program, jax.tree.map(np.asarray, program(*arrays))


def assert_vae_is_that_of_one_device(name: str, clip: str, spec: str, convolution: str, most: float) -> None:
    program, arrays = compile_vae(name, clip, spec, convolution)
    _, expected = vae_on_one_device(name, clip, convolution)
    worst = max(jax.tree.leaves(jax.tree.map(distance, program(*arrays), expected)))
    print(f"{name} {clip} {spec} {convolution}: {worst:.1e}")
    assert worst <= most


VAE_CASES = [
    ("context=8", "wide", "3d"),
    ("context=8", "part", "3d"),
    ("data=2,context=4", "high", "3d"),
    ("fsdp=2,context=2,tensor=2", "many", "3d"),
    ("fsdp=2,context=2,tensor=2", "high", "taps"),
    ("fsdp=8", "many", "taps"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "clip", "convolution"), VAE_CASES)
@pytest.mark.parametrize("name", ["encode", "decode", "encode_stream", "decode_stream"])
def test_vae_is_that_of_one_device(name: str, spec: str, clip: str, convolution: str):
    assert_vae_is_that_of_one_device(name, clip, spec, convolution, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "clip", "convolution"), VAE_CASES)
def test_gradients_of_the_vae_are_those_of_one_device(spec: str, clip: str, convolution: str):
    assert_vae_is_that_of_one_device("gradients", clip, spec, convolution, 1e-4)


# Every device has a share of all that there is; or, where it has all of six and of twelve columns, of the rest.
@pytest.mark.parametrize(
    ("clip", "columns", "most"), [("wide", 8, 1.5 / 8), pytest.param("part", 6, 0.5, marks=pytest.mark.slow)]
)
def test_devices_share_the_frames_that_the_vae_decodes(clip: str, columns: int, most: float):
    program, arrays = compile_vae("decode", clip, "context=8")
    alone, expected = vae_on_one_device("decode", clip)
    frames = program(*arrays)
    assert distance(frames, expected) <= 1e-5
    assert frames.sharding.shard_shape(frames.shape) == (*frames.shape[:3], columns, 3)
    # Frames are gathered nowhere but for the attention of the middle.
    text = program.as_text() or ""
    gathered = gathered_sizes(text)
    assert bool(gathered) == (clip == "wide")
    assert gathered == gathered_sizes(text, "attention")
    for measure in (
        lambda of: of.cost_analysis()["flops"],
        lambda of: of.memory_analysis().temp_size_in_bytes,
    ):
        assert measure(program) < most * measure(alone)
