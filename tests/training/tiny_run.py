"""A training run that takes seconds: the tiny model on a small emoji world."""

import dataclasses
import pathlib

from magref_jax.data.clips import Choice, Phase
from magref_jax.data.emoji_world import EmojiWorldConfig
from magref_jax.training.config import DiTTask, EmojiData, Events, ObjectiveConfig, OptimizerConfig, TrainConfig
from tests.tiny_model import CONFIG

WORLD = EmojiWorldConfig(
    width=32,
    height=24,
    num_frames=4,
    sprite_size=8,
    horizontal_speed=2,
    vertical_speed=2,
    bounce_height=4,
    bounce_period=2,
)
MODEL = dataclasses.replace(
    CONFIG,
    # These compile twice as fast.
    dit=dataclasses.replace(CONFIG.dit, attention="xla"),
    vae=dataclasses.replace(CONFIG.vae, convolution="taps"),
    sampling=dataclasses.replace(CONFIG.sampling, width=32, height=24, num_frames=5, num_inference_steps=2),
)


def tiny_run(folder: pathlib.Path, num_steps: int = 4, **task: object) -> TrainConfig:
    """Trains the DiT of a tiny model folder whose config is `MODEL`; `task` replaces fields of the task."""
    fields = {
        "folder": folder,
        "data": EmojiData(WORLD, num_clips=16, validation_clips=8),
        "phases": (Phase(num_steps=1000, batch_size=4),),
        "choice": Choice(cross_pair=0.5, drop_reference=0.1, larger_layout=0.0),
        "objective": ObjectiveConfig(subject_weight=2.0),
    }
    return TrainConfig(
        task=DiTTask(**{**fields, **task}),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, ema_decay=0.5),
        num_steps=num_steps,
        events=Events(checkpoint=2),
    )
