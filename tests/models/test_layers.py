from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax.models import layers
from magref_jax.models.layers import LORA, LayerNorm, Linear, RMSNorm, rotary_rotations, rotate, timestep_embedding


def test_timestep_embedding_equals_float64_to_1e_6():
    timesteps = np.concatenate([np.arange(0, 1001), np.linspace(0, 1000, 777)]).astype(np.float32)
    frequencies = 10000.0 ** (-np.arange(128) / 128)
    angles = timesteps.astype(np.float64)[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)

    actual = jax.jit(timestep_embedding, static_argnums=1)(timesteps, 256)

    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def test_timestep_embedding_of_integers_keeps_leading_axes():
    timesteps = jnp.array([[1, 999], [0, 500]])
    np.testing.assert_array_equal(
        timestep_embedding(timesteps, 8).reshape(4, 8), timestep_embedding(timesteps.reshape(4).astype(float), 8)
    )


def exact_rotation(x: np.ndarray, positions: np.ndarray, pairs: tuple[int, int, int]) -> np.ndarray:
    """Complex multiplication in float64; `pairs` is how many channel pairs belong to each axis of the positions."""
    z = x.astype(np.float64)[..., 0::2] + 1j * x.astype(np.float64)[..., 1::2]
    angles = [positions[:, axis, None] * 10000.0 ** (-np.arange(count) / count) for axis, count in enumerate(pairs)]
    z *= np.exp(1j * np.concatenate(angles, axis=-1))[:, None]
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def test_rotation_equals_complex_multiplication_with_the_channels_of_wan():
    positions = np.array([(f, h, w) for f in range(2) for h in range(3) for w in range(4)])
    x = np.random.default_rng(0).standard_normal((2, 24, 3, 128)).astype(np.float32)

    actual = rotate(x, rotary_rotations(range(2), range(3), range(4), 128, 10000.0))

    # Of 64 pairs Wan gives 22 to time, 21 to height and 21 to width.
    np.testing.assert_allclose(actual, exact_rotation(x, positions, (22, 21, 21)), rtol=0, atol=1e-6)


def test_rotations_take_late_positions():
    late = rotary_rotations(range(1000, 1002), [51], [103], 32, 10000.0)
    positions = np.array([(1000, 51, 103), (1001, 51, 103)])
    x = np.random.default_rng(1).standard_normal((1, 2, 1, 32)).astype(np.float32)
    np.testing.assert_allclose(rotate(x, late), exact_rotation(x, positions, (6, 5, 5)), rtol=0, atol=1e-6)


def test_norms_equal_their_formulas_and_compute_in_float32():
    rng = np.random.default_rng(2)
    # A mean far above the spread is what a one-pass variance or a bfloat16 mean gets wrong.
    x = jnp.asarray(100 + rng.standard_normal((3, 64)), jnp.bfloat16)
    scale, bias = rng.standard_normal((2, 64)).astype(np.float32)
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    layer = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 0.01)
    rms = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 0.01)

    outputs = {
        "affine": LayerNorm(0.01).apply({"params": {"scale": scale, "bias": bias}}, x),
        "plain": LayerNorm(0.01, affine=False).apply({}, x),
        "rms": RMSNorm(0.01).apply({"params": {"scale": scale}}, x),
    }

    assert {out.dtype for out in outputs.values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(outputs["affine"], layer * scale + bias, atol=2e-5)  # float32 at 100 resolves 8e-6
    np.testing.assert_allclose(outputs["plain"], layer, atol=2e-5)
    np.testing.assert_allclose(outputs["rms"], rms * scale, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.01)])
def test_linear_and_its_derivatives_equal_float64(dtype: str, tolerance: float):
    rng = np.random.default_rng(4)
    x, cotangent = rng.standard_normal((2, 30, 24)), rng.standard_normal((2, 30, 16))
    params = {"kernel": rng.standard_normal((24, 16)), "bias": rng.standard_normal(16)}
    expected = (
        x @ params["kernel"] + params["bias"],
        {"kernel": np.einsum("bld,ble->de", x, cotangent), "bias": cotangent.sum((0, 1))},
        cotangent @ params["kernel"].T,
    )
    layer = Linear(16, dtype)
    inputs = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), (params, x, cotangent))

    @jax.jit
    def apply(params, x, cotangent):
        out, pull = jax.vjp(lambda params, x: layer.apply({"params": params}, x), params, x)
        return out, *pull(cotangent.astype(out.dtype))

    actual = apply(*inputs)
    assert actual[0].dtype == dtype
    # bfloat16 rounds inputs and results to 1 in 256; the sums themselves are float32.
    jax.tree.map(
        lambda found, exact: np.testing.assert_allclose(
            np.asarray(found, np.float64), exact, rtol=0, atol=tolerance * np.abs(exact).max()
        ),
        actual,
        expected,
    )


def test_an_adapter_adds_its_product_once():
    rng = np.random.default_rng(6)
    shapes = {"x": (2, 5, 24), "kernel": (24, 16), "bias": (16,), "a": (24, 3), "b": (3, 16)}
    x, kernel, bias, a, b = (rng.standard_normal(shape).astype(np.float32) for shape in shapes.values())
    variables = {"params": {"kernel": kernel, "bias": bias}, LORA: {"a": a, "b": b}}
    exact = x.astype(np.float64) @ (kernel + np.float64(a) @ b) + bias
    np.testing.assert_allclose(Linear(16, "float32").apply(variables, x), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("gradients", [layers._parameter_gradients, layers._parameter_gradients_on_cpu])
def test_gradients_of_the_parameters_are_the_same_on_every_device(gradients: Callable):
    rng = np.random.default_rng(5)
    x, cotangent = (jnp.asarray(rng.standard_normal((2, 30, width)), jnp.bfloat16) for width in (24, 16))
    of_kernel, of_bias = jax.jit(gradients)(x, cotangent)
    x, cotangent = np.asarray(x, np.float64), np.asarray(cotangent, np.float64)
    # float32 sums of 60 products that are exact in float32.
    np.testing.assert_allclose(of_kernel, np.einsum("bld,ble->de", x, cotangent), atol=1e-5)
    np.testing.assert_allclose(of_bias, cotangent.sum((0, 1)), atol=1e-5)


def test_long_sums_of_a_bfloat16_linear_are_float32():
    # 4,096 ones: summed in bfloat16 they stop at 256.
    layer = Linear(1, "bfloat16")
    params = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
    gradient = jax.jit(
        jax.grad(lambda params: layer.apply({"params": params}, jnp.ones((4096, 1))).sum().astype(float))
    )
    assert jax.tree.leaves(gradient(params)) == [4096.0, 4096.0]
