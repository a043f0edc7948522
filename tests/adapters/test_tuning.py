"""Fresh heads: transformers loads what we save and says the same; decoders have heads for texts as well."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoder_references import ENCODERS, LABELS, answer, batch, real, save_encoder
from references import CONFIGS, difference, make_loud, save
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from ownlm.adapters.tuning import with_head
from ownlm.checkpoints.weights import load_model, save_model
from ownlm.errors import UserError
from ownlm.models.decoder import Decoder, uniform
from ownlm.models.specs import Attention, FeedForward, Problem, Rotary, Task
from ownlm.train.fresh import init_weights

BAR = 1e-5
NAMES = ("person", "place", "thing", "none")
AUTO: dict[Task, Any] = {
    "masked_lm": transformers.AutoModelForMaskedLM,
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "span": transformers.AutoModelForQuestionAnswering,
}
BASES = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")


def theirs(directory: Path, auto: Any) -> PreTrainedModel:
    reference, loading = auto.from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values())
    return reference


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "camembert", "distilbert"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("task", list(AUTO))
def test_transformers_loads_a_fresh_head(name: str, base: str, task: Task, tmp_path: Path) -> None:
    save_encoder(name, base, tmp_path / "base")
    labels = NAMES if task in ("sequence", "token") else ()
    model = with_head(load_model(tmp_path / "base"), task, labels, seed=3)
    save_model(model, tmp_path / "tuned")
    reference = theirs(tmp_path / "tuned", AUTO[task])
    if labels:
        assert reference.config.id2label == dict(enumerate(NAMES))
        assert reference.config.label2id == {name: index for index, name in enumerate(NAMES)}
    given = batch(ENCODERS[name]["model_type"])
    expected, mask = answer(reference, given), given["attention_mask"]
    with torch.inference_mode():
        hidden = model(given["input_ids"], mask_BT=mask, types_BT=given.get("token_type_ids"))
        if task == "span":
            said = dict(zip(("start", "end"), model.head(hidden, mask), strict=True))
        else:
            said = {"logits": model.logits(hidden) if task == "masked_lm" else model.head(hidden, mask)}
    for key, value in said.items():
        assert difference(real(value, mask), expected[key]) <= BAR
    assert load_model(tmp_path / "tuned").config == model.config


def test_the_body_and_the_pooler_are_kept_and_the_last_layer_is_new(tmp_path: Path) -> None:
    save_encoder("bert", "Model", tmp_path)
    base = load_model(tmp_path)
    tuned, again = (with_head(base, "sequence", NAMES, seed=seed) for seed in (1, 2))
    assert torch.equal(tuned.head.dense.weight, base.pooler.dense.weight)
    for name, parameter in tuned.named_parameters():
        if not name.startswith("head."):
            assert torch.equal(parameter, base.get_parameter(name))
            assert parameter.data_ptr() != base.get_parameter(name).data_ptr()
    assert float(tuned.head.out.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
    assert not tuned.head.out.bias.any()
    assert not torch.equal(tuned.head.out.weight, again.head.out.weight)
    assert torch.equal(tuned.head.out.weight, with_head(base, "sequence", NAMES, seed=1).head.out.weight)
    # From a head to none: the bare model, in the file's bare names.
    save_model(with_head(tuned, None), tmp_path / "bare")
    assert load_file(tmp_path / "bare" / "model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()


def test_other_labels_begin_anew_and_keep_the_dense_layer(tmp_path: Path) -> None:
    save_encoder("roberta", "ForSequenceClassification", tmp_path)
    base = load_model(tmp_path)
    tuned = with_head(base, "sequence", ("a", "b", "c"), problem="multi")
    assert torch.equal(tuned.head.dense.weight, base.head.dense.weight)
    assert not torch.equal(tuned.head.out.weight, base.head.out.weight)
    assert tuned.config.head.problem == "multi"
    save_model(tuned, tmp_path / "tuned")
    assert theirs(tmp_path / "tuned", AUTO["sequence"]).config.problem_type == "multi_label_classification"


def test_half_precision_stays(tmp_path: Path) -> None:
    save_encoder("distilbert", "ForMaskedLM", tmp_path)
    tuned = with_head(load_model(tmp_path, dtype=torch.bfloat16), "token", NAMES)
    assert {parameter.dtype for parameter in tuned.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("task", "labels", "problem", "message"),
    [
        ("sequence", (), "single", "takes labels"),
        ("span", ("a",), "single", "takes no labels"),
        ("token", ("a", "a"), "single", "same name"),
        ("token", ("a", "b"), "multi", "one label for each"),
    ],
)
def test_labels_must_fit(task: Task, labels: tuple[str, ...], problem: Problem, message: str, tmp_path: Path) -> None:
    save_encoder("distilbert", "Model", tmp_path)
    with pytest.raises(UserError, match=message):
        with_head(load_model(tmp_path), task, labels, problem=problem)


# ── Decoders ─────────────────────────────────────────────────────────────────────────────────────────────────────────

DECODERS = ("gpt2", "gpt-neo", "gpt-neox", "llama3", "mistral", "mixtral", "phi2", "phi3", "gemma2", "qwen3-tied")


def padded(side: str) -> tuple[Tensor, Tensor]:
    """(ids, mask) of three lengths; id 0 is padding and no token."""
    ids = torch.randint(1, 97, (3, 30), generator=torch.Generator().manual_seed(5))
    lengths, places = torch.tensor([30, 12, 3])[:, None], torch.arange(30)
    mask = places < lengths if side == "right" else places >= 30 - lengths
    return ids.masked_fill(~mask, 0), mask


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_have_sequence_heads(name: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(**CONFIGS[name] | LABELS | {"pad_token_id": 0})
    reference = make_loud(AutoModelForSequenceClassification.from_config(config, attn_implementation="eager"))
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    for side in ("left", "right"):
        ids, mask = padded(side)
        positions = (mask.cumsum(1) - 1).masked_fill(~mask, -1)
        with torch.no_grad():
            expected = reference(ids, attention_mask=mask.long(), position_ids=positions.clamp(min=0)).logits
            assert difference(model.head(model(ids, positions_BT=positions), mask), expected) <= BAR
    assert model.config.head.labels == ("no", "maybe", "yes")
    save_model(model, tmp_path / "again")
    ours, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", tmp_path))
    assert ours.keys() == given.keys()
    assert all(torch.equal(ours[key], given[key]) for key in ours)


@pytest.mark.parametrize("name", DECODERS)
def test_transformers_loads_a_fresh_head_on_a_decoder(name: str, tmp_path: Path) -> None:
    save(CONFIGS[name], tmp_path / "base")
    model = with_head(load_model(tmp_path / "base"), "sequence", NAMES)
    save_model(model, tmp_path / "tuned", pad_token_id=0)
    reference = theirs(tmp_path / "tuned", AutoModelForSequenceClassification)
    ids, mask = padded("right")
    with torch.inference_mode():
        assert difference(model.head(model(ids), mask), reference(ids, attention_mask=mask.long()).logits) <= BAR
    with pytest.raises(AssertionError, match="sequence"):
        model.logits(model(ids))


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_label_tokens(name: str, tmp_path: Path) -> None:
    """From transformers with the same logits, and back to it, byte for byte; a fresh head is read by transformers."""
    config = AutoConfig.for_model(**CONFIGS[name] | LABELS)
    reference = make_loud(AutoModelForTokenClassification.from_config(config, attn_implementation="eager"))
    reference.save_pretrained(tmp_path)
    model, (ids, mask) = load_model(tmp_path), padded("right")
    with torch.inference_mode():
        expected = reference(ids, attention_mask=mask.long()).logits[mask]
        assert difference(model.head(model(ids))[mask], expected) <= BAR
    save_model(model, tmp_path / "again")
    ours, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", tmp_path))
    assert ours.keys() == given.keys()
    assert all(torch.equal(ours[key], given[key]) for key in ours)
    fresh = with_head(model, "token", NAMES[:2], seed=1)
    save_model(fresh, tmp_path / "fresh")
    with torch.inference_mode():
        expected = theirs(tmp_path / "fresh", AutoModelForTokenClassification)(ids, attention_mask=mask.long()).logits
        assert difference(fresh.head(fresh(ids))[mask], expected[mask]) <= BAR


SPANS = ("gpt2", "gpt-neo", "gpt-neox", "llama3", "mistral", "mixtral", "qwen2", "qwen3-tied", "qwen3-moe")


@pytest.mark.parametrize("name", SPANS)
def test_decoders_find_spans(name: str, tmp_path: Path) -> None:
    """As above; some of these files call the body otherwise than all others do."""
    config = AutoConfig.for_model(**CONFIGS[name])
    reference = make_loud(AutoModelForQuestionAnswering.from_config(config, attn_implementation="eager"))
    reference.save_pretrained(tmp_path)
    model, (ids, mask) = load_model(tmp_path), padded("right")
    assert model.task == "span"

    def agree(ours: Any, other: Any) -> None:
        with torch.inference_mode():
            expected = other(ids, attention_mask=mask.long())
            start, end = ours.head(ours(ids), mask)
        assert difference(start[mask], expected.start_logits[mask]) <= BAR
        assert difference(end[mask], expected.end_logits[mask]) <= BAR
        assert start[~mask].isneginf().all()

    agree(model, reference)
    save_model(model, tmp_path / "again")
    ours, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", tmp_path))
    assert ours.keys() == given.keys()
    assert all(torch.equal(ours[key], given[key]) for key in ours)
    save(CONFIGS[name], tmp_path / "base")
    base = load_model(tmp_path / "base")
    fresh = with_head(base, "span", seed=1)
    save_model(fresh, tmp_path / "fresh")
    agree(fresh, theirs(tmp_path / "fresh", AutoModelForQuestionAnswering))
    body = base.state_dict()
    assert all(torch.equal(tensor, body[key]) for key, tensor in fresh.state_dict().items() if "head." not in key)
    assert with_head(fresh, "token", NAMES).config.layers == base.config.layers  # and back to the usual names


def test_a_decoder_has_no_other_head(tmp_path: Path) -> None:
    save(CONFIGS["phi2"], tmp_path)
    with pytest.raises(UserError, match="phi models have no head for the task span"):
        with_head(load_model(tmp_path), "span")


@pytest.mark.parametrize("head_dim", [8, 6])
def test_a_model_of_our_own_gets_a_head(head_dim: int, tmp_path: Path) -> None:
    """Also where no other library knows its shape."""
    attention = Attention(num_heads=4, num_kv_heads=2, head_dim=head_dim, qk_norm=True, output_bias=head_dim == 6)
    config = uniform(
        vocab_size=97, hidden_size=32, num_layers=2, max_tokens=64, attention=attention, mlp=FeedForward(size=48),
        rotary=Rotary(),
    )  # fmt: skip
    model = with_head(init_weights(Decoder(config), zero_output=False), "sequence", NAMES)
    save_model(model, tmp_path)
    stem = "Qwen3" if head_dim == 8 else "Decoder"
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [f"{stem}ForSequenceClassification"]
    ids = torch.randint(0, 97, (2, 9))
    with torch.inference_mode():
        again = load_model(tmp_path)
        assert torch.equal(again.head(again(ids)), model.head(model(ids)))
