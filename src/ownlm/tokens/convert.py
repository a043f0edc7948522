"""Vocabularies of every kind -> the one engine that encodes: a `tokenizers` backend.

    SentencePiece (Unigram, BPE with byte fallback) ─┐
    byte-level BPE: vocabulary + merges, or ranks ───┤
    WordPiece, CLIP's BPE ───────────────────────────┴─► Backend, in whose tokenizer.json all of it is written down

The result gives the ids of the tool that made the vocabulary: the tests compare with `sentencepiece`, `tiktoken`, llama.cpp and
transformers. A token that marks something (CONTROL in SentencePiece) is a special token here and never comes from text.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from ownlm.errors import UserError
from ownlm.tokens.patterns import CLIP, Words
from ownlm.tokens.sentencepiece import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, SentencePiece
from ownlm.tokens.stream import BYTE_OF

SPACE = "▁"  # SentencePiece's mark for a space
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
# A noncharacter (Unicode 23.7: never used for interchange) that does book-keeping inside a normaliser.
SEPARATOR = "\U0010ffff"
# "<0x0A>" as text must not become the piece that stands for byte 10. The cut is where no vocabulary has a piece across.
BYTE_PIECE = r"(?<=<0x[0-9A-F])[0-9A-F](?=>)"
# `Strip` would do, but breaks down on a text of nothing.
LAST_SPACE_OUT = decoders.Replace(Regex(r" \z"), "")


def sentencepiece(
    model: SentencePiece,
    *,
    first: Sequence[Any] = (),
    extra: Sequence[str] = (),
    rescore: Callable[[str, float], float] = lambda piece, score: score,
) -> Backend:
    """The backend of a SentencePiece vocabulary.

    `first` are normalisers of a family that run before SentencePiece's own, `extra` are special tokens that follow its pieces,
    `rescore` changes the score of a piece.
    """
    pieces = [*_unmatchable(model), *extra]
    if len(set(pieces)) < len(pieces):
        raise UserError("a piece stands in the vocabulary twice.", cure="Restore the file from its source.")
    defined = model.of_type(USER_DEFINED)
    splits = [re.escape(piece) for piece in sorted(defined, key=len, reverse=True)]
    if model.kind == "unigram":
        backend = Backend(_unigram(model, pieces, rescore))
        splits = [BYTE_PIECE] if model.byte_fallback else []
    else:
        backend = Backend(_bpe(model, pieces))
        splits += [BYTE_PIECE] if defined else []
    steps = _normalisers(model)
    for piece in defined if model.charsmap else []:
        if normalizers.Sequence(_charsmap(model.charsmap)).normalize_str(piece) != piece:
            raise UserError(
                f"the user-defined piece {piece!r} is changed by the vocabulary's own normaliser, which no tokenizer.json "
                "can express.",
                cure="Train the vocabulary without that piece.",
            )
    backend.normalizer = normalizers.Sequence([*first, *steps])
    if splits:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(splits)), behavior="isolated")
    steps = [decoders.Replace(SPACE, " ")] if model.escape_whitespaces else []
    steps += [decoders.ByteFallback()] if model.byte_fallback else []
    steps += [decoders.Fuse()]
    if model.add_dummy_prefix:
        steps += [LAST_SPACE_OUT if model.whitespace_as_suffix else decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token in [*model.of_type(UNKNOWN, CONTROL), *extra]]
    )
    return backend


def _unmatchable(model: SentencePiece) -> list[str]:
    """The pieces, with those that are never used (they fill a vocabulary up) renamed to what no text spells."""
    return [
        SEPARATOR + piece if type == UNUSED else piece for piece, type in zip(model.pieces, model.types, strict=True)
    ]


def _unigram(model: SentencePiece, pieces: Sequence[str], rescore: Callable[[str, float], float]) -> models.Unigram:
    scores = [score for score, type in zip(model.scores, model.types, strict=True) if type == NORMAL]
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    vocabulary = []
    for piece, score, type in zip(model.pieces, model.scores, model.types, strict=True):
        match type:
            case 1:
                vocabulary.append(rescore(piece, score))
            case 4:  # as in SentencePiece: it costs about as little as its characters could
                vocabulary.append(len(piece.encode()) * high - 0.1)
            case 5:
                vocabulary.append(low)
            case _:
                vocabulary.append(0.0)
    vocabulary += [0.0] * (len(pieces) - len(vocabulary))
    return models.Unigram(
        list(zip(pieces, vocabulary, strict=True)), unk_id=model.unk_id, byte_fallback=model.byte_fallback
    )


def _bpe(model: SentencePiece, pieces: Sequence[str]) -> models.BPE:
    normal = [
        (-score, id, piece)
        for id, (piece, score, type) in enumerate(zip(model.pieces, model.scores, model.types, strict=True))
        if type == NORMAL
    ]
    return models.BPE(
        vocab={piece: id for id, piece in enumerate(pieces)},
        merges=merges_of([piece for _, _, piece in sorted(normal)]),
        unk_token=None if model.unk_id is None else pieces[model.unk_id],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        # A user-defined piece stands between two splits and is taken whole; it has no merges.
        ignore_merges=USER_DEFINED in model.types,
    )


def merges_of(ranked: Sequence[str]) -> list[tuple[str, str]]:
    """Every pair that joins to a piece, best piece first: merging by pairs then equals merging by pieces.

    merges_of(["a", "b", "c", "bc", "abc"]) == [("b", "c"), ("a", "bc")]

    Where one piece has several pairs, both may stand in a text and share a symbol: in x·y·x with xy = yx·… merging by pieces
    takes the left one. That pair is cut where the piece overlaps with itself, so such cuts go first.
    """
    known = frozenset(ranked)
    merges = []
    for piece in ranked:
        size = len(piece)
        cuts = [cut for cut in range(1, size) if piece[:cut] in known and piece[cut:] in known]
        if len(cuts) > 1:
            cuts.sort(key=lambda cut: piece[cut:] != piece[: size - cut])
        merges += [(piece[:cut], piece[cut:]) for cut in cuts]
    return merges


def _normalisers(model: SentencePiece) -> list[Any]:
    steps: list[Any] = []
    if model.charsmap:
        steps += _charsmap(model.charsmap)
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix and not model.whitespace_as_suffix:
        steps += [normalizers.Prepend(" ")]
    if model.escape_whitespaces:
        steps += [normalizers.Replace(" ", SPACE)]
    mark = SPACE if model.escape_whitespaces else " "
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(rf"{mark}+\z"), "")]
    if model.add_dummy_prefix and model.whitespace_as_suffix:
        steps += [normalizers.Replace(Regex(r"(?<=[\s\S])\z"), mark)]
    return steps


def _charsmap(charsmap: bytes) -> list[Any]:
    """SentencePiece's table of replacements, exact for all its rules.

    SentencePiece replaces the longest sequence that its table knows. The `Precompiled` step looks up a letter with its marks as
    one and takes the first rule that fits its beginning, so that the marks of a full-width letter are lost. So each mark is
    set apart first, and composed again (the tables are made from NFKC) afterwards. One that begins a text stands apart already, and
    there the library ends in a panic where the character after it is dropped (tokenizers 0.23).
    """
    table = normalizers.Precompiled(charsmap)
    if table.normalize_str("e\u0301") != "é":  # somebody's own rules, which compose nothing
        return [table]
    apart = normalizers.Replace(Regex(r"(?!\A)(?=[\p{M}\u200c\u200d\uff9e\uff9f])|(?<=\r)(?=\n)"), SEPARATOR)
    return [apart, table, normalizers.Replace(SEPARATOR, ""), normalizers.NFC()]


def byte_level(
    vocabulary: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    words: Words,
    *,
    normaliser: Any = None,
    prefix_space: bool = False,
) -> Backend:
    """The backend of a byte-level BPE vocabulary, whose tokens are written in GPT-2's characters for bytes."""
    backend = Backend(models.BPE(vocab=dict(vocabulary), merges=list(merges), ignore_merges=words.whole_words))
    backend.normalizer = normaliser
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in words.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if prefix_space:  # this step puts the space before it splits, and so must split itself
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def ranks(tokens: Mapping[bytes, int], words: Words, *, special: Mapping[str, int], first: int = 0) -> Backend:
    """The backend of tiktoken's ranks: id = `first` + rank. Ids without a token, of which there may be a few between the ranks
    and the special tokens, get names that no text spells."""
    ranked = ["".join(map(CHARACTER_OF.__getitem__, token)) for token in sorted(tokens, key=tokens.__getitem__)]
    vocabulary = {piece: first + rank for piece, rank in zip(ranked, sorted(tokens.values()), strict=True)}
    taken = set(vocabulary.values())
    for token, id in special.items():
        if id in taken or token in vocabulary:
            raise UserError(f"the special token {token!r} has the id of another.", cure="Mend tokenizer_config.json.")
        taken.add(id)
    vocabulary |= special
    holes = set(range(max(taken, default=-1) + 1)) - taken
    vocabulary |= {f"{SEPARATOR}unused {id}": id for id in holes}
    backend = byte_level(vocabulary, merges_of(ranked), Words(words.patterns, whole_words=True))
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token in sorted(special, key=special.__getitem__)]
    )
    return backend


def wordpiece(
    vocabulary: Mapping[str, int],
    *,
    unknown: str = "[UNK]",
    lowercase: bool = True,
    strip_accents: bool | None = None,
    chinese_characters: bool = True,
) -> Backend:
    """BERT's backend; `strip_accents` None means that lower-casing decides."""
    if unknown not in vocabulary:
        raise UserError(f"the vocabulary lacks its unknown token {unknown!r}.", cure="Name it as unk_token.")
    backend = Backend(models.WordPiece(vocab=dict(vocabulary), unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=chinese_characters, strip_accents=strip_accents, lowercase=lowercase
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def clip(vocabulary: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> Backend:
    """CLIP's backend: byte-level BPE of lower-cased words that end in </w>."""
    backend = Backend(models.BPE(vocab=dict(vocabulary), merges=list(merges), end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # A decoder must give text: the bytes first, then a space for each word's end.
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Fuse(), LAST_SPACE_OUT]
    )
    return backend


def frame(backend: Backend, single: str) -> None:
    """Let special tokens stand around a text as in `single`, such as "<s> $A </s>", when the caller asks for them."""
    tokens = [part for part in single.split() if part != "$A"]
    ids = [(token, backend.token_to_id(token)) for token in tokens]
    if missing := [token for token, id in ids if id is None]:
        raise UserError(
            f"the vocabulary lacks {missing[0]!r}, which stands around every text.",
            cure="Name the tokens of this vocabulary in tokenizer_config.json.",
        )
    backend.post_processor = processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=ids)


def whole(backend: Backend) -> dict[str, Any]:
    """The tokenizer.json of a backend as data."""
    data: dict[str, Any] = json.loads(backend.to_str())
    return data
