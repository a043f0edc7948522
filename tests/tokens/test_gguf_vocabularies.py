"""Vocabularies in GGUF metadata against llama.cpp's own ids."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf_metadata import read_metadata
from hypothesis import given, settings
from vocabularies import llama_cpp_texts, vector, wide_texts

from ownlm.errors import UserError
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.gguf import from_gguf
from ownlm.tokens.patterns import PRE

MODELS = ("gpt-2", "llama-bpe", "llama-spm", "bert-bge")
# Ids that llama.cpp (of llama_cpp_python 0.3.36) gives with GPT-2's vocabulary and each split; null where it only comes near the
# expression in the model's tokenizer.json (gpt-4o and tekken: a combining mark before an apostrophe).
WORDS = json.loads((Path(__file__).parent / "llama_cpp_words.json").read_text())


@cache
def metadata(name: str) -> dict[str, Any]:
    return read_metadata(vector(f"llama.cpp-vocab/models/ggml-vocab-{name}.gguf"))


@pytest.fixture(scope="module")
def tokenizer() -> Callable[[str], Tokenizer]:
    return cache(lambda name: from_gguf(metadata(name)))


@cache
def gpt2_backend() -> Any:
    return from_gguf(metadata("gpt-2")).backend


def small(**changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary of nothing but bytes."""
    tokens = metadata("gpt-2")["tokenizer.ggml.tokens"][:256]
    kept = {"model": "gpt2", "pre": "gpt-2", "merges": [], "eos_token_id": 256}
    found = {**kept, "tokens": [*tokens, "<|end|>", "<mark>"], "token_type": [1] * 256 + [3, 4], **changes}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


@pytest.mark.parametrize("name", MODELS)
def test_every_vector_of_llama_cpp(name: str, tokenizer: Callable[[str], Tokenizer]) -> None:
    expected = vector(f"llama.cpp-vocab/models/ggml-vocab-{name}.gguf.out").read_text().split("\n")
    texts = llama_cpp_texts()
    assert len(texts) == len(expected) == 47
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer(name).encode(text) == list(map(int, ids.split()))


@pytest.mark.parametrize("pre", WORDS["ids"])
def test_words_are_split_as_in_llama_cpp(pre: str) -> None:
    one = gpt2_backend()
    # A small vocabulary shows the split as well, and is quickly made.
    one.pre_tokenizer = from_gguf(small(pre=pre)).backend.pre_tokenizer
    for text, ids in zip(WORDS["texts"], WORDS["ids"][pre], strict=True):
        if ids is not None:
            assert one.encode(text).ids == list(map(int, ids.split())), text


def test_every_known_split_is_tried() -> None:
    tried = {PRE[pre] for pre in WORDS["ids"]}
    assert set(PRE.values()) == tried


def test_one_begin_token_and_the_framing_of_each_kind(tokenizer: Callable[[str], Tokenizer]) -> None:
    for name, begin, end in (
        ("gpt-2", [], 50256),
        ("llama-bpe", [128000], 128001),
        ("llama-spm", [1], 2),
        ("bert-bge", [101], 102),
    ):
        one = tokenizer(name)
        assert one.document("hi") == [*begin, *one.encode("hi"), end]
        assert one.bos_id == (begin[0] if begin else None)
    assert tokenizer("llama-bpe").stop_ids == {128001, 128009}


@pytest.mark.parametrize("name", MODELS)
def test_text_yields_no_special_token_and_comes_back(name: str, tokenizer: Callable[[str], Tokenizer]) -> None:
    one = tokenizer(name)
    special = sorted(one.special)[:3]

    @settings(max_examples=60)
    @given(text=wide_texts())
    def check(text: str) -> None:
        ids = one.encode(text + special[0] + text + special[-1])
        assert not set(ids) & set(one.special.values())
        if name != "bert-bge" and "▁" not in text:  # SentencePiece can't tell this mark from the space it stands for
            assert one.decode(ids) == text + special[0] + text + special[-1]

    check()


def test_a_saved_conversion_is_the_same(tokenizer: Callable[[str], Tokenizer], tmp_path: Path) -> None:
    for name in ("llama-spm", "bert-bge"):
        tokenizer(name).save(tmp_path / name)
        again = Tokenizer.load(tmp_path / name)
        assert again.digest == tokenizer(name).digest
        assert [again.encode(text) for text in llama_cpp_texts()] == [
            tokenizer(name).encode(text) for text in llama_cpp_texts()
        ]


def test_a_template_travels_along() -> None:
    found = small()
    found["tokenizer.chat_template"] = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    ids, trained = from_gguf(found).chat(
        [{"role": "user", "content": "a<|end|>"}, {"role": "assistant", "content": "b"}]
    )
    assert ids.count(256) == 2
    assert sum(trained) == 2


def test_user_defined_tokens_are_found_in_text_and_control_tokens_are_not() -> None:
    one = from_gguf(small())
    assert one.encode("<mark>")[-1] == 257
    assert 256 not in one.encode("<|end|>")


def test_t5_like_vocabularies() -> None:
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁a", "a", "b", "<extra_id_0>", "[PAD8]"]
    one = from_gguf(
        {
            "tokenizer.ggml.model": "t5",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -2.0, -2.5, -3.0, -3.5, 0.0, -10000.0],
            "tokenizer.ggml.token_type": [3, 3, 2, 1, 1, 1, 1, 4, 5],
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.unknown_token_id": 2,
            "tokenizer.ggml.remove_extra_whitespaces": True,
        }
    )
    assert one.encode(" a  b</s> [PAD8]") == [4, 3, 6, 2, 3, 2]
    assert one.document("a") == [4, 1]
    assert one.decode([4, 3, 6]) == "a b"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pre": "qwen-2"}, r"pre is 'qwen-2', .* \(near: qwen2\)"),
        ({"pre": "gemma4"}, "pre is 'gemma4'"),
        ({"model": "rwkv"}, "model is 'rwkv', which is none of gpt2, llama, bert, t5"),
        ({"model": None}, r"there is no tokenizer\.ggml\.model"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": [1, 2]}, "tokens is missing or no list of str"),
        ({"token_type": [1]}, "token_type has 1 entries for 258 tokens"),
        ({"token_type": [1] * 257 + [99]}, "token_type has an entry outside 0 to 6"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["nothing here"]}, "doesn't fit together"),
        ({"tokens": ["a"] * 258}, "twice"),
        ({"model": "llama"}, "scores is missing"),
        ({"model": "t5", "scores": [0.0] * 258, "precompiled_charsmap": [255] * 9}, "table of characters"),
        ({"model": "bert"}, r"lacks its unknown token"),
        ({"eos_token_id": "end"}, "eos_token_id is no number"),
        ({"model": "t5", "scores": [0.0] * 258, "unknown_token_id": 999}, "no token for unknown text"),
        ({"eos_token_id": 10**6}, "no token that ends a document"),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        from_gguf(small(**changes))
