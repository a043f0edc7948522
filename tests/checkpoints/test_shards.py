"""Shards add up: the logits of two or four of them, opened from a checkpoint's files, are those of the whole model."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from references import CONFIGS, difference
from test_cache import tokens
from torch import Tensor

from ownlm.checkpoints.shards import Shard, join
from ownlm.checkpoints.weights import load_model, save_model
from ownlm.errors import UserError
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf

FAMILIES = ["llama3", "gemma3", "mixtral", "gpt2", "gpt-oss", "gpt-neox", "phi2", "phi3", "qwen3-moe", "llama-biased"]


class Threads:
    """The group of shards that run in threads of this process."""

    def __init__(self, size: int) -> None:
        self.barrier, self.given = threading.Barrier(size, timeout=30), dict[int, Tensor]()

    def of(self, rank: int) -> "Member":
        return Member(self, rank)


class Member:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank = threads, rank

    def all(self, x: Tensor) -> list[Tensor]:
        self.threads.given[self.rank] = x
        self.threads.barrier.wait()
        found = [self.threads.given[rank] for rank in range(self.threads.barrier.parties)]
        self.threads.barrier.wait()
        return found

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.all(x)).sum(0)

    def beside(self, x: Tensor) -> Tensor:
        return torch.cat(self.all(x), -1)


def whole_model(name: str, path: Path) -> Decoder:
    """A model with loud weights, saved under the family's own names."""
    hf = {"tie_word_embeddings": name in ("gpt2", "gemma3"), **CONFIGS[name]}
    model = Decoder(from_hf(hf)[0], hf)
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and key.endswith("norm.weight")
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + norm)
    save_model(model, path)
    return model.eval()


def together(size: int, run: Callable[[int, Member], Any]) -> list[Any]:
    """What `run` gives on each rank."""
    threads, results = Threads(size), dict[int, Any]()

    def one(rank: int) -> None:
        with torch.inference_mode():
            results[rank] = run(rank, threads.of(rank))

    each = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in each:
        thread.start()
    for thread in each:
        thread.join(60)
    return [results[rank] for rank in range(size)]


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 2) for name in FAMILIES), *((name, 4) for name in FAMILIES if name != "gpt-neox")]
)
def test_logits_of_shards_are_those_of_the_whole(name: str, size: int, tmp_path: Path) -> None:
    """97 tokens of a vocabulary and, by four, 2 key/value heads: neither can be divided."""
    model, ids = whole_model(name, tmp_path), tokens(2, 50)
    counts = []

    def run(rank: int, member: Member) -> Tensor:
        shard = Shard(rank=rank, size=size)
        part = load_model(tmp_path, dtype=torch.float32, shard=shard)
        counts.append(sum(parameter.numel() for parameter in part.parameters()))
        assert part.config.vocab_size == 97
        join(part, shard, member)
        return part.logits(part(ids))

    with torch.inference_mode():
        expected = model.logits(model(ids))
    for found in together(size, run):
        assert difference(found, expected) <= 1e-5
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert max(counts) < 0.75 * whole  # norms and places are on every rank, and key/value heads may be on several


def test_what_cannot_be_divided_is_one_error_with_all_reasons(tmp_path: Path) -> None:
    whole_model("llama3", tmp_path)
    with pytest.raises(UserError, match="its 4 heads and its feed-forward of width 48 can't be divided among 5 proc"):
        load_model(tmp_path, shard=Shard(rank=0, size=5))
    with pytest.raises(UserError, match="its 4 heads can't be divided among 3 processes"):
        load_model(tmp_path, shard=Shard(rank=0, size=3))


def test_a_damaged_checkpoint_is_told_as_without_shards(tmp_path: Path) -> None:
    whole_model("llama3", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match="safetensors"):
        load_model(tmp_path, shard=Shard(rank=1, size=2))
