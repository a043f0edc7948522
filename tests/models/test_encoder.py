"""Encoders and their heads equal transformers' in fp32, on loud weights; each of a list of deliberate mistakes is noticed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_references import CASES, ENCODERS, answer, batch, real, save_encoder
from references import difference
from safetensors.torch import load_file, save_file
from torch import Tensor

from ownlm.checkpoints.weights import load_model, save_model
from ownlm.errors import ArtifactError, UserError
from ownlm.models.encoder import Encoder
from ownlm.models.families import from_hf
from ownlm.train.cross_entropy import linear_cross_entropy

BAR = 1e-5
VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "hf-tiny"
Checkpoints = Callable[[str, str], tuple[Path, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """By family and class: a directory that transformers wrote, and what its model says of `batch`."""
    made: dict[tuple[str, str], tuple[Path, dict[str, Tensor]]] = {}

    def get(name: str, kind: str) -> tuple[Path, dict[str, Tensor]]:
        if (name, kind) not in made:
            path = tmp_path_factory.mktemp(name)
            reference = save_encoder(name, kind, path)
            made[name, kind] = path, answer(reference, batch(reference.config.model_type))
        return made[name, kind]

    return get


def say(model: Encoder, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that a model of ours says, real tokens only. Padding is noise in the input as well."""
    mask = given["attention_mask"]
    hidden = model(given["input_ids"], mask_BT=mask, types_BT=given.get("token_type_ids"))
    said: dict[str, Tensor] = {"hidden": hidden}
    if model.pooler is not None:
        said["pooled"] = model.pooler(hidden)
    if model.next_sentence is not None:
        said["follows"] = model.follows(hidden)
    if model.task == "masked_lm":
        said["logits"] = model.logits(hidden)
    elif model.task == "span":
        said["start"], said["end"] = model.head(hidden, mask)
    elif model.task is not None:
        said["logits"] = model.head(hidden, mask)
    return {key: real(value, mask) for key, value in said.items()}


def worst(model: Encoder, expected: dict[str, Tensor]) -> float:
    said = say(model, batch(model.hf["model_type"]))
    assert expected.keys() <= said.keys()
    return max(difference(said[key].detach(), value) for key, value in expected.items())


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_parity(name: str, kind: str, training: bool, checkpoints: Checkpoints) -> None:
    path, expected = checkpoints(name, kind)
    with torch.set_grad_enabled(training):
        assert worst(load_model(path), expected) <= BAR
    assert max(value.abs().max() for value in expected.values()) > 1  # loud


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_vectors(name: str) -> None:
    if not VECTORS.exists():
        pytest.skip("the shared test vectors lie beside the repository, and are not there")
    vectors = load_file(VECTORS / name / "ref.safetensors")
    model = load_model(VECTORS / name)
    with torch.inference_mode():
        logits = model.logits(model(vectors["in.input_ids"]))
    assert difference(logits, vectors["out"]) <= BAR


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_round_trip_is_byte_identical(name: str, kind: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    path, _ = checkpoints(name, kind)
    save_model(load_model(path), tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8)) for key in ours)
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, path))
    assert first == second


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_lengths_equal_one_by_one(name: str, side: str, checkpoints: Checkpoints) -> None:
    """Whatever stands at the padding, of whichever side, the real tokens don't notice."""
    model = load_model(checkpoints(name, "ForSequenceClassification")[0])
    ids = torch.randint(5, 97, (4, 150))
    lengths = torch.tensor([150, 60, 7, 1])[:, None]
    places = torch.arange(150)
    mask = places < lengths if side == "right" else places >= 150 - lengths
    with torch.inference_mode():
        together = model(ids, mask_BT=mask)
        for row in range(4):
            alone = model(ids[row, mask[row]][None])
            assert difference(together[row, mask[row]], alone[0]) <= BAR


def test_types_default_to_the_first_text(checkpoints: Checkpoints) -> None:
    model, ids = load_model(checkpoints("bert", "Model")[0]), torch.randint(5, 97, (2, 9))
    with torch.inference_mode():
        assert torch.equal(model(ids), model(ids, types_BT=torch.zeros_like(ids)))
        assert not torch.equal(model(ids), model(ids, types_BT=torch.ones_like(ids)))


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_masked_lm_loss_and_gradients(name: str, tmp_path: Path) -> None:
    """Our fused loss over the tied embedding equals transformers' loss, and so does every gradient."""
    reference = save_encoder(name, "ForMaskedLM", tmp_path)
    model, ids = load_model(tmp_path), torch.randint(5, 97, (2, 40))
    labels = torch.where(torch.rand(2, 40) < 0.3, ids, -100)
    reference(ids, labels=labels).loss.backward()
    hidden = model(ids)
    loss = linear_cross_entropy(model.head_input(hidden), model.head_weight, labels, bias_V=model.head_bias)
    (loss / (labels != -100).sum()).backward()
    theirs = {key: parameter.grad for key, parameter in reference.named_parameters()}
    rows = model.embed_tokens.weight.grad
    assert difference(rows, next(g for key, g in theirs.items() if key.endswith("word_embeddings.weight"))) <= BAR
    norms = sorted(float(p.grad.norm()) for p in model.parameters())
    expected = sorted(float(g.norm()) for g in theirs.values() if g is not None)
    assert norms == pytest.approx(expected, rel=1e-3, abs=1e-6)


# ── Files as they lie about ──────────────────────────────────────────────────────────────────────────────────────────


def edited(path: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> Path:
    save_file(change(load_file(path / "model.safetensors")), target / "model.safetensors")
    fields = json.loads((path / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(fields))
    return target


def old_spelling(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """bert-base-uncased of the hub: gamma and beta, positions, the tied head again."""
    return {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in tensors.items()
    } | {
        "bert.embeddings.position_ids": torch.arange(200)[None],
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone(),
    }


def test_the_first_files_of_the_hub(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path, expected = checkpoints("bert", "ForPreTraining")
    edited(path, tmp_path, old_spelling, architectures=["BertForMaskedLM"])
    assert worst(load_model(tmp_path), expected) <= BAR


def test_a_tied_head_stored_twice_must_be_equal(checkpoints: Checkpoints, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return old_spelling(tensors) | {"cls.predictions.decoder.bias": torch.ones(97)}

    edited(checkpoints("bert", "ForPreTraining")[0], tmp_path, change)
    with pytest.raises(ArtifactError, match=r"decoder\.bias differs from the head\.bias"):
        load_model(tmp_path)


@pytest.mark.parametrize("prefix", ["", "roberta."])
def test_a_bare_body_under_the_config_of_a_masked_lm(prefix: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Sentence encoders keep the config of what they were made from, and drop the head."""
    path, expected = checkpoints("roberta", "Model")
    edited(path, tmp_path, lambda t: {prefix + k: v for k, v in t.items()}, architectures=["RobertaForMaskedLM"])
    model = load_model(tmp_path)
    assert model.task is None
    assert worst(model, expected) <= BAR


def test_a_config_without_classes(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path, expected = checkpoints("distilbert", "ForMaskedLM")
    model = load_model(edited(path, tmp_path, lambda t: t, architectures=None))
    assert worst(model, expected) <= BAR


def test_a_pooler_that_nobody_reads_is_kept(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Older RoBERTa classifiers have both a pooler and a head that doesn't use it."""
    path, expected = checkpoints("roberta", "ForSequenceClassification")
    extra = {"roberta.pooler.dense.weight": torch.randn(32, 32), "roberta.pooler.dense.bias": torch.randn(32)}
    model = load_model(edited(path, tmp_path, lambda t: t | extra))
    assert worst(model, expected) <= BAR
    save_model(model, tmp_path / "again")
    assert extra.keys() <= load_file(tmp_path / "again" / "model.safetensors").keys()


BAD: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "a decoder": ("bert", "Model", {"is_decoder": True}, "is_decoder"),
    "relative positions": ("bert", "Model", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    "unknown head": ("bert", "Model", {"architectures": ["BertForMultipleChoice"]}, "MultipleChoice is not supported"),
    "untied head": ("bert", "ForMaskedLM", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    "labels with a gap": ("bert", "ForTokenClassification", {"id2label": {"0": "a", "2": "b"}}, "id2label"),
    "labels are numbers": ("bert", "ForTokenClassification", {"id2label": {"0": 1}}, "id2label"),
    "labels are a list": ("bert", "ForTokenClassification", {"id2label": ["a"]}, "id2label"),
    "absurd labels": ("bert", "ForTokenClassification", {"id2label": None, "num_labels": 10**9}, "num_labels"),
    "unknown problem": ("bert", "ForSequenceClassification", {"problem_type": "ranking"}, "problem_type 'ranking'"),
    "three ends of a span": ("bert", "ForQuestionAnswering", {"num_labels": 3}, "2 outputs, not 3"),
    "labels the file lacks": ("bert", "ForTokenClassification", {"id2label": {"0": "a"}}, r"classifier\.weight has shape"),
    "head the file lacks": ("bert", "Model", {"architectures": ["BertForQuestionAnswering"]}, "qa_outputs.* is missing"),
    "heads don't divide": ("bert", "Model", {"num_attention_heads": 5}, "not divisible"),
    "padding beyond positions": ("roberta", "Model", {"pad_token_id": 199}, "leaves no position"),
    "padding below zero": ("roberta", "Model", {"pad_token_id": -1}, "pad_token_id"),
    "classes are a number": ("distilbert", "Model", {"architectures": 3, "dim": "x"}, "dim must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_configs_are_one_clear_error(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    family, kind, config, message = BAD[name]
    edited(checkpoints(family, kind)[0], tmp_path, lambda t: t, **config)
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_labels() -> None:
    config, _ = from_hf({**ENCODERS["bert"], "architectures": ["BertForSequenceClassification"], "num_labels": 1})
    assert config.head.labels == ("LABEL_0",)
    assert config.head.problem == "regression"
    multi = {"problem_type": "multi_label_classification", "id2label": {"1": "b", "0": "a"}}
    config, _ = from_hf({**ENCODERS["bert"], "architectures": ["BertForSequenceClassification"], **multi})
    assert (config.head.labels, config.head.problem) == (("a", "b"), "multi")


# ── Deliberate mistakes: each must move the answers well beyond the bar ──────────────────────────────────────────────


def rebuilt(model: Encoder, **changes: Any) -> Encoder:
    """The same weights under another config."""
    other = Encoder(replace(model.config, **changes), model.hf).eval()
    kept = {k: v for k, v in model.state_dict().items() if k in other.state_dict()}
    size = len(other.embed_positions.weight)
    kept["embed_positions.weight"] = kept["embed_positions.weight"].repeat(2, 1)[:size]
    other.load_state_dict(kept, strict=False)
    return other


def layers(model: Encoder, change: Callable[[Any], Any]) -> Encoder:
    return rebuilt(model, layers=tuple(map(change, model.config.layers)))


def attention(model: Encoder, **changes: Any) -> Encoder:
    return layers(model, lambda layer: replace(layer, attention=replace(layer.attention, **changes)))


def mlp(model: Encoder, **changes: Any) -> Encoder:
    return layers(model, lambda layer: replace(layer, mlp=replace(layer.mlp, **changes)))


def norms(model: Encoder, **changes: Any) -> Encoder:
    norm = replace(model.config.norm, **changes)
    return rebuilt(layers(model, lambda layer: replace(layer, norm=norm)), norm=norm)


def head(model: Encoder, **changes: Any) -> Encoder:
    return rebuilt(model, head=replace(model.config.head, **changes))


def norms_before(model: Encoder) -> Encoder:
    other = layers(model, lambda layer: replace(layer, norms="before"))
    for ours, theirs in zip(other.layers, model.layers, strict=True):
        ours.input_layernorm, ours.post_attention_layernorm = theirs.attention_norm, theirs.mlp_norm
    return other


def swap_layer_norms(model: Encoder) -> Encoder:
    for layer in model.layers:
        layer.attention_norm, layer.mlp_norm = layer.mlp_norm, layer.attention_norm
    return model


def without(name: str) -> Callable[[Encoder], Encoder]:
    """A tensor of zeros where the file has others."""

    def change(model: Encoder) -> Encoder:
        model.get_parameter(name).zero_()
        return model

    return change


def passing(name: str) -> Callable[[Encoder], Encoder]:
    """A module left out."""

    def change(model: Encoder) -> Encoder:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, torch.nn.Identity())
        return model

    return change


def calling(**changes: Any) -> Callable[[Encoder], Encoder]:
    """The model called with other arguments than it is given."""

    def change(model: Encoder) -> Encoder:
        forward = model.forward
        model.forward = lambda *args, **given: forward(*args, **given | changes)
        return model

    return change


def causal(model: Encoder) -> Encoder:
    """Each token sees only those before it."""
    forward = model.forward

    def wrong(tokens_BT: Tensor, **given: Any) -> Tensor:
        rows = [forward(tokens_BT[:, : t + 1], mask_BT=given["mask_BT"][:, : t + 1])[:, -1] for t in range(20)]
        return torch.cat([torch.stack(rows, 1), forward(tokens_BT, **given)[:, 20:]], 1)

    model.forward = wrong
    return model


def second_token(model: Encoder) -> Encoder:
    inner = model.head.forward
    model.head.forward = lambda hidden, mask=None: inner(hidden[:, 1:], mask)
    return model


def swap_ends(model: Encoder) -> Encoder:
    with torch.no_grad():
        model.head.out.weight.copy_(model.head.out.weight.flip(0))
    return model


MISTAKES: dict[str, tuple[str, str, Callable[[Encoder], Encoder]]] = {
    "layer norm eps": ("roberta", "Model", lambda m: norms(m, eps=1e-3)),
    "eps of DistilBERT from BERT's field": ("distilbert", "Model", lambda m: norms(m, eps=1e-3)),
    "gelu tanh for erf": ("bert", "Model", lambda m: mlp(m, activation="gelu_tanh")),
    "gelu for relu": ("bert-relu", "Model", lambda m: mlp(m, activation="gelu")),
    "the head's gelu from the body": ("roberta-tanh", "ForMaskedLM", lambda m: head(m, activation="gelu_tanh")),
    "the head's activation dropped": ("bert-relu", "ForMaskedLM", lambda m: head(m, activation="gelu")),
    "positions from 0": ("roberta", "Model", lambda m: rebuilt(m, first_position=0)),
    "positions from 1": ("roberta", "Model", lambda m: rebuilt(m, first_position=1)),
    "positions from 2 in BERT": ("bert", "Model", lambda m: rebuilt(m, first_position=2)),
    "positions dropped": ("distilbert", "Model", without("embed_positions.weight")),
    "token types dropped": ("bert", "Model", calling(types_BT=None)),
    "the only token type dropped": ("roberta", "Model", lambda m: rebuilt(m, token_types=0)),
    "norms before": ("bert", "Model", norms_before),
    "norms exchanged": ("distilbert", "Model", swap_layer_norms),
    "embedding norm dropped": ("bert", "Model", passing("embed_norm")),
    "scale dropped": ("bert", "Model", lambda m: attention(m, scale=1.0)),
    "scale of the hidden size": ("bert", "Model", lambda m: attention(m, scale=32**-0.5)),
    "key bias kept, query bias dropped": ("bert", "Model", without("layers.0.self_attn.q_proj.bias")),
    "output bias dropped": ("bert", "Model", without("layers.1.self_attn.o_proj.bias")),
    "padding seen": ("bert", "Model", calling(mask_BT=None)),
    "causal": ("distilbert", "Model", causal),
    "vocabulary bias dropped": ("bert", "ForMaskedLM", without("head.bias")),
    "the head's norm dropped": ("distilbert", "ForMaskedLM", passing("head.norm")),
    "the head's dense layer skipped": ("roberta", "ForMaskedLM", passing("head.dense")),
    "pooler skipped": ("bert", "ForSequenceClassification", lambda m: head(m, activation=None)),
    "tanh for relu": ("distilbert", "ForSequenceClassification", lambda m: head(m, activation="tanh")),
    "relu for tanh": ("roberta", "ForSequenceClassification", lambda m: head(m, activation="relu")),
    "the last token for the first": ("bert", "ForSequenceClassification", lambda m: head(m, reads="last")),
    "the second token for the first": ("roberta", "ForSequenceClassification", second_token),
    "start and end exchanged": ("bert", "ForQuestionAnswering", swap_ends),
    "label bias dropped": ("bert", "ForTokenClassification", without("head.out.bias")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(mistake: str, checkpoints: Checkpoints) -> None:
    name, kind, wrong = MISTAKES[mistake]
    path, expected = checkpoints(name, kind)
    with torch.no_grad():
        assert worst(wrong(load_model(path)), expected) > 3 * BAR
