import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import ownlm
from ownlm.artifact import Workspace
from ownlm.cli import COMMANDS, main

SOURCE = str(Path(ownlm.__file__).parents[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    name: str = "x"
    size: int = 3


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("OWNLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def documents(home):
    with Workspace(home).create("documents", "village", inputs={}, recipe=Recipe()) as draft:
        (draft.path / "train.jsonl").write_text("{}")
        draft.facts["count"] = {"train": 1}
    return draft.done


def imported(code: str) -> set[str]:
    script = f"import sys; sys.path.insert(0, {SOURCE!r})\n{code}\nprint(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.parametrize("code", ["import ownlm", "from ownlm.cli import make_parser; make_parser().format_help()"])
def test_help_and_import_are_light(code):
    heavy = {
        "torch",
        "pydantic",
        "sqlalchemy",
        "jinja2",
        "tokenizers",
        "numpy",
        "rich",
        "starlette",
        "trafilatura",
        "pyarrow",
    }
    assert not heavy & imported(code)


def test_every_command_has_help():
    for name, command in COMMANDS.items():
        assert (command.help or command.run.__doc__ or "").strip().endswith("."), name


def test_unknown_command_names_the_nearest(capsys):
    assert main(["pretain"]) == 2
    assert "Did you mean pretrain?" in capsys.readouterr().err


def test_flags_may_stand_between_settings(monkeypatch):
    seen = []
    monkeypatch.setitem(COMMANDS, "generate", replace(COMMANDS["generate"], run=lambda args, _: seen.append(args)))
    assert main(["generate", "demo", "a=b", "--chat", "max_tokens=3", "top_k=1"]) == 0
    (args,) = seen
    assert (args.ref, args.prompt, args.chat, args.override) == ("demo", "a=b", True, ["max_tokens=3", "top_k=1"])


def test_show_and_list_and_rm(documents, capsys):
    assert main(["show", "village"]) == 0
    out = capsys.readouterr().out
    assert "village@1: documents" in out
    assert "count.train = 1" in out
    assert "size = 3" in out
    assert main(["list"]) == 0
    assert "village@1" in capsys.readouterr().out
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["artifact"] == "village@1"
    assert main(["rm", "village"]) == 0
    assert main(["list"]) == 0
    assert "no artifacts" in capsys.readouterr().out


def test_errors_are_one_sentence_and_exit_code_2(documents, capsys):
    assert main(["show", "vilage"]) == 2
    assert capsys.readouterr().err.strip().endswith("Did you mean village?")
    documents.file("train.jsonl").write_text("[]")
    assert main(["show", "village"]) == 2
    error = capsys.readouterr().err
    assert "train.jsonl does not match its checksum" in error
    assert "Traceback" not in error


def test_recipe_faults_come_all_at_once(tmp_path, capsys):
    recipe = tmp_path / "bad.toml"
    recipe.write_text('name = "x"\nsead = 1\n[pretrain]\nsteps = "many"\nstepps = 3\n')
    assert main(["pretrain", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "sead is not a field. Did you mean seed?" in error
    assert 'pretrain.steps should be a valid integer, not "many".' in error
    assert "pretrain.stepps is not a field. Did you mean steps?" in error


def test_runs_are_listed(home, capsys):
    from ownlm.catalog import Catalog

    catalog = Catalog(home)
    with catalog.run("documents", "village") as run:
        run.artifact = "village@1"
    catalog.close()
    assert main(["list", "runs"]) == 0
    out = capsys.readouterr().out
    assert "documents" in out
    assert "done" in out


def test_doctor_reports_this_machine(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = {row["what"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert {"ownlm", "torch", "compute", "kernels", "memory", "disk", "workspace"} == set(findings)
    assert "GFLOP/s" in findings["compute"]["found"]
