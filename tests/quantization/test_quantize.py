import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adapters.test_adapters import IDS, logits, loud, model
from ownlm.adapters.lora import LoRA, add_lora, base_of
from ownlm.quantization.codes import GROUP, NF4, QuantizedLinear, Scheme, linears, quantize, quantize_linears

# QLoRA, arXiv:2305.14314, appendix E.
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
SCHEMES: tuple[Scheme, ...] = ("int8", "int4", "uint4", "nf4")


def test_the_levels_are_the_published_ones() -> None:
    assert pytest.approx(PUBLISHED, abs=3e-7) == NF4


@given(rows=st.integers(1, 5), columns=st.integers(1, 200), seed=st.integers(0, 99))
def test_it_rounds_to_the_nearest_level(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    for scheme in SCHEMES:
        kept = quantize(weight, scheme)
        assert kept.scales.dtype == torch.float16
        back = kept.tensor()
        assert back.shape == weight.shape == kept.shape
        for row in range(rows):
            for group, start in enumerate(range(0, columns, GROUP)):
                part = weight[row, start : start + GROUP]
                scale = kept.scales[row, group].float()
                levels = {
                    "nf4": torch.tensor(PUBLISHED),
                    "int4": torch.arange(-8.0, 8),
                    "uint4": torch.arange(16.0),
                    "int8": torch.arange(-127.0, 128),
                }
                lowest = 0.0 if kept.minimums is None else kept.minimums[row, group].float()
                best = (part[:, None] - levels[scheme] * scale - lowest).abs().min(-1).values
                got = (part - back[row, start : start + GROUP]).abs()
                torch.testing.assert_close(got, best, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("scheme", "type"), [("int8", "Q8_0"), ("int4", "Q4_0"), ("uint4", "Q4_1")])
def test_values_are_those_of_llama_cpps_blocks(scheme: Scheme, type: str) -> None:
    """Against the gguf package's own quantiser and decoder: the same scales, and codes that are neighbours where it rounds with a
    scale that isn't yet in half precision."""
    quants = pytest.importorskip("gguf.quants")
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    kind = getattr(pytest.importorskip("gguf").GGMLQuantizationType, type)
    theirs = torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))
    differs = (quantize(weight, scheme).tensor() - theirs).abs()
    assert (differs > 1e-6).float().mean() < 0.02
    assert (differs <= quantize(weight, scheme).scales.float().abs().repeat_interleave(GROUP, 1) * 1.01).all()


def test_half_precision_holds_every_scale() -> None:
    huge = torch.tensor([[3e38, -3e38] * 16, [1e-30] * 32])
    for scheme in SCHEMES:
        assert quantize(huge, scheme).tensor().isfinite().all()


@pytest.mark.parametrize(
    ("scheme", "bar"), [("int8", 0.27), ("int4", 0.15), ("uint4", 0.16), ("nf4", 0.15), ("fp8", 0.253)]
)
def test_the_base_gets_small(scheme: Scheme, bar: float) -> None:
    linear = nn.Linear(512, 384, bias=False)
    layer = QuantizedLinear(quantize(linear.weight, scheme))
    held = sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
    assert held <= bar * linear.weight.nbytes


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "mixtral"])
@pytest.mark.parametrize("scheme", [*SCHEMES, "fp8"])
def test_it_trains_as_the_dequantised_model_does(name: str, scheme: Scheme) -> None:
    """Equal logits and gradients of the adapter; of the base nothing is kept for the backward pass but codes."""
    quantised, plain = model(name), model(name)
    quantize_linears(quantised, scheme)
    replaced = linears(quantised)
    assert replaced
    assert all(isinstance(layer, QuantizedLinear) for layer in replaced.values())
    with torch.no_grad():
        for layer_name, layer in replaced.items():
            base_of(plain, layer_name).weight.copy_(layer.dequantized(torch.float32))  # type: ignore[operator]
    grads = []
    for decoder in (quantised, plain):
        add_lora(decoder, LoRA(targets=("q_proj", "o_proj")), seed=1)
        loud(decoder, "default")
        decoder.logits(decoder(IDS)).logsumexp(-1).sum().backward()
        grads.append({name: p.grad for name, p in decoder.named_parameters() if p.requires_grad})
    torch.testing.assert_close(logits(quantised), logits(plain), atol=1e-5, rtol=1e-5)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-4, rtol=1e-4)
