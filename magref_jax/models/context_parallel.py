"""The attentions of the DiT on a mesh, where every device has some samples, some heads and some of the video tokens.

    ulysses   devices trade heads for tokens: each computes a part of the heads for all tokens. arXiv:2309.14509
    ring      keys and values go round; each device adds up the softmax of its own queries. arXiv:2310.01889
    auto      ulysses in groups as large as the heads allow, a ring of these groups. arXiv:2405.07719

On the axis `context` of size C, `ulysses` needs C to divide the heads of a device; `ring` needs an attention that also
returns the logarithm of its denominators (`OfSomeKeys`).

Letters: B batch · L video tokens · S other tokens · N heads · K head width
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from magref_jax.config import ContextParallel
from magref_jax.models.attention import (
    ATTENTION_OUT,
    FULL,
    IMPLEMENTATIONS,
    AttentionStructure,
    OfSomeKeys,
    automatic,
    dot_product_attention,
    find_implementation,
)
from magref_jax.sharding import activation_spec, current_mesh

HIDDEN = -1e30  # the logit of a key that is padding; finite, so that a block of padding has a softmax
TOKENS = ("batch", "tokens", "heads", "head_width")
WHOLE = ("batch", "text", "heads", "head_width")


def self_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B L N K"],
    value: Float[Array, "B L N K"],
    *,
    implementation: str,
    context_parallel: ContextParallel = "auto",
    structure: AttentionStructure = FULL,
    num_tokens: int | None = None,
) -> Float[Array, "B L N K"]:
    """`dot_product_attention` of the video tokens with each other, on the current mesh if there is one.

    `implementation` is what each device runs. Tokens from `num_tokens` on are padding, which no other token sees.

    Raises:
        ValueError: `context_parallel` is unknown, impossible with these heads, or a ring of an implementation that cannot be a
            part of one.
        NotImplementedError: a ring of another structure than all tokens.
    """
    mesh = current_mesh()
    if mesh is None:
        return dot_product_attention(query, key, value, implementation=implementation, structure=structure)
    spec = activation_spec(mesh, query.shape, TOKENS)
    size, num_heads = mesh.shape["context"], query.shape[2] // (mesh.shape["tensor"] if spec[2] else 1)
    exchange = find_exchange(context_parallel, size, num_heads)
    num_tokens = query.shape[1] if num_tokens is None else num_tokens
    if exchange.ring == 1:
        local = functools.partial(dot_product_attention, implementation=implementation, structure=structure)
    else:
        if structure.kind != "full":
            raise NotImplementedError(f"A ring over context={size} cannot compute structure {structure.kind!r}.")
        scale = query.shape[-1] ** -0.5
        local = functools.partial(_ring, _of_some_keys(implementation, query), exchange, num_tokens, scale)

    def on_device(query: Array, key: Array, value: Array) -> Array:
        if exchange.ulysses > 1:
            query, key, value = (exchange.heads_for_tokens(array) for array in (query, key, value))
        padding = query.shape[1] - num_tokens
        if exchange.ring == 1 and padding:  # here all tokens are together, the padding last
            out = local(*(array[:, :num_tokens] for array in (query, key, value)))
            out = jnp.pad(out, [(0, 0), (0, padding), (0, 0), (0, 0)])
        else:
            out = local(query, key, value)
        return exchange.tokens_for_heads(out) if exchange.ulysses > 1 else out

    return _on_devices(on_device, mesh, (spec, spec, spec), spec)(query, key, value)


def cross_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    *,
    implementation: str,
    bias: Float[Array, "1 1 1 S"] | None = None,
) -> Float[Array, "B L N K"]:
    """`dot_product_attention` of video tokens to others, which every device has: nothing is exchanged."""
    local = functools.partial(dot_product_attention, implementation=implementation)
    mesh = current_mesh()
    if mesh is None:
        return local(query, key, value, bias=bias)
    of_query, of_key = (activation_spec(mesh, x.shape, names) for x, names in ((query, TOKENS), (key, WHOLE)))
    if bias is None:
        return _on_devices(local, mesh, (of_query, of_key, of_key), of_query)(query, key, value)

    def with_bias(query: Array, key: Array, value: Array, bias: Array) -> Array:
        return local(query, key, value, bias=bias)

    return _on_devices(with_bias, mesh, (of_query, of_key, of_key, P()), of_query)(query, key, value, bias)


def _on_devices(
    function: Callable[..., Array], mesh: AbstractMesh, inputs: tuple[P, ...], out: P
) -> Callable[..., Array]:
    # Its check of what is equal on which device knows nothing of derivatives of one's own, nor of kernels.
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=out, check_vma=False)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How the devices of the axis `context` work together: in a ring of groups, neighbours being a group.

    A group holds neighbouring tokens, so that those of all groups are in order too.
    """

    ulysses: int  # devices of a group
    ring: int  # groups

    def _groups(self) -> list[list[int]] | None:
        if self.ring == 1:
            return None
        return [[group * self.ulysses + i for i in range(self.ulysses)] for group in range(self.ring)]

    def heads_for_tokens(self, x: Float[Array, "B l N K"]) -> Float[Array, "B l*u N/u K"]:
        return lax.all_to_all(x, "context", 2, 1, axis_index_groups=self._groups(), tiled=True)

    def tokens_for_heads(self, x: Float[Array, "B l*u N/u K"]) -> Float[Array, "B l N K"]:
        return lax.all_to_all(x, "context", 1, 2, axis_index_groups=self._groups(), tiled=True)

    def group(self) -> Int32[Array, ""]:
        """The number of this device's group."""
        return lax.axis_index("context") // self.ulysses

    def from_next(self, x: Array) -> Array:
        """What the same place of the next group has."""
        size = self.ulysses * self.ring
        return lax.ppermute(x, "context", [(device, (device - self.ulysses) % size) for device in range(size)])


def find_exchange(context_parallel: ContextParallel, size: int, num_heads: int) -> Exchange:
    """For an axis `context` of this size and so many heads on each device.

    Raises:
        ValueError: an unknown name, or heads that cannot be divided as it says.
    """
    if context_parallel == "ring":
        return Exchange(1, size)
    if context_parallel == "auto":
        ulysses = math.gcd(size, num_heads)
        return Exchange(ulysses, size // ulysses)
    if context_parallel != "ulysses":
        raise ValueError(f"context_parallel={context_parallel!r} is unknown; there are auto, ulysses, ring.")
    if num_heads % size:
        raise ValueError(
            f"context_parallel='ulysses' gives each device a part of the heads, and context={size} does not divide the "
            f"{num_heads} heads that a device has after tensor; take 'auto' or 'ring', or another mesh."
        )
    return Exchange(size, 1)


def _of_some_keys(implementation: str, query: Array) -> OfSomeKeys:
    if implementation == "auto":
        name = automatic(query.dtype)
        implementation = name if IMPLEMENTATIONS[name].of_some_keys else "blockwise"
    found = find_implementation(implementation).of_some_keys
    if found is None:
        able = ", ".join(name for name, candidate in IMPLEMENTATIONS.items() if candidate.of_some_keys)
        raise ValueError(
            f"implementation={implementation!r} does not return what a ring needs to add up blocks of keys; take {able}, or a "
            "mesh whose context divides the heads of a device."
        )
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _ring(
    attention: OfSomeKeys,
    exchange: Exchange,
    num_tokens: int,
    scale: float,
    query: Float[Array, "B l N K"],
    key: Float[Array, "B l N K"],
    value: Float[Array, "B l N K"],
) -> Float[Array, "B l N K"]:
    """Attention to the keys of all groups, which come by one after the other. No device ever holds more than two blocks."""
    return _ring_forward(attention, exchange, num_tokens, scale, query, key, value)[0]


def _ring_forward(
    attention: OfSomeKeys, exchange: Exchange, num_tokens: int, scale: float, query: Array, key: Array, value: Array
) -> tuple[Array, tuple[Array, ...]]:
    batch, length, num_heads, _ = query.shape
    bias = functools.partial(_bias, exchange, num_tokens, length)

    def add(out: Array, log_total: Array, key: Array, value: Array, step: int | Array) -> tuple[Array, Array]:
        of_block, log_of_block = attention.forward(query, key, value, bias(step), scale)
        log_both = jnp.logaddexp(log_total, log_of_block)
        out = out * _per_head(jnp.exp(log_total - log_both))
        return out + of_block.astype(jnp.float32) * _per_head(jnp.exp(log_of_block - log_both)), log_both

    def next_block(carry: tuple[Array, ...], step: Array) -> tuple[tuple[Array, ...], None]:
        out, log_total, key, value = carry
        # Does not wait for the computation, nor that for it.
        coming = exchange.from_next(key), exchange.from_next(value)
        return (*add(out, log_total, key, value, step), *coming), None

    nothing = jnp.zeros(query.shape, jnp.float32), jnp.full((batch, num_heads, length), jnp.finfo(jnp.float32).min)
    last = exchange.ring - 1
    (out, log_total, last_key, last_value), _ = lax.scan(next_block, (*nothing, key, value), jnp.arange(last))
    out, log_total = add(out, log_total, last_key, last_value, last)
    out = checkpoint_name(out.astype(query.dtype), ATTENTION_OUT)
    return out, (query, key, value, out, checkpoint_name(log_total, ATTENTION_OUT))


def _ring_backward(
    attention: OfSomeKeys,
    exchange: Exchange,
    num_tokens: int,
    scale: float,
    saved: tuple[Array, Array, Array, Array, Array],
    cotangent: Array,
) -> tuple[Array, Array, Array]:
    query, key, value, out, log_total = saved
    bias = functools.partial(_bias, exchange, num_tokens, query.shape[1])

    def next_block(carry: tuple[Array, ...], step: Array) -> tuple[tuple[Array, ...], None]:
        of_query, of_key, of_value, key, value = carry
        coming = exchange.from_next(key), exchange.from_next(value)
        added = attention.backward(query, key, value, bias(step), scale, out, log_total, cotangent)
        of_query, of_key, of_value = (
            total + part.astype(jnp.float32) for total, part in zip((of_query, of_key, of_value), added, strict=True)
        )
        # The gradients of a block of keys go round with it, and are at home after the last step.
        return (of_query, exchange.from_next(of_key), exchange.from_next(of_value), *coming), None

    zeros = (jnp.zeros(array.shape, jnp.float32) for array in (query, key, value))
    (*gradients, _, _), _ = lax.scan(next_block, (*zeros, key, value), jnp.arange(exchange.ring))
    of_query, of_key, of_value = (
        gradient.astype(array.dtype) for gradient, array in zip(gradients, (query, key, value), strict=True)
    )
    return of_query, of_key, of_value


_ring.defvjp(_ring_forward, _ring_backward)


def _bias(exchange: Exchange, num_tokens: int, length: int, step: int | Array) -> Float[Array, "1 1 1 l"] | None:
    """Hides the padding in the block of keys that this device has after so many steps."""
    if num_tokens == length * exchange.ring:
        return None
    block = (exchange.group() + step) % exchange.ring
    is_padding = block * length + jnp.arange(length) >= num_tokens
    return jnp.where(is_padding, HIDDEN, 0.0)[None, None, None]


def _per_head(x: Float[Array, "B N L"]) -> Float[Array, "B L N 1"]:
    return jnp.moveaxis(x, 1, 2)[..., None]
