"""Values that hold arrays are described, not printed."""

import dataclasses
import importlib
import inspect
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import magref_jax
from magref_jax import pipeline
from magref_jax.descriptions import describe
from tests.tiny_model import CONFIG, model_folder, picture, random_params  # noqa: F401


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, "3"),
        (np.float64(3), "np.float64(3.0)"),
        ("a", "'a'"),
        ("a" * 200, "'" + "a" * 79 + "..."),
        (np.zeros((2, 3), np.uint8), "ndarray uint8 [2 3]"),
        (jax.ShapeDtypeStruct((4,), jnp.bfloat16), "ShapeDtypeStruct bfloat16 [4]"),
        ([np.zeros(2, np.int8)], "[ndarray int8 [2]]"),
        ((1, None), "(1, None)"),
        (list(range(9)), "list of 9"),
        ({"a": {"kernel": np.zeros((2, 3)), "bias": [np.zeros(4)]}, "b": {"x": np.zeros(5)}}, "{a: 10 values in 2 arrays, b: 5 values in 1 arrays}"),
        ({"a": 1}, "dict of 1"),
        (CONFIG, "ModelConfig(...)"),
    ],
)  # fmt: skip
def test_a_description_is_a_short_line(value, expected):
    assert describe(value) == expected


def test_a_model_and_what_it_makes_are_described_in_a_line(model_folder):  # noqa: F811
    params = random_params(CONFIG)
    model = pipeline.Model(CONFIG, params, pipeline.load_tokenizer(model_folder))
    request = pipeline.Request("a red apple", [picture((1, 2, 3))], ["red apple"])
    case = pipeline.prepare(CONFIG, model.tokenizer, request)
    noise = np.zeros((1, 3, 4, 6, 16), np.float32)
    frames = np.zeros((1, 4, 8, 12, 3), np.uint8)
    result = pipeline.Result(frames, noise, (case,), (None,), noise[None])
    for value in (model, request, case, result, next(iter(result))):
        assert len(repr(value)) < 500
        assert "\n" not in repr(value)
    count = sum(leaf.size for leaf in jax.tree.leaves(params["dit"]))
    assert f"dit: {count:,} values in" in repr(model)
    assert "frames=ndarray uint8 [1 4 8 12 3]" in repr(result)


def test_no_dataclass_prints_the_arrays_that_it_holds():
    holders = []
    for module in pkgutil.walk_packages(magref_jax.__path__, "magref_jax."):
        if module.name.endswith("emoji_dataset"):  # needs an extra
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and dataclasses.is_dataclass(value) and value.__module__ == module.name:
                types = [str(field.type) for field in dataclasses.fields(value)]
                if any(re.search(r"\b(Array|ndarray|Params)\b", kind) and "Callable[" not in kind for kind in types):
                    holders.append(value)
    assert {"Result", "Case", "TrainState", "ClipRecord"} <= {holder.__name__ for holder in holders}
    assert [holder for holder in holders if not holder.__repr__.__qualname__.startswith("short_repr.")] == []
