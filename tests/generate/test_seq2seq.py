"""Encoder-decoders write what transformers' write: greedy, over beams, in batches of mixed lengths; and the settings that
every model shares."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5ForConditionalGeneration

import ownlm
from ownlm import cli
from ownlm.checkpoints.weights import save_model
from ownlm.errors import UserError
from ownlm.generate.opening import load, load_decoder
from ownlm.generate.sampling import Sampling
from ownlm.generate.seq2seq import Seq2Seq, batches, beam_search
from ownlm.models.families import from_hf
from tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = ["translate: a", "", "summarize: the quick brown fox jumps over the lazy dog", "b" * 20, "the end"]
FREE = {"max_tokens": 12, "stop_ids": frozenset()}


def config(vocab_size: int) -> dict[str, Any]:
    return {
        "model_type": "t5", "vocab_size": vocab_size, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "relative_attention_num_buckets": 12, "relative_attention_max_distance": 40, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False, "decoder_start_token_id": 3, "pad_token_id": 0, "eos_token_id": 1, "n_positions": 30,
    }  # fmt: skip


def model(seed: int = 0, vocab_size: int = TOKENIZER.vocab_size, gain: float = 1.0) -> Any:
    """Loud random weights; `gain` makes the model surer of itself."""
    hf = config(vocab_size)
    made, family = from_hf(hf)
    module = family.build(made, hf)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(noise * (0.3 if name.endswith("q_proj.weight") else 1.0))
        module.lm_head.weight.mul_(gain)
    return module.eval()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t5")
    save_model(model(), path)
    TOKENIZER.save(path)
    return path


@pytest.fixture(scope="module")
def loaded(directory: Path) -> Seq2Seq:
    found = ownlm.load(directory)
    assert isinstance(found, Seq2Seq)
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., T5ForConditionalGeneration]:
    """The same model in transformers."""
    made: dict[tuple[int, int, float], Any] = {}

    def get(*key: Any) -> Any:
        if key not in made:
            path = tmp_path_factory.mktemp("reference")
            save_model(model(*key), path)
            made[key] = T5ForConditionalGeneration.from_pretrained(path)
        return made[key]

    return get


def theirs(reference: Any, prompts: list[list[int]], stops: list[int], **settings: Any) -> list[tuple[int, ...]]:
    """What transformers writes, without the start token and the padding after a stop token."""
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
    out = reference.generate(
        ids, attention_mask=mask, do_sample=False, eos_token_id=stops or None, pad_token_id=0, **settings
    )
    rows = []
    for row in out[:, 1:].tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in stops), len(row))
        rows.append(tuple(row[:end]))
    return rows


def sources(vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (9, 4, 17, 1, 6)
    return [torch.randint(1, vocab_size, (length,), generator=generator).tolist() for length in lengths]


# ── Beam search ──────────────────────────────────────────────────────────────────────────────────────────────────────

SEARCHES = [
    Sampling(beams=2),
    Sampling(beams=4, length_penalty=0.0),
    Sampling(beams=3, length_penalty=2.0, early_stopping=True),
    Sampling(beams=5, length_penalty=0.6, early_stopping="never"),
    Sampling(beams=2, length_penalty=2.0, early_stopping="never"),
    Sampling(beams=3, length_penalty=-1.0, early_stopping="never"),
    Sampling(beams=4, early_stopping=True),
]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("stops", [[], [5], [1, 5, 9]], ids=len)
def test_beams_equal_transformers(search: Sampling, stops: list[int], reference: Any) -> None:
    endings = set()
    for seed in range(4):
        prompts = sources(24, seed)
        ours = beam_search(model(seed, 24, 0.3), prompts, search, limit=14, stop_ids=frozenset(stops))
        expected = theirs(
            reference(seed, 24, 0.3),
            prompts,
            stops,
            num_beams=search.beams,
            length_penalty=search.length_penalty,
            early_stopping=search.early_stopping,
            max_new_tokens=14,
        )
        assert [best.tokens for best in ours] == expected
        endings |= {best.ended for best in ours}
        for best in ours:
            assert best.total == pytest.approx(sum(best.logprobs), abs=1e-4)
    assert not stops or search.length_penalty > 1 or True in endings


def test_a_mistake_in_the_search_would_be_noticed(reference: Any) -> None:
    """The settings matter on these models: each changes what is found."""
    prompts, found = sources(24, 1), set()
    for search in (*SEARCHES, Sampling(beams=1), Sampling(beams=8)):
        answers = beam_search(model(1, 24, 0.3), prompts, search, limit=14, stop_ids=frozenset([1, 5, 9]))
        found.add(tuple(best.tokens for best in answers))
    assert len(found) >= 5


def test_one_beam_is_greedy(loaded: Seq2Seq) -> None:
    prompts = [loaded.prompt_ids(text) for text in TEXTS]
    found = beam_search(loaded.model, prompts, Sampling(beams=1), limit=12, stop_ids=frozenset())
    for best, greedy in zip(found, loaded.generate(TEXTS, **FREE), strict=True):
        assert best.tokens == greedy.tokens
        assert best.logprobs == pytest.approx(greedy.logprobs, abs=1e-4)


def test_batched_beams_are_one_by_one(loaded: Seq2Seq) -> None:
    together = loaded.generate(TEXTS, beams=3, max_tokens=10)
    for text, expected in zip(TEXTS, together, strict=True):
        alone = loaded.generate(text, beams=3, max_tokens=10)
        assert (alone.text, alone.tokens, alone.finish_reason) == (
            expected.text,
            expected.tokens,
            expected.finish_reason,
        )
        assert alone.prompt_tokens == len(loaded.prompt_ids(text))


# ── Greedy and sampled ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stops", [[], [1], [1, 5, 9, 11]], ids=len)
def test_greedy_equals_transformers(stops: list[int], reference: Any) -> None:
    for seed in range(4):
        prompts, ours = sources(24, seed), Seq2Seq(model(seed, 24), TOKENIZER)
        sampling = Sampling(max_tokens=14, stop_ids=frozenset(stops))
        found: list[list[int]] = [[] for _ in prompts]
        for event in ours.events(prompts, sampling):
            assert event.token is not None
            found[event.request].append(event.token.id)
        assert list(map(tuple, found)) == theirs(reference(seed, 24, 1.0), prompts, stops, max_new_tokens=14)


def test_logprobs_are_those_of_the_plain_forward(loaded: Seq2Seq) -> None:
    answer = loaded.generate(TEXTS[2], **FREE)
    ids = torch.tensor([loaded.prompt_ids(TEXTS[2])])
    with torch.inference_mode():
        hidden = loaded.model(ids, torch.tensor([[3, *answer.tokens[:-1]]]))
        logprobs = loaded.model.logits(hidden)[0].log_softmax(-1)
    assert answer.logprobs == pytest.approx(
        [float(row[id]) for row, id in zip(logprobs, answer.tokens, strict=True)], abs=1e-4
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_is_batch_is_one(temperature: float, loaded: Seq2Seq) -> None:
    settings = FREE | {"temperature": temperature, "seed": 5, "top_p": 0.9}
    batch = loaded.generate(TEXTS, **settings)
    for text, expected in zip(TEXTS, batch, strict=True):
        one = loaded.generate(text, **settings)
        assert (one.text, one.tokens, one.finish_reason) == (expected.text, expected.tokens, "length")
        assert "".join(loaded.stream(text, **settings)) == expected.text
        assert len(expected.tokens) == len(expected.logprobs) == 12
    if temperature:
        assert loaded.generate(TEXTS[0], **settings | {"seed": 6}).tokens != batch[0].tokens
    assert loaded.generate([]) == []


def test_answers_end(loaded: Seq2Seq) -> None:
    """At a stop token, which is no text; at a stop string, which isn't shown; at max_tokens; at what the model was made for."""
    whole = loaded.generate(TEXTS[0], max_tokens=12, temperature=1, seed=2, stop_ids=frozenset())
    third = whole.tokens[2]
    first = whole.tokens.index(third)
    ended = loaded.generate(TEXTS[0], max_tokens=12, temperature=1, seed=2, stop_ids=frozenset([third]))
    assert ended.tokens == whole.tokens[: first + 1]
    assert ended.finish_reason == "stop"
    assert ended.text == TOKENIZER.decode(whole.tokens[:first])
    cut = loaded.generate(TEXTS[0], max_tokens=12, temperature=1, seed=2, stop_ids=frozenset(), stop=whole.text[4:6])
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(whole.text[4:6])]
    assert len(loaded.generate(TEXTS[0], stop_ids=frozenset()).tokens) == 30


def test_refusals(loaded: Seq2Seq, directory: Path) -> None:
    with pytest.raises(UserError, match="not messages"):
        loaded.generate([{"role": "user", "content": "hello"}])  # type: ignore[list-item]
    for wrong in ({"temperature": 1.0}, {"stop": "x"}):
        with pytest.raises(UserError, match="neither temperature nor stop"):
            loaded.generate("a", beams=2, **wrong)
    with pytest.raises(UserError, match="beams must be between 1 and 64, not 0"):
        loaded.generate("a", beams=0)
    with pytest.raises(UserError, match="early_stopping"):
        loaded.generate("a", beams=2, early_stopping="soon")
    with pytest.raises(UserError, match="are for several beams"):
        loaded.generate("a", length_penalty=2.0)
    with pytest.raises(UserError, match="no such setting"):
        loaded.generate("a", beam=2)
    with pytest.raises(UserError, match="300 is not a token"):
        list(loaded.events([[300]], Sampling(max_tokens=1)))
    with pytest.raises(UserError, match="a decoder is needed"):
        load_decoder(directory)


def test_batches() -> None:
    prompts = [[1] * length for length in (5, 3000, 1, 3000, 8192, 9000, 5)]
    found = list(batches(prompts, 1))
    assert sorted(index for batch in found for index in batch) == list(range(7))
    assert found[:3] == [[5], [4], [1, 3, 0, 6, 2][:2]]
    assert all(len(batch) * 4 <= 64 for batch in batches([[1]] * 100, 4))


# ── Files and the command line ───────────────────────────────────────────────────────────────────────────────────────


def test_xlnet_alone_does_nothing(tmp_path: Path) -> None:
    hf = {"model_type": "xlnet", "vocab_size": 40, "d_model": 16, "n_head": 2, "d_inner": 8, "n_layer": 1}
    made, family = from_hf(hf)
    save_model(family.build(made, hf), tmp_path)
    TOKENIZER.save(tmp_path)
    with pytest.raises(UserError, match="by itself"):
        load(tmp_path)


def test_command_line(directory: Path, loaded: Seq2Seq, capsys: pytest.CaptureFixture[str]) -> None:
    expected = loaded.generate("hello", max_tokens=8).text
    assert cli.main(["generate", str(directory), "hello", "max_tokens=8"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert cli.main(["generate", str(directory), "hello", "max_tokens=8", "--json"]) == 0
    assert '"finish_reason"' in capsys.readouterr().out
    assert cli.main(["generate", str(directory), "hello", "--chat"]) == 2
    assert "not messages" in capsys.readouterr().err
    searched = loaded.generate("hello", max_tokens=8, beams=4, length_penalty=0.5, early_stopping="never")
    assert searched.text != expected
    settings = ["max_tokens=8", "beams=4", "length_penalty=0.5", "early_stopping=never"]
    assert cli.main(["generate", str(directory), "hello", *settings]) == 0
    assert capsys.readouterr().out == searched.text + "\n"
    assert cli.main(["generate", str(directory), "hello", *settings, "temperature=1.0"]) == 2
    assert "neither temperature nor stop" in capsys.readouterr().err
    assert cli.main(["chat", str(directory)]) == 2
