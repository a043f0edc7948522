"""ViT, CLIP, Pixtral, LLaVA and Mistral 3 equal transformers in fp32 on loud weights; and deliberate mistakes are noticed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from references import difference
from safetensors.torch import load_file, save_file
from torch import Tensor
from vision_references import (
    CONFIGS,
    MANY,
    PIXTRAL,
    SQUARE,
    TEXT,
    TOWER,
    digests,
    pixels,
    plain,
    prompt,
    save,
    texts,
    theirs,
)

import ownlm.models.vision as vision_module
from ownlm.checkpoints.weights import load_model, save_model
from ownlm.errors import ArtifactError, UserError
from ownlm.models import vision_language
from ownlm.models.attention import causal, everything
from ownlm.models.cache import KVCache
from ownlm.models.families import from_hf

BAR = 1e-5
VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "hf-tiny"


def ours(name: str, model: Any) -> Tensor:
    with torch.no_grad():
        if name.startswith("vit"):
            return model.features(SQUARE, interpolate=name == "vit-bare")
        if name in ("clip", "clip-legacy"):
            return model(SQUARE, texts())
        if name.startswith("clip"):
            return model.features(texts() if "text" in name else SQUARE)
        if name == "pixtral":
            return model(MANY)
        if name == "llava-pixtral":
            return model.logits(model(prompt(24, 16, 4), images=MANY))
        if name.startswith("mistral3"):
            return model.logits(model(prompt(6, 4, 1), images=MANY))
        count = 17 if name.endswith("full") else 16
        return model.logits(model(prompt(count, count), images=SQUARE))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensor]]:
    """By name: a directory that transformers wrote, and what its model computes."""
    made: dict[str, tuple[Path, Tensor]] = {}

    def get(name: str) -> tuple[Path, Tensor]:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            made[name] = path, theirs(name, save(name, path))
        return made[name]

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs(name: str, checkpoints: Any) -> None:
    path, reference = checkpoints(name)
    out = ours(name, load_model(path))
    assert out.shape == reference.shape
    assert reference.abs().max() > 0.9  # tanh of a pooler ends at 1
    assert difference(out, reference) <= BAR


def test_clip_features_and_hidden_states(tmp_path: Path) -> None:
    reference = save("clip", tmp_path)
    model = load_model(tmp_path)
    with torch.no_grad():
        seen = reference.vision_model(SQUARE, output_hidden_states=True)
        read = reference.text_model(texts())
        expected_text = reference.get_text_features(texts()).pooler_output
        expected_image = reference.get_image_features(SQUARE).pooler_output
        assert difference(model.text_features(texts()), expected_text) <= BAR
        assert difference(model.image_features(SQUARE), expected_image) <= BAR
        assert difference(model.vision(SQUARE), seen.last_hidden_state) <= BAR
        assert difference(model.text(texts()), read.last_hidden_state) <= BAR
        for number, state in enumerate(model.vision.states(SQUARE, range(-4, 0))):
            assert difference(state, seen.hidden_states[number]) <= BAR
        # Padding and what follows the end token change nothing.
        longer, short = texts()[:1], texts()[:1, :7]
        assert difference(model.text_features(longer), model.text_features(short)) <= BAR
        mask = (torch.arange(20) < 7)[None].long()
        masked = reference.get_text_features(longer, attention_mask=mask).pooler_output
        assert difference(model.text_features(short), masked) <= BAR


def test_vit_hidden_states_and_labels(tmp_path: Path) -> None:
    reference = save("vit", tmp_path)
    model = load_model(tmp_path)
    with torch.no_grad():
        assert difference(model(SQUARE), reference.vit(SQUARE).last_hidden_state) <= BAR
    assert model.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4")


def test_positions_stretch_to_another_size(tmp_path: Path) -> None:
    reference, (image,) = save("clip-vision", tmp_path), pixels((48, 24))
    model = load_model(tmp_path)
    with torch.no_grad():
        expected = reference(image[None], interpolate_pos_encoding=True).pooler_output
        assert difference(model.features(image[None], interpolate=True), expected) <= BAR
    with pytest.raises(UserError, match="24 × 48 pixels, for a model that reads 32 × 32"):
        model(image[None])


def test_an_image_alone_is_the_same_as_among_others(checkpoints: Any) -> None:
    path, reference = checkpoints("pixtral")
    model = load_model(path)
    with torch.no_grad():
        assert difference(model(MANY[1:2])[0], reference[0, 24:40]) <= BAR


@pytest.mark.parametrize("name", ["clip", "pixtral_vision", "pixtral_llava"])
def test_vectors(name: str) -> None:
    if not VECTORS.exists():
        pytest.skip("the shared test vectors lie beside the repository, and are not there")
    vectors = load_file(VECTORS / name / "ref.safetensors")
    model, images = load_model(VECTORS / name), vectors["in.pixel_values"]
    with torch.inference_mode():
        if name == "clip":
            out = model(images, vectors["in.input_ids"])
        elif name == "pixtral_vision":
            out = model(images)
        else:
            out = model.logits(model(vectors["in.input_ids"], images=images))
    assert difference(out, vectors["out"]) <= BAR


def test_text_after_images_by_the_cache(checkpoints: Any) -> None:
    """Prefill with images in two chunks, then a token at a time: the logits of one forward."""
    path, reference = checkpoints("mistral3")
    model, tokens = load_model(path), prompt(6, 4, 1)
    cache = KVCache(model.config.text, slots=1, max_tokens=64)
    with torch.inference_mode():
        embeds, out = model.embed(tokens, MANY), []
        for first, last in [(0, 8), (8, 21), *((n, n + 1) for n in range(21, tokens.shape[1]))]:
            given = {"embeds_BTD": embeds[:, first:last]} if first < 21 else {}
            hidden = model.language(
                tokens[:, first:last], place=cache.address(torch.arange(first, last)[None]), **given
            )
            out.append(model.logits(hidden))
    assert difference(torch.cat(out, 1), reference) <= BAR


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_byte_identical(name: str, tmp_path: Path, checkpoints: Any) -> None:
    path, reference = checkpoints(name)
    save_model(load_model(path), tmp_path)
    written, original = digests(tmp_path), digests(path)
    assert {plain(key): value for key, value in written.items()} == {plain(k): value for k, value in original.items()}
    if name in ("clip", "vit", "llava-pixtral", "mistral3", "pixtral"):
        assert written == original
    kind = getattr(transformers, CONFIGS[name][0])
    again, loading = kind.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert torch.equal(theirs(name, again.eval()), reference)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_model_from_its_config(name: str, checkpoints: Any, tmp_path: Path) -> None:
    """Without files the config alone decides; what comes back from disk computes the same."""
    hf = json.loads((checkpoints(name)[0] / "config.json").read_text())
    config, family = from_hf(hf)
    model = family.build(config, hf).eval()
    save_model(model, tmp_path)
    assert torch.equal(ours(name, load_model(tmp_path)), ours(name, model))


@pytest.mark.parametrize("name", ["llava-pixtral", "llava-clip", "mistral3"])
def test_names_of_the_modules_in_memory(name: str, checkpoints: Any, tmp_path: Path) -> None:
    path, reference = checkpoints(name)
    tensors = {}
    for key, tensor in load_file(path / "model.safetensors").items():
        key = key.replace("language_model.lm_head", "lm_head").replace("language_model.model", "model.language_model")
        tensors[key if key.startswith(("lm_head", "model.")) else f"model.{key}"] = tensor
    assert "model.vision_tower.ln_pre.weight" in tensors or name == "llava-clip"
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    assert difference(ours(name, load_model(tmp_path)), reference) <= BAR


def test_old_clip_files(checkpoints: Any, tmp_path: Path) -> None:
    """Position ids stored as tensors, and the parts of the config a second time."""
    path, reference = checkpoints("clip")
    tensors = load_file(path / "model.safetensors")
    tensors |= {f"{part}_model.embeddings.position_ids": torch.arange(17)[None] for part in ("text", "vision")}
    save_file(tensors, tmp_path / "model.safetensors")
    hf = json.loads((path / "config.json").read_text())
    hf["text_config_dict"], hf["text_config"] = hf["text_config"], {}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert difference(ours("clip", load_model(tmp_path)), reference) <= BAR


# As the hub has them: what equals a default of transformers' classes is left out.
SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPModel", {"model_type": "clip"}),
    "clip-large": (
        "CLIPModel",
        {
            "model_type": "clip", "projection_dim": 768, "text_config": {"projection_dim": 768, "eos_token_id": 2},
            "text_config_dict": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
            "vision_config": {"patch_size": 14},
            "vision_config_dict": {
                "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
                "patch_size": 14,
            },
        },
    ),
    "vit": ("ViTForImageClassification", {"model_type": "vit", "architectures": ["ViTForImageClassification"]}),
    "llava-1.5": (
        "LlavaForConditionalGeneration",
        {
            "model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064},
            "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336,
                "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14},
        },
    ),
    "pixtral-12b": (
        "LlavaForConditionalGeneration",
        {
            "model_type": "llava", "image_token_index": 10, "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "text_config": {
                "model_type": "mistral", "hidden_size": 5120, "head_dim": 128, "num_hidden_layers": 40,
                "max_position_embeddings": 1024000, "rope_theta": 1e9, "sliding_window": None, "vocab_size": 131072,
            },
            "vision_config": {"model_type": "pixtral", "hidden_act": "silu", "rope_theta": 10000.0},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHORT)
def test_configs_that_leave_out_defaults(name: str) -> None:
    kind, hf = SHORT[name]
    config, family = from_hf(hf)
    with torch.device("meta"):
        ours, theirs = family.build(config, hf), getattr(transformers, kind)(transformers.AutoConfig.for_model(**hf))
    shapes = sorted(tuple(p.shape) for p in ours.parameters() if p.ndim == 2 and min(p.shape) > 1)
    expected = sorted(tuple(p.flatten(1).shape) for p in theirs.parameters() if p.ndim in (2, 4))
    if name != "vit":  # which stores its positions in three dimensions
        assert shapes == expected
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_faults_are_named(checkpoints: Any, tmp_path: Path) -> None:
    hf = json.loads((checkpoints("llava-pixtral")[0] / "config.json").read_text())

    def refused(change: dict[str, Any], match: str) -> None:
        with pytest.raises(UserError, match=match):
            from_hf(hf | change)

    refused({"vision_feature_layer": 9}, "vision_feature_layer")
    refused({"vision_feature_layer": "last"}, "vision_feature_layer")
    refused({"vision_feature_select_strategy": "default"}, "class token that this tower doesn't have")
    refused({"vision_feature_select_strategy": "most"}, r"'most' is not supported \(supported: default, full\)")
    refused({"text_config": {"model_type": "rwkv"}}, "'rwkv' is not supported here")
    refused({"text_config": 7}, "text_config must be a table")
    refused({"vision_config": PIXTRAL | {"hidden_size": 24}}, "multiple of 4")
    refused({"vision_config": PIXTRAL | {"hidden_size": 33}}, "not divisible by num_attention_heads")
    refused({"vision_config": PIXTRAL | {"image_size": [32, 64]}}, "image_size must be a whole number")
    refused({"vision_config": PIXTRAL | {"patch_size": 65}}, "more than image_size")
    refused({"text_config": TEXT | {"model_type": "llama", "num_key_value_heads": 3}}, "can't share")
    with pytest.raises(UserError, match="id2label must name"):
        from_hf({"model_type": "vit", **TOWER, "id2label": {"1": "cat"}})
    path = checkpoints("vit")[0]
    save_file(
        {"lm_head.weight": torch.ones(2, 2), **load_file(path / "model.safetensors")}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    with pytest.raises(ArtifactError, match=r"lm_head.weight"):
        load_model(tmp_path)


def test_images_and_their_tokens_must_agree(checkpoints: Any) -> None:
    model = load_model(checkpoints("llava-pixtral")[0])
    with pytest.raises(UserError, match="5 image tokens for images that take 24"):
        model(prompt(5), images=MANY[:1])
    with pytest.raises(UserError, match="5 image tokens, and no image"):
        model(prompt(5))
    with pytest.raises(UserError, match="reads 3 channels"):
        model(prompt(24), images=[torch.zeros(1, 32, 48)])
    with pytest.raises(UserError, match="patches of 8 × 8"):
        model(prompt(24), images=[torch.zeros(3, 32, 4)])
    with torch.no_grad():
        assert model(prompt()).shape == (1, 4, 24)


@pytest.mark.parametrize("name", ["clip", "mistral3"])
def test_every_weight_learns(name: str, checkpoints: Any) -> None:
    model = load_model(checkpoints(name)[0]).train()
    if name == "clip":
        model(SQUARE, texts()).log_softmax(-1)[:, 0].sum().backward()
    else:
        model.logits(model(prompt(6, 4, 1), images=MANY)).log_softmax(-1)[..., 0].sum().backward()
    still = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # mistral3 reads the state before the last layer.
    assert [key for key in still if not key.startswith("vision.layers.2.")] == []


# ── Deliberate mistakes ──────────────────────────────────────────────────────────────────────────────────────────────


def towers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, vision_module.VisionTower)]


def rebuilt(tower: Any, **changes: Any) -> Any:
    other = vision_module.VisionTower(replace(tower.config, **changes)).eval()
    other.load_state_dict(tower.state_dict(), strict=False)
    return other


def activation(kind: Any) -> Callable[[Any, Any], Any]:
    def wrong(model: Any, patch: Any) -> Any:
        layers = tuple(replace(x, mlp=replace(x.mlp, activation=kind)) for x in model.vision.config.layers)
        model.vision = rebuilt(model.vision, layers=layers)
        return model

    return wrong


def text_activation(model: Any, patch: Any) -> Any:
    for block in model.text.decoder.layers:
        block.mlp.spec = replace(block.mlp.spec, activation="gelu")
    return model


def attribute(path: str, value: Any) -> Callable[[Any, Any], Any]:
    """`model.path` set to `value`."""

    def wrong(model: Any, patch: Any) -> Any:
        *way, last = path.split(".")
        for name in way:
            model = getattr(model, name)
        patch.setattr(model, last, value)
        return None

    return wrong


def config(part: str, **changes: Any) -> Callable[[Any, Any], Any]:
    def wrong(model: Any, patch: Any) -> Any:
        target = getattr(model, part) if part else model
        target.config = replace(target.config, **changes)

    return wrong


def pooled_at(place: int) -> Callable[[Any, Any], Any]:
    def wrong(model: Any, patch: Any) -> Any:
        patch.setattr(model.text, "features", lambda ids: model.text.head(model.text(ids)[:, place]))

    return wrong


def no_causal_mask(model: Any, patch: Any) -> None:
    patch.setattr("ownlm.models.attention.causal", lambda q, k, window=None: everything(q, k))


def causal_vision(model: Any, patch: Any) -> None:
    patch.setattr(vision_module, "everything", causal)


def images_see_each_other(model: Any, patch: Any) -> None:
    patch.setattr(vision_module, "masked", lambda hidden: everything(*hidden.shape[1:]))


def turn(change: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    real = vision_module.plane_rotation

    def wrong(model: Any, patch: Any) -> None:
        patch.setattr(vision_module, "plane_rotation", lambda *given: change(real, *given))

    return wrong


def halves(real: Any, freq: Tensor, rows: Tensor, columns: Tensor, dtype: Any) -> Any:
    """The low frequencies for rows and the high ones for columns."""
    return real(torch.stack(freq.chunk(2), 1).flatten(), rows, columns, dtype)


def flat_positions(model: Any, patch: Any) -> None:
    with torch.no_grad():
        grid = model.positions.weight[1:].view(4, 4, -1)
        model.positions.weight[1:] = grid.transpose(0, 1).reshape(16, -1)


def swap_patch_axes(model: Any, patch: Any) -> None:
    """Channels last within a patch."""
    for tower in towers(model):
        weight = tower.patches.weight.detach()
        tower.patches.weight.data = weight.unflatten(1, (3, 8, 8)).permute(0, 2, 3, 1).flatten(1)


def merger(order: Callable[[Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    def wrong(model: Any, patch: Any) -> None:
        def squares(x: Tensor, side: int) -> Tensor:
            r, c = x.shape[0] // side, x.shape[1] // side
            return order(x.reshape(r, side, c, side, -1)).reshape(r * c, -1)

        patch.setattr(vision_language, "squares", squares)

    return wrong


def class_token_at_the_end(model: Any, patch: Any) -> None:
    patch.setattr(model, "config", replace(model.config, class_token=True))
    real = model.vision.states
    patch.setattr(model.vision, "states", lambda *given: [x[:, :-1] for x in real(*given)])


def normed(model: Any, patch: Any) -> None:
    """CLIP's last norm over all patches that LLaVA reads."""
    real = model.vision.states
    patch.setattr(model.vision, "states", lambda *given: [model.vision.last_norm(x) for x in real(*given)])


def one_chunk(model: Any, patch: Any) -> None:
    """The images exchanged."""
    real = model.image_features
    patch.setattr(model, "image_features", lambda images: real(images)[::-1])


MISTAKES: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "gelu for quick_gelu in the vision tower": ("clip", activation("gelu")),
    "gelu for quick_gelu in the text tower": ("clip", text_activation),
    "pooled at the last token": ("clip", pooled_at(-1)),
    "pooled at the first token": ("clip", pooled_at(0)),
    "highest id for the first end token": ("clip", config("text", eos_id=None)),
    "first end token for the highest id": ("clip-legacy", config("text", eos_id=2)),
    "no causal mask over the text": ("clip", no_causal_mask),
    "a causal mask over the patches": ("clip", causal_vision),
    "last norm dropped": ("clip", attribute("vision.last_norm", None)),
    "first norm dropped": ("clip", attribute("vision.first_norm", None)),
    "logit scale not exponentiated": ("clip", lambda m, p: m.logit_scale.data.copy_(m.logit_scale.abs().log())),
    "features not normalised": ("clip", lambda m, p: p.setattr(torch.nn.functional, "normalize", lambda x, dim: x)),
    "class token dropped": ("clip-vision", lambda m, p: m.class_token.data.zero_()),
    "patches in another order": ("vit", swap_patch_axes),
    "positions by column": ("vit", flat_positions),
    "patch bias dropped": ("vit", lambda m, p: m.patches.bias.data.zero_()),
    "vit's last norm dropped": ("vit", attribute("last_norm", None)),
    "pooler without tanh": ("vit-bare", lambda m, p: p.setattr(Tensor, "tanh", lambda x: x)),
    "bilinear for bicubic": ("vit-bare", lambda m, p: bilinear(p)),
    "rope by the column only": ("pixtral", turn(lambda real, f, r, c, t: real(f, c, c, t))),
    "rope in one dimension": ("pixtral", turn(lambda real, f, r, c, t: real(f, n := torch.arange(len(r)), n, t))),
    "rows and columns exchanged": ("pixtral", turn(lambda real, f, r, c, t: real(f, c, r, t))),
    "frequencies in halves": ("pixtral", turn(halves)),
    "images see each other": ("pixtral", images_see_each_other),
    "pixtral's first norm dropped": ("pixtral", attribute("first_norm", None)),
    "projector's gelu as tanh": ("llava-pixtral", lambda m, p: p.setattr(m.projector, "activation", torch.tanh)),
    "images exchanged": ("llava-clip", one_chunk),
    "state of the last layer": ("llava-clip", config("", states=(-1,))),
    "class token kept, a patch dropped": ("llava-clip", class_token_at_the_end),
    "clip's last norm over what llava reads": ("llava-clip", normed),
    "states in another order": ("llava-clip-full", config("", states=(1, -2))),
    "merger: patches before features": ("mistral3", merger(lambda x: x.permute(0, 2, 1, 3, 4))),
    "merger: columns before rows": ("mistral3", merger(lambda x: x.permute(0, 2, 4, 3, 1))),
    "mistral 3's projector norm dropped": ("mistral3", attribute("projector.norm", None)),
    "mistral 3's feature layer": ("mistral3", config("", states=(-1,))),
}


def bilinear(patch: Any) -> None:
    real = torch.nn.functional.interpolate
    patch.setattr(torch.nn.functional, "interpolate", lambda x, **given: real(x, **(given | {"mode": "bilinear"})))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(mistake: str, checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = MISTAKES[mistake]
    path, reference = checkpoints(name)
    model = load_model(path)
    with torch.no_grad():
        wrong(model, monkeypatch)
        assert difference(ours(name, model), reference) > 3 * BAR
