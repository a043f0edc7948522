"""T5 1.0, 1.1 and mT5 equal transformers' in fp32, padded, cached and beyond the last bucket; deliberate mistakes are noticed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from references import difference
from safetensors.torch import load_file, save_file
from seq2seq import CONFIGS, T5S, UNTIED, loud, save
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM
from transformers.models.t5.modeling_t5 import T5Attention

from ownlm.checkpoints.weights import load_model, save_model
from ownlm.errors import ArtifactError, UserError
from ownlm.models.attention import everything
from ownlm.models.blocks import CrossAttention, Step, attend
from ownlm.models.cache import KVCache
from ownlm.models.encoder_decoder import EncoderDecoder, buckets
from ownlm.models.families import from_hf
from ownlm.train.cross_entropy import linear_cross_entropy

BAR = 1e-5
VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "hf-tiny"
SOURCE, TARGET = 150, 140  # beyond an attention tile, and beyond the distance (40) of the last bucket


def tokens(length: int, rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def padding(length: int, side: str) -> Tensor:
    keep = torch.ones(2, length, dtype=torch.bool)
    part = slice(None, length // 3) if side == "left" else slice(-(length // 3), None)
    keep[1, part] = False
    return keep


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensor]]:
    """By name: a directory that transformers wrote, and its logits."""
    made: dict[str, tuple[Path, Tensor]] = {}

    def get(name: str) -> tuple[Path, Tensor]:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            model = save(name, path)
            with torch.no_grad():
                made[name] = path, model(input_ids=tokens(SOURCE), decoder_input_ids=tokens(TARGET)).logits
        return made[name]

    return get


@pytest.mark.parametrize("name", T5S)
@pytest.mark.parametrize("training", [False, True])
def test_logits(name: str, training: bool, checkpoints: Any) -> None:
    path, reference = checkpoints(name)
    model = load_model(path)
    with torch.set_grad_enabled(training):
        logits = model.logits(model(tokens(SOURCE), tokens(TARGET)))
    assert logits.dtype == torch.float32
    assert reference.std() > 0.2
    assert difference(logits.detach(), reference) <= BAR


def test_vectors() -> None:
    if not VECTORS.exists():
        pytest.skip("the shared test vectors lie beside the repository, and are not there")
    vectors = load_file(VECTORS / "t5_v1.0" / "ref.safetensors")
    model = load_model(VECTORS / "t5_v1.0")
    with torch.inference_mode():
        logits = model.logits(model(vectors["in.input_ids"], vectors["in.decoder_input_ids"]))
    assert difference(logits, vectors["out"]) <= BAR


@pytest.mark.parametrize("name", ["t5-1.0", "t5-1.1"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name: str, side: str, tmp_path: Path) -> None:
    reference, model = save(name, tmp_path), load_model(tmp_path)
    keep_S, keep_T = padding(SOURCE, side), padding(TARGET, side)
    with torch.no_grad():
        expected = reference(
            input_ids=tokens(SOURCE),
            attention_mask=keep_S.long(),
            decoder_input_ids=tokens(TARGET),
            decoder_attention_mask=keep_T.long(),
        ).logits
        hidden = model(tokens(SOURCE), tokens(TARGET), mask_BS=keep_S, decoder_mask_BT=keep_T)
    assert difference(model.logits(hidden).detach()[keep_T], expected[keep_T]) <= BAR


@pytest.mark.parametrize("name", ["t5-1.0", "t5-1.1"])
def test_loss_and_gradients(name: str, tmp_path: Path) -> None:
    """Through the fused cross-entropy that training uses."""
    reference, model = save(name, tmp_path), load_model(tmp_path)
    labels = tokens(20, seed=3)
    loss = reference(input_ids=tokens(30), labels=labels).loss
    loss.backward()
    inputs = torch.cat([torch.zeros(2, 1, dtype=torch.int64), labels[:, :-1]], 1)
    hidden = model.head_input(model(tokens(30), inputs))
    ours = linear_cross_entropy(hidden, model.head_weight, labels, bias_V=model.head_bias) / labels.numel()
    ours.backward()
    assert difference(ours.detach(), loss.detach()) <= BAR
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    pairs = {
        "embed_tokens.weight": "shared.weight",
        "encoder_bias.weight": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder_bias.weight": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.2.mlp.down_proj.weight": "encoder.block.2.layer.1.DenseReluDense.wo.weight",
        "decoder.1.cross_attn.k_proj.weight": "decoder.block.1.layer.1.EncDecAttention.k.weight",
        "decoder.0.cross_layernorm.weight": "decoder.block.0.layer.1.layer_norm.weight",
    }
    for our_name, their_name in pairs.items():
        assert difference(model.get_parameter(our_name).grad, theirs[their_name]) <= BAR, our_name


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("count", "max_distance"), [(32, 128), (12, 40), (4, 3), (8, 512)])
def test_buckets(both_ways: bool, count: int, max_distance: int) -> None:
    relative = torch.arange(-1000, 1001)
    expected = T5Attention._relative_position_bucket(relative, both_ways, count, max_distance)
    assert torch.equal(buckets(relative, count, max_distance, both_ways=both_ways), expected)


# ── Decoding with a cache ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 6]])
def test_cached_is_uncached(chunks: list[int], checkpoints: Any) -> None:
    model = load_model(checkpoints("t5-1.1")[0])
    source, target, keep = tokens(30), tokens(12), padding(30, "right")
    with torch.inference_mode():
        whole = model.logits(model(source, target, mask_BS=keep))
        read = model.source(model.encode(source, keep), keep)
        cache, start = KVCache(model.config, slots=2, max_tokens=12), 0
        for width in chunks:
            hidden = model.decode(target[:, start : start + width], read, cache=cache, start=start)
            assert difference(model.logits(hidden), whole[:, start : start + width]) <= BAR
            start += width


def test_batched_is_one_by_one(checkpoints: Any) -> None:
    """Sources of several lengths in one batch, whatever stands in their padding; rows can be taken out and repeated."""
    model = load_model(checkpoints("t5-1.0")[0])
    lengths = [30, 7, 1]
    source, target = tokens(30, rows=3), tokens(9, rows=3)
    keep = torch.arange(30) < torch.tensor(lengths)[:, None]
    with torch.inference_mode():
        read = model.source(model.encode(source, keep), keep)
        together = model.logits(model.decode(target, read))
        for row, length in enumerate(lengths):
            alone = model.logits(model(source[row : row + 1, :length], target[row : row + 1]))
            assert difference(together[row : row + 1], alone) <= BAR
        chosen = torch.tensor([2, 0, 0])
        some = model.logits(model.decode(target[chosen], read.rows(chosen)))
        assert difference(some, together[chosen]) <= BAR


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", T5S)
def test_round_trip_is_byte_identical(name: str, checkpoints: Any, tmp_path: Path) -> None:
    path, reference = checkpoints(name)
    model = load_model(path)
    assert (model.lm_head is not None) == (name in UNTIED)
    save_model(model, tmp_path)
    theirs, ours = load_file(path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    if name not in UNTIED:  # transformers warns of those, its own files included
        again, loading = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(loading.values())
        assert again.generation_config.decoder_start_token_id == 0
        with torch.no_grad():
            assert difference(again(tokens(SOURCE), decoder_input_ids=tokens(TARGET)).logits, reference) <= BAR


def test_files_of_the_hub(checkpoints: Any, tmp_path: Path) -> None:
    """Older files repeat the embedding for each stack, say by tie_word_embeddings whether logits are scaled, and may store
    the tied head."""
    path, reference = checkpoints("t5-1.0")
    config = json.loads((path / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    shared = tensors["shared.weight"]
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    save_file(tensors | {name: shared.clone() for name in names}, tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    with torch.inference_mode():
        assert difference(model.logits(model(tokens(SOURCE), tokens(TARGET))), reference) <= BAR
    save_file(tensors | {names[0]: shared + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"encoder\.embed_tokens\.weight differs"):
        load_model(tmp_path)
    old = CONFIGS["t5-1.1"]
    assert not from_hf(old)[0].tie_embeddings
    assert from_hf(old)[0].logit_scale == 1.0
    assert from_hf(CONFIGS["t5-1.0"])[0].logit_scale == 32**-0.5


def test_faults() -> None:
    wrong = {"feed_forward_proj": "gated-what", "relative_attention_num_buckets": 2, "decoder_start_token_id": 97}
    with pytest.raises(UserError, match=r"gated-what.*") as fault:
        from_hf(CONFIGS["t5-1.0"] | wrong)
    assert "buckets" in str(fault.value)
    assert "decoder_start_token_id" in str(fault.value)


def test_missing_and_unexpected_tensors(checkpoints: Any, tmp_path: Path) -> None:
    path, _ = checkpoints("t5-1.0")
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    tensors = load_file(path / "model.safetensors")
    bias = tensors.pop("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    save_file(tensors | {"decoder.block.1.layer.0.SelfAttention.extra": bias}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"relative_attention_bias\.weight is missing; .*extra is unexpected"):
        load_model(tmp_path)


# ── Deliberate mistakes: each must move the logits well beyond the bar ───────────────────────────────────────────────


def rebuilt(model: EncoderDecoder, **changes: Any) -> EncoderDecoder:
    """The same weights under another config."""
    other = EncoderDecoder(replace(model.config, **changes)).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    return other


def layers(model: EncoderDecoder, change: Callable[[Any], Any]) -> EncoderDecoder:
    c = model.config
    return rebuilt(model, encoder=tuple(map(change, c.encoder)), layers=tuple(map(change, c.layers)))


def set_(path: str, name: str, value: Any) -> Callable[[EncoderDecoder], EncoderDecoder]:
    def change(model: EncoderDecoder) -> EncoderDecoder:
        setattr(model.get_submodule(path), name, value)
        return model

    return change


def bias_in_the_first_block_only(model: EncoderDecoder) -> EncoderDecoder:
    """Every later block adds nothing."""
    for block in [*model.encoder[1:], *model.decoder[1:]]:
        attention, plain = block.self_attn, block.self_attn.forward
        attention.forward = lambda x, step, plain=plain: plain(x, replace(step, bias_BHTS=None))
    return model


def bias_across(model: EncoderDecoder) -> EncoderDecoder:
    """The encoder's bias on the scores of the cross attention."""

    def forward(self: CrossAttention, x: Tensor, step: Step) -> Tensor:
        keys, values = step.source[self.index]
        bias = model.encoder_bias(0, SOURCE)[:, :, : x.shape[1]]
        seen = everything(x.shape[1], SOURCE)
        return self.o_proj(attend(self._by_head(self.q_proj(x)), keys, values, seen, 1.0, bias_BHTS=bias).flatten(2))

    for block in model.decoder:
        block.cross_attn.forward = lambda x, step, self=block.cross_attn: forward(self, x, step)
    return model


def swap(first: str, second: str) -> Callable[[EncoderDecoder], EncoderDecoder]:
    """Two tensors of one shape exchanged."""

    def change(model: EncoderDecoder) -> EncoderDecoder:
        a, b = model.get_parameter(first), model.get_parameter(second)
        kept = a.detach().clone()
        a.data.copy_(b.data)
        b.data.copy_(kept)
        return model

    return change


def scale(layer: Any) -> Any:
    return replace(layer, attention=replace(layer.attention, scale=None))


def activation(kind: Any) -> Callable[[Any], Any]:
    return lambda layer: replace(layer, mlp=replace(layer.mlp, activation=kind))


def normless_encoder(model: EncoderDecoder) -> EncoderDecoder:
    model.encoder_norm = torch.nn.Identity()
    return model


def acausal(model: EncoderDecoder) -> EncoderDecoder:
    """The decoder sees what follows: its mask taken for the encoder's."""
    for block in model.decoder:
        attention, plain = block.self_attn, block.self_attn.forward
        seen = {None: everything(TARGET, TARGET)}
        attention.forward = lambda x, step, plain=plain, seen=seen: plain(x, replace(step, visibility=seen))
    return model


def eps(layer: Any) -> Any:
    return replace(layer, norm=replace(layer.norm, eps=1e-3))


MISTAKES: dict[str, tuple[str, Callable[[EncoderDecoder], EncoderDecoder]]] = {
    "buckets both ways in the decoder": ("t5-1.0", set_("decoder_bias", "both_ways", True)),
    "buckets one way in the encoder": ("t5-1.0", set_("encoder_bias", "both_ways", False)),
    "another last distance": ("t5-1.0", lambda m: rebuilt(m, max_distance=128)),
    "bias in the first block only": ("t5-1.0", bias_in_the_first_block_only),
    "bias across": ("t5-1.0", bias_across),
    "biases of the stacks exchanged": ("t5-1.0", swap("encoder_bias.weight", "decoder_bias.weight")),
    "scores divided": ("t5-1.0", lambda m: layers(m, scale)),
    "tied head not scaled": ("t5-1.0", lambda m: rebuilt(m, logit_scale=1.0)),
    "untied head scaled": ("t5-1.1", lambda m: rebuilt(m, logit_scale=32**-0.5)),
    "untied head tied": ("t5-1.1", lambda m: rebuilt(m, tie_embeddings=True)),
    "gelu for relu": ("t5-1.0", lambda m: layers(m, activation("gelu"))),
    "gelu erf for tanh": ("t5-1.1", lambda m: layers(m, activation("gelu"))),
    "gelu for silu": ("t5-silu", lambda m: layers(m, activation("gelu_tanh"))),
    "gate and up exchanged": ("mt5", swap("encoder.0.mlp.gate_proj.weight", "encoder.0.mlp.up_proj.weight")),
    "encoder's last norm dropped": ("t5-1.0", normless_encoder),
    "norms of the decoder exchanged": (
        "t5-1.0", swap("decoder.0.cross_layernorm.weight", "decoder.0.post_attention_layernorm.weight"),
    ),
    "norm eps": ("t5-1.0", lambda m: layers(m, eps)),
    "keys and values exchanged": ("t5-1.0", swap("decoder.0.cross_attn.k_proj.weight", "decoder.0.cross_attn.v_proj.weight")),
    "decoder sees what follows": ("t5-1.0", acausal),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(mistake: str, checkpoints: Any) -> None:
    name, wrong = MISTAKES[mistake]
    path, reference = checkpoints(name)
    with torch.no_grad():
        model = wrong(load_model(path))
        assert difference(model.logits(model(tokens(SOURCE), tokens(TARGET))), reference) > 3 * BAR


def test_a_fresh_model_is_built_from_a_config() -> None:
    config, family = from_hf(CONFIGS["mt5"])
    model = family.build(config, CONFIGS["mt5"])
    assert model(tokens(5), tokens(4)).shape == (2, 4, 32)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in loud(CONFIGS["mt5"]).parameters())
