"""From files of examples to a model that answers: each task on a tiny decoder or encoder, and what stands in the way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ownlm.adapters.lora import LoRA
from ownlm.adapters.tuning import init_normal
from ownlm.artifact import Workspace
from ownlm.checkpoints.weights import save_model
from ownlm.documents.collect import DocumentsRecipe, FolderSource, collect
from ownlm.documents.examples import ExamplesSource
from ownlm.errors import UserError
from ownlm.evaluate.stage import EvaluateRecipe, evaluate
from ownlm.generate.model import Model
from ownlm.generate.opening import load
from ownlm.generate.reading import Found, joined_entities
from ownlm.models.families import from_hf
from ownlm.records import Labelled, Tagged, read_jsonl
from ownlm.report import Reporter
from ownlm.tokens.framing import first_tokens, joined
from ownlm.train.optimizers import Optimizer
from ownlm.train.stages import FinetuneRecipe, finetune
from tiny import tiny_model, tiny_tokenizer

QUIET = Reporter.silent()
FAST = Optimizer(kind="adamw", lr=3e-3, embedding_lr=3e-3, head_lr=3e-3, vector_lr=3e-3, eps=1e-8, weight_decay=0.0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = tiny_model()
    folder = tmp_path / "base"
    folder.mkdir()
    save_model(model.decoder, folder, eos_token_id=[model.tokenizer.eos_id])
    model.tokenizer.save(folder)
    return folder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    tokenizer, folder = tiny_tokenizer(), tmp_path / "encoder"
    hf = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": tokenizer.vocab_size, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
        "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    }  # fmt: skip
    config, family = from_hf(hf)
    model = family.build(config, hf)
    init_normal(model.named_parameters(), std=0.1)
    folder.mkdir()
    save_model(model, folder)
    tokenizer.save(folder)
    return folder


def tuned(tmp_path: Path, base: Path, source: ExamplesSource, steps: int = 40, **fields: Any) -> Model:
    workspace = Workspace(tmp_path / "home")
    collect(DocumentsRecipe(name="examples", source=source, validation_share=0.2, test_share=0), workspace, QUIET)
    recipe = FinetuneRecipe(
        name="tuned", checkpoint=str(base), documents="examples", task=source.task, context=64, batch_tokens=512,
        steps=steps, optimizer=FAST, precision="fp32", validate_every=None, checkpoint_every=None, **fields,
    )  # fmt: skip
    model = load(finetune(recipe, workspace, QUIET).ref, workspace=workspace)
    assert isinstance(model, Model)
    return model


def test_classification_from_a_table(tmp_path: Path, base: Path) -> None:
    rows = [f"{word} {n},{label}" for n in range(20) for word, label in (("aaaa", "first"), ("zzzz", "second"))]
    (tmp_path / "t.csv").write_text("\n".join(["said,kind", *rows]), encoding="utf-8")
    source = ExamplesSource(
        task="classification", train=str(tmp_path / "t.csv"), fields={"text": "said", "label": "kind"}
    )
    model = tuned(tmp_path, base, source)
    first, second = model.classify(["aaaa 99", "zzzz 99"])
    assert next(iter(first)) == "first"
    assert next(iter(second)) == "second"
    assert sum(first.values()) == pytest.approx(1)
    scores = EvaluateRecipe(name="scores", checkpoint="tuned", documents="examples")
    made = evaluate(scores, Workspace(tmp_path / "home"), QUIET).facts["scores"]
    assert made["examples accuracy"]["value"] == 1.0
    assert made["examples accuracy"]["baseline"] == 1.0  # the words alone tell the labels
    with pytest.raises(UserError, match="a head for token is needed"):
        model.entities("aaaa")


@pytest.mark.parametrize("kind", ["encoder", "base"])
def test_tokens_from_conll(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    lines = [f"x{n}\tO\nBob\tB-name\nRay\tI-name\n" for n in range(30)]
    (tmp_path / "t.conll").write_text("\n".join(lines), encoding="utf-8")
    folder = request.getfixturevalue(kind)
    model = tuned(tmp_path, folder, ExamplesSource(task="tokens", train=str(tmp_path / "t.conll")), steps=60)
    (found,) = model.entities("x99 Bob Ray")
    assert (found.text, found.label, found.start, found.end) == ("Bob Ray", "name", 4, 11)


@pytest.mark.parametrize("kind", ["encoder", "base"])
def test_an_adapter_brings_its_head(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Unmerged it says what the merged one says, to the same labels; in a folder by itself too, and as PEFT's users leave it: without
    names for the labels. Evaluation takes it by its name."""
    folder = request.getfixturevalue(kind)
    lines = [f"x{n}\tO\nBob\tB-name\nRay\tI-name\n" for n in range(30)]
    (tmp_path / "t.conll").write_text("\n".join(lines), encoding="utf-8")
    source = ExamplesSource(task="tokens", train=str(tmp_path / "t.conll"))
    lora = LoRA(rank=4, targets="all-linear")
    merged = tuned(tmp_path, folder, source, steps=30, lora=lora, merge=True)
    model = tuned(tmp_path, folder, source, steps=30, lora=lora)
    workspace, text = Workspace(tmp_path / "home"), "x99 Bob Ray"
    adapter = workspace.open("tuned", kind="adapter")
    assert json.loads(adapter.file("head.json").read_text())["id2label"] == {"0": "O", "1": "B-name", "2": "I-name"}
    assert json.loads(adapter.file("adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    ids = [model.tokenizer.encode(text)]

    def said(one: Any) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = one.decoder.head(one.decoder(torch.tensor(ids)))
        return found

    assert (found := model.entities(text))[0].text == "Bob Ray"
    assert [entity.label for entity in found] == ["name"]
    assert (said(model) - said(merged)).abs().max() < 1e-5
    assert model.headed.labels == merged.headed.labels
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (alone / name).write_bytes(adapter.file(name).read_bytes())
    unnamed = load(folder, adapter=alone)
    assert isinstance(unnamed, Model)
    assert unnamed.headed.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert torch.equal(said(unnamed), said(model))
    scores = EvaluateRecipe(name="scores", checkpoint="tuned", documents="examples")
    assert evaluate(scores, workspace, QUIET).facts["scores"]["examples entity F1"]["value"] == 1.0
    (alone / "head.json").write_text('{"architectures": ["NothingForTokenClassification"], "id2label": ["a"]}')
    with pytest.raises(UserError, match=r"head.json: id2label must name each class"):
        load(folder, adapter=alone)


@pytest.mark.parametrize("kind", ["encoder", "base"])
def test_answers_are_stretches_of_the_context(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    lines = [
        f'{{"question": "who", "context": "it is {name}", "answers": ["{name}"]}}'
        for name in ("Ann", "Bo", "Cy", "Di", "Ed")
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    folder = request.getfixturevalue(kind)
    model = tuned(tmp_path, folder, ExamplesSource(task="answer", train=str(tmp_path / "t.jsonl")), steps=5)
    found = model.answer("who", "it is Flo")
    assert isinstance(found, Found)
    assert "it is Flo"[found.start : found.end] == found.text
    assert 0 < found.probability <= 1


def test_rewriting_and_plain_text_are_learned_by_a_decoder(tmp_path: Path, base: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"say {n}" for n in range(20)), encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n".join("yes" for _ in range(20)), encoding="utf-8")
    pairs = ExamplesSource(task="seq2seq", train=str(tmp_path / "a.txt"), targets=str(tmp_path / "b.txt"))
    model = tuned(tmp_path, base, pairs, steps=80)
    assert model.generate("say 99\n", max_tokens=8).text == "yes"
    recipe = EvaluateRecipe(name="scores", checkpoint="tuned", documents="examples", max_tokens=8)
    scored = evaluate(recipe, Workspace(tmp_path / "home"), QUIET)
    for metric in ("chrF", "ROUGE-L"):
        assert scored.facts["scores"][f"examples {metric}"]["value"] == 1.0
        assert scored.facts["scores"][f"examples {metric}"]["baseline"] == 1.0  # everyone says yes
    (answer, *_) = map(json.loads, scored.file("answers.jsonl").read_text().splitlines())
    assert (answer["given"], answer["expected"], answer["ok"]) == ("yes", "yes", True)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "t.txt").write_text("The same words come again and again. " * 40, encoding="utf-8")
    workspace = Workspace(tmp_path / "home")
    collect(
        DocumentsRecipe(name="texts", source=FolderSource(path=str(tmp_path / "texts")), rules=False), workspace, QUIET
    )
    reading = FinetuneRecipe(
        name="reader", checkpoint=str(base), documents="texts", task="text", context=32, batch_tokens=256, steps=30,
        optimizer=FAST, precision="fp32", validate_every=None, checkpoint_every=None,
    )  # fmt: skip
    assert finetune(reading, workspace, QUIET).facts["loss"] < 3.5  # 5.6 nats is a guess among 259 tokens


def test_held_out_files_stay_as_they_are_and_out_of_training(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tlabel\none\tx\ntwo\ty\none\tx\n", encoding="utf-8")
    (tmp_path / "b.tsv").write_text("text\tlabel\ntwo\ty\ntwo\ty\n", encoding="utf-8")
    source = ExamplesSource(task="classification", train=str(tmp_path / "a.tsv"), test=str(tmp_path / "b.tsv"))
    recipe = DocumentsRecipe(name="d", source=source, validation_share=0, test_share=0)
    made = collect(recipe, Workspace(tmp_path / "home"), QUIET)
    assert [one.text for one in read_jsonl(made.file("examples.jsonl"), Labelled)] == ["one"]
    assert len(list(read_jsonl(made.file("examples_test.jsonl"), Labelled))) == 2
    assert made.facts["dropped"] == {"held out": 1, "exact duplicate": 1}


def test_conllu_takes_words_and_their_universal_tags(tmp_path: Path) -> None:
    rows = [
        "# text = don't",
        "1-2\tdon't\t_\t_\t_\t_\t_\t_\t_\t_",
        "1\tdo\tdo\tAUX\tVB\t_\t_\t_\t_\t_",
        "2\tn't\tnot\tPART\tRB\t_\t_\t_\t_\t_",
    ]
    (tmp_path / "t.conllu").write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    source = ExamplesSource(task="tokens", train=str(tmp_path / "t.conllu"))
    recipe = DocumentsRecipe(name="d", source=source, validation_share=0, test_share=0)
    made = collect(recipe, Workspace(tmp_path / "home"), QUIET)
    assert list(read_jsonl(made.file("examples.jsonl"), Tagged)) == [Tagged(words=("do", "n't"), tags=("AUX", "PART"))]


def test_a_file_without_the_fields_says_so(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    source = ExamplesSource(task="classification", train=str(tmp_path / "t.csv"))
    with pytest.raises(UserError, match="no usable example: 1 no text"):
        collect(DocumentsRecipe(name="d", source=source), Workspace(tmp_path / "home"), QUIET)


def test_first_tokens_belong_to_the_word_they_begin() -> None:
    text, spans = joined(["ab", "c"])
    assert (text, spans) == ("ab c", [(0, 2), (3, 4)])
    assert first_tokens([(0, 1), (1, 2), (3, 4)], spans) == [0, 2]
    assert first_tokens([(0, 4)], spans) == [0, None]


def test_an_i_of_another_kind_begins_a_stretch() -> None:
    spans = [(0, 1), (2, 3), (4, 5)]
    tags = [("B-x", 0.9), ("I-x", 0.5), ("I-y", 0.8)]
    found = joined_entities("a b c", spans, tags)
    assert [(one.text, one.label, one.probability) for one in found] == [("a b", "x", 0.5), ("c", "y", 0.8)]
