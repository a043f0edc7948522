"""The pretrain stage with every objective, on a farm of a few animals."""

import os
import re
import signal
import textwrap
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ownlm import recipe as recipes
from ownlm.artifact import Workspace
from ownlm.checkpoints.weights import load_model
from ownlm.errors import Interrupted, RecipeError, UserError
from ownlm.lineage import lineage
from ownlm.models.families import from_hf
from ownlm.pipeline import Recipe, fill_names, read_recipe, recipe_path, run_all
from ownlm.report import Reporter
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.corrupt import MaskedLM, PermutationLM, SpanCorruption, marks
from ownlm.tokens.examples import MaskedBatch, corrupted
from ownlm.tokens.shards import memory_shard
from ownlm.tokens.train import TokenizerRecipe, build, train_tokenizer
from ownlm.train.fresh import init_weights
from ownlm.train.loop import Settings, Work, train
from ownlm.train.objectives import Distillation, Loss, masked_lm
from ownlm.train.optimizers import Optimizer
from ownlm.train.pretraining import CausalLM
from ownlm.train.schedule import Schedule
from ownlm.train.stages import PretrainRecipe, pretrain
from train.worlds import prepared, recipe

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {"model_type": "bert", **SMALL, "max_position_embeddings": 64}
DISTILBERT = {
    "model_type": "distilbert",
    "dim": 16,
    "n_layers": 1,
    "n_heads": 2,
    "hidden_dim": 32,
    "max_position_embeddings": 64,
}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
XLNET = {"model_type": "xlnet", "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = prepared(tmp_path_factory.mktemp("workspace"))
    for frame in ("bert", "t5", "xlnet"):
        made = TokenizerRecipe(name=frame, documents="farm", kind="byte", vocab_size=400, frame=frame)  # type: ignore[arg-type]
        train_tokenizer(made, workspace, Reporter.silent())
    return workspace


def of(kind: str, hf: dict[str, Any], objective: Any, **changes: Any) -> PretrainRecipe:
    return recipe(name=f"{kind}-base", tokenizer=kind, model=None, hf=hf, objective=objective, steps=30, **changes)


CASES: dict[str, PretrainRecipe] = {
    "bert": of("bert", BERT, MaskedLM(whole_words=True)),
    # RoBERTa counts places from behind the padding's id, which our tokenizers put at the end.
    "roberta": replace(
        of("bert", {**BERT, "model_type": "roberta", "max_position_embeddings": 400 + 64}, MaskedLM()),
        name="roberta-base",
    ),
    "t5": of("t5", T5, SpanCorruption()),
    "xlnet": of("xlnet", XLNET, PermutationLM()),
}


@pytest.mark.parametrize("kind", CASES)
def test_any_family_learns_its_objective_and_loads_in_transformers(workspace: Workspace, kind: str) -> None:
    import transformers

    made = pretrain(CASES[kind], workspace, Reporter.silent())
    assert made.facts["objective"] == CASES[kind].objective.kind
    assert "bits_per_byte" not in made.facts  # what was shown of the text is not paid for
    first = float(made.file("metrics.jsonl").read_text().splitlines()[0].split('"loss": ')[1].split(",")[0])
    assert made.facts["validation_loss"] < first - 1
    model = load_model(made.path)
    assert model.config.vocab_size == Tokenizer.load(made.path).vocab_size
    their = getattr(transformers, model.hf["architectures"][0]).from_pretrained(str(made.path))
    assert sum(p.numel() for p in their.parameters()) == made.facts["parameters"]
    assert their.config.pad_token_id == Tokenizer.load(made.path).pad_id
    assert pretrain(CASES[kind], workspace, Reporter.silent()).ref == made.ref


def test_a_config_of_a_decoder_trains_the_next_token(workspace: Workspace) -> None:
    hf = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    made = pretrain(recipe(name="gpt2", model=None, hf=hf), workspace, Reporter.silent())
    assert load_model(made.path).hf["model_type"] == "gpt2"
    assert made.facts["bits_per_byte"] < 9


def test_a_student_learns_from_a_teacher_that_its_lineage_names(workspace: Workspace) -> None:
    teacher = pretrain(CASES["bert"], workspace, Reporter.silent())
    distilled = of(
        "bert",
        DISTILBERT,
        Distillation(teacher=teacher.ref, soft=5, hard=2, hidden=1, initialise=True, mask=MaskedLM()),
    )
    student = pretrain(replace(distilled, name="distilled", steps=12), workspace, Reporter.silent())
    assert student.manifest.inputs["teacher"]["ref"] == teacher.ref
    assert teacher.ref in {ancestor.ref for ancestor in lineage(workspace, student)}
    # It began with a layer of the teacher, so it never was as bad as the uniform prediction that the teacher began with.
    first = float(student.file("metrics.jsonl").read_text().splitlines()[0].split('"loss": ')[1].split(",")[0])
    assert student.facts["validation_loss"] < 5.9 < first


def test_a_decoder_learns_from_a_larger_one(workspace: Workspace) -> None:
    teacher = pretrain(recipe(), workspace, Reporter.silent())
    learning = Distillation(teacher="base", temperature=1.0, soft=1.0, hard=0.0)
    hf = {"model_type": "llama", **SMALL, "hidden_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 64}
    student = pretrain(recipe(name="small", model=None, hf=hf, objective=learning), workspace, Reporter.silent())
    assert student.facts["parameters"] < teacher.facts["parameters"]
    assert student.facts["bits_per_byte"] < 9  # scored on the text, not on the teacher


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hf": {"model_type": "brt"}}, "Did you mean 'bert'"),
        ({"hf": {**BERT, "hidden_act": "nope", "hidden_size": 15}}, r"15 is not divisible .*; .*nope|nope.*; .*15 is not divisible"),
        ({"hf": {**BERT, "vocab_size": 10}}, "vocab_size 10 is smaller than the tokenizer's"),
        ({"hf": {**BERT, "max_position_embeddings": 20}}, "context of 64 tokens is longer than the 20"),
        ({"hf": T5}, "masked_lm trains an encoder here, and this is an encoder-decoder"),
        ({"objective": CausalLM()}, "causal_lm trains a decoder here, and this is an encoder"),
        ({"tokenizer": "letters"}, "no mask token"),
        ({"objective": Distillation(teacher="base", mask=MaskedLM())}, "reads another vocabulary"),
        ({"objective": Distillation(teacher="bert-base", hidden=1.0, mask=MaskedLM()), "hf": {**BERT, "hidden_size": 8}},
         "hidden states have 16 numbers and the student's 8"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(workspace: Workspace, changes: dict[str, Any], said: str) -> None:
    pretrain(recipe(), workspace, Reporter.silent())
    pretrain(CASES["bert"], workspace, Reporter.silent())
    with pytest.raises(UserError, match=said):
        pretrain(replace(CASES["bert"], name="wrong", **changes), workspace, Reporter.silent())


def test_the_recipe_file_says_it_in_a_table(tmp_path: Path) -> None:
    names = {"name": "x", "documents": "d", "tokenizer": "t"}

    def read(**table: Any) -> Recipe:
        return recipes.validate(Recipe, {"name": "x", "pretrain": {**names, **table}}, where="mine.toml")

    found = read(objective={"kind": "masked_lm", "whole_words": True}, hf={"model_type": "bert", "hidden_size": 8})
    assert found.pretrain is not None
    assert found.pretrain.objective == MaskedLM(whole_words=True)
    assert found.pretrain.hf == {"model_type": "bert", "hidden_size": 8}
    found = read(objective={"kind": "distillation", "teacher": "large", "mask": {"probability": 0.3}})
    assert found.pretrain is not None
    assert found.pretrain.objective == Distillation(teacher="large", mask=MaskedLM(probability=0.3))
    with pytest.raises(RecipeError, match=r"pretrain.objective.whole_word is not a field. Did you mean whole_words"):
        read(objective={"kind": "masked_lm", "whole_word": True})
    with pytest.raises(RecipeError, match="model and hf both give a shape"):
        read(model={"num_layers": 2}, hf={"model_type": "bert"})
    with pytest.raises(RecipeError, match="document_mask is for next-token prediction"):
        read(objective={"kind": "span_corruption"}, document_mask=True)
    with pytest.raises(RecipeError, match="probability lies between 0 and 1"):
        read(objective={"kind": "masked_lm", "probability": 1.5})


@pytest.mark.parametrize("name", ["bert-cpu", "t5-cpu"])
def test_the_small_recipes_run_on_a_folder(tmp_path: Path, name: str) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(
            "\n".join(f"House {number * k} has {k} goats and no snake." for k in range(40))
        )
    few = [f"documents.source.path={texts}", "pretrain.steps=3", "tokenizer.vocab_size=500", "documents.rules=false"]
    made = run_all(read_recipe(recipe_path(name), few), Workspace(tmp_path / "home"), Reporter.silent())
    assert made["pretrain"].name == f"small-{name.removesuffix('-cpu')}"
    assert made["pretrain"].facts["validation_loss"] > 0


def test_the_tables_of_the_page_are_recipes() -> None:
    """Every TOML block of the how-to page stands in a recipe as it is, beside the shape that it needs."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "pretrain-any-family.md").read_text()
    blocks = re.findall(r"(?m)(?:^    .*\n|^\n)+", page)
    tables = [tomllib.loads(textwrap.dedent(block)) for block in blocks if "[pretrain" in block]
    assert len(tables) == 2
    for table in tables:
        found = recipes.validate(Recipe, fill_names({"name": "x", **table}), where="page").pretrain
        assert found is not None
        from_hf({"vocab_size": 500, "pad_token_id": 0, **(found.hf or {})})


TEXTS = [f"{number} goats and {number * 7 % 11} horses." for number in range(60)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_masked_lm_run_goes_on_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tokenizer = build(TEXTS, kind="byte", vocab_size=261, frame="bert")
    shard, known = memory_shard(TEXTS, tokenizer), marks(tokenizer)
    hf = {**BERT, "architectures": ["BertForMaskedLM"], "vocab_size": tokenizer.vocab_size, "pad_token_id": 0}
    calls = 0

    def interrupting(model: Any, batch: MaskedBatch) -> Loss:
        nonlocal calls
        calls += 1
        if calls in (5, 12):
            os.kill(os.getpid(), signal.SIGINT)
        return masked_lm(model, batch)

    def run(folder: Path, objective: Any) -> torch.Tensor:
        config, family = from_hf(hf)
        model = init_weights(family.build(config, hf), seed=1)
        batches = corrupted(shard, MaskedLM(), known, context=32, rows=4, micro_rows=2, seed=1)
        work = Work(name="run", folder=folder, batches=batches, objective=objective)
        settings = Settings(steps=10, optimizer=Optimizer(), schedule=Schedule(), dtype=dtype)
        train(model, work, settings, Reporter.silent())
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    unbroken = run(tmp_path / "whole", masked_lm)
    for _ in range(2):
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", interrupting)
    broken = run(tmp_path / "parts", interrupting)
    assert calls == 20
    assert torch.equal(unbroken, broken)
