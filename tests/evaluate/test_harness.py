"""Log-likelihoods against transformers and the plain forward; windows that miss and repeat nothing; batches that don't matter."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ownlm.checkpoints.weights import save_model
from ownlm.errors import UserError
from ownlm.evaluate.harness import Settings, batches, draw, evaluate_model, logprobs, measure, next_logprobs, windows
from ownlm.evaluate.tasks.text import document_bits, predict, within
from ownlm.report import Reporter
from tiny import tiny_model

MODEL = tiny_model(context=32)
PAIRS = [([1, 2, 3], [4, 5]), ([9], [8, 7, 6, 5, 4, 3]), ([5] * 20, [7] * 13), ([3, 1], [4])]


@given(st.integers(1, 3), st.integers(8, 40), st.integers(1, 200))
def test_windows_score_each_token_once_after_what_fits(begin: int, context: int, length: int) -> None:
    start, ids = list(range(-begin, 0)), list(range(length))
    pairs = windows(start, ids, context)
    assert [token for _, scored in pairs for token in scored] == ids
    for read, scored in pairs:
        assert len(read) + len(scored) - 1 <= context
        everything = start + ids
        end = everything.index(scored[0])
        assert list(read) == everything[end - len(read) : end]
        assert len(read) == end or len(read) > context // 2


def test_logprobs_equal_the_plain_forward() -> None:
    for (before, scored), span in zip(PAIRS, logprobs(MODEL, PAIRS, 64), strict=True):
        ids = [*before, *scored]
        table = MODEL.logits([ids[:-1]])[0].log_softmax(-1)
        expected = [table[len(before) - 1 + i, id].item() for i, id in enumerate(scored)]
        assert span.logprobs.tolist() == pytest.approx(expected, abs=1e-5)
        greedy = table[len(before) - 1 :].argmax(-1).tolist()
        assert span.greedy == (greedy == scored)


def test_greedy_is_what_generate_writes() -> None:
    prompt = "the old gate"
    answer = MODEL.generate(prompt, max_tokens=6, stop_ids=frozenset())
    ids = MODEL.prompt_ids(prompt)
    right, wrong = logprobs(MODEL, [(ids, answer.tokens), (ids, [*answer.tokens[:-1], 1])], 64)
    assert right.greedy
    assert not wrong.greedy
    assert right.logprobs.tolist() == pytest.approx(answer.logprobs, abs=1e-4)


def test_transformers_finds_the_same_loglikelihood(tmp_path) -> None:
    import transformers

    save_model(MODEL.decoder, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for (before, scored), span in zip(PAIRS, logprobs(MODEL, PAIRS, 8192), strict=True):
        ids = torch.tensor([[*before, *scored]])
        with torch.inference_mode():
            table = theirs(ids).logits[0].log_softmax(-1)
        expected = sum(table[len(before) - 1 + i, id].item() for i, id in enumerate(scored))
        assert span.total == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 40, 100])
def test_batch_size_does_not_matter(batch_tokens: int) -> None:
    whole, other = logprobs(MODEL, PAIRS, 8192), logprobs(MODEL, PAIRS, batch_tokens)
    for first, second in zip(whole, other, strict=True):
        assert first.logprobs.tolist() == pytest.approx(second.logprobs.tolist(), abs=1e-5)
    rows = [[1, 2], [3], [4, 5, 6]]
    apart = next_logprobs(MODEL, rows, [7, 9], batch_tokens)
    assert apart == pytest.approx(next_logprobs(MODEL, rows, [7, 9], 8192), abs=1e-5)
    assert apart[1, 1] == pytest.approx(logprobs(MODEL, [([3], [9])], 64)[0].total, abs=1e-5)
    texts = ["a short one", "x" * 50, "and another, somewhat longer document"]
    tasks = {"bits": predict(["training text"], texts)}
    scores = [evaluate_model(MODEL, tasks, Settings(batch_tokens=tokens))[0].value for tokens in (batch_tokens, 8192)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_batches_hold_every_row_within_the_limit() -> None:
    lengths = [3, 9, 1, 4, 4, 20]
    found = list(batches(lengths, 12))
    assert sorted(index for batch in found for index in batch) == list(range(6))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 12 or len(batch) == 1 for batch in found)


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token() -> None:
    model = tiny_model(context=16)
    with torch.no_grad():
        model.decoder.head_weight.zero_()
    texts = ["short", "a document longer than the context: é and 日本", "1"]
    ids = [model.tokenizer.encode(text) for text in texts]
    per_token = math.log2(model.tokenizer.vocab_size)
    assert document_bits(model, ids, 64) == pytest.approx([len(row) * per_token for row in ids], rel=1e-6)
    [score] = evaluate_model(model, {"bits_per_byte": predict(["some training text"], texts)})
    tokens, size = sum(map(len, ids)), sum(len(text.encode()) for text in texts)
    assert score.value == pytest.approx(per_token * tokens / size, rel=1e-6)
    assert score.n == size
    assert score.baseline is not None
    assert score.low <= score.value <= score.high


def test_a_document_within_the_context_costs_its_plain_logprob() -> None:
    ids = MODEL.tokenizer.encode("held-out text")
    row = [MODEL.tokenizer.eos_id, *ids]
    table = MODEL.logits([row[:-1]])[0].log_softmax(-1)
    expected = -sum(table[i, id].item() for i, id in enumerate(ids)) / math.log(2)
    assert document_bits(MODEL, [ids], 64) == pytest.approx([expected], rel=1e-5)


def test_held_out_text_is_drawn_and_cut() -> None:
    texts = [f"document {index}" for index in range(100)]
    chosen = within(texts, 200, seed=1)
    assert chosen == within(texts, 200, seed=1)
    assert set(chosen) < set(texts)
    assert 200 <= sum(map(len, chosen)) < 212
    assert within(["é" * 10], 5, seed=0) == ["éé"]
    with pytest.raises(UserError, match="empty"):
        within(["", ""], 10, seed=0)


def test_draw_keeps_order_and_ignores_everything_but_the_seed() -> None:
    assert draw([1, 2, 3], None, 0) == [1, 2, 3]
    chosen = draw(range(1000), 10, 7)
    assert chosen == sorted(chosen) == draw(range(1000), 10, 7)
    assert chosen != draw(range(1000), 10, 8)


def test_results_carry_the_name_and_the_time() -> None:
    [result] = measure(MODEL, {"text": predict(["a"], ["b"])}, reporter=Reporter.silent())
    assert result.task == "text"
    assert result.seconds > 0
