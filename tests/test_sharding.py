"""The mesh and the tables: every parameter has one place, and a cut model computes what a whole one does."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from magref_jax import pipeline
from magref_jax.config import DiTConfig, ModelConfig
from magref_jax.models.adapters import LoraConfig, init_lora
from magref_jax.models.dit import DiT, SubjectInjection
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


def test_one_device_computes_nothing_that_is_for_many():
    alone = dit_program(None)
    assert dit_program(make_mesh("", jax.devices()[:1])) == alone
    on_many = dit_program(make_mesh("fsdp=2,context=2,tensor=2"))
    for operation in ("sharding_constraint", "shard_map"):
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
