from dataclasses import fields

import numpy as np
import pytest
import torch

from ownlm.errors import UserError
from ownlm.tokens.batches import UNTRAINED
from ownlm.tokens.corrupt import MaskedLM, PermutationLM, SpanCorruption, marks
from ownlm.tokens.examples import (
    ClassBatch,
    Corruption,
    MaskedBatch,
    Seq2SeqBatch,
    corrupted,
    padded,
    seq2seq,
    shuffled,
    validation_corrupted,
)
from ownlm.tokens.shards import memory_shard
from ownlm.tokens.train import build

TEXTS = [f"House {number} has {number * 7 % 13} goats, {number % 5} horses and no snake." for number in range(80)]
CASES: list[tuple[str, Corruption]] = [("bert", MaskedLM()), ("t5", SpanCorruption()), ("xlnet", PermutationLM())]


def tensors(batch: object) -> dict[str, torch.Tensor]:
    found = {field.name: getattr(batch, field.name) for field in fields(batch)}  # type: ignore[arg-type]
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(("frame", "settings"), CASES)
def test_a_step_is_a_pure_function_of_its_number(frame: str, settings: Corruption) -> None:
    tokenizer = build(TEXTS, kind="byte", vocab_size=400, frame=frame)  # type: ignore[arg-type]
    shard, known = memory_shard(TEXTS, tokenizer), marks(tokenizer)

    def made(micro_rows: int, seed: int = 3) -> object:
        return corrupted(shard, settings, known, context=64, rows=6, micro_rows=micro_rows, seed=seed, start_id=0)

    whole, parts, other = (made(*arguments) for arguments in ((6,), (2,), (6, 4)))
    for step in (0, 5, 200):  # 200 is epochs away
        (batch,) = whole.step(step)  # type: ignore[attr-defined]
        cut = parts.step(step)  # type: ignore[attr-defined]
        assert len(cut) == 3
        assert sum(part.num_trained for part in cut) == batch.num_trained
        for name, tensor in tensors(batch).items():
            assert torch.equal(tensor, torch.cat([getattr(part, name) for part in cut])), name
            assert tensor.shape[0] == 6
        changed = other.step(step)[0]  # type: ignore[attr-defined]
        assert not all(torch.equal(tensor, getattr(changed, name)) for name, tensor in tensors(batch).items())


def test_rows_fill_the_context_and_stand_in_their_frame() -> None:
    for frame, settings in CASES:
        tokenizer = build(TEXTS, kind="byte", vocab_size=400, frame=frame)  # type: ignore[arg-type]
        shard, known = memory_shard(TEXTS, tokenizer), marks(tokenizer)
        (batch,) = corrupted(shard, settings, known, context=64, rows=8, seed=0, start_id=5).step(0)
        if isinstance(batch, Seq2SeqBatch):
            assert batch.tokens_BS.shape == (8, 64)
            assert (batch.tokens_BS[:, -1] == known.eos_id).all()
            assert (batch.decoder_tokens_BT[:, 0] == 5).all()
            assert torch.equal(batch.decoder_tokens_BT[:, 1:], batch.targets_BT[:, :-1])
            assert (batch.targets_BT[:, 0] == int(known.sentinels[0])).all()
            continue
        assert batch.tokens_BT.shape == (8, 64)  # type: ignore[attr-defined]
        for place, id in [*enumerate(known.before), *enumerate(known.after, start=-len(known.after))]:
            assert (batch.tokens_BT[:, place] == id).all()  # type: ignore[attr-defined]
        if isinstance(batch, MaskedBatch):
            asked = batch.targets_BT != UNTRAINED
            assert batch.num_trained == int(asked.sum())


@pytest.mark.parametrize(("frame", "settings"), CASES)
def test_held_out_text_is_hidden_in_one_way_and_read_once(frame: str, settings: Corruption) -> None:
    tokenizer = build(TEXTS, kind="byte", vocab_size=400, frame=frame)  # type: ignore[arg-type]
    shard, known = memory_shard(TEXTS[:20], tokenizer), marks(tokenizer)
    read = lambda rows: [
        tensors(b) for b in validation_corrupted(shard, settings, known, context=50, rows=rows, start_id=0)
    ]
    one, two = read(4), read(7)
    name = "decoder_tokens_BT" if frame == "t5" else "tokens_BT"
    assert torch.equal(torch.cat([batch[name] for batch in one]), torch.cat([batch[name] for batch in two]))


def test_every_example_comes_once_an_epoch() -> None:
    def collate(indices: np.ndarray) -> ClassBatch:  # type: ignore[type-arg]
        ids = torch.from_numpy(indices)[:, None]
        return ClassBatch(tokens_BT=ids, labels_B=ids[:, 0], num_trained=len(ids))

    made = shuffled(collate, 20, rows=4, micro_rows=2, seed=1)
    epochs = [
        [int(id) for step in range(5) for b in made.step(5 * epoch + step) for id in b.labels_B] for epoch in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert made.steps_per_epoch == 5


def test_padding_and_shifting_of_pairs() -> None:
    batch = seq2seq([[5, 6, 7], [8]], [[1, 2], [3, 4, 9]], start_id=0, pad_id=99)
    assert batch.tokens_BS.tolist() == [[5, 6, 7], [8, 99, 99]]
    assert batch.mask_BS is not None
    assert batch.mask_BS.tolist() == [[True] * 3, [True, False, False]]
    assert batch.decoder_tokens_BT.tolist() == [[0, 1, 99], [0, 3, 4]]
    assert batch.targets_BT.tolist() == [[1, 2, UNTRAINED], [3, 4, 9]]
    assert batch.num_trained == 5
    assert padded([[1]], 0)[0].tolist() == [[1]]


def test_what_a_vocabulary_lacks_is_told() -> None:
    chat = build(TEXTS, kind="byte", vocab_size=300)
    shard = memory_shard(TEXTS, chat)
    with pytest.raises(UserError, match="no mask token"):
        corrupted(shard, MaskedLM(), marks(chat), context=32, rows=1, seed=0)
    few = SpanCorruption(density=0.5, mean_span=1.0)
    with pytest.raises(UserError, match="need 129 sentinels and the tokenizer has 100"):
        corrupted(shard, few, marks(chat), context=257, rows=1, seed=0, start_id=0)
    bert = build(TEXTS, kind="byte", vocab_size=300, frame="bert")
    with pytest.raises(UserError, match="no room for text"):
        corrupted(memory_shard(TEXTS, bert), MaskedLM(), marks(bert), context=3, rows=1, seed=0)
