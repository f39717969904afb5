"""The float32 pieces that the networks share: normalisations, the timestep embedding and rotary position embedding.

Letters: B batch · L tokens · N heads · K head width · D width
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from magref_jax.models.attention import ATTENTION_OUT

# What a block keeps for its backward pass: everything, only its input, or what its linear layers and attentions return.
REMAT: dict[str, Callable[[type[nn.Module]], type[nn.Module]]] = {
    "none": lambda block: block,
    "block": functools.partial(nn.remat, prevent_cse=False),
    "dots": functools.partial(
        nn.remat,
        prevent_cse=False,
        policy=jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(ATTENTION_OUT),
        ),
    ),
}

LORA = "lora"  # the variable collection of adapters; see models/adapters.py


class Linear(nn.Module):
    """x · kernel + bias in `dtype`, and + x · a · b if there is an adapter.

    float32 products are deliberate, and on a TPU that takes the highest precision. In bfloat16 all sums are float32, those
    of the two derivatives too, and said in so many words: a CPU with matrix units runs bfloat16 products with float32
    results 5x as fast as float32 ones, and all others slower.
    """

    features: int
    dtype: DTypeLike
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = (array.astype(self.dtype) for array in (x, kernel, bias))
        out = _affine(x, kernel, bias)
        if self.has_variable(LORA, "a"):
            a, b = (self.get_variable(LORA, name).astype(self.dtype) for name in ("a", "b"))
            low = _affine(x, a, jnp.zeros(a.shape[-1], self.dtype))
            out += _affine(low, b, jnp.zeros(b.shape[-1], self.dtype))
        return out


def _affine(
    x: Float[Array, "*batch D"], kernel: Float[Array, "D E"], bias: Float[Array, "E"]
) -> Float[Array, "*batch E"]:
    if x.dtype == jnp.float32:
        return jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST) + bias
    return _linear(x, kernel, bias)


@jax.custom_vjp
def _linear(
    x: Float[Array, "*batch D"], kernel: Float[Array, "D E"], bias: Float[Array, "E"]
) -> Float[Array, "*batch E"]:
    return (jnp.dot(x, kernel, preferred_element_type=jnp.float32) + bias).astype(x.dtype)


def _linear_forward(x: Array, kernel: Array, bias: Array) -> tuple[Array, tuple[Array, Array]]:
    return _linear(x, kernel, bias), (x, kernel)


def _linear_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array, Array]:
    x, kernel = saved
    of_x = jnp.einsum("...e,de->...d", cotangent, kernel, preferred_element_type=jnp.float32)
    of_kernel, of_bias = jax.lax.platform_dependent(
        x, cotangent, cpu=_parameter_gradients_on_cpu, default=_parameter_gradients
    )
    return of_x.astype(x.dtype), of_kernel.astype(x.dtype), of_bias.astype(x.dtype)


_linear.defvjp(_linear_forward, _linear_backward)


def _parameter_gradients(
    x: Float[Array, "*batch D"], cotangent: Float[Array, "*batch E"]
) -> tuple[Float[Array, "D E"], Float[Array, "E"]]:
    # The leading axes stay apart: merged, batch and sequence could not stay sharded over different axes of a mesh.
    leading = tuple(range(x.ndim - 1))
    of_kernel = jnp.tensordot(x, cotangent, axes=(leading, leading), preferred_element_type=jnp.float32)
    return of_kernel, jnp.sum(cotangent, axis=leading, dtype=jnp.float32)


def _parameter_gradients_on_cpu(
    x: Float[Array, "*batch D"], cotangent: Float[Array, "*batch E"]
) -> tuple[Float[Array, "D E"], Float[Array, "E"]]:
    x, cotangent = (array.reshape(-1, array.shape[-1]) for array in (x, cotangent))
    # A copy in row-major order, the only one in which XLA's fast products take it; and a sum that is a product.
    narrow, wide = (x, cotangent) if x.shape[-1] <= cotangent.shape[-1] else (cotangent, x)
    transposed = with_layout_constraint(narrow.T, Layout((0, 1)))
    of_kernel = jnp.dot(transposed, wide, preferred_element_type=jnp.float32)
    ones = jnp.ones((1, len(x)), x.dtype)
    of_bias = jnp.dot(ones, cotangent, preferred_element_type=jnp.float32)[0]
    return of_kernel if narrow is x else jax.lax.optimization_barrier(of_kernel).T, of_bias


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · scale in float32, whatever the dtype of x."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps) * scale


class LayerNorm(nn.Module):
    """(x − mean) / √(variance + eps), then · scale + bias if affine, in float32, whatever the dtype of x."""

    eps: float
    affine: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
            x = x * scale + bias
        return x


def timestep_embedding(timesteps: Real[Array, "*batch"], dim: int) -> Float[Array, "*batch {dim}"]:
    """[cos(t · f_j) ‖ sin(t · f_j)] with f_j = 10000^(−2j/dim), to 1e-6 for 0 <= t <= 4096."""
    frequencies = 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    # A float32 product t · f_j is off by 3e-5 at t = 999. The whole part of t (12 bits) times the top 12 bits of f_j is
    # exact; what remains is a small angle that float32 holds well, and the two angles are added by their rotations.
    mantissa, exponent = np.frexp(frequencies)
    coarse = np.ldexp(np.round(mantissa * 2**12), exponent - 12)
    t = timesteps.astype(jnp.float32)[..., None]
    whole = jnp.floor(t)
    exact = whole * jnp.asarray(coarse, jnp.float32)
    rest = whole * jnp.asarray(frequencies - coarse, jnp.float32) + (t - whole) * jnp.asarray(frequencies, jnp.float32)
    cos = jnp.cos(exact) * jnp.cos(rest) - jnp.sin(exact) * jnp.sin(rest)
    sin = jnp.sin(exact) * jnp.cos(rest) + jnp.cos(exact) * jnp.sin(rest)
    return jnp.concatenate([cos, sin], axis=-1)


def rotary_rotations(
    frames: Sequence[int], rows: Sequence[int], columns: Sequence[int], head_dim: int, theta: float
) -> tuple[Float[Array, "L K//2"], Float[Array, "L K//2"]]:
    """Cosine and sine per token and pair of channels for tokens at these positions, in row-major (frame, row, column) order.

    Height and width own 2·(K//6) channels each and time the rest; pair i of an axis with d channels turns by
    position · theta^(−2i/d).
    """
    spatial_dim = 2 * (head_dim // 6)
    grid = (len(frames), len(rows), len(columns))

    def angles(axis: int, positions: Sequence[int], dim: int) -> np.ndarray:
        # float64 on the host: float32 angles lose the fast pairs of late positions.
        frequencies = theta ** (-np.arange(0, dim, 2) / dim)
        angle = np.asarray(positions, np.float64)[:, None] * frequencies
        return np.expand_dims(angle, [other for other in range(3) if other != axis])

    axes = (
        angles(0, frames, head_dim - 2 * spatial_dim),
        angles(1, rows, spatial_dim),
        angles(2, columns, spatial_dim),
    )

    def table(function: np.ufunc) -> Array:
        # The per-axis tables are small constants; the table of all tokens (16 MB at 480p) is only built on the device.
        parts = [jnp.asarray(function(angle), jnp.float32) for angle in axes]
        parts = [jnp.broadcast_to(part, (*grid, part.shape[-1])) for part in parts]
        return jnp.concatenate(parts, axis=-1).reshape(-1, head_dim // 2)

    return table(np.cos), table(np.sin)


def rotate(
    x: Float[Array, "B L N K"], rotations: tuple[Float[Array, "L K//2"], Float[Array, "L K//2"]]
) -> Float[Array, "B L N K"]:
    """Turns every pair of neighbouring channels (2i, 2i+1) as a complex number, in float32."""
    cos, sin = (table[:, None, :] for table in rotations)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
    return turned.reshape(x.shape)
