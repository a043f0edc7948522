"""XLNet equals transformers' in fp32: both streams, memories, segments, padding; deliberate mistakes are noticed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from references import difference
from safetensors.torch import load_file, save_file
from seq2seq import CONFIGS, XLNETS, save
from torch import Tensor
from transformers import AutoModelForCausalLM, XLNetForSequenceClassification

from ownlm.checkpoints.weights import load_model, save_model
from ownlm.errors import ArtifactError, UserError
from ownlm.models import two_stream
from ownlm.models.families import from_hf
from ownlm.models.two_stream import RelativeAttention, TwoStream, shifted
from ownlm.train.cross_entropy import linear_cross_entropy

BAR = 1e-5
VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "hf-tiny"
LENGTH, TARGETS = 40, 6


def numbers(*shape: int, below: int = 97, seed: int = 1) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def order() -> tuple[Tensor, Tensor]:
    """perm_mask and target_mapping of a random factorization order: the last tokens of it are to be predicted, all at
    places of their own; the first token of the second row's order is among them and sees nothing."""
    generator = torch.Generator().manual_seed(4)
    ranks = torch.stack([torch.randperm(LENGTH, generator=generator) for _ in range(2)])
    perm_mask = (ranks[:, None, :] >= ranks[:, :, None]).float()
    places = ranks.argsort(1)[:, -TARGETS:]
    places[1, 0] = ranks[1].argmin()
    return perm_mask, torch.nn.functional.one_hot(places, LENGTH).float()


def cases() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """What transformers is given, and what ours is."""
    keep = torch.ones(2, LENGTH, dtype=torch.bool)
    keep[1, :11] = False
    types = numbers(2, LENGTH, below=3)
    perm_mask, targets = order()
    queries = {"perm_mask_BTT": perm_mask.bool(), "targets_BKT": targets}
    return {
        "plain": ({}, {}),
        "padding": ({"attention_mask": keep.float()}, {"mask_BT": keep}),
        "segments": ({"token_type_ids": types}, {"types_BT": types}),
        "permuted": ({"perm_mask": perm_mask}, {"perm_mask_BTT": perm_mask}),
        "two streams": ({"perm_mask": perm_mask, "target_mapping": targets}, queries),
        "targets alone": ({"target_mapping": targets}, {"targets_BKT": targets}),
        "all": (
            {"perm_mask": perm_mask, "target_mapping": targets, "token_type_ids": types, "attention_mask": keep.float()},
            queries | {"types_BT": types, "mask_BT": keep},
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """By name: a directory that transformers wrote, and the model that wrote it."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            made[name] = path, save(name, path)
        return made[name]

    return get


def logits_of(reference: Any, given: dict[str, Any]) -> Tensor:
    """Row by row: transformers' XLNet can't add a mask to the causal one for more."""
    rows = [{name: value[row : row + 1] for name, value in given.items()} for row in range(2)]
    parts = [reference(numbers(2, LENGTH)[row : row + 1], **one).logits for row, one in enumerate(rows)]
    return torch.cat(parts)


@pytest.mark.parametrize("name", XLNETS)
@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("training", [False, True])
def test_logits(name: str, case: str, training: bool, checkpoints: Any) -> None:
    path, reference = checkpoints(name)
    theirs, ours = cases()[case]
    model = load_model(path)
    with torch.set_grad_enabled(training):
        logits = model.logits(model(numbers(2, LENGTH), **ours))
        expected = logits_of(reference, theirs)
    assert expected.abs().max() > 3  # loud
    real = ours["mask_BT"] if case == "padding" else torch.ones(logits.shape[:2], dtype=torch.bool)
    assert difference(logits[real].detach(), expected[real].detach()) <= BAR


def run_with_mems(model: Any, segments: list[Tensor], **given: Any) -> list[Tensor]:
    """Logits of each part of a text, each with the mems of those before."""
    mems, logits = None, []
    for tokens in segments:
        if isinstance(model, TwoStream):
            hidden, mems = model.remember(tokens, mems=mems, **given)
            logits.append(model.logits(hidden))
        else:
            out = model(tokens, mems=mems, use_mems=True, **given)
            mems = out.mems
            logits.append(out.logits)
    return logits


@pytest.mark.parametrize("name", XLNETS)
@pytest.mark.parametrize("segmented", [False, True])
def test_mems(name: str, segmented: bool, checkpoints: Any) -> None:
    path, reference = checkpoints(name)
    texts = [numbers(2, LENGTH, seed=seed) for seed in range(3)]
    types = numbers(2, LENGTH, below=2)
    with torch.no_grad():
        expected = run_with_mems(reference, texts, **({"token_type_ids": types} if segmented else {}))
        ours = run_with_mems(load_model(path), texts, **({"types_BT": types} if segmented else {}))
    for a, b in zip(ours, expected, strict=True):
        assert difference(a, b) <= BAR


def test_mems_beside_both_streams(checkpoints: Any) -> None:
    path, reference = checkpoints("xlnet")
    model = load_model(path)
    theirs, ours = cases()["all"]
    before, tokens = numbers(2, 17, seed=9), numbers(2, LENGTH)
    with torch.no_grad():
        mems = reference(before, use_mems=True).mems
        expected = reference(tokens, mems=mems, use_mems=True, **theirs).logits
        hidden = model(tokens, mems=model.remember(before)[1], **ours)
    assert difference(model.logits(hidden).detach(), expected) <= BAR


def test_how_many_mems_are_left(checkpoints: Any) -> None:
    model = load_model(checkpoints("xlnet-uni")[0])  # 9 mems, the first 8 tokens of each text
    mems = None
    for expected in (8, 9, 9):
        _, mems = model.remember(numbers(2, 12), mems=mems)
        assert [layer.shape for layer in mems] == [(2, expected, 32)] * 3
    assert not any(layer.requires_grad for layer in mems)


@pytest.mark.parametrize("name", ["ref", "ref_two_stream"])
def test_vectors(name: str) -> None:
    if not VECTORS.exists():
        pytest.skip("the shared test vectors lie beside the repository, and are not there")
    vectors = load_file(VECTORS / "xlnet" / f"{name}.safetensors")
    model = load_model(VECTORS / "xlnet")
    given = {"perm_mask_BTT": vectors.get("in.perm_mask"), "targets_BKT": vectors.get("in.target_mapping")}
    with torch.inference_mode():
        assert difference(model.logits(model(vectors["in.input_ids"], **given)), vectors["out"]) <= BAR


def test_loss_and_gradients(checkpoints: Any) -> None:
    """Of permutation language modelling, through the fused cross-entropy that training uses.

    Every query sees a key here: where one sees none, nothing depends on its scores, but transformers' arithmetic
    (score - 1e30) lets a gradient through to them.
    """
    path, reference = checkpoints("xlnet")
    model = load_model(path)
    perm_mask = order()[0]
    targets = torch.nn.functional.one_hot(perm_mask.sum(-1).argsort(1)[:, :TARGETS], LENGTH).float()
    theirs, ours = (
        {"perm_mask": perm_mask, "target_mapping": targets},
        {"perm_mask_BTT": perm_mask, "targets_BKT": targets},
    )
    assert (perm_mask.sum(-1).gather(1, targets.argmax(-1)) < LENGTH).all()
    labels = numbers(2, TARGETS, seed=7)
    reference.zero_grad()
    loss = reference(numbers(2, LENGTH), labels=labels, **theirs).loss
    loss.backward()
    hidden = model.head_input(model(numbers(2, LENGTH), **ours))
    mean = linear_cross_entropy(hidden, model.head_weight, labels, bias_V=model.head_bias) / labels.numel()
    mean.backward()
    assert difference(mean.detach(), loss.detach()) <= BAR
    grads = {name: parameter.grad for name, parameter in reference.named_parameters()}
    attention = model.layers[1].self_attn
    for ours_, theirs_ in (
        (model.embed_tokens.weight.grad, grads["transformer.word_embedding.weight"]),
        (model.embed_mask.grad, grads["transformer.mask_emb"]),
        (model.lm_head_bias.grad, grads["lm_loss.bias"]),
        (attention.r_r_bias.grad, grads["transformer.layer.1.rel_attn.r_r_bias"]),
        (attention.r_proj.weight.grad.T.view(32, 4, 8), grads["transformer.layer.1.rel_attn.r"]),
    ):
        assert difference(ours_, theirs_) <= BAR


def test_shift() -> None:
    """Score by key j of query i is the score by distance M + i - j, which stands at S - distance."""
    scores = torch.randn(2, 3, 4, 11)  # T = 4, S = 7
    for i in range(4):
        for j in range(7):
            assert torch.equal(shifted(scores, 7)[:, :, i, j], scores[:, :, i, 7 - (3 + i - j)])


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", XLNETS)
def test_round_trip_is_byte_identical(name: str, checkpoints: Any, tmp_path: Path) -> None:
    path, reference = checkpoints(name)
    save_model(load_model(path), tmp_path)
    theirs, ours = load_file(path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    with torch.no_grad():
        assert torch.equal(again(numbers(2, LENGTH)).logits, reference(numbers(2, LENGTH)).logits)


def test_sequence_classification(tmp_path: Path) -> None:
    CONFIGS["xlnet-labels"] = CONFIGS["xlnet"] | {"id2label": {0: "a", 1: "b", 2: "c"}}
    reference = save("xlnet-labels", tmp_path / "theirs", kind="XLNetForSequenceClassification")
    del CONFIGS["xlnet-labels"]
    assert isinstance(reference, XLNetForSequenceClassification)
    model = load_model(tmp_path / "theirs")
    theirs, ours = cases()["padding"]
    with torch.no_grad():
        labels = model.head(model(numbers(2, LENGTH), **ours), ours["mask_BT"])
        expected = reference(numbers(2, LENGTH), **theirs).logits
    assert labels.shape == (2, 3)
    assert model.config.head.labels == ("a", "b", "c")
    assert model.task == "sequence"
    assert difference(labels, expected) <= BAR
    save_model(model, tmp_path / "ours")
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_tied_head_stored_twice(checkpoints: Any, tmp_path: Path) -> None:
    path, _ = checkpoints("xlnet")
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    tensors = load_file(path / "model.safetensors")
    copy = tensors["transformer.word_embedding.weight"].clone()
    save_file(tensors | {"lm_loss.weight": copy}, tmp_path / "model.safetensors")
    assert load_model(tmp_path).lm_head is None
    save_file(tensors | {"lm_loss.weight": copy + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"lm_loss\.weight differs"):
        load_model(tmp_path)


def test_faults() -> None:
    with pytest.raises(UserError, match=r"same_length.*n_head 5.*attn_type") as fault:
        from_hf(CONFIGS["xlnet"] | {"same_length": True, "n_head": 5, "attn_type": "both", "bi_data": True})
    assert "bi_data" in str(fault.value)


# ── Deliberate mistakes: each must move the logits well beyond the bar ───────────────────────────────────────────────


def rebuilt(model: TwoStream, **changes: Any) -> TwoStream:
    other = TwoStream(replace(model.config, **changes)).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    return other


def swap(first: str, second: str) -> Callable[[TwoStream], TwoStream]:
    def change(model: TwoStream) -> TwoStream:
        for layer in model.layers:
            a, b = getattr(layer.self_attn, first), getattr(layer.self_attn, second)
            setattr(layer.self_attn, first, b)
            setattr(layer.self_attn, second, a)
        return model

    return change


def zero(name: str) -> Callable[[TwoStream], TwoStream]:
    def change(model: TwoStream) -> TwoStream:
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(name):
                parameter.data.zero_()
        return model

    return change


def scene(**changes: Callable[[Any], Any]) -> Callable[[TwoStream], TwoStream]:
    """What the layers share, changed."""

    def change(model: TwoStream) -> TwoStream:
        plain = model._scene

        def changed(*args: Any) -> Any:
            made = plain(*args)
            return replace(made, **{name: value(made) for name, value in changes.items()})

        model._scene = changed
        return model

    return change


def attention(**changes: Any) -> Callable[[TwoStream], TwoStream]:
    def change(model: TwoStream) -> TwoStream:
        for layer in model.layers:
            for name, value in changes.items():
                setattr(layer.self_attn, name, value)
        return model

    return change


def mlp(**changes: Any) -> Callable[[TwoStream], TwoStream]:
    return lambda m: rebuilt(
        m, layers=tuple(replace(layer, mlp=replace(layer.mlp, **changes)) for layer in m.config.layers)
    )


def forgetful(model: TwoStream) -> TwoStream:
    """Mems are taken but not seen."""
    plain = model.remember
    model.remember = lambda tokens, mems=None, **given: plain(tokens, **given)
    return model


def interleaved_sinusoids(model: TwoStream) -> TwoStream:
    plain = model._distances
    model._distances = lambda *args: plain(*args).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return model


def segments_exchanged(model: TwoStream) -> TwoStream:
    for layer in model.layers:
        layer.self_attn.segments.data.copy_(layer.self_attn.segments.data.flip(0))
    return model


def content_of_the_query_stream(model: TwoStream) -> TwoStream:
    """Queries begin as tokens, not as masks."""
    model.embed_mask.data.copy_(model.embed_tokens.weight.data[5])
    return model


MISTAKES: dict[str, tuple[str, Callable[[TwoStream], TwoStream]]] = {
    "r_w for r_r": ("all", swap("r_w_bias", "r_r_bias")),
    "r_s for r_r": ("all", swap("r_s_bias", "r_r_bias")),
    "keys for distances": ("plain", swap("k_proj", "r_proj")),
    "segment bias dropped": ("segments", zero("r_s_bias")),
    "segments dropped": ("segments", scene(other_BTS=lambda s: None)),
    "segments exchanged": ("segments", segments_exchanged),
    "streams see alike: content": ("two streams", scene(hidden_h_BTS=lambda s: s.hidden_g_BTS)),
    "streams see alike: queries": ("two streams", scene(hidden_g_BTS=lambda s: s.hidden_h_BTS)),
    "order ignored": ("two streams", scene(hidden_h_BTS=lambda s: None, hidden_g_BTS=lambda s: None)),
    "order the other way": (
        "permuted", scene(hidden_h_BTS=lambda s: s.hidden_h_BTS.mT),
    ),
    "queries begin as tokens": ("two streams", content_of_the_query_stream),
    "distances the other way": ("plain", scene(distance_PD=lambda s: s.distance_PD.flip(0))),
    "distances off by one": ("plain", scene(distance_PD=lambda s: s.distance_PD.roll(1, 0))),
    "sinusoids interleaved": ("plain", interleaved_sinusoids),
    "scores not divided": ("plain", attention(scale=1.0)),
    "scale from the hidden size": ("plain", attention(scale=32**-0.5)),
    "padding seen": ("padding", scene(hidden_h_BTS=lambda s: None)),
    "gelu tanh for erf": ("plain", mlp(activation="gelu_tanh")),
    "head's bias dropped": ("plain", zero("lm_head_bias")),
    "clamped": ("plain", lambda m: rebuilt(m, clamp=7)),
    "causal": ("plain", lambda m: rebuilt(m, causal=True)),
    "mems ignored": ("mems", forgetful),
    "fewer mems": ("mems", lambda m: rebuilt(m, max_mems=9)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(mistake: str, checkpoints: Any) -> None:
    case, wrong = MISTAKES[mistake]
    path, reference = checkpoints("xlnet")
    with torch.no_grad():
        model = wrong(load_model(path))
        if case == "mems":
            texts = [numbers(2, LENGTH, seed=seed) for seed in range(2)]
            ours, expected = (run_with_mems(m, texts)[1] for m in (model, reference))
        else:
            theirs, given = cases()[case]
            ours = model.logits(model(numbers(2, LENGTH), **given))
            expected = reference(numbers(2, LENGTH), **theirs).logits
        real = given["mask_BT"] if case == "padding" else torch.ones(ours.shape[:2], dtype=torch.bool)
        assert difference(ours[real], expected[real]) > 3 * BAR


@pytest.mark.parametrize("offset", [-1, 1])
def test_a_wrong_shift_is_noticed(offset: int, checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reference = checkpoints("xlnet")
    monkeypatch.setattr(two_stream, "shifted", lambda x, keys: shifted(x.roll(offset, -1), keys))
    model = load_model(path)
    assert isinstance(model.layers[0].self_attn, RelativeAttention)
    with torch.no_grad():
        ours = model.logits(model(numbers(2, LENGTH)))
        assert difference(ours, reference(numbers(2, LENGTH)).logits) > 3 * BAR


def test_clamp_and_direction_are_noticed(checkpoints: Any) -> None:
    path, reference = checkpoints("xlnet-uni")
    with torch.no_grad():
        expected = reference(numbers(2, LENGTH)).logits
        for changes in ({"clamp": None}, {"clamp": 8}, {"causal": False}):
            model = rebuilt(load_model(path), **changes)
            assert difference(model.logits(model(numbers(2, LENGTH))), expected) > 3 * BAR
