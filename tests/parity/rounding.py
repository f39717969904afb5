"""How far a bfloat16 forward is from float32, compared with how far torch's own bfloat16 forward is from its float32."""

from collections.abc import Sequence

import numpy as np

# Ours in bfloat16, torch's in bfloat16 and torch's in float32, of the same weights and inputs.
Forwards = tuple[np.ndarray, np.ndarray, np.ndarray]


def rounding_ratio(draws: Sequence[Forwards]) -> float:
    """By root mean square over all draws: 1 is as far as torch, 2 is one bit less than torch."""
    ours = np.mean([np.square(np.float64(ours) - exact) for ours, _, exact in draws])
    theirs = np.mean([np.square(np.float64(theirs) - exact) for _, theirs, exact in draws])
    return float(np.sqrt(ours / theirs))
