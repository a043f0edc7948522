"""The tasks: each value makes a task from a documents artifact, or None when the documents have nothing for it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ownlm.artifact import Artifact
from ownlm.errors import UserError
from ownlm.evaluate.harness import Task
from ownlm.evaluate.tasks.examples import examples
from ownlm.evaluate.tasks.files import file_task
from ownlm.evaluate.tasks.planted import association, canary
from ownlm.evaluate.tasks.questions import questions
from ownlm.evaluate.tasks.text import bits_per_byte

TASKS: dict[str, Callable[[Artifact], Task | None]] = {
    "questions": questions,
    "bits_per_byte": bits_per_byte,
    "canary": canary,
    "association": association,
    "examples": examples,
}


def make_tasks(documents: Artifact, names: Sequence[str] | None, files: Sequence[Path] = ()) -> dict[str, Task]:
    """The named tasks (None: every one the documents have something for) and one task per file, called by the file's name.

    Raises UserError when a named task has nothing to ask about.
    """
    tasks: dict[str, Task] = {}
    for name in TASKS if names is None else names:
        task = TASKS[name](documents)
        if task is not None:
            tasks[name] = task
        elif names is not None:
            raise UserError(f"{documents.ref} has nothing for the task {name}.", cure="Leave it out of `tasks`.")
    for path in files:
        name = path.name.removesuffix(".gz").removesuffix(".jsonl")
        if name in tasks:
            raise UserError(f"there is already a task called {name}.", where=str(path), cure="Rename the file.")
        tasks[name] = file_task(path, name)
    return tasks
