"""Codes chosen by what they do to a layer's outputs (GPTQ, arXiv:2210.17323), not one by one.

The error of a layer on calibration text is tr(E H E'), E = W - W' and H = X'X of its inputs. Column by column a weight is rounded and
what that adds to the outputs is taken back by the columns to come: with U'U = inverse(H), U upper triangular,

    e = (w_i - w'_i) / U_ii        w_j -= e U_ij  for j > i

The scale of a group is looked for when its turn comes, for the weights as they are by then: of several, the one with the smallest
sum of e², each refined once by the least squares for its own roundings. Rows in fp8 have one scale, known beforehand.

Shapes: O outputs, I inputs (whole groups), R rows, N inputs of calibration.
"""

import torch
from torch import Tensor

from ownlm.quantization import fp8
from ownlm.quantization.codes import GROUP, Codes, Scheme, as_half, in_groups, nearest, packed, rounded

DAMPING = 0.01  # of the mean of H's diagonal, added to it
# Where the number farthest from zero lands, in units of the scale: on both sides of zero, for -8 is there and 8 is not.
PEAKS: dict[Scheme, tuple[float, ...]] = {
    "int4": (-9.0, -8.5, -8.0, -7.5, -7.0, -6.5, -6.0, 8.5, 8.0, 7.5, 7.0, 6.5, 6.0),
    "int8": (127.0, 126.0, 124.0, 121.0),
}


class Moments:
    """H = X'X of a layer's inputs, gathered piece by piece."""

    def __init__(self, columns: int) -> None:
        self.sum = torch.zeros(columns, columns)
        self.count = 0

    def add(self, inputs: Tensor) -> None:
        x_NI = inputs.detach().flatten(0, -2).float()
        self.sum.addmm_(x_NI.T, x_NI)
        self.count += len(x_NI)

    def inverse_factor(self) -> Tensor:
        """U (I, I), padded to whole groups. An input that never came counts as one that is small."""
        whole = len(self.sum) + -len(self.sum) % GROUP
        h_II = torch.eye(whole, dtype=torch.float64)
        h_II[: len(self.sum), : len(self.sum)] = self.sum / max(1, self.count)
        mean = self.sum.diagonal().mean().double().item() / max(1, self.count) or 1.0
        h_II[len(self.sum) :] *= mean
        h_II.diagonal().add_(DAMPING * mean)
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(h_II))
        factor_II: Tensor = torch.linalg.cholesky(inverse_II, upper=True)
        return factor_II.float()


def best_scales(x_RG: Tensor, weights_G: Tensor, scheme: Scheme) -> Tensor:
    """(R,) float16: of the scales tried, the one with the smallest weighted squared error of each row."""
    peak_R = x_RG.gather(1, x_RG.abs().argmax(1, keepdim=True))[:, 0]
    if scheme == "int8":
        peak_R = peak_R.abs()
    best_R, error_R = torch.zeros_like(peak_R).half(), torch.full_like(peak_R, torch.inf)
    for peak in PEAKS[scheme]:
        scale_R = as_half(peak_R / peak)
        for refined in (False, True):
            q_RG = rounded(x_RG, scale_R.float(), scheme)
            if refined:
                qq_R = (q_RG.square() @ weights_G).clamp(min=torch.finfo(torch.float32).tiny)
                scale_R = as_half((x_RG * q_RG) @ weights_G / qq_R)
                q_RG = rounded(x_RG, scale_R.float(), scheme)
            found_R = (x_RG - q_RG * scale_R.float()[:, None]).square() @ weights_G
            better_R = found_R < error_R
            best_R, error_R = torch.where(better_R, scale_R, best_R), torch.where(better_R, found_R, error_R)
    return best_R


def gptq(weight_OI: Tensor, factor_II: Tensor, scheme: Scheme) -> Codes:
    """The codes of a weight for inputs whose U this is."""
    w_OI = in_groups(weight_OI).flatten(1)
    assert factor_II.shape == (w_OI.shape[1],) * 2, factor_II.shape
    q_OGg, scales_GO = torch.empty_like(w_OI).view(len(w_OI), -1, GROUP), []
    row_O = fp8.best_scales(w_OI)[:, 0] if scheme == "fp8" else None
    for group, first in enumerate(range(0, w_OI.shape[1], GROUP)):
        end = first + GROUP
        u_gg = factor_II[first:end, first:end]
        x_Og = w_OI[:, first:end]
        if row_O is None:
            scales_GO.append(best_scales(x_Og, u_gg.diagonal().square().reciprocal(), scheme))
        scale_O = scales_GO[-1].float() if row_O is None else row_O
        inverse_O = torch.where(scale_O == 0, 0.0, 1.0 / scale_O)
        errors_Og = torch.empty_like(x_Og)
        for i in range(GROUP):
            q_O = nearest(x_Og[:, i] * inverse_O, scheme)
            q_OGg[:, group, i] = q_O
            errors_Og[:, i] = (x_Og[:, i] - q_O * scale_O) / u_gg[i, i]
            x_Og[:, i + 1 :].addr_(errors_Og[:, i], u_gg[i, i + 1 :], alpha=-1)
        w_OI[:, end:].addmm_(errors_Og, factor_II[first:end, end:], alpha=-1)
    scales_OG = torch.stack(scales_GO, 1) if row_O is None else row_O[:, None]
    return packed(q_OGg, scales_OG, scheme, weight_OI.shape[1])
