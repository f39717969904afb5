"""The mesh and the tables: every parameter has one place, and a cut model computes what a whole one does."""

import dataclasses
import functools
import itertools
import math
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from magref_jax import pipeline
from magref_jax.config import DiTConfig, ModelConfig, VAEConfig
from magref_jax.models.adapters import LoraConfig, init_lora
from magref_jax.models.dit import DiT, SubjectInjection
from magref_jax.models.vae import VAE
from magref_jax.sharding import (
    MESH_AXES,
    PARAM_SPECS,
    activation_spec,
    batch_multiple,
    constrain,
    make_mesh,
    on_mesh,
    param_shardings,
    param_specs,
    shard_batch,
)


@functools.cache
def full_size():
    every_layer = LoraConfig(targets=".*")
    lora = jax.eval_shape(functools.partial(init_lora, ModelConfig().dit, every_layer), jax.random.key(0))
    return pipeline.abstract_params(ModelConfig()) | {"lora": lora}


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("data=8", (8, 1, 1, 1)),
        ("fsdp=2, tensor=4", (1, 2, 1, 4)),
        ("data=2,fsdp=-1", (2, 4, 1, 1)),
        ("tensor=1,context=2,fsdp=2,data=2", (2, 2, 2, 1)),
    ],
)
def test_mesh_has_all_four_axes_whatever_is_named(spec, sizes):
    mesh = make_mesh(spec)
    assert mesh.axis_names == MESH_AXES == ("data", "fsdp", "context", "tensor")
    assert tuple(mesh.shape.values()) == sizes
    assert mesh.axis_types == (AxisType.Auto,) * 4


def test_one_device_is_a_mesh_of_ones():
    assert tuple(make_mesh("", jax.devices()[:1]).shape.values()) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dat=8", "names the axis 'dat'; the axes are data, fsdp, context, tensor"),
        ("data=2,data=4", "names the axis 'data' twice"),
        ("data=2", r"means data=2, which does not use the 8 devices exactly once"),
        ("data=16", "does not use the 8 devices"),
        ("data=3,fsdp=-1", "does not use the 8 devices"),
        ("data=-1,fsdp=-1", "leaves both data and fsdp open"),
        ("data=0", "'data=0' must be AXIS=SIZE"),
        ("data=two", "'data=two' must be AXIS=SIZE"),
        ("data", "'data' must be AXIS=SIZE"),
        ("", "means 1 device, which does not use the 8 devices"),
    ],
)
def test_wrong_meshes_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(spec)


@pytest.mark.parametrize("network", PARAM_SPECS)
def test_every_parameter_of_the_released_model_has_exactly_one_spec(network):
    specs = param_specs(full_size()[network], PARAM_SPECS[network])
    assert len(jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))) == len(jax.tree.leaves(full_size()[network]))


@pytest.mark.parametrize("network", PARAM_SPECS)
def test_every_spec_of_a_table_is_used(network):
    for index, _ in enumerate(PARAM_SPECS[network]):
        fewer = PARAM_SPECS[network][:index] + PARAM_SPECS[network][index + 1 :]
        with pytest.raises(ValueError, match="must match exactly one sharding spec, it matches: none"):
            param_specs(full_size()[network], fewer)


def test_a_parameter_with_no_spec_or_two_is_named():
    params = {"blocks": {"up": {"kernel": jax.ShapeDtypeStruct((2, 4), jnp.float32)}}}
    with pytest.raises(ValueError, match="'blocks/up/kernel' must match exactly one sharding spec, it matches: none"):
        param_specs(params, ((r"up/kernel", P()),))
    with pytest.raises(ValueError, match=r"it matches: \.\*; blocks/\.\*"):
        param_specs(params, ((r".*", P()), (r"blocks/.*", P())))
    with pytest.raises(ValueError, match=r"'blocks/up/kernel' of shape \(2, 4\) has fewer dimensions"):
        param_specs(params, ((r".*", P(None, None, "fsdp")),))


@pytest.mark.parametrize("spec", ["fsdp=4,tensor=2", "context=8", "fsdp=2,context=4"])
def test_eight_devices_hold_an_eighth_of_the_released_model_each(spec):
    mesh = make_mesh(spec)
    total, held = 0, 0
    for network in ("dit", "text_encoder", "image_encoder"):
        shardings = param_shardings(mesh, full_size()[network], PARAM_SPECS[network])
        for leaf, sharding in zip(jax.tree.leaves(full_size()[network]), jax.tree.leaves(shardings), strict=True):
            total += leaf.size
            held += math.prod(sharding.shard_shape(leaf.shape))
    assert held / total < 1.02 / 8


def shares(network: str, spec: str) -> dict[str, tuple[int, ...]]:
    """Into how many shares each dimension of the parameters is cut."""
    shardings = param_shardings(make_mesh(spec), full_size()[network], PARAM_SPECS[network])
    flat, places = (flatten_dict(tree, sep="/") for tree in (full_size()[network], shardings))
    return {
        path: tuple(map(operator.floordiv, leaf.shape, places[path].shard_shape(leaf.shape)))
        for path, leaf in flat.items()
    }


@pytest.mark.parametrize("network", ["dit", "text_encoder", "image_encoder"])
def test_between_two_layers_of_a_block_nothing_is_exchanged(network):
    # Column-parallel, then row-parallel: arXiv:1909.08053 §3. Over fsdp it is the other dimension.
    wide = "query", "key", "value", "key_image", "value_image", "up", "gate"
    for path, (_, of_input, of_output) in (
        (path, cut) for path, cut in shares(network, "tensor=8").items() if re.fullmatch(r"blocks/.*/kernel", path)
    ):
        assert (of_input, of_output) == ((1, 8) if path.split("/")[-2] in wide else (8, 1)), path
    for path, (_, of_input, of_output) in (
        (path, cut) for path, cut in shares(network, "fsdp=8").items() if re.fullmatch(r"blocks/.*/kernel", path)
    ):
        assert (of_input, of_output) == ((8, 1) if path.split("/")[-2] in wide else (1, 8)), path


@pytest.mark.parametrize("spec", ["fsdp=4,tensor=2", "fsdp=2,context=4", "tensor=8"])
def test_an_adapter_is_cut_like_the_kernel_beside_it(spec):
    kernels, adapters = shares("dit", spec), shares("lora", spec)
    assert len(adapters) > 20
    for path, cut in adapters.items():
        *_, of_input, of_output = kernels[f"{path.rpartition('/')[0]}/kernel"]
        assert cut[-2:] == ((of_input, 1) if path.endswith("/a") else (1, of_output)), path


def test_a_dimension_is_cut_over_as_many_axes_as_divide_it():
    mesh = make_mesh("fsdp=4,tensor=2")
    shapes = {"up": (6, 10), "table": (3, 12), "whole": (6, 6), "both": (3, 16)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = ((r"up", P("fsdp", "tensor")), (r"table|whole|both", P(None, ("fsdp", "tensor"))))
    shardings = param_shardings(mesh, params, specs)
    assert shardings["up"].spec == P(None, "tensor")
    assert shardings["table"].spec == P(None, "fsdp")
    assert shardings["whole"].spec == P(None, None)
    assert shardings["both"].spec == P(None, ("fsdp", "tensor"))


def test_batch_is_cut_over_data_and_fsdp():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    assert batch_multiple(mesh) == 4
    assert batch_multiple(None) == 1
    # Two branches of guidance on four devices: two samples are a batch of four.
    assert [batch_multiple(mesh, branches) for branches in (1, 2, 3, 4, 8)] == [4, 2, 4, 1, 1]
    arrays = {"whole": np.zeros((6, 5)), "cut": np.zeros((8, 5, 3)), "scalar": np.zeros(())}
    placed = shard_batch(mesh, arrays)
    shapes = {name: array.sharding.shard_shape(array.shape) for name, array in placed.items()}
    assert shapes == {"whole": (6, 5), "cut": (2, 5, 3), "scalar": ()}
    layers = shard_batch(mesh, np.zeros((3, 8)), axis=1)
    assert layers.sharding.shard_shape(layers.shape) == (3, 2)
    assert shard_batch(None, arrays) is arrays


def test_activations_are_cut_by_the_names_of_their_dimensions():
    mesh = make_mesh("data=2,context=2,tensor=2").abstract_mesh
    names = ("batch", "tokens", "heads", "head_width")
    assert activation_spec(mesh, (4, 6, 4, 12), names) == P(("data", "fsdp"), "context", "tensor", None)
    # What does not divide stays whole.
    assert activation_spec(mesh, (3, 6, 5, 12), names) == P(None, "context", None, None)
    with pytest.raises(ValueError, match=r"shape \(4, 6, 4\) needs a name for each dimension, not batch, tokens"):
        activation_spec(mesh, (4, 6, 4), names)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((4, 8), P(("data", "fsdp"), ("context", "tensor"))),
        ((4, 6), P(("data", "fsdp"), "context")),
        ((4, 5), P(("data", "fsdp"), None)),
        # Two samples are not enough for data and fsdp, and one is not for either: their devices take a part of the frame.
        ((2, 16), P("data", ("context", "tensor", "fsdp"))),
        ((1, 16), P(None, ("context", "tensor", "fsdp", "data"))),
        ((1, 8), P(None, ("context", "tensor", "fsdp"))),
    ],
)
def test_frames_are_cut_over_the_axes_that_their_number_leaves(shape, spec):
    mesh = AbstractMesh((2, 2, 2, 2), MESH_AXES)
    assert activation_spec(mesh, shape, ("batch", "space")) == spec


def test_a_constrained_array_lies_as_its_names_say():
    mesh = make_mesh("fsdp=2,context=2,tensor=2")

    @jax.jit
    def twice(x):
        with on_mesh(mesh):
            return constrain(2 * x, "batch", "tokens", "hidden")

    out = twice(jax.device_put(np.ones((2, 4, 6), np.float32), NamedSharding(mesh, P())))
    assert out.sharding.shard_shape(out.shape) == (1, 2, 3)


@pytest.mark.parametrize("spec", [None, "context=8"])
def test_an_unknown_name_of_a_dimension_is_an_error_on_a_mesh_and_without(spec):
    with on_mesh(None if spec is None else make_mesh(spec)), pytest.raises(KeyError, match="tokes"):
        constrain(jnp.ones((8, 8)), "batch", "tokes")


def dit_program(mesh) -> str:
    config = DiTConfig(dim=8, ffn_dim=8, num_heads=2, num_layers=2, text_dim=4, text_len=3, image_dim=4, freq_dim=4)
    shapes = {
        "latents": (2, 2, 2, 2, 36),
        "timesteps": (2, 2),
        "text_embeddings": (2, 3, 4),
        "image_embeddings": (2, 5, 4),
    }
    inputs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    subjects = SubjectInjection(
        jax.ShapeDtypeStruct((2, 1, 3), jnp.float32), jax.ShapeDtypeStruct((2, 1, 1), jnp.float32)
    )

    def forward(key, inputs, subjects):
        with on_mesh(mesh):
            return DiT(config).init_with_output(key, **inputs, subjects=subjects, subject_alpha=1.0)

    return str(jax.make_jaxpr(forward)(jax.random.key(0), inputs, subjects))


def vae_program(mesh) -> str:
    config = VAEConfig(base_dim=4, dim_multipliers=(1, 1), num_res_blocks=1, temporal_downsample=(True,))
    frames = jax.ShapeDtypeStruct((1, 3, 8, 8, 3), jnp.float32)
    noise = jax.ShapeDtypeStruct((1, 2, 4, 4, 16), jnp.float32)

    def forward(key, frames, noise):
        with on_mesh(mesh):
            return VAE(config).init_with_output(key, frames, noise)

    return str(jax.make_jaxpr(forward)(jax.random.key(0), frames, noise))


@pytest.mark.parametrize(
    ("program", "operations"),
    [(dit_program, ("sharding_constraint", "shard_map")), (vae_program, ("sharding_constraint",))],
)
def test_one_device_computes_nothing_that_is_for_many(program, operations):
    alone = program(None)
    assert program(make_mesh("", jax.devices()[:1])) == alone
    on_many = program(make_mesh("fsdp=2,context=2,tensor=2"))
    for operation in operations:
        assert operation in on_many
        assert operation not in alone


def test_a_program_of_one_mesh_is_not_taken_for_another():
    @jax.jit
    def twice(x):
        return constrain(2 * x, "batch", "tokens")

    shapes = []
    for spec in ("data=8", "data=2,context=4", "data=8"):
        with jax.set_mesh(make_mesh(spec)):
            out = twice(jax.device_put(np.ones((8, 8)), NamedSharding(make_mesh(spec), P())))
        shapes.append(out.sharding.shard_shape(out.shape))
    assert shapes == [(1, 8), (4, 2), (1, 8)]


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX reads of a TPU: it is one of a slice of 2 x 2 chips, the host's number is that of the slice."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0

    @property
    def process_index(self):
        return self.slice_index

    @property
    def coords(self):
        return (self.id % 2, self.id // 2 % 2, 0)


def chips(*slices: int) -> list[Chip]:
    """Four chips of each of these slices, as they come from `jax.devices()`."""
    return [Chip(id, index) for id, index in enumerate(itertools.chain(*([index] * 4 for index in slices)))]


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize(
    ("spec", "slices"),
    [
        ("data=2,context=4", [[[0]], [[1]]]),
        ("data=4,tensor=2", [[[0]], [[0]], [[1]], [[1]]]),
        ("data=2,fsdp=2,context=2", [[[0], [0]], [[1], [1]]]),
        ("fsdp=-1", [[[0]] * 4 + [[1]] * 4]),
        ("fsdp=4,tensor=2", [[[0], [0], [1], [1]]]),
        # data does not divide four slices: fsdp goes over what is left of them.
        ("data=2,fsdp=4,tensor=2", [[[0], [0], [1], [1]], [[2], [2], [3], [3]]]),
        ("data=3,fsdp=2,context=2", [[[0], [0]], [[1], [1]], [[2], [2]]]),
        ("fsdp=3,context=4", [[[0], [1], [2]]]),
        # [data fsdp context]: neither of the two others is there.
        ("context=8", [[[0] * 4 + [1] * 4]]),
        ("context=2,tensor=4", [[[0, 1]]]),
    ],
)
def test_data_then_fsdp_then_context_go_over_slices(spec, slices, platform):
    number = 1 + max(itertools.chain(*itertools.chain(*slices)))
    devices = [dataclasses.replace(chip, platform=platform) for chip in chips(*range(number))]
    mesh = make_mesh(spec, devices[::-1])
    assert set(mesh.devices.flat) == set(devices)
    assert all(mesh.shape[axis] == int(size) for axis, size in re.findall(r"(\w+)=(\d+)", spec))
    found = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    # The slice is the same all along tensor, and along context where that is not named.
    np.testing.assert_array_equal(found, np.broadcast_to(np.array(slices)[..., None], found.shape))


def test_neighbours_within_a_slice_are_neighbours_on_its_torus():
    mesh = make_mesh("data=2,context=2,tensor=2", chips(0, 1))
    x, y = (np.vectorize(lambda chip, axis=axis: chip.coords[axis])(mesh.devices) for axis in range(2))
    # One link from each chip to the next, along context and along tensor.
    for axis in (2, 3):
        np.testing.assert_array_equal(np.abs(np.diff(x, axis=axis)) + np.abs(np.diff(y, axis=axis)), 1)


@pytest.mark.parametrize(
    ("spec", "slices", "message"),
    [
        (
            "tensor=8",
            (0, 1),
            r"mesh='tensor=8' does not fit 2 slices of 4 devices: .* context, here 1 x 1 x 1, a multiple",
        ),
        ("data=2,fsdp=2,tensor=3", (0, 1, 2), "does not fit 3 slices of 4 devices: .* tensor does not leave a slice"),
        ("data=4,fsdp=-1", (0, 0, 1), "does not fit 2 slices of 4 or 8 devices: they must be of one size"),
    ],
)
def test_a_mesh_that_would_cut_layers_between_slices_is_refused(spec, slices, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(spec, chips(*slices))
