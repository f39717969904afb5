"""MAGREF at 14B, a LoRA of rank 32 beside the frozen model: for a few hundred clips of one's own.

python train.py configs/magref_14b_lora.py --output-dir runs/lora --mesh fsdp=-1

What to rent, and what then to add to the command: `docs/scaling.md`.
"""

import pathlib

from magref_jax.data.clips import Phase
from magref_jax.models.adapters import LoraConfig
from magref_jax.training.config import DiTTask, Events, OptimizerConfig, RecordData, TrainConfig

config = TrainConfig(
    task=DiTTask(
        folder=pathlib.Path("models/magref"),
        data=RecordData((pathlib.Path("data/train"),), (pathlib.Path("data/validation"),)),
        phases=(Phase(num_steps=2000, batch_size=8),),
        trainable=LoraConfig(rank=32),
        dtype="bfloat16",
        remat="block",
    ),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=100, cycle_steps=(1900,), ema_decay=None),
    num_steps=2000,
    events=Events(checkpoint=250, validation=250, sample=500),
    tensorboard=True,
)
