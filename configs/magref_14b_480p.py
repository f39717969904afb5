"""MAGREF at 14B, all parameters: what the paper reports, on records of 81 frames at 480p (`docs/data.md`, `docs/training.md`).

python train.py configs/magref_14b_480p.py --output-dir runs/magref --mesh fsdp=-1

`models/magref` is a converted model folder (`docs/weights.md`); a Wan 2.1 I2V folder is the paper's own start. What to rent, and
what then to add to the command: `docs/scaling.md`.
"""

import pathlib

from magref_jax.data.clips import Phase
from magref_jax.training.config import DiTTask, Events, OptimizerConfig, RecordData, TrainConfig

config = TrainConfig(
    task=DiTTask(
        folder=pathlib.Path("models/magref"),
        data=RecordData((pathlib.Path("data/train"),), (pathlib.Path("data/validation"),)),
        phases=(Phase(num_steps=20000, batch_size=64),),
        dtype="bfloat16",
        remat="block",
    ),
    optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=500, cycle_steps=(5000,) * 4, ema_decay=0.9999),
    num_steps=20000,
    events=Events(checkpoint=500, keep=3, keep_every=5000, validation=500, sample=1000),
    tensorboard=True,
    save_dtype="bfloat16",
)
