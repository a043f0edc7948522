"""Calibrated codes: against a plain numpy GPTQ, and against rounding by the error of the outputs."""

import numpy as np
import pytest
import torch
from references import CONFIGS, make_loud
from torch import Tensor, nn

from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from ownlm.quantization import fp8
from ownlm.quantization.calibrate import matrices, quantize_decoder
from ownlm.quantization.codes import (
    GROUP,
    LIMITS,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedStack,
    Scheme,
    as_half,
    count_weights,
    in_groups,
    quantize,
    rounded,
)
from ownlm.quantization.gptq import DAMPING, Moments, best_scales, gptq

SCHEMES: tuple[Scheme, ...] = ("int8", "int4")
SIZES = [2.0 ** (max(e, 1) - 7) * ((e > 0) + f / 8) for e in range(16) for f in range(8) if (e, f) != (15, 7)]
E4M3 = np.array([*(-size for size in reversed(SIZES)), *SIZES])
DECODERS = ["gpt2", "llama3", "qwen3-tied", "mixtral", "phi2", "gemma2", "gpt-oss"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(count: int, columns: int) -> Tensor:
    """Inputs as layers have them: some directions loud, most columns related."""
    return normal(count, columns) @ normal(columns, columns, seed=1) * torch.linspace(0.1, 2, columns)


def moments(x_NI: Tensor) -> Moments:
    found = Moments(x_NI.shape[1])
    for piece in x_NI.split(100):
        found.add(piece)
    return found


def numpy_gptq(w: np.ndarray, x: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Algorithm 1 of the paper one column at a time, each step solved anew: the best update of what is left, by its H alone."""
    h = x.T @ x / len(x)
    h += DAMPING * np.mean(np.diag(h)) * np.eye(len(h))
    w, out = w.copy(), np.empty_like(w)
    if scheme == "fp8":
        scales = fp8.best_scales(torch.tensor(w, dtype=torch.float32))[:, 0].double().numpy()
    diagonal = np.diag(np.linalg.cholesky(np.linalg.inv(h)))  # of U, for the choice of scales
    for i in range(w.shape[1]):
        if i % GROUP == 0 and scheme != "fp8":
            group = torch.tensor(w[:, i : i + GROUP], dtype=torch.float32)
            weights = torch.tensor(diagonal[i : i + GROUP] ** -2.0, dtype=torch.float32)
            scales = best_scales(group, weights, scheme).float().numpy().astype(np.float64)
        units = w[:, i] / scales
        if scheme == "fp8":
            out[:, i] = E4M3[np.abs(units[:, None] - E4M3).argmin(1)] * scales
        else:
            out[:, i] = np.clip(np.round(units), *LIMITS[scheme]) * scales
        left = np.linalg.inv(h[i:, i:])  # of the columns not yet rounded
        w[:, i:] -= np.outer((w[:, i] - out[:, i]) / left[0, 0], left[0])
    return out


@pytest.mark.parametrize("scheme", [*SCHEMES, "fp8"])
def test_it_is_the_algorithm_of_the_paper(scheme: Scheme) -> None:
    x, w = correlated(500, 64), normal(24, 64, seed=2)
    ours = gptq(w, moments(x).inverse_factor(), scheme).tensor()
    theirs = numpy_gptq(w.double().numpy(), x.double().numpy(), scheme)
    # A weight that lies between two values may go either way in float32, and takes others along.
    same = np.isclose(ours.numpy(), theirs, atol=1e-4).mean()
    assert same > 0.97, same


@pytest.mark.parametrize("columns", [96, 40])
@pytest.mark.parametrize("scheme", [*SCHEMES, "fp8"])
def test_outputs_are_closer_than_rounded_ones(scheme: Scheme, columns: int) -> None:
    x, w = correlated(500, columns), normal(48, columns, seed=2)
    fresh = correlated(500, columns) * normal(500, 1, seed=9)

    def error(weight: Tensor) -> float:
        return float(((w - weight) @ fresh.T).square().mean())

    calibrated = gptq(w, moments(x).inverse_factor(), scheme)
    assert calibrated.shape == w.shape
    share = 0.85 if scheme == "fp8" else 0.75  # large numbers, which have large errors, can take little back
    assert error(calibrated.tensor()) < share * error(quantize(w, scheme).tensor())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_scale_is_no_worse_than_that_of_the_largest_number(scheme: Scheme) -> None:
    x_RG, weights_G = normal(200, GROUP), normal(GROUP, seed=1).exp()

    def error(scales_R: Tensor) -> Tensor:
        return (x_RG - rounded(x_RG, scales_R, scheme) * scales_R[:, None]).square() @ weights_G

    largest = quantize(x_RG, scheme).scales[:, 0].float()
    searched = best_scales(x_RG, weights_G, scheme).float()
    assert (error(searched) <= error(largest) * (1 + 1e-5)).all()
    assert error(searched).sum() < (0.95 if scheme == "int4" else 1.0) * error(largest).sum()


def test_inputs_that_never_come_and_rows_of_nothing() -> None:
    silent = Moments(32)
    for scheme in (*SCHEMES, "fp8"):
        assert gptq(torch.zeros(3, 32), silent.inverse_factor(), scheme).tensor().eq(0).all()
        weight = normal(3, 32)
        back = gptq(weight, silent.inverse_factor(), scheme).tensor()
        assert (back - weight).abs().max() < {"int8": 0.02, "int4": 0.4, "fp8": 0.13}[scheme]
    x = torch.cat([correlated(100, 16), torch.zeros(100, 16)], 1)
    assert gptq(normal(3, 32), moments(x).inverse_factor(), "int4").tensor().isfinite().all()


def test_as_half_holds_what_it_is_given() -> None:
    assert as_half(torch.tensor([1e9, -1e9])).isfinite().all()
    assert in_groups(torch.ones(2, 5, 33)).shape == (2, 5, 2, GROUP)


def decoder(name: str) -> Decoder:
    config, family = from_hf(CONFIGS[name])
    model = family.build(config, CONFIGS[name])
    make_loud(model)
    assert isinstance(model, Decoder)
    return model.eval()


@torch.no_grad()
def distance(model: Decoder, other: Decoder, rows: Tensor) -> float:
    p, q = (one.logits(one(rows)).log_softmax(-1) for one in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", DECODERS)
def test_every_matrix_becomes_codes_and_calibration_helps(name: str) -> None:
    plain, by_nearest, by_text = (decoder(name) for _ in range(3))
    rows = torch.randint(plain.config.vocab_size, (24, 64), generator=torch.Generator().manual_seed(3))
    done: list[tuple[int, int]] = []
    quantize_decoder(by_nearest, "int4")
    quantize_decoder(by_text, "int4", rows[:20], lambda *step: done.append(step))
    layers = plain.config.num_layers
    assert done == [(n + 1, layers + 1) for n in range(layers + 1)]
    kinds = {type(by_text.get_submodule(each)) for each in matrices(by_text)}
    assert kinds <= {QuantizedLinear, QuantizedEmbedding, QuantizedStack}
    left = [each for each, module in by_text.named_modules() if isinstance(module, nn.Linear)]
    assert all(each.endswith("mlp.gate") for each in left), left
    assert count_weights(by_text) == sum(parameter.numel() for parameter in plain.parameters())
    assert distance(plain, by_text, rows[20:]) < distance(plain, by_nearest, rows[20:])


@pytest.mark.parametrize("to", ["int4", "fp8"])
@pytest.mark.parametrize("untied", [True, False])
def test_only_an_embedding_that_is_no_head_stays_in_int8(untied: bool, to: Scheme) -> None:
    model = decoder("llama" if untied else "qwen3-tied")
    quantize_decoder(model, to)
    assert isinstance(model.embed_tokens, QuantizedEmbedding)
    assert model.embed_tokens.scheme == ("int8" if untied else to)
