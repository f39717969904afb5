"""What a training run does when nothing is said, against the numbers of the paper and torch's own AdamW."""

import jax.numpy as jnp
import numpy as np
import optax
import torch

from magref_jax.training.config import OptimizerConfig
from magref_jax.training.optimizer import make_optimizer


def test_defaults_are_adamw_as_the_paper_sets_it():
    # arXiv:2505.23742: learning rate 1e-5, betas (0.9, 0.999), weight decay 0.01, clipped at norm 1.
    rng = np.random.default_rng(0)
    # Small weights show the moments, large ones the decay.
    kernel = (rng.standard_normal((4, 3)) * [[1e-3], [1e-3], [1], [1]]).astype(np.float32)
    theirs = torch.nn.Parameter(torch.from_numpy(kernel.copy()))
    judge = torch.optim.AdamW([theirs], lr=1e-5, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
    params = {"kernel": jnp.asarray(kernel)}
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0))
    state = optimizer.init(params)
    for _ in range(100):
        gradient = rng.standard_normal((4, 3)) * rng.choice([0.01, 1])
        theirs.grad = torch.tensor(gradient, dtype=torch.float32)
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        judge.step()
        updates, state = optimizer.update({"kernel": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    # They moved by 1e-4, and decay takes 1e-5 of each.
    assert np.abs(params["kernel"] - kernel).max() > 1e-4
    np.testing.assert_allclose(params["kernel"], theirs.detach().numpy(), rtol=3e-6, atol=1e-8)
