"""Where an artifact comes from: its inputs, their inputs, back to the documents.

village@1  checkpoint
├── checkpoint   village-base@1  checkpoint
│   ├── documents   village-documents@1  documents
...
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ownlm import hub
from ownlm.artifact import Artifact, Workspace
from ownlm.errors import ArtifactError, NotFound
from ownlm.report import Reporter, size


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestor:
    """One artifact in the history of another. `state` says whether it is still what it was."""

    role: str  # as which input it was used; "" for the artifact itself
    ref: str
    kind: str
    digest: str
    depth: int
    state: str  # "here", "gone", "damaged" or "changed"
    source: str  # where it was taken from, if ownlm didn't make it: hf:owner/name@commit
    artifact: Artifact | None


def lineage(workspace: Workspace, artifact: Artifact) -> Iterator[Ancestor]:
    """The artifact and its inputs, depth first; an input that is gone or no longer the same says so."""
    yield from _walk(workspace, "", artifact, 0)


def tree(ancestors: Iterator[Ancestor]) -> str:
    """The lineage as indented lines."""
    lines = []
    for one in ancestors:
        note = "" if one.state == "here" else f"  ({one.state})"
        role = f"{one.role}: " if one.role else ""
        source = f"  from {one.source}" if one.source else ""
        lines.append(f"{'  ' * one.depth}{role}{one.ref}  {one.kind}  {one.digest[:12]}{source}{note}")
    return "\n".join(lines)


def describe(workspace: Workspace, ref: str, reporter: Reporter) -> None:
    """Say what an artifact is, from which inputs and by which recipe it was made; of a hub's model not here yet, what it is there."""
    if (source := hub.parse(ref)) and not workspace.downloaded(source):
        _announce(source, reporter)
        return
    artifact = workspace.downloaded(source)[0] if source else workspace.open(ref)
    artifact = workspace.open(artifact.path)
    manifest, machine = artifact.manifest, artifact.manifest.machine
    if artifact.version:
        verb = "taken" if artifact.source else "made"
        reporter.line(
            f"{artifact.ref}: {artifact.kind}, {verb} {manifest.created} by ownlm {manifest.packages['ownlm']}"
        )
    else:
        reporter.line(
            f"{artifact.ref}: {'a GGUF file' if artifact.path.is_file() else 'a folder'} with a {artifact.kind}, "
            f"not made by ownlm, last changed {manifest.created}"
        )
    reporter.line(f"  where    {artifact.path}  ({size(artifact.bytes)}, every file verified)")
    if artifact.version:
        reporter.line(f"  machine  {machine['processor']}, {machine['cores']} cores, {machine['system']}")
        reporter.line(f"  packages {', '.join(f'{name} {number}' for name, number in manifest.packages.items())}")
    ancestors = list(lineage(workspace, artifact))
    reporter.line(f"\nmade from\n{tree(iter(ancestors))}")
    for title, table in (("facts", manifest.facts), ("recipe", manifest.recipe)):
        reporter.line("\n".join([f"\n{title}", *(f"  {key} = {value}" for key, value in _flat(table))]))
    reporter.line("\nfiles")
    files = [[path, size(entry["bytes"]), entry["sha256"][:16]] for path, entry in manifest.files.items()]
    reporter.table(["file", "size", "sha256"], files)
    history = [
        {"role": one.role, "ref": one.ref, "digest": one.digest, "state": one.state, "source": one.source}
        for one in ancestors
    ]
    reporter.event(
        "artifact", ref=artifact.ref, kind=artifact.kind, facts=manifest.facts, recipe=manifest.recipe, lineage=history
    )


def _announce(source: hub.Source, reporter: Reporter) -> None:
    """Say what a hub has under a reference, without downloading it."""
    plan = hub.look(source)
    reporter.line(f"{source}: on the hub, not downloaded; commit {plan.commit}, licence: {plan.licence}")
    reporter.table(["file", "size", "hash"], [[one.name, size(one.bytes), one.digest[:16]] for one in plan.files])
    reporter.line(f"{size(plan.bytes)} in all. `ownlm generate {source} …` or a recipe that names it downloads them.")
    reporter.event(
        "hub", source=plan.ref, bytes=plan.bytes, licence=plan.licence, files=[one.name for one in plan.files]
    )


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as rows: {"a": {"b": 1}} gives ("a.b", 1)."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _walk(workspace: Workspace, role: str, artifact: Artifact, depth: int) -> Iterator[Ancestor]:
    yield Ancestor(
        role=role,
        ref=artifact.ref,
        kind=artifact.kind,
        digest=artifact.digest,
        depth=depth,
        state="here",
        source=artifact.source,
        artifact=artifact,
    )
    for name, source in artifact.manifest.inputs.items():
        try:
            found = workspace.open(source["ref"])
        except NotFound:
            yield _lost(name, source, depth + 1, "gone")
            continue
        except ArtifactError:
            yield _lost(name, source, depth + 1, "damaged")
            continue
        if found.digest != source["digest"]:
            yield _lost(name, source, depth + 1, "changed")
        else:
            yield from _walk(workspace, name, found, depth + 1)


def _lost(role: str, source: dict[str, str], depth: int, state: str) -> Ancestor:
    return Ancestor(
        role=role,
        ref=source["ref"],
        kind=source["kind"],
        digest=source["digest"],
        depth=depth,
        state=state,
        source=source.get("source", ""),
        artifact=None,
    )
