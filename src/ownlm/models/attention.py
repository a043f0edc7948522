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
SCORES = 2**26  # of plain attention at a time


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries [q0, q1) and the keys [k0, k1) outside of which none of them sees anything."""

    q0: int
    q1: int
    k0: int
    k1: int


@dataclass(frozen=True, slots=True)
class Visibility:
    """Which keys each query sees: built once per forward, shared by all layers of one window.

    `hidden_BTS` is True where a key must not be seen. Without it, the last T of the S keys are the queries' own: each sees
    itself and all before it, within `window`; where not `causal`, every key.
    """

    hidden_BTS: Tensor | None
    tiles: tuple[Tile, ...]
    causal: bool = True
    window: int | None = None

    def hidden(self, tile: Tile, before: int) -> Tensor | None:
        """(1 or B, 1, q, k) of a tile, None where all is seen; `before` keys stand before the first query's own."""
        if self.hidden_BTS is not None:
            return self.hidden_BTS[:, None, tile.q0 : tile.q1, tile.k0 : tile.k1]
        if not self.causal or (tile.q1 - tile.q0 == 1 and self.window is None):
            return None
        queries = torch.arange(before + tile.q0, before + tile.q1)[:, None]
        keys = torch.arange(tile.k0, tile.k1)
        hidden = keys > queries
        if self.window is not None:
            hidden |= keys <= queries - self.window
        return hidden[None, None]

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """The whole (1 or B, 1, T, S), True where hidden; None where all is seen."""
        hidden = self.hidden(Tile(0, queries, 0, keys), keys - queries)
        return None if hidden is None else hidden.to(device)


def causal(queries: int, keys: int, window: int | None = None) -> Visibility:
    """The plain triangle, aligned at its end: query i of T sees keys 0 ... S - T + i, the last `window` of them."""
    before = keys - queries
    window = None if window is None or window >= keys else window
    tiles = []
    for q0 in range(0, queries, TILE):
        q1 = min(q0 + TILE, queries)
        first = 0 if window is None else max(0, before + q0 - window + 1)
        tiles.append(Tile(q0, q1, first, before + q1))
    return Visibility(None, tuple(tiles), window=window)


def everything(queries: int, keys: int) -> Visibility:
    """Every query sees every key."""
    tiles = tuple(Tile(q0, min(q0 + TILE, queries), 0, keys) for q0 in range(0, queries, TILE))
    return Visibility(None, tiles, causal=False)


def among(
    width: int,
    *,
    both_ways: bool = False,
    window: int | None = None,
    padding_BT: Tensor | None = None,
    documents_BT: Tensor | None = None,
) -> Visibility:
    """What the tokens of a row see of each other: all, or with `both_ways` False those before them, the last `window` places of
    the row; nothing of padding, and nothing of tokens with another document's number."""
    given = documents_BT if padding_BT is None else padding_BT
    if given is None:
        return everything(width, width) if both_ways else causal(width, width, window)
    place_T = torch.arange(width, device=given.device)
    own_T1 = place_T[:, None]
    hidden = (
        torch.zeros(1, width, width, dtype=torch.bool, device=given.device) if both_ways else (place_T > own_T1)[None]
    )
    if window is not None:
        hidden = hidden | (place_T <= own_T1 - window)
    if documents_BT is not None:
        hidden = hidden | (documents_BT[:, None, :] != documents_BT[:, :, None])
    if padding_BT is not None:
        # Padding still sees itself, so that its softmax has something to sum over.
        hidden = hidden | (padding_BT[:, None, :] & (place_T != own_T1))
    return masked(hidden)


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


def attend(
    q_BHTd: Tensor,
    k_BKSd: Tensor,
    v_BKSd: Tensor,
    visibility: Visibility,
    scale: float,
    *,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    bias_BHTS: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q kᵀ) v over the visible keys, as y_BTHd; heads h*G ... h*G+G-1 share key/value head h.

    `softcap`, `sinks_H` (arXiv:2508.10925, 2.2) and an additive `bias_BHTS` (B may be 1) take the plain path.
    """
    if softcap is not None or sinks_H is not None or bias_BHTS is not None:
        return plain_attention(q_BHTd, k_BKSd, v_BKSd, visibility, scale, softcap, sinks_H, bias_BHTS)
    if q_BHTd.device.type == "cpu":
        if torch.is_grad_enabled():
            y_BTHd: Tensor = TiledAttention.apply(q_BHTd, k_BKSd, v_BKSd, visibility, scale)  # type: ignore[no-untyped-call]
            return y_BTHd
        return _forward(q_BHTd, k_BKSd, v_BKSd, visibility, scale)[0]
    return fused_attention(q_BHTd, k_BKSd, v_BKSd, visibility, scale)


def fused_attention(q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, visibility: Visibility, scale: float) -> Tensor:
    """`attend` by PyTorch's own kernels."""
    B, H, queries, d = q_BHTd.shape
    K, keys = k_BKSd.shape[1:3]
    triangle = visibility.hidden_BTS is None and visibility.causal and visibility.window is None and queries == keys
    hidden = None if triangle else visibility.mask(queries, keys, q_BHTd.device)
    if queries == 1:
        # The query heads of a key/value head become its queries: the kernels that take a mask know nothing of shared heads.
        q_BHTd = q_BHTd.reshape(B, K, H // K, d)
    elif hidden is not None and H > K:
        # So here each head has its own copy; else PyTorch would form all scores at once.
        k_BKSd, v_BKSd = (x.repeat_interleave(H // K, 1) for x in (k_BKSd, v_BKSd))
    y_BHTd = F.scaled_dot_product_attention(
        q_BHTd,
        k_BKSd,
        v_BKSd,
        attn_mask=None if hidden is None else ~hidden,
        is_causal=triangle and queries > 1,
        scale=scale,
        enable_gqa=q_BHTd.shape[1] > k_BKSd.shape[1],
    )
    return y_BHTd.reshape(B, H, queries, d).transpose(1, 2)


def plain_attention(
    q_BHTd: Tensor,
    k_BKSd: Tensor,
    v_BKSd: Tensor,
    visibility: Visibility,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
    bias_BHTS: Tensor | None,
) -> Tensor:
    """`attend` written down as it is defined; of very many scores, some queries at a time."""
    B, H, T, d = q_BHTd.shape
    K, S = k_BKSd.shape[1:3]
    parts = []
    for q0 in range(0, T, block := max(1, SCORES // (B * H * S))):
        rows = slice(q0, min(q0 + block, T))
        scores_BHTS = (q_BHTd[:, :, rows].reshape(B, K, -1, d) @ k_BKSd.mT).view(B, H, -1, S) * scale
        if softcap is not None:
            scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
        if bias_BHTS is not None:
            scores_BHTS = scores_BHTS + bias_BHTS[:, :, rows]
        if (hidden := visibility.hidden(Tile(rows.start, rows.stop, 0, S), S - T)) is not None:
            scores_BHTS = scores_BHTS.masked_fill(hidden.to(scores_BHTS.device), float("-inf"))
        if sinks_H is not None:
            sinks = sinks_H.to(scores_BHTS.dtype).view(1, H, 1, 1).expand(*scores_BHTS.shape[:3], 1)
            p_BHTS = torch.cat([scores_BHTS, sinks], -1).softmax(-1)[..., :S]
        else:
            p_BHTS = scores_BHTS.softmax(-1)
        parts.append((p_BHTS.reshape(B, K, -1, S) @ v_BKSd).view(B, H, -1, d).transpose(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


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
        if (hidden := visibility.hidden(tile, S - T)) is not None:
            # Of a plain triangle, only the last block has anything to hide.
            plain = visibility.hidden_BTS is None and visibility.window is None
            part = slice(-width, None) if plain else slice(None)
            scores_BHTS[..., part].masked_fill_(hidden[..., part], float("-inf"))
        p = scores.softmax(-1)
        y_BTHd[:, rows] = torch.bmm(p, v[:, keys]).view(B, H, width, d).transpose(1, 2)
        probabilities.append(p)
    return y_BTHd, probabilities
