"""Every dataclass that a training run is made of. Presets are the files in `configs/`; `train.py --help` lists each field.

Defaults of the DiT are those of the MAGREF paper where it gives them: learning rate 1e-5, cosine with restarts, AdamW with
(0.9, 0.999), weight decay 0.01, gradients clipped at norm 1.
"""

import dataclasses
import pathlib
from typing import Literal

import magref_jax
from magref_jax.config import DType, ModelConfig, Remat
from magref_jax.data.clips import Choice, FirstFrameTarget, Phase
from magref_jax.data.emoji_world import EmojiWorldConfig
from magref_jax.diffusion.flow import Distribution, Weighting
from magref_jax.models.adapters import LoraConfig

BUNDLED = pathlib.Path(magref_jax.__file__).parent / "bundled" / "emoji"  # the model folder that comes with the code
MAX_SEED = 2**32 - 1  # of a key of JAX, whatever its integers are


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon on float32 weights: linear warm-up, then cosine cycles, each from the peak down to `final_fraction` of it.

    "muon" (github.com/KellerJordan/Muon) makes the momentum of every matrix of the blocks orthogonal, and scales it so that the
    learning rates of AdamW hold (arXiv:2502.16982); all other parameters are trained by AdamW.

    The schedule counts steps from the start of the run, not to its end: a longer run is a continuation of a shorter one.
    """

    method: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-5
    warmup_steps: int = 100
    cycle_steps: tuple[
        int, ...
    ] = ()  # lengths of the cosine cycles, after which the rate stays low; (): stays at the peak
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8  # of AdamW; an element whose gradient is below it takes steps in proportion to the gradient
    weight_decay: float = 0.01  # of matrices; norm scales, biases and modulation do not decay
    clip_norm: float = 1.0  # of all gradients together
    ema_decay: float | None = 0.9999  # None: no average is kept

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or any(steps < 1 for steps in self.cycle_steps):
            raise ValueError(
                f"OptimizerConfig.warmup_steps={self.warmup_steps} must be 0 or more, and every one of "
                f"cycle_steps={self.cycle_steps} at least 1."
            )
        if self.eps <= 0:
            raise ValueError(f"OptimizerConfig.eps={self.eps} must be greater than 0.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"OptimizerConfig.ema_decay={self.ema_decay} must be in [0, 1), or None.")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Flow matching: which noise levels are trained, what they weigh, and what is left out of the conditioning.

    Guidance toward the prompt needs `text_dropout`: its null branch keeps the references. Guidance toward the references needs
    `blank_dropout`.
    """

    first_frame_target: FirstFrameTarget = "canvas"  # what latent frame 0 shows: the canvas, then the clip, or the clip
    distribution: Distribution = "logit_normal"  # arXiv:2403.03206
    flow_shift: float = 3.0  # of the noise levels, as in sampling
    weighting: Weighting = "none"
    subject_weight: float = 1.0  # of latent cells that show a subject, against 1 elsewhere
    text_dropout: float = 0.1
    reference_dropout: float = 0.05
    blank_dropout: float = 0.05  # text and references together
    injection_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("text_dropout", "reference_dropout", "blank_dropout", "injection_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ObjectiveConfig.{name}={getattr(self, name)} must be in [0, 1].")
        if self.flow_shift <= 0:
            raise ValueError(f"ObjectiveConfig.flow_shift={self.flow_shift} must be greater than 0.")


@dataclasses.dataclass(frozen=True)
class EmojiData:
    """Clips of emoji world, drawn on the fly."""

    world: EmojiWorldConfig = dataclasses.field(default_factory=EmojiWorldConfig)
    num_clips: int = 12000
    validation_clips: int = 32  # of held-out emoji


@dataclasses.dataclass(frozen=True)
class RecordData:
    """Folders of records; see `docs/data.md`."""

    folders: tuple[pathlib.Path, ...]
    validation_folders: tuple[pathlib.Path, ...] = ()


@dataclasses.dataclass(frozen=True)
class DiTTask:
    """Trains the transformer, or a part of it, beside frozen encoders."""

    folder: pathlib.Path  # a model folder: tokenizer, frozen networks, and the DiT to start from
    data: EmojiData | RecordData
    phases: tuple[Phase, ...]
    model: ModelConfig | None = (
        None  # in place of the folder's; sizes of its frozen networks are the folder's all the same
    )
    start: Literal["folder", "deeper", "random"] = "folder"  # of the DiT; deeper: the folder's, with blocks added to it
    trainable: LoraConfig | str = ".*"  # a LoRA, or what the names of the trained parameters match as a whole
    dtype: DType | None = None  # of the DiT's matrix products in training; None: the model's
    remat: Remat | None = None  # what a block keeps for its backward pass; None: the model's
    layouts: int = 0  # K > 0: encode every clip on K canvases before training; 0: encode in every step
    choice: Choice = dataclasses.field(default_factory=Choice)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    overfit: bool = False  # every step sees the batch and the noise of the first: a check, not a training


@dataclasses.dataclass(frozen=True)
class VAEPhase:
    num_steps: int
    batch_size: int
    num_frames: int  # 1, or temporal_stride·n + 1
    crop: int | None  # pixels, a multiple of the spatial stride; None trains on whole frames


@dataclasses.dataclass(frozen=True)
class VAETask:
    """Trains the VAE and writes a model folder with it, random frozen encoders and a tokenizer: the start of a new world."""

    model: ModelConfig
    data: EmojiData
    phases: tuple[VAEPhase, ...]
    folder: pathlib.Path | None = None  # a model folder to start from; its other networks and its statistics are kept
    trainable: str = ".*"  # with a folder, "(decoder|post_quant)/.*" sharpens pictures without moving the latents
    kl_weight: float = 1e-4
    grey_fraction: float = 0.1  # clips that are a canvas followed by grey, as reference latents are made


@dataclasses.dataclass(frozen=True)
class Events:
    """After how many steps something happens; None: never."""

    checkpoint: int = 500
    keep: int = 2  # newest checkpoints
    keep_every: int | None = None  # checkpoints of multiples of this many steps stay for good
    validation: int | None = None
    sample: int | None = None
    report: int = 50  # throughput and goodput
    profile: tuple[int, int] | None = None  # first step and number of steps that jax.profiler records

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"Events.{field.name}={value} must be 1 or more.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    task: DiTTask | VAETask
    optimizer: OptimizerConfig
    num_steps: int  # of the whole run
    accumulation_steps: int = 1  # parts that a batch is computed in, one after another
    events: Events = dataclasses.field(default_factory=Events)
    max_skipped: int = 10  # steps in a row without finite gradients; more end the run
    tensorboard: bool = False
    save_dtype: DType = "float32"  # of the model folder; checkpoints are float32
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.seed) is not int:
            raise ValueError(f"seed={self.seed!r} must be a whole number from 0 to {MAX_SEED}.")
        for name, lowest in (("num_steps", 1), ("accumulation_steps", 1), ("max_skipped", 0), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name}={getattr(self, name)} must be {lowest} or more.")
        if self.seed > MAX_SEED:
            raise ValueError(f"seed={self.seed} must be at most {MAX_SEED}.")
        if not self.task.phases:
            raise ValueError("task.phases is empty: there must be one at least.")
        for number, phase in enumerate(self.task.phases):
            if phase.batch_size % self.accumulation_steps:
                raise ValueError(
                    f"accumulation_steps={self.accumulation_steps} must divide the batch_size={phase.batch_size} of phase {number}."
                )
