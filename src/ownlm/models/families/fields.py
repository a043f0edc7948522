"""A Hugging Face config.json, read field by field: every fault is collected, none is guessed over.

Both schemas are read: transformers 5 (`rope_parameters`, `layer_types`) and the hub's (`rope_theta` beside `rope_scaling`). A value
that would change what is computed and that we don't compute is refused, never ignored.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ownlm.models.specs import Activation, LinearScaling, Llama3Scaling, LongRope, Rotary, YarnScaling

HF_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "relu2": "relu2",
}  # fmt: skip
HF_NAMES: dict[Activation, str] = {
    "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu",
    "relu2": "relu2",
}  # fmt: skip


class Fields:
    """A config.json read field by field, collecting every fault instead of stopping at the first."""

    def __init__(self, config: Mapping[str, Any], stored: frozenset[str] | None = None) -> None:
        """`stored` names the tensors of the files, where there are files: some configs don't say what they hold."""
        self.config, self.stored = config, stored
        self.faults: list[str] = []

    def table(self, name: str) -> "Fields":
        """The fields of a table within this config; its faults are ours."""
        value = self.config.get(name)
        if not isinstance(value, Mapping):
            self.faults.append(f"{name} must be a table, got {value!r}")
            value = {}
        inner = Fields(value, self.stored)
        inner.faults = self.faults
        return inner

    def holds(self, tensor: str, default: bool) -> bool:
        """Whether the files have a tensor of that name (the end of it counts); `default` where there are no files."""
        return default if self.stored is None else any(name.endswith(tensor) for name in self.stored)

    def count(self, name: str, default: int | None = None, *, at_most: int = 2**24) -> int:
        """A whole number from 1 to `at_most`; `default` where the field is missing or null."""
        value = self.config.get(name)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= at_most:
            self.faults.append(f"{name} must be a whole number from 1 to {at_most}, got {value!r}")
            return 1
        return value

    def index(self, name: str, default: int, *, below: int) -> int:
        """A whole number from 0 on, below `below`; `default` where the field is missing or null."""
        value = self.config.get(name)
        value = default if value is None else value
        if type(value) is not int or not 0 <= value < below:
            self.faults.append(f"{name} must be a whole number from 0 to {below - 1}, got {value!r}")
            return 0
        return value

    def number(self, name: str, default: float | None = None, *, of: Mapping[str, Any] | None = None) -> float:
        """A number above zero."""
        value = (self.config if of is None else of).get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.faults.append(f"{name} must be a number above 0, got {value!r}")
            return 1.0
        return float(value)

    def optional(self, name: str, default: float | None = None) -> float | None:
        """A number above zero, or None where the file says null (or nothing, and there is no default)."""
        value = self.config.get(name, default)
        return None if value is None else self.number(name, default)

    def window(self, name: str = "sliding_window", default: int | None = None) -> int | None:
        """A count of tokens, or None for no window."""
        return None if self.config.get(name, default) is None else self.count(name, default)

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        value = default if value is None else value
        if type(value) is not bool:
            self.faults.append(f"{name} must be true or false, got {value!r}")
        return bool(value)

    def activation(self, name: str, default: str) -> Activation:
        value = self.config.get(name)
        value = default if value is None else value
        if value not in HF_ACTIVATIONS:
            self.faults.append(f"{name} {value!r} is not supported (supported: {', '.join(HF_ACTIVATIONS)})")
            return "silu"
        return HF_ACTIVATIONS[value]

    def only(self, **values: Any) -> None:
        """Refuse fields that are present with another value than the one whose computation we do."""
        for name, value in values.items():
            if self.config.get(name) not in (None, value):
                self.faults.append(f"{name} {self.config[name]!r} is not supported (only {value!r})")

    def kinds(self, count: int, default: Mapping[int, str] | None = None) -> list[str]:
        """layer_types: for each of `count` layers "full_attention" or "sliding_attention"."""
        value = self.config.get("layer_types")
        if value is None:
            return [(default or {}).get(index, "full_attention") for index in range(count)]
        known = {"full_attention", "sliding_attention"}
        if not isinstance(value, list) or len(value) != count or not set(map(str, value)) <= known:
            self.faults.append(f"layer_types must name {count} layers as {' or '.join(sorted(known))}, got {value!r}")
            return ["full_attention"] * count
        return value

    def rotary(
        self,
        theta: float = 10_000.0,
        *,
        head_dim: int = 0,
        fraction: float = 1.0,
        kind: str | None = None,
        max_tokens: int = 0,
    ) -> Rotary:
        """`rope_parameters` (transformers 5; by kind of layer where `kind` is given), or `rope_theta` beside `rope_scaling`."""
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if isinstance(rope, Mapping) and kind is not None and kind in rope:
            rope = rope[kind]
        if not isinstance(rope, Mapping):
            self.faults.append(f"rope_parameters must be a table, got {rope!r}")
            return Rotary()
        theta = self.number("rope_theta", self.number("rope_theta", theta), of=rope)
        fraction = self.number("partial_rotary_factor", self.number("partial_rotary_factor", fraction), of=rope)
        name = rope.get("rope_type", rope.get("type", "default"))
        if name not in SCALINGS:
            self.faults.append(f"rope_type {name!r} is not supported (supported: {', '.join(SCALINGS)})")
            return Rotary(theta=theta)
        scaling = SCALINGS[name](self, rope, int(head_dim * fraction), max_tokens)
        return Rotary(theta=theta, fraction=fraction, scaling=scaling)


def _original(fields: Fields, rope: Mapping[str, Any], max_tokens: int) -> int:
    own = fields.config.get("original_max_position_embeddings")
    return int(fields.number("original_max_position_embeddings", own or max_tokens or None, of=rope))


def _linear(fields: Fields, rope: Mapping[str, Any], dims: int, max_tokens: int) -> LinearScaling:
    return LinearScaling(factor=fields.number("factor", of=rope))


def _llama3(fields: Fields, rope: Mapping[str, Any], dims: int, max_tokens: int) -> Llama3Scaling:
    return Llama3Scaling(
        factor=fields.number("factor", of=rope),
        low_freq_factor=fields.number("low_freq_factor", of=rope),
        high_freq_factor=fields.number("high_freq_factor", of=rope),
        original_max_tokens=_original(fields, rope, max_tokens),
    )


def _yarn(fields: Fields, rope: Mapping[str, Any], dims: int, max_tokens: int) -> YarnScaling:
    original = _original(fields, rope, max_tokens)
    factor = fields.number("factor", max_tokens / original if max_tokens else None, of=rope)

    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    whole, part = rope.get("mscale_all_dim"), rope.get("mscale")
    default = grown(float(part)) / grown(float(whole)) if whole and part else grown(1.0)
    return YarnScaling(
        factor=factor,
        beta_fast=fields.number("beta_fast", 32.0, of=rope),
        beta_slow=fields.number("beta_slow", 1.0, of=rope),
        original_max_tokens=original,
        attention_factor=fields.number("attention_factor", default, of=rope),
        truncate=bool(rope.get("truncate", True)),
    )


def _longrope(fields: Fields, rope: Mapping[str, Any], dims: int, max_tokens: int) -> LongRope:
    original = _original(fields, rope, max_tokens)
    factor = fields.number("factor", max_tokens / original if max_tokens else 1.0, of=rope)
    default = 1.0 if factor <= 1 or original < 2 else math.sqrt(1 + math.log(factor) / math.log(original))
    lists = []
    for name in ("short_factor", "long_factor"):
        value = rope.get(name)
        if (
            not isinstance(value, list)
            or len(value) != dims // 2
            or not all(type(x) in (int, float) and x > 0 for x in value)
        ):
            fields.faults.append(f"{name} must be a list of {dims // 2} numbers above 0")
            value = [1.0]
        lists.append(tuple(map(float, value)))
    return LongRope(
        short=lists[0],
        long=lists[1],
        original_max_tokens=original,
        attention_factor=fields.number("attention_factor", default, of=rope),
    )


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRope | None
SCALINGS: dict[str, Callable[[Fields, Mapping[str, Any], int, int], Scaling]] = {
    "default": lambda *_: None,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # its first name
}
