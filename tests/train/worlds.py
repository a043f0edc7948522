"""A tiny documents and tokenizer artifact, shared by the tests of training."""

from pathlib import Path
from typing import Any

from ownlm.artifact import Artifact, Workspace
from ownlm.records import Conversation, Document, Message, write_jsonl
from ownlm.report import Reporter
from ownlm.tokens.train import TokenizerRecipe, train_tokenizer
from ownlm.train.optimizers import Optimizer
from ownlm.train.stages import ModelShape, PretrainRecipe

SHAPE = ModelShape(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=32)
ANIMALS = ("cat", "dog", "goat", "horse", "rabbit", "snake")


def documents(workspace: Workspace) -> Artifact:
    texts = [f"The {animal} of house {number} sleeps. It is a {animal}." for number in range(30) for animal in ANIMALS]
    talk = [
        Conversation(
            messages=(
                Message(role="user", content=f"What sleeps in house {number}?"),
                Message(role="assistant", content=f"A {ANIMALS[number % 6]}."),
            )
        )
        for number in range(30)
    ]
    with workspace.create("documents", "farm", inputs={}, recipe=SHAPE) as draft:
        write_jsonl(draft.path / "train.jsonl", (Document(text=text, source="farm") for text in texts[10:]))
        write_jsonl(draft.path / "validation.jsonl", (Document(text=text, source="farm") for text in texts[:10]))
        write_jsonl(draft.path / "conversations.jsonl", talk[5:])
        write_jsonl(draft.path / "conversations_validation.jsonl", talk[:5])
    return draft.done


def prepared(root: Path) -> Workspace:
    """A workspace with documents "farm" and tokenizer "letters"."""
    workspace = Workspace(root)
    documents(workspace)
    recipe = TokenizerRecipe(name="letters", documents="farm", kind="byte", vocab_size=259)
    train_tokenizer(recipe, workspace, Reporter.silent())
    return workspace


def recipe(**changes: Any) -> PretrainRecipe:
    values: dict[str, Any] = {
        "name": "base", "documents": "farm", "tokenizer": "letters", "model": SHAPE, "context": 64, "batch_tokens": 256,
        "steps": 12, "optimizer": Optimizer(), "validate_every": 6, "checkpoint_every": 4, "precision": "fp32",
    }  # fmt: skip
    return PretrainRecipe(**values | changes)
