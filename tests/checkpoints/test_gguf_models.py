"""Models through GGUF: weights come back bit for bit, names and keys are those of llama.cpp's own package, transformers computes
the same from what was read; what llama.cpp would compute otherwise is refused, and so are damaged files."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
import torch
from encoder_references import save_encoder
from gguf_cases import CASES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from references import CONFIGS, difference, save
from test_grok import CONFIG as GROK
from test_weights import LOAD
from transformers import AutoModelForCausalLM

from ownlm import gguf
from ownlm.checkpoints.gguf.write import QUANTIZATIONS, Described, describe
from ownlm.checkpoints.weights import load_model, save_model
from ownlm.errors import ArtifactError, NotFound, UserError
from ownlm.formats.tensorfile import read_header
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from ownlm.models.heads import Pooling
from ownlm.train.fresh import init_weights

IDS = torch.randint(0, 97, (2, 160), generator=torch.Generator().manual_seed(1))


def write(path: Path, described: Described, **more: gguf.Value) -> None:
    gguf.write(path, {"general.architecture": described.architecture, **described.metadata, **more}, described.tensors)


Export = Callable[[str], tuple[Any, Described, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """By name: our model of what transformers wrote, its description, and the GGUF file."""
    made: dict[str, tuple[Any, Described, Path]] = {}

    def get(name: str) -> tuple[Any, Described, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            save(CASES[name][1], folder / "hf")
            model = load_model(folder / "hf")
            made[name] = model, describe(model, QUANTIZATIONS["F32"]), folder / "model.gguf"
            write(made[name][2], made[name][1])
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_weights_and_config_come_back(name: str, exported: Export) -> None:
    model, described, path = exported(name)
    assert described.architecture == CASES[name][0]
    again = load_model(path)
    wanted = model.state_dict()
    if name in ("gemma", "gemma2", "gemma3"):  # norms are stored plus one
        assert all(torch.allclose(again.state_dict()[key], tensor, atol=2e-7) for key, tensor in wanted.items())
    else:
        assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in wanted.items())
    with torch.inference_mode():
        assert difference(again.logits(again(IDS)), model.logits(model(IDS))) <= 1e-5
    if name not in ("llama3", "phi3-longrope"):  # the same turns, told in another way
        assert again.config == model.config


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_the_same_from_what_was_read(name: str, exported: Export, tmp_path: Path) -> None:
    """The config.json that is made of the keys means the same to transformers."""
    model, _, path = exported(name)
    save_model(load_model(path), tmp_path / "again")
    other, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(loading.values())
    with torch.inference_mode():
        assert difference(other(IDS).logits, model.logits(model(IDS))) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_names_and_keys_are_llama_cpps(name: str, exported: Export) -> None:
    """Against llama.cpp's Python package: its map from Hugging Face's names, and its list of keys."""
    _, described, path = exported(name)
    architecture = next(key for key, value in reference.MODEL_ARCH_NAMES.items() if value == described.architecture)
    layers = int(described.metadata[f"{described.architecture}.block_count"])  # type: ignore[arg-type]
    mapped = reference.get_tensor_name_map(architecture, layers)
    held = [stored for stored in read_header(path.parent / "hf" / "model.safetensors") if ".experts." not in stored]
    theirs = {mapped.get_name(stored, try_suffixes=(".weight", ".bias")) for stored in held}
    theirs = {f"{stored}.weight" if stored.endswith("attn_sinks") else stored for stored in theirs if stored}
    ours = {tensor.name for tensor in described.tensors}
    extra = {stored for stored in ours if "_exps." in stored or stored.startswith("rope_")}
    assert theirs == ours - extra
    known = {
        value.replace("{arch}", described.architecture)
        for group in vars(reference.Keys).values() if isinstance(group, type)
        for value in vars(group).values() if isinstance(value, str) and "{arch}" in value
    }  # fmt: skip
    assert set(described.metadata) <= known


def test_grok(tmp_path: Path) -> None:
    hf = GROK | {"num_attention_heads": 4}
    model = init_weights(Decoder(from_hf(hf)[0], hf), zero_output=False).eval()
    described = describe(model, QUANTIZATIONS["F32"])
    assert described.architecture == "grok"
    write(tmp_path / "grok.gguf", described)
    again = load_model(tmp_path / "grok.gguf")
    assert again.config == replace(model.config, embed_scale=again.config.embed_scale)  # a float32 in the file
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_bert(tmp_path: Path) -> None:
    """Its body, for embeddings: heads stay behind."""
    save_encoder("bert", "ForMaskedLM", tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    model.pooling = Pooling(kind="cls")
    described = describe(model, QUANTIZATIONS["F32"])
    assert described.architecture == "bert"
    assert described.notes[0] == "llama.cpp uses encoders to embed texts: the heads are left out."
    write(tmp_path / "bert.gguf", described)
    again = load_model(tmp_path / "bert.gguf")
    assert again.pooling == Pooling(kind="cls")
    assert again.config == replace(model.config, head=None)
    with torch.inference_mode():
        assert torch.equal(again(IDS), model(IDS))


def test_llama_31_is_recognised(exported: Export) -> None:
    """Its scaling is stored as divisors only; read back it has Meta's numbers again, other divisors become LongRope's."""
    model, _, path = exported("llama3.1")
    assert load_model(path).hf["rope_parameters"]["rope_type"] == "llama3"
    assert load_model(path).config.layers[0].rotary == model.config.layers[0].rotary


def test_a_tied_head_where_llama_cpp_wants_one(tmp_path: Path) -> None:
    save(CONFIGS["gpt-neox"] | {"tie_word_embeddings": True}, tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    write(tmp_path / "model.gguf", describe(model, QUANTIZATIONS["F32"]))
    again = load_model(tmp_path / "model.gguf")
    assert torch.equal(again.head_weight, model.head_weight)


# ── Types ────────────────────────────────────────────────────────────────────────────────────────────────────────────

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 100}


def wide(folder: Path, **changes: Any) -> Any:
    hf = CONFIGS["llama"] | WIDE | changes
    model = init_weights(Decoder(from_hf(hf)[0], hf), zero_output=False, embedding_std=0.5)
    return model.eval()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_types(quantization: str, tmp_path: Path) -> None:
    """Each tensor has the type that llama.cpp's own mix gives it, and decodes as the reference decodes it."""
    write(tmp_path / "model.gguf", describe(wide(tmp_path), QUANTIZATIONS[quantization]))
    file = gguf.read(tmp_path / "model.gguf")
    types = {name: info.type for name, info in file.tensors.items()}
    finer = {"Q4_K": "Q6_K", "Q5_K": "Q6_K"}.get(quantization, quantization)
    assert types["output.weight"] == {"Q4_0": "Q6_K"}.get(quantization, finer)
    assert types["token_embd.weight"] == types["blk.1.attn_q.weight"] == quantization
    # llama.cpp: i < n / 8 or i >= 7 n / 8 or (i - n / 8) % 3 == 2, for n = 8
    more = [layer in (0, 3, 6, 7) for layer in range(8)]
    for layer, is_finer in enumerate(more):
        for name in ("attn_v", "ffn_down"):
            assert types[f"blk.{layer}.{name}.weight"] == (finer if is_finer else quantization)
    assert {type for name, type in types.items() if "norm" in name} == {"F32"}
    again = load_model(tmp_path / "model.gguf", dtype=torch.float32).state_dict()
    theirs = {tensor.name: tensor for tensor in reference.GGUFReader(tmp_path / "model.gguf").tensors}
    for ours, stored in {
        "embed_tokens.weight": "token_embd.weight",
        "layers.3.mlp.down_proj.weight": "blk.3.ffn_down.weight",
    }.items():
        wanted = reference.dequantize(theirs[stored].data, theirs[stored].tensor_type)
        assert np.array_equal(again[ours].numpy(), wanted.reshape(again[ours].shape))


@pytest.mark.parametrize(
    ("size", "quantization", "wanted"),
    [(96, "Q4_K", "Q5_0"), (96, "Q6_K", "Q8_0"), (96, "Q4_0", "Q4_0"), (48, "Q4_K", "F16"), (48, "Q8_0", "F16")],
)
def test_rows_that_are_no_whole_blocks(size: int, quantization: str, wanted: str, tmp_path: Path) -> None:
    model = wide(tmp_path, hidden_size=size, num_hidden_layers=2)
    types = {tensor.name: tensor.type for tensor in describe(model, QUANTIZATIONS[quantization]).tensors}
    assert types["blk.0.attn_k.weight"] == wanted


def test_dtype(tmp_path: Path) -> None:
    model = wide(tmp_path, num_hidden_layers=2)
    for quantization, wanted in (("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.float32)):
        write(tmp_path / "model.gguf", describe(model, QUANTIZATIONS[quantization]))
        assert load_model(tmp_path / "model.gguf").head_weight.dtype == wanted
        assert load_model(tmp_path / "model.gguf", dtype=torch.bfloat16).head_weight.dtype == torch.bfloat16


def test_half_precision_norms_of_gemma_survive(tmp_path: Path) -> None:
    """weight + 1 is formed and taken apart in float32, whatever the model's own dtype."""
    save(CASES["gemma"][1], tmp_path / "hf")
    model = load_model(tmp_path / "hf", dtype=torch.bfloat16)
    write(tmp_path / "model.gguf", describe(model, QUANTIZATIONS["BF16"]))
    again = load_model(tmp_path / "model.gguf", dtype=torch.bfloat16)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is reset as on Linux")
@pytest.mark.parametrize("quantization", ["F16", "Q4_K"])
def test_loading_takes_little_more_memory_than_the_weights(quantization: str, tmp_path: Path) -> None:
    for name, changes in (
        ("small", {}),
        ("large", {"vocab_size": 30_000, "num_hidden_layers": 4, "hidden_size": 512}),
    ):
        write(tmp_path / f"{name}.gguf", describe(wide(tmp_path, **changes), QUANTIZATIONS[quantization]))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "small.gguf"), str(tmp_path / "large.gguf")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 0.8 < float(done.stdout) <= 1.15


# ── What can't be exported ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gpt2-untied-gelu", "The nearest is gpt2, but layers attention scale is 1.0, there None; layers mlp activation is gelu, there"),
        ("gpt-neo", "The nearest is gpt2, but layers attention bias is False, there True"),
        ("gpt-neox-sequential", "The nearest is gptneox, but layers attention bias is False, there True"),
        ("llama-biased", "The nearest is llama, but layers mlp activation is relu2, there silu"),
        ("llama-yarn", "The nearest is llama, but positions turn by Rotary"),
        ("gemma2", "The nearest is gemma2, but layers attention scale is 0.2236"),
        ("qwen3-tied", "The nearest is qwen3, but layers attention bias is True, there False"),
        ("grok", "The nearest is grok, but the heads are 48 wide together, there 32"),
        ("qwen3-moe", "The nearest is qwen3moe, but layers mlp experts renormalise is False, there True"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(name: str, told: str, tmp_path: Path) -> None:
    if name == "grok":
        save_model(Decoder(from_hf(GROK)[0], GROK), tmp_path)
    else:
        save(CONFIGS[name], tmp_path)
    with pytest.raises(UserError, match=r"llama.cpp has no architecture that computes this model") as raised:
        describe(load_model(tmp_path), QUANTIZATIONS["F32"])
    assert told in str(raised.value)


@pytest.mark.parametrize(("name", "architecture"), [("mistral", "llama"), ("phi3", "phi3"), ("qwen2-windows", "qwen2")])
def test_windows_end_the_context_where_llama_cpp_has_none(name: str, architecture: str, tmp_path: Path) -> None:
    save(CONFIGS[name], tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    described = describe(model, QUANTIZATIONS["F32"])
    assert described.architecture == architecture
    assert "the file's context ends where they begin, at 24." in described.notes[-1]
    write(tmp_path / "model.gguf", described)
    again = load_model(tmp_path / "model.gguf")
    assert again.config.max_tokens == 24
    with torch.inference_mode():
        assert difference(again.logits(again(IDS[:, :24])), model.logits(model(IDS[:, :24]))) <= 1e-5


def test_shapes_of_our_own(tmp_path: Path) -> None:
    """A shape that no family has is exported if an architecture happens to compute it."""
    hf = {**CONFIGS["qwen3"], "tie_word_embeddings": True}
    model = Decoder(from_hf(hf)[0])  # no config.json
    assert describe(model, QUANTIZATIONS["F32"]).architecture == "qwen3"


# ── Files from elsewhere ─────────────────────────────────────────────────────────────────────────────────────────────


def test_parts(exported: Export, tmp_path: Path) -> None:
    """A split model is read through any of its parts."""
    model, described, _ = exported("llama")
    metadata = {"general.architecture": "llama", **described.metadata}
    split = {"split.count": np.uint16(2), "split.tensors.count": np.int32(len(described.tensors))}
    paths = [tmp_path / f"model-0000{number}-of-00002.gguf" for number in (1, 2)]
    gguf.write(paths[0], metadata | split | {"split.no": np.uint16(0)}, described.tensors[:5])
    gguf.write(paths[1], split | {"split.no": np.uint16(1)}, described.tensors[5:])
    for path in paths:
        again = load_model(path)
        assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    gguf.write(paths[1], split | {"split.no": np.uint16(1)}, described.tensors[4:])
    with pytest.raises(ArtifactError, match="a tensor is in more than one part"):
        load_model(paths[0])
    paths[1].unlink()
    with pytest.raises(NotFound, match="model-00002-of-00002"):
        load_model(paths[0])
    paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(
        ArtifactError, match=r"it is one of 2 parts, but isn't called so. Name the parts NAME-00001-of-00002"
    ):
        load_model(tmp_path / "model.gguf")


Change = Callable[[dict[str, gguf.Value], list[gguf.TensorSource]], None]


def set_key(key: str, value: gguf.Value) -> Change:
    return lambda metadata, tensors: metadata.__setitem__(key, value)


def change_tensor(index: int, **changes: Any) -> Change:
    return lambda metadata, tensors: tensors.__setitem__(index, replace(tensors[index], **changes))


def zeros(*shape: int, type: str = "F32") -> dict[str, Any]:
    pieces = lambda: [np.zeros(gguf.byte_size(type, shape), np.uint8)]
    return {"shape": shape, "type": type, "pieces": pieces}


def add(name: str, *shape: int) -> Change:
    return lambda metadata, tensors: tensors.append(gguf.TensorSource(name=name, **zeros(*shape)))


DAMAGE: dict[str, tuple[Change, str]] = {
    "another architecture": (set_key("general.architecture", "mamba"), "its architecture is 'mamba', which ownlm doesn't know"),
    "no architecture": (lambda metadata, _: metadata.pop("general.architecture") and None, "its architecture is ''"),
    "an architecture that is a number": (set_key("general.architecture", np.uint32(7)), "its architecture is ''"),
    "a missing key": (lambda metadata, _: metadata.pop("llama.block_count") and None, "llama.block_count must be a whole number from 1"),
    "no layers": (set_key("llama.block_count", np.uint32(0)), "llama.block_count must be a whole number from 1, got 0"),
    "four billion layers": (set_key("llama.block_count", np.uint32(2**32 - 1)), "llama.block_count must be a whole number"),
    "a million layers": (set_key("llama.block_count", np.uint32(10**6)), "llama.block_count is 1000000, but there are tensors of 2 layers"),
    "three layers": (set_key("llama.block_count", np.uint32(3)), "llama.block_count is 3, but there are tensors of 2 layers"),
    "a huge width": (set_key("llama.embedding_length", np.uint32(2**30)), "hidden_size must be a whole number from 1 to"),
    "a text for a number": (set_key("llama.embedding_length", "32"), "llama.embedding_length must be a whole number from 1, got '32'"),
    "a list of different heads": (set_key("llama.attention.head_count", np.array([4, 2], np.int32)), "head_count differs between layers"),
    "an infinite base": (set_key("llama.rope.freq_base", np.float32(np.inf)), "llama.rope.freq_base must be a number, got inf"),
    "a negative epsilon": (set_key("llama.attention.layer_norm_rms_epsilon", np.float32(-1)), "rms_norm_eps must be a number above 0"),
    "an unknown scaling": (set_key("llama.rope.scaling.type", "warp"), "rope.scaling.type 'warp' is not supported"),
    "heads that can't share": (set_key("llama.attention.head_count_kv", np.uint32(3)), "4 attention heads can't share 3"),
    "a part of each head": (set_key("llama.rope.dimension_count", np.uint32(4)), "llama models turn whole heads, not 4 of 8 dimensions"),
    "a missing tensor": (lambda _, tensors: tensors.pop(3) and None, "is missing"),
    "an unexpected tensor": (change_tensor(3, name="blk.0.extra.weight"), "tensor blk.0.extra.weight is unexpected"),
    "a wrong shape": (change_tensor(0, **zeros(97, 16)), "tensor token_embd.weight has shape (97, 16), the config asks for (97, 32)"),
    "a wrong vocabulary": (change_tensor(0, **zeros(90, 32)), "tensor output.weight has shape (97, 32), the config asks for (90, 32)"),
    "whole numbers": (change_tensor(0, **zeros(97, 32, type="I32")), "tensor token_embd.weight is of type I32, which can't be read"),
    "a type that isn't read": (change_tensor(0, **zeros(97, 256, type="IQ2_XXS")), "IQ2_XXS, which can't be read. Take another file"),
    "divisors that aren't": (add("rope_freqs.weight", 2, 2), "tensor rope_freqs.weight must be a short list of F32"),
    "too few divisors": (add("rope_freqs.weight", 2), "long_factor must be a list of 4 numbers above 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_error(name: str, exported: Export, tmp_path: Path) -> None:
    _, described, _ = exported("llama")
    path = tmp_path / "damaged.gguf"
    metadata, tensors = {"general.architecture": "llama", **described.metadata}, list(described.tensors)
    change, told = DAMAGE[name]
    change(metadata, tensors)
    gguf.write(path, metadata, tensors)
    with pytest.raises(UserError) as raised:
        load_model(path)
    assert told in str(raised.value)
    assert str(raised.value).startswith(f"{path}: ")


VALUES: st.SearchStrategy[gguf.Value] = st.one_of(
    st.integers(0, 2**32 - 1).map(np.uint32), st.integers(-(2**63), 2**63 - 1).map(np.int64), st.floats(width=32).map(np.float32),
    st.booleans().map(np.bool_), st.text(max_size=5), st.lists(st.integers(0, 9), max_size=3).map(lambda x: np.array(x, np.int32)),
    st.just([]), st.just([["a"]]),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_no_value_of_a_key_does_harm(name: str, data: st.DataObject, exported: Export, tmp_path: Path) -> None:
    """The file loads, or there is one clear error."""
    path = tmp_path / "changed.gguf"
    file = gguf.read(exported(name)[2])
    raw = {key: bytes(value) for key, value, _ in gguf.stream(file)}
    key = data.draw(st.sampled_from(sorted(file.metadata)))
    tensors = [
        gguf.TensorSource(
            name=key, type=info.type, shape=info.shape, pieces=lambda key=key: [np.frombuffer(raw[key], np.uint8)]
        )
        for key, info in file.tensors.items()
    ]
    gguf.write(path, file.metadata | {key: data.draw(VALUES)}, tensors)
    try:
        load_model(path)
    except UserError as fault:
        assert str(path) in str(fault)  # noqa: PT017
