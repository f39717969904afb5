"""Emoji world, second stage: the DiT of the bundled model, small enough to train on a CPU.

python train.py configs/emoji.py --output-dir runs/emoji

It takes the VAE, the encoders and the tokenizer of the bundled model; `--config.task.folder runs/emoji_vae/model` takes those
of `configs/emoji_vae.py`.
"""

from configs.emoji_vae import model, world
from magref_jax.data.clips import Choice, Phase
from magref_jax.training.config import (
    BUNDLED,
    DiTTask,
    EmojiData,
    Events,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)

objective = ObjectiveConfig(flow_shift=2.0, subject_weight=5.0)

task = DiTTask(
    folder=BUNDLED,
    model=model,
    start="random",
    data=EmojiData(world, num_clips=12000),
    phases=(
        Phase(num_steps=4000, batch_size=16, num_latent_frames=2, reach=2, max_references=1),
        Phase(num_steps=3000, batch_size=16, num_latent_frames=2, max_references=1),
        Phase(num_steps=2000, batch_size=16, num_latent_frames=2),
        Phase(num_steps=20000, batch_size=8),
    ),
    dtype="bfloat16",
    layouts=1,
    choice=Choice(cross_pair=0.05, drop_reference=0.0, larger_layout=0.0),
    objective=objective,
)

config = TrainConfig(
    task=task,
    optimizer=OptimizerConfig(
        learning_rate=2e-3, warmup_steps=200, cycle_steps=(28800,), final_fraction=0.05, b2=0.99, ema_decay=0.999
    ),
    num_steps=29000,
    events=Events(validation=1000, sample=5000),
    save_dtype="bfloat16",
)
