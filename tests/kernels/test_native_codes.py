"""Codes on the kernels: packed as they lie, with the logits that the kernels' own rounding gives for the same weights."""

import pytest
import torch
from references import CONFIGS
from test_native import decoder, logits

from ownlm.kernels import library
from ownlm.kernels.native import NativeDecoder, text_logits, unsupported
from ownlm.quantization import fp8
from ownlm.quantization.calibrate import quantize_decoder
from ownlm.quantization.codes import Scheme, quantize_linears

pytestmark = pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.missing()}")


@pytest.mark.parametrize("to", ["int8", "int4", "uint4", "fp8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_codes_give_the_logits_of_the_kernels_own_rounding(
    name: str, to: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "best_scales", fp8.row_scales)  # the kernels don't search
    model = decoder(name)
    tokens = torch.randint(model.config.vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    by_kernels = NativeDecoder(model, to)
    rounded = logits(by_kernels, tokens, [33, 7])
    quantize_decoder(model, to)
    assert unsupported(model) is None
    native = NativeDecoder(model)
    assert native.kind == to
    ours = logits(native, tokens, [33, 7])
    if native.padded_head == native.head_dim:
        assert torch.equal(ours, rounded)
        assert native.memory_bytes == by_kernels.memory_bytes
        return
    # Heads of 8 are padded to 16: the kernels round o_proj in other groups than the codes, which stay exact as bf16.
    with torch.inference_mode():
        exact = model.logits(model(tokens[None]))[0]
    distance = [(one.log_softmax(-1) - exact.log_softmax(-1)).abs().mean() for one in (ours, rounded)]
    assert distance[0] < max(distance[1], torch.tensor(0.3)), distance


def test_a_whole_text_at_once() -> None:
    model = decoder("phi3-longrope")
    tokens = torch.randint(model.config.vocab_size, (120,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        reference = model.logits(model(tokens[None]))[0]
    torch.testing.assert_close(text_logits(NativeDecoder(model, "f32"), tokens), reference, atol=1e-3, rtol=1e-3)


def test_levels_of_nf4_are_left_to_pytorch() -> None:
    model = decoder("llama")
    quantize_linears(model, "nf4")
    assert "nf4" in (unsupported(model) or "")
