"""Every dataclass that a model is made of, and the defaults of the released weights.

Lengths are in pixels or frames unless a name says `latent`. Defaults are those of Wan 2.1 I2V 14B, which is also MAGREF.

Precision, once for the whole project: activations run in `dtype`; norms, modulation, timestep embedding, rotary
embedding, softmax, the DiT head and the solver run in float32 whatever `dtype` is.
"""

import dataclasses
import difflib
import functools
import json
import math
import numbers
import pathlib
import types
import typing
from collections.abc import Callable, Collection
from typing import Any, Literal, TypeVar

import numpy as np

from magref_jax.command import check_local
from magref_jax.descriptions import describe

DType = Literal["float32", "bfloat16"]
Remat = Literal["none", "block", "dots"]
Layout = Literal["v1", "v2"]
MaskMode = Literal["region", "full"]
# How the DiT sees the canvas: channels beside the noise, with the region mask; or a latent frame of tokens ahead of the clip.
ReferenceConcat = Literal["channel", "token"]
ContextParallel = Literal["auto", "ulysses", "ring"]
NETWORKS = ("dit", "vae", "text_encoder", "image_encoder")  # fields of `ModelConfig`, and folders of a model folder
MASK_CHANNELS = 4  # of the region mask, in the DiT's input


def _check_positive(config: Any, but: Collection[str] = ()) -> None:
    """Refuses sizes and other numbers of a network that are 0 or less; those of `but` may be anything."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values = value if isinstance(value, tuple) else (value,)
        if field.name not in but and any(isinstance(x, int | float) and not x > 0 and x is not False for x in values):
            raise ValueError(f"{type(config).__name__}.{field.name}={value} must be greater than 0.")


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The diffusion transformer. `image_dim=None` is text-to-video: no CLIP branch."""

    dim: int = 5120
    ffn_dim: int = 13824
    num_heads: int = 40
    num_layers: int = 40
    in_channels: int = 36  # 16 noisy latent + 4 region mask + 16 reference latent; 16 for text-to-video
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512  # tokens; shorter prompts are zero-padded and the padding is attended, as in Wan
    image_dim: int | None = 1280
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latent frames, rows, columns
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    dtype: DType = "bfloat16"
    remat: Remat = "block"
    attention: str = "auto"  # or a name in models.attention.IMPLEMENTATIONS
    context_parallel: ContextParallel = "auto"  # how devices share the tokens of a sample; see models.context_parallel

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"DiTConfig.dim={self.dim} does not split into num_heads={self.num_heads} heads of even width."
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


# Per-channel statistics of the Wan 2.1 latent space.
WAN_LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The causal video autoencoder. Each stage but the last halves height and width."""

    base_dim: int = 96
    dim_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 16
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # one per stage but the last
    latent_mean: tuple[float, ...] = WAN_LATENT_MEAN
    latent_std: tuple[float, ...] = WAN_LATENT_STD
    dtype: DType = "float32"
    convolution: Literal["3d", "taps"] = "3d"  # "taps": a sum of 2-D convolutions, 3x faster than XLA's 3-D one on CPU

    def __post_init__(self) -> None:
        _check_positive(self, but=("latent_mean",))
        if len(self.temporal_downsample) != len(self.dim_multipliers) - 1:
            raise ValueError(
                f"VAEConfig.temporal_downsample={self.temporal_downsample} needs one entry per stage but the last: "
                f"{len(self.dim_multipliers) - 1} for dim_multipliers={self.dim_multipliers}."
            )
        if not len(self.latent_mean) == len(self.latent_std) == self.latent_channels:
            raise ValueError(
                f"VAEConfig.latent_mean and latent_std need latent_channels={self.latent_channels} entries."
            )

    @property
    def spatial_stride(self) -> int:
        return 2 ** (len(self.dim_multipliers) - 1)

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)

    def num_latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip: the first frame has one of its own, then one per `temporal_stride` frames."""
        if num_frames < 1 or (num_frames - 1) % self.temporal_stride:
            raise ValueError(f"num_frames={num_frames} must be {self.temporal_stride}n + 1 for this VAE.")
        return (num_frames - 1) // self.temporal_stride + 1


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """The umT5 encoder; defaults are umT5-XXL."""

    vocab_size: int = 256384
    dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    head_dim: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    relative_offsets: tuple[int, ...] = ()  # initialisation only: the neighbour each head looks at; (): random biases
    dtype: DType = "bfloat16"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        _check_positive(self, but=("relative_offsets",))
        if self.relative_offsets and len(self.relative_offsets) != self.num_heads:
            raise ValueError(
                f"TextEncoderConfig.relative_offsets={self.relative_offsets} needs one entry per head, or none: "
                f"num_heads={self.num_heads}."
            )


@dataclasses.dataclass(frozen=True)
class ImageEncoderConfig:
    """The CLIP vision tower; defaults are ViT-H/14. Its output is taken before the last layer."""

    dim: int = 1280
    ffn_dim: int = 5120
    num_heads: int = 16
    num_layers: int = 32  # of the checkpoint; num_layers - 1 are evaluated
    image_size: int = 224
    patch_size: int = 14
    norm_eps: float = 1e-5
    dtype: DType = "bfloat16"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.dim % self.num_heads:
            raise ValueError(f"ImageEncoderConfig.dim={self.dim} does not split into num_heads={self.num_heads} heads.")

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1


NEGATIVE_PROMPT = (
    "镜头晃动，色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """What a user may change for one run; a model folder stores the values its weights were made for."""

    height: int = 480  # pixels
    width: int = 832  # pixels
    num_frames: int = 81  # before drop_frames
    num_inference_steps: int = 40
    flow_shift: float = 3.0
    guidance_scale: float = 5.0  # toward the prompt
    reference_guidance_scale: float | None = 1.0  # toward the references; 1 is the official sampler, None as the prompt
    solver: Literal["unipc", "dpm++", "euler"] = "unipc"
    layout: Layout = "v2"
    mask_mode: MaskMode = "region"
    negative_prompt: str = NEGATIVE_PROMPT


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole model folder: four networks and the facts that belong to its weights."""

    dit: DiTConfig = DiTConfig()
    vae: VAEConfig = VAEConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    image_encoder: ImageEncoderConfig | None = ImageEncoderConfig()
    sampling: SamplingConfig = SamplingConfig()
    reference_concat: ReferenceConcat = "channel"
    subject_alpha: float = 0.0  # strength of value injection; 0 is the released model
    drop_frames: int = 4  # leading frames that show the canvas, cut from the output
    fps: float = 16.0

    def __post_init__(self) -> None:
        channels = self.vae.latent_channels
        if self.reference_concat == "token" and self.dit.in_channels != channels:
            raise ValueError(
                f"ModelConfig.reference_concat='token' gives the DiT latents alone: DiTConfig.in_channels="
                f"{self.dit.in_channels} must be VAEConfig.latent_channels={channels}."
            )
        if self.drop_frames < 0 or not self.fps > 0:
            raise ValueError(f"ModelConfig.drop_frames={self.drop_frames} must be 0 or more, fps={self.fps} above 0.")

    def check(self, networks: Collection[str] = NETWORKS) -> None:
        """Refuses networks that do not fit together, or a DiT that nothing here can feed.

        `networks` are those that there are: a folder may get the others later, of other sizes than its config has for them.

        Raises:
            ValueError: names the two fields, or what the DiT is fed with.
        """
        dit, vae, text, image = self.dit, self.vae, self.text_encoder, self.image_encoder
        channels, given = vae.latent_channels, dit.in_channels
        fed = {
            channels: "noise alone, of text-to-video",
            2 * channels + MASK_CHANNELS: "noise, mask and reference latents, of image-to-video and MAGREF",
        }
        if "dit" in networks and given not in fed:
            guess = "What it expects besides is not known here."
            if given % channels == 0:
                guess = (
                    f"{given} is {given // channels} times the latents: probably a control model such as Wan Fun-Control, "
                    "which also reads a control video."
                )
            ways = " or ".join(f"{number} ({what})" for number, what in fed.items())
            raise ValueError(f"dit.in_channels={given} cannot be fed: must be {ways}. {guess}")
        image_dim = None if image is None else image.dim
        facts = [
            ("dit", "out_channels", dit.out_channels, "vae", "latent_channels", channels),
            ("dit", "text_dim", dit.text_dim, "text_encoder", "dim", text.dim),
            ("dit", "image_dim", dit.image_dim, "image_encoder", "dim", image_dim),
        ]
        for one, field, value, other, other_field, expected in facts:
            if one in networks and (other in networks or getattr(self, other) is None) and value != expected:
                what = f"{other}=None" if getattr(self, other) is None else f"{other}.{other_field}={expected}"
                raise ValueError(f"{one}.{field}={value} must be {expected} for this model, as {what} is.")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """Raises ValueError where the text is not what `to_json` writes, with the name of the field."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"is not JSON: {error}.") from None
        return from_dict(cls, values, "config")


def with_dtype(config: ModelConfig, dtype: DType | None) -> ModelConfig:
    """The config whose networks all compute in `dtype`, whatever their parameters are stored in; None changes nothing.

    Raises:
        ValueError: another dtype.
    """
    if dtype is None:
        return config
    allowed = typing.get_args(DType)
    if dtype not in allowed:
        raise ValueError(f"dtype={dtype!r} is unknown; choose from {', '.join(allowed)}.")
    networks = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return dataclasses.replace(
        config,
        **{name: dataclasses.replace(part, dtype=dtype) for name, part in networks.items() if hasattr(part, "dtype")},
    )


T = TypeVar("T")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def from_dict(cls: type[T], values: Any, path: str) -> T:
    """Builds a (nested) config dataclass from plain JSON values.

    Raises:
        ValueError: an unknown name, with the known ones; a missing one; a value of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{path}={describe(values)} must be an object with the fields of {cls.__name__}.")
    hints = _hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{path}: unknown name {unknown[0]!r}; {cls.__name__} has {', '.join(sorted(hints))}.")
    needed = [field.name for field in dataclasses.fields(cls) if _is_needed(field)]  # pyrefly: ignore[bad-argument-type]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{path}: {missing[0]!r} is missing; {cls.__name__} needs {', '.join(needed)}.")
    return cls(**{name: conform(hints[name], value, f"{path}.{name}") for name, value in values.items()})


def _is_needed(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def conform(hint: Any, value: Any, name: str) -> Any:
    """The value as `hint` has it: numbers of NumPy as Python's, lists as tuples, objects of JSON as dataclasses.

    Only what loses nothing is taken: 3.0 is no int, True no number, "3" neither; an int is a float.

    Raises:
        ValueError: a value of another type, or a float that is no finite number.
    """
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    members = typing.get_args(hint) if is_union else (hint,)
    if value is None and types.NoneType in members:
        return None
    (option,) = (member for member in members if member is not types.NoneType)  # no config needs more than one
    if option is Any:
        return value
    if dataclasses.is_dataclass(option):
        return value if isinstance(value, option) else from_dict(option, value, name)  # pyrefly: ignore
    arguments, or_none = typing.get_args(option), ", or None" if types.NoneType in members else ""
    if typing.get_origin(option) is Literal:
        if isinstance(value, str) and value in arguments:
            return str(value)
        raise ValueError(f"{name}={describe(value)} is unknown; choose from {', '.join(map(str, arguments))}{or_none}.")
    if typing.get_origin(option) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}={describe(value)} must be a list{or_none}.")
        if arguments[-1:] == (...,):
            arguments = arguments[:1] * len(value)
        if len(arguments) != len(value):
            raise ValueError(f"{name}={describe(value)} must have {len(arguments)} entries, not {len(value)}.")
        return tuple(
            conform(part, entry, f"{name}[{i}]") for i, (part, entry) in enumerate(zip(arguments, value, strict=True))
        )
    accepts, convert, expected = _SCALARS[option]
    if not accepts(value):
        raise ValueError(f"{name}={describe(value)} must be {expected}{or_none}.")
    return convert(value)


def conform_fields(config: T) -> T:
    """The dataclass with each field as its type has it.

    Raises:
        ValueError: as `conform`.
    """
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}  # pyrefly: ignore
    return type(config)(**{name: conform(_hints(type(config))[name], value, name) for name, value in fields.items()})


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


_SCALARS: dict[Any, tuple[Callable[[Any], bool], Callable[[Any], Any], str]] = {
    bool: (_is_bool, bool, "True or False"),
    int: (lambda value: isinstance(value, numbers.Integral) and not _is_bool(value), int, "a whole number"),
    float: (
        lambda value: isinstance(value, numbers.Real) and not _is_bool(value) and math.isfinite(value),
        float,
        "a finite number",
    ),
    str: (lambda value: isinstance(value, str), str, "a text"),
}


RELEASED = "magref-14b"  # in place of a model folder: what the released weights are, for plans, which need no weights


def load_model_config(folder: str | pathlib.Path) -> ModelConfig:
    """Reads `config.json` of a model folder.

    Raises:
        FileNotFoundError: it is not there; says what was expected, and where the nearest model folder is.
        ValueError: the folder holds something else, such as PyTorch weights, or the config is not one of a model.
    """
    check_local("the model folder", folder)
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise (ValueError if folder.exists() and _torch_weights(folder) else FileNotFoundError)(_no_model(folder))
    present = [name for name in NETWORKS if (folder / name).is_dir()]
    try:
        config = ModelConfig.from_json(path.read_text(encoding="utf-8"))
        config.check(present or NETWORKS)
    except ValueError as error:
        # diffusers and the official code have a config.json too.
        says = f"{path}: {str(error).removeprefix('config: ')}" if present else _no_model(folder)
        raise ValueError(says) from None
    return config


_PARTS = "config.json, MANIFEST.json, tokenizer/, dit/, vae/, text_encoder/ and, if it takes references, image_encoder/"
_TORCH = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf", ".distcp")


def _no_model(folder: pathlib.Path) -> str:
    """Why something is no model folder, and what may have been meant."""
    nearest = _nearest_model(folder)
    meant = "" if nearest is None else f" The nearest model folder is {nearest}."
    if not folder.exists():
        return f"{folder} does not exist; a model folder holds {_PARTS}.{meant}"
    if weights := _torch_weights(folder):
        name = folder.resolve().stem if folder.is_file() else folder.resolve().name
        return (
            f"{folder} is no model folder, it holds PyTorch weights ({weights}); make one of them with "
            f"`python convert_torch_weights.py {folder} models/{name.lower()}`."
        )
    if not folder.is_dir():
        return f"{folder} is a file; a model is a folder with {_PARTS}.{meant}"
    reason = "its config.json is not that of a model" if (folder / "config.json").exists() else "it has no config.json"
    return f"{folder} is no model folder: {reason}. One holds {_PARTS}.{meant}"


def _torch_weights(path: pathlib.Path) -> str | None:
    """A file of PyTorch weights: the path itself, or one in the folder or in a folder of that."""
    if path.is_file():
        return path.name if path.name.endswith(_TORCH) else None
    if (path / "dit").is_dir():
        return None
    found = (file for pattern in ("*", "*/*") for file in sorted(path.glob(pattern)))
    return next((str(file.relative_to(path)) for file in found if file.name.endswith(_TORCH)), None)


def _nearest_model(folder: pathlib.Path) -> pathlib.Path | None:
    """The model folder with the most similar path, inside this folder, as deep as it, or in `models`; else the bundled one."""
    above, depth = folder, 0
    while not above.is_dir() and above != above.parent:
        above, depth = above.parent, depth + 1
    places = {(above, min(max(1, depth), 3)), (folder.parent, 1), (pathlib.Path("models"), 1)}
    bundled = pathlib.Path(__file__).parent / "bundled" / "emoji"
    configs = [path for place, levels in places for path in place.glob("*/" * levels + "config.json")]
    found = sorted({path.parent for path in configs if (path.parent / "dit").is_dir()})
    likeness = functools.partial(difflib.SequenceMatcher, None, str(folder))
    return max(found, key=lambda path: likeness(str(path)).ratio(), default=bundled if bundled.is_dir() else None)
