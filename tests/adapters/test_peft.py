"""Adapters in PEFT's format, against its formula on transformers' weights: W + alpha / r B A. `benchmarks/peft_parity.py`
runs PEFT itself."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_references import CASES, save_encoder
from references import CONFIGS, difference, save
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.test_adapters import IDS, logits, loud
from models import seq2seq, test_vision
from ownlm.adapters.lora import LoRA, add_lora, merge
from ownlm.adapters.peft import CONFIG, TENSORS, Names, load_adapter, save_adapter
from ownlm.checkpoints.weights import load_model
from ownlm.errors import ArtifactError, NotFound, UserError

BAR = 1e-5
# family -> modules of its files that a PEFT adapter would target, with their (outputs, inputs)
TARGETS = {
    "llama": {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.down_proj": (32, 48)},
    "gpt2": {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32)},
    "phi3": {"self_attn.qkv_proj": (64, 32), "mlp.gate_up_proj": (96, 32)},
    "gpt-neox": {"attention.query_key_value": (96, 32), "attention.dense": (32, 32)},
}


def folder_of(name: str) -> str:
    return {"gpt2": "transformer.h", "gpt-neox": "gpt_neox.layers"}.get(name, "model.layers")


def write(name: str, path: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> None:
    """An adapter as PEFT would have trained it; rank 3, but 5 for the first target of layer 1."""
    path.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(7)
    first = f"{folder_of(name)}.1.{next(iter(TARGETS[name]))}"
    made = {}
    for layer in range(2):
        for module, (rows, columns) in TARGETS[name].items():
            module = f"{folder_of(name)}.{layer}.{module}"
            rank = 5 if module == first else 3
            key = f"base_model.model.{module}"
            made[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.2
            made[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    config = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none", "use_dora": False, "loftq_config": {},
        "target_modules": [module.rpartition(".")[2] for module in TARGETS[name]], "lora_dropout": 0.1,
        "rank_pattern": {first: 5}, "alpha_pattern": {first: 20}, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    if name == "gpt2":  # "c_proj" would be the feed-forward's too
        config["target_modules"] = "a regular expression"
    save_file(made if tensors is None else tensors, path / TENSORS)
    (path / CONFIG).write_text(json.dumps(config | changes))


def by_formula(reference: Any, path: Path) -> None:
    """Add what the adapter's files say to a transformers model."""
    config, tensors = json.loads((path / CONFIG).read_text()), load_file(path / TENSORS)
    with torch.no_grad():
        for key, A in tensors.items():
            if key.endswith("lora_A.weight"):
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                rank = config["rank_pattern"].get(module, config["r"])
                alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
                assert len(A) == rank
                scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
                delta = scale * tensors[key.replace("lora_A", "lora_B")] @ A
                weight = reference.get_submodule(module).weight
                weight += delta.T if config.get("fan_in_fan_out", "c_" in module) else delta
            elif "lora_" not in key:
                reference.get_parameter(key.removeprefix("base_model.model.")).copy_(A)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("rslora", [False, True])
def test_their_adapter_computes_the_same_here_and_returns_as_it_came(name: str, rslora: bool, tmp_path: Path) -> None:
    reference = save(CONFIGS[name], tmp_path / "base")
    write(name, tmp_path / "theirs", use_rslora=rslora)
    model = load_model(tmp_path / "base")
    load_adapter(model, tmp_path / "theirs", name="theirs")
    with torch.no_grad():
        before = reference(IDS).logits
    by_formula(reference, tmp_path / "theirs")
    with torch.no_grad():
        wanted = reference(IDS).logits
    assert difference(before, wanted) > 0.01
    assert difference(logits(model), wanted) <= BAR
    save_adapter(model, tmp_path / "ours", name="theirs", base="hf/base")
    theirs, ours = load_file(tmp_path / "theirs" / TENSORS), load_file(tmp_path / "ours" / TENSORS)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items())
    config = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (3, 6, name == "gpt2")
    assert len(config["rank_pattern"]) == len(config["alpha_pattern"]) == 1
    merge(model)
    assert difference(logits(model), wanted) <= BAR


@pytest.mark.parametrize("name", [*TARGETS, "qwen3", "mixtral"])
@pytest.mark.parametrize("lora", [LoRA(rank=4), LoRA(rank=3, targets="all-linear", rslora=True)], ids=["q,v", "all"])
def test_ours_means_the_same_in_their_format(name: str, lora: LoRA, tmp_path: Path) -> None:
    """q, k and v of our own, one matrix in the file: a pair of higher rank."""
    reference = save(CONFIGS[name], tmp_path / "base")
    model = load_model(tmp_path / "base")
    add_lora(model, lora, seed=0)
    loud(model, "default")
    save_adapter(model, tmp_path / "ours")
    by_formula(reference, tmp_path / "ours")
    with torch.no_grad():
        assert difference(logits(model), reference(IDS).logits) <= BAR
    again = load_model(tmp_path / "base")
    load_adapter(again, tmp_path / "ours")
    assert difference(logits(again), logits(model)) <= BAR


FAMILIES = {
    **{name: partial(save, config) for name, config in CONFIGS.items()},
    **{name + kind: partial(save_encoder, name, kind) for name, kind in CASES if name in ("bert", "roberta", "distilbert")},
    **{name: partial(seq2seq.save, name) for name in seq2seq.CONFIGS},
    **{name: partial(test_vision.save, name) for name in test_vision.CONFIGS},
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_our_names_are_those_of_their_modules(name: str, tmp_path: Path) -> None:
    """XLNet's attention and gpt-oss's experts are tensors without a layer there, which PEFT can't adapt."""
    reference = FAMILIES[name](tmp_path)
    names = Names(load_model(tmp_path))
    modules = {key: module for key, module in reference.named_modules() if hasattr(module, "weight")}
    assert names.layers.keys() <= modules.keys()
    for module, stored in names.layers.items():
        shape = stored.shape({part: torch.empty(names.shapes[part]) for part, _ in stored.parts})
        assert modules[module].weight.shape == shape
    assert any(".1." in module for module in names.layers)


@pytest.mark.parametrize("kind", ["ForMaskedLM", "ForTokenClassification", "Model"])
def test_an_encoders_adapter(kind: str, tmp_path: Path) -> None:
    reference = save_encoder("bert", kind, tmp_path / "base")
    model = load_model(tmp_path / "base")
    add_lora(model, LoRA(rank=3, targets="all-linear"), seed=0)
    loud(model, "default")
    save_adapter(model, tmp_path / "ours")
    targets = json.loads((tmp_path / "ours" / CONFIG).read_text())["target_modules"]
    assert ("dense" in targets) == (kind == "ForTokenClassification")  # where it would hit a pooler or a head as well
    by_formula(reference, tmp_path / "ours")
    body = reference if kind == "Model" else reference.bert
    with torch.no_grad():
        wanted = body(input_ids=IDS).last_hidden_state
        assert difference(model(IDS), wanted) <= BAR
    again = load_model(tmp_path / "base")
    load_adapter(again, tmp_path / "ours")
    with torch.no_grad():
        assert difference(again(IDS), wanted) <= BAR


def test_whole_modules_travel_too(tmp_path: Path) -> None:
    reference = save(CONFIGS["llama"], tmp_path / "base")
    model = load_model(tmp_path / "base")
    add_lora(model, LoRA(train_also=("lm_head",)), seed=0)
    model.lm_head.copies["default"].weight.data.mul_(1.5)
    save_adapter(model, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert config["modules_to_save"] == ["lm_head"]
    assert config["target_modules"] == ["q_proj", "v_proj"]
    by_formula(reference, tmp_path / "ours")
    again = load_model(tmp_path / "base")
    load_adapter(again, tmp_path / "ours")
    with torch.no_grad():
        assert difference(logits(again), reference(IDS).logits) <= BAR


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' can't be loaded"),
        ({"use_dora": True, "bias": "all"}, "use_dora = True, bias = 'all': not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters = .*: not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"a_new_option": 3}, "a_new_option = 3"),
        ({"r": 0}, "r can't be 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha can't be nan"),
        ({"rank_pattern": {"q_proj": "3"}}, "r can't be '3'"),
        ({"alpha_pattern": [1]}, "alpha_pattern is not a table"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    save(CONFIGS["llama"], tmp_path / "base")
    write("llama", tmp_path / "theirs", **changes)
    with pytest.raises(UserError, match=sentence):
        load_adapter(load_model(tmp_path / "base"), tmp_path / "theirs")


def test_tensors_that_do_not_fit_are_named_and_nothing_is_attached(tmp_path: Path) -> None:
    save(CONFIGS["llama"], tmp_path / "base")
    model = load_model(tmp_path / "base")
    write("llama", tmp_path / "good")
    good = load_file(tmp_path / "good" / TENSORS)
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    cases = {
        "has only one of": {key: value for key, value in good.items() if key != f"{q}.lora_B.weight"},
        "is among target_modules, but not in the file": {k: v for k, v in good.items() if not k.startswith(q)},
        r"pair of shapes \[\(3, 31\)": good | {f"{q}.lora_A.weight": torch.zeros(3, 31)},
        "nothing of that name": good | {"base_model.model.score.weight": torch.zeros(2, 32)},
        "no linear layer of this model": good | {
            "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(3, 32),
            "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": torch.zeros(32, 3),
        },
        "is not an adapter's": good | {"model.norm.weight": torch.zeros(32)},
        "the model asks for": good | {"base_model.model.lm_head.weight": torch.zeros(3, 32)},
    }  # fmt: skip
    for number, (sentence, tensors) in enumerate(cases.items()):
        write("llama", tmp_path / str(number), tensors)
        with pytest.raises(ArtifactError, match=sentence):
            load_adapter(model, tmp_path / str(number))
    assert not [name for name, _ in model.named_modules() if name.endswith(".pairs")]
    (tmp_path / "good" / TENSORS).unlink()
    with pytest.raises(NotFound):
        load_adapter(model, tmp_path / "good")
