"""The demo's claim: never-asked people >= 95 % and new strangers "unknown" >= 90 % in each of three seeds, within six minutes
on two cores and 2 GB. World and training both change with the seed. Each seed runs as a process of its own, as a user would.

    python benchmarks/demo.py [SEED ...]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ownlm.artifact import Workspace
from ownlm.records import Score


def run(seed: int) -> dict[str, object]:
    """Run `ownlm demo seed=SEED` in an empty workspace and read its scores."""
    with tempfile.TemporaryDirectory() as home:
        began = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-m", "ownlm", "demo", f"seed={seed}"],
            env={**os.environ, "OWNLM_HOME": home},
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - began
        if status:
            sys.exit(f"seed {seed}: the demo ended with status {status}")
        scores = Workspace(Path(home)).open("demo-scores", "scores")
        rows = [Score(**row) for row in json.loads(scores.file("scores.json").read_text())]
    accuracy = {row.task: row for row in rows if row.metric == "accuracy"}
    return {"seed": seed, "seconds": seconds, "peak_mb": usage.ru_maxrss / 1000, "accuracy": accuracy}


def main() -> int:
    seeds = [int(word) for word in sys.argv[1:]] or [1, 2, 3]
    met = True
    for seed in seeds:
        result = run(seed)
        accuracy: dict[str, Score] = result["accuracy"]  # type: ignore[assignment]
        print(f"seed {seed}: {result['seconds']:.0f} s, peak {result['peak_mb']:.0f} MB")
        for task, row in accuracy.items():
            print(
                f"  {task:32} {row.value:6.1%}  [{row.low:.1%}, {row.high:.1%}]  n = {row.n:4}"
                + (f"  majority {row.baseline:.1%}" if row.baseline is not None else "")
            )
        people, strangers = accuracy["questions/people"], accuracy["questions/strangers"]
        asked = people.n + strangers.n
        fine = (
            people.value >= 0.95
            and strangers.value >= 0.90
            and asked >= 1000
            and float(result["seconds"]) <= 360  # type: ignore[arg-type]
            and float(result["peak_mb"]) <= 2000  # type: ignore[arg-type]
        )
        print(
            f"  {asked} questions on never-asked people and new strangers: {'met' if fine else 'NOT MET'}", flush=True
        )
        met &= fine
    print("bar met in every seed" if met else "bar NOT met")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
