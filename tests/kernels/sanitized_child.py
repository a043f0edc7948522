"""Runs the kernels of a library compiled with sanitizers, which end the process at the first fault they see.

    python sanitized_child.py INSTRUCTION_SET [overrun]

The library is $XDG_CACHE_HOME/ownlm/sanitized.so. With `overrun` a step is told of more rows than its arrays hold: the fault that
shows that the sanitizers watch.
"""

import copy
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from references import CONFIGS, make_loud

from ownlm.adapters.lora import Learned, Pair, base_of, matching
from ownlm.formats.ggml import Blocks
from ownlm.formats.ggml_encode import quantize
from ownlm.gguf import LAYOUTS
from ownlm.kernels import build, choose, library
from ownlm.kernels.adapters import NativeAdapter
from ownlm.kernels.linear import accelerate
from ownlm.kernels.native import KINDS, PAGE, Batch, NativeDecoder
from ownlm.kernels.sources import BLOCKS
from ownlm.models.blocks import MLP
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from ownlm.models.specs import FeedForward
from ownlm.quantization.calibrate import quantize_decoder
from ownlm.quantization.codes import QuantizedLinear, quantize_linears
from ownlm.quantization.recode import scheme_of, widened

SHAPES = ("llama", "gpt2", "gemma3", "mixtral", "gpt-oss")


def batch(lengths: list[int], first: list[int], pages_SP: np.ndarray) -> Batch:
    """The next rows of each sequence, of which the last is wanted."""
    count = sum(lengths)
    position_R = np.concatenate(
        [at + np.arange(length, dtype=np.int32) for at, length in zip(first, lengths, strict=True)]
    )
    ends = np.cumsum(lengths) - 1
    return Batch(
        token_R=np.arange(count, dtype=np.int32) * 31 % 97,
        sequence_R=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        position_R=position_R,
        wanted_R=np.isin(np.arange(count), ends).astype(np.int32),
        long_R=np.zeros(count, np.int32),
        pages_SP=pages_SP,
    )


def adapter(model: Decoder, rank: int) -> Learned:
    """Of every layer, and of the head where there is one of its own."""

    def pair(name: str) -> Pair:
        layer = base_of(model, name)
        return Pair(torch.ones(rank, layer.in_features), torch.ones(layer.out_features, rank), alpha=0.1, rslora=False)

    whole = {} if model.lm_head is None else dict(model.lm_head.named_parameters(prefix="lm_head"))
    return Learned(pairs={name: pair(name) for name in matching(model, "all-linear")}, whole=whole)


def integers(model: Decoder, instruction_set: str) -> Iterator[NativeDecoder]:
    """The model in codes, and in blocks of a GGUF file where rows are whole ones."""
    for to, type in (("int8", "Q8_0"), ("int4", "Q4_0"), ("int8", "Q5_0"), ("fp8", None)):
        coded = copy.deepcopy(model)
        quantize_decoder(coded, to)  # type: ignore[arg-type]
        yield NativeDecoder(coded, instruction_set=instruction_set)
        if type is None:
            continue
        for module in coded.modules():
            if isinstance(module, QuantizedLinear) and module.in_features % 32 == 0:
                weight = module.dequantized(torch.float32)
                module.blocks = Blocks(type, torch.cat(list(quantize(type, weight))).flatten(), tuple(weight.shape))
        yield NativeDecoder(coded, instruction_set=instruction_set)
    coded = copy.deepcopy(model)
    quantize_decoder(coded, "uint4")
    for name, module in list(coded.named_modules()):
        if name.endswith("v_proj"):  # a matrix by itself then
            assert isinstance(module, QuantizedLinear)
            coded.set_submodule(name, QuantizedLinear(widened(module.kept), module.bias))
    yield NativeDecoder(coded, instruction_set=instruction_set)


def main(instruction_set: str, overrun: bool) -> None:
    build.file_name = lambda: "sanitized.so"
    assert instruction_set in library.instruction_sets(), library.missing()
    pages_SP = (
        np.arange(2 * 3, dtype=np.int32).reshape(2, 3)[::-1].copy()
    )  # all there are: the last one is full at the end
    for name in SHAPES:
        config, family = from_hf(CONFIGS[name])
        model = family.build(config, CONFIGS[name])
        make_loud(model)
        assert isinstance(model, Decoder)
        packed = [NativeDecoder(model, kind, instruction_set=instruction_set) for kind in KINDS]
        codes = [(native, "int8") for native in packed if native.kind == "bf16"]
        for native, kv in [*((one, None) for one in (*packed, *integers(model, instruction_set))), *codes]:
            cache = native.cache(pages_SP.size, kv)
            adapters = [NativeAdapter(native, adapter(model, rank)) for rank in (3, 33)]
            for lengths, first in (([41, 9], [0, 0]), ([1, 11], [41, 9]), ([3 * PAGE - 42, 1], [42, 20])):
                given = batch(lengths, first, pages_SP)
                if overrun:
                    object.__setattr__(given, "position_R", given.position_R[:1].copy())
                chosen = np.repeat(np.array([0, 1], np.int32), lengths)
                chosen[::3] = -1
                given = replace(given, adapter_R=chosen, adapters=adapters)
                logits_WV = native.step(cache, given)
                assert logits_WV.isfinite().all(), (name, native.kind)
                choose.choose(logits_WV, [0, 1], [0.0, 0.7], [0.0, 0.999999])
    library.instruction_set = lambda: instruction_set
    layers()
    files()


def layers() -> None:
    """Quantised layers by themselves: inputs and outputs that end within groups and tiles, with and without a gate."""
    for size, scheme, gated in itertools.product((48, 130), ("int8", "int4", "uint4", "fp8"), (False, True)):
        mlp = MLP(50, FeedForward(size=size, gated=gated, bias=True))
        model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": mlp})])})
        quantize_linears(model, scheme)
        assert accelerate(model)
        with torch.no_grad():
            for rows in (1, 7, 19):
                x = torch.randn(rows, 50)
                assert mlp(x).isfinite().all()
                assert mlp.up_proj(x).isfinite().all()


def files() -> None:
    """Bytes of every type of block that is packed as it lies, in rows that end within a tile."""
    for type, form in BLOCKS.items():
        raw = torch.randint(0, 256, (21, 512 // LAYOUTS[type].block * LAYOUTS[type].size), dtype=torch.uint8)
        for kind in {scheme_of(type), "int8"}:
            given = (KINDS[kind], *(21, 512), form, raw.data_ptr(), None, None, None)  # type: ignore[index]
            handle = library.library().ownlm_linear_new(library.instruction_set().encode(), 2, *given)  # type: ignore[union-attr]
            library.library().ownlm_linear_delete(handle)  # type: ignore[union-attr]


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1], sys.argv[2:] == ["overrun"])
    print("clean")
