"""Vocabularies into GGUF: real ones come back key for key, and what llama.cpp has nothing like is refused."""

import json
import shutil
from pathlib import Path

import jinja2
import numpy as np
import pytest
import sentencepiece
from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ownlm import gguf
from ownlm.errors import UserError
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.gguf import from_gguf
from ownlm.tokens.gguf_write import PROBES, plain_template, to_gguf
from ownlm.tokens.patterns import PRE
from ownlm.tokens.template import CHATML, ChatTemplate

VECTORS = Path(__file__).parents[3] / "shared" / "vectors"
VOCABULARIES = VECTORS / "llama.cpp-vocab" / "models"
needs_vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason="needs ../shared/vectors")


@needs_vectors
@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "llama-spm", "bert-bge"])
def test_real_vocabularies_come_back(name: str) -> None:
    """Of llama.cpp's own files every key, but for scores (whose order counts) and names that mean the same."""
    theirs = gguf.read(VOCABULARIES / f"ggml-vocab-{name}.gguf").metadata
    tokenizer = from_gguf(theirs)
    ours = to_gguf(tokenizer, tokenizer.vocab_size)
    for key, value in theirs.items():
        if not key.startswith("tokenizer.") or key in ("tokenizer.ggml.token_type_count", "tokenizer.ggml.scores"):
            continue
        if name == "bert-bge" and key == "tokenizer.ggml.pre":
            continue
        assert type(ours[key]) is type(value), key
        assert np.array_equal(ours[key], value), key
    if "tokenizer.ggml.scores" in theirs:
        normal = np.flatnonzero(theirs["tokenizer.ggml.token_type"] == 1)
        one, other = (np.asarray(each["tokenizer.ggml.scores"])[normal] for each in (theirs, ours))
        merged = np.array([len(theirs["tokenizer.ggml.tokens"][id]) > 1 for id in normal])  # type: ignore[index]
        assert np.array_equal(np.argsort(-one[merged], kind="stable"), np.argsort(-other[merged], kind="stable"))


@needs_vectors
def test_unigram(tmp_path: Path) -> None:
    """SentencePiece's own test model: pieces, scores and the table of characters as they are in its file."""
    shutil.copy(VECTORS / "sentencepiece" / "test_model.model", tmp_path / "spiece.model")
    names = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = Tokenizer.load(tmp_path)
    keys = to_gguf(tokenizer, tokenizer.vocab_size, ends=True)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.add_eos_token"]) == ("t5", True)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    count = theirs.vocab_size()
    assert keys["tokenizer.ggml.tokens"][:count] == [theirs.id_to_piece(id) for id in range(count)]  # type: ignore[index]
    normal = [id for id in range(count) if not (theirs.is_control(id) or theirs.is_unknown(id))]
    ours = keys["tokenizer.ggml.scores"][normal]  # type: ignore[index]
    assert np.allclose(ours, [theirs.get_score(id) for id in normal], rtol=1e-6)
    again = from_gguf(keys)
    assert [again.encode(text) for text in PROBES] == [theirs.encode(text) for text in PROBES]
    assert again.document("a b") == tokenizer.document("a b")


@needs_vectors
def test_the_same_ids_and_chat(tmp_path: Path) -> None:
    """A tokenizer with a template, special tokens and rows to spare."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(VECTORS / "torchtitan" / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    tokenizer = Tokenizer.load(tmp_path)
    keys = to_gguf(tokenizer, tokenizer.vocab_size + 7)
    assert len(keys["tokenizer.ggml.tokens"]) == tokenizer.vocab_size + 7  # type: ignore[arg-type]
    assert list(keys["tokenizer.ggml.token_type"][-7:]) == [5] * 7  # type: ignore[index]
    again = from_gguf(keys)
    assert [again.encode(text) for text in PROBES] == [tokenizer.encode(text) for text in PROBES]
    assert again.document("a b") == tokenizer.document("a b")
    chat = [{"role": "user", "content": "hi <|im_end|>"}, {"role": "assistant", "content": "yes"}]
    assert again.template is not None
    assert "generation %}" not in again.template.source
    assert (
        again.chat(chat[:1], add_generation_prompt=True)[0] == tokenizer.chat(chat[:1], add_generation_prompt=True)[0]
    )


MARKED = (
    "{% for m in messages %}\n<{{ m['role'] }}>\n"
    "{% if m['role'] == 'assistant' %}  {OPEN}\n {{ m['content'] }}\n  {CLOSE}\n|{% else %} {{ m['content'] }} {% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize(
    "opened", ["{% generation %}", "{%- generation %}", "{% generation -%}", "{%+ generation +%}", "{%generation%}"]
)
@pytest.mark.parametrize("closed", ["{% endgeneration %}", "{%- endgeneration -%}", "{%+ endgeneration %}"])
def test_the_marks_of_templates_go_and_their_white_space_stays(opened: str, closed: str) -> None:
    """Jinja without our tag prints what our own renderer prints with it."""
    source = MARKED.replace("{OPEN}", opened).replace("{CLOSE}", closed)
    chat = [{"role": "user", "content": "generation?"}, {"role": "assistant", "content": "no"}]
    ours = ChatTemplate(source, names={}, specials=["<s>"], stops=["<s>"]).render(chat).text
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    assert environment.from_string(plain_template(source)).render(messages=chat) == ours


def byte_level(**changes: object) -> Tokenizer:
    backend = Backend.from_str(json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "merges": [["a", "b"]],
            "vocab": {token: id for id, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"])},
        },
    }))  # fmt: skip
    for name, value in changes.items():
        setattr(backend, name, value)
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend, {"eos_token": "<|endoftext|>"})


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "gpt-4o", "tekken", "deepseek-v3", "smollm", "falcon"])
def test_the_split_is_recognised(pre: str) -> None:
    """By what it does, not by how it is written."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PRE[pre].patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    keys = to_gguf(byte_level(pre_tokenizer=pre_tokenizers.Sequence([*splits, last])), 300)
    assert PRE[str(keys["tokenizer.ggml.pre"])].patterns == PRE[pre].patterns


def test_gpt2s_own_split() -> None:
    assert to_gguf(byte_level(), 300)["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "there is no such split into words"),
        ({"pre_tokenizer": pre_tokenizers.Split(Regex("e"), "isolated")}, "there is no such split into words"),
        ({"normalizer": normalizers.Lowercase()}, "there is no Lowercase"),
        ({"decoder": decoders.Fuse()}, "llama.cpp has no tokenizer like this one"),
    ],
)  # fmt: skip
def test_what_llama_cpp_has_nothing_like(changes: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=r"llama.cpp has no tokenizer like this one") as raised:
        to_gguf(byte_level(**changes), 300)
    assert told in str(raised.value)


def test_a_model_with_too_few_rows() -> None:
    with pytest.raises(UserError, match="it has 258 tokens, the model 200"):
        to_gguf(byte_level(), 200)
