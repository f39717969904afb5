"""What is read off HLO, against programs of known content."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from magref_jax.hlo import Collective, count_flops, parse_collectives
from magref_jax.sharding import make_mesh


def test_collectives_of_a_program_of_known_content():
    mesh = make_mesh("fsdp=4,tensor=2")

    def step(x, _):
        gathered = lax.all_gather(x, "fsdp")  # of [4 16] float32, 256 bytes, from 3 others
        return jnp.tanh(gathered).sum(0), None

    def program(x):
        x, _ = lax.scan(step, x, length=5)
        x, _ = lax.scan(lambda x, _: lax.scan(step, x, length=3), x, length=2)  # 6 more
        return lax.psum(x, ("fsdp", "tensor"))  # 2 · 7/8 of 256 bytes

    sharded = jax.shard_map(program, mesh=mesh, in_specs=P(("fsdp", "tensor")), out_specs=P(), check_vma=False)
    text = jax.jit(sharded).lower(jnp.zeros((32, 16))).compile().as_text()
    found, unknown = parse_collectives(text)
    assert found == (Collective("all-gather", 11, 11 * 256 * 3), Collective("all-reduce", 1, 448))
    assert unknown == 0


HLO = """
HloModule example

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inside (x: bf16[2,8]) -> bf16[8,8] {
  %x = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gathered = bf16[8,8]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
}

%body (state: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %state = (s32[], bf16[2,8]{1,0}) parameter(0)
  %tokens = bf16[2,8]{1,0} get-tuple-element(%state), index=1
  %fused = bf16[8,8]{1,0} fusion(%tokens), kind=kLoop, calls=%inside
  %send = (bf16[2,8]{1,0}, bf16[2,8]{1,0}, u32[], u32[]) collective-permute-start(%tokens), source_target_pairs={{0,1}}
  %sent = bf16[2,8]{1,0} collective-permute-done(%send)
  ROOT %next = (s32[], bf16[2,8]{1,0}) tuple(%i, %sent)
}

%condition (state: (s32[], bf16[2,8])) -> pred[] {
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%forever (state: (s32[], bf16[2,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %j), direction=LT
}

ENTRY %main (x: bf16[2,8]) -> bf16[2,8] {
  %loop = (s32[], bf16[2,8]{1,0}) while(%start), condition=%condition, body=%body
  %other = (s32[], bf16[2,8]{1,0}) while(%loop), condition=%forever, body=%body
  %big = f32[100]{0} constant({...})
  %total = f32[100]{0} all-reduce(%big), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %pair = f32[10]{0} reduce-scatter(%large), replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add
  %large = f32[20]{0} constant({...})
  ROOT %part = f32[5]{0} reduce-scatter(%large), replica_groups=mesh['a'=2,'b'=8] {'a','b':(2)2}, to_apply=%add
}
"""


def test_collectives_of_a_text():
    found, unknown = parse_collectives(HLO)
    assert found == (
        Collective("all-gather", 8, 8 * 32 * 3),  # 7 times, and once in the loop without a number
        Collective("all-reduce", 1, 600),
        Collective("collective-permute", 8, 8 * 32),
        Collective("reduce-scatter", 2, 80 // 2 + 80 * 3 // 4),
    )
    assert unknown == 1


UNROLLED = """
HloModule example

%body (state: (bf16[2,8], u32[])) -> (bf16[2,8], u32[]) {
  %state = (bf16[2,8]{1,0}, u32[]{:T(128)}) parameter(0)
  %step = u32[]{:T(128)} constant(STEP)
  %tokens = bf16[2,8]{1,0} get-tuple-element(%state), index=0
  %i = u32[]{:T(128)} get-tuple-element(%state), index=1
  %there = bf16[2,8]{1,0} collective-permute(%tokens), source_target_pairs={{0,1}}
  %after = u32[]{:T(128)} add(%i, %step)
  ROOT %next = (bf16[2,8]{1,0}, u32[]{:T(128)}) tuple(%there, %after)
}

%condition (state: (bf16[2,8], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(7)
  %before = (bf16[2,8]{1,0}, u32[]{:T(128)}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%before), index=1
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (x: bf16[2,8]) -> bf16[2,8] {
  ROOT %loop = (bf16[2,8]{1,0}, u32[]{:T(128)}) while(%start), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(("step", "times"), [(1, 7), (2, 4), (7, 1)])
def test_a_loop_that_the_compiler_unrolled_runs_less_often(step, times):
    found, unknown = parse_collectives(UNROLLED.replace("STEP", str(step)))
    assert found == (Collective("collective-permute", times, times * 32),)
    assert unknown == 0


@pytest.mark.parametrize(("mesh", "parts"), [("", 1), ("fsdp=8", 8), ("fsdp=4,tensor=2", 4)])
def test_products_count_as_often_as_they_run(mesh, parts):
    """A loop of loops of x @ w, its rows over the axis `fsdp`; every device makes the rows that it has, and all of the columns."""
    made = make_mesh(mesh, jax.devices()[: 8 if mesh else 1])

    def program(x, w):
        def step(x, _):
            return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0], None

        return jnp.einsum("bn,bm->nm", lax.scan(step, x, length=3)[0], x[:, :7])

    x = jax.ShapeDtypeStruct((64, 16), jnp.bfloat16, sharding=NamedSharding(made, P("fsdp")))
    w = jax.ShapeDtypeStruct((16, 16), jnp.bfloat16, sharding=NamedSharding(made, P()))
    flops, unknown = count_flops(jax.jit(program).lower(x, w).compile().as_text())
    assert flops == (15 * 2 * 64 * 16 * 16 + 2 * 64 * 16 * 7) // parts
    assert unknown == 0


def test_products_of_batches_and_of_a_loop_without_a_number():
    def program(x, y, stop):
        return lax.while_loop(lambda state: state[0] < stop, lambda state: (state[0] + 1, state[1] @ y), (0, x))

    x, y = jnp.zeros((3, 8, 8)), jnp.zeros((3, 8, 8))
    flops, unknown = count_flops(jax.jit(program).lower(x, y, 5).compile().as_text())
    assert (flops, unknown) == (3 * 2 * 8**3, 1)
