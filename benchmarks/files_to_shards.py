"""Throughput from files to shards, stage by stage, on the sources of the running Python.

    python benchmarks/files_to_shards.py [FOLDER]

Prints wall-clock and CPU seconds of each stage and MB/s of the whole, and what a step's batch costs.
"""

import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from ownlm.artifact import Workspace
from ownlm.documents.collect import DocumentsRecipe, FolderSource, collect
from ownlm.report import Reporter
from ownlm.tokens.batches import Batches, DocumentRows
from ownlm.tokens.shards import TokensRecipe, open_shard, tokenize
from ownlm.tokens.train import TokenizerRecipe, train_tokenizer


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else str(Path(sysconfig.get_path("stdlib")) / "asyncio")
    with tempfile.TemporaryDirectory() as home:
        workspace, quiet = Workspace(Path(home)), Reporter.silent()
        stages = {
            "documents": lambda: collect(DocumentsRecipe(name="d", source=FolderSource(path=folder)), workspace, quiet),
            "tokenizer": lambda: train_tokenizer(TokenizerRecipe(name="t", documents="d"), workspace, quiet),
            "tokens": lambda: tokenize(TokensRecipe(name="ids", documents="d", tokenizer="t"), workspace, quiet),
        }
        total = 0.0
        for name, stage in stages.items():
            wall, cpu = time.perf_counter(), time.process_time()
            made = stage()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            total += wall
            print(f"{name:10} {wall:7.2f} s wall {cpu:7.2f} s CPU")
            if name == "documents":
                size = sum(split["bytes"] for split in made.facts["splits"].values()) / 1e6
        print(f"{size:.1f} MB of text, {size / total:.2f} MB/s from files to shards")
        batches = Batches(DocumentRows(open_shard(made, "train"), 512, seed=0, document_mask=True), rows=32)
        batches.step(0)
        cpu = time.process_time()
        for step in range(50):
            batches.step(step)
        print(f"a step's batch of 32 x 512 tokens: {(time.process_time() - cpu) / 50 * 1e3:.2f} ms CPU")


if __name__ == "__main__":
    main()
