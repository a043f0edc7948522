"""The vocabulary inside a GGUF file -> a Tokenizer that gives llama.cpp's ids.

A GGUF file carries its vocabulary as metadata: `tokenizer.ggml.model` names the kind, `tokens`, `scores`, `token_type` and
`merges` hold it, `pre` names the split into words of byte-level BPE. Nothing in the file describes that split, so a name that isn't
known here is an error: another split would give ids that look right.

    gpt2    byte-level BPE          bert    WordPiece, word beginnings marked with ▁ instead of ## inside
    llama   SentencePiece BPE       t5      SentencePiece Unigram
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

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

    def token(key: str, default: int | None = None) -> str | None:
        id = metadata.get(KEY + key, default)
        return tokens[int(id)] if id is not None and 0 <= int(id) < len(tokens) else None

    config: dict[str, Any] = {name: text for name, key in NAMED.items() if (text := token(key))}
    backend, defaults = KINDS[kind](metadata, tokens, types, config)
    for name, text in defaults.items():
        config.setdefault(name, text)
    begins, ends = (
        metadata.get(f"{KEY}add_{which}_token", config.pop(f"add_{which}", False)) for which in ("bos", "eos")
    )
    first = config.get("bos_token") or config.get("cls_token")
    last = config.get("sep_token") if kind == "bert" or config.get("framed") else config.get("eos_token")
    config.pop("framed", None)
    if first is None and metadata.get(f"{KEY}add_bos_token"):
        _fail(f"{KEY}add_bos_token is set, and no bos_token_id")
    around = [*([first] if first and begins else []), "$A", *([last] if last and ends else [])]
    convert.frame(backend, " ".join(around))
    config["add_bos_token"] = bool(begins and first)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    named = [text for name in NAMED if (text := config.get(name))]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in dict.fromkeys(named)])
    stops = [int(metadata[KEY + key]) for key in STOPS if KEY + key in metadata]
    return Tokenizer(backend, config, stops=[id for id in stops if 0 <= id < len(tokens)])


def _gpt2(metadata: Mapping[str, Any], tokens: list[str], types: bytes, config: dict[str, Any]) -> Any:
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
    return backend, {"add_bos": pre in BEGINS or framed, "add_eos": framed, **({"framed": True} if framed else {})}


def _llama(metadata: Mapping[str, Any], tokens: list[str], types: bytes, config: dict[str, Any]) -> Any:
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
    return _checked(lambda: convert.sentencepiece(model)), {"add_bos": True, "add_eos": False}


def _t5(metadata: Mapping[str, Any], tokens: list[str], types: bytes, config: dict[str, Any]) -> Any:
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
    defaults = {"add_bos": False, "add_eos": True, **({} if eos is None else {"eos_token": tokens[eos]})}
    return _checked(lambda: convert.sentencepiece(model)), defaults


def _bert(metadata: Mapping[str, Any], tokens: list[str], types: bytes, config: dict[str, Any]) -> Any:
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
    unknown = config.setdefault("unk_token", "[UNK]")
    backend = _checked(
        lambda: convert.wordpiece({piece: id for id, piece in enumerate(pieces)}, unknown=unknown, lowercase=not cased)
    )
    _add(backend, pieces, types)
    if "cls_token" not in config and "bos_token" in config:
        config["cls_token"] = config["bos_token"]
    if "sep_token" not in config and "eos_token" in config:
        config["sep_token"] = config["eos_token"]
    return backend, {"add_bos": True, "add_eos": True, "cls_token": "[CLS]", "sep_token": "[SEP]"}


KINDS = {"gpt2": _gpt2, "llama": _llama, "bert": _bert, "t5": _t5}


def _add(backend: Backend, tokens: Sequence[str], types: bytes) -> None:
    added = [
        AddedToken(token, special=type in (CONTROL, UNKNOWN), normalized=False)
        for token, type in zip(tokens, types, strict=True)
        if type in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    backend.add_tokens(added)


def _id(metadata: Mapping[str, Any], tokens: Sequence[str], key: str, default: int) -> int | None:
    id = int(metadata.get(KEY + key, default))
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
