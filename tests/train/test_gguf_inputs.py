"""A GGUF file is an input like any checkpoint: tuned, evaluated, shown, and known again by its content."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from worlds import prepared, recipe

from ownlm import api
from ownlm.adapters.lora import LoRA
from ownlm.artifact import Workspace
from ownlm.checkpoints.weights import load_model
from ownlm.cli import main
from ownlm.errors import ArtifactError, NotFound, UserError
from ownlm.evaluate.stage import EvaluateRecipe, evaluate, scores_of
from ownlm.generate.opening import load
from ownlm.lineage import lineage
from ownlm.release.export import export
from ownlm.report import Reporter
from ownlm.tokens.gguf import tokenizer_of
from ownlm.train.pretraining import Distillation
from ownlm.train.stages import FinetuneRecipe, finetune, pretrain

SILENT = Reporter.silent()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With a checkpoint "base"."""
    made = prepared(tmp_path_factory.mktemp("workspace"))
    pretrain(recipe(), made, SILENT)
    return made


@pytest.fixture(scope="module")
def file(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` as a GGUF file that holds the same numbers."""
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    export("base", out=path, quantization="F32", workspace=workspace)
    return path


def test_it_is_known_by_its_content(workspace: Workspace, file: Path, tmp_path: Path) -> None:
    artifact = workspace.open(file, "checkpoint")
    assert (artifact.kind, artifact.name, artifact.version, artifact.ref) == ("checkpoint", "base", 0, str(file))
    content = file.read_bytes()
    assert artifact.manifest.files == {
        "base.gguf": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    }
    assert artifact.file("base.gguf").read_bytes() == content
    with pytest.raises(ArtifactError, match=r"a checkpoint artifact, but a documents artifact is needed"):
        workspace.open(file, "documents")
    with pytest.raises(NotFound, match=r"none.gguf: there is no such file"):
        workspace.open(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="ownlm didn't make this, and doesn't delete it"):
        workspace.remove(str(file))
    # Through a link into a cache, which has other names for its files.
    (tmp_path / "blob").write_bytes(content)
    (tmp_path / "base.gguf").symlink_to(tmp_path / "blob")
    assert workspace.open(tmp_path / "base.gguf").digest == artifact.digest
    for number in (1, 2):
        (tmp_path / f"two-0000{number}-of-00002.gguf").write_bytes(content[:number])
    assert list(workspace.open(tmp_path / "two-00002-of-00002.gguf").manifest.files) == [
        "two-00001-of-00002.gguf",
        "two-00002-of-00002.gguf",
    ]


def test_tuning_equals_that_of_the_original(workspace: Workspace, file: Path) -> None:
    """The weights of the file are those of the checkpoint, so the same recipe ends in the same bits."""
    tuned = {
        name: finetune(
            FinetuneRecipe(
                name=name, checkpoint=ref, documents="farm", document_share=0.25, steps=4, batch_tokens=256, precision="fp32"
            ),
            workspace,
            SILENT,
        )
        for name, ref in {"tuned": "base", "tuned-gguf": str(file)}.items()
    }  # fmt: skip
    source = tuned["tuned-gguf"].manifest.inputs["checkpoint"]
    assert source == {"ref": str(file), "kind": "checkpoint", "digest": workspace.open(file).digest}
    assert source["digest"] != tuned["tuned"].manifest.inputs["checkpoint"]["digest"]
    ours, theirs = (load_model(tuned[name].path).state_dict() for name in ("tuned-gguf", "tuned"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert tokenizer_of(tuned["tuned-gguf"].path).encode("The cat") == tokenizer_of(file).encode("The cat")


def test_an_adapter_over_a_file(workspace: Workspace, file: Path, tmp_path: Path) -> None:
    moving = tmp_path / "moving.gguf"
    shutil.copy(file, moving)
    lora = FinetuneRecipe(
        name="adapter", checkpoint=str(moving), documents="farm", steps=3, batch_tokens=256, lora=LoRA(rank=2)
    )
    made = finetune(lora, workspace, SILENT)
    ids = torch.arange(20)[None] + 40
    assert not torch.equal(
        load("adapter", workspace=workspace).logits(ids), load(str(file), workspace=workspace).logits(ids)
    )
    assert [one.state for one in lineage(workspace, made)][:2] == ["here", "here"]
    moving.write_bytes(file.read_bytes() + bytes(32))
    assert [one.state for one in lineage(workspace, made)][:2] == ["here", "changed"]
    with pytest.raises(ArtifactError, match="was trained on another"):
        load("adapter", workspace=workspace)
    moving.unlink()
    assert [one.state for one in lineage(workspace, made)][:2] == ["here", "gone"]


def test_a_teacher_and_a_tokenizer(workspace: Workspace, file: Path) -> None:
    student = recipe(name="student", tokenizer=str(file), objective=Distillation(teacher=str(file)), steps=2)
    made = pretrain(student, workspace, SILENT)
    assert {role: source["ref"] for role, source in made.manifest.inputs.items()} == {
        "tokens": "student-tokens@1", "tokenizer": str(file), "teacher": str(file),
    }  # fmt: skip


def test_evaluation(workspace: Workspace, file: Path) -> None:
    scores = evaluate(
        EvaluateRecipe(name="gguf-scores", checkpoint=str(file), documents="farm", tasks=("bits_per_byte",)),
        workspace,
        SILENT,
    )
    assert scores.manifest.inputs["checkpoint"]["digest"] == workspace.open(file).digest
    (ours,) = scores_of(str(file), tasks=["bits_per_byte"], documents="farm", workspace=workspace)
    (theirs,) = scores_of("base", tasks=["bits_per_byte"], workspace=workspace)
    assert ours.value == pytest.approx(theirs.value, abs=1e-6)


def test_on_the_command_line(
    workspace: Workspace, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OWNLM_HOME", str(workspace.root))
    assert main(["show", str(file)]) == 0
    told = capsys.readouterr().out
    assert f"{file}: a GGUF file with a checkpoint, not made by ownlm" in told
    assert hashlib.sha256(file.read_bytes()).hexdigest()[:16] in told
    settings = ["evaluate.documents=farm", 'evaluate.tasks=["bits_per_byte"]', "evaluate.name=again"]
    assert main(["evaluate", "village-cpu", f"evaluate.checkpoint={file}", *settings]) == 0
    assert "bits_per_byte" in capsys.readouterr().out
    assert main(["generate", str(file), "The cat", "max_tokens=4"]) == 0
    api.show(str(file), workspace=workspace)
    assert main(["rm", str(file)]) == 2
    assert file.exists()
