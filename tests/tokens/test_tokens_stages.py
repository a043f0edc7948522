"""Tokenizer and shards as stages: from a documents artifact to memory-mapped ids."""

import json
from pathlib import Path

import numpy as np
import pytest

from ownlm.artifact import Artifact, Workspace
from ownlm.errors import UserError
from ownlm.records import Conversation, Document, Message, write_jsonl
from ownlm.report import Reporter
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.shards import TokensRecipe, memory_shard, open_shard, tokenize, write_shard
from ownlm.tokens.train import TokenizerRecipe, train_tokenizer

TEXTS = [f"Document {n} says: ünïcode and numbers {n * 7}.\nSecond line." for n in range(30)]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


@pytest.fixture
def documents(workspace: Workspace) -> Artifact:
    with workspace.create(
        "documents", "docs", inputs={}, recipe=TokensRecipe(name="x", documents="", tokenizer="")
    ) as draft:
        write_jsonl(draft.path / "train.jsonl", [Document(text=text, source="s") for text in TEXTS])
        write_jsonl(draft.path / "validation.jsonl", [Document(text=TEXTS[3], source="s")])
        write_jsonl(draft.path / "test.jsonl", [])
        talk = Conversation(
            messages=(Message(role="user", content="zebra? " * 9), Message(role="assistant", content="ok"))
        )
        write_jsonl(draft.path / "conversations.jsonl", [talk])
    return draft.done


def test_documents_become_shards(workspace: Workspace, documents: Artifact) -> None:
    recipe = TokenizerRecipe(name="tok", documents=documents.ref, vocab_size=330, special_tokens=("<|tool|>",))
    made = train_tokenizer(recipe, workspace, Reporter.silent())
    assert train_tokenizer(recipe, workspace, Reporter.silent()).ref == made.ref
    tokenizer = Tokenizer.load(made.path)
    assert tokenizer.vocab_size == made.facts["vocab_size"] <= 330
    assert "<|tool|>" in tokenizer.special
    assert len(tokenizer.encode("zebra?")) <= 2  # learned from the conversations
    assert 1 < made.facts["validation_bytes_per_token"] < 20
    tokens = tokenize(TokensRecipe(name="ids", documents="docs", tokenizer="tok"), workspace, Reporter.silent())
    shard = open_shard(tokens, "train")
    assert shard.ids.dtype == np.uint16
    assert len(shard) == len(TEXTS)
    assert [shard[n].tolist() for n in range(len(shard))] == [tokenizer.document(text) for text in TEXTS]
    assert shard.bytes == sum(len(text.encode()) for text in TEXTS)
    assert tokens.facts["splits"]["train"] == {"documents": 30, "tokens": len(shard.ids), "bytes": shard.bytes}
    with pytest.raises(UserError, match="no test tokens"):
        open_shard(tokens, "test")
    same = memory_shard(TEXTS, tokenizer)
    assert np.array_equal(same.ids, shard.ids)
    assert np.array_equal(same.starts, shard.starts)
    assert json.loads((made.path / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


def test_batches_of_documents_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ownlm.tokens import shards
    from ownlm.tokens.train import build

    tokenizer = build(TEXTS, kind="byte", vocab_size=259)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 100)
    write_shard(tmp_path / "wide", TEXTS, tokenizer, np.dtype(np.uint32), Reporter.silent())
    ids = np.fromfile(tmp_path / "wide.bin", dtype=np.uint32).tolist()
    assert ids == [id for text in TEXTS for id in tokenizer.document(text)]
