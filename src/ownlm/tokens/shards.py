"""Shards: the ids of every document of a split in one flat file, read through a memory map.

    {split}.bin   ids, uint16 or uint32, documents one after another, each framed by `Tokenizer.frame`
    {split}.idx   int64 offsets into it: where each document starts, and last the total

The facts of the artifact hold, per split, documents, tokens and bytes: bits per byte = bits per token * tokens / bytes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ownlm.artifact import Artifact, Workspace
from ownlm.errors import UserError
from ownlm.records import Document, read_jsonl
from ownlm.report import Reporter, quantity
from ownlm.storage import storage
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.gguf import tokenizer_of

Dtype = np.dtype[np.uint16] | np.dtype[np.uint32]
SPLITS = ("train", "validation", "test")
BATCH_CHARACTERS = 2_000_000  # encoded at once: some 100 MB of memory in the tokenizer, and work for every core


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensRecipe:
    """Which documents to encode with which tokenizer."""

    name: str
    documents: str
    tokenizer: str


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One split: `ids` (total,) and `starts` (documents + 1,), both mapped from disk. `bytes` is the size of its text;
    `eos_id` ends each document; `bos_id` begins it, where the tokenizer has one."""

    ids: NDArray[np.unsignedinteger]
    starts: NDArray[np.int64]
    bytes: int
    eos_id: int
    bos_id: int | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, document: int) -> NDArray[np.unsignedinteger]:
        """The ids of one document."""
        return self.ids[self.starts[document] : self.starts[document + 1]]


def tokenize(recipe: TokensRecipe, workspace: Workspace, reporter: Reporter) -> Artifact:
    """A tokens artifact: every split of a documents artifact, encoded."""
    documents = workspace.open(recipe.documents, "documents")
    source = workspace.open(recipe.tokenizer, ("tokenizer", "checkpoint"))
    inputs = {"documents": documents, "tokenizer": source}
    if found := workspace.find(recipe.name, kind="tokens", inputs=inputs, recipe=recipe):
        return found
    tokenizer = tokenizer_of(source.path)
    with workspace.create("tokens", recipe.name, inputs=inputs, recipe=recipe) as draft:
        dtype: Dtype = np.dtype(np.uint16) if tokenizer.vocab_size <= 2**16 else np.dtype(np.uint32)
        splits = {}
        for split in SPLITS:
            if documents.has(f"{split}.jsonl"):
                texts = (document.text for document in read_jsonl(documents.file(f"{split}.jsonl"), Document))
                splits[split] = write_shard(draft.path / split, texts, tokenizer, dtype, reporter)
        draft.facts |= {
            "splits": splits,
            "dtype": dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "bos_id": tokenizer.bos_id,
            "tokenizer_digest": tokenizer.digest,
        }
    reporter.event("tokens", ref=draft.done.ref, **draft.facts)
    return draft.done


def write_shard(
    stem: Path, texts: Iterable[str], tokenizer: Tokenizer, dtype: Dtype, reporter: Reporter
) -> dict[str, int]:
    """Write `stem`.bin and `stem`.idx; returns the numbers of documents, tokens and bytes. Memory stays bounded."""
    bytes_, total, starts = 0, 0, [0]
    with storage(stem.parent), stem.with_suffix(".bin").open("wb") as file:
        for batch in _batches(texts):
            for ids in tokenizer.encode_batch(batch):
                framed = np.asarray(tokenizer.frame(ids), dtype=dtype)
                file.write(framed.tobytes())
                total += len(framed)
                starts.append(total)
            bytes_ += sum(len(text.encode()) for text in batch)
            reporter.status(f"tokens: {stem.name} {quantity(total)} tokens")
        stem.with_suffix(".idx").write_bytes(np.asarray(starts, dtype=np.int64).tobytes())
    return {"documents": len(starts) - 1, "tokens": total, "bytes": bytes_}


def open_shard(tokens: Artifact, split: str) -> Shard:
    """The memory-mapped shard of a split. Raises UserError when the split is empty."""
    facts = tokens.facts["splits"].get(split)
    if not facts or not facts["tokens"]:
        raise UserError(
            f"there are no {split} tokens.", where=tokens.ref, cure="Add documents, or raise that split's share."
        )
    return Shard(
        ids=np.memmap(tokens.file(f"{split}.bin"), dtype=tokens.facts["dtype"], mode="r"),
        starts=np.fromfile(tokens.file(f"{split}.idx"), dtype=np.int64),
        bytes=facts["bytes"],
        eos_id=tokens.facts["eos_id"],
        bos_id=tokens.facts["bos_id"],
    )


def memory_shard(texts: Iterable[str], tokenizer: Tokenizer) -> Shard:
    """A shard that was never written to disk, for a few texts."""
    kept = list(texts)
    documents = [tokenizer.frame(ids) for ids in tokenizer.encode_batch(kept)]
    return Shard(
        ids=np.asarray([id for document in documents for id in document], dtype=np.uint32),
        starts=np.cumsum([0, *map(len, documents)], dtype=np.int64),
        bytes=sum(len(text.encode()) for text in kept),
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
    )


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
