"""Overfits one batch in under two minutes on two CPU cores, to see that training runs. The model it writes has learnt nothing.

python train.py configs/smoke.py --output-dir runs/smoke --num-steps 20

Every step sees the same 8 clips with the same noise, so that the loss can only fall: from the mean square of noise minus
latents, which is what a network predicts whose last layer is zero, toward 0. `--config.task.no-overfit` makes a training of it.
"""

import dataclasses

from configs.emoji import objective
from configs.emoji_vae import model, world
from magref_jax.data.clips import Phase
from magref_jax.training.config import BUNDLED, DiTTask, EmojiData, Events, OptimizerConfig, TrainConfig

config = TrainConfig(
    task=DiTTask(
        folder=BUNDLED,
        model=dataclasses.replace(
            model, dit=dataclasses.replace(model.dit, dim=64, ffn_dim=128, num_heads=2, num_layers=2)
        ),
        start="random",
        data=EmojiData(world, num_clips=16, validation_clips=8),
        phases=(Phase(num_steps=20, batch_size=8),),
        objective=objective,
        overfit=True,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, ema_decay=0.9),
    num_steps=20,
    events=Events(checkpoint=5, report=10),
)
