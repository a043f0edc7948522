"""The vocabulary inside a GGUF file -> a Tokenizer that gives llama.cpp's ids.

A GGUF file carries its vocabulary as metadata: `tokenizer.ggml.model` names the kind, `tokens`, `scores`, `token_type` and
`merges` hold it, `pre` names the split into words of byte-level BPE. Nothing in the file describes that split, so a name that isn't
known here is an error: another split would give ids that look right.

    gpt2    byte-level BPE          bert    WordPiece, word beginnings marked with ▁ instead of ## inside
    llama   SentencePiece BPE       t5      SentencePiece Unigram
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from operator import index
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from ownlm import gguf
from ownlm.errors import UserError
from ownlm.tokens import convert
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.patterns import PRE
from ownlm.tokens.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePiece,
    check_charsmap,
)

KEY = "tokenizer.ggml."
# The name of each special token in Hugging Face's settings -> its key here (the spelling is GGUF's).
NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")
BEGINS = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
)
FRAMED = ("jina-v1-en", "jina-v2-code", "roberta-bpe")  # <s> text </s>


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer in a checkpoint's directory, or inside its GGUF file. Raises NotFound or UserError where there is none."""
    return from_gguf(gguf.read(path).metadata) if path.is_file() else Tokenizer.load(path)


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file, given its metadata as plain values (arrays as lists or numpy arrays).

    Raises UserError when the vocabulary is incomplete, of an unknown kind, or split in an unknown way.
    """
    kind = _text(metadata, "model")
    if kind not in KINDS:
        _fail(f"{KEY}model is {kind!r}, which is none of {', '.join(KINDS)}")
    tokens = [token or f"[EMPTY_{id}]" for id, token in enumerate(_list(metadata, "tokens", str))]
    types = bytes(_list(metadata, "token_type", int, default=[NORMAL] * len(tokens), count=len(tokens), high=BYTE))
    if len(set(tokens)) < len(tokens):
        _fail("a token stands in the vocabulary twice")

    ids = {name: _id(metadata, tokens, key) for name, key in NAMED.items()}
    config: dict[str, Any] = {name: tokens[id] for name, id in ids.items() if id is not None}
    made = KINDS[kind](metadata, tokens, types, config)
    config = {**made.names, **config}
    first = config.get("bos_token", config.get("cls_token"))
    begins, ends = (
        metadata.get(f"{KEY}add_{which}_token", usual) for which, usual in (("bos", made.begins), ("eos", made.ends))
    )
    if first is None and metadata.get(f"{KEY}add_bos_token"):
        _fail(f"{KEY}add_bos_token is set, and no bos_token_id")
    last = config.get(made.last)
    backend = made.backend
    convert.frame(backend, " ".join([*([first] if first and begins else []), "$A", *([last] if last and ends else [])]))
    config["add_bos_token"] = bool(begins and first)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    named = [text for name in NAMED if (text := config.get(name))]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in dict.fromkeys(named)])
    stops = [id for key in STOPS if (id := _id(metadata, tokens, key)) is not None]
    return Tokenizer(backend, config, stops=stops)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A backend, which tokens stand around a text where the file doesn't say so, and names of tokens that it leaves out."""

    backend: Backend
    begins: bool = False
    ends: bool = False
    last: str = "eos_token"
    names: Mapping[str, str] = field(default_factory=dict)


def _gpt2(metadata: Mapping[str, Any], tokens: list[str], types: bytes, config: Mapping[str, str]) -> Made:
    pre = str(metadata.get(KEY + "pre", "default"))
    if pre not in PRE:
        near = get_close_matches(pre, PRE, n=1)
        _fail(f"{KEY}pre is {pre!r}, a split into words that is not known here{f' (near: {near[0]})' if near else ''}")
    merges = []
    for merge in _list(metadata, "merges", str):
        left, _, right = merge[1:].partition(" ")
        merges.append((merge[:1] + left, right))
    backend = _checked(lambda: convert.byte_level({token: id for id, token in enumerate(tokens)}, merges, PRE[pre]))
    _add(backend, tokens, types)
    framed = pre in FRAMED
    if framed:
        return Made(backend=backend, begins=True, ends=True, last="sep_token")
    return Made(backend=backend, begins=pre in BEGINS)


def _llama(metadata: Mapping[str, Any], tokens: list[str], types: bytes, config: Mapping[str, str]) -> Made:
    model = SentencePiece(
        kind="bpe",
        pieces=tuple(tokens),
        scores=tuple(map(float, _list(metadata, "scores", float, count=len(tokens)))),
        types=types,
        add_dummy_prefix=bool(metadata.get(KEY + "add_space_prefix", True)),
        remove_extra_whitespaces=False,
        byte_fallback=BYTE in types,
        unk_id=_id(metadata, tokens, "unknown_token_id", 0),
    )
    return Made(backend=_checked(lambda: convert.sentencepiece(model)), begins=True)


def _t5(metadata: Mapping[str, Any], tokens: list[str], types: bytes, config: Mapping[str, str]) -> Made:
    charsmap = metadata.get(KEY + "precompiled_charsmap")
    try:
        table = b"" if charsmap is None else bytes(int(byte) & 255 for byte in charsmap)
        check_charsmap(table)
    except (TypeError, ValueError) as fault:
        _fail(f"{KEY}precompiled_charsmap: {fault}")
    model = SentencePiece(
        kind="unigram",
        pieces=tuple(tokens),
        scores=tuple(map(float, _list(metadata, "scores", float, count=len(tokens)))),
        types=types,
        charsmap=table,
        add_dummy_prefix=bool(metadata.get(KEY + "add_space_prefix", True)),
        remove_extra_whitespaces=bool(metadata.get(KEY + "remove_extra_whitespaces", False)),
        byte_fallback=BYTE in types,
        unk_id=_id(metadata, tokens, "unknown_token_id", 2),
    )
    eos = _id(metadata, tokens, "eos_token_id", 1)
    names = {} if eos is None else {"eos_token": tokens[eos]}
    return Made(backend=_checked(lambda: convert.sentencepiece(model)), ends=True, names=names)


def _bert(metadata: Mapping[str, Any], tokens: list[str], types: bytes, config: Mapping[str, str]) -> Made:
    def hugging_face(token: str, type: int) -> str:
        if token.startswith("▁"):
            return token[1:]
        return token if type != NORMAL or (token[0] == "[" and token[-1] == "]") else "##" + token

    pieces = [hugging_face(token, type) for token, type in zip(tokens, types, strict=True)]
    if len(set(pieces)) < len(pieces):
        _fail("a token stands in the vocabulary twice")
    words = [piece for piece, token in zip(pieces, tokens, strict=True) if token.startswith("▁")]
    # llama.cpp always lower-cases. A vocabulary with capitals was learned without that.
    cased = any(word != word.lower() for word in words)
    unknown = config.get("unk_token", "[UNK]")
    backend = _checked(
        lambda: convert.wordpiece({piece: id for id, piece in enumerate(pieces)}, unknown=unknown, lowercase=not cased)
    )
    _add(backend, pieces, types)
    names = {
        "cls_token": config.get("bos_token", "[CLS]"),
        "sep_token": config.get("eos_token", "[SEP]"),
        "unk_token": unknown,
    }
    return Made(backend=backend, begins=True, ends=True, last="sep_token", names=names)


KINDS = {"gpt2": _gpt2, "llama": _llama, "bert": _bert, "t5": _t5}


def _add(backend: Backend, tokens: Sequence[str], types: bytes) -> None:
    added = [
        AddedToken(token, special=type in (CONTROL, UNKNOWN), normalized=False)
        for token, type in zip(tokens, types, strict=True)
        if type in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    backend.add_tokens(added)


def _id(metadata: Mapping[str, Any], tokens: Sequence[str], key: str, default: int = -1) -> int | None:
    """The id under a key, where it is one of the vocabulary's."""
    try:
        id = index(metadata.get(KEY + key, default))
    except TypeError:
        _fail(f"{KEY}{key} is no number")
    return id if 0 <= id < len(tokens) else None


def _text(metadata: Mapping[str, Any], key: str) -> str:
    value = metadata.get(KEY + key)
    if not isinstance(value, str):
        _fail(f"there is no {KEY}{key}")
    return value


def _list(
    metadata: Mapping[str, Any],
    key: str,
    type: type,
    *,
    default: list[Any] | None = None,
    count: int | None = None,
    high: int | None = None,
) -> list[Any]:
    value = metadata.get(KEY + key, default)
    value = value.tolist() if hasattr(value, "tolist") else value
    accepted = (int, float) if type is float else type
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(isinstance(each, accepted) for each in value)
    ):
        _fail(f"{KEY}{key} is missing or no list of {type.__name__}")
    if count is not None and len(value) != count:
        _fail(f"{KEY}{key} has {len(value)} entries for {count} tokens")
    if high is not None and not all(0 <= each <= high for each in value):
        _fail(f"{KEY}{key} has an entry outside 0 to {high}")
    return list(value)


def _checked(build: Any) -> Backend:
    try:
        backend: Backend = build()
    except UserError:
        raise
    except Exception as fault:  # noqa: BLE001  (the library raises bare Exception)
        _fail(f"its vocabulary doesn't fit together: {fault}")
    return backend


def _fail(what: str) -> NoReturn:
    raise UserError(
        f"the GGUF file's tokenizer can't be used: {what}.", cure="Convert the model again, or use its checkpoint."
    )
