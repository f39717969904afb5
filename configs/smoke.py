"""Both stages in under two minutes on two CPU cores, to see that training runs. The model it writes has learnt nothing."""

import dataclasses

from configs.emoji import config as emoji
from magref_jax.training import DiTPhase, DiTTraining, OptimizerConfig, TrainConfig, VAEPhase, VAETraining

config = TrainConfig(
    model=dataclasses.replace(
        emoji.model,
        dit=dataclasses.replace(emoji.model.dit, dim=32, ffn_dim=64, num_heads=2, num_layers=2),
        vae=dataclasses.replace(emoji.model.vae, base_dim=4),
    ),
    data=emoji.data,
    vae=VAETraining(
        phases=(VAEPhase(8, 4, num_frames=1, crop=16), VAEPhase(8, 2, num_frames=5, crop=16)),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=4),
        num_clips=16,
    ),
    dit=DiTTraining(
        phases=(DiTPhase(8, 4, num_latent_frames=2, reach=3), DiTPhase(4, 4, num_latent_frames=5)),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=4),
        dtype="bfloat16",
        num_clips=16,
    ),
    checkpoint_every=6,
    log_every=4,
)
