"""The commands as functions: `ownlm.build`, `pretrain`, `finetune`, `quantize`, `show`. A workspace not given is `device.home()`."""

from pathlib import Path

from ownlm import device, pipeline
from ownlm.artifact import Artifact, Workspace
from ownlm.lineage import describe
from ownlm.release.quantize import Method, Precision
from ownlm.report import Reporter


def build(
    folder: str | Path,
    *,
    budget: str | None = None,
    params: str | None = None,
    name: str | None = None,
    workspace: Workspace | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Artifact]:
    """Make a model of a folder of files within a budget ("10m", "2h") or of a size ("5m" parameters); artifacts by stage."""
    return pipeline.build(
        Path(folder),
        workspace=workspace or Workspace(device.home(), reporter or Reporter()),
        reporter=reporter or Reporter(),
        name=name,
        budget=budget,
        params=params,
    )


def pretrain(
    recipe: str | Path, *overrides: str, workspace: Workspace | None = None, reporter: Reporter | None = None
) -> Artifact:
    """The checkpoint that the [pretrain] table of a recipe file makes; `overrides` are "key=value"."""
    return _stage("pretrain", recipe, overrides, workspace, reporter)


def finetune(
    recipe: str | Path, *overrides: str, workspace: Workspace | None = None, reporter: Reporter | None = None
) -> Artifact:
    """The checkpoint that the [finetune] table of a recipe file makes; `overrides` are "key=value"."""
    return _stage("finetune", recipe, overrides, workspace, reporter)


def quantize(
    ref: str | Path,
    *,
    to: Precision,
    method: Method | None = None,
    documents: str | Path | None = None,
    name: str | None = None,
    workspace: Workspace | None = None,
    reporter: Reporter | None = None,
) -> Artifact:
    """A checkpoint in integers of 8 or 4 bits or floats of 8, NAME-int8 and so on; what it costs is in `facts["held_out"]`.

    ref        a checkpoint or an adapter, which comes with its base
    method     "gptq" calibrates on text (decoders; the default there), "rtn" rounds every weight to the nearest value
    documents  a documents artifact or a file of text to calibrate on; None: what the checkpoint was made from
    """
    reporter = reporter or Reporter()
    workspace = workspace or Workspace(device.home(), reporter)
    return pipeline.quantized(
        ref, to=to, method=method, documents=documents, name=name, workspace=workspace, reporter=reporter
    )


def show(ref: str, *, workspace: Workspace | None = None) -> None:
    """Print what an artifact is, from which inputs and by which recipe it was made, back to the documents."""
    describe(workspace or Workspace(device.home(), Reporter()), ref, Reporter())


def _stage(
    stage: str, recipe: str | Path, overrides: tuple[str, ...], workspace: Workspace | None, reporter: Reporter | None
) -> Artifact:
    path = pipeline.recipe_path(str(recipe))
    return pipeline.run_stage(
        stage, path, overrides, workspace or Workspace(device.home(), reporter or Reporter()), reporter or Reporter()
    )
