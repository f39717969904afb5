"""The splash kernel's values and gradients in interpret mode, and that the TPU compiler takes it."""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magref_jax.models.splash import LANES, Tiles, splash_attention
from magref_jax.sharding import make_mesh

SMALL = Tiles(128, 256, 128, 128, 128, 128)


def draw(batch, queries, keys, heads, width, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (batch, queries, heads, width), (batch, keys, heads, width), (batch, keys, heads, width)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def plain(query, key, value, bias, scale):
    """In float64, straight from the definition."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    logits = np.einsum("bqnk,bsnk->bnqs", query, key) * scale
    logits = logits if bias is None else logits + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights, np.einsum("bnqs,bsnk->bqnk", weights, value)


def plain_gradients(query, key, value, weights, cotangent, scale):
    query, key, value, cotangent = (np.asarray(array, np.float64) for array in (query, key, value, cotangent))
    of_weights = np.einsum("bqnk,bsnk->bnqs", cotangent, value)
    of_logits = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) * scale
    return (
        np.einsum("bnqs,bsnk->bqnk", of_logits, key),
        np.einsum("bnqs,bqnk->bsnk", of_logits, query),
        np.einsum("bnqs,bqnk->bsnk", weights, cotangent),
    )


@pytest.mark.parametrize(
    ("queries", "keys", "with_bias"),
    [(140, 300, False), (70, 37, True)],  # two tiles each way, the last not full; less than one, and a bias
)
def test_values_and_gradients(queries, keys, with_bias):
    inputs = draw(1, queries, keys, 2, 16)
    bias = None
    if with_bias:
        bias = np.zeros((1, 1, 1, keys), np.float32)
        bias[..., -1], bias[..., 3] = np.log(400.0), -np.inf
    attend = functools.partial(splash_attention, bias=bias, scale=0.3, tiles=SMALL, interpret=True)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(inputs[0].shape), jnp.float32)
    out, gradients = jax.jit(lambda *x: (lambda y, pull: (y, pull(cotangent)))(*jax.vjp(attend, *x)))(*inputs)
    weights, expected = plain(*inputs, bias, 0.3)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)
    for name, actual, wanted in zip("qkv", gradients, plain_gradients(*inputs, weights, cotangent, 0.3), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5, err_msg=name)


def test_a_bias_in_bfloat16_is_as_exact_as_in_float32():
    """Log 400 rounds to 6 in bfloat16, which would make the padding count 403 times and not 400."""
    query, key, value = draw(1, 8, 40, 1, 16, jnp.bfloat16)
    query = query * 0  # all logits are the bias
    bias = np.zeros((1, 1, 1, 40), np.float32)
    bias[..., -1] = np.log(390.0)
    out = splash_attention(query, key, value.astype(jnp.bfloat16), bias, interpret=True)
    exact = (390 * np.asarray(value, np.float64)[0, -1, 0] + np.asarray(value, np.float64)[0, :-1, 0].sum(0)) / 429
    np.testing.assert_allclose(np.asarray(out, np.float64)[0, 0, 0], exact, rtol=0, atol=2**-8)


def test_a_bias_of_queries_is_refused():
    query, key, value = draw(1, 4, 6, 1, 8)
    with pytest.raises(NotImplementedError, match=r"bias has shape \(1, 1, 4, 6\); splash attention takes one per key"):
        splash_attention(query, key, value, np.zeros((1, 1, 4, 6)), interpret=True)


def test_on_a_mesh_samples_and_heads_are_cut_and_nothing_is_exchanged():
    mesh = make_mesh("data=2,tensor=2,context=2")
    query, key, value = draw(2, 130, 130, 2, 8)
    placed = jax.device_put((query, key, value), NamedSharding(mesh, P("data", None, "tensor")))
    with jax.set_mesh(mesh):
        compiled = jax.jit(functools.partial(splash_attention, interpret=True)).lower(*placed).compile()
    out = compiled(*placed)
    np.testing.assert_allclose(out, plain(query, key, value, None, 8**-0.5)[1], rtol=0, atol=2e-6)
    assert {shard.data.shape for shard in out.addressable_shards} == {(1, 130, 1, 8)}
    assert "all-gather" not in compiled.as_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_tpu_compiler_takes_it_at_480p(name):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    chips = np.array(topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:4]).reshape(1, 2, 1, 2)
    mesh = Mesh(chips, ("data", "fsdp", "context", "tensor"), axis_types=(AxisType.Auto,) * 4)
    tokens = jax.ShapeDtypeStruct(
        (2, 32760, 4, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp", None, "tensor"))
    )

    def total(*inputs):
        return splash_attention(*inputs).astype(jnp.float32).sum()

    # Of bfloat16 the tests' own "highest" has no meaning, and the compiler refuses it.
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        compiled = jax.jit(jax.value_and_grad(total, (0, 1, 2))).lower(tokens, tokens, tokens).compile()
    stats = compiled.memory_analysis()
    one = 32760 * 2 * LANES * 2  # bytes of queries on a chip: one sample, two heads
    assert 3 * one <= stats.argument_size_in_bytes < 3.1 * one
    assert stats.temp_size_in_bytes < 20 * one  # linear in the tokens; the logits of one head alone are 4 GB
