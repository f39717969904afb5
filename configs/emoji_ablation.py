"""What the rows of the ablation have in common: an easier world and a smaller DiT than the bundled model's.

python -m magref_jax.evaluation.ablation run region --seed 0 --out runs/ablation
"""

import dataclasses

from configs.emoji import config as emoji
from configs.emoji import task
from configs.emoji_vae import model
from magref_jax.data.clips import Choice, Phase
from magref_jax.data.emoji_world import EmojiWorldConfig
from magref_jax.training.config import EmojiData, Events

# A canvas and two frames: one latent frame each, which is the least that shows a motion.
world = EmojiWorldConfig(
    height=40,
    num_frames=2,
    subject_counts=(0.6, 0.4),
    motions=("slides right", "slides left", "rises", "falls", "stays still"),
    places=("on the left", "in the middle", "on the right"),
    place_words=1.0,
    backgrounds=("meadow", "desert", "night sky", "plain wall"),
)

config = dataclasses.replace(
    emoji,
    task=dataclasses.replace(
        task,
        model=dataclasses.replace(
            model,
            dit=dataclasses.replace(model.dit, dim=128, ffn_dim=384, num_heads=4, num_layers=4),
            sampling=dataclasses.replace(
                model.sampling,
                height=world.height,
                num_frames=world.num_frames + 1,
                num_inference_steps=20,
                reference_guidance_scale=1.0,  # as in the paper
            ),
        ),
        data=EmojiData(world, num_clips=2500),
        phases=(
            Phase(num_steps=1500, batch_size=16, max_references=1),
            Phase(num_steps=1500, batch_size=16),
        ),
        objective=dataclasses.replace(task.objective, blank_dropout=0.0),
        choice=Choice(cross_pair=0.3, drop_reference=0.0, larger_layout=0.0),
    ),
    optimizer=dataclasses.replace(emoji.optimizer, cycle_steps=(2800,)),
    num_steps=3000,
    events=Events(),
)
