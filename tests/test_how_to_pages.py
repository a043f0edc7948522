"""The how-to pages that take a model of a hub run as they are written: every recipe, command and piece of Python, in their order, against
the stand-in of hub.py with tiny random models under those names. Only the number of training steps is cut."""

import io
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hub import Hub
from ownlm import cli
from ownlm.adapters.tuning import init_normal
from ownlm.artifact import Workspace
from ownlm.checkpoints.weights import save_model
from ownlm.models.families import from_hf
from ownlm.models.heads import Pooling
from tiny import tiny_model, tiny_tokenizer

PAGES = Path(__file__).parents[1] / "docs" / "how-to"
TOKENIZER = tiny_tokenizer()
HUB: dict[str, dict[str, Any]] = {
    "sentence-transformers/all-MiniLM-L6-v2": {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": TOKENIZER.vocab_size, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 512,
        "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    },
    "google-t5/t5-small": {
        "model_type": "t5", "vocab_size": TOKENIZER.vocab_size, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
        "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": TOKENIZER.eos_id,
    },
    "openai-community/gpt2": {
        "model_type": "gpt2", "vocab_size": TOKENIZER.vocab_size, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
    },
}  # fmt: skip
QUESTION = '{{"question": "Who built the {0}?", "context": "The {0} was built by {1} in 1823.", "answers": ["{1}"]}}\n'
NOUNS = ("mill", "bridge", "school", "tower", "inn", "forge", "well", "barn", "church", "harbour", "market", "wall")
# What the pages take for granted in the folder they are read in.
FILES: dict[str, str] = {
    "history.txt": "The mill was built by Anna in 1823. It stands by the river.\n",
    "article.txt": "The harbour froze early.\nShips waited for three weeks.\n",
    "texts.txt": "The harbour is frozen.\nBread costs two crowns.\n",
    "questions.jsonl": "".join(QUESTION.format(noun, name) for noun in NOUNS for name in ("Anna", "Bo", "Cy")),
    "examples.csv": "text,label\n" + "".join(f"the {noun} of {n},{'ab'[n % 2]}\n" for noun in NOUNS for n in range(4)),
    "train.conll": "".join(f"Anna\tB-person\nsaw\tO\n{noun}\tO\n{n}\tO\n\n" for noun in NOUNS for n in range(4)),
    "english.txt": "".join(f"the {noun} {n}\n" for noun in NOUNS for n in range(4)),
    "german.txt": "".join(f"das {noun} {n}\n" for noun in NOUNS for n in range(4)),
    **{
        f"texts/{noun}.txt": "".join(
            f"In year {year} the {noun} of the city of {noun}s was sold for {year * 7}.\n" for year in range(40)
        )
        for noun in NOUNS
    },
}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of each model of `HUB`."""
    found = {}
    for name, hf in HUB.items():
        folder = tmp_path_factory.mktemp(name.partition("/")[2])
        config, family = from_hf(hf)
        model = family.build(config, hf)
        init_normal(model.named_parameters(), std=0.2)
        if hf["model_type"] == "bert":
            model.pooling = Pooling(kind="mean")
        save_model(model, folder)
        TOKENIZER.save(folder)
        found[name] = {
            file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
        }
    return found


@pytest.fixture
def read(
    served: Hub, repositories: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Does what a page says and gives back what its Python defined. `model` is the folder that the page calls MODEL."""

    def follow(page: str, *, model: Path | None = None) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("OWNLM_HOME", str(tmp_path / "home"))
        for name, files in repositories.items():
            served.repo(name, files)
        for file, text in FILES.items():
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text(text, encoding="utf-8")
        python: list[str] = []
        for kind, block in re.findall(r"```(\w+)\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), re.S):
            if kind == "toml":
                name = re.search(r'^name = "(.*)"', block, re.M)
                assert name is not None, block
                short = re.sub(r"^steps = \d+", "steps = 3", block, flags=re.M)
                (tmp_path / f"{name[1]}.toml").write_text(short, encoding="utf-8")
            elif kind == "sh":
                for line in block.splitlines():
                    run(line, model)
            elif kind == "python":
                python.append(block)
        ran: dict[str, Any] = {}
        exec("\n".join(python), ran)  # noqa: S102
        return ran

    def run(line: str, model: Path | None) -> None:
        words = shlex.split(line, comments=True)
        assert words[0] == "ownlm", line
        if "<" in words:
            given = words[words.index("<") + 1]
            monkeypatch.setattr(sys, "stdin", io.StringIO(FILES[given]))
            words = words[: words.index("<")]
        words = [str(model) if word == "MODEL" else word for word in words]
        assert cli.main(words[1:]) == 0, line

    return follow


@pytest.mark.parametrize(
    ("page", "name"),
    [("classify-text.md", "topics"), ("find-names-in-text.md", "names"), ("fine-tune-gpt2-on-text.md", "gpt2-wiki")],
)
def test_tuning(page: str, name: str, read: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    read(page)
    assert (name, "checkpoint") in {(one.name, one.kind) for one in Workspace(tmp_path / "home").all()}


def test_answers(read: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    model = tiny_model(context=512)
    save_model(model.decoder, tmp_path / "writer")
    model.tokenizer.save(tmp_path / "writer")
    found = read("answer-from-a-text.md", model=tmp_path / "writer")["found"]
    assert found.text in "The mill was built by Anna in 1823."


def test_translations(
    read: Callable[..., dict[str, Any]], repositories: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    (tmp_path / "t5").mkdir()
    for file, data in repositories["google-t5/t5-small"].items():
        (tmp_path / "t5" / file).write_bytes(data)
    read("translate-and-summarize.md", model=tmp_path / "t5")
    assert "german" in {one.name for one in Workspace(tmp_path / "home").all()}


def test_embeddings(read: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    ran = read("embed-and-search.md")
    rows = np.load(tmp_path / "vectors.npy")
    assert rows.shape == (2, 32)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
    assert np.allclose(ran["model"].embed(FILES["texts.txt"].splitlines()).numpy(), rows, atol=1e-5)
