"""Packing, checked token by token against a plain rebuilding of what the rows should hold."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ownlm.errors import UserError
from ownlm.records import Conversation, Message
from ownlm.tokens.batches import (
    UNTRAINED,
    Batches,
    ConversationRows,
    DocumentRows,
    best_fit,
    validation_conversations,
    validation_documents,
)
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.shards import Shard
from ownlm.tokens.train import build

EOS, BOS = 0, 1


def shard(lengths: list[int], bos: bool = False) -> Shard:
    """Documents whose tokens are all different, so that each can be recognised: [bos] 100.. 0"""
    documents, at = [], 100
    for length in lengths:
        documents.append([*([BOS] if bos else []), *range(at, at + length), EOS])
        at += length
    return Shard(
        ids=np.asarray([token for document in documents for token in document], dtype=np.uint16),
        starts=np.cumsum([0, *map(len, documents)]),
        bytes=sum(lengths),
        eos_id=EOS,
        bos_id=BOS if bos else None,
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build(["some words to ask and to answer " * 5], kind="byte", vocab_size=300)


def conversation(question: str, *answers: str) -> Conversation:
    messages = [Message(role="user", content=question)]
    for answer in answers:
        messages += [Message(role="assistant", content=answer), Message(role="user", content="and?")]
    return Conversation(messages=tuple(messages))


@given(
    lengths=st.lists(st.integers(0, 30), min_size=3, max_size=20),
    context=st.integers(1, 12),
    mask=st.booleans(),
    bos=st.booleans(),
    rows=st.integers(1, 5),
)
def test_validation_predicts_every_token_once(
    lengths: list[int], context: int, mask: bool, bos: bool, rows: int
) -> None:
    data = shard(lengths, bos)
    seen: list[int] = []
    inputs: list[int] = []
    for batch in validation_documents(data, context, rows=rows, document_mask=mask):
        kept = batch.targets_BT != UNTRAINED
        assert int(kept.sum()) == batch.num_trained
        seen += batch.targets_BT[kept].tolist()
        inputs += batch.tokens_BT[kept].tolist()
        if not mask:
            assert batch.documents_BT is None
            assert batch.positions_BT is None
            continue
        assert batch.documents_BT is not None
        assert batch.positions_BT is not None
        for tokens, targets, blocks, positions in zip(
            batch.tokens_BT.tolist(),
            batch.targets_BT.tolist(),
            batch.documents_BT.tolist(),
            batch.positions_BT.tolist(),
            strict=True,
        ):
            for at, token in enumerate(tokens):
                begins = at > 0 and token == (BOS if bos else EOS) and targets[at - bos] != UNTRAINED
                if begins and not bos:
                    assert blocks[at] == blocks[at - 1] + 1
                assert positions[at] == (0 if at == 0 or blocks[at] != blocks[at - 1] else positions[at - 1] + 1)
    expected = data.ids.tolist()
    if bos and mask:
        expected = [token for token in expected if token != BOS]
    else:
        assert inputs == [EOS, *expected[:-1]]
    assert seen == expected


@given(
    lengths=st.lists(st.integers(0, 30), min_size=3, max_size=20),
    context=st.integers(1, 12),
    mask=st.booleans(),
    seed=st.integers(0, 5),
)
def test_training_rows_are_stretches_of_whole_shuffled_documents(
    lengths: list[int], context: int, mask: bool, seed: int
) -> None:
    data = shard(lengths)
    if len(data.ids) <= context:
        with pytest.raises(UserError, match="too few"):
            DocumentRows(data, context, seed=seed)
        return
    source = DocumentRows(data, context, seed=seed, document_mask=mask)
    follows = {int(token): int(data.ids[at + 1]) for at, token in enumerate(data.ids[:-1]) if token != EOS}
    numbers = np.arange(2 * source.rows_per_epoch)
    rows = source.rows(numbers)
    for tokens, targets in zip(rows.tokens, rows.targets, strict=True):
        assert tokens[1:].tolist() == targets[:-1].tolist()
        assert all(token == EOS or follows[int(token)] == target for token, target in zip(tokens, targets, strict=True))
    # Within an epoch no word of a document is an input twice.
    epoch = rows.tokens[: source.rows_per_epoch].ravel()
    words = epoch[epoch != EOS]
    assert len(words) == len(set(words.tolist()))
    # Asking for the rows one by one gives the same rows.
    again = [source.rows(numbers[at : at + 1]).documents[0].tolist() for at in numbers]
    assert again == rows.documents.tolist()


def test_a_step_is_the_same_however_it_is_reached() -> None:
    data = shard([7, 9, 30, 4, 12, 8])
    first, second = (Batches(DocumentRows(data, 8, seed=3), rows=4, micro_rows=3) for _ in range(2))
    for _ in range(5):
        first.step(_)
    (a, b), (c, d) = first.step(11), second.step(11)
    assert a.tokens_BT.shape == (3, 8)
    assert b.tokens_BT.shape == (1, 8)
    assert torch.equal(a.tokens_BT, c.tokens_BT)
    assert torch.equal(b.targets_BT, d.targets_BT)
    assert not torch.equal(a.tokens_BT, first.step(12)[0].tokens_BT)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_never_overfills_and_opens_no_needless_row(lengths: list[int]) -> None:
    rows = best_fit(np.asarray(lengths), 20)
    filled = np.bincount(rows, weights=lengths)
    assert filled.max() <= 20
    assert (filled > 0).all()
    assert np.sort(filled)[:2].sum() > 20 or len(filled) == 1


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 3)), min_size=1, max_size=12), seed=st.integers(0, 3)
)
def test_conversations_stay_whole_and_only_answers_are_targets(
    tokenizer: Tokenizer, sizes: list[tuple[int, int]], seed: int
) -> None:
    talks = [conversation(f"q{n} " + "x" * n, *["y" * (n % 5)] * answers) for n, answers in sizes]
    source = ConversationRows(talks, tokenizer, 160, seed=seed)
    blocks = []
    for batch in validation_conversations(source, rows=2):
        assert batch.documents_BT is not None
        assert batch.positions_BT is not None
        for row in range(len(batch.tokens_BT)):
            for block in range(int(batch.documents_BT[row].max()) + 1):
                inside = batch.documents_BT[row] == block
                targets = batch.targets_BT[row][inside]
                if (targets != UNTRAINED).any():
                    blocks.append((batch.tokens_BT[row][inside].tolist(), targets.tolist()))
                    assert batch.positions_BT[row][inside].tolist() == list(range(int(inside.sum())))
    expected = []
    for talk in talks:
        ids, mask = tokenizer.chat(talk.messages)
        last = max(at for at, trained in enumerate(mask) if trained)
        wanted = [id if trained else UNTRAINED for id, trained in zip(ids, mask, strict=True)]
        expected.append((ids[:last], wanted[1 : last + 1]))
    assert sorted(blocks) == sorted(expected)
    assert source.num_trained == sum(target != UNTRAINED for _, targets in expected for target in targets)


def test_a_conversation_longer_than_the_context_is_left_out_and_counted(tokenizer: Tokenizer) -> None:
    talks = [conversation("short", "yes"), conversation("long " * 40, "no"), Conversation(messages=())]
    source = ConversationRows(talks, tokenizer, 64, seed=0)
    assert (source.num_conversations, source.too_long, source.untrained) == (1, 1, 1)
    with pytest.raises(UserError, match="1 are longer than the context of 64 tokens"):
        ConversationRows(talks[1:], tokenizer, 64, seed=0)


def test_documents_are_mixed_in_by_their_share(tokenizer: Tokenizer) -> None:
    talks = [conversation(f"question {n}", "answer") for n in range(20)]
    source = ConversationRows(talks, tokenizer, 64, seed=0)
    documents = DocumentRows(shard([40] * 20), 64, seed=0, document_mask=True)
    batches = Batches(source, rows=6, documents=documents, document_share=0.25)
    full = 0
    for step in range(8):
        (batch,) = batches.step(step)
        assert batch.tokens_BT.shape == (6, 64)
        full += int((batch.targets_BT != UNTRAINED).all(dim=1).sum())
    assert full == 12  # a quarter of 48 rows
