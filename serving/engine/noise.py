"""Counter-based Gumbel noise for coupled sampling.

The noise at (seed, choice, output position, token) is a pure function of those four numbers: the same
on every device, in every batch, for draft and target, before and after a swap. That is what makes
seeded text independent of the draft (drafter-invariant sampling, arXiv 2408.07978). The mixer is the
64-bit finaliser of MurmurHash3 / SplitMix64, in two's-complement int64 arithmetic.
"""

import torch
from torch import Tensor

_MASK_64 = 2**64 - 1
_POSITION_STEP = 0x9E3779B97F4A7C15
_TOKEN_STEP = 0xD1B54A32D192ED03
_MIX_1 = 0xFF51AFD7ED558CCD
_MIX_2 = 0xC4CEB9FE1A85EC53


def noise_key(seed: int, choice_index: int) -> int:
    """A signed 64-bit key for one choice of one request."""
    return _signed(_mix_int(_mix_int(seed & _MASK_64) + choice_index * _POSITION_STEP & _MASK_64))


def gumbel_noise(keys_B: Tensor, positions_BX: Tensor, num_tokens: int) -> Tensor:
    """Standard Gumbel noise [B, X, num_tokens], float32.

    keys_B: int64 from `noise_key`; positions_BX: int64 output positions.
    """
    assert keys_B.dtype == torch.int64 and positions_BX.dtype == torch.int64
    tokens_V = torch.arange(num_tokens, device=keys_B.device, dtype=torch.int64)
    row_BX = _mix(keys_B[:, None] + positions_BX * _signed(_POSITION_STEP))
    hash_BXV = _mix(row_BX[..., None] + tokens_V * _signed(_TOKEN_STEP))
    # 53 bits to (0, 1): small values keep full float32 precision, and those win the race.
    uniform_BXV = _shift_right(hash_BXV, 11).to(torch.float32).mul_(2.0**-53).add_(2.0**-54)
    uniform_BXV.clamp_(max=1.0 - 2.0**-24)
    exponential_BXV = torch.log1p(uniform_BXV.neg_()).neg_()
    return exponential_BXV.log_().neg_()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 33)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 33)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 33)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 33)) * _MIX_1) & _MASK_64
    x = ((x ^ (x >> 33)) * _MIX_2) & _MASK_64
    return x ^ (x >> 33)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
