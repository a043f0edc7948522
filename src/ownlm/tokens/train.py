"""Tokenizer training: documents -> a vocabulary of one of five kinds, in Hugging Face layout.

    bpe        byte-level byte-pair encoding (Sennrich et al. 2016; bytes as in GPT-2); any text, lossless
    unigram    byte-level Unigram language model (Kudo 2018); any text, lossless
    wordpiece  BERT's (Wu et al. 2016; Devlin et al. 2019), cased; white space is lost, unknown words become [UNK]
    byte       one token per UTF-8 byte; nothing to learn; lossless
    char       one token per character of the documents; characters never seen become <|unknown|>

Special tokens are added after training, outside the model's own vocabulary, so that no text can spell them.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from ownlm.artifact import Artifact, Workspace
from ownlm.errors import UserError
from ownlm.records import Conversation, Document, read_jsonl
from ownlm.report import Reporter
from ownlm.tokens.bpe import learn
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.patterns import QWEN2
from ownlm.tokens.stream import BYTE_OF
from ownlm.tokens.template import CHATML

Kind = Literal["bpe", "unigram", "wordpiece", "byte", "char"]
FrameName = Literal["chat", "bert", "t5", "xlnet"]
SMALLEST = {"bpe": 256, "unigram": 257, "wordpiece": 2, "byte": 256, "char": 2}  # without special tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The special tokens of a family of models: their roles in tokenizer_config.json, others, and how they stand around a text
    ($A) and a pair of texts ($A, $B)."""

    roles: dict[str, str]
    others: tuple[str, ...] = ()
    single: str | None = None
    pair: str | None = None

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.roles.values(), *self.others]))


FRAMES: dict[FrameName, Frame] = {
    "chat": Frame(
        roles={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, others=("<|im_start|>", "<|im_end|>")
    ),
    "bert": Frame(
        roles={"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    ),
    "t5": Frame(
        roles={"pad_token": "<pad>", "eos_token": "</s>"},
        others=tuple(f"<extra_id_{number}>" for number in range(100)),
        single="$A </s>",
        pair="$A </s> $B </s>",
    ),
    "xlnet": Frame(
        roles={"pad_token": "<pad>", "sep_token": "<sep>", "cls_token": "<cls>", "mask_token": "<mask>"},
        single="$A <sep> <cls>:2",
        pair="$A <sep> $B:1 <sep>:1 <cls>:2",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerRecipe:
    """How to train a tokenizer. `vocab_size` counts the special tokens too; a vocabulary may end up smaller when the
    documents don't hold that many pieces. At most `max_bytes` of text, spread over all documents, are learned from.
    `frame` chooses the special tokens: those of decoders that chat, of BERT (with [MASK]), of T5 (with a hundred sentinels)
    or of XLNet."""

    name: str
    documents: str
    kind: Kind = "bpe"
    vocab_size: int = 4096
    min_frequency: int = 2
    max_bytes: int = 100_000_000
    frame: FrameName = "chat"
    special_tokens: tuple[str, ...] = ()  # beside those of the frame


def train_tokenizer(recipe: TokenizerRecipe, workspace: Workspace, reporter: Reporter) -> Artifact:
    """A tokenizer artifact, learned from the training split and the conversations of a documents artifact."""
    documents = workspace.open(recipe.documents, "documents")
    inputs = {"documents": documents}
    if found := workspace.find(recipe.name, kind="tokenizer", inputs=inputs, recipe=recipe):
        return found
    with workspace.create("tokenizer", recipe.name, inputs=inputs, recipe=recipe) as draft:
        reporter.status(f"tokenizer: learning {recipe.vocab_size} {recipe.kind} tokens")
        tokenizer = build(
            _texts(documents, recipe.max_bytes),
            kind=recipe.kind,
            vocab_size=recipe.vocab_size,
            min_frequency=recipe.min_frequency,
            frame=recipe.frame,
            special_tokens=recipe.special_tokens,
        )
        tokenizer.save(draft.path)
        held_out = [text for _, text in zip(range(1000), _split(documents, "validation.jsonl"), strict=False)]
        tokens = sum(map(len, tokenizer.encode_batch(held_out)))
        draft.facts |= {
            "kind": recipe.kind,
            "vocab_size": tokenizer.vocab_size,
            "digest": tokenizer.digest,
            "validation_bytes_per_token": sum(len(text.encode()) for text in held_out) / max(1, tokens),
        }
    reporter.event("tokenizer", ref=draft.done.ref, **draft.facts)
    return draft.done


def build(
    texts: Iterable[str],
    *,
    kind: Kind,
    vocab_size: int,
    min_frequency: int = 2,
    frame: FrameName = "chat",
    special_tokens: Iterable[str] = (),
) -> Tokenizer:
    """A tokenizer of at most `vocab_size` ids learned from `texts`; always the same one from the same texts."""
    around = FRAMES[frame]
    specials = list(dict.fromkeys([*around.tokens, *special_tokens]))
    if any(len(token) < 2 for token in specials):
        raise UserError("a special token needs at least two characters.", cure='Write it like "<|name|>".')
    room = vocab_size - len(specials)
    if room < SMALLEST[kind]:
        raise UserError(
            f"a {kind} vocabulary of {vocab_size} is too small.",
            cure=f"Set vocab_size to at least {SMALLEST[kind] + len(specials)}.",
        )
    backend = TRAINERS[kind](texts, room, min_frequency)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if around.single is not None:
        ids = [(token, backend.token_to_id(token)) for token in specials]
        backend.post_processor = processors.TemplateProcessing(
            single=around.single, pair=around.pair, special_tokens=ids
        )
    named = set(around.roles.values())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **around.roles,
        "additional_special_tokens": [token for token in specials if token not in named],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    return Tokenizer(backend, config | ({"chat_template": CHATML} if frame == "chat" else {}))


def _byte_level(model: models.Model) -> Backend:
    backend = Backend(model)
    # Qwen2's split: words with their leading space, digits one by one, line ends apart. GGUF tools know it by name.
    split = pre_tokenizers.Split(Regex(QWEN2), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _bpe(texts: Iterable[str], vocab_size: int, min_frequency: int) -> Backend:
    # The library counts words on all cores. It has no room for a merge here: which of equally frequent pairs it takes first
    # depends on how it numbers them.
    counter = trainers.BpeTrainer(vocab_size=256, initial_alphabet=sorted(BYTE_OF), show_progress=False)
    _byte_level(models.BPE()).train_from_iterator(texts, counter)
    words = json.loads(counter.__getstate__())["BpeTrainer"]["words"]
    vocabulary, merges = learn(words, vocab_size, min_frequency)
    return _byte_level(models.BPE(vocab=vocabulary, merges=merges))


def _unigram(texts: Iterable[str], vocab_size: int, min_frequency: int) -> Backend:
    backend = _byte_level(models.Unigram())
    trainer = trainers.UnigramTrainer(vocab_size=vocab_size, initial_alphabet=sorted(BYTE_OF), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    # The trainer sums in the order of a hash map, and gives what it must keep but never saw a tail of scores, 0.0001 apart, in
    # that order. Rounding, one score for the tail, and sorting make the same vocabulary every time.
    scores = [(piece, round(score, 6)) for piece, score in json.loads(backend.to_str())["model"]["vocab"]]
    rising = sorted(score for _, score in scores)
    tail = next((low for low, high in pairwise(rising) if high - low > 0.00011), rising[-1])
    scores = [(piece, max(score, tail)) for piece, score in scores]
    backend.model = models.Unigram(sorted(scores, key=lambda item: (-item[1], item[0])))
    return backend


def _wordpiece(texts: Iterable[str], vocab_size: int, min_frequency: int) -> Backend:
    def bert(model: models.Model) -> Backend:
        backend = Backend(model)
        backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=False)
        return backend

    kept = list(texts)
    counts: Counter[str] = Counter()
    for text in kept:
        counts.update(text)
    # At most a third of the vocabulary is letters, each alone and inside a word. The trainer would number the latter in the
    # order of a hash map; naming them first makes training repeatable.
    letters = sorted(sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))[: vocab_size // 6])
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        special_tokens=["[UNK]", *letters, *(f"##{letter}" for letter in letters)],
        show_progress=False,
    )
    learner = bert(models.WordPiece(unk_token="[UNK]"))
    learner.train_from_iterator(kept, trainer)
    # A new tokenizer from the vocabulary alone: in the learner the letters count as special tokens.
    return bert(models.WordPiece(vocab=learner.get_vocab(), unk_token="[UNK]"))


def _byte(texts: Iterable[str], vocab_size: int, min_frequency: int) -> Backend:
    return _byte_level(models.BPE(vocab=BYTE_OF, merges=[]))


def _char(texts: Iterable[str], vocab_size: int, min_frequency: int) -> Backend:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    # Ties by code point, so that the order of documents doesn't matter.
    common = sorted((item for item in counts.items() if item[1] >= min_frequency), key=lambda item: (-item[1], item[0]))
    pieces = ["<|unknown|>", *(character for character, _ in common[: vocab_size - 1])]
    backend = Backend(models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=[], unk_token=pieces[0]))
    backend.decoder = decoders.Fuse()
    return backend


def _texts(documents: Artifact, max_bytes: int) -> Iterator[str]:
    """The training text, thinned evenly to about `max_bytes` when there is more."""
    names = [name for name in ("train.jsonl", "conversations.jsonl") if documents.has(name)]
    share = min(1.0, max_bytes / max(1, sum(documents.file(name).stat().st_size for name in names)))
    for index, text in enumerate(chain.from_iterable(_split(documents, name) for name in names)):
        if int((index + 1) * share) > int(index * share):
            yield text


def _split(documents: Artifact, name: str) -> Iterator[str]:
    if not documents.has(name):
        return
    path: Path = documents.file(name)
    if name.startswith("conversations"):
        for conversation in read_jsonl(path, Conversation):
            yield from (message.content for message in conversation.messages)
    else:
        yield from (document.text for document in read_jsonl(path, Document))


TRAINERS = {"bpe": _bpe, "unigram": _unigram, "wordpiece": _wordpiece, "byte": _byte, "char": _char}
