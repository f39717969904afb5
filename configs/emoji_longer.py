"""Emoji world, third stage: the DiT of `configs/emoji.py` trained further, by Muon, on clips it has not seen.

python train.py configs/emoji_longer.py --output-dir runs/emoji_longer --config.task.folder runs/emoji/model
"""

import dataclasses

from configs.emoji import config as emoji
from configs.emoji import task as emoji_task
from configs.emoji_vae import world
from magref_jax.data.clips import Phase
from magref_jax.training.config import EmojiData, Events, OptimizerConfig

task = dataclasses.replace(
    emoji_task,
    start="folder",
    data=EmojiData(world, num_clips=2400, validation_clips=64),
    phases=(Phase(num_steps=4000, batch_size=8),),
)

config = dataclasses.replace(
    emoji,
    task=task,
    optimizer=OptimizerConfig(
        method="muon",
        learning_rate=1.2e-3,
        warmup_steps=100,
        cycle_steps=(3900,),
        final_fraction=0.02,
        b2=0.99,
        ema_decay=0.998,
    ),
    seed=1,  # other clips than before
    num_steps=4000,
    events=Events(validation=500, sample=None),
)
