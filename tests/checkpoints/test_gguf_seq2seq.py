"""T5 through GGUF: weights and config come back, names and keys are those of llama.cpp's own package, transformers computes the same from
what was read; what llama.cpp would compute otherwise is refused, and so are damaged files. Against llama.cpp itself:
tests/release/test_llama_cpp.py."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
import seq2seq
import torch
import transformers
from gguf_cases import DISTANCE, T5S
from references import difference

from ownlm import gguf
from ownlm.checkpoints.gguf.write import QUANTIZATIONS, Described, describe
from ownlm.checkpoints.weights import load_model, save_model
from ownlm.errors import UserError
from ownlm.formats.tensorfile import read_header

SOURCE = torch.randint(0, 97, (2, 160), generator=torch.Generator().manual_seed(1))
WRITTEN = torch.randint(0, 97, (2, 150), generator=torch.Generator().manual_seed(2))


def write(path: Path, described: Described) -> None:
    gguf.write(path, {"general.architecture": described.architecture, **described.metadata}, described.tensors)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.logits(model(SOURCE, WRITTEN))


@pytest.mark.parametrize("name", T5S)
def test_weights_and_config_come_back(name: str, tmp_path: Path) -> None:
    seq2seq.save(name, tmp_path / "hf", **DISTANCE)
    model = load_model(tmp_path / "hf")
    described = describe(model, QUANTIZATIONS["F32"])
    assert (described.architecture, described.notes) == ("t5", ())
    write(tmp_path / "model.gguf", described)
    again = load_model(tmp_path / "model.gguf")
    scale = model.config.logit_scale
    assert (scale == 1.0) == (name != "t5-1.0")
    assert again.config == replace(model.config, logit_scale=1.0)
    wanted = model.state_dict() | {"norm.weight": model.norm.weight * scale}
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in wanted.items())
    assert difference(logits(again), logits(model)) <= 1e-6


@pytest.mark.parametrize("name", T5S)
def test_transformers_computes_the_same_from_what_was_read(name: str, tmp_path: Path) -> None:
    theirs = seq2seq.save(name, tmp_path / "hf", **DISTANCE)
    write(tmp_path / "model.gguf", describe(load_model(tmp_path / "hf"), QUANTIZATIONS["F32"]))
    save_model(load_model(tmp_path / "model.gguf"), tmp_path / "again")
    again, loading = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "again", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(loading.values())
    with torch.inference_mode():
        wanted = theirs(SOURCE, decoder_input_ids=WRITTEN).logits
        assert difference(again(SOURCE, decoder_input_ids=WRITTEN).logits, wanted) <= 1e-5


@pytest.mark.parametrize("name", T5S)
def test_names_and_keys_are_llama_cpps(name: str, tmp_path: Path) -> None:
    """Against llama.cpp's Python package: its map from Hugging Face's names, and its list of keys."""
    seq2seq.save(name, tmp_path, **DISTANCE)
    described = describe(load_model(tmp_path), QUANTIZATIONS["F32"])
    mapped = reference.get_tensor_name_map(reference.MODEL_ARCH.T5, 3)
    held = read_header(tmp_path / "model.safetensors")
    assert {tensor.name for tensor in described.tensors} == {mapped.get_name(key, (".weight",)) for key in held}
    known = {
        value.replace("{arch}", "t5")
        for group in vars(reference.Keys).values() if isinstance(group, type)
        for value in vars(group).values() if isinstance(value, str) and "{arch}" in value
    }  # fmt: skip
    assert set(described.metadata) <= known


def test_types(tmp_path: Path) -> None:
    """Rows of whole blocks are coded in both stacks, their last layers more finely; norms and scores of distances stay whole."""
    wide = {"d_model": 256, "d_kv": 64, "d_ff": 256, "num_layers": 9}
    seq2seq.save("t5-1.1", tmp_path / "hf", **DISTANCE, **wide)
    described = describe(load_model(tmp_path / "hf"), QUANTIZATIONS["Q4_K"])
    types = {tensor.name: tensor.type for tensor in described.tensors}
    assert types["output.weight"] == types["enc.blk.8.ffn_down.weight"] == types["dec.blk.1.attn_v.weight"] == "Q6_K"
    assert (
        types["token_embd.weight"] == types["enc.blk.1.ffn_down.weight"] == types["dec.blk.1.attn_q.weight"] == "Q4_K"
    )
    assert {type for key, type in types.items() if "norm" in key or "rel_b" in key} == {"F32"}
    write(tmp_path / "model.gguf", described)
    again = load_model(tmp_path / "model.gguf", dtype=torch.float32).state_dict()
    theirs = {tensor.name: tensor for tensor in reference.GGUFReader(tmp_path / "model.gguf").tensors}
    coded = theirs["enc.blk.1.ffn_down.weight"]
    wanted = reference.dequantize(coded.data, coded.tensor_type)
    assert np.array_equal(again["encoder.1.mlp.down_proj.weight"].numpy(), wanted)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("t5-silu", DISTANCE, "The nearest is t5, but encoder mlp activation is silu, there gelu_tanh"),
        ("mt5", {}, "The nearest is t5, but max distance is 40, there 128"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    name: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    seq2seq.save(name, tmp_path, **changes)
    with pytest.raises(UserError) as raised:
        describe(load_model(tmp_path), QUANTIZATIONS["F32"])
    assert told in str(raised.value).replace("_", " ").replace("gelu tanh", "gelu_tanh")


def test_as_many_layers_in_both_stacks_need_one_number(tmp_path: Path) -> None:
    """Older files of llama.cpp's don't count the decoder's."""
    seq2seq.save("t5-1.1", tmp_path / "hf", num_decoder_layers=3, **DISTANCE)
    model = load_model(tmp_path / "hf")
    described = describe(model, QUANTIZATIONS["F32"])
    del described.metadata["t5.decoder_block_count"]
    write(tmp_path / "model.gguf", described)
    assert load_model(tmp_path / "model.gguf").config == model.config


Change = Callable[[dict[str, gguf.Value], list[gguf.TensorSource]], Any]
DAMAGE: dict[str, tuple[Change, str]] = {
    "a layer too many": (lambda keys, _: keys.update({"t5.decoder_block_count": np.uint32(9)}),
                         "t5.decoder_block_count is 9, but there are tensors of 2 layers"),
    "no buckets": (lambda keys, _: keys.pop("t5.attention.relative_buckets_count"),
                   "t5.attention.relative_buckets_count must be a whole number from 1, got None"),
    "few buckets": (lambda keys, _: keys.update({"t5.attention.relative_buckets_count": np.uint32(3)}),
                    "3 buckets can't tell distances up to 128 apart"),
    "a start token that isn't": (lambda keys, _: keys.update({"t5.decoder_start_token_id": np.uint32(97)}),
                                 "decoder_start_token_id must be a whole number from 0 to 96, got 97"),
    "a gate in one stack": (lambda _, tensors: tensors.remove(next(one for one in tensors if "enc.blk.0.ffn_gate" in one.name)),
                            "is unexpected"),
    "nothing": (lambda _, tensors: tensors.clear(), "there are tensors of 0 layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_error(name: str, tmp_path: Path) -> None:
    seq2seq.save("t5-1.1", tmp_path / "hf", **DISTANCE)
    described = describe(load_model(tmp_path / "hf"), QUANTIZATIONS["F32"])
    change, told = DAMAGE[name]
    change(described.metadata, described.tensors)
    write(tmp_path / "model.gguf", described)
    with pytest.raises(UserError, match=re.escape(told)) as raised:
        load_model(tmp_path / "model.gguf")
    assert str(raised.value).startswith(str(tmp_path / "model.gguf"))
