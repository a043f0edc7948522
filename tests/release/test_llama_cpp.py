"""Hugging Face -> ownlm -> GGUF -> llama.cpp: the same logits, the same greedy text, the same tokens of a text.

Needs a Python that has llama-cpp-python, which compiles for ten minutes: OWNLM_LLAMA_PYTHON names it, and
benchmarks/gguf_parity.py makes such an environment.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seq2seq
import torch
from block_files import WIDE
from block_files import model as block_model
from encoder_references import save_encoder
from gguf_cases import CASES, DISTANCE, T5S
from llama_reference import LlamaCpp, decided, difference
from references import CONFIGS, save
from test_ggml import GGML_ERRORS, encoded, numbers, relative_error
from torch import Tensor

from ownlm import gguf
from ownlm.checkpoints.unread import open_unread
from ownlm.checkpoints.weights import load_model, save_model
from ownlm.kernels import library
from ownlm.kernels.native import NativeDecoder, text_logits
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from ownlm.release.compare import TEXT
from ownlm.release.export import export
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.gguf import from_gguf
from ownlm.tokens.gguf_write import PROBES, to_gguf
from ownlm.train.fresh import init_weights

PYTHON = os.environ.get("OWNLM_LLAMA_PYTHON", "")
VECTORS = Path(__file__).parents[3] / "shared" / "vectors"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="OWNLM_LLAMA_PYTHON names no Python with llama-cpp-python"),
]
needs_vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason="needs ../shared/vectors")
# llama.cpp takes GELU from a table of half precision, and rounds the ends of gpt-oss's YaRN.
BARS = {"gpt2": 1e-3, "gpt-neox": 1e-3, "phi2": 1e-3, "gemma": 3e-3, "gemma2": 3e-3, "gemma3": 3e-3}
APART = ("gpt-oss",)
TOKENS = 120


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[LlamaCpp]:
    child = LlamaCpp(PYTHON)
    yield child
    child.close()


@pytest.mark.parametrize("name", [name for name in CASES if name not in APART])
def test_the_same_logits_and_greedy_tokens(name: str, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    save(CASES[name][1], tmp_path / "hf")
    export(tmp_path / "hf", out=tmp_path / "model.gguf", quantization="F32")
    model = load_model(tmp_path / "hf")
    prompt, ours = decided(model, length=24, count=TOKENS, vocabulary=97)
    theirs = llama_cpp.ask(model=str(tmp_path / "model.gguf"), prompt=prompt, tokens=TOKENS)
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor([prompt])))[0]
    assert difference(logits, torch.tensor(theirs["logits"])) <= BARS.get(name, 1e-5)
    assert theirs["tokens"] == ours.tokens


def test_yarn_is_where_gpt_oss_differs(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """Without it, llama.cpp computes the same."""
    save(CONFIGS["gpt-oss"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, tmp_path / "hf")
    done = export(tmp_path / "hf", out=tmp_path / "model.gguf", quantization="F32")
    assert "YaRN" in done.notes[0]
    model = load_model(tmp_path / "hf")
    prompt, ours = decided(model, length=24, count=TOKENS, vocabulary=97)
    assert llama_cpp.ask(model=str(tmp_path / "model.gguf"), prompt=prompt, tokens=TOKENS)["tokens"] == ours.tokens


SHAPES: dict[str, dict[str, Any]] = {
    "llama": CONFIGS["llama3"], "gpt2": CONFIGS["gpt2"], "qwen3": CONFIGS["qwen3"], "mixtral": CONFIGS["mixtral"],
}  # fmt: skip


@needs_vectors
@pytest.mark.parametrize("quantization", ["F32", "F16"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_same_greedy_text(name: str, quantization: str, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """With a tokenizer: what a user of llama.cpp reads is what a user of ownlm reads."""
    save(SHAPES[name] | {"vocab_size": 2048}, tmp_path / "hf")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(VECTORS / "torchtitan" / file, tmp_path / "hf")
    path = tmp_path / "model.gguf"
    export(tmp_path / "hf", out=path, quantization=quantization)
    model, tokenizer = load_model(path, dtype=torch.float32), Tokenizer.load(tmp_path / "hf")
    prompt, ours = decided(model, length=24, count=TOKENS, vocabulary=2000)
    theirs = llama_cpp.ask(model=str(path), prompt=prompt, tokens=TOKENS)["tokens"]
    assert tokenizer.decode(theirs) == tokenizer.decode(ours.tokens)
    assert llama_cpp.ask(model=str(path), texts=[TEXT])["ids"] == [tokenizer.encode(TEXT)]


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "camembert", "distilbert"])
def test_encoders(name: str, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """Also RoBERTa's, whose first position is not 0."""
    save_encoder(name, "Model", tmp_path / "hf")
    export(tmp_path / "hf", out=tmp_path / "bert.gguf", quantization="F32")
    ids = torch.randint(5, 97, (50,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = load_model(tmp_path / "hf")(ids[None])[0]
    theirs = torch.tensor(llama_cpp.ask(model=str(tmp_path / "bert.gguf"), hidden=ids.tolist())["hidden"])
    assert difference(ours, theirs) <= 1e-3


@pytest.mark.parametrize("name", T5S)
def test_encoder_decoders(name: str, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """The encoder's states, the decoder's logits in one go, and greedy tokens from its start token on, beyond the exact buckets."""
    seq2seq.save(name, tmp_path / "hf", **DISTANCE)
    path = tmp_path / "model.gguf"
    assert export(tmp_path / "hf", out=path, quantization="F32").architecture == "t5"
    model = load_model(tmp_path / "hf")
    source, ours = decided(model, length=150, count=TOKENS, vocabulary=97)
    given = [model.config.start_token, *ours.tokens[:-1]]
    with torch.inference_mode():
        memory = model.encode(torch.tensor([source]))
        logits = model.logits(model.decode(torch.tensor([given]), model.source(memory)))[0]
    bar = 1e-5 if name == "t5-1.0" else 3e-3  # gates are GELU's
    theirs = llama_cpp.ask(model=str(path), source=source, prompt=given[:1], tokens=TOKENS)
    assert difference(memory[0], torch.tensor(theirs["hidden"])) <= bar
    assert theirs["tokens"] == ours.tokens
    at_once = llama_cpp.ask(model=str(path), source=source, prompt=given, tokens=1)
    assert difference(logits, torch.tensor(at_once["logits"])) <= bar


@pytest.mark.parametrize("quantization", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0"])
def test_quantised_files_are_read_as_we_read_them(quantization: str, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """llama.cpp also rounds what it multiplies with (to 8 bits): its logits are near ours, much nearer than the original's are
    where weights have four bits. Weights of usual size, so that little roundings don't grow."""
    hf = CONFIGS["llama"] | {"hidden_size": 256, "intermediate_size": 512}
    save_model(init_weights(Decoder(from_hf(hf)[0], hf), zero_output=False), tmp_path / "hf")
    export(tmp_path / "hf", out=tmp_path / "model.gguf", quantization=quantization)
    ids = torch.randint(0, 97, (24,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        original, ours = (
            model.logits(model(ids[None]))[0]
            for model in (load_model(tmp_path / "hf"), load_model(tmp_path / "model.gguf"))
        )
    answer = llama_cpp.ask(model=str(tmp_path / "model.gguf"), prompt=ids.tolist(), tokens=1)
    theirs = torch.tensor(answer["logits"])
    distance = torch.linalg.vector_norm
    assert distance(theirs - ours) < 0.02 * distance(ours)
    if quantization.startswith("Q4"):
        assert distance(theirs - ours) < 0.25 * distance(original - ours)


@pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.missing()}")
@pytest.mark.parametrize("quantization", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_the_kernels_run_quantised_files_as_llama_cpp_does(
    name: str, quantization: str, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    """Both round activations to 8 bits, each in its own way; Q5_K and Q6_K are int8 here. So they are about as near to each other as
    each is to the file's numbers."""
    path = tmp_path / "model.gguf"
    save_model(block_model(name, **WIDE), tmp_path / "hf")
    export(tmp_path / "hf", out=path, quantization=quantization)
    about_as_near(path, llama_cpp, 24)


@pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.missing()}")
@pytest.mark.parametrize("mixture", [15, 17, 18], ids=["Q4_K_M", "Q5_K_M", "Q6_K"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_mixtures_that_llama_cpp_makes(name: str, mixture: int, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """Whatever the numbers of its file leave no doubt about, both say."""
    model = block_model(name, **WIDE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    save_model(model, tmp_path / "hf")
    export(tmp_path / "hf", out=tmp_path / "whole.gguf", quantization="F32")
    path = tmp_path / "mixed.gguf"
    assert llama_cpp.ask(mixture=mixture, model=str(tmp_path / "whole.gguf"), out=str(path)) == {"failed": 0}
    ours, theirs, exact = about_as_near(path, llama_cpp, 120)
    first, second = exact.topk(2).values.unbind(-1)
    sure = first - second > 0.5 * exact.std()
    assert sure.sum() > 20
    assert torch.equal(ours[sure].argmax(-1), exact[sure].argmax(-1))
    assert torch.equal(theirs[sure].argmax(-1), exact[sure].argmax(-1))


def about_as_near(path: Path, llama_cpp: LlamaCpp, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a text by the kernels, by llama.cpp, and by the file's numbers."""
    ids = torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(0))
    unread = open_unread(path, torch.float32)
    assert unread is not None
    ours = text_logits(NativeDecoder(unread.model, lend=unread.lend), ids)
    theirs = torch.tensor(llama_cpp.ask(model=str(path), prompt=ids.tolist(), tokens=1)["logits"])
    numbers = load_model(path, dtype=torch.float32)
    with torch.inference_mode():
        exact = numbers.logits(numbers(ids[None]))[0]
    distance = torch.linalg.vector_norm
    assert distance(ours - exact) < 1.5 * distance(theirs - exact) + 0.005 * distance(exact)
    assert distance(ours - theirs) < 2 * distance(theirs - exact) + 0.01 * distance(exact)
    assert distance(theirs - exact) < 0.1 * distance(exact)
    return ours, theirs, exact


@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform", "shifted"])
@pytest.mark.parametrize("type", ["Q8_0", *GGML_ERRORS])
def test_less_error_than_its_quantiser(type: str, kind: str, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """What tests/models/test_ggml.py has as numbers, measured."""
    given = numbers(kind)
    given.tofile(tmp_path / "numbers")
    llama_cpp.ask(
        quantize=[gguf.LAYOUTS[type].code, 4096], numbers=str(tmp_path / "numbers"), out=str(tmp_path / "out")
    )
    theirs, ours = np.fromfile(tmp_path / "out", np.uint8), encoded(type, given)
    if type == "Q8_0":
        assert np.array_equal(ours, theirs)
        return
    error = relative_error(type, theirs, given)
    assert error == pytest.approx(GGML_ERRORS[type][kind], rel=2e-3)
    assert relative_error(type, ours, given) < error


@needs_vectors
def test_a_unigram_vocabulary(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """T5's and XLM-RoBERTa's kind, from SentencePiece's own test model: the same ids of texts of many kinds."""
    shutil.copy(VECTORS / "sentencepiece" / "test_model.model", tmp_path / "spiece.model")
    names = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = Tokenizer.load(tmp_path)
    vocabulary = to_gguf(tokenizer, tokenizer.vocab_size, ends=True)
    gguf.write(tmp_path / "v.gguf", {"general.architecture": "t5", **vocabulary}, [])
    lines = (VECTORS / "sentencepiece" / "botchan.txt").read_text().splitlines()[:300]
    texts = [*PROBES, *(line for line in lines if line.strip())]
    theirs = llama_cpp.ask(model=str(tmp_path / "v.gguf"), texts=texts)["ids"]
    assert theirs == [tokenizer.encode(text) for text in texts]
    framed = llama_cpp.ask(model=str(tmp_path / "v.gguf"), texts=texts, framed=True)["ids"]
    assert framed == [tokenizer.document(text) for text in texts]


@needs_vectors
@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "llama-spm", "bert-bge"])
def test_vocabularies_that_we_wrote(name: str, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    theirs = VECTORS / "llama.cpp-vocab" / "models" / f"ggml-vocab-{name}.gguf"
    tokenizer = from_gguf(gguf.read(theirs).metadata)
    gguf.write(tmp_path / "v.gguf", {"general.architecture": "llama", **to_gguf(tokenizer, tokenizer.vocab_size)}, [])
    texts = [*PROBES, *theirs.with_name(f"{theirs.name}.inp").read_text().split("\n__ggml_vocab_test__\n")]
    wanted = llama_cpp.ask(model=str(theirs), texts=texts)["ids"]
    assert llama_cpp.ask(model=str(tmp_path / "v.gguf"), texts=texts)["ids"] == wanted
