"""Answers of a given form: always of that form, and harmless however the form was meant."""

import json
import re
from typing import Any

import pytest

from hostile import forms
from ownlm.errors import UserError
from ownlm.generate.grammar import Form, Grammars
from ownlm.generate.sampling import Sampling
from tiny import tiny_model

MODEL = tiny_model(context=512)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 2},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}


def write(seed: int, **fields: Any) -> Any:
    return MODEL.generate("x", temperature=1.5, seed=seed, max_tokens=300, **fields)


@pytest.mark.parametrize("seed", range(6))
def test_json_of_a_schema(seed: int) -> None:
    answer = write(seed, json_schema=PERSON)
    if answer.finish_reason == "length":  # blanks without end are JSON too
        return
    found = json.loads(answer.text)
    assert set(found) == {"name", "age", "pets"}
    assert len(found["name"]) <= 8
    assert 0 <= found["age"] <= 99
    assert set(found["pets"]) <= {"cat", "dog"}


def test_at_least_one_answer_comes_to_its_end() -> None:
    assert any(write(seed, json_schema=PERSON).finish_reason == "stop" for seed in range(6))


@pytest.mark.parametrize("seed", range(4))
def test_a_regular_expression_and_a_grammar(seed: int) -> None:
    answer = write(seed, regex="(né|ab){2,5}[0-9]")
    assert re.fullmatch("(né|ab){2,5}[0-9]", answer.text)
    assert answer.finish_reason == "stop"
    assert re.fullmatch("hello [a-z]{2,4}", write(seed, grammar='start: "hello " NAME\nNAME: /[a-z]{2,4}/').text)


def test_greedy_takes_the_likeliest_of_what_is_allowed_and_tells_the_models_own_logprob() -> None:
    answer = MODEL.generate("x", max_tokens=1, regex="[QZ]")
    logprobs = MODEL.logits([MODEL.prompt_ids("x")])[0, -1].log_softmax(-1)
    allowed = [MODEL.tokenizer.encode(letter)[0] for letter in "QZ"]
    best = max(allowed, key=lambda id: float(logprobs[id]))
    assert answer.tokens == (best,)
    assert answer.logprobs[0] == pytest.approx(float(logprobs[best]), abs=1e-4)


def test_answers_of_a_form_and_others_share_a_batch() -> None:
    engine = MODEL.engine(4)
    prompt = MODEL.prompt_ids("x")
    free = Sampling(max_tokens=12, temperature=1.0, seed=3, stop_ids=frozenset())
    bound = Sampling(max_tokens=12, temperature=1.0, seed=3, form=Form("regex", "(ab)*c"))
    ids = [engine.add(prompt, sampling) for sampling in (free, bound)]
    tokens: dict[int, list[int]] = {id: [] for id in ids}
    while not engine.idle:
        for event in engine.step():
            tokens[event.request] += [event.token.id] if event.token else []
    assert tokens[ids[0]] == list(MODEL.generate("x", free).tokens)
    assert tokens[ids[1]] == list(MODEL.generate("x", bound).tokens)


def test_two_hundred_hostile_forms_are_built_or_refused() -> None:
    """`benchmarks/hostile_forms.py` measures the time each of them takes."""
    grammars = Grammars(MODEL.tokenizer, MODEL.decoder.config.vocab_size)
    refused: list[str] = []
    for kind, source in forms():
        try:
            matcher = grammars.matcher(Form(kind, source))
            for token in MODEL.tokenizer.encode('{"a": [1, ab'):
                if not matcher.allowed()[token] or matcher.accept(token):
                    break
        except UserError as fault:
            refused.append(str(fault))
    assert 50 < len(refused) < 150
    assert max(map(len, refused)) < 500


def test_faults_name_the_form() -> None:
    for fields, where in (
        ({"json_schema": "{"}, "json_schema"),
        ({"regex": "(" * 60 + ")" * 60}, "regex"),
        ({"regex": "a{99999}"}, "regex"),
        ({"grammar": "start: nowhere"}, "grammar"),
        ({"grammar": "x", "regex": "y"}, "one form"),
    ):
        with pytest.raises(UserError, match=where):
            MODEL.generate("x", **fields)
