"""What the rows of the ablation have in common: shorter clips and a smaller DiT than the bundled model's.

python -m magref_jax.evaluation.ablation run region --seed 0 --out runs/ablation
"""

import dataclasses

from configs.emoji import config as emoji
from configs.emoji import task
from configs.emoji_vae import model
from magref_jax.data.clips import Choice, Phase
from magref_jax.data.emoji_world import EmojiWorldConfig
from magref_jax.training.config import EmojiData, Events

config = dataclasses.replace(
    emoji,
    task=dataclasses.replace(
        task,
        model=dataclasses.replace(
            model,
            dit=dataclasses.replace(model.dit, dim=128, ffn_dim=384, num_heads=4, num_layers=4),
            sampling=dataclasses.replace(model.sampling, num_frames=5, num_inference_steps=20),
        ),
        data=EmojiData(EmojiWorldConfig(num_frames=4, subject_counts=(0.6, 0.4)), num_clips=4000),
        phases=(
            Phase(num_steps=4000, batch_size=16, num_latent_frames=2, max_references=1),
            Phase(num_steps=2000, batch_size=16),
        ),
        choice=Choice(cross_pair=0.3, drop_reference=0.0, larger_layout=0.0),
    ),
    optimizer=dataclasses.replace(emoji.optimizer, cycle_steps=(5800,)),
    num_steps=6000,
    events=Events(validation=1000),
)
