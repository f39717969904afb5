import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from magref_jax.models import attention
from magref_jax.models.attention import FULL, IMPLEMENTATIONS, AttentionStructure, dot_product_attention

ON_ANY_DEVICE = [name for name in IMPLEMENTATIONS if name not in ("cudnn", "splash")]
LEAN = ("cpu", "blockwise")

# (query, key, bias): batch, tokens, heads, width; bias over batch, heads, queries, keys
SHORT = (2, 5, 3, 8), (2, 7, 3, 8), (1, 3, 5, 7)
BIASES = [(1, 1, 1, 7), (1, 1, 5, 7), (2, 1, 5, 1), (2, 3, 1, 7), (2, 3, 5, 7)]


def attention_inputs(
    query: tuple[int, ...] = SHORT[0], key: tuple[int, ...] = SHORT[1], bias: tuple[int, ...] | None = None
) -> tuple[np.ndarray | None, ...]:
    rng = np.random.default_rng(0)
    shapes = query, key, key, bias
    return tuple(None if shape is None else rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def exact_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, bias: np.ndarray | None, scale: float
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Output, and gradients of sum(output²)/2 by the textbook formula, in float64."""
    query, key, value = (np.moveaxis(array.astype(np.float64), 2, 1) for array in (query, key, value))
    logits = scale * query @ np.swapaxes(key, -1, -2) + (0 if bias is None else bias)
    weights = np.exp(logits)
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ value
    weight_gradient = out @ np.swapaxes(value, -1, -2)
    logit_gradient = weights * (weight_gradient - (weights * weight_gradient).sum(-1, keepdims=True))
    gradients = (
        scale * logit_gradient @ key,
        scale * np.swapaxes(logit_gradient, -1, -2) @ query,
        np.swapaxes(weights, -1, -2) @ out,
    )
    gradients = tuple(np.moveaxis(gradient, 1, 2) for gradient in gradients)
    if bias is not None:
        broadcast = tuple(axis for axis, size in enumerate(bias.shape) if size == 1)
        gradients += (logit_gradient.sum(broadcast, keepdims=True),)
    return np.moveaxis(out, 1, 2), gradients


def assert_equals_float64(implementation: str, inputs: tuple[np.ndarray | None, ...], scale: float | None = None):
    """Values and all gradients."""
    expected, expected_gradients = exact_attention(*inputs, inputs[0].shape[-1] ** -0.5 if scale is None else scale)

    def half_square(query, key, value, bias):
        out = dot_product_attention(query, key, value, implementation=implementation, bias=bias, scale=scale)
        return jnp.sum(jnp.square(out)) / 2, out

    argnums = range(len(expected_gradients))
    gradients, out = jax.jit(jax.grad(half_square, argnums=tuple(argnums), has_aux=True))(*inputs)

    np.testing.assert_allclose(out, expected, atol=2e-6)  # float32 rounding of values up to 2
    for actual_gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(actual_gradient, expected_gradient, atol=5e-6)


@pytest.mark.parametrize("implementation", ON_ANY_DEVICE)
@pytest.mark.parametrize(("bias", "scale"), [(None, None), (None, 1.0), (SHORT[2], 1.0)])
def test_values_and_gradients_equal_float64(implementation: str, bias: tuple[int, ...] | None, scale: float | None):
    assert_equals_float64(implementation, attention_inputs(bias=bias), scale)


@pytest.mark.parametrize("implementation", LEAN)
@pytest.mark.parametrize("bias", BIASES)
def test_a_bias_of_any_shape_has_its_gradient(implementation: str, bias: tuple[int, ...]):
    assert_equals_float64(implementation, attention_inputs(bias=bias))


@pytest.mark.parametrize("implementation", LEAN)
@pytest.mark.parametrize("bias", [None, (1, 1, 1, 7), (1, 3, 5, 7)])
def test_blocks_of_queries_equal_float64(
    implementation: str, bias: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
):
    # Five queries in blocks of two: three blocks, the last one padded. Seven keys in blocks of three, three and one. Six
    # heads in groups of three.
    monkeypatch.setattr(attention, "KEY_BLOCK", 3)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 2)
    monkeypatch.setattr(attention, "CACHED_LOGITS", 3 * 2 * 7)
    assert_equals_float64(implementation, attention_inputs(bias=bias))


@pytest.mark.parametrize("hidden", [slice(0, 3), slice(3, 6), slice(4, 7)])
def test_keys_with_a_bias_of_minus_infinity_have_no_weight(hidden: slice, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "KEY_BLOCK", 3)  # of which one block may be hidden altogether
    query, key, value, bias = attention_inputs(bias=(1, 1, 1, 7))
    bias[..., hidden] = -np.inf
    expected, _ = exact_attention(query, key, value, bias, 8**-0.5)
    attend = functools.partial(dot_product_attention, implementation="cpu")
    out = jax.jit(attend)(query, key, value, bias=bias)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("implementation", LEAN)
def test_memory_grows_with_the_tokens_and_not_with_their_square(implementation: str):
    def temporary_bytes(tokens: int) -> int:
        x = jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.float32)

        def square(query, key, value):
            return jnp.sum(jnp.square(dot_product_attention(query, key, value, implementation=implementation)))

        # No compilation of a size is needed to run it: these are never run.
        return (
            jax.jit(jax.grad(square, argnums=(0, 1, 2))).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
        )

    short, long = temporary_bytes(4096), temporary_bytes(16384)
    assert long < 4.4 * short
    assert long < 16384**2  # a quarter of the logits of one head


@pytest.mark.parametrize("implementation", LEAN)
def test_lean_implementations_work_under_a_mesh(implementation: str):
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    query, key, value, bias = attention_inputs((4, 6, 2, 8), (4, 6, 2, 8), (1, 1, 1, 6))
    expected, _ = exact_attention(query, key, value, bias, 8**-0.5)
    sharding = NamedSharding(mesh, P("data", None, "tensor"))
    sharded = [jax.device_put(array, sharding) for array in (query, key, value)]

    out = jax.jit(
        lambda *args: dot_product_attention(*args, bias=bias, implementation=implementation), out_shardings=sharding
    )(*sharded)

    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("implementation", ON_ANY_DEVICE)
def test_softmax_is_float32_for_bfloat16_inputs(implementation: str):
    # 1000 equal weights: a bfloat16 sum of ones stops at 256, which would make the mean of ones 3.9.
    query, ones = jnp.zeros((1, 2, 1, 4), jnp.bfloat16), jnp.ones((1, 1000, 1, 4), jnp.bfloat16)

    out = dot_product_attention(query, ones, ones, implementation=implementation)

    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=2**-7)


@pytest.mark.parametrize("implementation", ON_ANY_DEVICE)
def test_logits_are_float32_for_bfloat16_inputs(implementation: str):
    # Logits up to 40, where bfloat16 counts in quarters: rounded to it, the weights would be off by an eighth.
    query, key, value, _ = (
        jnp.asarray(array, jnp.bfloat16) for array in attention_inputs((2, 9, 3, 8), (2, 20, 3, 8), ())
    )
    exact, _ = exact_attention(*(np.asarray(array, np.float32) for array in (query, key, value)), None, 4.0)

    out = dot_product_attention(query, key, value, implementation=implementation, scale=4.0)

    # What is left is the rounding of the weights and of the result.
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, rtol=0, atol=2**-7 * np.abs(exact).max())


def test_unknown_implementation_is_an_error_that_lists_the_known():
    query, key, value, _ = attention_inputs()
    with pytest.raises(
        ValueError, match=r"'flash' is unknown; there are auto, xla, cudnn, splash, reference, cpu, blockwise"
    ):
        dot_product_attention(query, key, value, implementation="flash")


@pytest.mark.parametrize(
    ("platform", "dtype", "name"),
    [
        ("cpu", "float32", "cpu"),
        ("cpu", "bfloat16", "cpu"),
        ("gpu", "bfloat16", "cudnn"),
        ("gpu", "float32", "blockwise"),
        ("tpu", "bfloat16", "splash"),
    ],
)
def test_auto_is_what_suits_platform_and_dtype(monkeypatch: pytest.MonkeyPatch, platform: str, dtype: str, name: str):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert attention.automatic(dtype) == name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_unsupported_structure_is_an_error(implementation: str):
    query, key, value, _ = attention_inputs()
    with pytest.raises(NotImplementedError, match=rf"{implementation!r} cannot compute structure 'spiral', only full"):
        dot_product_attention(query, key, value, structure=AttentionStructure("spiral"), implementation=implementation)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks a CPU for a GPU kernel")
def test_implementation_that_the_device_lacks_is_an_error_and_not_replaced():
    query, key, value, _ = attention_inputs()
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        dot_product_attention(query, key, value, implementation="cudnn")


def test_structure_holds_no_arrays():
    assert jax.tree.leaves(FULL) == []


def test_no_result_of_a_loop_is_copied_whole_to_add_to_it():
    # XLA makes a bfloat16 update on a CPU of a conversion of all that is there already: 4 ns a number, 16 times over.
    shape = jax.ShapeDtypeStruct((8, 320, 6, 32), jnp.bfloat16)

    def loss(query, key, value):
        return jnp.sum(dot_product_attention(query, key, value, implementation="cpu").astype(jnp.float32))

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile().as_text()
    assert "dynamic-update-slice" in program
    assert "dynamic-update-slice_convert" not in program
