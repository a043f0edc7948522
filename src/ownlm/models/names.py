"""What the tensors of a checkpoint file are called, and how each is made of ours.

A table maps our names to stored ones: a prefix of dotted words to another, the longest first, so that a family writes down
only what differs. `{}` is the number of the layer, `{expert}` that of an expert, whose tensors we keep in one. Several of
ours may make one stored tensor (q, k and v in one), through a layout of a closed, invertible set. One table serves reading,
writing and any other format with names of its own.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ownlm.formats.ggml import Blocks

Layout = Literal[
    "same", "plus_one", "transposed", "by_head", "pairs", "flat", "gate_up_pairs", "experts_transposed", "heads_out", "heads_in",
    "leading", "scalar",
]  # fmt: skip
BY_ROW: tuple[Layout, ...] = ("same", "gate_up_pairs", "experts_transposed")  # row n of the file is row n of ours
PIECE_BYTES = 4_000_000  # copied at a time
Part = tuple[str, int | None]  # our name, and the expert of it


@dataclass(frozen=True, slots=True)
class To:
    """The right side of a table's row, where it is more than a name: how ours, joined along dimension 0, are laid out.
    `count` is a number the layout needs (heads, the patch size, or dimensions)."""

    name: str
    layout: Layout = "same"
    count: int = 1


Table = dict[str | tuple[str, ...], str | To]


# Our names of a layer's tensors, by what they are part of.
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FEED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = tuple(name.replace("mlp.", "mlp.experts.") for name in FEED)
PARTS: dict[str, Iterable[str | tuple[str, ...]]] = {
    "norms": ("input_layernorm", "post_attention_layernorm"),
    "after": ("attention_norm", "mlp_norm"),
    "attention": ATTENTION,
    "qkv": (ATTENTION[:3],),  # in one
    "o": (ATTENTION[3],),
    "mlp": FEED[1:],
    "gated": FEED,
    "gate_up": (FEED[:2],),  # in one
    "experts": EXPERTS,
    "router": ("mlp.gate",),
    "biases": tuple(f"{name}_bias" for name in EXPERTS),
    "qk_norms": ("self_attn.q_norm", "self_attn.k_norm"),
    "sinks": ("self_attn.sinks",),
}


def block(stored: str, ours: str = "layers.{}", *, layout: Layout = "same", count: int = 1, **parts: str) -> Table:
    """The rows of a layer, which is `stored` in files: block("h.{}", norms="ln_1 ln_2") names the two norms. `layout` is that of
    all of them."""
    rows: Table = {}
    for part, words in parts.items():
        for key, word in zip(PARTS[part], words.split(), strict=True):
            name = f"{stored}.{word}"
            keys = f"{ours}.{key}" if isinstance(key, str) else tuple(f"{ours}.{one}" for one in key)
            rows[keys] = name if layout == "same" else To(name, layout, count)
    return rows


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint file: `parts` of ours joined along dimension 0, then laid out."""

    name: str
    parts: tuple[Part, ...]
    layout: Layout = "same"
    count: int = 1

    def pack(self, ours: Mapping[str, Tensor]) -> Tensor:
        """The stored tensor; a view where nothing has to be joined."""
        parts = [_part(ours, part) for part in self.parts]
        return LAYOUTS[self.layout][0](parts[0] if len(parts) == 1 else torch.cat(parts), self.count)

    def shape(self, ours: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The shape in the file."""
        return tuple(self.pack({name: ours[name].to("meta") for name, _ in self.parts}).shape)

    def place(
        self, stored: Tensor | Blocks, ours: Mapping[str, Tensor], give_back: Callable[[int], None] | None = None
    ) -> None:
        """Copy a stored tensor into ours, in their dtype. `give_back(rows)` is told how far it got, where it goes by rows."""
        targets, unpack = [_part(ours, part) for part in self.parts], LAYOUTS[self.layout][1]
        if isinstance(stored, Blocks):
            if self.layout == "same":
                return stored.into(*targets)
            stored, give_back = stored.tensor(targets[0].dtype), None
        if stored.ndim < 2 or self.layout not in BY_ROW or (len(targets) > 1 and self.layout == "same"):
            whole = unpack(stored, self.count)
            for target, part in zip(targets, torch.split(whole, [len(t) for t in targets]), strict=True):
                target.copy_(part)
            return
        step = max(1, PIECE_BYTES * len(stored) // max(1, stored.nbytes))
        for row in range(0, len(stored), step):
            parts = unpack(stored[row : row + step], self.count).chunk(len(targets))
            for target, part in zip(targets, parts, strict=True):
                target[row : row + step].copy_(part)
            if give_back is not None:
                give_back(row + step)


def stored_tensors(table: Table, parameters: Mapping[str, Tensor]) -> list[Stored]:
    """Every stored tensor of a model with these parameters. AssertionError for one that the table has no name for."""
    rows = _rows(table)
    firsts = {keys[0]: keys for keys in rows}
    joined = {key for keys in rows for key in keys[1:]}
    stored = []
    for name, parameter in parameters.items():
        general, number = _general(name)
        found = _longest(general, firsts.keys() | joined)
        assert found is not None, f"{name} has no name in the file"
        if found in joined:
            continue
        keys, rest = firsts[found], general[len(found) :]
        to = rows[keys]
        to = To(to) if isinstance(to, str) else to
        pattern = (to.name + rest).replace("{}", number)
        members = [(key + rest).replace("{}", number) for key in keys]
        # A name without its suffix ("experts.gate_proj") is a raw tensor: the suffix of the row's name is its own.
        experts = range(len(parameter)) if "{expert}" in pattern else [None]
        for expert in experts:
            stored.append(
                Stored(
                    pattern.replace("{expert}", str(expert)),
                    tuple((member, expert) for member in members if member in parameters),
                    to.layout,
                    to.count,
                )
            )
    return stored


def fixed(table: Table) -> Callable[[Any], Table]:
    """The table of a family whose names hang on nothing in its config."""
    return lambda config: table


def nested(table: Table, ours: str, stored: str) -> Table:
    """The table of a model that is a part of another one, whose names begin with `ours` and, in files, with `stored`."""
    rows: Table = {}
    for key, value in table.items():
        inner = To(value) if isinstance(value, str) else value
        keys = f"{ours}{key}" if isinstance(key, str) else tuple(f"{ours}{one}" for one in key)
        rows[keys] = To(stored + inner.name, inner.layout, inner.count)
    return rows


def moved(table: Table, prefix: str, other: str) -> Table:
    """The same where stored names begin with another prefix."""
    rows = {key: To(value) if isinstance(value, str) else value for key, value in table.items()}
    return {
        key: replace(to, name=other + to.name.removeprefix(prefix)) if to.name.startswith(prefix) else to
        for key, to in rows.items()
    }


def nameless(table: Table, parameters: Iterable[str]) -> list[str]:
    """The parameters that the table has no name for."""
    heads = {key for keys in _rows(table) for key in keys}
    return [name for name in parameters if _longest(_general(name)[0], heads) is None]


def _rows(table: Table) -> dict[tuple[str, ...], str | To]:
    return {key if isinstance(key, tuple) else (key,): value for key, value in table.items()}


def _general(name: str) -> tuple[str, str]:
    """A name with {} for its first number, and the number."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    return re.sub(r"(?<=\.)\d+(?=\.)", "{}", name, count=1), numbers[0] if numbers else "{}"


def _longest(general: str, heads: Set[str]) -> str | None:
    words = general.split(".")
    return next((head for size in range(len(words), 0, -1) if (head := ".".join(words[:size])) in heads), None)


def _part(ours: Mapping[str, Tensor], part: Part) -> Tensor:
    name, expert = part
    tensor = ours[name].detach()
    return tensor if expert is None else tensor[expert]


def _regrouped(x: Tensor, first: int, second: int, third: int, dim: int) -> Tensor:
    """Dimension 0 seen as three, of which `dim` changes place with the next."""
    return x.reshape(first, second, third, *x.shape[1:]).transpose(dim, dim + 1).flatten(0, 2)


def _flipped(x: Tensor, _: int = 0) -> Tensor:
    """The last two dimensions exchanged; a bias as it is."""
    return x.mT if x.ndim > 1 else x


def _interleaved(x: Tensor, _: int) -> Tensor:
    x = x.reshape(2, -1, *x.shape[1:]).movedim(0, 2).flatten(1, 2)
    return x.mT if x.ndim == 3 else x


def _apart(x: Tensor, _: int) -> Tensor:
    x = x.mT if x.ndim == 3 else x
    return x.reshape(len(x), -1, 2, *x.shape[2:]).movedim(2, 0).flatten(0, 1)


# (ours -> stored, stored -> ours), each of a tensor and the `count` of its row.
LAYOUTS: dict[Layout, tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor, int], Tensor]]] = {
    "same": (lambda x, _: x, lambda x, _: x),
    "transposed": (_flipped, _flipped),
    # (3 H d, …) -> (H 3 d, …): q, k and v of each head side by side.
    "by_head": (lambda x, heads: _regrouped(x, 3, heads, -1, 0), lambda x, heads: _regrouped(x, heads, 3, -1, 0)),
    # Rotary in the half layout -> neighbouring pairs, as Meta's and GGUF's Llama files have it.
    "pairs": (lambda x, heads: _regrouped(x, heads, 2, -1, 1), lambda x, heads: _regrouped(x, heads, -1, 2, 1)),
    # (D, C P P) -> (D, C, P, P): a linear layer over patches as the convolution it is stored as.
    "flat": (lambda x, patch: x.reshape(len(x), -1, patch, patch), lambda x, _: x.flatten(1)),
    # gate then up, (2 E, F, …) -> (E, …, 2 F) with gate and up in turn; biases (2 E, F) -> (E, 2 F).
    "gate_up_pairs": (_interleaved, _apart),
    "experts_transposed": (lambda x, _: x.mT if x.ndim == 3 else x, lambda x, _: x.mT if x.ndim == 3 else x),
    # (H d, D) -> (D, H, d): the projection into heads as XLNet multiplies it; and (D, H d) -> (D, H, d), that out of heads.
    "heads_out": (lambda x, heads: x.T.reshape(x.shape[1], heads, -1), lambda x, _: x.flatten(1).T),
    "heads_in": (lambda x, heads: x.reshape(len(x), heads, -1), lambda x, _: x.flatten(1)),
    # `count` dimensions of 1 before the others.
    "leading": (lambda x, count: x.reshape(*[1] * count, *x.shape), lambda x, count: x.reshape(x.shape[count:])),
    "scalar": (lambda x, _: x.reshape(()), lambda x, _: x.reshape(1)),
    "plus_one": (lambda x, _: x.float() + 1.0, lambda x, _: x.float() - 1.0),
}


def renamed(table: Iterable[Stored], change: Callable[[str], str]) -> list[Stored]:
    """The same tensors under other names."""
    return [Stored(change(stored.name), stored.parts, stored.layout, stored.count) for stored in table]
