"""A LoRA that was trained here, read by diffusers' own loader and merged in torch: the velocity is that of training."""

import functools
import pathlib
from typing import Any, get_args

import jax
import numpy as np
import pytest
import torch
from diffusers.loaders import WanLoraLoaderMixin

from magref_jax.convert.dit import dit_rules
from magref_jax.convert.lora import Family, trained_lora, write_lora
from magref_jax.convert.rules import convert, flatten, torch_shapes
from magref_jax.models.adapters import LoraConfig, init_lora, scale_lora
from magref_jax.models.dit import DiT
from magref_jax.models.layers import LORA
from tests.parity.test_dit import (
    IMAGE_TO_VIDEO,
    TOLERANCE,
    abstract_inputs,
    build_torch_model,
    random_inputs,
    run_torch,
)
from tests.parity.torch_random import random_tensors

pytestmark = pytest.mark.parity

ALL_OF_A_BLOCK = r"blocks/\w+/\w+"  # what diffusers' readers of all families know


@functools.cache
def base() -> tuple[dict[str, np.ndarray], Any]:
    """Tensors by their original names, and our parameters."""
    abstract = jax.eval_shape(DiT(IMAGE_TO_VIDEO).init, jax.random.key(0), *abstract_inputs(IMAGE_TO_VIDEO))["params"]
    rules = dit_rules(IMAGE_TO_VIDEO)
    tensors = random_tensors(torch_shapes(rules, abstract), seed=7)
    return tensors, convert(rules, tensors, abstract)


@functools.cache
def trained(lora: LoraConfig) -> Any:
    """Adapters with a b that is no longer zero."""
    rng = np.random.default_rng(8)
    tree = jax.eval_shape(functools.partial(init_lora, IMAGE_TO_VIDEO, lora), jax.random.key(0))
    return jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), tree)


@functools.cache
def velocity_in_training(lora: LoraConfig) -> np.ndarray:
    variables = {"params": base()[1], LORA: scale_lora(lora, trained(lora))}
    return np.asarray(jax.jit(DiT(IMAGE_TO_VIDEO).apply)(variables, *random_inputs(IMAGE_TO_VIDEO, seed=9)))


def add_with_torch(model: torch.nn.Module, folder: pathlib.Path, name: str) -> set[str]:
    """Adds what diffusers reads from the file, alpha/rank · B · A, to the weights; returns their names."""
    tensors, metadata = WanLoraLoaderMixin.lora_state_dict(
        folder, weight_name=name, local_files_only=True, return_lora_metadata=True
    )
    alpha = None if metadata is None else metadata["transformer.lora_alpha"]
    state, changed = model.state_dict(), set()
    for key, down in tensors.items():
        if key.endswith("lora_A.weight"):
            up = tensors[key.replace("lora_A", "lora_B")]
            weight = key.removeprefix("transformer.").replace("lora_A.weight", "weight")
            state[weight] += (1.0 if alpha is None else alpha / len(down)) * up @ down
            changed.add(weight)
    assert 2 * len(changed) == len(tensors)
    return changed


@pytest.mark.parametrize("family", get_args(Family))
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_diffusers_merges_what_was_trained(tmp_path, close, family, alpha):
    lora = LoraConfig(rank=4, alpha=alpha, targets=ALL_OF_A_BLOCK)
    model = build_torch_model(IMAGE_TO_VIDEO, base()[0])
    inputs = random_inputs(IMAGE_TO_VIDEO, seed=9)
    without = run_torch(model, inputs)

    write_lora(tmp_path / "lora.safetensors", trained_lora(trained(lora), lora, IMAGE_TO_VIDEO), family)
    changed = add_with_torch(model, tmp_path, "lora.safetensors")
    expected = run_torch(model, inputs)

    # 10 attention layers with those for image tokens, and 2 of the feed-forward.
    assert len(changed) == IMAGE_TO_VIDEO.num_layers * 12
    assert len(flatten(trained(lora))) == 2 * 12
    assert np.abs(expected - without).max() > 0.5
    close("trained LoRA", velocity_in_training(lora), expected, TOLERANCE)
