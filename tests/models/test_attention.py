import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax.models.attention import FULL, IMPLEMENTATIONS, AttentionStructure, dot_product_attention

ON_ANY_DEVICE = [name for name in IMPLEMENTATIONS if name != "cudnn"]


def attention_inputs(with_bias: bool) -> tuple[np.ndarray | None, ...]:
    rng = np.random.default_rng(0)
    shapes = (2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8), (1, 3, 5, 7)
    query, key, value, bias = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return query, key, value, (bias if with_bias else None)


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
    return np.moveaxis(out, 1, 2), tuple(np.moveaxis(gradient, 1, 2) for gradient in gradients)


@pytest.mark.parametrize(
    ("implementation", "with_bias", "scale"),
    [(name, False, None) for name in ON_ANY_DEVICE]
    + [(name, True, 1.0) for name in ON_ANY_DEVICE if IMPLEMENTATIONS[name].takes_bias]
    + [("cpu", False, 1.0)],
)
def test_values_and_gradients_equal_float64(implementation: str, with_bias: bool, scale: float | None):
    query, key, value, bias = attention_inputs(with_bias)
    expected, expected_gradients = exact_attention(query, key, value, bias, 8**-0.5 if scale is None else scale)

    def half_square(query, key, value):
        out = dot_product_attention(query, key, value, implementation=implementation, bias=bias, scale=scale)
        return jnp.sum(jnp.square(out)) / 2, out

    gradients, out = jax.jit(jax.grad(half_square, argnums=(0, 1, 2), has_aux=True))(query, key, value)

    np.testing.assert_allclose(out, expected, atol=2e-6)  # float32 rounding of values up to 2
    for actual_gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(actual_gradient, expected_gradient, atol=5e-6)


@pytest.mark.parametrize("implementation", ON_ANY_DEVICE)
def test_softmax_is_float32_for_bfloat16_inputs(implementation: str):
    # 1000 equal weights: a bfloat16 sum of ones stops at 256, which would make the mean of ones 3.9.
    query, ones = jnp.zeros((1, 2, 1, 4), jnp.bfloat16), jnp.ones((1, 1000, 1, 4), jnp.bfloat16)

    out = dot_product_attention(query, ones, ones, implementation=implementation)

    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=2**-7)


def test_unknown_implementation_is_an_error_that_lists_the_known():
    query, key, value, _ = attention_inputs(with_bias=False)
    with pytest.raises(ValueError, match=r"'flash' is unknown; there are xla, cudnn, reference, cpu"):
        dot_product_attention(query, key, value, implementation="flash")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_unsupported_structure_is_an_error(implementation: str):
    query, key, value, _ = attention_inputs(with_bias=False)
    with pytest.raises(NotImplementedError, match=rf"{implementation!r} cannot compute structure 'spiral', only full"):
        dot_product_attention(query, key, value, structure=AttentionStructure("spiral"), implementation=implementation)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks a CPU for a GPU kernel")
def test_implementation_that_the_device_lacks_is_an_error_and_not_replaced():
    query, key, value, _ = attention_inputs(with_bias=False)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        dot_product_attention(query, key, value, implementation="cudnn")


def test_a_bias_is_refused_where_there_is_no_place_for_it():
    query, key, value, bias = attention_inputs(with_bias=True)
    with pytest.raises(NotImplementedError, match="takes no bias"):
        dot_product_attention(query, key, value, bias=bias, implementation="cpu")


def test_structure_holds_no_arrays():
    assert jax.tree.leaves(FULL) == []
