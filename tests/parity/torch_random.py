"""Random torch-layout weights that stand well away from any initialisation, so that no bias or norm can hide."""

import math
from collections.abc import Mapping

import numpy as np


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 tensors under the given names: matrices of unit gain, vectors of spread 0.3, norm scales around 1."""
    rng = np.random.default_rng(seed)
    return {name: _random_tensor(rng, name, shape) for name, shape in shapes.items()}


def _random_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    normal = rng.standard_normal(shape)
    fan_in = math.prod(shape[1:])
    is_vector = fan_in == 1  # also [C, 1, 1]
    if is_vector and name.endswith(("weight", "gamma")):
        tensor = 1.0 + 0.3 * normal
    elif is_vector or name.endswith("modulation") or shape[0] == 1:
        tensor = 0.3 * normal
    else:
        tensor = normal / math.sqrt(fan_in)
    return tensor.astype(np.float32)
