"""Images from the file to the answer, against transformers' models and processors: CLIP, ViT, chats with images."""

import base64
import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import ownlm
from ownlm import cli
from ownlm.errors import ContextTooLong, UserError
from ownlm.generate.model import Model
from ownlm.generate.opening import load, load_decoder
from ownlm.generate.vision import ImageClassifier, ImageText
from ownlm.tokens.codec import Tokenizer

TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8,
    "image_size": 32,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip
SPECIAL = ("<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
# In the layout of Pixtral's own: contents are texts, or lists of chunks.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for chunk in message['content'] %}"
    "{% if chunk['type'] == 'text' %}{{ chunk['text'] }}{% elif chunk['type'] == 'image' %}{{ '[IMG]' }}{% endif %}"
    "{% endfor %}{% endif %}{{ '[/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / (4 + seed) + c) * np.cos(y / 7 - c) for c in range(3)], -1) * 80 + 128
    return Image.fromarray((waves + rng.normal(0, 25, waves.shape)).clip(0, 255).astype(np.uint8))


IMAGES = [picture(40, 30, 1), picture(64, 20, 2), picture(33, 70, 3)]


def loud(kind: str, config: Any, path: Path, size: float = 0.3) -> Any:
    model = getattr(transformers, kind)._from_config(config, attn_implementation="eager").float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * size
            parameter.copy_(noise + 1.0 if parameter.ndim == 1 and key.endswith("weight") else noise)
    model.save_pretrained(path)
    return model.eval()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).abs().max()) <= 2e-5 * max(1.0, float(theirs.abs().max()))


# ── CLIP ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def clip_tokenizer() -> Any:
    letters = sorted(ByteLevel.alphabet())
    merges = ["a t</w>", "c at</w>", "p h", "ph o", "t o</w>", "o f</w>", "d o", "do g</w>"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[tuple(merge.split()) for merge in merges])


@pytest.fixture(scope="module", params=["first end token", "highest id"])
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    """(directory, transformers' model, tokenizer and image processor)."""
    path, tokenizer = tmp_path_factory.mktemp("clip"), clip_tokenizer()
    eos = 2 if request.param == "highest id" else tokenizer.eos_token_id
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 40, "eos_token_id": eos,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=16)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model = loud("CLIPModel", config, path)
    tokenizer.save_pretrained(path)
    processor.save_pretrained(path)
    return path, model, tokenizer, processor


TEXTS = ["a photo of a cat.", "Dog", "a photo  of\nthe   CAT, and of a dog!", "", "日本 é"]


def test_clip_equals_transformers(clip: Any) -> None:
    path, reference, tokenizer, processor = clip
    model = load(path)
    assert isinstance(model, ImageText)
    with torch.no_grad():
        inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
        out = reference(**inputs, pixel_values=processor(IMAGES, return_tensors="pt")["pixel_values"])
    for text, row, mask in zip(TEXTS, inputs["input_ids"], inputs["attention_mask"], strict=True):
        assert model.tokenizer.document(text) == row[mask.bool()].tolist()
    assert close(model.embed_images(IMAGES), out.image_embeds)
    assert close(model.embed(TEXTS), out.text_embeds)
    assert close(model.similarity(IMAGES, TEXTS), out.logits_per_image)
    assert close(model.embed("Dog"), out.text_embeds[1:2])


def test_zero_shot(clip: Any) -> None:
    path, reference, tokenizer, processor = clip
    model, labels = load(path), ["cat", "dog", "{} of 0"]
    found = model.classify_image(IMAGES[0], labels)
    inputs = tokenizer([f"a photo of a {label}." for label in labels], padding=True, return_tensors="pt")
    pixels = processor(IMAGES[:1], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = reference(**inputs, pixel_values=pixels).logits_per_image.softmax(-1)[0]
    assert [found[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-5)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert model.classify_image(IMAGES[0], labels, "{}") != found
    many = model.classify_images(IMAGES * 30, labels)  # more than one batch
    assert len(many) == 90
    assert many[60] == pytest.approx(found, abs=1e-5)


def test_clip_refuses(clip: Any) -> None:
    model = load(clip[0])
    with pytest.raises(ContextTooLong):
        model.embed("x " * 50)
    with pytest.raises(UserError, match="different labels"):
        model.classify_image(IMAGES[0], ["cat", "cat"])
    with pytest.raises(UserError, match="different labels"):
        model.classify_image(IMAGES[0], "cat")
    with pytest.raises(UserError, match="no place for the label"):
        model.classify_image(IMAGES[0], ["cat"], "a photo")
    assert model.similarity([], ["a"]).shape == (0, 1)
    assert model.similarity(IMAGES, []).shape == (3, 0)
    with pytest.raises(UserError, match="looks at images and writes nothing"):
        load_decoder(clip[0])


def test_images_are_classified_on_the_command_line(
    clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OWNLM_HOME", str(tmp_path / "home"))
    IMAGES[0].save("a.png")
    IMAGES[1].save("b.png")
    model = str(clip[0])
    assert cli.main(["classify", model, "a.png", "b.png", "--labels", "cat, dog,bicycle", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["a.png", "b.png"]
    expected = load(clip[0]).classify_images(IMAGES[:2], ["cat", "dog", "bicycle"])
    assert [row["labels"] for row in rows] == [pytest.approx(one, abs=1e-5) for one in expected]
    for words, told in (
        (["a.png"], "needs labels to choose from"),
        (["none.png", "--labels", "cat,dog"], "none.png"),
        (["a.png", "--labels", "cat,cat"], "different labels"),
    ):
        assert cli.main(["classify", model, *words]) == 2
        assert told in capsys.readouterr().err


def test_the_how_to_runs(
    clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/how-to/images.md, with another CLIP of that name."""
    monkeypatch.chdir(tmp_path)
    Path("clip-vit-base-patch32").symlink_to(clip[0])
    IMAGES[0].save("photo.jpg")
    IMAGES[1].save("other.png")
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "images.md").read_text()
    first, second, _ = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(first + second, {})  # noqa: S102  (our own page)
    printed = capsys.readouterr().out.splitlines()
    assert {word for word in ("cat", "dog", "bicycle") if f"'{word}'" in printed[0]} == {"cat", "dog", "bicycle"}
    assert printed[1] in ("0", "1")
    monkeypatch.setenv("OWNLM_HOME", str(tmp_path / "home"))
    (command,) = re.findall(r"```sh\nownlm (classify .*)\n```", page)
    assert cli.main(shlex.split(command)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert (printed[0], printed[2]) == ("photo.jpg", "other.png")


# ── ViT ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_vit_equals_transformers(tmp_path: Path) -> None:
    labels = {0: "tabby", 1: "beagle", 2: "tench"}
    reference = loud("ViTForImageClassification", transformers.ViTConfig(**TOWER, id2label=labels), tmp_path)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert isinstance(model, ImageClassifier)
    assert model.labels == ("tabby", "beagle", "tench")
    with torch.no_grad():
        pixels = processor(IMAGES, return_tensors="pt")["pixel_values"]
        logits, hidden = reference(pixels).logits, reference.vit(pixels).last_hidden_state[:, 0]
    for found, row in zip(model.classify_images(IMAGES), logits.softmax(-1), strict=True):
        assert [found[label] for label in labels.values()] == pytest.approx(row.tolist(), abs=1e-5)
    assert close(model.embed_images(IMAGES), torch.nn.functional.normalize(hidden, dim=-1))
    assert model.classify_image(IMAGES[1]) == pytest.approx(model.classify_images(IMAGES)[1], abs=1e-5)


def test_towers_by_themselves(tmp_path: Path) -> None:
    loud("CLIPVisionModel", transformers.CLIPVisionConfig(**TOWER), tmp_path / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "clip"
    )
    model = load(tmp_path / "clip")
    assert model.embed_images(IMAGES).shape == (3, 32)
    with pytest.raises(UserError, match="no classifier"):
        model.classify_image(IMAGES[0])
    loud("PixtralVisionModel", transformers.PixtralVisionConfig(**TOWER), tmp_path / "pixtral")
    with pytest.raises(UserError, match="no single vector"):
        load(tmp_path / "pixtral")
    text = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    loud("CLIPTextModel", transformers.CLIPTextConfig(**text), tmp_path / "text")
    with pytest.raises(UserError, match="clip_text_model doesn't write"):
        load(tmp_path / "text")


# ── Chats with images ────────────────────────────────────────────────────────────────────────────────────────────────


def chat_tokenizer(template: str = TEMPLATE, special: tuple[str, ...] = SPECIAL) -> Tokenizer:
    alphabet = sorted(ByteLevel.alphabet())
    backend = Backend(BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})


@pytest.fixture(scope="module", params=["llava", "mistral3"])
def pixtral(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(directory, transformers' model)."""
    path, tokenizer = tmp_path_factory.mktemp(request.param), chat_tokenizer()
    parts: dict[str, Any] = {
        "text_config": TEXT | {"model_type": "mistral", "vocab_size": tokenizer.vocab_size, "sliding_window": None},
        "vision_config": TOWER | {"model_type": "pixtral", "image_size": 64},
        "image_token_index": tokenizer.special["[IMG]"], "vision_feature_layer": -1,
    }  # fmt: skip
    if request.param == "llava":
        config: Any = transformers.LlavaConfig(**parts, vision_feature_select_strategy="full")
        model = loud("LlavaForConditionalGeneration", config, path)
    else:
        config = transformers.Mistral3Config(**parts, spatial_merge_size=2, tie_word_embeddings=False)
        model = loud("Mistral3ForConditionalGeneration", config, path)
    tokenizer.save(path)
    PixtralImageProcessorPil(size={"longest_edge": 48}).save_pretrained(path)
    return path, model


def message(*parts: Any) -> list[dict[str, Any]]:
    """A user's message of texts and images."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return [{"role": "user", "content": content}]


CHATS = [
    message(IMAGES[0], "What is this?"),
    message("One ", IMAGES[1], "two ", IMAGES[2], "?"),
    message("No image, and [IMG] is text."),
    [*message(IMAGES[2], "What?"), {"role": "assistant", "content": "That."}, {"role": "user", "content": "And this?"}],
]


def their_inputs(path: Path, reference: Any, chat: list[dict[str, Any]]) -> dict[str, Any]:
    """What transformers' PixtralProcessor gives (which needs torchvision to be imported), written down by hand."""
    config = reference.config
    merge, patch = getattr(config, "spatial_merge_size", 1), config.vision_config.patch_size
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    images = [p["image"] for m in chat if isinstance(m["content"], list) for p in m["content"] if p["type"] == "image"]
    side = {"height": patch * merge, "width": patch * merge}
    seen = (
        PixtralImageProcessorPil.from_pretrained(path, patch_size=side)(images, return_tensors="pt") if images else {}
    )
    number, text = 0, "<s>"
    for turn in chat:
        parts = turn["content"] if isinstance(turn["content"], list) else [{"type": "text", "text": turn["content"]}]
        said = ""
        for part in parts:
            if part["type"] == "image":
                height, width = (int(pixels) // patch // merge for pixels in seen["image_sizes"][number])
                said += "[IMG_BREAK]".join(["[IMG]" * width] * height) + "[IMG_END]"
                number += 1
            else:
                said += part["text"].replace("[IMG]", "\ue000")
        text += f"[INST]{said}[/INST]" if turn["role"] == "user" else f"{said}</s>"
    ids: list[int] = []
    for index, piece in enumerate(text.split("\ue000")):
        spelled = tokenizer.backend_tokenizer.encode("[IMG", add_special_tokens=False).ids
        ids += [*spelled, *tokenizer.backend_tokenizer.encode("]", add_special_tokens=False).ids] if index else []
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return {"input_ids": torch.tensor([ids]), **seen}


def test_greedy_answers_equal_transformers(pixtral: Any) -> None:
    path, reference = pixtral
    model = load(path)
    assert isinstance(model, Model)
    assert model.num_parameters == reference.num_parameters()
    expected = []
    for chat in CHATS:
        inputs = their_inputs(path, reference, chat)
        read = model.read(chat)
        assert read.ids == inputs["input_ids"][0].tolist()
        assert (read.embeds_TD is None) == ("pixel_values" not in inputs)
        mask = torch.ones_like(inputs["input_ids"])
        out = reference.generate(
            **inputs, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        expected.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    assert len({tuple(tokens) for tokens in expected}) == len(CHATS)
    free = {"max_tokens": 24, "stop_ids": frozenset()}
    # Together, in one batch of prompts with and without images; one at a time; and as a stream.
    together = model.generate(CHATS, **free)
    assert [list(answer.tokens) for answer in together] == expected
    assert [list(model.generate(chat, **free).tokens) for chat in CHATS] == expected
    assert "".join(model.stream(CHATS[1], **free)) == together[1].text


def test_an_image_is_read_in_chunks(pixtral: Any) -> None:
    """The prompt doesn't fit into one step's budget: the border of a chunk lies within the image."""
    path, _ = pixtral
    model = load(path)
    whole = model.generate(CHATS[1], max_tokens=8, stop_ids=frozenset())
    engine, read = model.engine(2), model.read(CHATS[1])
    engine.prefill_tokens = 7
    settings = ownlm.generate.sampling.Sampling(max_tokens=8, stop_ids=frozenset())
    engine.add(read.ids, settings, read.embeds_TD)
    engine.add(read.ids[:5], settings)
    tokens = []
    while not engine.idle:
        tokens += [event.token.id for event in engine.step() if event.request == 0]
    assert tuple(tokens) == whole.tokens


def test_the_image_matters(pixtral: Any) -> None:
    model = load(pixtral[0])
    first, second = (model.read(message(image, "?")) for image in (picture(40, 40, 1), picture(40, 40, 2)))
    assert first.ids == second.ids
    assert not torch.equal(first.embeds_TD, second.embeds_TD)


def test_sources_of_a_chat(pixtral: Any, tmp_path: Path) -> None:
    model, image = load(pixtral[0]), IMAGES[0]
    image.save(tmp_path / "a.png")
    file = io.BytesIO()
    image.save(file, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    whole = model.read(message(image, "?")).embeds_TD
    for part in (
        {"type": "image", "image": str(tmp_path / "a.png")},
        {"type": "image", "path": tmp_path / "a.png"},
        {"type": "image", "url": uri},
        {"type": "image_url", "image_url": {"url": uri}},
    ):
        chat = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
        assert torch.equal(model.read(chat).embeds_TD, whole)


def test_wrong_chats(pixtral: Any) -> None:
    model = load(pixtral[0])
    for chat, match in [
        ([{"role": "user"}], "is not a message"),
        ([{"content": "a"}], "is not a message"),
        ([{"role": "user", "content": [{"type": "video", "video": "a"}]}], "neither a text nor an image"),
        ([{"role": "user", "content": [{"type": "image"}]}], "neither a text nor an image"),
        ([{"role": "user", "content": ["a"]}], "neither a text nor an image"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"uri": 1}}]}], "NoneType is not an image"),
        ([{"role": "user", "content": [{"type": "image", "url": "http://127.0.0.1/"}]}], "not fetched"),
        ([{"role": "assistant", "content": [{"type": "image", "image": IMAGES[0]}]}], "shows 0 of 1|doesn't accept"),
    ]:
        with pytest.raises(UserError, match=match):
            model.generate(chat, max_tokens=1)
    with pytest.raises(ContextTooLong):
        model.generate(message(*IMAGES * 60), max_tokens=1)


def test_tokens_that_are_missing(pixtral: Any, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((pixtral[0] / name).read_bytes())
    chat_tokenizer(special=(*SPECIAL[:5], "[BREAK]", "[END]")).save(tmp_path)
    with pytest.raises(UserError, match=r"no special token '\[IMG_BREAK\]'"):
        load(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_break_token": "[BREAK]", "image_end_token": "[END]"}')
    assert isinstance(load(tmp_path), Model)
    chat_tokenizer(special=SPECIAL[:3]).save(tmp_path)
    with pytest.raises(UserError, match="is no special token"):
        load(tmp_path)


LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_llava_with_clips_tower(strategy: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(LLAVA, ("<s>", "</s>", "<image>"))
    config = transformers.LlavaConfig(
        text_config=TEXT | {"model_type": "llama", "vocab_size": tokenizer.vocab_size},
        vision_config=TOWER | {"model_type": "clip_vision_model"},
        image_token_index=tokenizer.special["<image>"],
        vision_feature_select_strategy=strategy,
    )
    reference = loud("LlavaForConditionalGeneration", config, tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer.save(tmp_path)
    processor.save_pretrained(tmp_path)
    model = load(tmp_path)
    count = 16 + (strategy == "full")
    text = "USER: " + "<image>" * count + "\nWhat is it? ASSISTANT:"
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False, return_tensors="pt")
    out = reference.generate(
        **ids,
        pixel_values=processor(IMAGES[:1], return_tensors="pt")["pixel_values"],
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    answer = model.generate(message(IMAGES[0], "What is it?"), max_tokens=24, stop_ids=frozenset())
    assert list(answer.tokens) == out[0, ids["input_ids"].shape[1] :].tolist()
    plain: Callable[[Any], list[int]] = lambda content: model.prompt_ids([{"role": "user", "content": content}])
    assert plain("Hello") == plain([{"type": "text", "text": "Hello"}])
