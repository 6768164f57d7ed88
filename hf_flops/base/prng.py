"""Counter-based seeds: pure functions of integers, so that no random state is stored or reset."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(state: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the SplitMix64 finaliser; Steele, Lea & Flood 2014)."""
    state = state ^ (state >> np.uint64(30))
    state *= _MIX_1
    state ^= state >> np.uint64(27)
    state *= _MIX_2
    state ^= state >> np.uint64(31)
    return state


def seeds(seed: int, *counters: int | np.ndarray) -> np.ndarray:
    """Hash a run's seed and any number of counters into 64-bit seeds.

    Args:
        seed: the run's seed.
        counters: integers, or arrays of non-negative integers that broadcast to one shape (R,).

    Returns:
        (R,) uint64; (1,) if no counter is an array.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.atleast_1d(np.asarray(seed % 2**64, dtype=np.uint64)) + _GOLDEN)
        for counter in counters:
            state = _mix((state ^ np.asarray(counter).astype(np.uint64)) + _GOLDEN)
    return state


def words(row_seeds: np.ndarray, count: int, start: int = 0) -> np.ndarray:
    """Return `count` 64-bit words of each seed's SplitMix64 stream, from word `start` on.

    Seeds (R,) uint64 become (R, count) uint64.
    """
    return _mix(
        row_seeds[:, None] + np.arange(start + 1, start + count + 1, dtype=np.uint64) * _GOLDEN
    )


def words_on(device: torch.device, row_seeds: np.ndarray, count: int) -> Tensor:
    """Return the first `count` words of each seed's stream, drawn on a device: the bits of `words`.

    Seeds (R,) uint64 become (R, count) int64. Products wrap, and a shift to the right fills up with
    the sign, which is masked. The host does not wait for the device.
    """
    started = torch.from_numpy(row_seeds.view(np.int64)).to(device, non_blocking=True)
    state = torch.arange(1, count + 1, device=device) * _signed(_GOLDEN) + started[:, None]
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        state ^= (state >> shift).bitwise_and_(2 ** (64 - shift) - 1)
        state *= _signed(factor)
    return state.bitwise_xor_((state >> 31).bitwise_and_(2**33 - 1))


def _signed(constant: np.uint64) -> int:
    """Return the 64-bit integer with the same bits."""
    return int(constant.astype(np.int64))


def uniforms(row_seeds: np.ndarray) -> np.ndarray:
    """Turn seeds (R,) into numbers (R,) float64 in [0, 1)."""
    return (row_seeds >> np.uint64(11)) * 2.0**-53
