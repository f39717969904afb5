"""Emoji world, last stage: the DiT goes on with three more blocks, which add nothing at first.

python train.py configs/emoji_deeper.py --output-dir runs/emoji_deeper --config.task.folder runs/emoji_larger/model
"""

import dataclasses

from configs.emoji_larger import config as emoji_larger
from configs.emoji_larger import data, model, task
from magref_jax.data.clips import Phase
from magref_jax.training.config import Events

config = dataclasses.replace(
    emoji_larger,
    task=dataclasses.replace(
        task,
        start="deeper",
        model=dataclasses.replace(model, dit=dataclasses.replace(model.dit, num_layers=8)),
        data=dataclasses.replace(data, num_clips=4800),
        phases=(Phase(num_steps=3000, batch_size=8),),
    ),
    optimizer=dataclasses.replace(emoji_larger.optimizer, cycle_steps=(2900,)),
    seed=3,
    num_steps=3000,
    events=Events(checkpoint=250, validation=1000),
)
