"""Gradients of the training loss and steps of the optimiser against torch.

Gradients of torch's tensors go through the conversion table like the tensors themselves: every rule of the transformer is a
change of axes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from magref_jax.config import DiTConfig, Remat
from magref_jax.convert.dit import dit_rules
from magref_jax.convert.rules import convert, flatten, torch_shapes
from magref_jax.diffusion import flow
from magref_jax.models.dit import DiT
from magref_jax.training.config import OptimizerConfig
from magref_jax.training.optimizer import make_optimizer
from tests.parity.test_dit import CONFIGS, abstract_inputs, build_torch_model
from tests.parity.torch_random import random_tensors

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4  # of the largest gradient of the parameter
SIGMAS = np.array([0.8, 0.15], np.float32)

Loss = Callable[[Any], jax.Array]


def make_batch(config: DiTConfig) -> dict[str, np.ndarray | None]:
    """Clean latents, noise, the channels of the canvas, text and image embeddings."""
    rng = np.random.default_rng(5)
    latents, _, text, image = abstract_inputs(config)
    *grid, channels = latents.shape

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "clean": normal(*grid, config.out_channels),
        "noise": normal(*grid, config.out_channels),
        "canvas": normal(*grid, channels - config.out_channels),
        "text": normal(*text.shape),
        "image": None if image is None else normal(*image.shape),
    }


def make_loss(config: DiTConfig, batch: dict[str, np.ndarray | None]) -> Loss:
    def loss(params: Any) -> jax.Array:
        noisy = flow.interpolate(batch["clean"], batch["noise"], SIGMAS)
        latents = jnp.concatenate([noisy, batch["canvas"]], axis=-1)
        velocity = DiT(config).apply(
            {"params": params}, latents, flow.to_timesteps(SIGMAS), batch["text"], batch["image"]
        )
        return jnp.mean(jnp.square(velocity - flow.velocity_target(batch["clean"], batch["noise"])))

    return loss


def torch_gradients(model: torch.nn.Module, batch: dict[str, np.ndarray | None]) -> tuple[float, dict[str, np.ndarray]]:
    clean, noise, canvas = (
        torch.from_numpy(batch[name]).permute(0, 4, 1, 2, 3) for name in ("clean", "noise", "canvas")
    )
    text, image = (None if batch[name] is None else torch.from_numpy(batch[name]) for name in ("text", "image"))
    sigmas = torch.from_numpy(SIGMAS)
    level = sigmas[:, None, None, None, None]
    noisy = (1 - level) * clean + level * noise
    velocity = model(torch.cat([noisy, canvas], dim=1), 1000 * sigmas, text, image, return_dict=False)[0]
    loss = torch.nn.functional.mse_loss(velocity, noise - clean)
    loss.backward()
    return loss.item(), {
        name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@functools.cache
def abstract_params(kind: str) -> Any:
    config = CONFIGS[kind]
    return jax.eval_shape(DiT(config).init, jax.random.key(0), *abstract_inputs(config))["params"]


@functools.cache
def tensors(kind: str) -> dict[str, np.ndarray]:
    return random_tensors(torch_shapes(dit_rules(CONFIGS[kind]), abstract_params(kind)), seed=4)


@functools.cache
def gradients(kind: str, remat: Remat) -> tuple[float, dict[str, np.ndarray]]:
    config = dataclasses.replace(CONFIGS[kind], remat=remat)
    params = convert(dit_rules(config), tensors(kind), abstract_params(kind))
    loss, tree = jax.jit(jax.value_and_grad(make_loss(config, make_batch(config))))(params)
    return float(loss), {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}


def largest_in_layer(path: str, gradient: np.ndarray) -> np.ndarray:
    """So that no small layer hides behind a large one."""
    largest = np.abs(gradient).max(axis=tuple(range(path.startswith("blocks/"), gradient.ndim)), keepdims=True)
    assert (largest > 0).all(), path
    return largest


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_of_all_parameters_equal_torch(kind, close):
    config = CONFIGS[kind]
    model = build_torch_model(config, tensors(kind))
    expected_loss, expected = torch_gradients(model, make_batch(config))
    expected = flatten(convert(dit_rules(config, "hf"), expected, abstract_params(kind)))

    loss, actual = gradients(kind, "none")

    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert actual.keys() == expected.keys()
    for path, gradient in expected.items():
        largest = largest_in_layer(path, gradient)
        close(f"gradients, {kind.replace('_', '-')}", actual[path] / largest, gradient / largest, TOLERANCE)


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_what_is_computed_again_changes_no_gradient(remat):
    loss, expected = gradients("image_to_video", "none")
    loss_again, actual = gradients("image_to_video", remat)
    np.testing.assert_allclose(loss_again, loss, rtol=1e-6)
    for path, gradient in expected.items():
        largest = largest_in_layer(path, gradient)
        # The same formulas; the compiler orders some sums anew.
        np.testing.assert_allclose(actual[path] / largest, gradient / largest, rtol=0, atol=5e-6, err_msg=path)


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_steps_of_the_optimiser_equal_torch(eps):
    config = OptimizerConfig(learning_rate=0.05, warmup_steps=2, cycle_steps=(2, 2), final_fraction=0.1, eps=eps)
    assert OptimizerConfig().eps == 1e-8
    rates = [0.0, 0.025, 0.05, 0.0275, 0.05]  # warm-up, then two cosines from the peak down to a tenth, half-way each
    assert (config.b1, config.b2, config.weight_decay, config.clip_norm) == (0.9, 0.999, 0.01, 1.0)
    rng = np.random.default_rng(6)
    shapes = {"kernel": (3, 4), "bias": (4,), "scale": (4,), "modulation": (6, 4), "a": (3, 2), "b": (2, 4)}
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    # The norms are about 0.1, where nothing is clipped, and 7, where all is.
    steps = [
        {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
        for scale in (1.0, 0.01, 1.0, 0.01, 1.0)
    ]

    expected = {name: torch.nn.Parameter(torch.from_numpy(array.copy())) for name, array in start.items()}
    decayed = ("kernel", "a", "b")
    torch_optimizer = torch.optim.AdamW(
        [
            {"params": [expected[name] for name in decayed], "weight_decay": 0.01},
            {"params": [expected[name] for name in expected if name not in decayed], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.999),
        eps=eps,
    )
    optimizer = make_optimizer(config)
    params = {"layer": jax.tree.map(jnp.asarray, start)}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for rate, step in zip(rates, steps, strict=True):
        for name, parameter in expected.items():
            parameter.grad = torch.from_numpy(step[name].copy())
        torch.nn.utils.clip_grad_norm_(expected.values(), 1.0)
        for group in torch_optimizer.param_groups:
            group["lr"] = rate
        torch_optimizer.step()
        updates, state = update({"layer": step}, state, params)
        params = optax.apply_updates(params, updates)

        for name, parameter in expected.items():
            np.testing.assert_allclose(
                params["layer"][name], parameter.detach().numpy(), rtol=0, atol=1e-6, err_msg=name
            )
    assert all(np.abs(params["layer"][name] - array).max() > 0.02 for name, array in start.items())


def test_a_step_of_muon_equals_torch():
    config = OptimizerConfig(method="muon", learning_rate=0.5, warmup_steps=0, clip_norm=1e9)
    rng = np.random.default_rng(6)
    shapes = {"up": (3, 8, 20), "down": (3, 20, 8)}  # three layers, one matrix each
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    gradients = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    bias, bias_gradient = np.ones(4, np.float32), rng.standard_normal(4).astype(np.float32)

    def tree(kernels, bias):
        return {"blocks": {name: {"kernel": kernels[name]} for name in shapes} | {"out": {"bias": bias}}}

    optimizer = make_optimizer(config)
    params = jax.tree.map(jnp.asarray, tree(start, bias))
    updates, _ = optimizer.update(tree(gradients, bias_gradient), optimizer.init(params), params)
    for name in shapes:
        for layer in range(3):
            # torch counts rows as outputs.
            expected = torch.nn.Parameter(torch.from_numpy(start[name][layer].T.copy()))
            expected.grad = torch.from_numpy(gradients[name][layer].T.copy())
            torch.optim.Muon(
                [expected], lr=0.5, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            ).step()
            expected = expected.detach().numpy().T - start[name][layer]
            # torch iterates in bfloat16, whose numbers are 2⁻⁸ apart.
            np.testing.assert_allclose(
                updates["blocks"][name]["kernel"][layer], expected, atol=0.03 * 0.2 * 0.5 * 20**0.5
            )
            assert np.abs(expected).max() > 0.2
    # The first step of Adam is the sign of the gradient.
    np.testing.assert_allclose(updates["blocks"]["out"]["bias"], -0.5 * np.sign(bias_gradient), rtol=1e-5)
