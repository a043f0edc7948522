import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.corrupt import (
    HIDDEN,
    Marks,
    MaskedLM,
    PermutationLM,
    SpanCorruption,
    draw,
    factorise,
    hide_spans,
    marks,
    mask_tokens,
    span_counts,
    span_text_length,
    splice,
)
from ownlm.tokens.train import build

Ints = NDArray[np.int64]
TEXTS = ["The unhappiest rabbits were running; they weren't 1234 feet away from extraordinarily quick foxes."] * 3
SENTINELS = np.arange(900, 1000)


@pytest.fixture(scope="module")
def bert() -> Tokenizer:
    return build(TEXTS, kind="wordpiece", vocab_size=120, frame="bert")


@pytest.fixture(scope="module")
def known(bert: Tokenizer) -> Marks:
    return marks(bert)


def spliced_by_hand(ids: list[int], hidden: list[bool]) -> list[int]:
    """A loop instead of the arrays."""
    out: list[int] = []
    runs = 0
    for at, (id, gone) in enumerate(zip(ids, hidden, strict=True)):
        if not gone:
            out.append(id)
        elif at == 0 or not hidden[at - 1]:
            out.append(int(SENTINELS[runs]))
            runs += 1
    return out


def restored(inputs: list[int], targets: list[int]) -> list[int]:
    """What the decoder wrote, put where the sentinels of the inputs stand; both without an end token."""
    parts: dict[int, list[int]] = {}
    now: list[int] = []
    for id in targets:
        if id in SENTINELS:
            now = parts.setdefault(id, [])
        else:
            now.append(id)
    return [id for token in inputs for id in (parts.pop(token) if token in SENTINELS else [token])]


def test_the_example_of_the_t5_paper() -> None:
    words = "Thank you for inviting me to your party last week .".split()
    ids = np.arange(len(words))
    hidden = np.isin(words, ["for", "inviting", "last"])
    told = lambda found: " ".join(f"<{'XYZ'[id - 900]}>" if id >= 900 else words[id] for id in found.tolist())
    assert told(splice(ids, hidden, SENTINELS)) == "Thank you <X> me to your party <Y> week ."
    assert told(splice(ids, ~hidden, SENTINELS)) == "<X> for inviting <Y> last <Z>"


@given(
    length=st.integers(2, 300),
    density=st.floats(0.05, 0.6),
    mean_span=st.floats(1.0, 10.0),
    seed=st.integers(0, 2**31),
)
def test_spans_put_back_give_the_text(length: int, density: float, mean_span: float, seed: int) -> None:
    chosen = SpanCorruption(density=density, mean_span=mean_span)
    hidden = hide_spans(length, draw(seed, 0), chosen)
    count, spans = span_counts(length, chosen)
    assert len(hidden) == length
    assert hidden.sum() == count
    assert (np.diff(hidden.astype(int)) == 1).sum() == spans
    assert not hidden[0]
    if spans > len(SENTINELS) - 1:
        return
    ids = draw(seed, 1).integers(0, 800, length)
    inputs, targets = splice(ids, hidden, SENTINELS), splice(ids, ~hidden, SENTINELS)
    assert inputs.tolist() == spliced_by_hand(ids.tolist(), hidden.tolist())
    assert targets.tolist() == spliced_by_hand(ids.tolist(), (~hidden).tolist())
    assert restored(inputs.tolist(), targets.tolist()) == ids.tolist()


def test_span_lengths_fit_the_context_as_t5_counts_them() -> None:
    # T5 reads 568 tokens to fill an input of 512 at 15 % and spans of 3, and its targets then have 114
    # (compute_input_and_target_lengths in transformers' run_t5_mlm_flax.py and in google-research/text-to-text-transfer-transformer).
    chosen = SpanCorruption()
    assert span_text_length(512, chosen) == 568
    hidden, spans = span_counts(568, chosen)
    assert 568 - hidden + spans + 1 == 512
    assert hidden + spans + 1 == 114
    with pytest.raises(ValueError, match="mean_span"):
        SpanCorruption(mean_span=0.5)


@given(length=st.integers(8, 200), probability=st.floats(0.05, 0.9), seed=st.integers(0, 2**31))
def test_masking_asks_for_its_share_and_never_for_special_tokens(
    known: Marks, length: int, probability: float, seed: int
) -> None:
    ids = draw(seed, 0).choice(known.ordinary, length)
    ids[::5] = draw(seed, 1).choice(np.flatnonzero(known.special_V), len(ids[::5]))
    inputs, targets = mask_tokens(ids, draw(seed, 2), MaskedLM(probability=probability), known)
    asked = targets != HIDDEN
    able = ~known.special_V[ids]
    assert asked.sum() == max(1, round(probability * able.sum()))
    assert (targets[asked] == ids[asked]).all()
    assert not asked[~able].any()
    assert (inputs == ids)[~asked].all()
    assert np.isin(inputs[asked], [*known.ordinary, known.mask_id]).all()


def test_of_those_asked_for_eighty_percent_are_masked_and_ten_are_random(known: Marks) -> None:
    counts = np.zeros(3)
    rows = 2_000
    for row in range(rows):
        ids = draw(1, row).choice(known.ordinary, 100)
        inputs, targets = mask_tokens(ids, draw(2, row), MaskedLM(), known)
        asked = targets != HIDDEN
        masked, same = inputs[asked] == known.mask_id, inputs[asked] == ids[asked]
        counts += [masked.sum(), (~masked & ~same).sum(), same.sum()]
    by_chance = 1 / len(known.ordinary)  # a random token may be the right one
    expected = np.asarray([0.8, 0.1 * (1 - by_chance), 0.1 + 0.1 * by_chance])
    share = counts / (rows * 15)
    assert counts.sum() == rows * 15
    spread = np.sqrt(expected * (1 - expected) / counts.sum())
    assert (abs(share - expected) < 5 * spread).all(), share


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_whole_words_are_hidden_whole(kind: str) -> None:
    tokenizer = build(TEXTS, kind=kind, vocab_size=330, frame="bert")  # type: ignore[arg-type]
    known = marks(tokenizer)
    ids = np.asarray(tokenizer.document(TEXTS[0]))
    chosen = MaskedLM(probability=0.3, whole_words=True)
    # Which word each token belongs to, from the text itself: words end at a space, and punctuation stands alone.
    offsets = tokenizer.backend.encode(TEXTS[0], add_special_tokens=False).offsets
    lines = [number for number, character in enumerate(TEXTS[0]) if not character.isalnum()]
    word = [sum(border <= end - 1 for border in lines) * 2 + (TEXTS[0][end - 1] in ";.'") for _, end in offsets]
    sizes = []
    for row in range(200):
        inputs, targets = mask_tokens(ids, draw(3, row), chosen, known)
        asked = (targets != HIDDEN)[1:-1]
        groups = [{bool(a) for a, w in zip(asked, word, strict=True) if w == which} for which in set(word)]
        assert all(len(group) == 1 for group in groups), (kind, asked)
        sizes.append(int(asked.sum()))
        assert (inputs[:1] == ids[:1]).all()
    assert max(sizes) <= round(0.3 * len(word))
    assert min(sizes) > 0


def test_each_epoch_hides_anew_and_a_repeated_run_the_same(known: Marks) -> None:
    ids = draw(0, 0).choice(known.ordinary, 60)
    first, again, later = (mask_tokens(ids, draw(5, row), MaskedLM(), known)[0].tolist() for row in (7, 7, 107))
    assert first == again
    assert first != later


@given(length=st.integers(4, 120), share=st.floats(0.05, 0.9), seed=st.integers(0, 2**31), span=st.integers(1, 8))
def test_an_order_hides_what_comes_later(length: int, share: float, seed: int, span: int) -> None:
    able = np.arange(1, length - 1)  # a special token at either end
    count = max(1, round(share * len(able)))
    targets, unseen = factorise(able, length, count, draw(seed, 0), span)
    assert len(set(targets.tolist())) == count
    assert targets.tolist() == sorted(targets.tolist())
    assert set(targets.tolist()) <= set(able.tolist())
    others = np.setdiff1d(np.arange(length), targets)
    assert not unseen[:, others].any()  # everybody sees what is given
    assert unseen[np.ix_(others, targets)].all()  # and what is given sees no target
    among = unseen[np.ix_(targets, targets)]
    assert among.diagonal().all()  # the query stream sees no token at its own place
    # Of two targets exactly one sees the other: the numbers of targets that each doesn't see are 1, 2, … count.
    assert sorted(among.sum(1)) == list(range(1, count + 1))
    assert (among ^ among.T ^ np.eye(count, dtype=bool)).all()


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_predicted_tokens_are_neighbours(seed: int) -> None:
    share = PermutationLM().share
    targets, _ = factorise(np.arange(120), 120, round(share * 120), draw(seed, 0), 5)
    # 20 tokens in spans of 1 to 5: far fewer runs than tokens, which single draws would not give.
    assert 1 + (np.diff(targets) > 1).sum() <= 16


def test_marks_of_every_frame() -> None:
    found = {frame: build(TEXTS, kind="bpe", vocab_size=420, frame=frame) for frame in ("chat", "bert", "t5", "xlnet")}  # type: ignore[arg-type]
    ids = {frame: tokenizer.special for frame, tokenizer in found.items()}
    bert, t5, xlnet, chat = (marks(found[frame]) for frame in ("bert", "t5", "xlnet", "chat"))
    assert (bert.before, bert.after) == ((ids["bert"]["[CLS]"],), (ids["bert"]["[SEP]"],))
    assert bert.mask_id == ids["bert"]["[MASK]"]
    assert t5.sentinels.tolist() == [ids["t5"][f"<extra_id_{number}>"] for number in range(100)]
    assert t5.eos_id == ids["t5"]["</s>"]
    assert (xlnet.before, xlnet.after) == ((), (ids["xlnet"]["<sep>"], ids["xlnet"]["<cls>"]))
    assert chat.mask_id is None
    padded = marks(found["chat"], vocab_size=512)
    assert padded.sentinels[0] == 511
    assert padded.special_V[found["chat"].vocab_size :].all()
    assert not np.isin(padded.ordinary, [*ids["chat"].values()]).any()


@pytest.mark.parametrize("frame", ["bert", "t5", "xlnet"])
def test_a_frame_is_what_transformers_puts_around_a_text(frame: str, tmp_path: object) -> None:
    from pathlib import Path

    from transformers import AutoTokenizer

    tokenizer = build(TEXTS, kind="bpe", vocab_size=420, frame=frame)  # type: ignore[arg-type]
    tokenizer.save(Path(str(tmp_path)))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    known = marks(tokenizer)
    text = "They weren't running away."
    around = {"bert": (known.before, known.after), "xlnet": (known.before, known.after), "t5": ((), (known.eos_id,))}
    before, after = around[frame]
    assert theirs(text)["input_ids"] == [*before, *tokenizer.encode(text), *after]
    if frame != "t5":
        assert theirs.mask_token_id == known.mask_id
    assert theirs.pad_token_id == known.pad_id
