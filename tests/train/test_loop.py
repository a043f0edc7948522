import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ownlm.adapters.lora import LoRA, add_lora
from ownlm.errors import Busy, Interrupted, UserError
from ownlm.models.decoder import Decoder
from ownlm.quantization.codes import Scheme, quantize_linears
from ownlm.report import Reporter
from ownlm.tokens.batches import Batch, Batches, ConversationRows, DocumentRows, validation_documents
from ownlm.tokens.shards import memory_shard
from ownlm.tokens.train import build
from ownlm.train import checkpoint
from ownlm.train.fresh import init_weights
from ownlm.train.loop import Outcome, Settings, Work, train, validate
from ownlm.train.objectives import Loss, causal_lm
from ownlm.train.optimizers import Optimizer
from ownlm.train.schedule import Schedule
from train.worlds import SHAPE

TEXTS = [f"{number} goats and {number * 7 % 11} horses." for number in range(60)]
TOKENIZER = build(TEXTS, kind="byte", vocab_size=259)
SHARD = memory_shard(TEXTS, TOKENIZER)


def model() -> Decoder:
    return init_weights(Decoder(SHAPE.config(TOKENIZER.vocab_size, 32)), seed=1)


def adapted(base: Scheme | None = None) -> Decoder:
    """The same with an adapter: over weights, or over integers."""
    decoder = init_weights(Decoder(SHAPE.config(TOKENIZER.vocab_size, 32)), seed=1, zero_output=False)
    if base is not None:
        quantize_linears(decoder, base)
    add_lora(decoder, LoRA(rank=2, targets="all-linear", train_also=("lm_head",)), seed=2)
    return decoder


def work(folder: Path, micro_rows: int = 4, **changes: object) -> Work:
    batches = Batches(DocumentRows(SHARD, 32, seed=1), rows=4, micro_rows=micro_rows)
    values = {"name": "run", "folder": folder, "batches": batches, "objective": causal_lm}
    return Work(**values | changes)  # type: ignore[arg-type]


def settings(steps: int = 10, dtype: torch.dtype = torch.float32, **changes: object) -> Settings:
    values = {"steps": steps, "optimizer": Optimizer(), "schedule": Schedule(), "dtype": dtype}
    return Settings(**values | changes)  # type: ignore[arg-type]


def weights(decoder: Decoder) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in decoder.parameters()])


def test_accumulation_does_not_change_the_run(tmp_path: Path) -> None:
    results: list[Outcome] = []
    for micro_rows in (4, 1):
        adamw = Optimizer(kind="adamw", lr=1e-3, embedding_lr=1e-3, head_lr=1e-3, vector_lr=1e-3, eps=1e-6)
        results.append(
            train(model(), work(tmp_path / str(micro_rows), micro_rows), settings(optimizer=adamw), Reporter.silent())
        )
    for one, other in zip(results[0].rows, results[1].rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)


def test_it_learns_in_bf16_and_validates(tmp_path: Path) -> None:
    held_out = lambda: validation_documents(SHARD, 32, rows=8)
    before = validate(model(), causal_lm, held_out())
    outcome = train(
        model(), work(tmp_path, validation=held_out), settings(30, torch.bfloat16, validate_every=10), Reporter.silent()
    )
    assert [row["step"] for row in outcome.rows if "validation_loss" in row] == [10, 20, 30]
    assert outcome.validation_loss is not None
    assert outcome.validation_loss < before - 1
    assert outcome.tokens == 30 * 4 * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [model, adapted, lambda: adapted("nf4")], ids=["whole", "lora", "nf4"])
def test_an_interrupted_run_goes_on_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, model: Callable[[], Decoder]
) -> None:
    whole, parts = model(), model()
    unbroken = train(whole, work(tmp_path / "whole"), settings(dtype=dtype), Reporter.silent())
    calls = 0

    def interrupting(decoder: Decoder, batch: Batch) -> Loss:
        nonlocal calls
        calls += 1
        if calls in (3, 7):
            os.kill(os.getpid(), signal.SIGINT)
        return causal_lm(decoder, batch)

    for _ in range(2):
        with pytest.raises(Interrupted, match="state is saved"):
            train(model(), work(tmp_path / "parts", objective=interrupting), settings(dtype=dtype), Reporter.silent())
    broken = train(parts, work(tmp_path / "parts", objective=interrupting), settings(dtype=dtype), Reporter.silent())
    assert calls == 10
    assert torch.equal(weights(whole), weights(parts))
    plain = [
        [{key: row[key] for key in row if key != "tokens_per_s"} for row in run.rows] for run in (unbroken, broken)
    ]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_learns_and_its_state_holds_nothing_else(tmp_path: Path, dtype: torch.dtype) -> None:
    decoder = adapted()
    frozen = {name: p.detach().clone() for name, p in decoder.named_parameters() if not p.requires_grad}
    trained = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    adamw = Optimizer(kind="adamw", lr=0.01, head_lr=0.005)
    outcome = train(
        decoder, work(tmp_path), settings(30, dtype, optimizer=adamw, checkpoint_every=30), Reporter.silent()
    )
    assert outcome.rows[-1]["loss"] < outcome.rows[0]["loss"] - 1
    state = checkpoint.load(tmp_path, Reporter.silent())
    assert state is not None
    assert {name: len(state.tensors[name]) for name in ("master", "first", "second")} == dict.fromkeys(
        ("master", "first", "second"), trained
    )
    for name, parameter in decoder.named_parameters():
        assert parameter.dtype == torch.float32
        if name in frozen:
            assert torch.equal(parameter, frozen[name].to(dtype).float())


def test_a_damaged_state_is_passed_over(tmp_path: Path) -> None:
    train(model(), work(tmp_path), settings(checkpoint_every=2), Reporter.silent())
    newest, older = sorted(tmp_path.glob("state-*"), reverse=True)
    torn = bytearray((newest / checkpoint.TENSORS).read_bytes())
    torn[-1] ^= 1
    (newest / checkpoint.TENSORS).write_bytes(torn)
    state = checkpoint.load(tmp_path, Reporter.silent())
    assert state is not None
    assert older.name == f"state-{state.step:08d}"
    (older / checkpoint.RECORD).write_text("{}")
    assert checkpoint.load(tmp_path, Reporter.silent()) is None


def test_a_loss_that_is_no_number_stops_with_the_state_before_it(tmp_path: Path) -> None:
    calls = 0

    def breaking(decoder: Decoder, batch: Batch) -> Loss:
        nonlocal calls
        calls += 1
        loss = causal_lm(decoder, batch)
        return Loss(sum=loss.sum * (float("nan") if calls == 4 else 1), num_trained=loss.num_trained)

    with pytest.raises(UserError, match=r"the loss became nan .* at step 4"):
        train(model(), work(tmp_path, objective=breaking), settings(), Reporter.silent())
    state = checkpoint.load(tmp_path, Reporter.silent())
    assert state is not None
    assert state.step == 3
    assert state.tensors["master"].isfinite().all()


def test_two_processes_cannot_train_one_run(tmp_path: Path) -> None:
    with checkpoint.locked(tmp_path), pytest.raises(Busy):
        train(model(), work(tmp_path), settings(), Reporter.silent())


def test_packed_conversations_give_the_loss_of_each_alone() -> None:
    from ownlm.records import Conversation, Message

    talks = [
        Conversation(messages=(Message(role="user", content=f"{n}?"), Message(role="assistant", content="x" * (n + 1))))
        for n in range(5)
    ]
    decoder = model()
    decoder.lm_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    together = ConversationRows(talks, TOKENIZER, 128, seed=0)
    assert together.rows_per_epoch < 5

    def total(rows: ConversationRows) -> Iterator[float]:
        from ownlm.tokens.batches import validation_conversations

        with torch.no_grad():
            for batch in validation_conversations(rows, rows=2):
                yield float(causal_lm(decoder, batch).sum)

    alone = sum(sum(total(ConversationRows([talk], TOKENIZER, 128, seed=0))) for talk in talks)
    assert sum(total(together)) == pytest.approx(alone, rel=1e-5)
