"""Adapters against dense weights: the same outputs, and gradients that are projections of those of the dense weights."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from magref_jax.config import DiTConfig
from magref_jax.convert.lora import Family, apply_loras, read_lora, trained_lora, write_lora
from magref_jax.models.adapters import LoraConfig, init_lora, scale_lora
from magref_jax.models.dit import DiT
from magref_jax.models.layers import LORA
from magref_jax.sharding import PARAM_SPECS, make_mesh, param_shardings

CONFIG = DiTConfig(
    dim=24,
    ffn_dim=32,
    num_heads=2,
    num_layers=2,
    in_channels=12,
    out_channels=4,
    text_dim=20,
    text_len=6,
    image_dim=28,
    freq_dim=8,
    dtype="float32",
)
LORA_CONFIG = LoraConfig(rank=3, alpha=4.5)
EVERYWHERE = dataclasses.replace(LORA_CONFIG, targets=".*")
SHAPES = (2, 2, 4, 4, CONFIG.in_channels), (2,), (2, CONFIG.text_len, CONFIG.text_dim), (2, 3, CONFIG.image_dim)


def normal(abstract: Any, seed: int) -> Any:
    """Random values that keep activations near 1, in place of every leaf."""
    rng = np.random.default_rng(seed)

    def make(leaf: Any) -> np.ndarray:
        fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 4
        return (rng.standard_normal(leaf.shape) / math.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map(make, abstract)


INPUTS = normal([jax.ShapeDtypeStruct(shape, jnp.float32) for shape in SHAPES], seed=0)


@functools.cache
def abstract_params(config: DiTConfig = CONFIG) -> Any:
    return jax.eval_shape(DiT(config).init, jax.random.key(0), *INPUTS)["params"]


@functools.cache
def params() -> Any:
    return normal(abstract_params(), seed=1)


def abstract_lora(config: DiTConfig, lora: LoraConfig) -> Any:
    return jax.eval_shape(functools.partial(init_lora, config, lora), jax.random.key(0))


@functools.cache
def compiled_run(config: DiTConfig = CONFIG) -> Callable[..., jax.Array]:
    """The velocity from parameters and, if given, scaled adapters."""

    @jax.jit
    def run(params: Any, adapters: Any = None) -> jax.Array:
        return DiT(config).apply(
            {"params": params} if adapters is None else {"params": params, LORA: adapters}, *INPUTS
        )

    return run


def dense(params: Any, lora: LoraConfig, tree: Any) -> Any:
    """Kernels + alpha/rank · a · b, in float64."""
    merged, flat = traverse_util.flatten_dict(params, sep="/"), traverse_util.flatten_dict(tree, sep="/")
    for module in {path.rpartition("/")[0] for path in flat}:
        a, b = (np.asarray(flat[f"{module}/{name}"], np.float64) for name in "ab")
        kernel = merged[f"{module}/kernel"].astype(np.float64)
        merged[f"{module}/kernel"] = (kernel + lora.alpha / lora.rank * a @ b).astype(np.float32)
    return traverse_util.unflatten_dict(merged, sep="/")


def sizes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_less_than_a_percent_of_the_14b_model_is_trained():
    config = DiTConfig()
    inputs = (1, 1, 2, 2, 36), (1,), (1, 512, 4096), (1, 1, 1280)
    shapes = jax.eval_shape(DiT(config).init, jax.random.key(0), *(jnp.zeros(shape) for shape in inputs))
    trained = sizes(abstract_lora(config, LoraConfig()))

    # 8 square layers and 2 of the feed-forward in each of 40 blocks.
    assert trained == 40 * 32 * (8 * (5120 + 5120) + 2 * (5120 + 13824))
    assert trained < 0.01 * sizes(shapes)


def test_targets_are_matched_against_whole_module_names():
    tree = abstract_lora(CONFIG, LoraConfig(rank=3, targets="blocks/cross_attention/.*_image|head/out|time_in"))
    flat = traverse_util.flatten_dict(tree, sep="/")
    assert {path: leaf.shape for path, leaf in flat.items()} == {
        "blocks/cross_attention/key_image/a": (2, 24, 3),
        "blocks/cross_attention/key_image/b": (2, 3, 24),
        "blocks/cross_attention/value_image/a": (2, 24, 3),
        "blocks/cross_attention/value_image/b": (2, 3, 24),
        "head/out/a": (24, 3),
        "head/out/b": (3, 16),
        "time_in/a": (8, 3),
        "time_in/b": (3, 24),
    }
    assert all(leaf.dtype == jnp.float32 for leaf in flat.values())


def test_a_is_uniform_and_no_layer_is_like_another():
    tree = init_lora(dataclasses.replace(CONFIG, dim=64, ffn_dim=256), LoraConfig(rank=16), jax.random.key(1))
    query, down = (
        np.asarray(tree["blocks"][part][name]["a"])
        for part, name in (("self_attention", "query"), ("feed_forward", "down"))
    )
    for a, fan_in in ((query, 64), (down, 256)):
        bound = fan_in**-0.5
        assert 0.99 * bound < np.abs(a).max() <= bound
        np.testing.assert_allclose(a.std(), bound / math.sqrt(3), rtol=0.05)
    assert not np.array_equal(query[0], query[1])
    assert not np.array_equal(query, np.asarray(tree["blocks"]["self_attention"]["key"]["a"]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_the_start_the_model_is_bitwise_what_it_was(dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    tree = init_lora(config, EVERYWHERE, jax.random.key(0))
    plain = compiled_run(config)(params())
    adapted = compiled_run(config)(params(), scale_lora(EVERYWHERE, tree))
    assert np.std(plain) > 0.1
    assert np.asarray(adapted).tobytes() == np.asarray(plain).tobytes()


@functools.cache
def some_adapters() -> Any:
    return normal(abstract_lora(CONFIG, EVERYWHERE), seed=2)


@functools.cache
def loss_and_gradients(config: DiTConfig) -> jax.stages.Compiled:
    """Mean squared velocity and its gradients by the adapters, from them and the frozen parameters."""

    def loss(tree: Any, params: Any) -> jax.Array:
        return jnp.mean(compiled_run(config)(params, scale_lora(EVERYWHERE, tree)) ** 2)

    return jax.jit(jax.value_and_grad(loss)).lower(some_adapters(), params()).compile()


@functools.cache
def dense_gradients() -> tuple[jax.Array, Any, jax.stages.Compiled]:
    """Of a model without adapters, to whose weights they were added."""
    merged = dense(params(), EVERYWHERE, some_adapters())
    compiled = jax.jit(jax.value_and_grad(lambda params: jnp.mean(compiled_run()(params) ** 2))).lower(merged).compile()
    return *compiled(merged), compiled


# In bfloat16 a layer rounds what an adapter adds before and after it adds it.
@pytest.mark.parametrize(
    ("dtype", "remat", "tolerance"),
    [("float32", "dots", 2e-5), ("bfloat16", "block", 0.05)],
)
def test_gradients_are_projections_of_those_of_dense_weights(dtype, remat, tolerance):
    compiled = loss_and_gradients(dataclasses.replace(CONFIG, dtype=dtype, remat=remat))
    loss, gradients = compiled(some_adapters(), params())
    dense_loss, dense_weight_gradients, dense_compiled = dense_gradients()

    # With W = … + s·a·b: dL/da = s · dL/dW · bᵀ and dL/db = s · aᵀ · dL/dW.
    np.testing.assert_allclose(loss, dense_loss, rtol=tolerance)
    scale = EVERYWHERE.alpha / EVERYWHERE.rank
    of_kernels = traverse_util.flatten_dict(dense_weight_gradients, sep="/")
    flat, trained = (traverse_util.flatten_dict(part, sep="/") for part in (gradients, some_adapters()))
    assert flat.keys() == trained.keys()
    for path, actual in flat.items():
        module, _, name = path.rpartition("/")
        of_kernel = np.asarray(of_kernels[f"{module}/kernel"], np.float64)
        a, b = (trained[f"{module}/{half}"].astype(np.float64).swapaxes(-1, -2) for half in "ab")
        expected = scale * (of_kernel @ b if name == "a" else a @ of_kernel)
        assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max(), path
    # The products that would be gradients of the frozen kernels, half as much work as the whole backward pass, are not done.
    assert feed_forward_kernels(compiled) == 0
    assert feed_forward_kernels(dense_compiled) >= 2


def feed_forward_kernels(compiled: jax.stages.Compiled) -> int:
    """How many matrix products have the shape of a kernel of the feed-forward, which no activation has."""
    shapes = f"{CONFIG.dim},{CONFIG.ffn_dim}|{CONFIG.ffn_dim},{CONFIG.dim}"
    return len(re.findall(rf"= \w+\[(?:{shapes})\]\S* (?:dot|custom-call)\(", compiled.as_text()))


def test_a_mesh_computes_the_same_gradients():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    config = dataclasses.replace(CONFIG, remat="dots")
    loss, gradients = loss_and_gradients(config)(some_adapters(), params())
    tree, base = (
        jax.device_put(values, param_shardings(mesh, values, PARAM_SPECS[name]))
        for values, name in ((some_adapters(), "lora"), (params(), "dit"))
    )
    assert tree["blocks"]["feed_forward"]["up"]["a"].sharding.spec[1] == ("fsdp", "context")

    def loss_fn(tree: Any, base: Any) -> jax.Array:
        return jnp.mean(compiled_run(config)(base, scale_lora(EVERYWHERE, tree)) ** 2)

    loss_on_mesh, on_mesh = jax.jit(jax.value_and_grad(loss_fn))(tree, base)

    np.testing.assert_allclose(loss_on_mesh, loss, rtol=1e-5)
    for path, expected in traverse_util.flatten_dict(gradients, sep="/").items():
        actual = traverse_util.flatten_dict(on_mesh, sep="/")[path]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=path)


def test_training_moves_the_adapters_and_no_bit_of_the_base():
    base = jax.tree.map(jnp.asarray, params())
    before = jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), base)
    tree = jax.jit(functools.partial(init_lora, CONFIG, EVERYWHERE))(jax.random.key(0))
    differentiate = loss_and_gradients(dataclasses.replace(CONFIG, remat="dots"))
    optimizer = optax.adam(1e-2)
    state = optimizer.init(tree)
    update = jax.jit(optimizer.update)

    losses = []
    for _ in range(3):
        loss, gradients = differentiate(tree, base)
        updates, state = update(gradients, state)
        tree = jax.tree.map(np.add, tree, updates)
        losses.append(float(loss))

    assert losses[2] < losses[1] < losses[0]
    assert jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), base) == before
    assert sizes(state) < 2.01 * sizes(tree)  # no optimiser memory for the base


@pytest.mark.parametrize("family", get_args(Family))
@pytest.mark.parametrize("alpha", [None, 4.5])
def test_a_written_file_merges_into_what_was_trained(tmp_path, family, alpha):
    lora = dataclasses.replace(EVERYWHERE, alpha=alpha)
    tree = normal(abstract_lora(CONFIG, lora), seed=3)
    write_lora(tmp_path / "lora.safetensors", trained_lora(tree, lora, CONFIG), family)

    read = read_lora(tmp_path / "lora.safetensors", CONFIG, abstract_params())
    merged = apply_loras(params(), [(read, 1.0)])

    assert (read.unmatched, read.skipped) == ((), ())
    trained = compiled_run()(params(), scale_lora(lora, tree))
    # (x · a) · b against x · (kernel + a · b): the same sums in another order.
    np.testing.assert_allclose(compiled_run()(merged), trained, rtol=0, atol=2e-5)
    assert np.abs(trained - compiled_run()(params())).max() > 0.5


def test_targets_that_match_nothing_are_refused_with_what_there_is():
    with pytest.raises(
        ValueError, match=r"targets='blocks/self_attention' matches no layer.*blocks/self_attention/query"
    ):
        init_lora(CONFIG, LoraConfig(targets="blocks/self_attention"), jax.random.key(0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "LoraConfig.rank=0 must be at least 1"),
        ({"alpha": 0.0}, "LoraConfig.alpha=0.0 must be positive"),
        ({"alpha": math.inf}, "LoraConfig.alpha=inf must be positive and finite"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**values)
