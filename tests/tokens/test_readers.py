"""Every set of files that a tokenizer comes in, against the tool that made it."""

import base64
import gzip
import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from gguf_metadata import read_metadata
from hypothesis import given, settings
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    CLIPTokenizer,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
    XLNetTokenizer,
)
from vocabularies import lines, vector, wide_texts

from ownlm.errors import NotFound, UserError
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.families import RANKED
from ownlm.tokens.patterns import GPT2, LLAMA3, TEKKEN
from ownlm.tokens.sentencepiece import read_model
from ownlm.tokens.stream import BYTE_OF

Write = Callable[..., Path]
BERT = "llama.cpp-vocab/models/ggml-vocab-bert-bge.gguf"
LLAMA = "llama.cpp-vocab/models/ggml-vocab-llama-bpe.gguf"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes files (text, bytes, or data as JSON) into a directory and returns it."""

    def make(**files: Any) -> Path:
        for name, content in files.items():
            path = tmp_path / name.replace("__", ".")
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return make


@cache
def gpt2_vocabulary() -> dict[str, int]:
    found: dict[str, int] = json.loads(vector("cs336/gpt2_vocab.json").read_text())
    return found


@cache
def gpt2_merges() -> str:
    return vector("cs336/gpt2_merges.txt").read_text()


@cache
def gpt2_ranks() -> dict[bytes, int]:
    pairs = gpt2_vocabulary().items()
    return {bytes(BYTE_OF[each] for each in token): id for token, id in pairs if token != "<|endoftext|>"}


@cache
def bert_vocabulary() -> str:
    tokens = read_metadata(vector(BERT))["tokenizer.ggml.tokens"]
    return "".join(
        (each[1:] if each[0] == "▁" else each if each[0] == "[" and each[-1] == "]" else "##" + each) + "\n"
        for each in tokens
    )


def rank_file(ranks: Mapping[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items())


def agree(one: Tokenizer, encode: Callable[[str], list[int]], examples: int = 100) -> None:
    """The same ids for all lines and any text, none of them special."""
    for line in lines():
        assert one.encode(line) == encode(line)

    @settings(max_examples=examples)
    @given(text=wide_texts())
    def check(text: str) -> None:
        assert one.encode(text) == encode(text)
        assert not set(one.encode(text)) & set(one.special.values())

    check()


# Byte-level BPE.


def test_gpt2_from_vocabulary_and_merges(write: Write) -> None:
    one = Tokenizer.load(write(vocab__json=gpt2_vocabulary(), merges__txt=gpt2_merges()))
    theirs = tiktoken.Encoding(
        "gpt2", pat_str=GPT2, mergeable_ranks=gpt2_ranks(), special_tokens={"<|endoftext|>": 50256}
    )
    agree(one, theirs.encode_ordinary)
    assert (one.vocab_size, one.bos_id, one.eos_id) == (50257, None, 50256)
    assert one.decode(one.encode("a\x00漢字😀 b")) == "a\x00漢字😀 b"


def test_gpt2_from_ranks_is_the_same(write: Write) -> None:
    one = Tokenizer.load(write(gpt2__tiktoken=rank_file(gpt2_ranks())))
    for line in lines():
        assert one.encode(line) == _gpt2().encode(line)
    assert (one.vocab_size, one.eos_id) == (50257, 50256)


@cache
def _gpt2() -> tiktoken.Encoding:
    encoding = tiktoken.Encoding("g", pat_str=GPT2, mergeable_ranks=gpt2_ranks(), special_tokens={})
    encoding.encode = encoding.encode_ordinary  # type: ignore[method-assign]
    return encoding


def test_llama3_ranks_under_the_name_of_metas_file(write: Write) -> None:
    tokens = read_metadata(vector(LLAMA))["tokenizer.ggml.tokens"][:128000]
    ranks = {bytes(BYTE_OF[each] for each in token): id for id, token in enumerate(tokens)}
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }}<|eot_id|>{% endfor %}"
    one = Tokenizer.load(write(tokenizer__model=rank_file(ranks), chat_template__jinja=template))
    special = RANKED[128000][1]
    theirs = tiktoken.Encoding("llama3", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens=special)
    agree(one, theirs.encode_ordinary, examples=60)
    assert one.vocab_size == 128256
    assert one.special == special
    assert one.document("hi")[0] == 128000
    assert one.document("hi").count(128000) == 1
    ids, _ = one.chat([{"role": "user", "content": "<|begin_of_text|>hi<|eot_id|>"}])
    assert (ids.count(128000), ids.count(128009)) == (1, 1)


def test_ranks_with_holes_and_own_names(write: Write) -> None:
    """cl100k's special tokens leave ids between them; a checkpoint may name its own, and its own split."""
    few = {token: rank for token, rank in gpt2_ranks().items() if rank < 1000}
    declared = {
        "1003": {"content": "<|endoftext|>", "special": True},
        "1010": {"content": "<|im_end|>", "special": True},
    }
    config = {"pat_str": LLAMA3, "added_tokens_decoder": declared}
    one = Tokenizer.load(write(own__tiktoken=rank_file(few), tokenizer_config__json=config))
    assert one.vocab_size == 1011
    assert one.special == {"<|endoftext|>": 1003, "<|im_end|>": 1010}
    theirs = tiktoken.Encoding("own", pat_str=LLAMA3, mergeable_ranks=few, special_tokens={})
    for line in lines()[:200]:
        assert one.encode(line) == theirs.encode_ordinary(line)
    one.save(one_path := write() / "again")
    assert Tokenizer.load(one_path).digest == one.digest


def test_tekken(write: Write) -> None:
    few = [token for token, rank in gpt2_ranks().items() if rank < 1200]
    data = {
        "config": {"pattern": TEKKEN, "default_vocab_size": 1010, "default_num_special_tokens": 10, "version": "v7"},
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for rank, token in enumerate(few)],
        "special_tokens": [
            {"rank": at, "token_str": name} for at, name in enumerate(("<unk>", "<s>", "</s>", "[INST]"))
        ],
    }
    one = Tokenizer.load(write(tekken__json=data))
    theirs = tiktoken.Encoding(
        "t", pat_str=TEKKEN, mergeable_ranks={token: rank for rank, token in enumerate(few[:1000])}, special_tokens={}
    )
    agree(one, lambda text: [10 + id for id in theirs.encode_ordinary(text)], examples=50)
    assert (one.vocab_size, one.bos_id, one.eos_id) == (1010, 1, 2)
    assert one.special["<SPECIAL_9>"] == 9
    del data["special_tokens"]
    with pytest.raises(UserError, match="names its special tokens"):
        Tokenizer.load(write(tekken__json=data))


def test_roberta_and_qwen2_beside_transformers(write: Write) -> None:
    """The same two files mean other ids, by the class that the settings name."""
    pairs = [tuple(line.split()) for line in gpt2_merges().splitlines() if not line.startswith("#")]
    added = {name: 50257 + at for at, name in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))}
    vocabulary = {**gpt2_vocabulary(), **added}
    folder = write(
        vocab__json=vocabulary, merges__txt="#version: 0.2\n" + gpt2_merges(), config__json={"model_type": "roberta"}
    )
    for config in ({}, {"add_prefix_space": True}):
        write(tokenizer_config__json=config)
        one, peer = Tokenizer.load(folder), RobertaTokenizer(vocab=vocabulary, merges=pairs, **config)
        for line in lines()[:300]:
            assert one.encode(line) == peer(line, add_special_tokens=False).input_ids
            assert one.document(line) == peer(line).input_ids
    write(tokenizer_config__json={"tokenizer_class": "Qwen2Tokenizer"})
    qwen, peer = Tokenizer.load(folder), Qwen2Tokenizer(vocab=gpt2_vocabulary(), merges=pairs)
    for line in [*lines()[:300], "e\u0301"]:
        assert qwen.encode(line) == peer(line).input_ids


# CLIP.


def test_clip_from_its_own_file_and_from_hugging_faces(write: Write) -> None:
    packed = vector("clip/bpe_simple_vocab_16e6.txt.gz")
    folder = write()
    shutil.copy(packed, folder)
    one = Tokenizer.load(folder)
    assert (one.vocab_size, one.bos_id, one.eos_id) == (49408, 49406, 49407)
    # Published in OpenAI's notebook and Hugging Face's documentation of CLIP.
    assert one.document("a photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert one.document("Hello world!") == [49406, 3306, 1002, 256, 49407]
    assert one.decode(one.encode("A  photo of\na CAT!")) == "a photo of a cat !"
    vocabulary = one.backend.get_vocab(with_added_tokens=True)
    merges = gzip.decompress(packed.read_bytes()).decode().splitlines()[1:48895]
    peer = CLIPTokenizer(vocab=vocabulary, merges=[tuple(line.split()) for line in merges])
    (folder / packed.name).unlink()
    write(vocab__json=vocabulary, merges__txt="\n".join(merges))
    again = Tokenizer.load(folder)
    for line in lines():
        assert one.encode(line) == again.encode(line) == peer(line, add_special_tokens=False).input_ids


# WordPiece.


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": False},
        {"strip_accents": False},
        {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    ],
)
def test_wordpiece_beside_transformers(config: dict[str, Any], write: Write) -> None:
    folder = write(
        vocab__txt=bert_vocabulary(), tokenizer_config__json={"tokenizer_class": "DistilBertTokenizer", **config}
    )
    one = Tokenizer.load(folder)
    vocabulary = {token: id for id, token in enumerate(bert_vocabulary().split("\n")[:-1])}
    peer = BertTokenizer(vocab=vocabulary, **config)
    agree(
        one, lambda text: list(peer(text, add_special_tokens=False, split_special_tokens=True).input_ids), examples=40
    )
    assert one.document("Hi") == peer("Hi").input_ids
    assert (one.bos_id, one.eos_id, one.pad_id) == (101, 102, 0)


# SentencePiece, by class.


def learn(prefix: Path, **options: Any) -> None:
    """A small SentencePiece model of its trainer."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(vector("sentencepiece/botchan.txt")),
        model_prefix=str(prefix),
        vocab_size=700,
        minloglevel=2,
        num_threads=1,
        **options,
    )


def test_t5_beside_transformers(write: Write) -> None:
    folder = write(tokenizer_config__json={"tokenizer_class": "T5Tokenizer", "extra_ids": 7})
    learn(folder / "spiece", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    one = Tokenizer.load(folder)
    model = read_model((folder / "spiece.model").read_bytes(), "")
    scored = [*zip(model.pieces, model.scores, strict=True), *((f"<extra_id_{at}>", 0.0) for at in reversed(range(7)))]
    peer = T5Tokenizer(vocab=scored, extra_ids=7, _spm_precompiled_charsmap=model.charsmap, split_special_tokens=True)
    assert (one.vocab_size, one.bos_id, one.eos_id, one.pad_id) == (707, None, 1, 0)
    for line in lines()[:200]:
        if len(line.split()) == len(line.split(" ")):  # transformers splits at any white space, SentencePiece at spaces
            assert one.document(line) == peer(line).input_ids
    assert one.special["<extra_id_0>"] == 706
    assert 706 not in one.encode("a <extra_id_0> b </s>")


def test_xlnet_ends_in_sep_and_cls(write: Write) -> None:
    folder = write()
    learn(folder / "spiece", control_symbols=["<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"])
    write(config__json={"model_type": "xlnet"})
    one = Tokenizer.load(folder)
    model = read_model((folder / "spiece.model").read_bytes(), "")
    peer = XLNetTokenizer(
        vocab=list(zip(model.pieces, model.scores, strict=True)), _spm_precompiled_charsmap=model.charsmap
    )
    for line in ("It is a café, isn't it?", "``Quoted''", "A   b"):
        ids = one.encode(line)
        assert [*ids, one.special["<sep>"], one.special["<cls>"]] == peer(line).input_ids
    assert one.bos_id is None
    assert one.eos_id == one.special["</s>"]
    assert [one.backend.id_to_token(id) for id in one.encode("17,")][-1] == ","


@pytest.mark.parametrize("model_type", ["llama", "mistral", None])
def test_llama2_begins_with_one_begin_token(model_type: str | None, write: Write) -> None:
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    folder = write(
        tokenizer__model=vector("karpathy-llama2.c/tokenizer.model").read_bytes(),
        chat_template__jinja=template,
        **({"config__json": {"model_type": model_type}} if model_type else {}),
    )
    one = Tokenizer.load(folder)
    assert one.document("Hello")[-2:] == [15043, 2]
    assert one.document("<s>Hello").count(1) == (
        1 if model_type else 0
    )  # the file alone doesn't say that it begins texts
    ids, _ = one.chat([{"role": "user", "content": "<s>Hello</s>"}])
    assert (ids.count(1), ids.count(2)) == (1, 0)


@pytest.mark.parametrize("kind", ["llama", "xlnet", "gpt2", "clip", "bert", "ranks"])
def test_transformers_reads_what_is_saved(kind: str, write: Write, tmp_path: Path) -> None:
    """A vocabulary of any kind is a tokenizer.json afterwards, from which transformers gives the same ids, framing included."""
    folder = write()
    match kind:
        case "llama":
            write(
                tokenizer__model=vector("karpathy-llama2.c/tokenizer.model").read_bytes(),
                config__json={"model_type": "llama"},
            )
        case "xlnet":
            learn(folder / "spiece", control_symbols=["<cls>", "<sep>", "<pad>", "<mask>"])
            write(config__json={"model_type": "xlnet"})
        case "gpt2":
            few = {token: id for token, id in gpt2_vocabulary().items() if id < 1256} | {"<|endoftext|>": 1256}
            merges = [line for line in gpt2_merges().splitlines() if not line.startswith("#")][:1000]
            write(vocab__json=few, merges__txt="\n".join(merges), config__json={"model_type": "gpt2"})
        case "clip":
            shutil.copy(vector("clip/bpe_simple_vocab_16e6.txt.gz"), folder)
        case "bert":
            write(vocab__txt=bert_vocabulary(), config__json={"model_type": "bert"})
        case "ranks":
            declared = {"1003": {"content": "<|endoftext|>", "special": True}}
            config = {"pat_str": LLAMA3, "added_tokens_decoder": declared}
            ranks = {token: rank for token, rank in gpt2_ranks().items() if rank < 1000}
            write(x__tiktoken=rank_file(ranks), tokenizer_config__json=config)
    one = Tokenizer.load(folder)
    one.save(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text(json.dumps({"model_type": {"ranks": "gpt2"}.get(kind, kind)}))
    again, peer = Tokenizer.load(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.digest == one.digest
    for line in lines()[:150]:
        ids = one.encode(line)
        assert peer(line, add_special_tokens=False).input_ids == again.encode(line) == ids
        begin, rest = ([one.bos_id] if one.bos_id is not None else []), {"xlnet": one.special.get("<sep>")}
        framed = peer(line).input_ids
        assert framed[: len(ids) + len(begin)] == [*begin, *ids], kind
        assert framed[len(ids) + len(begin) :][:1] in ([], [one.eos_id], [rest.get(kind)])


def test_torchtitan_tokenizer_json(write: Write) -> None:
    folder = write()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(vector(f"torchtitan/{name}"), folder)
    one, peer = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for line in lines():
        assert one.encode(line) == peer(line, add_special_tokens=False).input_ids
        assert one.decode(one.encode(line)) == peer.decode(one.encode(line))


# Faults.


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, r"no tokenizer: none of tokenizer\.json, \*\.model"),
        ({"vocab__json": {"a": 1}}, r"no merges\.txt beside vocab\.json"),
        ({"vocab__json": "{", "merges__txt": ""}, r"vocab\.json: not JSON"),
        ({"vocab__json": {"a": "b"}, "merges__txt": ""}, "not a vocabulary of token and id"),
        ({"vocab__json": {"a": 0}, "merges__txt": "a b c"}, r"merges\.txt:1: not a pair"),
        ({"vocab__json": {"a": 0}, "merges__txt": "a b"}, "don't fit together"),
        (
            {
                "vocab__json": {"a": 0},
                "merges__txt": "",
                "tokenizer_config__json": {"tokenizer_class": "BlenderbotTokenizer"},
            },
            "BlenderbotTokenizer is no class",
        ),
        ({"vocab__txt": "a\nb\n"}, r"vocab\.txt: the vocabulary lacks its unknown token '\[UNK\]'"),
        ({"vocab__txt": b"\xff\xfe"}, r"vocab\.txt: not text"),
        ({"vocab__txt": "[UNK]\n"}, r"vocab\.txt: the vocabulary lacks '\[CLS\]'"),
        ({"a__model": "x", "b__model": "y"}, r"several vocabularies: a\.model, b\.model"),
        ({"tokenizer__model": b"x 1\n"}, "neither a SentencePiece model nor ranks"),
        ({"tokenizer__model": b"\n\xff"}, "not a SentencePiece model"),
        ({"x__tiktoken": b"YQ== 0\n"}, "no token for byte 0"),
        ({"x__tiktoken": b"YQ== 0\nYg== 0\n"}, "ranks are not numbers from 0"),
        (
            {"x__tiktoken": rank_file({bytes([byte]): byte for byte in range(256)})},
            "256 ranks are of no family known here",
        ),
        ({"tekken__json": {}}, "not a tekken file"),
        ({"bpe_simple_vocab_16e6.txt.gz": b"\x1f\x8bxx"}, "not a vocabulary of CLIP"),
        ({"tokenizer__json": "{}"}, r"tokenizer\.json: not a tokenizer"),
        ({"tokenizer__json": "{", "tokenizer_config__json": "[" * 100_000}, r"tokenizer_config\.json: not JSON"),
        ({"tokenizer_config__json": {"bos_token": 7}}, r"tokenizer_config\.json: bos_token is not the text of a token"),
        ({"tokenizer_config__json": {"eos_token": "\ud800"}}, "eos_token is not the text of a token"),
        ({"tokenizer_config__json": {"chat_template": 7}}, "chat_template is not text"),
        ({"tokenizer_config__json": {"do_lower_case": "yes"}}, "do_lower_case is not true or false"),
        ({"tokenizer_config__json": {"extra_ids": 10**9}}, "extra_ids is not a number of tokens"),
        (
            {"vocab__txt": "[UNK]\n[CLS]\n[SEP]\n", "tokenizer_config__json": {"added_tokens_decoder": {"x": 1}}},
            r"added_tokens_decoder\.x is not a token under its id",
        ),
    ],
)
def test_what_is_wrong_is_said(files: dict[str, Any], says: str, write: Write) -> None:
    with pytest.raises(UserError, match=says):
        Tokenizer.load(write(**files))


def test_a_missing_tokenizer_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        Tokenizer.load(tmp_path)
    with pytest.raises(NotFound):
        Tokenizer.load(tmp_path / "nowhere")


def test_a_class_that_moves_ids_is_refused(write: Write) -> None:
    folder = write(
        sentencepiece__bpe__model=vector("sentencepiece/test_model.model").read_bytes(),
        config__json={"model_type": "xlm-roberta"},
    )
    with pytest.raises(UserError, match="XLMRobertaTokenizer numbers the pieces of this file anew"):
        Tokenizer.load(folder)


def test_a_packed_bomb_is_bounded(write: Write) -> None:
    bomb = gzip.compress(bytes(300 * 2**20), compresslevel=1)
    with pytest.raises(UserError, match=r"bpe_simple_vocab_16e6\.txt\.gz"):
        Tokenizer.load(write(**{"bpe_simple_vocab_16e6.txt.gz": bomb}))


def test_added_tokens_must_have_their_ids(write: Write) -> None:
    declared = {"50257": {"content": "<|pad|>", "special": True}, "50258": {"content": "<tool>", "special": False}}
    folder = write(
        vocab__json=gpt2_vocabulary(),
        merges__txt=gpt2_merges(),
        tokenizer_config__json={"added_tokens_decoder": declared},
    )
    one = Tokenizer.load(folder)
    assert one.special == {"<|endoftext|>": 50256, "<|pad|>": 50257}
    assert one.encode("<tool><|pad|>")[0] == 50258
    assert 50257 not in one.encode("<tool><|pad|>")
    write(tokenizer_config__json={"added_tokens_decoder": {"60000": {"content": "<|pad|>", "special": True}}})
    with pytest.raises(UserError, match="has id 60000 in the settings and 50257 in the vocabulary"):
        Tokenizer.load(folder)


def test_a_table_that_leads_outside_is_refused_in_tokenizer_json_too(write: Write) -> None:
    data = json.loads(vector("torchtitan/tokenizer.json").read_text())
    data["normalizer"] = {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(b"\x04\0\0\0\xff\xff\xff\x7f\0").decode(),
    }
    with pytest.raises(UserError, match="table of characters"):
        Tokenizer.load(write(tokenizer__json=data))
