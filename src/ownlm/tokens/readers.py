"""The tokenizer in a checkpoint's directory, whatever files it comes as -> a backend and its settings.

    tokenizer.json                        Hugging Face
    *.model                               SentencePiece, or Meta's Llama 3 ranks under the same name
    *.tiktoken                            ranks: a token in base64 and its number on each line
    tekken.json                           Mistral's ranks
    vocab.json + merges.txt               GPT-2, RoBERTa, Qwen2, CLIP
    vocab.txt                             WordPiece
    bpe_simple_vocab_16e6.txt.gz          CLIP's own

What these files leave open (lower-casing, the split into words, which tokens stand around a text) is decided by
`tokenizer_class` in tokenizer_config.json, or by `model_type` in config.json. A class that nothing here knows is an error: a guess
would give ids that look right.
"""

import base64
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Backend

from ownlm.errors import NotFound, UserError
from ownlm.tokens import convert, files
from ownlm.tokens.families import BERT_LIKE, CLASS_OF, GPT2_LIKE, RANKED, ROBERTA_LIKE, SHIFTED
from ownlm.tokens.files import RESTORE, declared_tokens, read_bytes, read_json, read_text, token_text
from ownlm.tokens.patterns import GPT2, QWEN2, Words
from ownlm.tokens.sentencepiece import check_charsmap, read_model

MAX_SPECIAL = 100_000  # tokens beside the ranks
CLIP_MERGES, CLIP_BYTES = 49152 - 256 - 2, 16 * 2**20


def read(path: Path) -> tuple[Backend, dict[str, Any]]:
    """The backend and the settings of the tokenizer in a directory. Raises NotFound, which names what was looked for."""
    config = files.settings(path)
    family = config.get("tokenizer_class") or CLASS_OF.get(str(read_json(path / "config.json").get("model_type")), "")
    family = str(family).removesuffix("Fast").removesuffix("Tokenizer")
    for pattern, reader in READERS:
        found = sorted(path.glob(pattern), key=lambda file: (file.name != "tokenizer.model", file.name))
        if not found:
            continue
        if len(found) > 1 and found[0].name != "tokenizer.model":
            names = ", ".join(file.name for file in found)
            raise UserError(f"several vocabularies: {names}.", where=str(path), cure="Keep the one that is meant.")
        try:
            backend = reader(found[0], config, family)
        except UserError as fault:
            if fault.where:
                raise
            raise UserError(fault.what, where=str(found[0]), cure=fault.cure) from None
        if reader is not _tokenizer_json:
            # All is written down in the backend now; transformers' own classes would guess it anew.
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            config.pop("added_tokens_decoder", None)
        return backend, config
    raise NotFound(
        f"there is no tokenizer: none of {', '.join(pattern for pattern, _ in READERS)}.",
        where=str(path),
        cure="Give the directory of a tokenizer or a checkpoint, or put the tokenizer's files beside the weights.",
    )


# Readers. Each may add to the settings what its kind of vocabulary has by default.


def _tokenizer_json(file: Path, config: dict[str, Any], family: str) -> Backend:
    text = read_text(file)
    for encoded in _charsmaps(text):
        try:
            check_charsmap(base64.b64decode(encoded, validate=True))
        except ValueError as fault:
            raise UserError(f"not a tokenizer: {fault}.", cure=RESTORE) from None
    try:
        return Backend.from_str(text)
    except Exception as fault:  # noqa: BLE001  (the library raises bare Exception)
        raise UserError(f"not a tokenizer: {fault}.", cure=RESTORE) from None


def _charsmaps(text: str) -> Iterator[str]:
    """The tables of characters in a tokenizer.json."""
    for part in text.split('"precompiled_charsmap"')[1:]:
        yield part[:1_000_000].partition('"')[2].partition('"')[0]


def _model(file: Path, config: dict[str, Any], family: str) -> Backend:
    data = read_bytes(file)
    if data[:1] != b"\n":  # every SentencePiece model begins with the field of its first piece
        return _ranks(file, config, family)
    model = read_model(data, str(file))
    if family in SHIFTED:
        raise UserError(
            f"{family}Tokenizer numbers the pieces of this file anew.",
            cure="Save its tokenizer.json with transformers (save_pretrained) and put it here.",
        )

    def named(**ids: int | None) -> None:
        for name, id in ids.items():
            if id is not None:
                config.setdefault(name, model.pieces[id])

    if family in ("T5", "MT5"):
        count = config.get("extra_ids", 100 if family == "T5" else 0)
        backend = convert.sentencepiece(model, extra=[f"<extra_id_{at}>" for at in reversed(range(count))])
        named(eos_token=model.eos_id, pad_token=model.pad_id, unk_token=model.unk_id)
        convert.frame(backend, f"$A {token_text(config['eos_token'])}")
    elif family in ("XLNet", "Albert"):
        backend = convert.sentencepiece(model, first=_cleaned(family, config), rescore=_no_digit_comma)
        named(bos_token=model.bos_id, eos_token=model.eos_id, pad_token=model.pad_id, unk_token=model.unk_id)
        cls, sep, mask = ("<cls>", "<sep>", "<mask>") if family == "XLNet" else ("[CLS]", "[SEP]", "[MASK]")
        for name, token in (("cls_token", cls), ("sep_token", sep), ("mask_token", mask)):
            config.setdefault(name, token)
        convert.frame(backend, f"$A {sep} {cls}" if family == "XLNet" else f"{cls} $A {sep}")
        # A text of XLNet ends in two tokens; neither begins it.
        config.setdefault("add_bos_token", family == "Albert")
    else:
        backend = convert.sentencepiece(model)
        named(bos_token=model.bos_id, eos_token=model.eos_id, pad_token=model.pad_id, unk_token=model.unk_id)
        begins = family in ("Llama", "CodeLlama", "Gemma", "Phi3")
        if model.bos_id is not None and config.get("add_bos_token", begins):
            convert.frame(backend, f"{token_text(config['bos_token'])} $A")
    _add_tokens(backend, file.parent, config)
    return backend


def _cleaned(family: str, config: Mapping[str, Any]) -> list[Any]:
    """What XLNet and ALBERT do to a text before SentencePiece sees it."""
    steps: list[Any] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not config.get("keep_accents", False):
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if config.get("do_lower_case", family == "Albert"):
        steps += [normalizers.Lowercase()]
    return steps


def _no_digit_comma(piece: str, score: float) -> float:
    """ "1," is never taken whole by these two: its comma belongs to the sentence."""
    return score - 100 if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit() else score


def _ranks(file: Path, config: dict[str, Any], family: str) -> Backend:
    tokens: dict[bytes, int] = {}
    try:
        for line in read_bytes(file).splitlines():
            if line:
                encoded, rank = line.split()
                tokens[base64.b64decode(encoded, validate=True)] = int(rank)
    except ValueError as fault:
        raise UserError(f"neither a SentencePiece model nor ranks: {fault}.", cure=RESTORE) from None
    _check_ranks(tokens)
    declared = {
        token["content"]: id for id, token in declared_tokens(file.parent, config).items() if token.get("special")
    }
    split, special = RANKED.get(len(tokens), (None, {}))
    split = config.get("pat_str", split)
    if not isinstance(split, str):
        raise UserError(
            f"{len(tokens)} ranks are of no family known here (known: {', '.join(map(str, RANKED))}).",
            cure='Name the split as "pat_str" and the special tokens as "added_tokens_decoder" in tokenizer_config.json.',
        )
    # The checkpoint's own names win over the family's.
    kept = {token: id for token, id in special.items() if id not in declared.values()}
    special = {**{token: id for token, id in kept.items() if token not in declared}, **declared}
    backend = convert.ranks(tokens, Words((split,)), special=special)
    for name, tokens_of in (("bos_token", ("<|begin_of_text|>",)), ("eos_token", ("<|end_of_text|>", "<|endoftext|>"))):
        for token in tokens_of:
            if token in special:
                config.setdefault(name, token)
    if config.get("bos_token") and config.get("add_bos_token", "<|begin_of_text|>" in special):
        convert.frame(backend, f"{token_text(config['bos_token'])} $A")
    return backend


def _check_ranks(tokens: Mapping[bytes, int]) -> None:
    values = set(tokens.values())
    if b"" in tokens or len(values) < len(tokens) or min(values, default=0) < 0 or max(values, default=0) > 2**22:
        raise UserError("its ranks are not numbers from 0 up, each once.", cure=RESTORE)
    if missing := [byte for byte in range(256) if bytes([byte]) not in tokens]:
        raise UserError(f"it has no token for byte {missing[0]}.", cure=RESTORE)


def _tekken(file: Path, config: dict[str, Any], family: str) -> Backend:
    data = read_json(file)
    try:
        settings, first = data["config"], int(data["config"]["default_num_special_tokens"])
        count = int(settings["default_vocab_size"]) - first
        names = {int(token["rank"]): token["token_str"].encode().decode() for token in data["special_tokens"]}
        words = islice(data["vocab"], count)
        tokens = {base64.b64decode(word["token_bytes"], validate=True): rank for rank, word in enumerate(words)}
        pattern = settings["pattern"].encode().decode()
        if not 0 <= first <= MAX_SPECIAL:
            raise ValueError(f"{first} special tokens")
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise UserError(
            f"not a tekken file that names its special tokens ({type(fault).__name__}: {fault}).",
            cure="Use the checkpoint's tokenizer.json, or a tekken.json of version 7 or later.",
        ) from None
    _check_ranks(tokens)
    special = {names.get(id, f"<SPECIAL_{id}>"): id for id in range(first)}
    backend = convert.ranks(tokens, Words((pattern,)), special=special, first=first)
    for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>")):
        if token in special:
            config.setdefault(name, token)
    if "<s>" in special:
        convert.frame(backend, "<s> $A")
    return backend


def _vocab_merges(file: Path, config: dict[str, Any], family: str) -> Backend:
    merges = file.with_name("merges.txt")
    if not merges.is_file():
        raise NotFound("there is no merges.txt beside vocab.json.", where=str(file.parent), cure=RESTORE)
    vocabulary = read_json(file)
    if not vocabulary or not all(isinstance(id, int) and not isinstance(id, bool) for id in vocabulary.values()):
        raise UserError("not a vocabulary of token and id.", cure=RESTORE)
    pairs = _pairs(read_text(merges).splitlines(), str(merges))
    if not family and "<|startoftext|>" in vocabulary and "!</w>" in vocabulary:
        family = "CLIP"
    try:
        if family == "CLIP":
            backend = convert.clip(vocabulary, pairs)
            _clip_names(backend, config)
        elif family in ROBERTA_LIKE:
            backend = convert.byte_level(vocabulary, pairs, Words((GPT2,)), prefix_space=_prefix(config))
            _defaults(config, bos="<s>", eos="</s>", sep="</s>", cls="<s>", unk="<unk>", pad="<pad>", mask="<mask>")
            convert.frame(backend, f"{token_text(config['cls_token'])} $A {token_text(config['sep_token'])}")
        elif family == "Qwen2":
            backend = convert.byte_level(vocabulary, pairs, Words((QWEN2,)), normaliser=normalizers.NFC())
            _defaults(config, eos="<|endoftext|>", pad="<|endoftext|>")
        elif family in GPT2_LIKE:
            backend = convert.byte_level(vocabulary, pairs, Words((GPT2,)), prefix_space=_prefix(config))
            _defaults(config, bos="<|endoftext|>", eos="<|endoftext|>")
            if config.get("add_bos_token"):
                convert.frame(backend, f"{token_text(config['bos_token'])} $A")
        else:
            raise _unknown_class(family, "vocab.json and merges.txt")
    except Exception as fault:
        if isinstance(fault, UserError):
            raise
        raise UserError(f"vocab.json and merges.txt don't fit together: {fault}.", cure=RESTORE) from None
    _add_tokens(backend, file.parent, config)
    return backend


def _clip_gz(file: Path, config: dict[str, Any], family: str) -> Backend:
    try:
        text = zlib.decompressobj(wbits=31).decompress(read_bytes(file), CLIP_BYTES).decode()
    except (zlib.error, ValueError) as fault:
        raise UserError(f"not a vocabulary of CLIP: {fault}.", cure=RESTORE) from None
    pairs = _pairs(text.splitlines()[1 : 1 + CLIP_MERGES], str(file))  # CLIP reads no more of it
    if len(pairs) != CLIP_MERGES:
        raise UserError(f"not a vocabulary of CLIP: {len(pairs)} merges instead of {CLIP_MERGES}.", cure=RESTORE)
    characters = [convert.CHARACTER_OF[byte] for byte in _clip_bytes()]
    names = [*characters, *(c + "</w>" for c in characters), *map("".join, pairs), "<|startoftext|>", "<|endoftext|>"]
    backend = convert.clip({name: id for id, name in enumerate(names)}, pairs)
    _clip_names(backend, config)
    return backend


def _clip_bytes() -> list[int]:
    """The bytes in CLIP's order: those that stand for themselves first."""
    return [byte for byte in range(256) if ord(convert.CHARACTER_OF[byte]) == byte] + [
        byte for byte in range(256) if ord(convert.CHARACTER_OF[byte]) != byte
    ]


def _clip_names(backend: Backend, config: dict[str, Any]) -> None:
    _defaults(config, bos="<|startoftext|>", eos="<|endoftext|>", pad="<|endoftext|>")
    convert.frame(backend, f"{token_text(config['bos_token'])} $A {token_text(config['eos_token'])}")


def _wordpiece(file: Path, config: dict[str, Any], family: str) -> Backend:
    lines = read_text(file).split("\n")
    vocabulary = {line.rstrip("\r"): id for id, line in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    if family == "MPNet":
        _defaults(config, cls="<s>", sep="</s>", bos="<s>", eos="</s>", unk="[UNK]", pad="<pad>", mask="<mask>")
    elif family in BERT_LIKE:
        _defaults(config, cls="[CLS]", sep="[SEP]", unk="[UNK]", pad="[PAD]", mask="[MASK]")
    else:
        raise _unknown_class(family, "vocab.txt")
    backend = convert.wordpiece(
        vocabulary,
        unknown=token_text(config["unk_token"]) or "",
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        chinese_characters=config.get("tokenize_chinese_chars", True),
    )
    convert.frame(backend, f"{token_text(config['cls_token'])} $A {token_text(config['sep_token'])}")
    _add_tokens(backend, file.parent, config)
    return backend


def _unknown_class(family: str, names: str) -> UserError:
    return UserError(
        f"{family}Tokenizer is no class that is known to come as {names}.",
        cure="Save its tokenizer.json with transformers (save_pretrained) and put it here.",
    )


Reader = Callable[[Path, dict[str, Any], str], Backend]
READERS: tuple[tuple[str, Reader], ...] = (
    ("tokenizer.json", _tokenizer_json),
    ("*.model", _model),
    ("*.tiktoken", _ranks),
    ("tekken.json", _tekken),
    ("vocab.json", _vocab_merges),
    ("vocab.txt", _wordpiece),
    ("bpe_simple_vocab_16e6.txt.gz", _clip_gz),
)


def _defaults(config: dict[str, Any], **names: str) -> None:
    for name, token in names.items():
        config.setdefault(f"{name}_token", token)


def _prefix(config: Mapping[str, Any]) -> bool:
    return bool(config.get("add_prefix_space", False))


def _pairs(lines: list[str], where: str) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise UserError("not a pair of tokens.", where=f"{where}:{number}", cure=RESTORE)
        pairs.append((parts[0], parts[1]))
    return pairs


def _add_tokens(backend: Backend, path: Path, config: Mapping[str, Any]) -> None:
    for id, token in declared_tokens(path, config).items():
        flags = {name: token[name] for name in ("lstrip", "rstrip", "single_word", "normalized") if name in token}
        added = AddedToken(token["content"], special=bool(token.get("special")), **flags)
        (backend.add_special_tokens if token.get("special") else backend.add_tokens)([added])
        if backend.token_to_id(token["content"]) != id:
            raise UserError(
                f"the added token {token['content']!r} has id {id} in the settings and "
                f"{backend.token_to_id(token['content'])} in the vocabulary.",
                where=str(path),
                cure="Restore the directory from its source.",
            )
