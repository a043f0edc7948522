"""Causal attention: which keys a query may see, and the two ways to compute it.

Shapes: B batch, T queries, S keys, H heads, K key/value heads, G = H // K, d head width.

On a CPU the scores are formed tile by tile: 128 queries against just the keys that any of them may see. With matrices
this small, two batched GEMMs and a softmax beat PyTorch's flash kernel: forward and backward took a third to a half of
its time at T = 128-2048 in bf16 (2 cores, AVX512_BF16). Elsewhere PyTorch's own kernel runs.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 128  # queries; 64 and 256 were slower at most lengths


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries [q0, q1) and the keys [k0, k1) outside of which none of them sees anything."""

    q0: int
    q1: int
    k0: int
    k1: int


@dataclass(frozen=True, slots=True)
class Visibility:
    """Which keys each query sees: built once per forward, shared by all layers.

    `hidden_BTS` is True where a key must not be seen; None means that the last T of the S keys are the queries' own and
    each sees itself and all before it.
    """

    hidden_BTS: Tensor | None
    tiles: tuple[Tile, ...]


def causal(queries: int, keys: int) -> Visibility:
    """The plain triangle, aligned at its end: query i of T sees keys 0 ... S - T + i."""
    before = keys - queries
    tiles = tuple(
        Tile(q0, min(q0 + TILE, queries), 0, before + min(q0 + TILE, queries)) for q0 in range(0, queries, TILE)
    )
    return Visibility(None, tiles)


def masked(hidden_BTS: Tensor) -> Visibility:
    """Any mask that lets every query see a key. The tiles leave out keys hidden from all their queries."""
    if hidden_BTS.device.type != "cpu":
        return Visibility(hidden_BTS, ())
    queries, keys = hidden_BTS.shape[1:]
    if queries == 1:
        return Visibility(hidden_BTS, (Tile(0, 1, 0, keys),))
    tiles = []
    for q0 in range(0, queries, TILE):
        q1 = min(q0 + TILE, queries)
        seen = hidden_BTS[:, q0:q1].all(1).all(0).logical_not_().nonzero()
        tiles.append(Tile(q0, q1, int(seen[0]), int(seen[-1]) + 1))
    return Visibility(hidden_BTS, tuple(tiles))


def attend(q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, visibility: Visibility, scale: float) -> Tensor:
    """softmax(scale * q kᵀ) v over the visible keys, as y_BTHd; heads h*G ... h*G+G-1 share key/value head h."""
    if q_BHTd.device.type == "cpu":
        if torch.is_grad_enabled():
            y_BTHd: Tensor = TiledAttention.apply(q_BHTd, k_BKSd, v_BKSd, visibility, scale)  # type: ignore[no-untyped-call]
            return y_BTHd
        return _forward(q_BHTd, k_BKSd, v_BKSd, visibility, scale)[0]
    hidden = visibility.hidden_BTS
    y_BHTd = F.scaled_dot_product_attention(
        q_BHTd,
        k_BKSd,
        v_BKSd,
        attn_mask=None if hidden is None else ~hidden[:, None],
        is_causal=hidden is None and q_BHTd.shape[2] > 1,
        scale=scale,
        enable_gqa=True,
    )
    return y_BHTd.transpose(1, 2)


class TiledAttention(torch.autograd.Function):
    """`_forward` and its gradient. Only the probabilities are kept: memory grows with the number of visible pairs."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, visibility: Visibility, scale: float
    ) -> Tensor:
        y_BTHd, probabilities = _forward(q_BHTd, k_BKSd, v_BKSd, visibility, scale)
        ctx.save_for_backward(q_BHTd, k_BKSd, v_BKSd, *probabilities)
        ctx.visibility, ctx.scale = visibility, scale
        return y_BTHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHd: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BHTd, k_BKSd, v_BKSd, *probabilities = ctx.saved_tensors
        B, H, T, d = q_BHTd.shape
        K, S = k_BKSd.shape[1:3]
        k, v = k_BKSd.reshape(B * K, S, d), v_BKSd.reshape(B * K, S, d)
        dq_BHTd = torch.empty(B, H, T, d, dtype=q_BHTd.dtype)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for tile, p in zip(ctx.visibility.tiles, probabilities, strict=True):
            keys, rows = slice(tile.k0, tile.k1), slice(tile.q0, tile.q1)
            q = q_BHTd[:, :, rows].reshape(B * K, -1, d)
            dy = grad_BTHd[:, rows].transpose(1, 2).reshape(B * K, -1, d)
            dv[:, keys].baddbmm_(p.mT, dy)
            dp = torch.bmm(dy, v[:, keys].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq = torch.baddbmm(dp.new_empty(1), ds, k[:, keys], beta=0, alpha=ctx.scale)
            dq_BHTd[:, :, rows] = dq.view(B, H, -1, d)
            dk[:, keys].baddbmm_(ds.mT, q, alpha=ctx.scale)
        return dq_BHTd, dk.view_as(k_BKSd), dv.view_as(v_BKSd), None, None


def _forward(
    q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, visibility: Visibility, scale: float
) -> tuple[Tensor, list[Tensor]]:
    B, H, T, d = q_BHTd.shape
    K, S = k_BKSd.shape[1:3]
    # The G query heads of a key/value head are rows of one matrix: keys and values are never repeated.
    k, v = k_BKSd.reshape(B * K, S, d), v_BKSd.reshape(B * K, S, d)
    y_BTHd = torch.empty(B, T, H, d, dtype=q_BHTd.dtype)
    probabilities = []
    for tile in visibility.tiles:
        keys, rows, width = slice(tile.k0, tile.k1), slice(tile.q0, tile.q1), tile.q1 - tile.q0
        q = q_BHTd[:, :, rows].reshape(B * K, -1, d)
        scores = torch.baddbmm(q.new_empty(1), q, k[:, keys].mT, beta=0, alpha=scale)
        scores_BHTS = scores.view(B, H, width, -1)
        if visibility.hidden_BTS is not None:
            scores_BHTS.masked_fill_(visibility.hidden_BTS[:, None, rows, keys], float("-inf"))
        elif width > 1:
            future = torch.ones(width, width, dtype=torch.bool).triu_(1)
            scores_BHTS[..., -width:].masked_fill_(future, float("-inf"))
        p = scores.softmax(-1)
        y_BTHd[:, rows] = torch.bmm(p, v[:, keys]).view(B, H, width, d).transpose(1, 2)
        probabilities.append(p)
    return y_BTHd, probabilities
