"""A decoder cut into shards of equal work, one for each process (tensor parallelism, arXiv:1909.08053).

    q, k, v, gate, up   each rank has some heads, some of the width           rows of the weight
    o, down             each rank multiplies what it has: a part of the sum    columns; the sum over ranks is the output
    embedding, head     each rank has some tokens of the vocabulary            rows; summed, or put side by side

A shard is a decoder itself, with fewer heads and narrower feed-forwards: `shard_of` makes it, `place` fills it from a checkpoint's
tensors as their names tell, and `join` lets it add up with the others.
Shapes: D hidden, F feed-forward width, H heads, K key/value heads, d head width, E experts, V vocabulary, v a shard of it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ownlm.errors import UserError
from ownlm.formats.ggml import Blocks
from ownlm.models.blocks import MLP, MoE, SelfAttention, Stack
from ownlm.models.decoder import Decoder
from ownlm.models.names import Stored
from ownlm.models.specs import Layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Which part: `rank` of `size`, counted from 0."""

    rank: int
    size: int


@dataclass(frozen=True, slots=True)
class Cut:
    """[start, stop) of a parameter's dimension; beyond its end there are zeros. With `dim` None all of it, but on the first rank
    only: what is added to a sum over ranks, such as a bias, is there once."""

    dim: int | None
    start: int
    stop: int

    def copy(self, whole: Tensor, ours: Tensor, *, first: bool, inside: int = 0) -> None:
        """Fill our part; `inside` is the number of leading dimensions that both lack."""
        if self.dim is None:
            ours.copy_(whole) if first else ours.zero_()
            return
        dim = self.dim - inside
        count = max(0, min(self.stop, whole.shape[dim]) - self.start)
        if count:
            ours.narrow(dim, 0, count).copy_(whole.narrow(dim, self.start, count))
        ours.narrow(dim, count, ours.shape[dim] - count).zero_()

    def of(self, whole: Tensor, *, like: Tensor) -> Tensor:
        """Our part of another tensor of the same shape, such as a second copy in the file."""
        ours = torch.empty_like(like, dtype=whole.dtype, device=whole.device)
        self.copy(whole, ours, first=True)
        return ours


def check(model: Any, size: int, *, where: str = "") -> None:
    """Raise UserError where a model can't be cut into `size` shards, with all reasons."""
    if not isinstance(model, Decoder) or model.head is not None:
        raise UserError("only decoders that write are split over processes.", where=where)
    faults: dict[str, None] = {}
    for layer in model.config.layers:
        a, width = layer.attention, layer.mlp.size
        if a.num_heads % size:
            faults[f"its {a.num_heads} heads"] = None
        elif a.num_kv_heads % size and size % a.num_kv_heads:
            faults[f"its {a.num_kv_heads} key/value heads"] = None
        if width % size:
            faults[f"its feed-forward of width {width}"] = None
    if faults:
        raise UserError(
            f"{' and '.join(faults)} can't be divided among {size} processes.",
            where=where,
            cure="Choose a number that divides them.",
        )


def shard_of(model: Decoder, shard: Shard) -> tuple[Decoder, dict[str, Cut]]:
    """A decoder (made like the given one, on the meta device) with this shard's shapes, and how its parameters are cut; those not
    named are whole. Its config tells its own heads and the whole vocabulary."""
    config = model.config
    local = replace(
        config,
        vocab_size=-(-config.vocab_size // shard.size),
        layers=tuple(_layer(layer, shard.size) for layer in config.layers),
    )
    with torch.device("meta"):
        made = Decoder(local, model.hf).to(model.dtype)
    made.config = replace(local, vocab_size=config.vocab_size)
    return made, dict(_cuts(model, shard))


def _layer(layer: Layer, size: int) -> Layer:
    a = layer.attention
    heads = replace(a, num_heads=a.num_heads // size, num_kv_heads=max(1, a.num_kv_heads // size))
    return replace(layer, attention=heads, mlp=replace(layer.mlp, size=layer.mlp.size // size))


def _cuts(model: Decoder, shard: Shard) -> Iterator[tuple[str, Cut]]:
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention):
            a, size = module.spec, shard.size
            queries = _even(0, a.num_heads * a.head_dim, shard)
            # Of fewer key/value heads than ranks, each rank has the one that its queries share.
            first, count = shard.rank * a.num_kv_heads // size, max(1, a.num_kv_heads // size)
            keys = Cut(0, first * a.head_dim, (first + count) * a.head_dim)
            yield from _linear(f"{name}.q_proj", queries)
            yield from _linear(f"{name}.k_proj", keys)
            yield from _linear(f"{name}.v_proj", keys)
            yield from _linear(f"{name}.o_proj", replace(queries, dim=1))
            yield f"{name}.sinks", _even(0, a.num_heads, shard)
        elif isinstance(module, MLP):
            for part in ("gate_proj", "up_proj"):
                yield from _linear(f"{name}.{part}", _even(0, module.spec.size, shard))
            yield from _linear(f"{name}.down_proj", _even(1, module.spec.size, shard))
        elif isinstance(module, Stack):
            for part in ("gate_proj", "up_proj"):
                for end in ("", "_bias"):
                    yield f"{name}.{part}{end}", _even(1, module.spec.size, shard)
            yield f"{name}.down_proj", _even(2, module.spec.size, shard)
            yield f"{name}.down_proj_bias", Cut(None, 0, 0)
    per = -(-model.config.vocab_size // shard.size)
    for name in ("embed_tokens.weight", "lm_head.weight", "lm_head.bias", "lm_head_bias"):
        yield name, Cut(0, shard.rank * per, (shard.rank + 1) * per)


def _even(dim: int, length: int, shard: Shard) -> Cut:
    part = length // shard.size
    return Cut(dim, shard.rank * part, (shard.rank + 1) * part)


def _linear(name: str, cut: Cut) -> Iterator[tuple[str, Cut]]:
    yield f"{name}.weight", cut
    yield f"{name}.bias", cut if cut.dim == 0 else Cut(None, 0, 0)


def place(
    target: Stored,
    stored: Tensor | Blocks,
    ours: Mapping[str, Tensor],
    give_back: Callable[[int], None] | None,
    *,
    whole: Mapping[str, Tensor],
    cuts: Mapping[str, Cut],
    shard: Shard,
) -> None:
    """`Stored.place` into a shard. Of a tensor as it lies only our part is read; one in another layout is made whole, and let go
    of. `whole` tells the shapes of the uncut model."""
    if not any(name in cuts for name, _ in target.parts):
        return target.place(stored, ours, give_back)
    (name, expert), *others = target.parts
    if isinstance(stored, Tensor) and target.layout == "same" and not others:
        found = {name: stored}
    else:
        # Memory that nobody writes to, such as that of other experts, is never taken.
        made = {part: torch.empty(whole[part].shape, dtype=ours[part].dtype, device="cpu") for part, _ in target.parts}
        target.place(stored, made, give_back)
        found = {part: made[part] if expert is None else made[part][expert] for part, _ in target.parts}
    for part, tensor in found.items():
        mine = ours[part].detach()
        cuts[part].copy(
            tensor,
            mine if expert is None else mine[expert],
            first=shard.rank == 0,
            inside=0 if expert is None else 1,
        )


class Group(Protocol):
    """What shards ask of their processes."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, on each."""
        ...

    def beside(self, x: Tensor) -> Tensor:
        """What all ranks have, side by side along the last dimension, on each."""
        ...


class ShardedEmbedding(nn.Module):
    """An embedding of some tokens of the vocabulary; the others' vectors come from other ranks."""

    def __init__(self, weight: nn.Parameter, first: int, group: Group) -> None:
        super().__init__()
        self.weight, self.first, self.group = weight, first, group

    def forward(self, ids: Tensor) -> Tensor:
        own = ids - self.first
        missing = (own < 0) | (own >= len(self.weight))
        x = F.embedding(own.masked_fill(missing, 0), self.weight).masked_fill(missing[..., None], 0.0)
        return self.group.sum(x)


def join(model: Decoder, shard: Shard, group: Group) -> Decoder:
    """The same decoder, whose hidden states and logits are those of all shards together. All ranks must call it alike."""

    def summed(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        return group.sum(out)

    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.o_proj.register_forward_hook(summed)
        elif isinstance(module, MLP):
            module.down_proj.register_forward_hook(summed)
        elif isinstance(module, MoE):
            module.register_forward_hook(summed)
    weight: Any = model.embed_tokens.weight
    sharded: Any = ShardedEmbedding(weight, shard.rank * len(weight), group)
    model.embed_tokens = sharded
    vocab_size = model.config.vocab_size
    model.around_logits = lambda hidden, own: group.beside(own(hidden))[..., :vocab_size]
    return model
