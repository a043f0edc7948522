"""A Hugging Face config.json, read field by field: every fault is collected, none is guessed over.

A family says by which names its files spell a field and what they leave out (`Family.spelled`, `Family.defaults`); its reader asks by
Llama's names. Both schemas are read: transformers 5 (`rope_parameters`, `layer_types`) and the hub's (`rope_theta` beside
`rope_scaling`). A value that would change what is computed and that we don't compute is refused, never ignored.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ownlm.models.specs import Activation, LinearScaling, Llama3Scaling, LongRope, Rotary, YarnScaling

HF_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "relu2": "relu2",
}  # fmt: skip
HF_NAMES: dict[Activation, str] = {
    "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu",
    "relu2": "relu2",
}  # fmt: skip
FULL, LOCAL = "full_attention", "sliding_attention"
T = TypeVar("T")


class Fields:
    """A config.json read field by field, collecting every fault instead of stopping at the first.

    A field that is missing or null is its default: the family's, else the one that the reader names.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        stored: frozenset[str] | None = None,
        *,
        spelled: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
        faults: list[str] | None = None,
    ) -> None:
        """`stored` names the tensors of the files, where there are files: some configs don't say what they hold."""
        self.config, self.stored = config, stored
        self.spelled, self.defaults = spelled or {}, defaults or {}
        self.faults: list[str] = [] if faults is None else faults

    def name(self, name: str) -> str:
        """How the files spell a field."""
        return self.spelled.get(name, name)

    def get(self, name: str, default: Any = None, *, null: bool = False) -> Any:
        """What the file says, or the default. With `null`, a null in the file is an answer too."""
        spelled, default = self.name(name), self.defaults.get(name, default)
        value = self.config.get(spelled)
        return default if value is None and not (null and spelled in self.config) else value

    def table(self, name: str, defaults: Mapping[str, Any] | None = None) -> "Fields":
        """The fields of a table within this config, which may be missing where there are defaults; its faults are ours."""
        value = self.get(name, {} if defaults else None)
        if not isinstance(value, Mapping):
            self.faults.append(f"{name} must be a table, got {value!r}")
            value = {}
        return Fields(value, self.stored, defaults=defaults, faults=self.faults)

    def holds(self, tensor: str, default: bool) -> bool:
        """Whether the files have a tensor of that name (the end of it counts); `default` where there are no files."""
        return default if self.stored is None else any(name.endswith(tensor) for name in self.stored)

    def count(self, name: str, default: int | None = None, *, at_least: int = 1, at_most: int = 2**24) -> int:
        """A whole number from `at_least` to `at_most`."""
        value = self.get(name, default)
        if type(value) is not int or not at_least <= value <= at_most:
            self.faults.append(f"{self.name(name)} must be a whole number from {at_least} to {at_most}, got {value!r}")
            return at_least
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above zero."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.faults.append(f"{self.name(name)} must be a number above 0, got {value!r}")
            return 1.0
        return float(value)

    def optional(self, name: str, default: float | None = None) -> float | None:
        """A number above zero, or None where the file says null (or nothing, and there is no default)."""
        return None if self.get(name, default, null=True) is None else self.number(name, default)

    def window(self, name: str = "sliding_window", default: int | None = None) -> int | None:
        """A count of tokens, or None for no window."""
        return None if self.get(name, default, null=True) is None else self.count(name, default)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            self.faults.append(f"{self.name(name)} must be true or false, got {value!r}")
        return bool(value)

    def choice(self, name: str, known: Mapping[str, T], default: str) -> T:
        """What a word stands for."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in known:
            self.faults.append(f"{self.name(name)} {value!r} is not supported (supported: {', '.join(known)})")
            return next(iter(known.values()))
        return known[value]

    def activation(self, name: str = "hidden_act", default: str = "silu") -> Activation:
        return self.choice(name, HF_ACTIVATIONS, default)

    def only(self, **values: Any) -> None:
        """Refuse fields that are present with another value than the one whose computation we do."""
        for name, value in values.items():
            if self.config.get(name) not in (None, value):
                self.faults.append(f"{name} {self.config[name]!r} is not supported (only {value!r})")

    def local(self, default: Sequence[bool]) -> list[bool]:
        """layer_types: for each layer whether it has the window; `default` where the file doesn't say."""
        value, known = self.get("layer_types"), {FULL, LOCAL}
        if value is None:
            return list(default)
        if not isinstance(value, list) or len(value) != len(default) or not set(map(str, value)) <= known:
            what = f"must name {len(default)} layers as {' or '.join(sorted(known))}"
            self.faults.append(f"layer_types {what}, got {value!r}")
            return [False] * len(default)
        return [kind == LOCAL for kind in value]

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
        value = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if isinstance(value, Mapping) and kind is not None and kind in value:
            value = value[kind]
        if not isinstance(value, Mapping):
            self.faults.append(f"rope_parameters must be a table, got {value!r}")
            return Rotary()
        # "type" is the first name of the field.
        rope = Fields({"rope_type": value.get("type")} | dict(value), faults=self.faults)
        theta = rope.number("rope_theta", self.number("rope_theta", theta))
        fraction = rope.number("partial_rotary_factor", self.number("partial_rotary_factor", fraction))
        original = self.get("original_max_position_embeddings") or max_tokens or None
        scaling = rope.choice("rope_type", SCALINGS, "default")(rope, int(head_dim * fraction), max_tokens, original)
        return Rotary(theta=theta, fraction=fraction, scaling=scaling)


def _linear(rope: Fields, dims: int, max_tokens: int, original: Any) -> LinearScaling:
    return LinearScaling(factor=rope.number("factor"))


def _llama3(rope: Fields, dims: int, max_tokens: int, original: Any) -> Llama3Scaling:
    return Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_tokens=rope.count("original_max_position_embeddings", original),
    )


def _yarn(rope: Fields, dims: int, max_tokens: int, original: Any) -> YarnScaling:
    original = rope.count("original_max_position_embeddings", original)
    factor = rope.number("factor", max_tokens / original if max_tokens else None)

    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    whole, part = (rope.number(name) if rope.get(name) else 0.0 for name in ("mscale_all_dim", "mscale"))
    return YarnScaling(
        factor=factor,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        original_max_tokens=original,
        attention_factor=rope.number("attention_factor", grown(part) / grown(whole) if whole and part else grown(1.0)),
        truncate=rope.flag("truncate", True),
    )


def _longrope(rope: Fields, dims: int, max_tokens: int, original: Any) -> LongRope:
    original = rope.count("original_max_position_embeddings", original)
    factor = rope.number("factor", max_tokens / original if max_tokens else 1.0)
    default = 1.0 if factor <= 1 or original < 2 else math.sqrt(1 + math.log(factor) / math.log(original))

    def divisors(name: str) -> tuple[float, ...]:
        value = rope.get(name)
        numbers = isinstance(value, list) and all(type(x) in (int, float) and x > 0 for x in value)
        if not numbers or len(value) != dims // 2:
            rope.faults.append(f"{name} must be a list of {dims // 2} numbers above 0")
            return (1.0,)
        return tuple(map(float, value))

    return LongRope(
        short=divisors("short_factor"),
        long=divisors("long_factor"),
        original_max_tokens=original,
        attention_factor=rope.number("attention_factor", default),
    )


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRope | None
SCALINGS: dict[str, Callable[[Fields, int, int, Any], Scaling]] = {
    "default": lambda *_: None,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # its first name
}
