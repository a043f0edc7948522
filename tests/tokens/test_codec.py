"""The codec against transformers, and against text that tries to be what it is not."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from ownlm.errors import NotFound, UserError
from ownlm.records import Message
from ownlm.tokens import codec
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.train import Kind, build

TEXTS = [
    "Hello world, this is a test of 12 words.\n\n" * 10,
    "Grüße aus München! 漢字 😀 def f(x):\n    return x\n" * 10,
]
KINDS: tuple[Kind, ...] = ("bpe", "unigram", "wordpiece", "byte", "char")
LOSSLESS: tuple[Kind, ...] = ("bpe", "unigram", "byte")
TOKENIZERS = {kind: build(TEXTS, kind=kind, vocab_size=320) for kind in KINDS}
# Any character, and often the pieces that special tokens and word splits are made of.
PIECES = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<|im_",
    "end|>",
    "<",
    "<|",
    ">",
    "\n",
    " ",
    "  ",
    "'s",
    "\r\n",
    "\ue000",
    "é",
    "e\u0301",
    "😀",
]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=8).map("".join)


def talk(*contents: str) -> list[Message]:
    return [Message(role="assistant" if at % 2 else "user", content=text) for at, text in enumerate(contents)]


@pytest.mark.parametrize("kind", LOSSLESS)
@given(text=texts)
@example(text="\x00\x1c\u2028\ufeff\U0010ffff")
def test_any_text_survives_and_spells_no_special_token(kind: Kind, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


@pytest.mark.parametrize("kind", ["wordpiece", "char"])
@given(text=texts)
def test_lossy_kinds_spell_no_special_token_either(kind: Kind, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    assert not set(tokenizer.encode(text)) & set(tokenizer.special.values())


@pytest.mark.parametrize("kind", KINDS)
@given(contents=st.lists(texts, min_size=2, max_size=4), system=st.booleans())
def test_conversation_ids_and_mask(kind: Kind, contents: list[str], system: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    start, end = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]
    messages = [*([Message(role="system", content="Be brief.")] if system else []), *talk(*contents)]
    ids, trained = tokenizer.chat(messages)
    # The template alone decides how many special tokens there are.
    assert ids.count(start) == ids.count(end) == len(messages)
    # The mask covers exactly the assistant's content and the token that ends it.
    answers = [m.content for m in messages if m.role == "assistant"]
    expected = [id for answer in answers for id in [*tokenizer.encode(answer), end]]
    assert [id for id, mine in zip(ids, trained, strict=True) if mine] == expected
    # What the server feeds is what training saw, up to the first token of each answer.
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            prompt, _ = tokenizer.chat(messages[:turn], add_generation_prompt=True)
            assert ids[: len(prompt)] == prompt
            assert trained[len(prompt)]
            assert not trained[len(prompt) - 1]


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts, cut=st.integers(0, 10))
def test_a_stream_joins_to_the_decoded_text(kind: Kind, text: str, cut: int) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = [*tokenizer.encode(text)[cut:], tokenizer.eos_id]
    stream = tokenizer.decode_stream()
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_a_stream_never_emits_half_a_character() -> None:
    tokenizer = TOKENIZERS["byte"]
    stream = tokenizer.decode_stream()
    assert [stream.push(id) for id in tokenizer.encode("a😀b")] == ["a", "", "", "", "😀", "b"]
    assert stream.push(0xF0) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_passes_over_ids_that_only_the_model_has(kind: Kind) -> None:
    tokenizer = TOKENIZERS[kind]
    stream, (one, *_) = tokenizer.decode_stream(), tokenizer.encode("a")
    beyond = tokenizer.vocab_size + 7
    assert "".join([stream.push(one), stream.push(beyond), stream.push(one)]) + stream.finish() == tokenizer.decode(
        [one, beyond, one]
    )


@given(text=texts, size=st.integers(1, 9))
def test_a_long_text_is_cut_without_changing_an_id(text: str, size: int) -> None:
    whole = TOKENIZERS["bpe"].encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "PART_CHARACTERS", size)
        assert TOKENIZERS["bpe"].encode_batch([text]) == [whole]


def test_a_lone_surrogate_counts_as_a_replacement_character() -> None:
    tokenizer = TOKENIZERS["bpe"]
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.chat(talk("a\udfffb"))[0] == tokenizer.chat(talk("a\ufffdb"))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_ids(kind: Kind, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]
    tokenizer.save(tmp_path)
    # A checkpoint's config.json must not lure AutoTokenizer into another class.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    peer = AutoTokenizer.from_pretrained(tmp_path)
    assert (peer.eos_token_id, peer.pad_token_id, len(peer)) == (
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.vocab_size,
    )
    for text in [*TEXTS, "", " ", "unseen ŧëxt 123\t\n x", "a < b"]:
        ids = tokenizer.encode(text)
        assert peer(text).input_ids == ids
        assert peer.decode(ids) == tokenizer.decode(ids)
    messages = talk("Hello?", "Yes, 12.\n", "x <", "no")
    for prompt in (messages, messages[:3]):
        ids, trained = tokenizer.chat(prompt, add_generation_prompt=prompt is not messages)
        theirs = peer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in prompt],
            add_generation_prompt=prompt is not messages,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert theirs["input_ids"] == ids
        if kind != "wordpiece":  # transformers loses a span that ends in white space which the vocabulary drops
            assert theirs["assistant_masks"] == [int(mine) for mine in trained]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(kind: Kind, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.digest == tokenizer.digest
    assert (loaded.special, loaded.stop_ids, loaded.bos_id) == (tokenizer.special, tokenizer.stop_ids, None)
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").digest == tokenizer.digest
    assert tokenizer.document("Hi") == [*tokenizer.encode("Hi"), tokenizer.eos_id]


# Tokenizers of others.

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def llama(scheme: str) -> Backend:
    """A vocabulary like Llama 2's: <s> and </s> stand in the model, spaces are ▁, unknown characters are bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz[]/INST<>?s",
    ]
    vocabulary = {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


@pytest.fixture(params=["first", "always"])
def llama_directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    llama(request.param).save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": LLAMA_TEMPLATE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    return tmp_path


def test_a_llama_tokenizer_has_one_begin_token(llama_directory: Path) -> None:
    tokenizer = Tokenizer.load(llama_directory)
    peer = AutoTokenizer.from_pretrained(llama_directory)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, frozenset({2, 5}))
    assert tokenizer.document("hi é") == [*peer("hi é").input_ids, 2]
    assert tokenizer.decode(tokenizer.encode("hi é")) == "hi é"
    messages = talk("is it?", "yes", "a", "b")
    ids, trained = tokenizer.chat(messages)
    assert ids == peer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages], return_dict=False
    )
    assert ids.count(1) == 1
    assert (
        tokenizer.decode([id for id, mine in zip(ids, trained, strict=True) if mine], special=True) == "yes</s> b</s>"
    )
    prompt, _ = tokenizer.chat(messages[:1], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt
    assert trained.index(True) == len(prompt)


@pytest.fixture(scope="module")
def llama_tokenizer() -> Tokenizer:
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": LLAMA_TEMPLATE}
    return Tokenizer(llama("first"), config)


@given(contents=st.lists(st.text(alphabet="<s>/ab \n\ue000", max_size=8), min_size=2, max_size=4))
def test_messages_never_yield_a_llama_special_token(llama_tokenizer: Tokenizer, contents: list[str]) -> None:
    tokenizer = llama_tokenizer
    ids, _ = tokenizer.chat(talk(*contents))
    assert (ids.count(1), ids.count(2)) == (1, len(contents) // 2)
    stream = tokenizer.decode_stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


@given(text=st.text(alphabet="</s>ab ", max_size=12))
def test_a_unigram_piece_that_is_special_is_spelled_out(text: str) -> None:
    """T5's vocabulary holds </s> as a piece, so the model itself finds it in text."""
    scores = [("</s>", 0.0), ("<unk>", 0.0), *((piece, -3.0) for piece in ["▁", *"</s>ab"])]
    backend = Backend(models.Unigram(scores, unk_id=1))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"})
    assert 0 not in tokenizer.encode(text)
    assert 0 not in tokenizer.encode_batch([text])[0]
    assert tokenizer.decode(tokenizer.encode(text)).split() == text.split()


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no tokenizer: none of tokenizer\.json, \*\.model, .*, vocab\.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="vocab_size to at least 259"):
        build(TEXTS, kind="bpe", vocab_size=100)
    base = TOKENIZERS["byte"]
    bare = Tokenizer(base.backend, {**base.config, "chat_template": None})
    with pytest.raises(UserError, match="no chat template"):
        bare.chat(talk("a"))
    strict = "{% for m in messages %}{{ raise_exception('no system role') if m.role == 'system' }}{{ m.content }}{% endfor %}"
    strict_tokenizer = Tokenizer(base.backend, {**base.config, "chat_template": strict})
    with pytest.raises(UserError, match="no system role"):
        strict_tokenizer.chat([Message(role="system", content="x")])
    with pytest.raises(UserError, match="doesn't show which part"):
        strict_tokenizer.chat(talk("a", "b"))
    broken = Tokenizer(base.backend, {**base.config, "chat_template": "{% if %}"})
    with pytest.raises(UserError, match="can't be read"):
        broken.chat(talk("a"))


def test_an_untrusted_template_reaches_nothing() -> None:
    base = TOKENIZERS["byte"]
    for attack in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ range(999999999) }}",
    ):
        tokenizer = Tokenizer(base.backend, {**base.config, "chat_template": attack})
        with pytest.raises(UserError, match="chat template"):
            tokenizer.chat(talk("a"))


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_repeatable(kind: Kind) -> None:
    assert build(TEXTS, kind=kind, vocab_size=320).digest == TOKENIZERS[kind].digest
