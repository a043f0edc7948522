"""The commands that let a decoder write: generate, chat, serve; and measure how fast it does: bench."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ownlm import device
from ownlm.artifact import Workspace
from ownlm.errors import UserError
from ownlm.report import Reporter

Arguments = argparse.Namespace


def generate(args: Arguments, reporter: Reporter) -> None:
    """Continue a prompt; with --chat, answer it as a user's message. "-" reads the prompt from standard input."""
    workspace = _workspace_ahead(args.ref, reporter)
    from ownlm import recipe
    from ownlm.generate.opening import load_writer
    from ownlm.generate.sampling import Sampling

    sampling = recipe.read(Sampling, None, args.override)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    model = load_writer(
        args.ref,
        adapter=args.adapter,
        draft=args.draft,
        workspace=workspace,
        tensor_parallel=args.tensor_parallel,
    )
    question: Any = [{"role": "user", "content": prompt}] if args.chat else prompt
    if args.json:
        from dataclasses import asdict

        reporter.event("completion", **asdict(model.generate(question, sampling=sampling)))
        return
    for piece in model.stream(question, sampling=sampling):
        reporter.out.write(piece)
        reporter.out.flush()
    reporter.line("")


def chat(args: Arguments, reporter: Reporter) -> None:
    """Talk to a model in the terminal."""
    workspace = _workspace_ahead(args.ref, reporter)
    from ownlm import recipe
    from ownlm.generate.chat import chat as talk
    from ownlm.generate.opening import load_decoder
    from ownlm.generate.sampling import Sampling

    sampling = recipe.read(Sampling, None, args.override)
    model = load_decoder(
        args.ref,
        adapter=args.adapter,
        draft=args.draft,
        workspace=workspace,
        tensor_parallel=args.tensor_parallel,
    )
    talk(model, sampling=sampling)


def bench(args: Arguments, reporter: Reporter) -> None:
    """Measure how fast a decoder generates on this machine's processor, beside what its memory and its cores allow: a table, and in a
    folder bench.json and bench.html with a roofline."""
    from dataclasses import asdict

    from ownlm.evaluate import bench as benches

    out = Path(args.out or f"bench-{Path(args.ref).name.removesuffix('.gguf')}")
    if out.exists() and not out.is_dir():
        raise UserError("this is a file.", where=str(out), cure="Name a folder: --out DIR.")
    done = benches.bench(
        args.ref,
        kind=args.kind,
        threads=args.threads,
        prompts=args.prompts,
        batches=args.batches or benches.BATCHES,
        workspace=Workspace.at_home(reporter),
        reporter=reporter,
    )
    benches.write(done, out)
    for text in benches.about(done):
        reporter.line(text)
    reporter.table(*benches.table(done))
    reporter.line(f"{out / 'bench.html'} has the picture, {out / 'bench.json'} the numbers.")
    reporter.event("bench", out=out, **asdict(done))


def serve(args: Arguments, reporter: Reporter) -> None:
    """Serve a model over the OpenAI API with a chat page. Keys come from $OWNLM_API_KEYS; beyond loopback they are required."""
    from ownlm.serve.server import serve as run

    merged, named = _adapters(args.adapter)
    run(
        args.ref,
        adapter=merged,
        adapters=named,
        draft=args.draft,
        host=args.host,
        port=args.port,
        kv=args.kv,
        tensor_parallel=args.tensor_parallel,
        api_keys=device.api_keys(),
        admin_keys=device.admin_keys(),
        workspace=Workspace.at_home(reporter),
        reporter=reporter,
    )


def _adapters(words: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Of `--adapter REF` and `--adapter NAME=REF` the one to merge, and those to serve by name."""
    merged: list[str] = []
    named: dict[str, str] = {}
    for word in words:
        name, sign, ref = word.partition("=")
        if not sign or "/" in name:  # a path may have the sign in it
            merged.append(word)
        elif name in named:
            raise UserError(f"two adapters are called {name!r}.", where="--adapter", cure="Give each its own name.")
        else:
            named[name] = ref
    if len(merged) > 1:
        raise UserError(
            "only one adapter can be merged into the model.", where="--adapter", cure="Name them: --adapter NAME=REF."
        )
    return (merged[0] if merged else None), named


def _workspace_ahead(ref: str, reporter: Reporter) -> Workspace:
    """The workspace, which reads the files of `ref` through while torch is imported."""
    workspace = Workspace.at_home(reporter)
    workspace.check_ahead(ref)
    return workspace
