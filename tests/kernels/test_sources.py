"""Weights that pass from their files to the kernels give the logits of those that were read first."""

from pathlib import Path

import pytest
import torch
from block_files import NARROW, WIDE, model, sized, write
from references import CONFIGS, save
from test_coded import made
from test_native import logits

from ownlm.checkpoints.unread import Unread, open_unread
from ownlm.checkpoints.weights import load_model, save_codes
from ownlm.formats.ggml import DECODERS
from ownlm.kernels import library
from ownlm.kernels.native import Kind, NativeDecoder, packed_bytes, unsupported
from ownlm.quantization.codes import Quantized, Scheme
from ownlm.quantization.recode import scheme_of

pytestmark = pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.missing()}")
TOKENS = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(1))


def packed(unread: Unread) -> NativeDecoder:
    assert unsupported(unread.model) is None
    return NativeDecoder(unread.model, lend=unread.lend)


def opened(path: Path, dtype: torch.dtype = torch.float32) -> Unread:
    found = open_unread(path, dtype)
    assert found is not None
    return found


def same(ours: NativeDecoder, theirs: NativeDecoder) -> None:
    assert (ours.kind, ours.memory_bytes) == (theirs.kind, theirs.memory_bytes)
    assert torch.equal(logits(ours, TOKENS, [33, 7]), logits(theirs, TOKENS, [33, 7]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_numbers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(CONFIGS[name], tmp_path)
    same(packed(opened(tmp_path, dtype)), NativeDecoder(load_model(tmp_path, dtype=dtype)))


@pytest.mark.parametrize("to", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("name", ["llama3", "gpt2", "mixtral", "gemma3"])
def test_codes(name: str, to: Scheme, tmp_path: Path) -> None:
    save_codes(made(name, to), tmp_path)
    unread = opened(tmp_path)
    same(packed(unread), NativeDecoder(load_model(tmp_path, dtype=torch.float32, codes=True)))
    assert packed_bytes(unread.model) == packed_bytes(unread.read())


@pytest.mark.parametrize("type", DECODERS)
def test_blocks(type: str, tmp_path: Path) -> None:
    """Packed from the bytes of the file, and from codes that PyTorch made of them; near what the numbers give."""
    write(tmp_path / "model.gguf", model("llama", **WIDE), lambda name: type)
    unread = opened(tmp_path / "model.gguf")
    native, again = packed(unread), unread.read()
    assert native.kind == scheme_of(type)
    same(native, NativeDecoder(again))
    numbers = load_model(tmp_path / "model.gguf", dtype=torch.float32)
    with torch.inference_mode():
        wanted = numbers.logits(numbers(TOKENS[None]))[0]
        apart = (logits(native, TOKENS, [40]) - wanted).norm() / wanted.norm()
    assert 0 < apart < 0.03  # activations are rounded to eight bits


KINDS: dict[str, tuple[Kind, ...]] = {
    "a head of six bits, embeddings of four": ("int4", "int8"),
    "attention of several types": ("int8", "int4"),
    "half precision beside integers": ("int8", "bf16"),
    "as llama.cpp mixes Q4_K_M": ("uint4", "int8"),
}


@pytest.mark.parametrize("mixture", KINDS)
def test_mixed_files(mixture: str, tmp_path: Path) -> None:
    def type_of(name: str) -> str:
        if mixture.startswith("a head"):
            return "Q6_K" if name == "output.weight" else "Q4_0"
        if mixture.startswith("attention"):
            return "Q4_0" if "attn_q." in name or "attn_k." in name else "Q8_0"
        if mixture.endswith("Q4_K_M"):
            return "Q6_K" if "attn_v" in name or "ffn_down" in name or name == "output.weight" else "Q4_K"
        return "F16" if "attn_v" in name or "token_embd" in name or "ffn_down" in name else "Q8_0"

    write(tmp_path / "model.gguf", model("llama", **WIDE), type_of)
    unread = opened(tmp_path / "model.gguf")
    native = packed(unread)
    assert native.kind == KINDS[mixture][0]
    if mixture.endswith("Q4_K_M"):  # v by itself: nothing of q and k is widened
        kept = [module.kept for module in unread.model.modules() if isinstance(module, Quantized)]
        bits = {"uint4": 5, "int8": 8.5}
        assert native.memory_bytes == sum(-(-len(one) // 16) * 16 * one.columns * bits[one.scheme] / 8 for one in kept)
    same(native, NativeDecoder(unread.read()))
    numbers = load_model(tmp_path / "model.gguf", dtype=torch.float32)
    with torch.inference_mode():
        wanted = numbers.logits(numbers(TOKENS[None]))[0]
        assert (logits(native, TOKENS, [40]) - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("name", ["mixtral", "phi3", "gpt2", "gpt-oss", "gemma3"])
def test_blocks_of_other_shapes(name: str, tmp_path: Path) -> None:
    """Experts in a stack, q, k and v in one, biases; and heads that the kernels pad."""
    for sizes in (WIDE, NARROW):
        write(tmp_path / "model.gguf", sized(name, sizes), lambda name: "Q8_0")
        unread = opened(tmp_path / "model.gguf")
        same(packed(unread), NativeDecoder(unread.read()))
