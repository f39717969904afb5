"""Attention on TPUs: the splash kernel that comes with JAX, for any number of tokens and sharded over a mesh.

The kernel works in tiles, knows no scale and sees one sample; what surrounds it is here. With Auto mesh axes XLA cannot cut
a kernel, so that under `jax.set_mesh` it runs in a `jax.shard_map`: samples over `data` and `fsdp`, heads over `tensor`,
tokens whole. Where the caller has mapped those axes already, as Ulysses does, it runs as it is.

Letters: B batch · Q query tokens · S key tokens · N heads · K head width
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

LANES = 128  # tokens of a tile are a multiple of this
HEAD_AXES, BATCH_AXES = ("tensor",), ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The most tokens of one tile: of queries, of keys in memory, of keys computed at once; forward and backward.

    A tile of logits, float32, is in the chip's vector memory, several of them in the backward pass.
    """

    query: int = 1024
    key: int = 2048
    key_compute: int = 512
    backward_query: int = 1024
    backward_key: int = 1024
    backward_key_compute: int = 512


def splash_attention(
    query: Float[Array, "B Q N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    bias: Float[Array, "#B #N 1 S"] | None = None,
    scale: float | None = None,
    *,
    tiles: Tiles = Tiles(),
    residual_name: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B Q N K"]:
    """softmax(scale · query keyᵀ + bias) value, with scale 1/√K unless given, in the dtype of the query; forward and backward.

    A bias is of keys alone, the same for every query, and has no gradient. Under `residual_name` a remat policy may keep what
    the backward pass needs of the forward pass. `interpret` runs the kernel's Python on any platform, slowly: for tests. In
    bfloat16 the compiler wants `jax_default_matmul_precision` unset.

    Raises:
        NotImplementedError: a bias that differs between queries.
    """
    if bias is not None:
        if bias.shape[2] != 1:
            raise NotImplementedError(f"bias has shape {bias.shape}; splash attention takes one per key, [B N 1 S].")
        bias = jnp.broadcast_to(bias, (query.shape[0], query.shape[2], 1, key.shape[1]))
    attend = functools.partial(
        _attend,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        tiles=tiles,
        residual_name=residual_name,
        interpret=interpret,
    )
    mesh = jax.sharding.get_abstract_mesh()
    batch = _axes(mesh, BATCH_AXES, query.shape[0])
    heads = _axes(mesh, HEAD_AXES, query.shape[2])
    if not _unmapped(mesh):
        return attend(query, key, value, bias)
    by_token = P(batch, None, heads, None)
    return jax.shard_map(
        attend,
        in_specs=(by_token, by_token, by_token, None if bias is None else P(batch, heads, None, None)),
        out_specs=by_token,
        check_vma=False,  # the kernel does not say over which axes its results vary
    )(query, key, value, bias)


def _unmapped(mesh: AbstractMesh) -> list[str]:
    """The mesh axes that XLA would have to cut the kernel over."""
    return [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual and mesh.shape[name] > 1
    ]


def _axes(mesh: AbstractMesh, names: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """Those of the axes that a dimension of this size is cut over: all that are unmapped, or none if they do not divide it."""
    chosen = tuple(name for name in names if name in _unmapped(mesh))
    return chosen if chosen and size % math.prod(mesh.shape[name] for name in chosen) == 0 else None


def _attend(
    query: Float[Array, "B Q N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    bias: Float[Array, "B N 1 S"] | None,
    *,
    scale: float,
    tiles: Tiles,
    residual_name: str | None,
    interpret: bool,
) -> Float[Array, "B Q N K"]:
    num_queries, num_keys, num_heads = query.shape[1], key.shape[1], query.shape[2]
    # Scaled in float32: one more rounding of the queries, not of the logits.
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    if bias is not None:
        query, key = _bias_as_channels(query, key, bias)
    sizes, padded_queries, padded_keys = _block_sizes(num_queries, num_keys, tiles)
    query, key, value = (
        _heads_first(array, length)
        for array, length in ((query, padded_queries), (key, padded_keys), (value, padded_keys))
    )
    segments = None
    if padded_keys != num_keys:
        # Padded queries are of the real segment: a row without any key would divide by zero.
        of_keys = (jnp.arange(padded_keys) >= num_keys).astype(jnp.int32)
        segments = kernel.SegmentIds(jnp.zeros(padded_queries, jnp.int32), of_keys)
    run = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((padded_queries, padded_keys))] * num_heads),
        block_sizes=sizes,
        residual_checkpoint_name=residual_name,
        interpret=interpret,
    )
    out: Array = jax.vmap(run, in_axes=(0, 0, 0, None))(query, key, value, segments)  # pyrefly: ignore[bad-assignment]
    return out[:, :, :num_queries].swapaxes(1, 2)


def _bias_as_channels(
    query: Float[Array, "B Q N K"], key: Float[Array, "B S N K"], bias: Float[Array, "B N 1 S"]
) -> tuple[Array, Array]:
    """Queries with ones behind them and keys with the bias: what it adds to the product is the bias.

    In as many terms as the dtype needs to hold a float32; −∞ is held by a number whose exponential is 0.
    """
    rest = jax.lax.stop_gradient(jnp.maximum(bias.astype(jnp.float32), -1e30))[:, :, 0].swapaxes(1, 2)
    terms = []
    for _ in range(1 if key.dtype == jnp.float32 else 3):
        terms.append(rest.astype(key.dtype))
        rest = rest - terms[-1].astype(jnp.float32)
    ones = jnp.ones((*query.shape[:3], len(terms)), query.dtype)
    return jnp.concatenate([query, ones], axis=-1), jnp.concatenate([key, jnp.stack(terms, axis=-1)], axis=-1)


def _heads_first(x: Float[Array, "B L N K"], length: int) -> Float[Array, "B N length K"]:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)


def _block_sizes(num_queries: int, num_keys: int, tiles: Tiles) -> tuple[kernel.BlockSizes, int, int]:
    """Tiles for these lengths, and the lengths with padding: whole tiles of either pass.

    Tiles are halved for short sequences, so that all of them divide one padded length.
    """
    query, backward_query = (_tile(num_queries, most) for most in (tiles.query, tiles.backward_query))
    key, backward_key = (_tile(num_keys, most) for most in (tiles.key, tiles.backward_key))
    sizes = kernel.BlockSizes(
        block_q=query,
        block_kv=key,
        block_kv_compute=math.gcd(key, tiles.key_compute),
        block_q_dkv=backward_query,
        block_kv_dkv=backward_key,
        block_kv_dkv_compute=math.gcd(backward_key, tiles.backward_key_compute),
        block_q_dq=backward_query,
        block_kv_dq=math.gcd(backward_key, tiles.backward_key_compute),
    )
    whole_queries, whole_keys = math.lcm(query, backward_query), math.lcm(key, backward_key)
    return sizes, -(-num_queries // whole_queries) * whole_queries, -(-num_keys // whole_keys) * whole_keys


def _tile(length: int, most: int) -> int:
    """The largest of most, most/2, most/4, … that wastes less than a quarter of the padded length, and at least `LANES`."""
    size = most
    while size > LANES and size % (2 * LANES) == 0 and 4 * (-length % size) > length + (-length % size):
        size //= 2
    return size
