"""What weights come as, and how they are handed to the packing in C++: numbers, codes, or blocks of a GGUF file.

Matrices that are packed as one (q, k and v) become one kind: integers of several kinds int8, of the same values but for those of uint4,
which are rounded; codes beside numbers, or fp8 beside integers, numbers. A v that alone differs stays by itself (`last_apart`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ownlm.formats.ggml import Blocks
from ownlm.models.decoder import Decoder
from ownlm.quantization.codes import Codes, Quantized
from ownlm.quantization.recode import exactly, scheme_of, widened

Coding = Literal["int8", "int4", "uint4", "fp8"]
Kind = Literal["f32", "bf16", "int8", "int4", "uint4", "fp8"]
CODINGS: tuple[Coding, ...] = get_args(Coding)
Weight: TypeAlias = Tensor | Codes | Blocks
WeightsState: TypeAlias = tuple[tuple[int, int, torch.dtype], ...]
# `Source` of cpu/model.h.
FLOATS, BF16S, CODES = 0, 1, 2
BLOCKS = {type: 3 + at for at, type in enumerate(("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"))}
PIECE = 2**22  # numbers made of blocks at a time


def weight_of(module: nn.Module | Tensor) -> Weight:
    """The weight of a layer (or of a stack of experts, itself a tensor), in codes where it is kept so."""
    if isinstance(module, Quantized):
        return module.blocks or module.kept
    weight: Tensor = module if isinstance(module, Tensor) else module.weight  # type: ignore[assignment]
    return weight


def by_row(weight: Weight, change: Callable[[Tensor], Tensor]) -> Weight:
    """The weight with its rows changed: padded, put into another order."""
    if isinstance(weight, Blocks):
        return weight.by_row(change)
    if isinstance(weight, Codes):
        return weight.by_row(change)
    return change(weight)


def numbers(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.tensor()


def kept_kind(weight: Codes | Blocks) -> Coding:
    scheme = scheme_of(weight.type) if isinstance(weight, Blocks) else weight.scheme
    assert scheme != "nf4", "ask `unsupported` first"
    return scheme


def default_kind(model: Decoder) -> Kind:
    """That of most of its matrices in codes; without any bf16 for a model in it, else float32."""
    kept = [module for module in model.modules() if isinstance(module, Quantized)]
    if kept:
        schemes = [kept_kind(module.kept) for module in kept]
        return max(CODINGS, key=schemes.count)
    return "bf16" if model.dtype == torch.bfloat16 else "f32"


def last_apart(parts: Sequence[Weight]) -> bool:
    """Whether all but the last are in uint4 and that is in int8, or the other way round: two matrices for the same activations. (As
    llama.cpp mixes Q4_K_M, where v has more bits than q and k.)"""
    *first, last = ("" if isinstance(part, Tensor) else kept_kind(part) for part in parts)
    return {*first, last} == {"int8", "uint4"} and last not in first


def together(parts: Sequence[Weight], kind: Kind) -> tuple[Sequence[Weight], Kind]:
    """Parts of one matrix in one kind: that of their codes, or `kind` where there are numbers among them or codes of no common kind."""
    kinds = {"numbers" if isinstance(part, Tensor) else kept_kind(part) for part in parts}
    if "numbers" in kinds or ("fp8" in kinds and len(kinds) > 1):
        return [numbers(part) for part in parts], kind
    if len(kinds) == 1:
        return parts, kinds.pop()  # type: ignore[return-value]
    return [widened(part) if isinstance(part, Codes) else part for part in parts], "int8"


def pieces(weight: Weight) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(rows, source, tensors) of runs of rows: what `ownlm_pack` takes, contiguous; behind codes of ours their scales and minimums."""
    if isinstance(weight, Blocks):
        if weight.type in BLOCKS:
            yield len(weight), BLOCKS[weight.type], [weight.raw.contiguous()]
            return
        step = max(1, PIECE // weight.shape[-1])
        for at in range(0, len(weight), step):
            piece = weight[at : at + step]
            whole = exactly(piece)
            yield from pieces(piece.tensor() if whole is None else whole)
        return
    if isinstance(weight, Codes):
        yield len(weight), CODES, [tensor.contiguous() for tensor in weight.tensors().values()]
        return
    source = BF16S if weight.dtype == torch.bfloat16 else FLOATS
    step = len(weight) if source == BF16S or weight.dtype == torch.float32 else max(1, PIECE // weight.shape[-1])
    for at in range(0, len(weight), step):
        values = weight[at : at + step].detach()
        yield len(values), source, [(values if source else values.float()).contiguous()]


def addresses(tensors: Sequence[Tensor]) -> list[int | None]:
    """Three for C: of values, and of the scales and minimums where there are any."""
    return [*(tensor.data_ptr() for tensor in tensors), None, None][:3]


def weights_state(module: nn.Module) -> WeightsState:
    """Which tensors a model consists of and how often each was changed in place: equal states are equal weights."""
    held = (*module.parameters(), *module.buffers())
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype) for tensor in held)
