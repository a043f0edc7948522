"""A fine-tuned encoder beside TF-IDF and logistic regression, on the same examples: names, parts of speech, subjects of questions.

python benchmarks/finetune_tasks.py CHECKPOINT [RECIPE…]      from the root of the repository; CHECKPOINT: e.g. all-MiniLM-L6-v2
"""

import sys
import tempfile
import time
from pathlib import Path

from ownlm.artifact import Workspace
from ownlm.pipeline import recipe_path, run_stage
from ownlm.report import Reporter

RECIPES = ("names-ner", "names-lora", "pos-lora", "subjects-lora")  # names-lora learns from the documents of names-ner


def main(checkpoint: str, *recipes: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        workspace, reporter, quiet = Workspace(Path(home)), Reporter(), Reporter.silent()
        for recipe in map(recipe_path, RECIPES):
            if "[documents]" in recipe.read_text(encoding="utf-8"):
                run_stage("documents", recipe, (), workspace, quiet)
        for recipe in map(recipe_path, recipes or RECIPES):
            began = time.monotonic()
            run_stage("finetune", recipe, (f"finetune.checkpoint={checkpoint}",), workspace, reporter)
            tuned = time.monotonic()
            made = run_stage("evaluate", recipe, (), workspace, quiet)
            reporter.line(
                f"{recipe.stem}: tuned in {tuned - began:.0f} s, evaluated in {time.monotonic() - tuned:.0f} s"
            )
            for name, score in made.facts["scores"].items():
                reporter.line(
                    f"  {name}: {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}] of {score['n']}; "
                    f"TF-IDF + logistic regression {score['baseline']:.3f}"
                )


if __name__ == "__main__":
    main(*sys.argv[1:])
