"""A Tokenizer -> the vocabulary of a GGUF file, from which llama.cpp makes the same ids.

GGUF names one of a list of splits and kinds instead of describing them, so a tokenizer that is like none of the list can't be
written. What was written is read back and tried on texts of many kinds before anybody relies on it.
"""

import base64
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ownlm import gguf
from ownlm.errors import UserError
from ownlm.tokens import convert
from ownlm.tokens.codec import TURN_ENDS, Tokenizer
from ownlm.tokens.files import token_text
from ownlm.tokens.gguf import KEY, NAMED, from_gguf
from ownlm.tokens.patterns import PRE
from ownlm.tokens.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
USUAL = (
    "gpt-2",
    "llama-bpe",
    "qwen2",
    "gpt-4o",
    "deepseek-v3",
    "tekken",
)  # of several names for one split, these are written
# Texts in which splits and kinds differ: case, digits, marks, spaces and line ends, scripts with and without spaces.
PROBES = (
    "Hello, World! I'm HERE, you'Re there; we'LL see. don't DON'T can't",
    "one  two   three\n\n\nfour \t five\r\n  six \n seven    ",
    "0 12 345 6789 1,234,567.89 3.14159 2026-11-25 v1.2.3 x86_64 1st",
    "def f(x):\n    return x**2 + y[0] != 'a'  # café\n\n\t\tif (a&&b) {};//",
    "HelloWorld camelCase snake_case HTTPServer $100 #tag @name http://a.b/c?d=e&f=%20",
    "naïve façade Ångström, Straße; ¿qué? «oui» — … “quoted” ‘single’",
    "Привет, мир! Ёлка. Καλημέρα κόσμε. 你好，世界！ こんにちは世界。안녕하세요 세계",
    "नमस्ते दुनिया مرحبا بالعالم שלום עולם ภาษาไทย Tiếng Việt",
    "🚀 🤷🏽‍♀️ 👩‍👩‍👧 ½ ² ³ ٣٤ ⅷ ∑∞ ﷺ\u200b\u00a0\u3000x",
    "<s> </s> <|endoftext|> [CLS] <0x0A> ▁ Ġ Ċ",
    "a",
    " a",
    "\n",
    "'",
    "''''''```````\"\"\"\"......!!!!!!?????? ------",
)


def to_gguf(tokenizer: Tokenizer, vocab_size: int, *, ends: bool = False) -> dict[str, gguf.Value]:
    """The keys of a vocabulary of `vocab_size` tokens (a model may have more rows than its tokenizer has tokens). `ends`: the model
    reads texts with their end token, as encoders do. Raises UserError when llama.cpp would give other ids."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"it has {tokenizer.vocab_size} tokens, the model {vocab_size}.", where="tokenizer")
    whole = convert.whole(tokenizer.backend)
    kind = _kind(whole)
    texts, types = [f"[PAD{id}]" for id in range(vocab_size)], [UNUSED] * vocab_size
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in whole["added_tokens"]}
    for text, id in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        texts[id], types[id] = text, added.get(id, NORMAL)
    told: dict[str, gguf.Value] = {
        **KINDS[kind](tokenizer, whole, texts, types),
        "tokens": texts,
        "token_type": np.array(types, np.int32),
        **_special(tokenizer),
        "add_bos_token": np.bool_(tokenizer.bos_id is not None),
        "add_eos_token": np.bool_(ends),
    }
    metadata = {KEY + key: value for key, value in told.items()}
    if tokenizer.template is not None:
        metadata["tokenizer.chat_template"] = plain_template(tokenizer.template.source)
    again = from_gguf(metadata)
    if other := next((text for text in PROBES if again.encode(text) != tokenizer.encode(text)), None):
        raise _unlike(f"{told['pre']} gives other tokens for {other!r}")
    return metadata


def plain_template(source: str) -> str:
    """A chat template without the marks around what is trained, which llama.cpp doesn't know. `if true` takes the same white
    space away as they do."""
    return re.sub(
        r"({%[-+]?\s*)(end)?generation(?=\s*[-+]?%})", lambda tag: tag[1] + ("endif" if tag[2] else "if true"), source
    )


def _kind(whole: Mapping[str, Any]) -> str:
    model, decoder = whole["model"]["type"], whole["decoder"] or {}
    if model == "BPE":
        return "gpt2" if decoder.get("type") == "ByteLevel" else "llama"
    if model in ("WordPiece", "Unigram"):
        return "bert" if model == "WordPiece" else "t5"
    raise _unlike(f"there is nothing written for {model}")


def _gpt2(tokenizer: Tokenizer, whole: Mapping[str, Any], texts: list[str], types: list[int]) -> dict[str, gguf.Value]:
    """Byte-level BPE: the split is the one of the list that cuts the probes in the same places."""
    if whole["normalizer"] and whole["normalizer"]["type"] != "NFC":  # composed text is as good as all there is
        raise _unlike(f"there is no {whole['normalizer']['type']}")
    ours = [tokenizer.backend.pre_tokenizer.pre_tokenize_str(text) for text in PROBES]
    alone = bool(whole["model"].get("ignore_merges"))
    for pre, words in sorted(PRE.items(), key=lambda item: (item[1].whole_words != alone, item[0] not in USUAL)):
        split = convert.byte_level({}, [], words).pre_tokenizer
        if [split.pre_tokenize_str(text) for text in PROBES] == ours:
            return {"model": "gpt2", "pre": pre, "merges": [" ".join(pair) for pair in _merges(whole)]}
    raise _unlike("there is no such split into words")


def _llama(tokenizer: Tokenizer, whole: Mapping[str, Any], texts: list[str], types: list[int]) -> dict[str, gguf.Value]:
    """SentencePiece BPE: a piece's score is its place among the merges."""
    order: dict[str, int] = {}
    for left, right in _merges(whole):
        order.setdefault(left + right, len(order))
    scores = np.array([-float(order.get(text, len(order) + id)) for id, text in enumerate(texts)], np.float32)
    for id, text in enumerate(texts):
        if BYTE_TOKEN.fullmatch(text) and whole["model"].get("byte_fallback"):
            types[id] = BYTE
    if (unknown := whole["model"].get("unk_token")) in texts:
        types[texts.index(unknown)] = UNKNOWN
    prefix = texts[tokenizer.encode("a")[0]].startswith("▁")
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": np.bool_(prefix)}


def _bert(tokenizer: Tokenizer, whole: Mapping[str, Any], texts: list[str], types: list[int]) -> dict[str, gguf.Value]:
    """WordPiece: ▁ before what begins a word, instead of ## before what doesn't."""
    for id, text in enumerate(texts):
        if types[id] == NORMAL and not (text[0] == "[" and text[-1] == "]"):
            texts[id] = text[2:] if text.startswith("##") else "▁" + text
    return {"model": "bert", "pre": "jina-v2-en", "token_type_count": np.uint32(2)}


def _t5(tokenizer: Tokenizer, whole: Mapping[str, Any], texts: list[str], types: list[int]) -> dict[str, gguf.Value]:
    """SentencePiece Unigram: the score of each piece, and how text is normalised before."""
    pieces = whole["model"]["vocab"]
    scores = np.zeros(len(texts), np.float32)
    scores[: len(pieces)] = [score for _, score in pieces]
    unknown = int(whole["model"]["unk_id"])
    types[unknown] = UNKNOWN
    for id, text in enumerate(texts):
        if BYTE_TOKEN.fullmatch(text) and whole["model"].get("byte_fallback"):
            types[id] = BYTE
    told: dict[str, gguf.Value] = {
        "model": "t5",
        "pre": "default",
        "scores": scores,
        "unknown_token_id": np.uint32(unknown),
    }
    told["add_space_prefix"] = np.bool_(texts[tokenizer.encode("a")[0]].startswith("▁"))
    told["remove_extra_whitespaces"] = np.bool_(tokenizer.encode("a  a") == tokenizer.encode("a a"))
    if table := next(
        (step["precompiled_charsmap"] for step in _steps(whole["normalizer"]) if step["type"] == "Precompiled"), ""
    ):
        told["precompiled_charsmap"] = np.frombuffer(base64.b64decode(table), np.uint8)
    return told


def _steps(normalizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The normalizer's steps, one after another."""
    if normalizer is None:
        return []
    return [step for part in normalizer.get("normalizers", []) for step in _steps(part)] or [normalizer]


KINDS = {"gpt2": _gpt2, "llama": _llama, "bert": _bert, "t5": _t5}


def _merges(whole: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs, as either of tokenizer.json's versions has them."""
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in whole["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _special(tokenizer: Tokenizer) -> dict[str, gguf.Value]:
    """The ids of the named tokens, and of the one that ends a turn where another one ends a document."""
    known = tokenizer.backend.token_to_id
    named = {key: known(text) for name, key in NAMED.items() if (text := token_text(tokenizer.config.get(name)))}
    turns = [tokenizer.special[text] for text in TURN_ENDS if text in tokenizer.special]
    ends = [id for id in turns if id in tokenizer.stop_ids and id != named.get("eos_token_id")]
    named |= {"eot_token_id": ends[0]} if ends else {}
    return {key: np.uint32(id) for key, id in named.items() if id is not None}


def _unlike(why: str) -> UserError:
    return UserError(
        f"llama.cpp has no tokenizer like this one: {why}.",
        where="tokenizer",
        cure="Export it as a Hugging Face directory.",
    )
