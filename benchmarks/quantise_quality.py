"""What integers and fp8 cost: perplexity, KL divergence and top-1 agreement on held-out documents, beside the original and llama.cpp's
types.

    python benchmarks/quantise_quality.py [--home DIR] [--checkpoint NAME]

Without --checkpoint a model of the standard library's sources is trained first (5.3 M parameters, about ten minutes on a busy core);
with --home it stays there and is found the next time. Every row is computed twice: in PyTorch in float32, where only the weights are
in codes, and by the native kernels, where activations are integers too (beside fp8 bf16). llama.cpp's Q4_0 and Q8_0 are those of the
gguf package, equal bit for bit, on the same matrices that ours quantises (the embedding in 8 bits, as ours); "bf16" is the original as
the kernels run it.

Bars, against bf16 and by the kernels: int8 at most +0.1 %; int4 at most +1.5 %, and better than rounding and than Q4_0; fp8 at most
+0.2 %, and better than rounding.
"""

import argparse
import copy
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from gguf.quants import quantize as ggml_quantize
from torch import Tensor

from build import stdlib
from ownlm.artifact import Workspace
from ownlm.checkpoints.weights import load_model
from ownlm.kernels.native import NativeDecoder, text_logits
from ownlm.models.decoder import Decoder
from ownlm.quantization.calibrate import matrices, quantize_decoder
from ownlm.quantization.codes import Codes, plain, quantized
from ownlm.quantization.recode import from_blocks
from ownlm.release.quantize import calibration_texts, read, rows, settings
from ownlm.tokens.codec import Tokenizer

RECIPE = """
name = "stdlib"
[documents]
source = {{ kind = "folder", path = "{folder}" }}
[tokenizer]
vocab_size = 4096
[pretrain]
context = 256
batch_tokens = 2048
steps = 900
[pretrain.model]
hidden_size = 256
num_layers = 4
num_heads = 8
num_kv_heads = 8
head_dim = 32
intermediate_size = 704
"""
HELD_OUT_TOKENS = 65_536
Read = Callable[[Tensor], Tensor]  # (T,) ids -> (T, V) logits


def train(home: Path) -> str:
    """The name of a checkpoint made from the standard library, now or earlier."""
    if not (home / "artifacts" / "stdlib").is_dir():
        with tempfile.TemporaryDirectory() as place:
            folder, recipe = Path(place) / "stdlib", Path(place) / "stdlib.toml"
            stdlib(folder)
            recipe.write_text(RECIPE.format(folder=folder))
            for stage in ("documents", "tokenizer", "pretrain"):
                command = [sys.executable, "-m", "ownlm", stage, str(recipe)]
                subprocess.run(command, env={**os.environ, "OWNLM_HOME": str(home)}, check=True)
    return "stdlib"


def llama_cpp(model: Decoder, type: str) -> None:
    """Put llama.cpp's roundings in the matrices' place."""

    def make(weight: Tensor, name: str) -> Codes:
        kind = "Q8_0" if name == "embed_tokens" and model.lm_head is not None else type
        raw = ggml_quantize(weight.detach().float().numpy(), getattr(gguf.GGMLQuantizationType, kind))
        return from_blocks(kind, torch.from_numpy(raw), tuple(weight.shape))

    for name in matrices(model):
        model.set_submodule(name, quantized(model.get_submodule(name), lambda weight, _, at=name: make(weight, at)))


def in_pytorch(model: Decoder) -> Read:
    model = copy.deepcopy(model)
    for name in matrices(model):
        if hasattr(module := model.get_submodule(name), "kept"):
            model.set_submodule(name, plain(module, torch.float32))  # else they are made again for every text
    return lambda tokens_T: model.logits(model(tokens_T[None]))[0]


def by_kernels(model: Decoder, kind: str | None = None) -> Read:
    native = NativeDecoder(model, kind)
    return lambda tokens_T: text_logits(native, tokens_T)


@torch.inference_mode()
def logprobs(read: Read, rows_NT: Tensor) -> Tensor:
    """(N, T - 1) of each next token."""
    return torch.stack(
        [read(tokens_T)[:-1].log_softmax(-1).gather(1, tokens_T[1:, None])[:, 0] for tokens_T in rows_NT]
    )


@torch.inference_mode()
def apart(read: Read, original: Read, rows_NT: Tensor) -> tuple[float, float]:
    """(KL divergence in nats, share of places with the same likeliest token)"""
    kl, same = [], []
    for tokens_T in rows_NT:
        p_TV, q_TV = original(tokens_T).log_softmax(-1), read(tokens_T).log_softmax(-1)
        kl.append((p_TV.exp() * (p_TV - q_TV)).sum(-1).mean())
        same.append((p_TV.argmax(-1) == q_TV.argmax(-1)).float().mean())
    return float(torch.stack(kl).mean()), float(torch.stack(same).mean())


def told(difference: Tensor) -> str:
    return f"mean |Δ| {difference.abs().mean():.4f}, largest {difference.abs().max():.2f}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, default=None)
    parser.add_argument("--checkpoint", default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = args.home or Path(scratch)
        workspace = Workspace(home)
        source = workspace.open(args.checkpoint or train(home), "checkpoint")
        recipe = settings(source.path, to="int4", workspace=workspace)
        texts = calibration_texts(recipe, source, workspace)
        tokenizer = Tokenizer.load(source.path)
        model = load_model(source.path, dtype=torch.float32)
        chat = tokenizer.template is not None and source.manifest.recipe.get("task") == "chat"
        width = model.config.max_tokens
        held_out = rows(read(texts, width, chat=chat, held_out=True), tokenizer, width, HELD_OUT_TOKENS, 1)
        calibration = rows(read(texts, width, chat=chat, held_out=False), tokenizer, width, recipe.tokens, recipe.seed)
    assert held_out is not None and calibration is not None  # noqa: PT018
    original = by_kernels(model, "bf16")
    forward, engine = logprobs(in_pytorch(model), held_out), logprobs(original, held_out)
    exact, bf16 = -float(forward.mean()), -float(engine.mean())
    print(f"{source.ref}: {held_out.numel():,} tokens held out, {calibration.numel():,} of calibration")
    print(f"float32, PyTorch: {exact:.5f} nats per token, perplexity {math.exp(exact):.4f}; bf16, kernels: {bf16:.5f}")
    f32 = (logprobs(by_kernels(model, "f32"), held_out[:16]) - forward[:16]).abs().max()
    print(
        f"log-probabilities, kernels against PyTorch's float32 forward: float32 at most {f32:.1e}, bf16 {told(engine - forward)}"
    )
    print("perplexity against float32 in PyTorch, and against bf16 by the kernels; KL and top-1 of the latter:")
    made: dict[str, Callable[[Decoder], None]] = {
        "int8, rounded": lambda one: quantize_decoder(one, "int8"),
        "int8, calibrated": lambda one: quantize_decoder(one, "int8", calibration),
        "llama.cpp Q8_0": lambda one: llama_cpp(one, "Q8_0"),
        "int4, rounded": lambda one: quantize_decoder(one, "int4"),
        "int4, calibrated": lambda one: quantize_decoder(one, "int4", calibration),
        "llama.cpp Q4_0": lambda one: llama_cpp(one, "Q4_0"),
        "fp8, rounded": lambda one: quantize_decoder(one, "fp8"),
        "fp8, calibrated": lambda one: quantize_decoder(one, "fp8", calibration),
    }
    rises = {}
    for name, make in made.items():
        one, began = copy.deepcopy(model), time.monotonic()
        make(one)
        seconds = time.monotonic() - began
        kernels = by_kernels(one)
        ours = logprobs(kernels, held_out)
        weights = math.expm1(-float(logprobs(in_pytorch(one), held_out).mean()) - exact)
        rises[name] = math.expm1(-float(ours.mean()) - bf16)
        kl, same = apart(kernels, original, held_out)
        print(
            f"  {name:18s} weights only {weights:+8.3%}   kernels {rises[name]:+8.3%}   KL {kl:.5f}   "
            f"top-1 {same:.2%}   log p {told(ours - forward)}   made in {seconds:.0f} s",
            flush=True,
        )
    met = (
        rises["int8, calibrated"] <= 0.001
        and rises["int4, calibrated"] <= 0.015
        and rises["int4, calibrated"] < min(rises["int4, rounded"], rises["llama.cpp Q4_0"])
        and rises["fp8, calibrated"] <= 0.002
        and rises["fp8, calibrated"] < rises["fp8, rounded"]
    )
    print("met" if met else "NOT MET")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
