"""Bits per byte on documents held out from training, beside two baselines that were given the same training text.

Bits per byte can be compared between tokenizers, and with any compressor. Every byte counts once: the tokens of a document add
-log2 P to its bits, the first one included; its end token has no bytes and is not counted, for the baselines neither.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

from ownlm.artifact import Artifact
from ownlm.errors import UserError
from ownlm.evaluate import baselines, metrics
from ownlm.evaluate.harness import Result, Settings, Task, logprobs, windows
from ownlm.generate.model import Model
from ownlm.records import Document, Score, read_jsonl
from ownlm.report import Reporter, size

ROUND = 64  # documents between two lines of progress


def bits_per_byte(documents: Artifact) -> Task | None:
    """The task of predicting the test documents of a documents artifact; its validation documents where it has no test."""
    for split in ("test", "validation"):
        if documents.has(f"{split}.jsonl"):
            heldout = [document.text for document in read_jsonl(documents.file(f"{split}.jsonl"), Document)]
            if heldout:
                train = [document.text for document in read_jsonl(documents.file("train.jsonl"), Document)]
                return predict(train, heldout, split)
    return None


def predict(train: Sequence[str], heldout: Sequence[str], split: str = "test") -> Task:
    """The task of predicting `heldout`; the baselines read `train`."""

    def task(model: Model, settings: Settings, reporter: Reporter) -> Result:
        chosen = within(heldout, settings.max_bytes, settings.seed)
        sizes = [len(text.encode()) for text in chosen]
        encoded = model.tokenizer.encode_batch(chosen)
        bits: list[float] = []
        for start in range(0, len(chosen), ROUND):
            bits += document_bits(model, encoded[start : start + ROUND], settings.batch_tokens)
            reporter.status(f"bits per byte: {size(sum(sizes[: len(bits)]))} of {size(sum(sizes))}")
        reporter.status("bits per byte: the n-gram model and xz on the same text")
        details = compare(train, chosen, bits, sizes, settings.seed, reporter) | {
            "split": split,
            "documents": len(chosen),
            "documents_held_out": len(heldout),
            "tokens": sum(map(len, encoded)),
            "changed_by_tokenizer": sum(
                model.tokenizer.decode(ids) != text for ids, text in zip(encoded, chosen, strict=True)
            ),
        }
        value, (low, high) = sum(bits) / sum(sizes), metrics.bootstrap(bits, sizes, seed=settings.seed)
        score = Score(
            task="bits_per_byte", metric="bits per byte", value=value, low=low, high=high, n=sum(sizes),
            baseline=details["ngram"],
        )  # fmt: skip
        return Result(task="bits_per_byte", scores=(score,), details=details)

    return task


def document_bits(model: Model, encoded: Sequence[Sequence[int]], batch_tokens: int) -> list[float]:
    """The bits each document costs the model, read from its beginning in sliding windows."""
    begin = model.prompt_ids("")
    pairs, owners = [], []
    for owner, ids in enumerate(encoded):
        for pair in windows(begin, ids, model.context) if ids else ():
            pairs.append(pair)
            owners.append(owner)
    bits = [0.0] * len(encoded)
    for owner, span in zip(owners, logprobs(model, pairs, batch_tokens), strict=True):
        bits[owner] -= span.total / math.log(2)
    return bits


def compare(
    train: Sequence[str],
    heldout: Sequence[str],
    bits: Sequence[float],
    sizes: Sequence[int],
    seed: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """The baselines' bits per byte on the same documents, and the interval of the difference to the model's, by document."""
    total = sum(sizes)
    ngram = baselines.ngram_bits(train, heldout)
    after, alone = baselines.xz_bits(train, heldout)
    train_bytes = sum(len(text.encode()) for text in train)
    for name, limit in (("the n-gram model", baselines.NGRAM_BYTES), ("xz", baselines.XZ_BYTES)):
        if train_bytes > limit:
            reporter.line(
                f"bits per byte: {name} was given the first {size(limit)} of {size(train_bytes)} of training text."
            )
    difference = [mine - theirs for mine, theirs in zip(bits, ngram, strict=True)]
    low, high = metrics.bootstrap(ngram, sizes, seed=seed)
    return {
        "bytes": total,
        "train_bytes": train_bytes,
        "ngram": sum(ngram) / total,
        "ngram_interval": [low, high],
        "ngram_train_bytes": min(train_bytes, baselines.NGRAM_BYTES),
        "difference": sum(difference) / total,
        "difference_interval": list(metrics.bootstrap(difference, sizes, seed=seed)),
        "xz": after / total,
        "xz_alone": alone / total,
        "xz_train_bytes": min(train_bytes, baselines.XZ_BYTES),
    }


def within(texts: Sequence[str], max_bytes: int, seed: int) -> list[str]:
    """A random choice of documents that have together about `max_bytes`; a document longer than that is cut to it.

    Raises UserError when none of them has any text.
    """
    chosen, total = [], 0
    for text in random.Random(seed).sample(list(texts), len(texts)):
        if total >= max_bytes:
            break
        if len(text.encode()) > max_bytes:
            text = text.encode()[:max_bytes].decode(errors="ignore")
        if text:
            chosen.append(text)
            total += len(text.encode())
    if not chosen:
        raise UserError("the held-out documents are empty.", where="bits_per_byte")
    return chosen
