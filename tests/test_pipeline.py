"""The whole life at a size that takes seconds: every stage, the second run that finds them, a build of real files."""

import json
import random
import re
from pathlib import Path

import pytest

import ownlm
from ownlm import pipeline
from ownlm.artifact import Workspace
from ownlm.catalog import Catalog
from ownlm.errors import RecipeError, UserError
from ownlm.report import Reporter

TINY = (
    "documents.source.people=24",
    "documents.source.mentions=4",
    "documents.source.story_documents=60",
    "documents.source.sum_documents=60",
    "tokenizer.vocab_size=600",
    "pretrain.steps=6",
    "pretrain.batch_tokens=512",
    "pretrain.model.hidden_size=32",
    "pretrain.model.num_layers=2",
    "pretrain.model.num_heads=2",
    "pretrain.model.num_kv_heads=2",
    "pretrain.model.head_dim=16",
    "pretrain.model.intermediate_size=64",
    "finetune.steps=4",
    "finetune.batch_tokens=512",
    "evaluate.limit=40",
    "evaluate.max_bytes=2000",
)


@pytest.fixture(scope="module")
def village(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("home"))
    return workspace, pipeline.demo(workspace, Reporter.silent(), TINY)


def test_every_stage_leaves_an_artifact_that_leads_back_to_the_documents(village):
    workspace, made = village
    assert {stage: artifact.name for stage, artifact in made.items()} == {
        "documents": "demo-documents",
        "tokenizer": "demo-tokenizer",
        "pretrain": "demo-base",
        "finetune": "demo",
        "evaluate": "demo-scores",
    }
    from ownlm.lineage import lineage

    history = {one.ref: one.state for one in lineage(workspace, made["evaluate"])}
    assert history["demo-documents@1"] == "here"
    assert set(history.values()) == {"here"}


def test_a_second_run_finds_everything(village):
    workspace, made = village
    again = pipeline.demo(workspace, Reporter.silent(), TINY)
    assert {stage: artifact.ref for stage, artifact in again.items()} == {
        stage: artifact.ref for stage, artifact in made.items()
    }
    catalog = Catalog(workspace.root)
    rows = catalog.runs()
    catalog.close()
    assert len(rows) == 10
    assert {row["status"] for row in rows} == {"done"}


def test_the_report_tells_each_skill_with_its_baseline(village):
    _, made = village
    report = made["evaluate"].file("report.md").read_text()
    for word in ("people", "strangers", "stories", "sums", "bits per byte"):
        assert word in report
    assert "<script" not in made["evaluate"].file("report.html").read_text()


def test_the_model_answers_from_python(village):
    workspace, _ = village
    model = ownlm.load("demo", workspace=workspace)
    answer = model.generate([{"role": "user", "content": "Who are you?"}], max_tokens=4)
    assert answer.finish_reason in {"stop", "length"}
    assert "".join(model.stream("The", max_tokens=4)) == model.generate("The", max_tokens=4).text


def test_the_shipped_recipes_are_whole():
    for path in sorted(pipeline.recipes_folder().glob("*.toml")):
        assert pipeline.read_recipe(path).name


def test_the_recipes_of_the_pages_are_whole(tmp_path):
    pages = sorted((Path(__file__).parents[1] / "docs" / "how-to").glob("*.md"))
    found = [table for page in pages for table in re.findall(r"```toml\n(name = .*?)```", page.read_text(), re.S)]
    assert len(found) >= 5
    for table in found:
        (tmp_path / "recipe.toml").write_text(table)
        assert pipeline.read_recipe(tmp_path / "recipe.toml").name


@pytest.mark.parametrize("change", ["people=9", "people=8", "mentions=0"])
def test_a_village_too_small_to_plant_anything_in_is_refused(change):
    path = pipeline.recipe_path("village-cpu")
    with pytest.raises(RecipeError, match="must be"):
        pipeline.read_recipe(path, ["documents.source.mentions=4", f"documents.source.{change}"])


def test_faults_of_all_tables_come_at_once(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('name = "x"\n[pretrain]\nstepps = 1\n[evaluate]\ntasks = ["quizz"]\n')
    with pytest.raises(RecipeError) as caught:
        pipeline.read_recipe(path)
    assert "pretrain.stepps is not a field. Did you mean steps?" in str(caught.value)
    assert "evaluate.tasks" in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghiklmnoprstuvw", k=draw.randint(2, 9))) for _ in range(400)]
    for number in range(120):
        sentences = [" ".join(draw.choices(words, k=draw.randint(5, 14))).capitalize() + "." for _ in range(60)]
        (folder / f"note-{number}.txt").write_text(" ".join(sentences))
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00" * 50)
    (folder / "broken.md").write_bytes(b"\xfa\xfb broken \xff" * 20)
    return folder


def test_build_predicts_trains_and_compares(folder, tmp_path):
    workspace = Workspace(tmp_path / "home")
    made = pipeline.build(folder, workspace=workspace, reporter=Reporter.silent(), name="notes", params="40k")
    assert made["pretrain"].name == "notes"
    assert sum(made["documents"].facts["dropped"].values()) >= 2
    details = made["evaluate"].facts["details"]["bits_per_byte"]
    assert 0 < details["ngram"] < 8
    assert 0 < details["xz"] < 8
    (row,) = [json.loads(line) for line in (workspace.root / "plans.jsonl").read_text().splitlines()]
    assert row["predicted_s"] > 0
    assert row["actual_total_s"] > 0
    assert not list(workspace.runs.glob("*.plan.json"))


def test_a_dry_run_trains_nothing(folder, tmp_path):
    workspace = Workspace(tmp_path / "home")
    made = pipeline.build(folder, workspace=workspace, reporter=Reporter.silent(), params="40k", dry_run=True)
    assert set(made) == {"documents", "tokenizer"}
    assert not [one for one in workspace.all() if one.kind == "checkpoint"]


def test_a_build_of_conversations_is_tuned_on_them(tmp_path, folder):
    rows = [
        {"messages": [{"role": "user", "content": f"Note {n}?"}, {"role": "assistant", "content": f"The mill, {n}."}]}
        for n in range(80)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    workspace = Workspace(tmp_path / "home")
    made = pipeline.build(folder, workspace=workspace, reporter=Reporter.silent(), name="notes", params="40k")
    assert (made["pretrain"].name, made["finetune"].name) == ("notes-base", "notes")
    assert made["evaluate"].manifest.inputs["checkpoint"]["ref"] == "notes@1"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "there is no"), ({}, "no"), ({"a.png": b"\x00\x01" * 99}, "a.png|usable|binary")],
)
def test_folders_without_text_are_one_clear_error(tmp_path, content, sentence):
    folder = tmp_path / "empty"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    workspace = Workspace(tmp_path / "home")
    with pytest.raises(UserError, match=sentence):
        pipeline.build(folder, workspace=workspace, reporter=Reporter.silent(), params="40k")
    assert workspace.all() == []


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("1.5M", 90)])
def test_budgets(text, seconds):
    assert pipeline.parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "-5m", "nanm", "infh", "5x"])
def test_budgets_that_are_none(text):
    with pytest.raises(UserError, match="is not a budget of time"):
        pipeline.parse_budget(text)


def test_vocabulary_grows_with_the_text():
    sizes = [pipeline.vocab_size_for(n) for n in (1_000, 250_000, 4_000_000, 10**9)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[1], sizes[-1]) == (512, 1024, 16384)
