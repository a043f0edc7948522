"""What a model can do and what it can't. The package itself can be called: `ownlm.evaluate(ref) -> list[Score]`."""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ownlm.artifact import Workspace
    from ownlm.records import Score
    from ownlm.report import Reporter


class _Callable(ModuleType):
    """`ownlm.evaluate` is a package and a function of the public API under one name (docs/decisions/0005)."""

    def __call__(
        self,
        ref: str,
        *,
        tasks: Sequence[str] | None = None,
        documents: str | None = None,
        workspace: "Workspace | None" = None,
        reporter: "Reporter | None" = None,
    ) -> "list[Score]":
        """The scores of a checkpoint, kept as the artifact `NAME-scores`.

        tasks      named ones only; none: every task the documents have something for
        documents  what to ask about; none: the documents it was made from
        Raises NotFound and ArtifactError, and UserError for a task the documents have nothing for.
        """
        from ownlm.evaluate.stage import scores_of

        return scores_of(ref, tasks=tasks, documents=documents, workspace=workspace, reporter=reporter)


sys.modules[__name__].__class__ = _Callable
