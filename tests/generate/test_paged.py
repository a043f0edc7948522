"""Pages change nothing but where keys and values lie: paged == uncached, whatever pages, pieces and padding there are."""

from typing import Any

import pytest
import torch
from references import difference
from test_cache import BAR, FAMILIES, alone, loud_decoder, tokens
from torch import Tensor

from ownlm.generate import paged
from ownlm.generate.paged import PagedCache, position_bytes
from ownlm.models import attention
from ownlm.models.attention import causal, fused_attention, masked, plain_attention
from ownlm.models.decoder import Decoder


@pytest.fixture(scope="module", params=[*FAMILIES, "gemma2", "phi3-longrope"])
def model(request: Any) -> Decoder:
    return loud_decoder(request.param)


def garbage(model: Decoder, *, pages: int, page: int) -> PagedCache:
    """A cache that another sequence has written all over."""
    cache = PagedCache(model.config, pages=pages, page=page)
    cache.both_L2NKsd.normal_(std=100)
    return cache


@torch.inference_mode()
@pytest.mark.parametrize("page", [1, 8, 32])
def test_rows_of_different_lengths_in_scattered_pages(model: Decoder, page: int) -> None:
    """Three rows read 37, 60 and 5 tokens in three calls of unequal widths, and then write one token each."""
    lengths = [37, 60, 5]
    cache = garbage(model, pages=3 * 64, page=page)
    table = torch.randperm(3 * 64, generator=torch.Generator().manual_seed(1)).view(3, 64)
    ids = tokens(3, 61)
    found: list[list[Tensor]] = [[], [], []]
    done = [0, 0, 0]
    for call in ([30, 10, 5], [7, 50, 0], [1, 1, 1]):
        width = max(call)
        positions = torch.full((3, width), -1)
        batch = torch.zeros(3, width, dtype=torch.long)
        for row, count in enumerate(call):
            positions[row, :count] = torch.arange(done[row], done[row] + count)
            batch[row, :count] = ids[row, done[row] : done[row] + count]
            done[row] += count
        address = cache.address(positions, table[:, : -(-64 // page)], lengths=done, long=False)
        hidden = model(batch, place=address)
        for row, count in enumerate(call):
            found[row].append(model.logits(hidden[row, :count]))
    for row, length in enumerate(lengths):
        assert difference(torch.cat(found[row]), alone(model, ids[row, : length + 1])) <= BAR


@torch.inference_mode()
def test_neighbouring_rows_of_one_page_are_read_where_they_lie(model: Decoder) -> None:
    cache = garbage(model, pages=4, page=64)
    ids, positions = tokens(2, 50), torch.arange(50).expand(2, 50)
    pages = torch.tensor([[1], [2]])
    address = cache.address(positions, pages, lengths=[50, 50], first=1, long=False)
    assert difference(model.logits(model(ids, place=address)), model.logits(model(ids))) <= BAR
    assert cache.gathered.numel() == 0


@torch.inference_mode()
def test_what_is_gathered_at_a_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loud_decoder("qwen3")
    bytes_ = 8 * position_bytes(model.config, torch.float32)
    monkeypatch.setattr(paged, "PIECE_BYTES", 5 * bytes_ // model.config.num_layers)
    cache = garbage(model, pages=40, page=8)
    assert cache.piece_pages == 5
    ids, positions = tokens(4, 20), torch.arange(20).expand(4, 20)
    address = cache.address(positions, torch.arange(40).view(4, 10), lengths=[20] * 4)
    assert [piece.rows for piece in address.pieces] == [slice(n, n + 1) for n in range(4)]
    assert difference(model.logits(model(ids, place=address)), model.logits(model(ids))) <= BAR
    assert cache.gathered.numel() == 2 * 3 * 8 * model.config.kv_shape[0] * model.config.kv_shape[1]


def test_layers_with_a_window_read_the_pages_it_touches() -> None:
    """24 positions touch four pages of 8, wherever they begin; without a window all 25 are read."""
    model = loud_decoder("gemma3")
    assert model.windows == {24, None}
    cache = PagedCache(model.config, pages=60, page=8)
    table = torch.arange(50).view(2, 25)
    for lengths, positions in (([200, 31], [[199], [30]]), (None, [[199], [-1]]), ([199, 8], [[198], [7]])):
        [piece] = cache.address(torch.tensor(positions), table, lengths=lengths).pieces
        assert piece.reading(cache, None).index_2BKP.shape[-1] == 25
        index_P = piece.reading(cache, 24).index_2BKP[0, 0, 0] // cache.kv_heads
        assert index_P.tolist() == ([21, 22, 23, 24] if positions[0] == [198] else [22, 23, 24, 24])


def test_memory_is_what_is_told() -> None:
    model = loud_decoder("gemma3")
    cache = PagedCache(model.config, pages=6, page=4, dtype=torch.bfloat16)
    assert cache.memory_bytes == 7 * 4 * position_bytes(model.config, torch.bfloat16)


@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (7, 7), (5, 40)])
@pytest.mark.parametrize("window", [None, 6])
def test_fused_attention_is_attention(queries: int, keys: int, window: int | None) -> None:
    """What other devices than a CPU run, against the definition: with a plain triangle, and with a mask of its own for each row."""
    q, k, v = (torch.randn(3, heads, n, 16) for heads, n in ((6, queries), (2, keys), (2, keys)))
    hidden = torch.rand(3, queries, keys) < 0.3
    hidden[:, :, 0] = False
    for visibility in (causal(queries, keys, window), masked(hidden)):
        expected = plain_attention(q, k, v, visibility, 0.3, None, None, None)
        torch.testing.assert_close(fused_attention(q, k, v, visibility, 0.3), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 6])
def test_many_scores_are_formed_some_queries_at_a_time(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, heads, n, 16) for heads, n in ((4, 23), (2, 40), (2, 40)))
    rest: Any = (0.3, 20.0, torch.randn(4), torch.randn(1, 4, 23, 40))
    hidden = torch.rand(2, 23, 40) < 0.3
    for visibility in (causal(23, 40, window), masked(hidden)):
        whole = plain_attention(q, k, v, visibility, *rest)
        monkeypatch.setattr(attention, "SCORES", 2 * 4 * 40 * 5)
        torch.testing.assert_close(plain_attention(q, k, v, visibility, *rest), whole, atol=1e-5, rtol=1e-5)
        monkeypatch.undo()
