"""Scaled dot-product attention: one function, several named implementations.

The named implementation runs, or an exception says why it cannot; nothing falls back to another. "auto" is a name too: that
of the platform's. The softmax is float32.

Letters: B batch · Q query tokens · S key tokens · N heads · K head width
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float

ATTENTION_OUT = "attention_out"  # the name under which a remat policy may keep what attention returns

# "blockwise" and "cpu" take so many queries at a time, and "cpu" as many heads as leave the logits in the cache.
QUERY_BLOCK = 256
CACHED_LOGITS = 2**18
KEY_BLOCK = 512  # of "cpu", forward


@struct.dataclass
class AttentionStructure:
    """Which tokens see which, as a rule that an implementation can exploit rather than a dense Q x S mask."""

    kind: str = struct.field(pytree_node=False, default="full")


FULL = AttentionStructure("full")


@dataclasses.dataclass(frozen=True)
class OfSomeKeys:
    """Attention to a part of the keys, such that the parts can be put together.

    forward(query, key, value, bias, scale) -> out [B Q N K], and the logarithm of the denominators of the softmax [B N Q].
    backward(query, key, value, bias, scale, out, log_total, cotangent) -> gradients of query, key and value, where `out` and
    `log_total` are of all keys and the gradients of these. A bias has no gradient; it may hide all keys with a large number.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A function of (query, key, value, bias, scale), and the kinds of structure that it computes."""

    function: Callable[..., Array]
    structures: frozenset[str] = frozenset({"full"})
    of_some_keys: OfSomeKeys | None = None  # what a ring of devices needs


def _jax(name: Literal["xla", "cudnn"]) -> Callable[[Array, Array, Array, Array | None, float], Array]:
    def attend(query: Array, key: Array, value: Array, bias: Array | None, scale: float) -> Array:
        if bias is not None and name == "cudnn":  # which wants one for every query, in its own dtype
            shape = (*bias.shape[:2], query.shape[1], key.shape[1])
            bias = jnp.broadcast_to(bias, shape).astype(query.dtype)
        return jax.nn.dot_product_attention(query, key, value, bias, scale=scale, implementation=name)

    return attend


def _reference(query: Array, key: Array, value: Array, bias: Array | None, scale: float) -> Array:
    logits = jnp.einsum("bqnk,bsnk->bnqs", query, key, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits += bias
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bnqs,bsnk->bqnk", weights, value.astype(jnp.float32)).astype(query.dtype)


def _blockwise(query: Array, key: Array, value: Array, bias: Array | None, scale: float) -> Array:
    """XLA's attention of one block of queries after another, each made again in the backward pass."""
    num_queries = query.shape[1]

    @jax.checkpoint
    def block(of_block: tuple[Array, Array | None]) -> Array:
        query, bias = of_block
        return _jax("xla")(query, key, value, None if bias is None else rearrange(bias, "b q n s -> b n q s"), scale)

    rows = None if bias is None else _split_bias(rearrange(bias, "b n q s -> b q n s"), num_queries)
    return _join(lax.map(block, (_split(query), rows)), num_queries)


def _cpu(query: Array, key: Array, value: Array, bias: Array | None, scale: float) -> Array:
    return _attend(scale, query, key, value, _bias_heads_first(bias, query, key))


def _some_keys_forward(
    query: Array, key: Array, value: Array, bias: Array | None, scale: float
) -> tuple[Float[Array, "B Q N K"], Float[Array, "B N Q"]]:
    num_heads, bias = query.shape[2], _bias_heads_first(bias, query, key)
    query, key, value = (_heads_first(array) for array in (query, key, value))
    out, log_total = _forward_by_heads(scale, query, key, value, bias)
    return _heads_last(out, num_heads), rearrange(log_total, "(b n) q -> b n q", n=num_heads)


def _some_keys_backward(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    scale: float,
    out: Float[Array, "B Q N K"],
    log_total: Float[Array, "B N Q"],
    cotangent: Float[Array, "B Q N K"],
) -> tuple[Float[Array, "B Q N K"], Float[Array, "B S N K"], Float[Array, "B S N K"]]:
    bias, log_total = _bias_heads_first(bias, query, key), rearrange(log_total, "b n q -> (b n) q")
    query, key, value, out = (_heads_first(array) for array in (query, key, value, out))
    return _attend_backward(scale, (query, key, value, bias, out, log_total), cotangent)[:3]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    scale: float,
    query: Float[Array, "B Q N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    bias: Float[Array, "B*N #Q S"] | None,
) -> Float[Array, "B Q N K"]:
    """Attention whose products, and those of its derivatives, have the form that XLA runs fastest on a CPU.

    That is: float32 results, row-major operands, heads in front. Of the softmax only the logarithm of its denominator is
    kept; the weights are made again in the backward pass, with the keys as rows, so that only one of its four products
    needs a transposed copy. A few heads and a block of queries at a time, so that logits and weights stay in the cache.
    """
    return _attend_forward(scale, query, key, value, bias)[0]


def _attend_forward(
    scale: float, query: Array, key: Array, value: Array, bias: Array | None
) -> tuple[Array, tuple[Array | None, ...]]:
    num_heads = query.shape[2]
    query, key, value = (_heads_first(array) for array in (query, key, value))
    out, log_total = _forward_by_heads(scale, query, key, value, bias)
    # Named, so that a remat policy keeps them: without one of them all of this would be computed again.
    out, log_total = checkpoint_name(out, ATTENTION_OUT), checkpoint_name(log_total, ATTENTION_OUT)
    return _heads_last(out, num_heads), (query, key, value, bias, out, log_total)


def _forward_by_heads(
    scale: float,
    query: Float[Array, "H Q K"],
    key: Float[Array, "H S K"],
    value: Float[Array, "H S K"],
    bias: Float[Array, "H #Q S"] | None,
) -> tuple[Float[Array, "H Q K"], Float[Array, "H Q"]]:
    num_queries = query.shape[1]

    def group(of_heads: tuple[Array, Array, Array, Array | None]) -> tuple[Array, Array]:
        query, key, value, bias = of_heads
        blocks = _split(query), _split_bias(bias, num_queries)
        _, (out, log_total) = _scan(
            lambda _, block: (None, _forward(scale, block[0], key, value, block[1])), None, blocks
        )
        return _join(out, num_queries), _join(log_total, num_queries)

    return _by_heads(group, (query, key, value, bias))


def _attend_backward(
    scale: float, saved: tuple[Array, Array, Array, Array | None, Array, Array], cotangent: Array
) -> tuple[Array, Array, Array, Array | None]:
    query, key, value, bias, out, log_total = saved
    dtype, num_heads, num_queries = query.dtype, cotangent.shape[2], query.shape[1]
    cotangent = _heads_first(cotangent)
    delta = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def group(of_heads: tuple[Any, ...]) -> tuple[Array, Array, Array, Array | None]:
        query, key, value, bias, *rest = of_heads

        def block(sums: tuple[Array, Array], of_block: tuple[Any, ...]) -> tuple[tuple[Array, Array], Any]:
            query, bias, *rest = of_block
            of_query, of_key, of_value, of_bias = _backward(scale, query, key, value, bias, *rest)
            return (sums[0] + of_key, sums[1] + of_value), (of_query.astype(dtype), of_bias)

        zeros = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
        # A row of padding has cotangent and delta zero, and so no part in any gradient.
        blocks = (_split(query), _split_bias(bias, num_queries), *map(_split, rest))
        (of_key, of_value), (of_query, of_bias) = _scan(block, zeros, blocks)
        if bias is not None:
            of_bias = jnp.sum(of_bias, axis=0) if bias.shape[1] == 1 else _join(of_bias, num_queries)
        return _join(of_query, num_queries), of_key.astype(dtype), of_value.astype(dtype), of_bias

    *of_inputs, of_bias = _by_heads(group, (query, key, value, bias, log_total, delta, cotangent))
    of_query, of_key, of_value = (_heads_last(array, num_heads) for array in of_inputs)
    return of_query, of_key, of_value, of_bias


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    scale: float,
    query: Float[Array, "H Q K"],
    key: Float[Array, "H S K"],
    value: Float[Array, "H S K"],
    bias: Float[Array, "H #Q S"] | None,
) -> tuple[Float[Array, "H Q K"], Float[Array, "H Q"]]:
    """What attention returns, and the logarithm of the denominator of its softmax."""
    num_keys = key.shape[1]
    size = _block_size(num_keys, KEY_BLOCK)
    num_blocks = num_keys // size

    def block(start: int | Array, size: int) -> Partial:
        keys, values = (lax.dynamic_slice_in_dim(array, start, size, 1) for array in (key, value))
        rows = None if bias is None else lax.dynamic_slice_in_dim(bias, start, size, 2)
        return _partial(scale, query, keys, values, rows)

    first = block(0, size)
    largest, total, out = lax.fori_loop(1, num_blocks, lambda i, sums: _add(sums, block(i * size, size)), first)
    if num_keys % size:
        largest, total, out = _add((largest, total, out), block(num_blocks * size, num_keys % size))
    return (out / total).astype(query.dtype), (largest + jnp.log(total))[..., 0]


# Largest logit, denominator and numerator of a softmax over some of the keys; the two are divided by exp(largest).
Partial = tuple[Float[Array, "H Q 1"], Float[Array, "H Q 1"], Float[Array, "H Q K"]]


def _partial(scale: float, query: Array, key: Array, value: Array, bias: Array | None) -> Partial:
    logits = _product("...qk,...sk->...qs", query, key) * scale
    if bias is not None:
        logits += bias
    # Not −∞, which a bias may be for all of these keys.
    largest = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), jnp.finfo(logits.dtype).min)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return largest, total, _product("...qs,...sk->...qk", weights.astype(query.dtype), value)


def _add(first: Partial, second: Partial) -> Partial:
    """The softmax over the keys of both."""
    largest = jnp.maximum(first[0], second[0])
    scale, other = jnp.exp(first[0] - largest), jnp.exp(second[0] - largest)
    return largest, first[1] * scale + second[1] * other, first[2] * scale + second[2] * other


def _backward(
    scale: float,
    query: Float[Array, "H Q K"],
    key: Float[Array, "H S K"],
    value: Float[Array, "H S K"],
    bias: Float[Array, "H #Q S"] | None,
    log_total: Float[Array, "H Q"],
    delta: Float[Array, "H Q"],
    cotangent: Float[Array, "H Q K"],
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of query, key, value and bias in float32; `delta` is out · cotangent of every query."""
    dtype = query.dtype
    logits = _product("...sk,...qk->...sq", key, query) * scale
    if bias is not None:
        logits += bias.swapaxes(-1, -2)
    weights = jnp.exp(logits - log_total[..., None, :])
    of_value = _product("...sq,...qk->...sk", weights.astype(dtype), cotangent)
    of_weights = _product("...sk,...qk->...sq", value, cotangent)
    of_logits = weights * (of_weights - delta[..., None, :])
    of_product = (of_logits * scale).astype(dtype)
    of_key = _product("...sq,...qk->...sk", of_product, query)
    of_query = _product("...qs,...sk->...qk", _row_major(of_product.swapaxes(-1, -2)), key)
    if bias is None:
        return of_query, of_key, of_value, None
    of_bias = of_logits.swapaxes(-1, -2)
    return of_query, of_key, of_value, jnp.sum(of_bias, -2, keepdims=True) if bias.shape[-2] == 1 else of_bias


def _by_heads(function: Callable[[Any], Any], arrays: tuple[Any, ...]) -> Any:
    """`function` of one group of heads after another; the first two arrays are query and key."""
    (num_heads, num_queries), num_keys = arrays[0].shape[:2], arrays[1].shape[1]
    most = max(1, CACHED_LOGITS // (min(num_queries, QUERY_BLOCK) * num_keys))
    size = max(size for size in range(1, min(most, num_heads) + 1) if num_heads % size == 0)
    groups = jax.tree.map(lambda x: x.reshape(num_heads // size, size, *x.shape[1:]), arrays)
    return jax.tree.map(
        lambda x: x.reshape(num_heads, *x.shape[2:]), _scan(lambda _, x: (None, function(x)), None, groups)[1]
    )


def _scan(function: Callable[[Any, Any], tuple[Any, Any]], start: Any, xs: Any) -> tuple[Any, Any]:
    """`lax.scan` whose bfloat16 results are written as integers.

    To write one piece of a bfloat16 array, XLA (of jax 0.10.2) converts all of it on a CPU.
    """
    dtypes = jax.tree.map(lambda x: x.dtype, jax.eval_shape(function, start, jax.tree.map(lambda x: x[0], xs))[1])

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        carry, results = function(carry, x)
        return carry, jax.tree.map(lambda x: _as(jnp.uint16, x) if x.dtype == jnp.bfloat16 else x, results)

    last, results = lax.scan(step, start, xs)
    return last, jax.tree.map(lambda x, dtype: _as(dtype, x), results, dtypes)


def _as(dtype: DTypeLike, x: Array) -> Array:
    """The same bits."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def _split(x: Float[Array, "H Q *rest"]) -> Float[Array, "blocks H block *rest"]:
    """Blocks of equally many queries, the last one padded with zeros."""
    size = _block_size(x.shape[1], QUERY_BLOCK)
    num_blocks = _num_blocks(x.shape[1])
    x = jnp.pad(x, [(0, 0), (0, num_blocks * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, size, *x.shape[2:]), 1, 0)


def _split_bias(
    bias: Float[Array, "H #Q *rest"] | None, num_queries: int
) -> Float[Array, "blocks H #block *rest"] | None:
    if bias is None or bias.shape[1] > 1:
        return None if bias is None else _split(bias)
    return jnp.broadcast_to(bias, (_num_blocks(num_queries), *bias.shape))


def _join(x: Float[Array, "blocks H block *rest"], num_queries: int) -> Float[Array, "H Q *rest"]:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :num_queries]


def _num_blocks(num_queries: int) -> int:
    return -(-num_queries // QUERY_BLOCK)


def _block_size(length: int, most: int) -> int:
    """That of blocks which are as few as can be and as equal as can be, the last one at most shorter."""
    return -(-length // -(-length // most))


def _product(spec: str, first: Array, second: Array) -> Array:
    return jnp.einsum(spec, first, second, preferred_element_type=jnp.float32)


def _row_major(x: Array) -> Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _heads_first(x: Float[Array, "B L N K"]) -> Float[Array, "B*N L K"]:
    return _row_major(rearrange(x, "b l n k -> (b n) l k"))


def _bias_heads_first(
    bias: Float[Array, "#B #N #Q #S"] | None, query: Float[Array, "B Q N K"], key: Float[Array, "B S N K"]
) -> Float[Array, "B*N #Q S"] | None:
    if bias is None:
        return None
    bias = jnp.broadcast_to(bias, (query.shape[0], query.shape[2], bias.shape[2], key.shape[1]))
    return rearrange(bias, "b n q s -> (b n) q s")


def _heads_last(x: Float[Array, "B*N L K"], num_heads: int) -> Float[Array, "B L N K"]:
    return rearrange(x, "(b n) l k -> b l n k", n=num_heads)


_LEAN = OfSomeKeys(_some_keys_forward, _some_keys_backward)


def _splash(query: Array, key: Array, value: Array, bias: Array | None, scale: float) -> Array:
    """The TPU's kernel; its modules take a second to import, which no other platform needs to spend."""
    from magref_jax.models.splash import splash_attention

    return splash_attention(query, key, value, bias, scale, residual_name=ATTENTION_OUT)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "xla": Implementation(_jax("xla")),
    "cudnn": Implementation(_jax("cudnn")),  # Nvidia GPUs, bfloat16 or float16
    "splash": Implementation(_splash),  # TPUs
    "reference": Implementation(_reference),
    "cpu": Implementation(_cpu, of_some_keys=_LEAN),  # fast there, forward and backward, and lean
    "blockwise": Implementation(_blockwise, of_some_keys=_LEAN),  # lean anywhere; batch and heads may be sharded
}


# What "auto" means, by platform; "blockwise" elsewhere.
AUTO = {"cpu": "cpu", "gpu": "cudnn", "tpu": "splash"}


def automatic(dtype: DTypeLike) -> str:
    """The name of the fastest implementation that computes in this dtype on the default device."""
    name = AUTO.get(jax.default_backend(), "blockwise")
    # cuDNN's takes 16-bit numbers alone.
    return "blockwise" if name == "cudnn" and jnp.dtype(dtype).itemsize > 2 else name


def find_implementation(name: str) -> Implementation:
    """Of this name, which is not "auto".

    Raises:
        ValueError: there is none.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown; there are auto, {', '.join(IMPLEMENTATIONS)}.")
    return IMPLEMENTATIONS[name]


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

    `implementation` is a name in `IMPLEMENTATIONS`, or "auto".

    Raises:
        ValueError: no implementation has this name.
        NotImplementedError: the implementation does not compute this structure.
    """
    implementation = automatic(query.dtype) if implementation == "auto" else implementation
    chosen = find_implementation(implementation)
    if structure.kind not in chosen.structures:
        raise NotImplementedError(
            f"implementation={implementation!r} cannot compute structure {structure.kind!r}, "
            f"only {', '.join(sorted(chosen.structures))}."
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bias = None if bias is None else bias.astype(jnp.float32)  # as the logits that it is added to
    return checkpoint_name(chosen.function(query, key, value, bias, scale), ATTENTION_OUT)
