"""Checkpoints in and out: transformers reads what we write, bytes survive a round trip, damage is one sentence."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from references import CONFIGS, SMALL, difference, save
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ownlm.checkpoints.weights import load_model, save_model
from ownlm.errors import ArtifactError, NotFound, UserError
from ownlm.formats.tensorfile import read_header, write_tensors
from ownlm.models.cache import KVCache
from ownlm.models.decoder import Decoder, uniform
from ownlm.models.families import family_of, from_hf, to_hf
from ownlm.models.specs import Attention, FeedForward, Norm, Rotary
from ownlm.train.fresh import init_weights

BAR = 1e-5
PARTS: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_layers": 2, "max_tokens": 32, "norm": Norm(eps=1e-5), "rotary": Rotary(),
    "attention": Attention(num_heads=2, num_kv_heads=1, head_dim=6, qk_norm=True),
    "mlp": FeedForward(size=24, activation="relu2", gated=False),
}  # fmt: skip
RESEARCH = uniform(**PARTS)


# What `to_hf` can describe without the config.json that the model came with.
OURS = ("gpt2", "gpt2-untied-gelu", "llama", "llama-biased", "llama3", "llama-linear", "qwen3", "qwen3-tied")


def digests(path: Path) -> dict[str, str]:
    tensors = load_file(path / "model.safetensors")
    return {name: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for name, t in tensors.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_byte_identical(name: str, tmp_path: Path) -> None:
    save(CONFIGS[name], tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours")
    assert digests(tmp_path / "ours") == digests(tmp_path / "theirs")
    assert (
        from_hf(json.loads((tmp_path / "ours" / "config.json").read_text()))[0]
        == from_hf(json.loads((tmp_path / "theirs" / "config.json").read_text()))[0]
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_what_we_write(name: str, tmp_path: Path) -> None:
    """Equal logits; and where the family is one of our own pretraining, the same 200 tokens by greedy decoding."""
    described = to_hf(from_hf(CONFIGS[name])[0]) if name in OURS else CONFIGS[name]
    model = Decoder(from_hf(described)[0], described).eval()
    init_weights(model, seed=5, zero_output=False, embedding_std=0.5)
    if model.lm_head is not None:
        torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    save_model(model, tmp_path, eos_token_id=[3, 4], bos_token_id=1)
    reference, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert reference.generation_config.eos_token_id == [3, 4]
    assert reference.config.model_type == CONFIGS[name]["model_type"]
    ids = torch.randint(0, 97, (2, 50))
    with torch.inference_mode():
        assert difference(model.logits(model(ids)), reference(ids).logits) <= BAR
        if name not in ("gpt2", "llama3", "qwen3"):
            return
        reference.generation_config.eos_token_id = None
        theirs = reference.generate(
            ids[:1], max_new_tokens=200, do_sample=False, attention_mask=torch.ones_like(ids[:1]), pad_token_id=0
        )
        cache = KVCache(model.config, slots=1, max_tokens=250)
        ours, positions = ids[:1], torch.arange(50)[None]
        step = ours
        for _ in range(200):
            hidden = model(step, place=cache.address(positions))
            step = model.logits(hidden[:, -1:]).argmax(-1)
            ours, positions = torch.cat([ours, step], 1), positions[:, -1:] + 1
    assert torch.equal(ours, theirs)


def test_own_shapes_come_back(tmp_path: Path) -> None:
    """A shape no other library knows is saved under our own model_type."""
    model = init_weights(Decoder(RESEARCH), zero_output=False)
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "ownlm"
    again = load_model(tmp_path, dtype=torch.float32)
    assert again.config == RESEARCH
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.bfloat16().float())


def test_dtype(tmp_path: Path) -> None:
    save(CONFIGS["qwen3"], tmp_path)
    assert load_model(tmp_path).head_weight.dtype == torch.float32
    model = load_model(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save_model(model, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(tmp_path / "half").head_weight.dtype == torch.bfloat16


def test_shards(tmp_path: Path) -> None:
    reference = save(CONFIGS["qwen3"], tmp_path / "whole")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = load_model(tmp_path / "whole"), load_model(tmp_path / "shards")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(shards.state_dict()[name], tensor)


def test_a_bare_gpt2_of_the_hub(tmp_path: Path) -> None:
    """The hub's first files: no prefix, the causal mask stored as a buffer, the config without newer fields."""
    save(CONFIGS["gpt2"], tmp_path)
    expected = load_model(tmp_path).state_dict()
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    for name, tensor in load_model(tmp_path).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_tied_head_stored_twice(tmp_path: Path) -> None:
    save(CONFIGS["qwen3-tied"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": copy}, tmp_path / "model.safetensors")
    load_model(tmp_path)
    save_file(tensors | {"lm_head.weight": copy + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"lm_head\.weight differs"):
        load_model(tmp_path)


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def edit_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        raw = (path / "model.safetensors").read_bytes()
        n = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + n])
        change(header)
        new = json.dumps(header).encode()
        (path / "model.safetensors").write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + n :])

    return damage


def raw_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = path / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return damage


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return damage


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return damage


def duplicate(raw: bytes) -> bytes:
    n = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + n].rstrip()
    first = header[1:].split(b"},", 1)[0] + b"}"
    header = b"{" + first + b"," + header[1:]
    return len(header).to_bytes(8, "little") + header + raw[8 + n :]


def index(weight_map: Any) -> Callable[[Path], None]:
    return lambda path: (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


NORM = "model.norm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], None], type[UserError], str]] = {
    "no file": (lambda path: (path / "model.safetensors").unlink(), NotFound, "no such file"),
    "no config": (lambda path: (path / "config.json").unlink(), NotFound, "no such file"),
    "config is not JSON": (lambda path: (path / "config.json").write_text("{"), ArtifactError, "not JSON"),
    "config is a list": (lambda path: (path / "config.json").write_text("[]"), ArtifactError, "not a JSON object"),
    "empty file": (raw_bytes(lambda raw: b""), ArtifactError, "cut short"),
    "cut in the header": (raw_bytes(lambda raw: raw[:100]), ArtifactError, "cut short"),
    "cut in the data": (raw_bytes(lambda raw: raw[:-1]), ArtifactError, "cut short"),
    "bytes too many": (raw_bytes(lambda raw: raw + b"x"), ArtifactError, "its tensors need"),
    "header bomb": (raw_bytes(lambda raw: (2**62).to_bytes(8, "little") + raw[8:]), ArtifactError, "cut short"),
    "header is no JSON": (raw_bytes(lambda raw: raw[:8] + b"[[[[" + raw[12:]), ArtifactError, "header can't be read"),
    "header nested deep": (
        raw_bytes(lambda raw: (10**5).to_bytes(8, "little") + b"[" * 10**5), ArtifactError, "header can't be read",
    ),
    "name twice": (raw_bytes(duplicate), ArtifactError, "appears twice"),
    "overlapping tensors": (
        edit_header(lambda h: h[NORM].update(data_offsets=[0, 128])), ArtifactError, "follow the one before",
    ),
    "negative shape": (edit_header(lambda h: h[NORM].update(shape=[-32])), ArtifactError, "not counts"),
    "shape and size disagree": (edit_header(lambda h: h[NORM].update(shape=[2**40])), ArtifactError, "doesn't fill"),
    "unknown dtype": (edit_header(lambda h: h[NORM].update(dtype="F4")), ArtifactError, "dtype F4"),
    "entry without a shape": (edit_header(lambda h: h[NORM].pop("shape")), ArtifactError, "shape"),
    "missing tensor": (edit_tensors(lambda t: t.pop(NORM)), ArtifactError, r"model\.norm\.weight is missing"),
    "unexpected tensor": (
        edit_tensors(lambda t: t.update(extra=torch.zeros(1))), ArtifactError, "tensor extra is unexpected",
    ),
    "wrong shape": (
        edit_tensors(lambda t: t.update({NORM: torch.zeros(7)})), ArtifactError, r"norm\.weight has shape \(7,\)",
    ),
    "integers": (
        edit_tensors(lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)})), ArtifactError, "holds torch.int8",
    ),
    "index leaves the folder": (index({NORM: "../model.safetensors"}), ArtifactError, "not the name of"),
    "index names an absolute path": (index({NORM: "/etc/x.safetensors"}), ArtifactError, "not the name of"),
    "index names a pickle": (index({NORM: "model.bin"}), ArtifactError, "not the name of"),
    "index is a list": (index([]), ArtifactError, "weight_map"),
    "index leaves tensors out": (index({NORM: "model.safetensors"}), ArtifactError, "not where the index says"),
    "index names a missing shard": (index({NORM: "b.safetensors"}), NotFound, "no such file"),
    "unknown family": (edit_config(model_type="qwen33"), UserError, "Did you mean 'qwen3'"),
    "no family": (edit_config(model_type=None), UserError, "Known: gpt2"),
    "unknown activation": (edit_config(hidden_act="mish"), UserError, "hidden_act 'mish'"),
    "unknown rope": (
        edit_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}), UserError, "rope_type 'dynamic'",
    ),
    "partial rope": (
        edit_config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.7}), UserError, "an odd number turns",
    ),
    "sliding window": (edit_config(use_sliding_window=True, sliding_window=-1), UserError, "sliding_window"),
    "sliding layers": (
        edit_config(use_sliding_window=True, layer_types=["chunked_attention"] * 2), UserError, "layer_types",
    ),
    "quantized": (edit_config(quantization_config={"bits": 4}), UserError, "quantization_config"),
    "absurd layers": (edit_config(num_hidden_layers=10**9), UserError, "num_hidden_layers"),
    "absurd width": (edit_config(hidden_size=10**12), UserError, "hidden_size"),
    "width is text": (edit_config(hidden_size="32"), UserError, "hidden_size"),
    "eps is negative": (edit_config(rms_norm_eps=-1), UserError, "rms_norm_eps"),
    "heads don't divide": (edit_config(num_key_value_heads=3), UserError, "can't share"),
    "layers than the file has": (edit_config(num_hidden_layers=3), ArtifactError, r"layers\.2\..* is missing"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good")
    save(CONFIGS["qwen3"], path)
    return path


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_error(name: str, good: Path, tmp_path: Path) -> None:
    damage, kind, message = DAMAGE[name]
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        load_model(tmp_path)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_all_faults_of_a_config_at_once() -> None:
    with pytest.raises(UserError, match=r"hidden_act.*rope_type.*vocab_size"):
        from_hf({"model_type": "llama", **SMALL, "vocab_size": 0, "hidden_act": "x", "rope_scaling": {"type": "y"}})


def test_gpt2_settings_we_do_not_compute() -> None:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        with pytest.raises(UserError, match=name):
            from_hf({"model_type": "gpt2", name: True})


def test_own_config_is_checked() -> None:
    raw = to_hf(RESEARCH)
    assert from_hf(json.loads(json.dumps(raw)))[0] == RESEARCH
    raw["decoder"]["layers"][0]["mlp"]["activation"] = "tanh"
    with pytest.raises(UserError, match=r"decoder\.layers\.0\.mlp\.activation"):
        from_hf(raw)
    raw = to_hf(RESEARCH)
    raw["decoder"]["layers"][0]["mlp"]["window"] = 3
    with pytest.raises(UserError, match="fields that this version"):
        from_hf(raw)


def test_what_is_saved_under_which_name() -> None:
    qwen3 = PARTS | {"mlp": FeedForward(size=24)}
    assert family_of(uniform(**qwen3)) == "qwen3"
    assert family_of(uniform(**qwen3 | {"attention": replace(PARTS["attention"], qk_norm=False)})) == "llama"
    assert family_of(uniform(**qwen3 | {"norm": Norm(kind="layer")})) == "ownlm"
    assert family_of(uniform(**qwen3 | {"attention": replace(PARTS["attention"], window=4)})) == "ownlm"
    assert family_of(uniform(**qwen3 | {"rotary": Rotary(fraction=0.5)})) == "ownlm"
    assert family_of(uniform(**qwen3, embed_scale=2.0)) == "ownlm"


def test_learned_positions_in_a_shape_of_our_own() -> None:
    config = uniform(**PARTS | {"rotary": None})
    assert from_hf(json.loads(json.dumps(to_hf(config))))[0] == config


def test_header_beyond_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((150_000_000).to_bytes(8, "little"))
        file.truncate(200_000_000)  # sparse: takes no space
    with pytest.raises(ArtifactError, match="claims 150000000 bytes"):
        read_header(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, [("a", torch.ones(3))])
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="no space left"):
        write_tensors(path, [("b", torch.ones(3))])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_every_dtype_survives(tmp_path: Path) -> None:
    """Odd sizes and shapes, read by the reference implementation and by our header reader."""
    tensors = {
        "a": torch.tensor([True, False, True]),
        "b": torch.randn(3, 5).bfloat16(),
        "c": torch.zeros(0, 4),
        "d": torch.tensor(7, dtype=torch.int64),
        "e": torch.randn(2, 3).T,
    }
    write_tensors(tmp_path / "x.safetensors", tensors.items())
    again = load_file(tmp_path / "x.safetensors")
    assert set(read_header(tmp_path / "x.safetensors")) == set(tensors) == set(again)
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)


LOAD = """
import sys
from pathlib import Path
from ownlm import device
from ownlm.checkpoints.weights import load_model
load_model(sys.argv[1])  # what is imported on the way is no memory of the weights
Path("/proc/self/clear_refs").write_text("5")  # the peak is now
before = device.peak_memory_bytes()
model = load_model(sys.argv[2])
print((device.peak_memory_bytes() - before) / sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is reset as on Linux")
@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt-oss"])
def test_loading_takes_little_more_memory_than_the_weights(kind: str, tmp_path: Path) -> None:
    """Also where they are turned around (GPT-2), stacked from many (Mixtral) or taken apart (GPT-OSS)."""
    large = {
        "gpt2": {"n_embd": 512, "n_layer": 4, "n_head": 8, "vocab_size": 50_257},
        "mixtral": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 20_000},
        "gpt-oss": {"hidden_size": 512, "intermediate_size": 1024, "layer_types": None, "vocab_size": 20_000},
    }[kind]
    for name, hf in (("small", CONFIGS[kind]), ("large", CONFIGS[kind] | large)):
        save_model(Decoder(from_hf(hf)[0], hf).to(torch.bfloat16), tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.9 < float(done.stdout) <= 1.15
