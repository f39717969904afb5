"""The benchmark: what it counts, what it compares, and that its processes run."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax import benchmark
from magref_jax.benchmark import Arguments, Measurement, Start, Task
from magref_jax.config import DiTConfig
from magref_jax.models.dit import DiT

# Wide enough for the matrix products to be nearly all of the work.
WIDE = DiTConfig(dim=512, ffn_dim=1408, num_heads=8, num_layers=1, dtype="float32", remat="none", attention="reference")
TINY = DiTConfig(
    dim=24,
    ffn_dim=32,
    num_heads=2,
    num_layers=2,
    in_channels=6,
    out_channels=4,
    text_dim=10,
    text_len=12,
    image_dim=14,
    freq_dim=16,
    dtype="float32",
    remat="none",
    attention="cpu",
)


def abstract(config: DiTConfig, size: tuple[int, int, int]):
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in benchmark._dit_inputs(config, size)]
    params = jax.eval_shape(DiT(config).init, jax.random.key(0), *inputs)["params"]
    return params, inputs


@pytest.mark.parametrize("size", [(2, 30, 52), (5, 30, 52)])
def test_flops_are_those_that_xla_counts(size):
    params, inputs = abstract(WIDE, size)
    counted = jax.jit(DiT(WIDE).apply).lower({"params": params}, *inputs).cost_analysis()["flops"]

    tokens = benchmark.num_tokens(WIDE, size)
    assert tokens == size[0] * 390
    ours = benchmark.dit_flops(WIDE, tokens, 769) + benchmark.context_flops(WIDE, 512, 257)
    # XLA also counts what is no matrix product: norms, softmax, rotations.
    assert 0.95 * counted < ours < counted


def test_flops_of_a_layer_do_not_depend_on_the_others():
    counts = [benchmark.dit_flops(dataclasses.replace(WIDE, num_layers=n), 780, 769) for n in (1, 2, 3)]
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0


def test_flops_of_the_full_size():
    # 4·L²·D of self-attention in 40 layers of width 5120, and 2·L for each of the parameters of the layers' products.
    tokens, dim, ffn_dim = 32760, 5120, 13824
    attention = 40 * 4 * tokens * (tokens + 769) * dim
    products = 2 * tokens * 40 * (6 * dim**2 + 2 * dim * ffn_dim)
    assert benchmark.dit_flops(DiTConfig(), tokens, 769) == pytest.approx(attention + products, rel=1e-3)


def test_presets_have_the_published_sizes():
    cases = {
        "tiny": ([(9, 30, 52), (21, 30, 52)], [3510, 8190], "float32"),
        "14b": ([(21, 60, 104)], [32760], "bfloat16"),
    }
    for preset, (sizes, tokens, dtype) in cases.items():
        groups = list(benchmark.tasks(Arguments(part="dit", preset=preset, no_torch=True)))
        assert [group[0].size for group in groups] == sizes
        assert [benchmark.num_tokens(group[0].config, group[0].size) for group in groups] == tokens
        assert all(
            [task.side for task in group] == ["jax"] and task.config.dtype == dtype
            for group in groups
            for task in group
        )
    params, _ = abstract(DiTConfig(), (1, 2, 2))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) > 14e9


def test_arguments_choose_the_tasks():
    arguments = Arguments(
        part="all", tokens=(390,), economies=True, attention="blockwise", dtype="bfloat16", no_torch=True
    )
    step, encode, decode = benchmark.tasks(arguments)
    assert [task.side for task in step] == ["jax", "jax, economies"]
    assert step[0].config.attention == "blockwise"
    assert step[0].config.dtype == "bfloat16"
    assert not encode[0].convolution_is_chosen
    assert [encode[0].part, decode[0].part] == ["vae_encode", "vae_decode"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": (3511,)}, r"tokens=3511 must be a multiple of 390"),
        ({"tokens": (390,), "preset": "14b"}, r"tokens=390 must be a multiple of 1560"),
        ({"repeats": 0}, r"repeats=0 must be at least 1"),
        ({"prompt_tokens": 512}, r"prompt_tokens=512 must be below text_len=512"),
        ({"vae_size": (8, 96, 160)}, r"num_frames=8 must be 4n \+ 1"),
        ({"vae_size": (9, 90, 160)}, r"vae_size=\(9, 90, 160\) must have multiples of 8 pixels"),
        ({"attention": "flash"}, r"attention='flash' is unknown; there are auto, xla, cudnn"),
    ],
)
def test_wrong_arguments_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Arguments(**arguments)


def test_table_shows_medians_rates_and_ratios():
    task = Task("dit", "jax", TINY, (2, 8, 12), threads=2)
    ours = Measurement(task, Start("cpu", "cpu", "cpu", 4e9), (3.0, 5.0, 4.0), (2.0, 6.0, 4.0), 2**20, 6e9, None)
    theirs = Measurement(
        dataclasses.replace(task, side="torch"),
        Start("cpu", "cpu", "", None),
        (8.0, 8.0, 8.0),
        (8.0, 8.0, 8.0),
        2**21,
        6e9,
        1e-6,
    )
    lines = benchmark.table([ours, theirs]).splitlines()
    assert lines[0] == "DiT step, 48 tokens, float32"
    # 4 CPU seconds on two cores: 2 s, in which 6 GFLOP are 3 GFLOP/s of the 4 that products reach.
    assert "| jax, cpu | 4.000 | 2.000 | 0.003 | 75% | 1 |  |" in lines
    assert "| torch | 8.000 | 4.000 | 0.0015 | 38% | 2 | 1.0e-06 |" in lines
    assert lines[-1] == "jax / torch: time 0.50 (0.25 to 0.75), memory 0.50"


def test_weights_are_the_same_every_time_and_keep_signals_alive():
    first, second = (benchmark.random_weights(TINY) for _ in range(2))
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name])
    velocity = benchmark._call(Task("dit", "jax", TINY, (2, 8, 12), prompt_tokens=3))()
    assert 0.2 < np.std(velocity) < 5


def test_large_weights_are_made_on_the_device(monkeypatch):
    monkeypatch.setattr(benchmark, "SHARED_PARAMETERS", 0)
    config = dataclasses.replace(TINY, dtype="bfloat16", attention="blockwise")
    params = benchmark._jax_params(config)
    shapes, _ = abstract(config, (1, 2, 2))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    kernel = params["blocks"]["self_attention"]["query"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert np.std(kernel.astype(np.float32)) == pytest.approx(24**-0.5, rel=0.1)
    assert not np.array_equal(kernel[0], kernel[1])
    velocity = benchmark._call(Task("dit", "jax", config, (2, 8, 12), prompt_tokens=3))()
    assert np.isfinite(velocity).all()


def test_sides_run_in_turns_in_processes_of_their_own():
    sides = ("jax", "jax, economies")
    measurements = benchmark.measure(
        [Task("dit", side, TINY, (2, 8, 12), prompt_tokens=3) for side in sides], repeats=2
    )
    plain, economies = measurements
    assert plain.difference is None
    assert economies.difference < 1e-5  # the economies are exact
    assert economies.flops < plain.flops
    for m in measurements:
        assert m.start.platform == "cpu"
        assert len(m.wall) == len(m.cpu) == 2
        assert min(m.wall) > 0


def test_process_that_fails_is_an_error_that_names_its_task():
    with pytest.raises(RuntimeError, match="DiT step, 48 tokens, float32: the process of jax ended"):
        benchmark.measure([Task("dit", "jax", dataclasses.replace(TINY, attention="flash"), (2, 8, 12))], repeats=1)
