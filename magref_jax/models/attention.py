"""Scaled dot-product attention: one function, several named implementations.

The named implementation runs, or an exception says why it cannot; nothing falls back to another. The softmax is float32.

Letters: B batch · Q query tokens · S key tokens · N heads · K head width
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

ATTENTION_OUT = "attention_out"  # the name under which a remat policy may keep what attention returns


@struct.dataclass
class AttentionStructure:
    """Which tokens see which, as a rule that an implementation can exploit rather than a dense Q x S mask."""

    kind: str = struct.field(pytree_node=False, default="full")


FULL = AttentionStructure("full")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A function of (query, key, value, bias, scale), the kinds of structure that it computes, and whether a bias may be given."""

    function: Callable[..., Array]
    structures: frozenset[str] = frozenset({"full"})
    takes_bias: bool = True


def _jax(name: Literal["xla", "cudnn"]) -> Callable[[Array, Array, Array, Array | None, float], Array]:
    def attend(query: Array, key: Array, value: Array, bias: Array | None, scale: float) -> Array:
        return jax.nn.dot_product_attention(query, key, value, bias, scale=scale, implementation=name)

    return attend


def _reference(query: Array, key: Array, value: Array, bias: Array | None, scale: float) -> Array:
    logits = jnp.einsum("bqnk,bsnk->bnqs", query, key, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits += bias
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bnqs,bsnk->bqnk", weights, value.astype(jnp.float32)).astype(query.dtype)


def _cpu(query: Array, key: Array, value: Array, bias: None, scale: float) -> Array:
    return _attend(scale, query, key, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    scale: float, query: Float[Array, "B Q N K"], key: Float[Array, "B S N K"], value: Float[Array, "B S N K"]
) -> Float[Array, "B Q N K"]:
    """Attention whose products, and those of its derivatives, have the form that XLA runs fastest on a CPU.

    That is: float32 results, row-major operands, heads in front. Of the softmax only the logarithm of its denominator is
    kept; the weights are made again in the backward pass, with the keys as rows, so that only one of its four products
    needs a transposed copy.
    """
    return _attend_forward(scale, query, key, value)[0]


def _attend_forward(scale: float, query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, ...]]:
    num_heads = query.shape[2]
    query, key, value = (_heads_first(array) for array in (query, key, value))
    logits = _product("hqk,hsk->hqs", query, key) * scale
    largest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = (_product("hqs,hsk->hqk", weights.astype(query.dtype), value) / total).astype(query.dtype)
    # Named, so that a remat policy keeps them: without one of them all of this would be computed again.
    out = checkpoint_name(out, ATTENTION_OUT)
    log_total = checkpoint_name((largest + jnp.log(total))[..., 0], ATTENTION_OUT)
    return _heads_last(out, num_heads), (query, key, value, out, log_total)


def _attend_backward(scale: float, saved: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, Array]:
    query, key, value, out, log_total = saved
    dtype, num_heads = query.dtype, cotangent.shape[2]
    cotangent = _heads_first(cotangent)
    delta = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    weights = jnp.exp(_product("hsk,hqk->hsq", key, query) * scale - log_total[:, None])
    of_value = _product("hsq,hqk->hsk", weights.astype(dtype), cotangent)
    of_weights = _product("hsk,hqk->hsq", value, cotangent)
    of_logits = (weights * (of_weights - delta[:, None]) * scale).astype(dtype)
    of_key = _product("hsq,hqk->hsk", of_logits, query)
    of_query = _product("hqs,hsk->hqk", _row_major(of_logits.swapaxes(1, 2)), key)
    of_query, of_key, of_value = (_heads_last(array.astype(dtype), num_heads) for array in (of_query, of_key, of_value))
    return of_query, of_key, of_value


_attend.defvjp(_attend_forward, _attend_backward)


def _product(spec: str, first: Array, second: Array) -> Array:
    return jnp.einsum(spec, first, second, preferred_element_type=jnp.float32)


def _row_major(x: Array) -> Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _heads_first(x: Float[Array, "B L N K"]) -> Float[Array, "B*N L K"]:
    return _row_major(rearrange(x, "b l n k -> (b n) l k"))


def _heads_last(x: Float[Array, "B*N L K"], num_heads: int) -> Float[Array, "B L N K"]:
    return rearrange(x, "(b n) l k -> b l n k", n=num_heads)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "xla": Implementation(_jax("xla")),
    "cudnn": Implementation(_jax("cudnn")),  # Nvidia GPUs, bfloat16 or float16
    "reference": Implementation(_reference),
    "cpu": Implementation(_cpu, takes_bias=False),
}


def dot_product_attention(
    query: Float[Array, "B Q N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    *,
    implementation: str,
    bias: Float[Array, "#B #N #Q #S"] | None = None,
    scale: float | None = None,
    structure: AttentionStructure = FULL,
) -> Float[Array, "B Q N K"]:
    """softmax(scale · query keyᵀ + bias) value, with scale 1/√K unless given, in the dtype of the query.

    Raises:
        ValueError: no implementation has this name.
        NotImplementedError: the implementation does not compute this structure, or takes no bias.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; there are {', '.join(IMPLEMENTATIONS)}.")
    chosen = IMPLEMENTATIONS[implementation]
    if structure.kind not in chosen.structures:
        raise NotImplementedError(
            f"implementation={implementation!r} cannot compute structure {structure.kind!r}, "
            f"only {', '.join(sorted(chosen.structures))}."
        )
    if bias is not None and not chosen.takes_bias:
        raise NotImplementedError(f"implementation={implementation!r} takes no bias.")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return checkpoint_name(chosen.function(query, key, value, bias, scale), ATTENTION_OUT)
