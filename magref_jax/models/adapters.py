"""Low-rank adapters of the diffusion transformer: what is trained beside frozen weights. LoRA, arXiv:2106.09685.

    y = x · kernel + bias + alpha/rank · (x · a) · b

A tree of adapters has the transformer's names, with a and b of a layer where its kernel and bias would be. The DiT reads it
as the variable collection `LORA`:

    tree = init_lora(config, lora, key)
    DiT(config).apply({"params": params, LORA: scale_lora(lora, tree)}, latents, timesteps, …)

Letters: D values into a layer · E values out of it · r rank
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Key

from magref_jax.config import DiTConfig
from magref_jax.models.dit import DiT

# As DiffSynth-Studio trains Wan; with the attention to the image tokens, rank 32 is more than 1 % of the 14B model.
ATTENTION_AND_FEED_FORWARD = r"blocks/(self|cross)_attention/(query|key|value|out)|blocks/feed_forward/(up|down)"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers have an adapter, and of what size."""

    rank: int = 32
    alpha: float | None = None  # what an adapter adds is scaled by alpha/rank; None: not scaled
    targets: str = ATTENTION_AND_FEED_FORWARD  # regular expression of whole module names, such as "blocks/.*/.*"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoraConfig.rank={self.rank} must be at least 1.")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"LoraConfig.alpha={self.alpha} must be positive and finite, or None.")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


def init_lora(config: DiTConfig, lora: LoraConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Random a, uniform in ±1/√D as PEFT and kohya draw it, and b of zeros: at the start the model is what it was.

    Float32, [D r] and [r E], with the axis of the layers in front inside the blocks. May be called inside `jax.jit`.

    Raises:
        ValueError: `targets` matches no layer.
    """
    kernels = _target_kernels(config, lora)
    flat: dict[str, Array] = {}
    for module, subkey in zip(kernels, jax.random.split(key, len(kernels)), strict=True):
        *layers, inputs, outputs = kernels[module]
        limit = inputs**-0.5
        shape = *layers, inputs, lora.rank
        flat[f"{module}/a"] = jax.random.uniform(subkey, shape, jnp.float32, minval=-limit, maxval=limit)
        flat[f"{module}/b"] = jnp.zeros((*layers, lora.rank, outputs), jnp.float32)
    return traverse_util.unflatten_dict(flat, sep="/")


def scale_lora(lora: LoraConfig, tree: Any) -> Any:
    """The tree with alpha/rank multiplied into b, which is what the layers add without knowing alpha."""
    return jax.tree.map_with_path(lambda path, leaf: leaf * lora.scale if path[-1].key == "b" else leaf, tree)


def _target_kernels(config: DiTConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the kernels that have an adapter, by the names of their modules."""
    patch, image_dim = config.patch_size, config.image_dim
    shapes = (1, *patch, config.in_channels), (1,), (1, config.text_len, config.text_dim), (1, 1, image_dim)
    inputs = [None if None in shape else jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    params = jax.eval_shape(DiT(config).init, jax.random.key(0), *inputs)["params"]
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    kernels = {
        path.removesuffix("/kernel"): leaf.shape
        for path, leaf in flat.items()
        # Files hold the patch embedding as a convolution, which few programs take an adapter for.
        if path.endswith("/kernel") and path != "patch_embedding/kernel"
    }
    found = {module: shape for module, shape in kernels.items() if re.fullmatch(lora.targets, module)}
    if not found:
        raise ValueError(f"LoraConfig.targets={lora.targets!r} matches no layer; they are {', '.join(kernels)}.")
    return found
