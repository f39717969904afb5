"""The mechanism of conversion, on a table made for the test."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from magref_jax.convert.rules import (
    CONV2D,
    CONV3D,
    LINEAR,
    Rule,
    convert,
    dense,
    drop,
    norm,
    reshape,
    split,
    to_torch,
    torch_shapes,
)
from tests.parity.torch_random import random_tensors

RULES = (
    *dense("proj", "projection"),
    *norm("layers.{layer}.ln", "blocks/norm", bias=True),
    Rule("layers.{layer}.qkv.weight", ("blocks/query/kernel", "blocks/key/kernel"), split(2, LINEAR)),
    Rule("layers.{layer}.gamma", "blocks/gamma", reshape((5, 1, 1), (5,))),
    Rule("image.weight", "image/kernel", CONV2D),
    Rule("video.weight", "video/kernel", CONV3D),
    drop("unused.*"),
)
SHAPES = {
    "proj.weight": (4, 5),
    "proj.bias": (4,),
    "layers.0.ln.weight": (5,),
    "layers.0.ln.bias": (5,),
    "layers.0.qkv.weight": (6, 5),
    "layers.0.gamma": (5, 1, 1),
    "layers.1.ln.weight": (5,),
    "layers.1.ln.bias": (5,),
    "layers.1.qkv.weight": (6, 5),
    "layers.1.gamma": (5, 1, 1),
    "image.weight": (2, 3, 4, 5),
    "video.weight": (2, 3, 4, 5, 6),
}
FLAX_SHAPES = {
    "projection/kernel": (5, 4),
    "projection/bias": (4,),
    "blocks/norm/scale": (2, 5),
    "blocks/norm/bias": (2, 5),
    "blocks/query/kernel": (2, 5, 3),
    "blocks/key/kernel": (2, 5, 3),
    "blocks/gamma": (2, 5),
    "image/kernel": (4, 5, 3, 2),
    "video/kernel": (4, 5, 6, 3, 2),
}


def abstract(shapes: dict[str, tuple[int, ...]], dtype: str = "float32") -> Any:
    return traverse_util.unflatten_dict(
        {path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, shape in shapes.items()}, sep="/"
    )


def test_every_tensor_lands_in_its_slot_with_its_axes_changed():
    tensors = random_tensors(SHAPES)
    params = convert(RULES, tensors | {"unused.anything": np.zeros(3)}, abstract(FLAX_SHAPES))

    np.testing.assert_array_equal(params["projection"]["kernel"], tensors["proj.weight"].T)
    for layer in range(2):
        fused = tensors[f"layers.{layer}.qkv.weight"]
        np.testing.assert_array_equal(params["blocks"]["query"]["kernel"][layer], fused[:3].T)
        np.testing.assert_array_equal(params["blocks"]["key"]["kernel"][layer], fused[3:].T)
        np.testing.assert_array_equal(params["blocks"]["norm"]["scale"][layer], tensors[f"layers.{layer}.ln.weight"])
        np.testing.assert_array_equal(params["blocks"]["gamma"][layer], tensors[f"layers.{layer}.gamma"][:, 0, 0])
    assert params["image"]["kernel"][3, 4, 2, 1] == tensors["image.weight"][1, 2, 3, 4]
    assert params["video"]["kernel"][3, 4, 5, 2, 1] == tensors["video.weight"][1, 2, 3, 4, 5]


def test_to_torch_gives_back_every_bit():
    tensors = random_tensors(SHAPES)
    back = to_torch(RULES, convert(RULES, tensors, abstract(FLAX_SHAPES)))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)


def test_torch_shapes():
    assert torch_shapes(RULES, abstract(FLAX_SHAPES)) == SHAPES


def test_parameters_take_the_dtype_that_was_asked_for():
    params = convert(RULES, random_tensors(SHAPES), abstract(FLAX_SHAPES, "bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"other.weight": (7, 8)},
            r"'other.weight' with shape \(7, 8\) matches 0 conversion rules, expected exactly 1",
        ),
        ({"proj_weight": (4, 5)}, r"'proj_weight' with shape \(4, 5\) matches 0"),  # the dot of a rule is a dot
        ({"proj.weight": (5, 4)}, r"'proj.weight' has shape \(5, 4\), expected \(4, 5\) to fill projection/kernel"),
        ({"layers.1.gamma": (5,)}, r"'layers.1.gamma' has shape \(5,\), expected \(5, 1, 1\)"),
        ({"proj.bias": None}, r"'proj.bias' is missing: expected shape \(4,\) to fill projection/bias"),
        ({"layers.1.qkv.weight": None}, r"'layers.1.qkv.weight' is missing: expected shape \(6, 5\)"),
        ({"layers.2.gamma": (5, 1, 1)}, r"'layers.2.gamma' with shape \(5, 1, 1\) is layer 2, .*layers 0 to 1"),
        ({"layers.01.gamma": (5, 1, 1)}, r"'layers.01.gamma' and 'layers.1.gamma' both fill 'blocks/gamma', layer 1"),
    ],
)
def test_wrong_checkpoints_are_errors(change: dict[str, tuple[int, ...] | None], message: str):
    shapes = {name: shape for name, shape in (SHAPES | change).items() if shape is not None}
    with pytest.raises(ValueError, match=message):
        convert(RULES, random_tensors(shapes), abstract(FLAX_SHAPES))


def test_ambiguous_rules_are_an_error():
    rules = (*RULES, Rule("proj.weight", "other/kernel", LINEAR))
    params = abstract(FLAX_SHAPES | {"other/kernel": (5, 4)})
    with pytest.raises(
        ValueError, match=r"'proj.weight' .* matches 2 conversion rules \('proj.weight', 'proj.weight'\)"
    ):
        convert(rules, random_tensors(SHAPES), params)


def test_dropping_wins_over_filling_so_a_layer_can_be_left_out():
    tensors = random_tensors(SHAPES | {"layers.2.gamma": (5, 1, 1)})
    params = convert((*RULES, drop("layers.2.*")), tensors, abstract(FLAX_SHAPES))
    np.testing.assert_array_equal(params["blocks"]["gamma"][1], tensors["layers.1.gamma"][:, 0, 0])
    with pytest.raises(ValueError, match=r"'layers.1.ln.weight' is missing"):
        convert((*RULES, drop("layers.1.*")), random_tensors(SHAPES), abstract(FLAX_SHAPES))


def test_rules_and_parameters_must_cover_each_other():
    extra = abstract(FLAX_SHAPES | {"head/bias": (3,)})
    with pytest.raises(ValueError, match=r"No conversion rule fills 'head/bias' with shape \(3,\)"):
        convert(RULES, random_tensors(SHAPES), extra)
    with pytest.raises(ValueError, match="No parameter is named 'head/bias'"):
        convert((*RULES, Rule("head.bias", "head/bias")), random_tensors(SHAPES), abstract(FLAX_SHAPES))
