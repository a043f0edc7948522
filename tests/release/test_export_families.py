"""Every family goes to a Hugging Face folder and back: the bytes of its tensors, what transformers computes from them, and the files
beside them that say how texts are cut, answers written and images prepared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoder_references
import pytest
import references
import seq2seq
import torch
import transformers
import vision_references
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import ownlm
from ownlm.checkpoints.weights import load_model, save_model
from ownlm.errors import ArtifactError, UserError
from ownlm.models.families import FAMILIES, from_hf
from ownlm.release import export as exporting
from ownlm.release.compare import TEXT, compare, numbers, sample
from ownlm.release.export import export
from ownlm.tokens.codec import Tokenizer
from tiny import tiny_tokenizer

IDS = torch.randint(11, 97, (2, 20), generator=torch.Generator().manual_seed(7))
Make = Callable[[Path], Any]
TEXTS: dict[str, Make] = {
    **{  # one of each model_type: its settings are for tests/models
        config["model_type"]: lambda path, c=config: references.save(c, path)
        for config in reversed(references.CONFIGS.values())
    },
    **{
        f"{name}-{kind}": lambda path, n=name, k=kind: encoder_references.save_encoder(n, k, path)
        for name, kind in encoder_references.CASES
        if name == "bert" or kind == "ForMaskedLM"
    },
    **{name: lambda path, n=name: seq2seq.save(n, path) for name in seq2seq.CONFIGS},
    "xlnet-labels": lambda path: seq2seq.save("xlnet", path, kind="XLNetForSequenceClassification"),
}
SEEING: dict[str, Make] = {
    name: lambda path, n=name: vision_references.save(n, path) for name in vision_references.CONFIGS
}


def said(name: str, model: Any) -> Tensor:
    """What transformers' model computes."""
    if name in SEEING:
        return vision_references.theirs(name, model)
    decoding = {"decoder_input_ids": IDS} if "t5" in name else {}
    with torch.no_grad():
        out = model(IDS, **decoding)
    key = next(key for key in ("logits", "prediction_logits", "start_logits", "last_hidden_state") if key in out)
    return out[key]


@pytest.mark.parametrize("name", [*TEXTS, *SEEING])
def test_every_family(name: str, tmp_path: Path) -> None:
    reference = (TEXTS | SEEING)[name](tmp_path / "theirs")
    done = export(tmp_path / "theirs", to="hf", out=tmp_path / "ours")
    assert done.comparison.max_difference == 0.0
    assert done.comparison.agreement == pytest.approx(1.0, abs=1e-6)
    assert done.comparison.max_value > 0.1
    assert (done.compared_tokens > 0, done.compared_images > 0) == (
        "clip-vision" not in name and name.split("-")[0] not in ("vit", "pixtral"),
        name in SEEING and "clip-text" not in name,
    )
    written, original = (
        {vision_references.plain(key): digest for key, digest in vision_references.digests(tmp_path / path).items()}
        for path in ("ours", "theirs")
    )
    assert written == original
    again, loading = type(reference).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(loading.values())
    before, after = (json.loads((tmp_path / path / "config.json").read_text()) for path in ("theirs", "ours"))
    assert {key: value for key, value in after.items() if value is not None or key in before} == before
    assert torch.equal(said(name, again.eval()), said(name, reference))


def test_no_family_is_left_out(tmp_path: Path) -> None:
    """Of all that transformers has a class for."""
    configs = [
        *references.CONFIGS.values(), *encoder_references.ENCODERS.values(), *seq2seq.CONFIGS.values(),
        *(config for _, config in vision_references.CONFIGS.values()),
    ]  # fmt: skip
    assert {config["model_type"] for config in configs} == FAMILIES.keys() - {"grok-1", "ownlm"}


@pytest.mark.parametrize("kind", ["grok-1", "t5"])
def test_without_transformers(kind: str, tmp_path: Path) -> None:
    """Grok-1, for which it has no class; and numbers of half the width, which stay what they were."""
    from test_grok import CONFIG

    hf = CONFIG if kind == "grok-1" else seq2seq.CONFIGS["t5-1.0"]
    config, family = from_hf(hf)
    model = family.build(config, hf)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    save_model(model, tmp_path / "theirs", dtype=torch.bfloat16)
    done = export(tmp_path / "theirs", to="hf", out=tmp_path / "ours")
    assert (done.comparison.max_difference, done.comparison.agreement, done.architecture) == (0.0, 1.0, kind)
    assert (tmp_path / "theirs" / "model.safetensors").read_bytes() == (
        tmp_path / "ours" / "model.safetensors"
    ).read_bytes()


def test_several_types_in_one_file(tmp_path: Path) -> None:
    """Each tensor goes out as it came in, and nothing is rounded on the way."""
    for make, kept in (
        (TEXTS["llama"], "norm"),
        (SEEING["clip-vision"], "position_embedding"),
        (TEXTS["bert-Model"], "dense"),
    ):
        theirs = tmp_path / kept
        make(theirs)
        tensors = load_file(theirs / "model.safetensors")
        tensors = {name: tensor if kept in name else tensor.bfloat16() for name, tensor in tensors.items()}
        save_file(tensors, theirs / "model.safetensors", metadata={"format": "pt"})
        assert export(theirs, to="hf", out=tmp_path / f"{kept}-again").comparison.max_difference == 0.0
        written, original = (vision_references.digests(path) for path in (tmp_path / f"{kept}-again", theirs))
        assert {vision_references.plain(name): digest for name, digest in written.items()} == {
            vision_references.plain(name): digest for name, digest in original.items()
        }


# What changes nothing: a key's bias under softmax; the last layers of a tower of which earlier states are read; the vectors of
# XLNet for masks and segments in a text without any.
UNREAD = ("k_proj.bias", "vision.layers.2.", "vision.last_norm", "embed_mask", "r_s_bias", "segments")


@pytest.mark.parametrize(
    "name",
    [
        "llama", "qwen3_moe", "bert-ForPreTraining", "bert-ForQuestionAnswering", "bert-ForTokenClassification",
        "t5-1.1", "xlnet", "xlnet-labels", "vit", "vit-bare", "clip", "clip-text-projected", "pixtral", "llava-clip", "mistral3",
    ],
)  # fmt: skip
def test_the_comparison_sees_every_weight(name: str, tmp_path: Path) -> None:
    (TEXTS | SEEING)[name](tmp_path)
    model = load_model(tmp_path)
    read = sample(model, None)
    before, unseen = numbers(model, read), []
    for key, parameter in model.named_parameters():
        kept = parameter.data.clone()
        parameter.data += torch.linspace(0.1, 0.4, kept.numel()).view_as(kept)
        if compare(before, numbers(model, read)).max_difference < 1e-3:
            unseen.append(key)
        parameter.data.copy_(kept)
    assert [
        key for key in unseen if not any(part in key for part in UNREAD if name != "clip" or part == UNREAD[0])
    ] == []


# ── The files beside the tensors ─────────────────────────────────────────────────────────────────────────────────────

WRITING = {
    "num_beams": 3,
    "max_new_tokens": 9,
    "length_penalty": 0.7,
    "eos_token_id": [256],
    "decoder_start_token_id": 0,
}
PICTURE = Image.fromarray(torch.randint(0, 256, (40, 70, 3), generator=torch.Generator().manual_seed(9)).byte().numpy())
SHOWS = "{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}{{ '<|im_start|>' }}{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"  # noqa: E501


def tokenizer_of(kind: str) -> Any:
    """A small one of the class that transformers gives this kind of model."""
    letters = sorted({*TEXT.lower()} - {" ", "\n"})
    if kind == "t5":
        pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
        words = [("▁", -3.0), ("▁the", -2.0), ("ship", -2.5), *((letter, -4.0) for letter in letters)]
        return transformers.T5Tokenizer(vocab=[*pieces, *words], extra_ids=5)
    if kind == "clip":
        merges = [("t", "h"), ("th", "e</w>"), ("s", "h"), ("sh", "i"), ("shi", "p")]
        signs = sorted(ByteLevel.alphabet())
        tokens = [*signs, *(f"{sign}</w>" for sign in signs), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
        return transformers.CLIPTokenizer(vocab={token: id for id, token in enumerate(tokens)}, merges=merges)
    return None


def furnished(kind: str, path: Path) -> Any:
    """A model of transformers with a tokenizer and all settings beside it."""
    path.mkdir()
    tokenizer = tokenizer_of(kind) or tiny_tokenizer()
    vocabulary = {"vocab_size": tokenizer.vocab_size if kind == "llava" else len(tokenizer)} if kind != "vit" else {}
    if kind == "t5":
        model = seq2seq.loud(seq2seq.T5 | vocabulary)
        model.generation_config = transformers.GenerationConfig(**WRITING)
    elif kind == "clip":
        text = (
            vision_references.CLIP_TEXT
            | vocabulary
            | {"eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 60}
        )
        model = vision_references.loud("CLIPModel", vision_references.CLIP | {"text_config": text})
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    elif kind == "vit":
        model = vision_references.loud(*vision_references.CONFIGS["vit"])
        ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(path)
    else:
        name, config = vision_references.CONFIGS["llava-clip"]
        text = config["text_config"] | vocabulary
        token = tokenizer.special["<|im_start|>"]
        model = vision_references.loud(name, config | {"text_config": text, "image_token_index": token})
        model.generation_config = transformers.GenerationConfig(do_sample=True, temperature=0.6, max_new_tokens=5)
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
        about = {"processor_class": "LlavaProcessor", "patch_size": 8, "image_token": "<|im_start|>"}
        (path / "processor_config.json").write_text(json.dumps(about))
        tokenizer = Tokenizer(tokenizer.backend, tokenizer.config | {"chat_template": SHOWS})
        tokenizer.save(path)
    if kind in ("t5", "clip"):
        tokenizer.save_pretrained(path)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("kind", ["t5", "clip", "vit", "llava"])
def test_files(kind: str, tmp_path: Path) -> None:
    reference = furnished(kind, tmp_path / "theirs")
    done = export(tmp_path / "theirs", to="hf", out=tmp_path / "ours")
    assert (done.comparison.max_difference, done.notes) == (0.0, ())
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    names = {file.name for file in theirs.iterdir()}
    assert {file.name for file in ours.iterdir()} >= names
    for name in names:
        if name.startswith(("generation", "preprocessor", "processor")):
            assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text()), name
    if kind != "vit":
        first, second = (transformers.AutoTokenizer.from_pretrained(path) for path in (theirs, ours))
        assert first(TEXT)["input_ids"] == second(TEXT)["input_ids"]
        assert first.chat_template == second.chat_template
    again = type(reference).from_pretrained(ours, attn_implementation="eager").eval()
    if kind == "t5":
        assert again.generation_config.to_diff_dict() == reference.generation_config.to_diff_dict()
        ids = first(["one two", "three"], return_tensors="pt", padding=True)
        assert torch.equal(again.generate(**ids), reference.generate(**ids))
        return
    kind_of = {"clip": CLIPImageProcessorPil, "llava": CLIPImageProcessorPil, "vit": ViTImageProcessorPil}[kind]
    first, second = (
        kind_of.from_pretrained(path)(PICTURE, return_tensors="pt")["pixel_values"] for path in (theirs, ours)
    )
    assert torch.equal(first, second)
    loaded = ownlm.load(ours)
    if kind == "llava":
        chat = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What?"}]}]
        assert loaded.generate(chat, max_tokens=8) == ownlm.load(theirs).generate(chat, max_tokens=8)
        assert again.generation_config.to_diff_dict() == reference.generation_config.to_diff_dict()
    elif kind == "vit":
        with torch.no_grad():
            expected = reference(first).logits.softmax(-1)[0].tolist()
        assert [loaded.classify_image(PICTURE)[label] for label in loaded.labels] == pytest.approx(expected, abs=1e-5)
    else:
        assert torch.equal(loaded.embed_images([PICTURE]), ownlm.load(theirs).embed_images([PICTURE]))
        assert torch.equal(loaded.embed(["ships"]), ownlm.load(theirs).embed(["ships"]))


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    vision_references.save("clip", tmp_path / "clip")
    assert export(tmp_path / "clip", to="hf", out=tmp_path / "again").notes == (
        "There is no tokenizer with the model.",
        "There is no preprocessor_config.json with the model, which says how images are prepared.",
    )
    with pytest.raises(UserError, match=r"a model of type clip can't be written as GGUF. Export it with to=\"hf\""):
        export(tmp_path / "clip", out=tmp_path / "clip.gguf")
    assert not (tmp_path / "clip.gguf").exists()


def test_a_tokenizer_that_comes_back_as_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnished("t5", tmp_path / "theirs")
    kept = Tokenizer.save

    def damaging(self: Tokenizer, path: Path) -> None:
        kept(self, path)
        file = path / "tokenizer.json"
        file.write_text(file.read_text().replace('"ship"', '"shop"', 1))

    monkeypatch.setattr(Tokenizer, "save", damaging)
    with pytest.raises(ArtifactError, match="reads back as another one"):
        export(tmp_path / "theirs", to="hf", out=tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_damaged_result_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back is read from the disk: a weight that changed on its way is a difference."""
    seq2seq.save("t5-1.0", tmp_path / "theirs")

    def damaging(model: Any, folder: Path, **settings: Any) -> None:
        save_model(model, folder, **settings)
        other = load_model(folder)
        other.decoder[1].mlp.down_proj.weight.data[3, 4] += 1
        save_model(other, folder)

    monkeypatch.setattr(exporting, "save_model", damaging)
    done = export(tmp_path / "theirs", to="hf", out=tmp_path / "ours")
    assert done.comparison.max_difference > 0.01
    assert done.comparison.agreement < 1
    assert "same choice at" in done.told
