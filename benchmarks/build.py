"""The claim of `ownlm build`: predicted time within 20 % and peak memory within 15 % of actual, on real folders.

    python benchmarks/build.py [--budget 10m] [stdlib] [texts]

stdlib   the Python standard library's own sources, which every machine has
texts    the texts of ../shared/data: books, Wikipedia, sentences in 75 languages, questions, tables (skipped where absent)

Each folder is built in a workspace of its own by a process of its own, with no earlier run to correct the prediction.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def stdlib(folder: Path) -> None:
    """Copy the standard library's .py files, tests included, installed packages left out."""
    source = Path(sysconfig.get_paths()["stdlib"])
    skip = shutil.ignore_patterns("site-packages", "__pycache__", "*.so", "*.pyc", "*.a", "*.o", "*.exe")
    shutil.copytree(source, folder, ignore=skip)


def texts(folder: Path) -> None:
    """The shared data as it stands."""
    shutil.copytree(SHARED, folder)


FOLDERS = {"stdlib": stdlib, "texts": texts}


def build(name: str, budget: str) -> dict[str, Any]:
    """Build a copy of the folder and return the events that tell predicted and actual."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / name
        FOLDERS[name](folder)
        done = subprocess.run(
            [sys.executable, "-m", "ownlm", "build", str(folder), "--budget", budget, "--json"],
            env={**os.environ, "OWNLM_HOME": str(Path(place) / "home")},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return {event["event"]: event for event in events}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="*", default=list(FOLDERS))
    parser.add_argument("--budget", default="10m")
    args = parser.parse_args()
    met = True
    for name in args.folders:
        if name == "texts" and not SHARED.is_dir():
            print(f"{name}: skipped, there is no {SHARED.parent.name}/{SHARED.name} beside the checkout")
            continue
        events = build(name, args.budget)
        plan, outcome = events["plan"], events["build"]
        time_off = outcome["actual_s"] / outcome["predicted_s"] - 1
        memory_off = outcome["actual_bytes"] / outcome["predicted_bytes"] - 1
        fine = abs(time_off) <= 0.20 and abs(memory_off) <= 0.15
        met &= fine
        print(
            f"{name}: {plan['parameters'] / 1e6:.1f} M parameters, {plan['tokens'] / 1e6:.1f} M tokens, {plan['epochs']:.2f} epochs"
        )
        print(
            f"  time    predicted {outcome['predicted_s']:6.0f} s   actual {outcome['actual_s']:6.0f} s   {time_off:+.1%}"
        )
        print(
            f"  memory  predicted {outcome['predicted_bytes'] / 1e6:6.0f} MB  "
            f"actual {outcome['actual_bytes'] / 1e6:6.0f} MB  {memory_off:+.1%}"
        )
        print(
            f"  bits per byte: model {outcome['bits_per_byte']:.3f}, order-5 n-gram {outcome['ngram']:.3f}, "
            f"xz after the training text {outcome['xz']:.3f}, xz alone {outcome['xz_alone']:.3f}"
        )
        print(f"  {'met' if fine else 'NOT MET'}", flush=True)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
