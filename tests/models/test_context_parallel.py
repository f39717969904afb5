"""Attention that several devices compute together equals the textbook's in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax.models import context_parallel
from magref_jax.models.attention import AttentionStructure, dot_product_attention
from magref_jax.models.context_parallel import Exchange, cross_attention, find_exchange, self_attention
from magref_jax.sharding import make_mesh, on_mesh
from tests.models.test_attention import exact_attention

FAST = {"xla_backend_optimization_level": 0}


def self_attention_inputs(tokens: int, num_heads: int = 4, batch: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((batch, tokens, num_heads, 8)).astype(np.float32) for _ in range(3)]


def padded(array: np.ndarray, padding: int) -> np.ndarray:
    # Padding that would be seen if anything looked at it.
    return np.pad(array, [(0, 0), (0, padding), (0, 0), (0, 0)], constant_values=3.0)


def values_and_gradients(spec: str, method: str, inputs: list[np.ndarray], implementation: str, padding: int):
    """As `exact_attention` returns them."""
    mesh, num_tokens = make_mesh(spec), inputs[0].shape[1]

    def half_square(*inputs):
        with on_mesh(mesh):
            out = self_attention(*inputs, implementation=implementation, context_parallel=method, num_tokens=num_tokens)
        return jnp.sum(jnp.square(out[:, :num_tokens])) / 2, out

    program = jax.jit(jax.grad(half_square, argnums=(0, 1, 2), has_aux=True), compiler_options=FAST)
    placed = jax.device_put([padded(array, padding) for array in inputs], jax.NamedSharding(mesh, jax.P()))
    gradients, out = program(*placed)
    return np.asarray(out)[:, :num_tokens], [np.asarray(gradient) for gradient in gradients]


@pytest.mark.parametrize(
    ("spec", "method", "implementation", "tokens", "padding"),
    [
        ("data=2,context=4", "ulysses", "xla", 12, 0),
        ("fsdp=2,context=4", "ulysses", "reference", 11, 1),
        ("data=2,context=4", "ring", "cpu", 12, 0),
        ("context=4,tensor=2", "ring", "blockwise", 10, 2),
        ("context=4,tensor=2", "auto", "auto", 10, 2),  # two groups of two devices
        ("context=8", "auto", "auto", 9, 7),  # two groups of four; three devices have padding alone
        ("context=8", "ring", "auto", 9, 7),
        ("data=8", "ring", "auto", 6, 0),  # a batch that eight devices do not divide
    ],
)
def test_values_and_gradients_equal_float64(spec: str, method: str, implementation: str, tokens: int, padding: int):
    inputs = self_attention_inputs(tokens)
    expected, expected_gradients = exact_attention(*inputs, None, 8**-0.5)
    out, gradients = values_and_gradients(spec, method, inputs, implementation, padding)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient[:, :tokens], expected_gradient, atol=5e-6)
        np.testing.assert_array_equal(gradient[:, tokens:], 0)


def test_cross_attention_equals_float64_with_queries_cut():
    rng = np.random.default_rng(0)
    query, key, value, bias = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((2, 8, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8), (1, 1, 1, 5))
    )
    expected, expected_gradients = exact_attention(query, key, value, bias, 8**-0.5)
    mesh = make_mesh("data=2,context=2,tensor=2")

    def half_square(query, key, value, bias):
        with on_mesh(mesh):
            out = cross_attention(query, key, value, bias=bias, implementation="cpu")
        return jnp.sum(jnp.square(out)) / 2, out

    program = jax.jit(jax.grad(half_square, argnums=(0, 1, 2, 3), has_aux=True), compiler_options=FAST)
    compiled = program.lower(
        *jax.tree.map(
            lambda array, spec: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=jax.NamedSharding(mesh, spec)),
            (query, key, value, bias),
            (jax.P("data", "context", "tensor"), *[jax.P("data", None, "tensor")] * 2, jax.P()),
        )
    ).compile()
    assert "all-gather" not in compiled.as_text()
    assert "all-to-all" not in compiled.as_text()
    gradients, out = compiled(*jax.device_put((query, key, value, bias), compiled.input_shardings[0]))
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, atol=5e-6)


def test_blocks_of_a_ring_are_added_in_float32():
    # Equal weights; the values of block i are i, of which the mean is 3.5. Rounded to bfloat16 in between, it is not.
    zeros = np.zeros((1, 8, 1, 4), jnp.bfloat16)
    value = np.broadcast_to(np.arange(8).reshape(1, 8, 1, 1), zeros.shape).astype(jnp.bfloat16)
    mesh = make_mesh("context=8")
    inputs = jax.device_put((zeros, zeros, value), jax.NamedSharding(mesh, jax.P(None, "context")))

    @functools.partial(jax.jit, compiler_options=FAST)
    def attend(query, key, value):
        with on_mesh(mesh):
            return self_attention(query, key, value, implementation="cpu", context_parallel="ring")

    out = attend(*inputs)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), 3.5)


def test_memory_of_a_ring_grows_with_the_tokens_and_not_with_their_square():
    mesh = make_mesh("context=8")

    def temporary_bytes(tokens: int) -> int:
        x = jax.ShapeDtypeStruct(
            (1, tokens, 1, 8), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, "context"))
        )

        def square(*inputs):
            with on_mesh(mesh):
                out = self_attention(*inputs, implementation="cpu", context_parallel="ring")
            return jnp.sum(jnp.square(out))

        program = jax.jit(jax.grad(square, argnums=(0, 1, 2)), compiler_options=FAST).lower(x, x, x).compile()
        text = program.as_text()
        assert "collective-permute" in text
        assert "all-gather" not in text
        return program.memory_analysis().temp_size_in_bytes

    # Eight times the tokens, and blocks of queries and keys of the same size.
    assert temporary_bytes(2**18) < 8.8 * temporary_bytes(2**15)


def test_without_a_mesh_there_is_nothing_but_attention():
    inputs = self_attention_inputs(6)
    plain = jax.make_jaxpr(functools.partial(dot_product_attention, implementation="cpu"))(*inputs)
    assert str(jax.make_jaxpr(functools.partial(self_attention, implementation="cpu"))(*inputs)) == str(plain)
    with on_mesh(make_mesh("", jax.devices()[:1])):
        assert str(jax.make_jaxpr(functools.partial(self_attention, implementation="cpu"))(*inputs)) == str(plain)


@pytest.mark.parametrize(
    ("method", "size", "num_heads", "expected"),
    [
        ("auto", 4, 40, Exchange(4, 1)),
        ("auto", 16, 40, Exchange(8, 2)),
        ("auto", 8, 3, Exchange(1, 8)),
        ("auto", 1, 5, Exchange(1, 1)),
        ("ulysses", 8, 40, Exchange(8, 1)),
        ("ring", 8, 40, Exchange(1, 8)),
    ],
)
def test_groups_are_as_large_as_the_heads_allow(method: str, size: int, num_heads: int, expected: Exchange):
    assert find_exchange(method, size, num_heads) == expected


def test_what_is_impossible_says_why():
    with pytest.raises(ValueError, match="context=16 does not divide the 40 heads that a device has"):
        find_exchange("ulysses", 16, 40)
    with pytest.raises(ValueError, match="context_parallel='rings' is unknown; there are auto, ulysses, ring"):
        find_exchange("rings", 2, 4)
    inputs = self_attention_inputs(8)
    with on_mesh(make_mesh("context=8")):
        with pytest.raises(ValueError, match=r"'xla' does not return what a ring needs .*; take cpu, blockwise"):
            self_attention(*inputs, implementation="xla", context_parallel="ring")
        with pytest.raises(NotImplementedError, match="A ring over context=8 cannot compute structure 'spiral'"):
            self_attention(*inputs, implementation="cpu", structure=AttentionStructure("spiral"))


def test_auto_takes_an_attention_that_a_ring_can_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(context_parallel, "automatic", lambda dtype: "cudnn")
    query = self_attention_inputs(8)[0]
    expected = context_parallel.IMPLEMENTATIONS["blockwise"].of_some_keys
    assert context_parallel._of_some_keys("auto", query) is expected
