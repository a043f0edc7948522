"""Jinja as chat templates know it, and the child process that renders those of strangers.

Jinja's sandbox keeps a template away from Python's objects, but not from the machine: it may loop for ever or ask for a terabyte. So
a template that didn't come with ownlm is rendered in a child (`serve`): one request at a time over two pipes, within limits of
time, memory and length that the operating system holds, and without environment, files, sockets or new processes.
"""

import json
import re
import resource
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ownlm.sandbox import filter_calls

MAX_CHARACTERS = 2**23  # of all texts of one request; a context of two million tokens
CPU_S = 2
MEMORY_BYTES = 512 * 2**20
GENERATION_TAG = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
# Renders with all that Python and Jinja load only when it is needed, while files can still be opened; ends in an error, likewise.
WARM_UP = r"""{{ '\n\u00e9\N{BULLET}' | pprint }}{{ 'a b' | wordwrap(1) | urlize | striptags }}{{ strftime_now('%x %A') }}
{{ [{'a': 1}] | groupby('a') | list }}{{ [1, 2] | random }}{{ '%s' | format(1) }}{{ {'a': 1.5} | tojson(indent=1) }}
{% for x in [1] recursive %}{% generation %}{{ loop.index }}{% endgeneration %}{% endfor %}{{ nothing.at.all }}"""
Reply = dict[str, Any]


class TooLong(Exception):
    """A template printed more than MAX_CHARACTERS."""


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: prints its body between the two marks of this rendering."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks: list[nodes.Expr] = [nodes.Name(name, "load") for name in ("generation_start", "generation_end")]
        # A call, as in transformers: what the body sets is not seen outside.
        return nodes.CallBlock(self.call_method("_between", marks), [], [], body).set_lineno(line)

    def _between(self, opened: str, closed: str, caller: Any) -> str:
        return f"{opened}{caller()}{closed}"


class Names(Namespace):
    """Jinja's namespace(), without names that begin with an underscore: they lead into Python."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, *rest = args
        for name in (values := dict(*rest, **attributes)):
            _no_underscore(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _no_underscore(name)
        super().__setitem__(name, value)


def _no_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace can't hold the name {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which would reach the model as \u003c.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.Environment:
    """What transformers offers to a chat template."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    made.globals["namespace"] = Names
    made.globals["dict"] = lambda *pairs, **items: dict(*pairs, **items)
    return made


class Template:
    """A template that answers requests, each a plain dict, with a plain dict.

    Request: `messages`, `variables`, and `cuts`, a list of (how many messages, add_generation_prompt).
    Reply: `texts`, one for each cut, where None stands for a later cut that the template refused; or `fault`, which is "syntax",
    "refused" or "length", with `message`.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._template: jinja2.Template | None = None

    def reply(self, request: Mapping[str, Any]) -> Reply:
        if self._template is None:
            try:
                self._template = environment().from_string(self._source)
            except (jinja2.TemplateError, ValueError, RecursionError) as fault:
                return {"fault": "syntax", "message": str(fault)}
        texts: list[str | None] = []
        room = MAX_CHARACTERS
        try:
            for count, prompt in request["cuts"]:
                parts = []
                try:
                    for part in self._write(request, count, prompt):
                        room -= len(part)
                        if room < 0:
                            raise TooLong
                        parts.append(part)
                except (MemoryError, TooLong):
                    raise
                except Exception:  # a template can raise whatever Python raises
                    if not texts:
                        raise
                    texts.append(None)
                else:
                    texts.append("".join(parts))
        except TooLong:
            return {"fault": "length", "message": f"it prints more than {MAX_CHARACTERS} characters"}
        except MemoryError:
            return {"fault": "memory", "message": "out of memory"}
        except Exception as fault:  # noqa: BLE001
            return {"fault": "refused", "message": str(fault) or type(fault).__name__}
        return {"texts": texts}

    def _write(self, request: Mapping[str, Any], count: int, prompt: bool) -> Iterator[str]:
        assert self._template is not None
        messages = request["messages"][:count]
        return self._template.generate({**request["variables"], "messages": messages, "add_generation_prompt": prompt})


def pack(value: Any) -> bytes:
    """A value as a line of the protocol: its length in eight bytes, then JSON. Lone surrogates travel as they are."""
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(data).to_bytes(8, "little") + data


def unpack(data: bytes) -> Any:
    """The value of a line without its length."""
    return json.loads(data.decode("utf-8", "surrogatepass"))


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """The child: the first line is the template's source, each further one a request; ends when the parent closes the pipe.

    The answer to the source tells whether the parent must `limit_time`: the filter lets this process no longer do so.
    """
    Template(WARM_UP).reply({"messages": [], "variables": {}, "cuts": [(0, False)]})
    _limit()
    filtered = bool(filter_calls())
    template: Template | None = None
    while size := source.read(8):
        line = unpack(source.read(int.from_bytes(size, "little")))
        if template is None:
            template = Template(line)
            answer: Reply = {"filtered": filtered}
        else:
            if not filtered:
                limit_time(0, time.process_time())
            answer = template.reply(line)
        sink.write(pack({**answer, "used_s": time.process_time()}))
        sink.flush()


def _limit() -> None:
    """Bound this process for good."""
    for kind, bound in {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 0,
    }.items():
        resource.setrlimit(kind, (bound, bound))


def limit_time(process: int, used_s: float) -> None:
    """At most CPU_S more seconds of the processor for a process (0 is this one) that has used `used_s`. The kernel counts whole
    ones, and ends the process after that even within one C function."""
    bounds = (int(used_s) + CPU_S, resource.RLIM_INFINITY)
    if process == 0:
        resource.setrlimit(resource.RLIMIT_CPU, bounds)
    else:
        resource.prlimit(process, resource.RLIMIT_CPU, bounds)
