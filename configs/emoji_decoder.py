"""Emoji world, afterwards: sharper pictures from the VAE's decoder alone. Latents stay where they are, so the DiT does too.

python train.py configs/emoji_decoder.py --output-dir runs/emoji_decoder
"""

import dataclasses

from configs.emoji_vae import config as emoji_vae
from configs.emoji_vae import model, world
from magref_jax.training.config import BUNDLED, EmojiData, Events, OptimizerConfig, VAEPhase, VAETask

config = dataclasses.replace(
    emoji_vae,
    task=VAETask(
        model=model,
        data=EmojiData(world, num_clips=6000, validation_clips=64),
        phases=(VAEPhase(num_steps=4000, batch_size=8, num_frames=5, crop=32),),
        folder=BUNDLED,
        trainable="(decoder|post_quant)/.*",
        grey_fraction=0.0,  # nothing decodes a canvas in front of grey
    ),
    optimizer=OptimizerConfig(
        learning_rate=1e-3, warmup_steps=100, cycle_steps=(3900,), final_fraction=0.02, b2=0.99, ema_decay=0.999
    ),
    num_steps=4000,
    events=Events(validation=500),
)
