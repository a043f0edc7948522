"""Every objective against transformers' own loss on the same weights, a plain formula, and the identities that the loop relies on."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ownlm.checkpoints.weights import save_model
from ownlm.models.decoder import Decoder, uniform
from ownlm.models.families import FAMILIES, from_hf
from ownlm.models.specs import Attention, FeedForward, Rotary
from ownlm.tokens.batches import UNTRAINED, Batch
from ownlm.tokens.corrupt import PermutationLM, draw, factorise
from ownlm.tokens.examples import (
    ClassBatch,
    MaskedBatch,
    PairBatch,
    PermutedBatch,
    Seq2SeqBatch,
    SpanBatch,
    TagBatch,
    seq2seq,
)
from ownlm.train import objectives
from ownlm.train.divergence import Output, linear_divergence
from ownlm.train.fresh import init_weights
from ownlm.train.objectives import OBJECTIVES, Distillation, Loss, distillation

V, B, T = 60, 3, 14
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {"model_type": "bert", **SMALL, **NO_DROPOUT, "max_position_embeddings": 40}
T5 = {
    "model_type": "t5", "vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
XLNET = {
    "model_type": "xlnet",
    "vocab_size": V,
    "d_model": 16,
    "n_layer": 2,
    "n_head": 2,
    "d_inner": 24,
    "dropout": 0.0,
}
TOWER = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "attention_dropout": 0.0,
}  # fmt: skip
CLIP = {
    "model_type": "clip", "projection_dim": 12,
    "text_config": {**TOWER, "model_type": "clip_text_model", "vocab_size": V, "max_position_embeddings": 40, "eos_token_id": 1},
    "vision_config": {**TOWER, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
}  # fmt: skip


def make(hf: dict[str, Any], architecture: str | None = None) -> Any:
    hf = {"architectures": [architecture or FAMILIES[hf["model_type"]].architecture], **hf}
    config, family = from_hf(hf)
    model = family.build(config, hf)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def theirs(model: Any, folder: Path) -> Any:
    """The same model in transformers, through files."""
    import transformers

    save_model(model, folder)
    return getattr(transformers, model.hf["architectures"][0]).from_pretrained(str(folder)).eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(5, V, shape, generator=torch.Generator().manual_seed(seed))


def right_padded(rows: int = B, width: int = T) -> Tensor:
    return torch.arange(width) < torch.tensor([width - 2 * row for row in range(rows)])[:, None]


def masked_batch() -> MaskedBatch:
    mask = right_padded()
    targets = torch.where((ids(B, T, seed=1) % 3 == 0) & mask, ids(B, T, seed=2), UNTRAINED)
    return MaskedBatch(tokens_BT=ids(B, T), targets_BT=targets, mask_BT=mask, num_trained=int((targets >= 0).sum()))


def permuted_batch() -> PermutedBatch:
    able = torch.arange(1, T - 1).numpy()
    orders = [factorise(able, T, 4, draw(1, row), PermutationLM().max_span) for row in range(B)]
    places = torch.stack([torch.from_numpy(places) for places, _ in orders])
    tokens = ids(B, T)
    return PermutedBatch(
        tokens_BT=tokens,
        unseen_BTT=torch.stack([torch.from_numpy(unseen) for _, unseen in orders]),
        places_BK=places,
        targets_BK=tokens.gather(1, places),
        num_trained=places.numel(),
    )


def seq2seq_batch() -> Seq2SeqBatch:
    inputs = [ids(9 - 2 * row, seed=row).tolist() for row in range(B)]
    targets = [ids(4 + row, seed=9 + row).tolist() for row in range(B)]
    return seq2seq(inputs, targets, start_id=0, pad_id=0)


def close(loss: Loss, mean: Tensor) -> None:
    assert float(loss.sum.detach()) / loss.num_trained == pytest.approx(float(mean.detach()), rel=1e-5)


def test_masked_lm_is_berts_loss(tmp_path: Path) -> None:
    model, batch = make(BERT), masked_batch()
    their = theirs(model, tmp_path)(
        input_ids=batch.tokens_BT, attention_mask=batch.mask_BT.long(), labels=batch.targets_BT
    )  # type: ignore[union-attr]
    close(objectives.masked_lm(model, batch), their.loss)


def test_seq2seq_is_t5s_loss(tmp_path: Path) -> None:
    model, batch = make(T5), seq2seq_batch()
    assert batch.mask_BS is not None
    their = theirs(model, tmp_path)(
        input_ids=batch.tokens_BS, attention_mask=batch.mask_BS.long(), labels=batch.targets_BT
    )
    close(objectives.seq2seq(model, batch), their.loss)


def test_permutation_lm_is_xlnets_loss(tmp_path: Path) -> None:
    model, batch = make(XLNET), permuted_batch()
    their = theirs(model, tmp_path)(
        input_ids=batch.tokens_BT,
        perm_mask=batch.unseen_BTT.float(),
        target_mapping=F.one_hot(batch.places_BK, T).float(),
        labels=batch.targets_BK,
    )
    close(objectives.permutation_lm(model, batch), their.loss)


def test_a_prediction_does_not_depend_on_what_comes_later_in_its_order() -> None:
    model, batch = make(XLNET), permuted_batch()
    rank = batch.unseen_BTT[0][batch.places_BK[0]][:, batch.places_BK[0]].sum(
        1
    )  # targets unseen: all for the first of them
    first = int(rank.argmax())
    changed = batch.tokens_BT.clone()
    changed[0, batch.places_BK[0]] = 5  # every target another token

    def told(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            places = F.one_hot(batch.places_BK, T).float()
            hidden: Tensor = model(tokens, perm_mask_BTT=batch.unseen_BTT, targets_BKT=places)
            return hidden[0]

    before, after = told(batch.tokens_BT), told(changed)
    assert torch.equal(before[first], after[first])
    assert not torch.allclose(before[int(rank.argmin())], after[int(rank.argmin())])


def test_contrastive_is_clips_loss(tmp_path: Path) -> None:
    model = make(CLIP)
    tokens = ids(B, T)
    tokens[:, -3] = 1
    pixels = torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    batch = PairBatch(tokens_BT=tokens, pixels_BCHW=pixels, num_trained=B)
    their = theirs(model, tmp_path)(input_ids=tokens, pixel_values=pixels, return_loss=True)
    close(objectives.contrastive(model, batch), their.loss)


LABELS = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


def class_batch() -> ClassBatch:
    types = (torch.arange(T) > 5).long().expand(B, T).contiguous()
    labels = torch.tensor([2, 0, 1])
    return ClassBatch(tokens_BT=ids(B, T), labels_B=labels, mask_BT=right_padded(), types_BT=types, num_trained=B)


def tag_batch() -> TagBatch:
    labels = torch.where(right_padded() & (ids(B, T, seed=4) % 2 == 0), ids(B, T, seed=5) % 3, UNTRAINED)
    return TagBatch(tokens_BT=ids(B, T), labels_BT=labels, mask_BT=right_padded(), num_trained=int((labels >= 0).sum()))


def span_batch() -> SpanBatch:
    starts, ends = torch.tensor([2, 0, 5]), torch.tensor([4, 3, 5])
    return SpanBatch(tokens_BT=ids(B, T), starts_B=starts, ends_B=ends, mask_BT=right_padded(), num_trained=B)


def test_classification_of_texts_and_tokens_and_answers_are_berts(tmp_path: Path) -> None:
    texts = class_batch()
    model = make({**BERT, **LABELS}, "BertForSequenceClassification")
    mask = right_padded().long()
    their = theirs(model, tmp_path / "texts")(
        input_ids=texts.tokens_BT, attention_mask=mask, token_type_ids=texts.types_BT, labels=texts.labels_B
    )
    close(objectives.sequence_classification(model, texts), their.loss)

    tags = tag_batch()
    model = make({**BERT, **LABELS}, "BertForTokenClassification")
    their = theirs(model, tmp_path / "tags")(input_ids=tags.tokens_BT, attention_mask=mask, labels=tags.labels_BT)
    close(objectives.token_classification(model, tags), their.loss)

    spans = span_batch()
    model = make(BERT, "BertForQuestionAnswering")
    # transformers does not hide padding from its softmax, we do: compare without any.
    spans = replace(spans, mask_BT=None)
    their = theirs(model, tmp_path / "spans")(
        input_ids=spans.tokens_BT, start_positions=spans.starts_B, end_positions=spans.ends_B
    )
    close(objectives.span_answer(model, spans), their.loss)


@pytest.mark.parametrize("problem", ["multi", "regression"])
def test_several_labels_and_numbers_are_transformers_losses_too(tmp_path: Path, problem: str) -> None:
    spelled = {"multi": "multi_label_classification", "regression": "regression"}[problem]
    model = make({**BERT, **LABELS, "problem_type": spelled}, "BertForSequenceClassification")
    labels = torch.rand(B, 3, generator=torch.Generator().manual_seed(2))
    labels = labels.round() if problem == "multi" else labels
    batch = replace(class_batch(), labels_B=labels)
    their = theirs(model, tmp_path)(
        input_ids=batch.tokens_BT, attention_mask=right_padded().long(), token_type_ids=batch.types_BT, labels=labels
    )
    close(objectives.sequence_classification(model, batch), their.loss)


def test_decoders_classify_texts_as_transformers_decoders_do(tmp_path: Path) -> None:
    hf = {"model_type": "llama", **SMALL, "max_position_embeddings": 40, "pad_token_id": 0, **LABELS}
    model, batch = make(hf, "LlamaForSequenceClassification"), class_batch()
    tokens = batch.tokens_BT.masked_fill(~right_padded(), 0)
    their = theirs(model, tmp_path)(input_ids=tokens, attention_mask=right_padded().long(), labels=batch.labels_B)
    close(objectives.sequence_classification(model, replace(batch, tokens_BT=tokens)), their.loss)


# The identities that accumulation and packing rely on.

CASES: dict[str, tuple[Any, Any]] = {
    "masked_lm": (lambda: make(BERT), masked_batch),
    "seq2seq": (lambda: make(T5), seq2seq_batch),
    "permutation_lm": (lambda: make(XLNET), permuted_batch),
    "sequence_classification": (lambda: make({**BERT, **LABELS}, "BertForSequenceClassification"), class_batch),
    "token_classification": (lambda: make({**BERT, **LABELS}, "BertForTokenClassification"), tag_batch),
    "span_answer": (lambda: make(BERT, "BertForQuestionAnswering"), span_batch),
}


def row(batch: Any, number: int) -> Any:
    """One row of a batch, without the padding behind it."""
    from dataclasses import fields

    parts = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "num_trained"}
    parts = {name: None if value is None else value[number : number + 1] for name, value in parts.items()}
    for name, letter in (("mask_BT", "_BT"), ("mask_BS", "_BS")):
        if parts.get(name) is not None:
            width = int(parts[name].sum())
            parts = {k: v[:, :width] if v is not None and k.endswith(letter) else v for k, v in parts.items()}
            parts[name] = None
    targets = [v for k, v in parts.items() if k in ("targets_BT", "targets_BK", "labels_BT")]
    return replace(batch, **parts, num_trained=int((targets[0] != UNTRAINED).sum()) if targets else 1)


@pytest.mark.parametrize("name", CASES)
def test_rows_alone_without_padding_give_the_sum_of_the_batch(name: str) -> None:
    """Padding changes nothing, and N micro-batches of one row weigh as one of N rows: loss and gradients."""
    build, make_batch = CASES[name]
    model, batch = build(), make_batch()
    parts = [row(batch, number) for number in range(B)]
    assert sum(part.num_trained for part in parts) == batch.num_trained

    def gradients(batches: list[Any]) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        total = 0.0
        for one in batches:
            loss = OBJECTIVES[name](model, one)
            (loss.sum / batch.num_trained).backward()  # type: ignore[no-untyped-call]
            total += float(loss.sum.detach())
        return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    (together, whole), (apart, summed) = gradients([batch]), gradients(parts)
    assert apart == pytest.approx(together, rel=1e-5)
    for parameter, gradient in whole.items():
        torch.testing.assert_close(summed[parameter], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1))


# Distillation.


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("rows", [7, 200])
def test_divergence_is_the_plain_formula(rows: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from ownlm.train import divergence

    monkeypatch.setattr(divergence, "CHUNK_BYTES", 64 * 4 * V)  # 200 rows: four chunks
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((rows, 6), (V, 6), (V,)))
    truth = Output(torch.randn(rows, 9, generator=generator), torch.randn(V, 9, generator=generator))
    temperature = 2.5

    def plain(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        logits = h @ w.T + b
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        p = torch.softmax(truth.hidden_ND @ truth.weight_VD.T / temperature, -1)
        q = torch.softmax(logits / temperature, -1)
        return (p * (p / q).log()).sum() * temperature**2

    results = []
    for formula in (
        plain,
        lambda h, w, b: linear_divergence(Output(h, w, b, softcap), truth, temperature=temperature),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        loss = formula(*leaves)
        (3 * loss).backward()  # type: ignore[no-untyped-call]
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for naive, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        same = linear_divergence(Output(hidden, weight, bias, softcap), truth, temperature=temperature)
    torch.testing.assert_close(same, results[0][0], rtol=2e-5, atol=0)


def decoder(layers: int, width: int = 16, seed: int = 0) -> Decoder:
    config = uniform(
        vocab_size=V,
        hidden_size=width,
        num_layers=layers,
        max_tokens=T,
        attention=Attention(num_heads=2, num_kv_heads=2, head_dim=8),
        mlp=FeedForward(size=32),
        rotary=Rotary(),
    )
    model = init_weights(Decoder(config), seed=seed, zero_output=False)
    model.head_weight.data.normal_(std=0.5, generator=torch.Generator().manual_seed(seed))  # louder than a fresh head
    return model


def next_token_batch() -> Batch:
    targets = ids(B, T, seed=1)
    targets[0, :4] = UNTRAINED
    return Batch(
        tokens_BT=ids(B, T),
        targets_BT=targets,
        positions_BT=None,
        documents_BT=None,
        num_trained=int((targets >= 0).sum()),
    )


def test_distillation_of_a_decoder_is_hintons_formula() -> None:
    student, teacher, batch = decoder(1, 16), decoder(3, 24, seed=4), next_token_batch()
    settings = Distillation(teacher="large", temperature=3.0, soft=0.7, hard=0.4)
    loss = distillation(student, batch, teacher, settings)
    loss.sum.backward()  # type: ignore[no-untyped-call]
    ours = {
        name: parameter.grad.clone() for name, parameter in student.named_parameters() if parameter.grad is not None
    }
    student.zero_grad()
    kept = batch.targets_BT != UNTRAINED
    logits, truth = (model.logits(model(batch.tokens_BT))[kept] for model in (student, teacher))
    soft = F.kl_div(
        F.log_softmax(logits / 3, -1), F.softmax(truth.detach() / 3, -1), reduction="sum"
    ) * 9  # fmt: skip
    naive = 0.7 * soft + 0.4 * F.cross_entropy(logits, batch.targets_BT[kept], reduction="sum")
    naive.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss.sum, naive, rtol=1e-5, atol=0)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert set(loss.metrics) == {"soft", "hard"}


def test_distillation_of_an_encoder_is_distilberts_formula() -> None:
    teacher = make({**BERT, "num_hidden_layers": 4})
    student = make({**BERT, "num_hidden_layers": 2})
    batch = masked_batch()
    settings = Distillation(teacher="large", temperature=2.0, soft=5.0, hard=2.0, hidden=1.0)
    loss = distillation(student, batch, teacher, settings)
    asked = batch.targets_BT != UNTRAINED
    with torch.no_grad():
        h, g = (model(batch.tokens_BT, mask_BT=batch.mask_BT)[asked] for model in (student, teacher))
        logits, truth = student.logits(h), teacher.logits(g)
        kl = F.kl_div(F.log_softmax(logits / 2, -1), F.softmax(truth / 2, -1), reduction="batchmean") * 4
        cosine = torch.nn.CosineEmbeddingLoss()(h, g, torch.ones(len(h)))
        mean = 5 * kl + 2 * F.cross_entropy(logits, batch.targets_BT[asked]) + cosine
    close(loss, mean)


def test_a_student_begins_with_every_second_layer() -> None:
    teacher, student = make({**BERT, "num_hidden_layers": 4}), make({**BERT, "num_hidden_layers": 2})
    for parameter in student.parameters():
        torch.nn.init.zeros_(parameter)
    assert objectives.start_from_teacher(student, teacher) == [0, 2]
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, theirs[name.replace("layers.1.", "layers.2.")]), name
    assert objectives.evenly_spaced(6, 12) == [0, 2, 4, 6, 8, 10]
    with pytest.raises(ValueError, match="temperature"):
        Distillation(teacher="x", temperature=0.0)


def test_the_loss_of_a_distillation_rises_with_the_distance_from_the_teacher() -> None:
    teacher, batch = decoder(2), next_token_batch()
    settings = Distillation(teacher="large", hard=0.0)
    near, far = decoder(2), decoder(2, seed=7)
    learn = partial(distillation, teacher=teacher, settings=settings)
    with torch.no_grad():
        assert float(learn(near, batch).sum) == pytest.approx(0.0, abs=1e-3)
        assert float(learn(far, batch).sum) > 10
