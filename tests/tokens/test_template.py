"""Chat templates against transformers' own rendering, and templates that want more than a template should get."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import psutil
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ownlm.errors import UserError
from ownlm.tokens import child, rendering
from ownlm.tokens.stream import BYTE_OF
from ownlm.tokens.template import CHATML, ChatTemplate

TEMPLATES = sorted(
    (Path(__file__).parents[3] / "shared/vectors/llama.cpp-vocab/templates").glob("*.jinja"), key=lambda path: path.name
)
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather in a <city> & "more".',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where, e.g. Zürich"},
                "days": {"type": "integer", "enum": [1, 2, 3]},
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}},
}
USER = {"role": "user", "content": "What's the weather in Zürich? 天気 <tag> & co"}
ASSISTANT = {"role": "assistant", "content": " It is sunny.\n"}
SYSTEM = {"role": "system", "content": "Be brief.\n\nAlways."}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [USER], "add_generation_prompt": True},
    "no prompt": {"messages": [USER, ASSISTANT]},
    "system": {"messages": [SYSTEM, USER], "add_generation_prompt": True},
    "several turns": {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER], "add_generation_prompt": True},
    "begins with the assistant": {"messages": [ASSISTANT, USER]},
    "two users": {"messages": [USER, USER], "add_generation_prompt": True},
    "tools": {"messages": [SYSTEM, USER], "tools": [TOOL], "add_generation_prompt": True},
    "tool call": {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call12345", "name": "get_weather", "content": '{"sky": "blue"}'},
            ASSISTANT,
            USER,
        ],
        "tools": [TOOL],
        "add_generation_prompt": True,
    },
    "tool call without content": {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
        "tools": [TOOL],
    },
    "reasoning": {
        "messages": [USER, {**ASSISTANT, "reasoning": "Let me think."}, USER],
        "add_generation_prompt": True,
        "enable_thinking": False,
    },
    "parts": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]},
        ],
        "add_generation_prompt": True,
    },
    "image": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": object()}, {"type": "text", "text": "What is it?"}]}
        ],
        "add_generation_prompt": True,
    },
    "documents": {
        "messages": [USER],
        "documents": [{"title": "T", "text": "Some text."}],
        "add_generation_prompt": True,
    },
    "odd role": {"messages": [{"role": "developer", "content": "x"}, USER], "add_generation_prompt": True},
}


@pytest.fixture(scope="module")
def peer() -> Any:
    backend = Backend(models.BPE(vocab=dict(BYTE_OF), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)


def template(source: str, specials: tuple[str, ...] = ("<s>", "</s>", "<unk>", "<pad>")) -> ChatTemplate:
    return ChatTemplate(source, names=NAMES, specials=specials, stops=["</s>"])


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_real_templates_render_as_in_transformers(path: Path, peer: Any) -> None:
    source = path.read_text()
    ours = template(source)
    rendered = 0
    for name, given in CONVERSATIONS.items():
        arguments = {key: value for key, value in given.items() if key != "messages"}
        theirs, reason = None, ""
        try:
            theirs = peer.apply_chat_template(given["messages"], chat_template=source, tokenize=False, **arguments)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as fault:
            reason = str(fault)
        if theirs is None:
            with pytest.raises(UserError, match=re.escape(reason)):
                ours.render(given["messages"], **arguments)
        else:
            assert ours.render(given["messages"], **arguments).text == theirs, name
            rendered += 1
    assert rendered >= 3


def test_there_are_templates_to_compare() -> None:
    if not TEMPLATES:
        pytest.skip("shared/vectors is not beside this checkout")
    assert len(TEMPLATES) >= 35


# {% generation %}

MARKED = {
    "chatml": CHATML,
    "words in the tag": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{%- generation -%} {{ m.content }}<end>{%- endgeneration -%}"
        "{% else %}[{{ m.content }}]{% endif %}\n{% endfor %}"
    ),
    "a variable set inside": (
        "{% for m in messages %}{% set x = 'out' %}{% if m.role == 'assistant' %}"
        "{% generation %}{% set x = 'in' %}{{ x }}{{ m.content }}{% endgeneration %}{% endif %}{{ x }}|{% endfor %}"
    ),
    "twice in a turn": (
        "{% for m in messages %}{% generation %}{{ m.content[:2] }}{% endgeneration %}-"
        "{% generation %}{{ m.content[2:] }}{% endgeneration %}{% endfor %}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if loop.index0 == 3 %}{% break %}{% endif %}{% if m.role == 'user' %}{{ m.content }}"
        "{% continue %}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("source", MARKED.values(), ids=MARKED.keys())
def test_generation_spans_are_those_of_transformers(source: str, peer: Any) -> None:
    messages = [USER, ASSISTANT, {**USER, "content": "x"}, {**ASSISTANT, "content": "é漢字"}]
    theirs = peer.apply_chat_template(
        messages, chat_template=source, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    rendered = template(source, specials=()).render(messages)
    # A byte is a token here, and a span is in characters.
    mask = [any(first <= at < last for first, last in rendered.spans) for at in range(len(rendered.text))]
    ours = [int(mine) for mine, character in zip(mask, rendered.text, strict=True) for _ in character.encode()]
    assert peer.apply_chat_template(messages, chat_template=source, tokenize=False) == rendered.text
    assert theirs["assistant_masks"] == ours
    assert sum(ours) > 0


def test_the_environment_is_that_of_transformers(peer: Any) -> None:
    source = (
        "{{ strftime_now('%Y-%m-%d') }} {{ x }} {{ {'b': [1, 2.5, none], 'a': 'é<&>'} | tojson }}\n"
        "{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=True, separators=(',', ' : ')) }} {{ 'é' | tojson(ensure_ascii=True) }}"
        "{{ dict(a=1).a }} {{ bos_token }} {{ tools }} {{ documents | length }}"
        "{% set ns = namespace(seen=0) %}{% for m in messages %}{% set ns.seen = ns.seen + 1 %}{% endfor %} {{ ns.seen }}"
    )
    given: dict[str, Any] = {"documents": [{"title": "t", "text": "u"}], "x": {"deep": [1, "two"]}}
    assert date.today().isoformat() in (ours := template(source).render([USER], **given).text)
    assert peer.apply_chat_template([USER], chat_template=source, tokenize=False, **given) == ours


# Templates that want too much.

EXCESSES = {
    "loops for ever": "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}",
    "computes for ever": "{{ (messages | length + 9) ** (10 ** 8) }}",
    "doubles a string": "{% set ns = namespace(a='x') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "asks for a terabyte": "{{ ('x' * 10 ** 12) | length }}",
    "pads": "{{ '%0999999999d' % 1 }}",
    "prints without end": "{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nests too deep": "{{ " + "(" * 99999 + "1" + ")" * 99999 + " }}",
}
SAYS = "processor time|MB of memory|prints without end|recursion depth"


@pytest.mark.parametrize("source", EXCESSES.values(), ids=EXCESSES.keys())
def test_an_excess_is_one_error_and_the_next_rendering_works(source: str) -> None:
    one = template("{% if messages[0].content == 'x' %}" + source + "{% endif %}fine")
    with pytest.raises(UserError, match=SAYS) as failure:
        one.render([{"role": "user", "content": "x"}])
    assert len(str(failure.value)) < 300
    if "deep" not in source and "((((" not in source:  # that one can't even be read
        assert one.render([{"role": "user", "content": "y"}]).text == "fine"


def test_a_template_of_megabytes_is_refused() -> None:
    with pytest.raises(UserError, match="1048576 are the most"):
        template("x" * 2**21)


ATTACKS = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{{ dict.mro() }}",
    "{{ messages.append(1) }}",
    "{{ self._TemplateReference__context.environment }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
)


@pytest.mark.parametrize("source", ATTACKS)
def test_a_template_reaches_nothing(source: str) -> None:
    with pytest.raises(UserError, match="chat template"):
        template(source).render([USER])


def children() -> set[int]:
    """The processes that run rendering.py for this one, after those of other tests' templates are gone."""
    gc.collect()
    return {
        each.pid for each in psutil.Process().children() if any("tokens.rendering" in part for part in each.cmdline())
    }


def test_the_child_holds_nothing_of_ours() -> None:
    before = children()
    os.environ["A_SECRET"] = "x"
    with open(__file__) as file:
        os.set_inheritable(file.fileno(), True)
        one = template("{{ messages[0].content }}")
        one.render([USER])
        (process,) = children() - before
        environment = Path(f"/proc/{process}/environ").read_bytes()
        opened = {path.name for path in Path(f"/proc/{process}/fd").iterdir()}
        limits = Path(f"/proc/{process}/limits").read_text()
        mapped = Path(f"/proc/{process}/maps").read_text()
    del os.environ["A_SECRET"]
    assert b"A_SECRET" not in environment
    assert opened == {"0", "1", "2"}
    assert "torch" not in mapped
    for row, value in {"Max address space": rendering.MEMORY_BYTES, "Max open files": 0, "Max file size": 0}.items():
        (line,) = (line for line in limits.splitlines() if line.startswith(row))
        assert line.removeprefix(row).split()[:2] == [str(value), str(value)]


def test_a_child_starts_late_and_ends_with_its_template() -> None:
    before = children()
    one, ours = template("{{ messages }}"), template(CHATML)
    ours.render([USER])
    assert children() == before
    one.render([USER])
    one.render([USER])
    (process,) = children() - before
    os.kill(process, signal.SIGKILL)  # as the kernel does when memory runs out
    with pytest.raises(UserError, match=r"breaks down \(exit code -9\)"):
        one.render([USER])
    one.render([USER])
    (again,) = children() - before
    assert again != process
    del one
    assert again not in children()


def test_a_child_ends_with_its_process() -> None:
    code = (
        "from ownlm.tokens.template import ChatTemplate\n"
        "t = ChatTemplate('{{ messages }}', names={}, specials=[], stops=[])\n"
        "t.render([])\n"
        "print(t._renderer._process.pid)\n"
    )
    paths = {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **paths}, check=True
    )
    assert done.stderr == ""
    for _ in range(100):
        if not Path(f"/proc/{int(done.stdout)}").exists():
            return
        time.sleep(0.05)
    pytest.fail("the child is still there")


def test_a_fork_gets_a_child_of_its_own() -> None:
    one = template("{{ messages[0].content }}")
    assert one.render([{"role": "user", "content": "a"}]).text == "a"
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = one.render([{"role": "user", "content": "b"}]).text
        os.write(writer, text.encode())
        one._renderer.close()  # type: ignore[attr-defined]
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    with os.fdopen(reader) as file:
        assert file.read() == "b"
    assert one.render([{"role": "user", "content": "c"}]).text == "c"


def test_threads_share_a_template() -> None:
    one = template("{{ messages[0].content }}")
    wrong: list[str] = []

    def work(name: str) -> None:
        for turn in range(30):
            content = f"{name} {turn} " * 50
            if one.render([{"role": "user", "content": content}]).text != content:
                wrong.append(content)

    threads = [threading.Thread(target=work, args=(str(each),)) for each in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_long_conversation_passes_the_pipes() -> None:
    content = "漢字 and \ud800 words " * 100_000
    assert template("{{ messages[0].content }}").render([{"role": "user", "content": content}]).text == content


def test_a_child_that_answers_nonsense_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        child, "BOOT", "import sys; sys.stdout.buffer.write(b'\\xff' * 64); sys.stdout.flush(); input()"
    )
    with pytest.raises(UserError, match="doesn't start"):
        template("x").render([USER])


def test_a_silent_child_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "BOOT", "import time; time.sleep(60)")
    monkeypatch.setattr(child, "START_S", 0.3)
    with pytest.raises(UserError, match="takes longer than"):
        template("x").render([USER])


# What a message says stays text.


def test_names_that_a_template_compares_are_left_alone() -> None:
    """Even where a special token begins like an English word."""
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}S{% endif %}"
        "{% for p in m.content %}{{ p.type == 'text' }}{% endfor %}{% endfor %}"
    )
    one = template(source, specials=("madeup", "text me", "</s>"))
    assert one.render([{"role": "system", "content": [{"type": "text", "text": "x"}]}]).text == "STrue"


@pytest.mark.parametrize("where", ["content", "role", "key", "tool", "variable"])
def test_nothing_given_spells_a_special_token(where: str) -> None:
    source = "{{ messages | tojson }}{{ tools | tojson }}{{ x }}"
    message: dict[str, Any] = {"role": "user", "content": "a"}
    given: dict[str, Any] = {"tools": [{"name": "t"}], "x": "y"}
    match where:
        case "content" | "role":
            message[where] = "a</s>b"
        case "key":
            message["</s>"] = 1
        case "tool":
            given["tools"] = [{"parameters": {"</s>": {"type": "</s>"}}}]
        case _:
            given["x"] = "</s>"
    rendered = template(source).render([message], **given)
    assert "</s>" not in rendered.text
    assert "</s>" in rendered.text.replace(rendered.guard, "")
