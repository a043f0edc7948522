"""Products of single layers on the kernels: against PyTorch with activations rounded as the kernels round them, on every instruction
set; and in whole encoders and encoder-decoders."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoder_references import save_encoder
from seq2seq import save
from torch import Tensor

from ownlm.artifact import Workspace
from ownlm.checkpoints.weights import load_model, save_codes
from ownlm.generate.checkpoint import open_checkpoint
from ownlm.kernels import library
from ownlm.kernels.linear import Product, accelerate, teams
from ownlm.models.blocks import ACTIVATIONS, MLP, gated
from ownlm.models.specs import Activation, FeedForward
from ownlm.quantization.calibrate import quantize_rest
from ownlm.quantization.codes import GROUP, Codes, QuantizedLinear, Scheme, quantize, quantize_linears

pytestmark = pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.missing()}")


def rounded(x: Tensor) -> Tensor:
    """Activations in int8, one scale for each 32: what the kernels multiply."""
    groups = F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    units = (groups * torch.where(scale == 0, 0.0, 1 / scale)).round()
    return (units * scale).flatten(-2)[..., : x.shape[-1]]


def layer(inputs: int, outputs: int, scheme: Scheme) -> tuple[Codes, Tensor]:
    generator = torch.Generator().manual_seed(inputs * outputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    return quantize(weight, scheme), torch.randn(outputs, generator=generator)


@pytest.mark.parametrize("instruction_set", library.instruction_sets())
@pytest.mark.parametrize("scheme", ["int8", "int4", "uint4", "fp8"])
@pytest.mark.parametrize(("inputs", "outputs", "rows"), [(32, 16, 1), (96, 40, 7), (50, 5, 9), (384, 130, 33)])
def test_the_products_of_pytorch(inputs: int, outputs: int, rows: int, scheme: Scheme, instruction_set: str) -> None:
    kept, bias = layer(inputs, outputs, scheme)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)) * 3
    x[-1] = 0
    product = Product(kept, bias, instruction_set=instruction_set)
    expected = F.linear(x.bfloat16().float() if scheme == "fp8" else rounded(x), kept.tensor(), bias)
    torch.testing.assert_close(product(x), expected, atol=2e-3, rtol=1e-4)
    exact = F.linear(x, kept.tensor(), bias)
    assert (product(x) - exact).norm() < 0.01 * exact.norm()
    assert product(x[None].bfloat16()).dtype == torch.bfloat16
    assert product(x[:0]).shape == (0, outputs)
    # What stands beside a row changes nothing in it.
    assert torch.equal(product(x)[:1], product(x[:1]))


@pytest.mark.parametrize("instruction_set", library.instruction_sets())
def test_every_code_of_fp8(instruction_set: str) -> None:
    """Each of the 256 by itself in a row, in every column of a group, met by a one: exact, and NaN wherever a row holds it."""
    codes = torch.arange(256, dtype=torch.uint8)
    scales = torch.rand(256, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    for column in range(GROUP):
        held = torch.zeros(256, GROUP, dtype=torch.uint8)
        held[:, column] = codes
        kept = Codes("fp8", held.view(torch.float8_e4m3fn), scales, GROUP)
        expected = kept.tensor()[:, column]
        ours = Product(kept, instruction_set=instruction_set)(torch.eye(GROUP)).T
        torch.testing.assert_close(ours[:, column], expected, rtol=0, atol=0, equal_nan=True)
        assert ours[expected.isnan()].isnan().all()
        others = torch.arange(GROUP) != column
        assert ours[~expected.isnan()][:, others].eq(0).all()


def test_training_and_copies_leave_the_kernels_out() -> None:
    model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(64, 64)]))
    kept, bias = layer(64, 64, "int8")
    model[0][0] = QuantizedLinear(kept, bias)
    assert accelerate(model)
    quantised = model[0][0]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    quantised(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, kept.tensor().sum(0).expand(3, -1))
    with torch.no_grad():
        assert torch.equal(quantised(x), quantised.product(x))  # type: ignore[misc]
        assert torch.equal(copy.deepcopy(quantised)(x), quantised(x))
        assert not torch.equal(F.linear(x, kept.tensor(), bias), quantised(x))


@pytest.mark.parametrize("instruction_set", library.instruction_sets())
@pytest.mark.parametrize("size", [48, 130])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("is_gated", [False, True])
def test_a_whole_feed_forward(
    is_gated: bool, activation: Activation, size: int, instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "instruction_set", lambda: instruction_set)
    spec = FeedForward(size=size, activation=activation, gated=is_gated, bias=True, limit=1.5 if is_gated else None)
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": MLP(50, spec)})])
    whole = torch.nn.ModuleDict({"layers": model})
    quantize_linears(whole, "int8")
    mlp = model[0]["mlp"]
    x = torch.randn(3, 11, 50)
    plain = {name: layer.kept.tensor() for name, layer in mlp.named_children()}
    inputs = rounded(x)
    up = F.linear(inputs, plain["up_proj"], mlp.up_proj.bias)
    gate = F.linear(inputs, plain["gate_proj"], mlp.gate_proj.bias) if is_gated else up
    inner = gated(gate, up, spec) if is_gated else ACTIVATIONS[activation](up)
    expected = F.linear(rounded(inner), plain["down_proj"], mlp.down_proj.bias)
    accelerate(whole)
    with torch.no_grad():
        ours = mlp(x)
        # A rounding that falls on the other side moves an answer by a 127th of a weight's share.
        torch.testing.assert_close(ours, expected, atol=0.02, rtol=0.01)
        assert (ours - expected).norm() < 2e-3 * expected.norm()
        assert torch.equal(mlp(x[1:2]), ours[1:2])
        # Another layer in its place is heard.
        mlp.down_proj = torch.nn.Linear(size, 50)
        torch.testing.assert_close(mlp(x), mlp.down_proj(inner), atol=0.02, rtol=0.01)


def test_levels_of_nf4_are_left_to_pytorch() -> None:
    model = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(32, 32)])])
    model = torch.nn.ModuleDict({"layers": model})
    quantize_linears(model, "nf4")
    (quantised,) = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    assert accelerate(model)
    assert quantised.product is None


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=-1).mean())


IDS = torch.randint(4, 97, (2, 20), generator=torch.Generator().manual_seed(1))


def outputs(model: Any, kind: str) -> Tensor:
    with torch.inference_mode():
        if kind in ("t5-1.0", "mt5"):
            return model.logits(model(IDS, IDS))
        hidden = model(IDS)
        return model.logits(hidden) if model.task == "masked_lm" else hidden


@pytest.mark.parametrize("to", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "t5-1.0", "mt5"])
def test_whole_models(kind: str, to: Scheme, tmp_path: Path) -> None:
    """A quantised directory of an encoder or an encoder-decoder: written, opened as codes on the kernels, or as numbers."""
    if kind in ("t5-1.0", "mt5"):
        save(kind, tmp_path / "whole")
    else:
        save_encoder(kind, "ForMaskedLM", tmp_path / "whole")
    whole, made = load_model(tmp_path / "whole"), load_model(tmp_path / "whole")
    quantize_rest(made, to)
    save_codes(made, tmp_path / "codes")
    numbers = load_model(tmp_path / "codes")
    torch.testing.assert_close(outputs(numbers, kind), outputs(made, kind), atol=1e-3, rtol=1e-3)
    threads = torch.get_num_threads()
    native = open_checkpoint(tmp_path / "codes", workspace=Workspace(tmp_path), for_kernels=True).module
    layers = [module for module in native.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) > 8
    assert all(each.product is not None for each in layers)
    ours = outputs(native, kind)
    assert torch.get_num_threads() == threads
    assert cosine(ours, outputs(numbers, kind)) > 0.995
    assert not torch.equal(ours, outputs(numbers, kind))
    if to == "int8":  # few bits of loud random weights say nothing of trained ones
        assert cosine(ours, outputs(whole, kind)) > 0.98
    assert open_checkpoint(tmp_path / "codes", workspace=Workspace(tmp_path)).module.embed_tokens.weight.requires_grad


def test_the_cores_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, expected in ((1, (1, 1)), (2, (1, 2)), (4, (2, 3)), (16, (8, 9))):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        monkeypatch.setattr("ownlm.device.threads", lambda count: count)
        assert teams() == expected
