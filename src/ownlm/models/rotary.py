"""Rotary positions: frequencies, angles, and the turn itself."""

import math

import torch
from torch import Tensor

from ownlm.models.specs import LinearScaling, Llama3Scaling, LongRope, Rotary, YarnScaling


def rotated_dims(rotary: Rotary, head_dim: int) -> int:
    """How many dimensions of a head turn."""
    return int(head_dim * rotary.fraction)


def frequencies(rotary: Rotary, head_dim: int, *, long: bool = False) -> Tensor:
    """Radians per position, fp32, shape (turned dimensions // 2,). `long`: for a text beyond LongRope's original context."""
    dims = rotated_dims(rotary, head_dim)
    freq = 1.0 / rotary.theta ** (torch.arange(0, dims, 2, dtype=torch.float32, device="cpu") / dims)
    scaling = rotary.scaling
    if isinstance(scaling, LinearScaling):
        return freq / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_tokens * freq / (2 * math.pi)  # within the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * freq / scaling.factor + kept * freq
    if isinstance(scaling, YarnScaling):
        kept = 1 - _ramp(scaling, rotary.theta, dims)
        return (1 - kept) * freq / scaling.factor + kept * freq
    if isinstance(scaling, LongRope):
        return freq / torch.tensor(scaling.long if long else scaling.short, dtype=torch.float32, device="cpu")
    return freq


def _ramp(scaling: YarnScaling, theta: float, dims: int) -> Tensor:
    """0 for the pairs that turn `beta_fast` times or more within the original context, 1 below `beta_slow` times."""

    def pair(turns: float) -> float:
        return dims * math.log(scaling.original_max_tokens / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high = high + 0.001 if high == low else high
    return ((torch.arange(dims // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)


def attention_factor(rotary: Rotary) -> float:
    """What the rotated queries and keys are multiplied by."""
    return rotary.scaling.attention_factor if isinstance(rotary.scaling, YarnScaling | LongRope) else 1.0


def is_long(rotary: Rotary, tokens: int) -> bool:
    """True where a text of this many tokens turns by LongRope's long divisors."""
    return isinstance(rotary.scaling, LongRope) and tokens > rotary.scaling.original_max_tokens


def rotation(freq: Tensor, positions: Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin for `rotate`, each (…, 1, d); angles are formed in fp32 whatever the dtype."""
    return _turn(positions[..., None].float() * freq, dtype, factor)


def plane_rotation(freq: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`rotation` by the place in an image: the 1st, 3rd, … frequencies turn by the row, the others by the column (Pixtral)."""
    angle = torch.cat([rows[..., None].float() * freq[::2], columns[..., None].float() * freq[1::2]], -1)
    return _turn(angle, dtype, 1.0)


def _turn(angle: Tensor, dtype: torch.dtype, factor: float) -> tuple[Tensor, Tensor]:
    cos, sin = (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)
    return torch.cat([cos, cos], -1).unsqueeze(-2), torch.cat([-sin, sin], -1).unsqueeze(-2)


def rotate(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its angle; `sin` comes with the sign of the first half turned. Dimensions beyond
    those of `cos` stay."""
    dims = cos.shape[-1]
    if dims == x_BTHd.shape[-1]:
        return x_BTHd * cos + x_BTHd.roll(dims // 2, -1) * sin
    turned, rest = x_BTHd[..., :dims], x_BTHd[..., dims:]
    return torch.cat([turned * cos + turned.roll(dims // 2, -1) * sin, rest], -1)
