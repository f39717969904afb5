"""What the benchmark times beside each other is the same computation."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from magref_jax import benchmark
from magref_jax.benchmark import Task
from magref_jax.config import DiTConfig, VAEConfig
from tests.test_benchmark import TINY

pytestmark = pytest.mark.parity

# diffusers finds the image tokens by counting back 512 text tokens.
CONFIG = dataclasses.replace(TINY, text_len=512)
SIZE = (2, 8, 12)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_steps_of_all_sides_are_equal(close):
    plain, economies, expected = (
        np.asarray(benchmark._call(Task("dit", side, CONFIG, SIZE, prompt_tokens=9))())
        for side in ("jax", "jax, economies", "torch")
    )
    assert np.std(expected) > 0.2
    close("benchmark: DiT step", plain, expected, 2e-5)
    close("benchmark: DiT step, economies", economies, expected, 2e-5)


@pytest.mark.parametrize("part", ["vae_encode", "vae_decode"])
def test_autoencoders_of_both_sides_are_equal(part, close):
    config = VAEConfig(base_dim=8, convolution="taps")
    actual, expected = (
        np.asarray(benchmark._call(Task(part, side, config, (5, 16, 24)))()) for side in ("jax", "torch")
    )
    assert np.std(expected) > 0.1
    close(f"benchmark: {part}", actual, expected, 2e-5)


def test_blocks_cost_what_is_counted():
    """Where diffusers is missing, its transformer is written out: by torch's own count."""
    config = DiTConfig(dim=64, ffn_dim=96, num_heads=4, num_layers=2, text_dim=40, image_dim=48, freq_dim=16)
    blocks = benchmark.torch_blocks(config).eval()
    inputs = [torch.from_numpy(x) for x in benchmark._dit_inputs(config, (3, 20, 24))]
    inputs[0] = inputs[0].permute(0, 4, 1, 2, 3)
    # The counter does not know torch's own attention of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        velocity = blocks(*inputs)[0]
    assert velocity.numel() == 16 * 3 * 20 * 24
    expected = benchmark.dit_flops(config, 360, 769) + benchmark.context_flops(config, 512, 257)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_blocks_stand_in_for_a_missing_diffusers(monkeypatch):
    find_spec = benchmark.importlib.util.find_spec
    monkeypatch.setattr(
        benchmark.importlib.util, "find_spec", lambda name: None if name == "diffusers" else find_spec(name)
    )
    velocity = benchmark._call(Task("dit", "torch", CONFIG, SIZE))()
    assert np.isfinite(velocity).all()
