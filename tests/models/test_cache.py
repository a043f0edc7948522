"""The cache changes nothing but the time: cached == uncached, together == one by one, packed == apart."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import CONFIGS, difference
from torch import Tensor

from ownlm.models.cache import KVCache
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf

FAMILIES = ["gpt2", "llama3", "qwen3", "mistral", "gpt-neo", "gemma3", "phi2", "mixtral", "gpt-oss"]
BAR = 1e-5


def loud_decoder(name: str) -> Decoder:
    model = Decoder(from_hf({"tie_word_embeddings": name == "gpt2", **CONFIGS[name]})[0])
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and key.endswith("weight")
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + norm)
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: Any) -> Decoder:
    return loud_decoder(request.param)


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(rows * 1000 + length))


@torch.inference_mode()
def alone(model: Decoder, ids: Tensor) -> Tensor:
    return model.logits(model(ids[None]))[0]


@torch.inference_mode()
def test_prefill_then_decode(model: Decoder) -> None:
    ids = tokens(2, 150)
    expected = model.logits(model(ids))
    cache = KVCache(model.config, slots=2, max_tokens=150)
    found = [model(ids[:, :140], place=cache.address(torch.arange(140).expand(2, 140)))]
    for at in range(140, 150):
        found.append(model(ids[:, at : at + 1], place=cache.address(torch.full((2, 1), at))))
    assert difference(model.logits(torch.cat(found, 1)), expected) <= BAR


@torch.inference_mode()
def test_one_row_decodes(model: Decoder) -> None:
    ids = tokens(1, 20)
    expected = model.logits(model(ids))
    cache = KVCache(model.config, slots=1, max_tokens=20)
    found = [model(ids[:, at : at + 1], place=cache.address(torch.tensor([[at]]))) for at in range(20)]
    assert difference(model.logits(torch.cat(found, 1)), expected) <= BAR


@torch.inference_mode()
def test_chunked_prefill_beyond_a_tile(model: Decoder) -> None:
    ids = tokens(1, 200)
    expected = model.logits(model(ids))
    cache = KVCache(model.config, slots=1, max_tokens=200)
    chunks = [
        model(ids[:, a:b], place=cache.address(torch.arange(a, b)[None])) for a, b in ((0, 7), (7, 150), (150, 200))
    ]
    assert difference(model.logits(torch.cat(chunks, 1)), expected) <= BAR


SCHEDULE = st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=6)


@settings(max_examples=15, deadline=None)
@given(schedule=SCHEDULE, order=st.permutations(range(5)))
def test_any_schedule_equals_one_by_one(schedule: list[list[int]], order: list[int]) -> None:
    """Rows of different lengths advance by 0-5 tokens a call, in slots of any order, the rest padded with -1."""
    model = loud_decoder("qwen3")
    slots = torch.tensor(order[:3])
    totals = [sum(call[row] for call in schedule) for row in range(3)]
    ids = tokens(3, max(1, *totals))
    # Old garbage in the slots must not matter.
    cache = KVCache(model.config, slots=5, max_tokens=40)
    cache.keys_LNKSd.normal_(std=100)
    cache.values_LNKSd.normal_(std=100)
    found: list[list[Tensor]] = [[], [], []]
    done = [0, 0, 0]
    with torch.inference_mode():
        for call in schedule:
            width = max(1, *call)
            batch = torch.zeros(3, width, dtype=torch.long)
            positions = torch.full((3, width), -1)
            for row, count in enumerate(call):
                batch[row, :count] = ids[row, done[row] : done[row] + count]
                positions[row, :count] = torch.arange(done[row], done[row] + count)
            logits = model.logits(model(batch, place=cache.address(positions, slots)))
            assert logits.isfinite().all()
            for row, count in enumerate(call):
                found[row].append(logits[row, :count])
                done[row] += count
        for row in range(3):
            if totals[row]:
                expected = alone(model, ids[row, : totals[row]])
                assert difference(torch.cat(found[row]), expected) <= BAR


@torch.inference_mode()
def test_padding_is_not_kept(model: Decoder) -> None:
    cache = KVCache(model.config, slots=1, max_tokens=8)
    model(tokens(1, 4), place=cache.address(torch.tensor([[0, 1, -1, -1]])))
    assert cache.keys_LNKSd[:, 0, :, :2].abs().min() > 0
    assert not cache.keys_LNKSd[:, 0, :, 2:8].any()


def test_a_full_cache_is_noticed(model: Decoder) -> None:
    cache = KVCache(model.config, slots=1, max_tokens=8)
    with torch.inference_mode(), pytest.raises(AssertionError, match="position 8 in a cache of 8"):
        model(tokens(1, 9), place=cache.address(torch.arange(9)[None]))


def test_cache_memory(model: Decoder) -> None:
    cache = KVCache(model.config, slots=3, max_tokens=7, dtype=torch.bfloat16)
    assert cache.memory_bytes == 2 * 2 * model.config.num_layers * 3 * 8 * math.prod(model.config.kv_shape)


@pytest.mark.parametrize("training", [False, True])
def test_packed_equals_apart(model: Decoder, training: bool) -> None:
    """Documents packed into one row, some crossing a tile of attention, give the logits they have alone."""
    lengths = [[90, 60, 1, 49], [200]]
    ids = tokens(2, 200)
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.set_grad_enabled(training):
        packed = model.logits(model(ids, positions_BT=positions, documents_BT=documents)).detach()
    for row, parts in enumerate(lengths):
        apart = torch.cat([alone(model, part) for part in ids[row].split(parts)])
        assert difference(packed[row], apart) <= BAR


def test_packed_gradients_equal_apart() -> None:
    model = loud_decoder("qwen3")
    ids = tokens(1, 180)
    documents = (torch.arange(180) >= 50).long()[None]
    positions = torch.cat([torch.arange(50), torch.arange(130)])[None]
    model(ids, positions_BT=positions, documents_BT=documents).square().sum().backward()
    packed = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    for part in (ids[:, :50], ids[:, 50:]):
        model(part).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert difference(packed[name], parameter.grad) <= BAR, name


def test_bf16_weights_throughout() -> None:
    """All weights in bf16: nothing is promoted on the way, gradients are bf16, the loss stays near fp32's."""
    model = loud_decoder("qwen3")
    ids = tokens(2, 150)
    with torch.no_grad():
        expected = model(ids)
    model = model.to(torch.bfloat16)
    hidden = model(ids)
    hidden.float().square().mean().backward()
    assert hidden.dtype == torch.bfloat16
    assert {p.grad.dtype for n, p in model.named_parameters() if not n.startswith("lm_head")} == {torch.bfloat16}
    assert torch.nn.functional.cosine_similarity(hidden.float().flatten(), expected.flatten(), dim=0) > 0.99
