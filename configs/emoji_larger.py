"""Emoji world, fourth stage: the DiT goes on to larger pictures, 96x64 pixels with sprites of 32.

python train.py configs/emoji_larger.py --output-dir runs/emoji_larger --config.task.folder runs/emoji_longer/model

The VAE stays as it is: what it blurs is a smaller part of a larger sprite.
"""

import dataclasses

from configs.emoji_longer import config as emoji_longer
from configs.emoji_longer import task as emoji_longer_task
from configs.emoji_vae import model as small_model
from configs.emoji_vae import world
from magref_jax.data.clips import Phase
from magref_jax.training.config import EmojiData, Events

model = dataclasses.replace(small_model, sampling=dataclasses.replace(small_model.sampling, width=96, height=64))
data = EmojiData(dataclasses.replace(world, width=96, height=64, sprite_size=32), num_clips=3200)
task = dataclasses.replace(
    emoji_longer_task,
    model=model,
    data=data,
    phases=(
        Phase(num_steps=900, batch_size=16, num_latent_frames=2),
        Phase(num_steps=1900, batch_size=8),
    ),
)

config = dataclasses.replace(
    emoji_longer,
    task=task,
    optimizer=dataclasses.replace(emoji_longer.optimizer, cycle_steps=(2700,)),
    seed=2,
    num_steps=2800,
    events=Events(checkpoint=250, validation=500),
)
