"""The command line: one table, one function per command, in the order of a model's life.

Heavy modules are imported inside the command that needs them: `ownlm --help` answers without torch.
Exit codes: 0 done, 1 failed, 2 bad input or a gate said no, 130 stopped by the user after saving.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ownlm import __version__, device
from ownlm.artifact import Workspace
from ownlm.errors import Interrupted, UserError
from ownlm.model_commands import bench, chat, generate, serve
from ownlm.report import Reporter, duration, quantity, size
from ownlm.task_commands import answer, classify, embed, summarize, translate

Arguments = argparse.Namespace
_workspace = Workspace.at_home


def demo(args: Arguments, reporter: Reporter) -> None:
    """Make a model from nothing in about five minutes: a village's documents, tokenizer, pretraining, tuning, evaluation."""
    from ownlm import pipeline

    pipeline.demo(_workspace(reporter), reporter, args.override)


def build(args: Arguments, reporter: Reporter) -> None:
    """Make a model of your own folder of files within a budget of time or parameters."""
    from ownlm import pipeline

    pipeline.build(
        Path(args.folder),
        workspace=_workspace(reporter),
        reporter=reporter,
        name=args.name,
        budget=args.budget,
        params=args.params,
        dry_run=args.dry_run,
    )


def doctor(args: Arguments, reporter: Reporter) -> int:
    """Look at this machine and say what ownlm will use of it, and what is in the way."""
    from ownlm.doctor import doctor as examine

    findings = examine(device.home())
    signs = {"ok": "ok", "warning": "!", "fault": "x"}
    reporter.table(["", "what", "found"], [[signs[one.state], one.what, one.found] for one in findings])
    for one in findings:
        reporter.event("finding", what=one.what, found=one.found, state=one.state, cure=one.cure)
        if one.cure:
            reporter.line(f"{one.what}: {one.cure}")
    return 2 if any(one.state == "fault" for one in findings) else 0


def show(args: Arguments, reporter: Reporter) -> None:
    """Say what an artifact is, from which inputs and by which recipe it was made, back to the documents."""
    from ownlm.lineage import describe

    describe(_workspace(reporter), args.ref, reporter)


def list_(args: Arguments, reporter: Reporter) -> None:
    """List the artifacts of the workspace, or what the catalog recorded: runs, requests."""
    if args.what == "artifacts":
        rows = [
            {
                "artifact": one.ref,
                "kind": one.kind,
                "size": size(one.bytes),
                "made": one.manifest.created,
                "digest": one.digest[:12],
            }
            for one in _workspace(reporter).all()
        ]
    else:
        from ownlm.catalog import Catalog

        catalog = Catalog(_workspace(reporter).root)
        rows = [_told(row) for row in (catalog.runs() if args.what == "runs" else catalog.requests())]
        catalog.close()
    for row in rows:
        reporter.event(args.what.removesuffix("s"), **row)
    if rows:
        reporter.table(list(rows[0]), [list(row.values()) for row in rows])
    else:
        reporter.line(f"There are no {args.what} in {device.home()} yet. `ownlm demo` makes a first model.")


def rm(args: Arguments, reporter: Reporter) -> None:
    """Delete an artifact; refused while another one was made from it."""
    gone = _workspace(reporter).remove(args.ref)
    reporter.line(f"Deleted {gone.ref} ({size(gone.bytes)}).")


def stage(args: Arguments, reporter: Reporter) -> None:
    """Run the stage of that name from a recipe file."""
    from ownlm import pipeline

    made = pipeline.run_stage(
        args.command, pipeline.recipe_path(args.recipe), args.override, _workspace(reporter), reporter
    )
    reporter.line(f"{made.ref} is in {made.path}")
    reporter.event("artifact", ref=made.ref, kind=made.kind, path=made.path, digest=made.digest, facts=made.facts)


def convert(args: Arguments, reporter: Reporter) -> None:
    """Turn pickled weights (pytorch_model.bin, shards, any file of torch.save) into a safetensors folder, in a confined process."""
    from ownlm.formats.convert import convert as run

    run(args.path, out=args.out, reporter=reporter)


def quantize(args: Arguments, reporter: Reporter) -> None:
    """Make a checkpoint small and fast: its weights as integers, a decoder's calibrated on its own documents. What that costs is
    measured on held-out text."""
    from ownlm import pipeline

    made = pipeline.quantized(
        args.ref,
        to=args.to,
        method=args.method,
        documents=args.documents,
        name=args.name,
        workspace=_workspace(reporter),
        reporter=reporter,
    )
    reporter.event("artifact", ref=made.ref, kind=made.kind, path=made.path, digest=made.digest, facts=made.facts)


def export(args: Arguments, reporter: Reporter) -> None:
    """Write a model for other programs: one GGUF file for llama.cpp, or a Hugging Face folder. What was written is loaded back
    and compared with the original."""
    from dataclasses import asdict

    from ownlm.release.export import export as run

    done = run(
        args.ref,
        to=args.to,
        quantization=args.quantization,
        out=args.out,
        adapter=args.adapter,
        workspace=_workspace(reporter),
    )
    for note in done.notes:
        reporter.line(note)
    reporter.line(done.told)
    reporter.event("exported", **asdict(done))


def _numbers(word: str) -> list[int]:
    """Whole numbers between commas: _numbers("1,4") == [1, 4]."""
    try:
        return [int(part) for part in word.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} are no whole numbers; write for example 1,4,16") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A row of the table: the function, its arguments as `add_argument` takes them, and for stages a help line of their own."""

    run: Callable[[Arguments, Reporter], int | None]
    arguments: Sequence[tuple[str, dict[str, Any]]] = ()
    help: str = ""


REF = ("ref", {"metavar": "NAME", "help": "name, name@version, a folder, a GGUF file, or hf:owner/name[@revision]"})
OVERRIDE = (
    "override",
    {"metavar": "key=value", "nargs": "*", "help": "change a value of the recipe, e.g. pretrain.steps=200"},
)
ADAPTER = (
    "--adapter",
    {"default": None, "metavar": "NAME", "help": "an adapter to load with it: a reference, or a folder of PEFT's"},
)
DRAFT = (
    "--draft",
    {
        "default": None,
        "metavar": "NAME",
        "help": "a small model of the same vocabulary that writes ahead: the same text, sooner",
    },
)
TENSOR_PARALLEL = (
    "--tensor-parallel",
    {
        "default": 1,
        "type": int,
        "metavar": "N",
        "help": "processes to split the model over, one for each GPU (default 1)",
    },
)
SAMPLING = (
    "override",
    {"metavar": "key=value", "nargs": "*", "help": "max_tokens, temperature, top_p, top_k, seed, stop …"},
)
TEXTS = (
    "text",
    {"metavar": "TEXT", "nargs": "+", "help": 'a text, @FILE for its lines, "-" for those of standard input'},
)
ONE_TEXT = 'a text, @FILE for a file that is one, "-" for standard input'
SET = (
    "--set",
    {
        "dest": "settings",
        "action": "append",
        "default": [],
        "metavar": "key=value",
        "help": "how to write, as often as needed: max_tokens, beams, length_penalty, temperature, top_p, seed …",
    },
)
STAGE = (("recipe", {"metavar": "RECIPE", "help": "a TOML file, or the name of one that comes with ownlm"}), OVERRIDE)

COMMANDS: dict[str, Command] = {
    "demo": Command(run=demo, arguments=(OVERRIDE,)),
    "build": Command(
        run=build,
        arguments=(
            ("folder", {"metavar": "FOLDER", "help": "txt, md, html, jsonl, parquet, csv, source code; .gz of each"}),
            ("--budget", {"default": None, "metavar": "TIME", "help": "whole time, e.g. 10m, 2h, 90s (default 10m)"}),
            ("--params", {"default": None, "metavar": "N", "help": "number of parameters instead, e.g. 5m"}),
            ("--name", {"default": None, "help": "name of the model (default: the folder's name)"}),
            ("--dry-run", {"action": "store_true", "help": "print the plan and its predictions, train nothing"}),
        ),
    ),
    "doctor": Command(run=doctor),
    "show": Command(run=show, arguments=(REF,)),
    "list": Command(
        run=list_,
        arguments=(("what", {"nargs": "?", "choices": ("artifacts", "runs", "requests"), "default": "artifacts"}),),
    ),
    "rm": Command(run=rm, arguments=(REF,)),
    "documents": Command(
        run=stage, arguments=STAGE, help="Collect and clean documents into train, validation and test."
    ),
    "tokenizer": Command(run=stage, arguments=STAGE, help="Train a tokenizer on documents."),
    "pretrain": Command(run=stage, arguments=STAGE, help="Train a model on documents from nothing."),
    "finetune": Command(run=stage, arguments=STAGE, help="Tune a checkpoint for chat, a text, or a task."),
    "evaluate": Command(run=stage, arguments=STAGE, help="Score a checkpoint and write a report."),
    "generate": Command(
        run=generate,
        arguments=(
            REF,
            ("prompt", {"metavar": "PROMPT"}),
            ("--chat", {"action": "store_true", "help": "ask as a user's message, through the chat template"}),
            ADAPTER,
            DRAFT,
            TENSOR_PARALLEL,
            (SAMPLING[0], SAMPLING[1] | {"help": "max_tokens, temperature, top_p, top_k, seed, stop, beams …"}),
        ),
    ),
    "classify": Command(
        run=classify,
        arguments=(
            REF,
            TEXTS,
            ADAPTER,
            ("--labels", {"default": None, "metavar": "A,B,…", "help": "what an image may show, for CLIP"}),
        ),
    ),
    "embed": Command(
        run=embed,
        arguments=(
            REF,
            TEXTS,
            ADAPTER,
            ("--out", {"default": None, "metavar": "FILE", "help": "a .npy or .jsonl file"}),
        ),
    ),
    "answer": Command(
        run=answer,
        arguments=(
            REF,
            ("question", {"metavar": "QUESTION"}),
            ("--context", {"required": True, "metavar": "TEXT", "help": f"what to answer from: {ONE_TEXT}"}),
            ADAPTER,
            SET,
        ),
    ),
    "translate": Command(
        run=translate,
        arguments=(
            REF,
            TEXTS,
            ("--from", {"dest": "source", "required": True, "metavar": "LANGUAGE", "help": "e.g. English, or en"}),
            ("--to", {"dest": "target", "required": True, "metavar": "LANGUAGE", "help": "e.g. German, or de"}),
            ADAPTER,
            SET,
        ),
    ),
    "summarize": Command(
        run=summarize,
        arguments=(REF, ("text", {"metavar": "TEXT", "nargs": "+", "help": ONE_TEXT}), ADAPTER, SET),
    ),
    "chat": Command(run=chat, arguments=(REF, ADAPTER, DRAFT, TENSOR_PARALLEL, SAMPLING)),
    "bench": Command(
        run=bench,
        arguments=(
            ("what", {"choices": ("generate",), "help": "what is measured"}),
            REF,
            (
                "--kind",
                {
                    "choices": ("f32", "bf16", "int8", "int4", "uint4", "fp8"),
                    "default": None,
                    "help": "precision of the weights (default: that in which the model runs)",
                },
            ),
            ("--threads", {"default": None, "type": int, "metavar": "N", "help": "threads (default: all cores)"}),
            (
                "--prompts",
                {"default": None, "type": _numbers, "metavar": "N,…", "help": "lengths of prompts (default 64,512)"},
            ),
            (
                "--batches",
                {"default": None, "type": _numbers, "metavar": "N,…", "help": "streams at a time (default 1,2,4,8,16)"},
            ),
            ("--out", {"default": None, "metavar": "DIR", "help": "folder of what is written (default bench-NAME)"}),
        ),
    ),
    "convert": Command(
        run=convert,
        arguments=(
            ("path", {"metavar": "PATH", "help": "a folder with pytorch_model.bin, or a file of torch.save"}),
            ("--out", {"metavar": "DIR", "required": True, "help": "the folder to write; it must not exist"}),
        ),
    ),
    "quantize": Command(
        run=quantize,
        arguments=(
            (
                "ref",
                {
                    "metavar": "NAME",
                    "help": "a checkpoint or an adapter: name, name@version, a folder, or hf:owner/name",
                },
            ),
            (
                "--to",
                {
                    "required": True,
                    "choices": ("int8", "int4", "fp8"),
                    "help": "8.5, 4.5 or 8 bits for each weight; fp8 is what recent GPUs multiply as it is",
                },
            ),
            (
                "--method",
                {
                    "choices": ("gptq", "rtn"),
                    "default": None,
                    "help": "gptq: calibrated on text (decoders; the default there); rtn: rounded to the nearest, no text needed",
                },
            ),
            (
                "--documents",
                {
                    "default": None,
                    "metavar": "NAME",
                    "help": "documents or a file of text to calibrate on (default: what the checkpoint was made from)",
                },
            ),
            ("--name", {"default": None, "help": "name of what is made (default: NAME-int8 and so on)"}),
        ),
    ),
    "export": Command(
        run=export,
        arguments=(
            REF,
            ("--to", {"choices": ("gguf", "hf"), "default": "gguf", "help": "the form (default gguf)"}),
            (
                "--quantization",
                {
                    "default": "Q8_0",
                    "choices": ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0"),
                    "help": "how GGUF keeps the matrices (default Q8_0)",
                },
            ),
            ("--out", {"metavar": "PATH", "required": True, "help": "the .gguf file, or the new folder"}),
            ADAPTER,
        ),
    ),
    "serve": Command(
        run=serve,
        arguments=(
            REF,
            (
                "--adapter",
                {
                    "action": "append",
                    "default": [],
                    "metavar": "[NAME=]REF",
                    "help": "serve this adapter under a name beside the model (may be given again); without a name: merge it",
                },
            ),
            DRAFT,
            TENSOR_PARALLEL,
            ("--host", {"default": "127.0.0.1", "help": "address to listen on (default 127.0.0.1)"}),
            ("--port", {"default": 8000, "type": int, "help": "port to listen on (default 8000)"}),
            (
                "--kv",
                {
                    "choices": ("f32", "bf16", "int8"),
                    "help": "how keys and values are kept; int8 takes half the memory of bf16",
                },
            ),
        ),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    parser = make_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        print(f"ownlm: there is no command {words[0]!r}.{f' Did you mean {near[0]}?' if near else ''}", file=sys.stderr)  # noqa: T201
        return 2
    if not words or words[0] not in COMMANDS:
        parser.parse_args(words or ["--help"])
    args = children(parser)[words[0]].parse_intermixed_args(words[1:])  # flags may stand between key=value words
    args.command = words[0]
    reporter = Reporter("programs" if args.json else "people")
    try:
        return COMMANDS[args.command].run(args, reporter) or 0
    except UserError as fault:
        reporter.clear()
        print(f"ownlm {args.command}: {fault}", file=sys.stderr)  # noqa: T201
        return 2
    except Interrupted as stop:
        reporter.line(f"\n{stop}")
        return 130
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `ownlm list | head`
        sys.stderr.close()
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command; the reference page is generated from it."""
    parser = argparse.ArgumentParser(
        prog="ownlm", description="The whole life of a language model on machines you control.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"ownlm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = command.help or (command.run.__doc__ or "").strip()
        child = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        for argument, options in command.arguments:
            child.add_argument(argument, **options)
        child.add_argument("--json", action="store_true", help="one JSON line per event, for programs")
    return parser


def children(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    (action,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(action.choices)


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the catalog as people read it: short columns, units, no empty texts."""
    units: dict[str, Callable[[Any], str]] = {
        "seconds": duration,
        "peak_memory_bytes": size,
        "prompt_tokens": quantity,
        "completion_tokens": quantity,
        "started": lambda when: when.isoformat(sep=" ", timespec="seconds"),
        "digest": lambda digest: digest[:12],
        "first_token_s": lambda s: f"{s * 1000:.0f} ms",
        "latency_s": lambda s: f"{s * 1000:.0f} ms",
    }
    skipped = {"prompt", "completion", "sampling"}
    return {
        key: units[key](value) if key in units and value is not None else value
        for key, value in row.items()
        if key not in skipped
    }
