import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ownlm.adapters.lora import LoRA
from ownlm.artifact import Workspace
from ownlm.checkpoints.weights import load_model
from ownlm.cli import main
from ownlm.errors import Interrupted, StorageFull, UserError
from ownlm.evaluate.stage import scores_of
from ownlm.generate.opening import load
from ownlm.recipe import validate
from ownlm.report import Reporter
from ownlm.tokens.codec import Tokenizer
from ownlm.train import checkpoint, stages
from ownlm.train.plan import Corpus, Probe, StepCost, batch_for, corrections, expected_loss, make_plan, record, shape_of
from ownlm.train.stages import FinetuneRecipe, finetune, pretrain
from train.worlds import prepared, recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return prepared(tmp_path_factory.mktemp("workspace"))


def test_pretrain_and_finetune_make_checkpoints(workspace: Workspace) -> None:
    base = pretrain(recipe(), workspace, Reporter.silent())
    assert base.kind == "checkpoint"
    assert base.facts["steps"] == 12
    assert 1 < base.facts["bits_per_byte"] < 9
    rows = [json.loads(line) for line in base.file("metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert pretrain(recipe(), workspace, Reporter.silent()).ref == base.ref
    assert not list(workspace.runs.glob("base-*"))
    tuned = finetune(
        FinetuneRecipe(
            name="chat", checkpoint="base", documents="farm", document_share=0.25, steps=4, batch_tokens=256
        ),
        workspace,
        Reporter.silent(),
    )
    assert tuned.facts["objective"] == "chat"
    assert tuned.file("mask.txt").read_text().count("[") == 1
    tokenizer = Tokenizer.load(tuned.path)
    assert load_model(tuned.path).config.vocab_size == tokenizer.vocab_size


def test_an_adapter_is_tuned_and_loads_with_its_base(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = pretrain(recipe(steps=60), workspace, Reporter.silent())
    lora = LoRA(rank=4, targets="all-linear", train_also=("lm_head",))
    made = {}
    for name, changes in {"adapter": {}, "merged": {"merge": True}, "nf4": {"base_precision": "nf4"}}.items():
        tuning = FinetuneRecipe(
            name=name, checkpoint=base.ref, documents="farm", lora=lora, steps=40, batch_tokens=256, precision="fp32", **changes
        )  # fmt: skip
        made[name] = finetune(tuning, workspace, Reporter.silent())
        assert finetune(tuning, workspace, Reporter.silent()).ref == made[name].ref
    assert {name: one.kind for name, one in made.items()} == {
        "adapter": "adapter",
        "merged": "checkpoint",
        "nf4": "adapter",
    }
    assert not list(workspace.runs.glob("merged-*"))
    for one in made.values():
        rows = [json.loads(line) for line in one.file("metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["loss"] < rows[0]["loss"] / 2
        assert one.facts["trained_parameters"] < one.facts["parameters"]
    wanted_files = {"adapter_config.json", "adapter_model.safetensors", "mask.txt", "metrics.jsonl"}
    assert made["adapter"].manifest.files.keys() == wanted_files
    assert json.loads(made["adapter"].file("adapter_config.json").read_text())["base_model_name_or_path"] == base.ref
    ids = torch.arange(40)[None] + 40
    with_base, merged = load("adapter", workspace=workspace), load("merged", workspace=workspace)
    beside = load(base.ref, adapter="adapter", workspace=workspace)
    folder = load(str(base.path), adapter=made["adapter"].path, workspace=workspace)
    wanted = merged.logits(ids)
    assert (wanted - load(base.ref, workspace=workspace).logits(ids)).abs().max() > 0.1
    for one in (with_base, beside, folder):
        torch.testing.assert_close(one.logits(ids), wanted, atol=1e-5, rtol=1e-5)
    assert with_base.ref == made["adapter"].ref
    monkeypatch.setenv("OWNLM_HOME", str(workspace.root))
    capsys.readouterr()
    said = []
    for words in (["adapter"], [base.ref, "--adapter", "adapter"], [base.ref]):
        assert main(["generate", *words, "--chat", "What sleeps in house 3?", "max_tokens=20"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == merged.generate([{"role": "user", "content": "What sleeps in house 3?"}]).text + "\n"
    assert said[2] != said[0]
    (bits,) = scores_of("adapter", tasks=["bits_per_byte"], workspace=workspace)
    assert 0 < bits.value < 9
    with pytest.raises(UserError, match="adapter artifact, but a checkpoint artifact is needed"):
        finetune(FinetuneRecipe(name="x", checkpoint="adapter", documents="farm"), workspace, Reporter.silent())


def test_the_recipe_of_an_adapter_is_checked() -> None:
    tuning = {"name": "x", "checkpoint": "base", "documents": "farm"}
    given = validate(FinetuneRecipe, tuning | {"lora": {"targets": ["q_proj"], "alpha": 8}}, where="r")
    assert given.lora == LoRA(targets=("q_proj",), alpha=8.0)
    assert validate(FinetuneRecipe, tuning | {"lora": {"targets": "all-linear"}}, where="r").lora is not None
    for wrong, sentence in (
        ({"base_precision": "int8"}, "belong to a lora table"),
        ({"merge": True}, "belong to a lora table"),
        ({"lora": {}, "optimizer": {"kind": "muon"}}, "adamw"),
        ({"lora": {"rank": 0}}, "rank starts at 1"),
        ({"lora": {"targets": []}}, "at least one layer"),
        ({"lora": {"ranks": 3}}, "Did you mean rank"),
        ({"lora": {"targets": "q_proj"}}, "lora.targets"),
    ):
        with pytest.raises(UserError, match=sentence):
            validate(FinetuneRecipe, tuning | wrong, where="r")


def test_a_stopped_stage_goes_on_to_the_same_weights(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pretrain(recipe(seed=5, name="whole"), workspace, Reporter.silent())
    save, calls = checkpoint.save, []

    def stop(*arguments: object) -> None:
        save(*arguments)  # type: ignore[arg-type]
        calls.append(arguments)
        if len(calls) == 1:
            raise Interrupted("now")

    monkeypatch.setattr(checkpoint, "save", stop)
    with pytest.raises(Interrupted):
        pretrain(recipe(seed=5, name="parts"), workspace, Reporter.silent())
    parts = pretrain(recipe(seed=5, name="parts"), workspace, Reporter.silent())
    assert parts.manifest.files["model.safetensors"] == whole.manifest.files["model.safetensors"]


def test_a_full_disk_leaves_the_last_state(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = checkpoint.write_tensors, []

    def full(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(StorageFull):
        pretrain(recipe(name="full"), workspace, Reporter.silent())
    (folder,) = workspace.runs.glob("full-*")
    state = checkpoint.load(folder, Reporter.silent())
    assert state is not None
    assert state.step == 4
    assert pretrain(recipe(name="full"), workspace, Reporter.silent()).facts["steps"] == 12


def test_faults_are_told(workspace: Workspace) -> None:
    with pytest.raises(ValueError, match="context, steps must be at least 1"):
        recipe(context=0, steps=0)
    pretrain(recipe(), workspace, Reporter.silent())
    long = FinetuneRecipe(name="long", checkpoint="base", documents="farm", context=4096)
    with pytest.raises(UserError, match="longer than the checkpoint's 64"):
        finetune(long, workspace, Reporter.silent())


def test_a_run_killed_with_sigkill_ends_in_the_same_bits() -> None:
    script = ROOT / "benchmarks" / "resume_kill9.py"
    command = [sys.executable, str(script), "--kills", "3", "--steps", "200"]
    done = subprocess.run(
        command,
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills" in done.stdout


CORPUS = Corpus(train_tokens=2_000_000, validation_tokens=50_000, vocab_size=512)


def test_a_larger_budget_gives_a_larger_model() -> None:
    cost = StepCost(
        {
            width: Probe(step_s=step_s, validation_token_s=1e-6, final_token_s=2e-6, peak_memory_bytes=0)
            for width, step_s in ((96, 0.03), (256, 0.2))
        },
        CORPUS,
        256,
    )
    assert cost(96) == pytest.approx(0.03)
    assert cost(256) == pytest.approx(0.2)
    best = [
        min((64, 128, 192, 256, 384), key=lambda width: expected_loss(width, cost(width), seconds, CORPUS, 256))
        for seconds in (20, 200, 2000)
    ]
    assert best == sorted(best)
    assert best[0] < best[-1]
    assert batch_for(1e6, 256) == 2048 < batch_for(1e8, 256)
    assert shape_of(192).num_layers == 4


def test_the_plan_fits_its_budget_and_learns_from_the_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ownlm.train import plan as module

    measure = module.probe

    def measured(*args: Any) -> Probe:
        """What a quiet machine takes, however busy this one is."""
        return replace(measure(*args), step_s=0.05, validation_token_s=2e-6, final_token_s=2e-6)

    monkeypatch.setattr(module, "PROBE_S", 0.01)
    monkeypatch.setattr(module, "WIDTHS", (64,))
    monkeypatch.setattr(module, "probe", measured)
    workspace = Workspace(tmp_path)
    plan = make_plan(CORPUS, workspace=workspace, reporter=Reporter.silent(), seconds=60, spent={"reading": 5.0})
    assert 0.8 * 60 < plan.total_s <= 61
    assert plan.epochs <= 4
    assert plan.recipe("base", documents="d", tokenizer="t").steps == plan.steps
    assert stages.Decoder(plan.shape.config(512, plan.context))
    record(workspace, plan, training_s=plan.raw_s * 1.5, total_s=90, peak_memory_bytes=plan.raw_bytes)
    assert corrections(workspace) == (pytest.approx(1.5), 1.0)
    with pytest.raises(UserError, match="training steps only"):
        make_plan(CORPUS, workspace=workspace, reporter=Reporter.silent(), seconds=5, spent={"reading": 5.0})
