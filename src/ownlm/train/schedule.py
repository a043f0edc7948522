"""Learning-rate schedules: pure functions of (step, steps) that return the factor on the peak learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """`warmup` and `decay` are shares of all steps; `floor` is the factor at the last step.

    wsd: warm-up, stable, linear decay (MiniCPM, arXiv 2404.06395). cosine: warm-up, then half a cosine; `decay` plays no part.
    """

    kind: Literal["wsd", "cosine"] = "wsd"
    warmup: float = 0.02
    decay: float = 0.6
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and 0 <= self.floor <= 1):
            raise ValueError("warmup, decay and floor are shares between 0 and 1")


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """The factor for `step` (counted from 0) of `steps`; 1 at the peak, never 0 before the end, so no step is wasted."""
    warmup_steps = schedule.warmup * steps
    rise = min(1.0, (step + 1) / (warmup_steps + 1))
    return rise * SCHEDULES[schedule.kind](schedule, step, steps)


def _wsd(schedule: Schedule, step: int, steps: int) -> float:
    decay_steps = max(1.0, schedule.decay * steps)
    return schedule.floor + (1 - schedule.floor) * min(1.0, (steps - step) / decay_steps)


def _cosine(schedule: Schedule, step: int, steps: int) -> float:
    return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * step / steps))


SCHEDULES: dict[str, Callable[[Schedule, int, int], float]] = {"wsd": _wsd, "cosine": _cosine}
