"""Floats of 8 bits: against the values their bits spell, and products of them against numbers. The GPU's own: generate/test_cuda.py."""

import pytest
import torch
from references import CONFIGS, difference, make_loud
from torch import Tensor

from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from ownlm.quantization import fp8
from ownlm.quantization.calibrate import quantize_decoder
from ownlm.quantization.codes import GROUP, Codes, QuantizedEmbedding, QuantizedLinear, empty, quantize

ALL = torch.arange(256, dtype=torch.uint8)


def spelled(code: int) -> float:
    """Sign, four bits of exponent (bias 7), three of fraction; the two with all bits set are NaN (arXiv:2209.05433, table 1)."""
    exponent, fraction = code >> 3 & 15, code & 7
    size = (1 + fraction / 8) * 2.0 ** (exponent - 7) if exponent else fraction / 8 * 2.0**-6
    return float("nan") if code & 127 == 127 else -size if code & 128 else size


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_codes_stand_for_what_their_bits_spell() -> None:
    kept = Codes("fp8", ALL.view(fp8.E4M3).view(8, GROUP), torch.full((8, 1), 0.5), 30)
    expected = torch.tensor([spelled(code) / 2 for code in range(256)]).view(8, GROUP)[:, :30]
    torch.testing.assert_close(kept.tensor(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("columns", [1, 32, 50])
def test_rows_are_rounded_to_the_nearest(columns: int) -> None:
    weight = normal(2, 6, columns) * torch.tensor([1e-8, 1e-3, 1.0, 1.0, 1e4, 1e30])[:, None]
    weight[0, 2] = 0
    kept = quantize(weight, "fp8")
    assert (kept.codes.dtype, kept.scales.dtype, kept.scales.shape) == (fp8.E4M3, torch.float32, (2, 6, 1))
    assert kept.codes.shape[-1] % GROUP == 0
    assert kept.shape == weight.shape
    assert [one.shape for one in (empty("fp8", (2, 6, columns)).codes, kept.codes)] == [kept.codes.shape] * 2
    first = fp8.row_scales(weight)
    torch.testing.assert_close(first[..., 0] * 448, weight.abs().amax(-1), atol=1e-35, rtol=1e-6)
    assert (kept.scales >= first).all()
    assert (kept.scales < 2 * first).all()
    values = torch.tensor([spelled(code) for code in range(256) if code & 127 != 127])
    best = (weight.unsqueeze(-1) - kept.scales.unsqueeze(-1) * values).abs().amin(-1)
    torch.testing.assert_close((kept.tensor() - weight).abs(), best, atol=1e-35, rtol=1e-3)
    assert kept.tensor()[0, 2].eq(0).all()


def test_the_scale_is_better_than_that_of_the_largest_number() -> None:
    weight = normal(300, 200)
    plain = fp8.nearest(weight / fp8.row_scales(weight)).float() * fp8.row_scales(weight)
    ours, theirs = ((kept - weight).square().sum(-1) for kept in (quantize(weight, "fp8").tensor(), plain))
    assert (ours <= theirs * (1 + 1e-5)).all()
    assert ours.sum() < 0.9 * theirs.sum()


def test_any_number_can_be_kept() -> None:
    weight = torch.tensor([[3e38, -3e38], [1e-44, -1e-40], [0.0, -0.0]])
    back = quantize(weight, "fp8").tensor()
    torch.testing.assert_close(back, weight, atol=1e-40, rtol=1e-6)
    assert back[2].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [64, 50])
def test_products_are_those_of_the_rounded_numbers(columns: int, dtype: torch.dtype) -> None:
    """`torch._scaled_mm` runs on CPUs too, with the arguments that GPUs are given."""
    kept, bias = quantize(normal(48, columns), "fp8"), normal(48, seed=1)
    x = (normal(3, 5, columns, seed=2) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]).to(dtype)
    x[0, 0] = 0
    for added in (None, bias):
        ours = fp8.product(x, kept.codes, kept.scales, added)
        expected = fp8.reference(x, kept.codes, kept.scales, added)
        assert (ours.dtype, ours.shape) == (dtype, (3, 5, 48))
        torch.testing.assert_close(ours, expected, atol=0.01, rtol=0.01)  # the sum is rounded to bfloat16
    exact = torch.nn.functional.linear(x.float(), kept.tensor())
    rounded = fp8.reference(x, kept.codes, kept.scales).float()
    assert 0.005 < (rounded - exact).norm() / exact.norm() < 0.04  # three bits of fraction on both sides
    assert fp8.product(x[:0], kept.codes, kept.scales).shape == (0, 5, 48)


def decoder(name: str) -> Decoder:
    config, family = from_hf(CONFIGS[name])
    model = family.build(config, CONFIGS[name])
    make_loud(model)
    assert isinstance(model, Decoder)
    quantize_decoder(model.eval(), "fp8")
    return model


@pytest.mark.parametrize("name", ["llama3", "qwen3-tied", "mixtral", "gpt-oss"])
def test_whole_models_where_a_device_multiplies_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with the CPU in its place: all layers and experts by products of fp8, but for a vocabulary of 97."""
    model, seen = decoder(name), []
    ids = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        by_numbers = model.logits(model(ids))

    def reference(x: Tensor, codes_OI: Tensor, scales_O1: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(codes_OI.shape)
        return fp8.reference(x, codes_OI, scales_O1, bias)

    product = fp8.product
    monkeypatch.setattr(fp8, "multiplies", lambda device: True)
    with torch.inference_mode():
        ours = model.logits(model(ids))
        monkeypatch.setattr(fp8, "product", reference)
        expected = model.logits(model(ids))
    # Sums in bfloat16, which loud weights make visible.
    assert torch.cosine_similarity(ours, expected, dim=-1).median() > 0.98
    assert torch.cosine_similarity(expected, by_numbers, dim=-1).median() > 0.9
    assert not torch.equal(expected, by_numbers)
    layers = [each for each in model.modules() if isinstance(each, QuantizedLinear) and each.out_features % 16 == 0]
    assert len(seen) >= len(layers) > 3
    assert all(outputs % 16 == 0 and columns % 16 == 0 for outputs, columns in seen)
    with monkeypatch.context() as training:  # gradients take the way of numbers
        training.setattr(fp8, "product", product)
        torch.testing.assert_close(model.logits(model(ids)), by_numbers, atol=1e-4, rtol=1e-4)


def test_a_tied_head_is_multiplied_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("qwen3-tied")
    table = quantize(normal(96, model.config.hidden_size), "fp8")
    model.embed_tokens = QuantizedEmbedding(table)  # type: ignore[assignment]
    hidden = normal(2, 3, model.config.hidden_size, seed=3)
    monkeypatch.setattr(fp8, "multiplies", lambda device: True)
    with torch.inference_mode():
        expected = fp8.reference(model.head_input(hidden), table.codes, table.scales)
        assert difference(model.logits(hidden), expected) < 0.1


def test_only_cuda_from_ada_on_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fp8.multiplies(torch.device("cpu"))
    for capability, expected in (((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert fp8.multiplies(torch.device("cuda")) == expected
