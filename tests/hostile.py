"""Two hundred forms that somebody who means harm, or slipped, might send: each must be built or refused, and nothing else."""

import json
import random

from ownlm.generate.grammar import Kind


def forms() -> list[tuple[Kind, str]]:
    """(kind, source), always the same two hundred."""
    rng = random.Random(0)
    found: list[tuple[Kind, str]] = []
    found += [("regex", f"{'(' * n}a{')' * n}") for n in (1, 40, 60, 1_000, 60_000)]
    found += [("regex", f"{'(' * n}a{'{0,9}' if n < 30 else '*'}".replace("a", "a" + ")*" * n)) for n in (2, 5, 12, 40)]
    found += [("regex", f"(a?){{{n}}}a{{{n}}}") for n in (10, 500, 9_999, 10_001, 10**12)]
    found += [("regex", "(" * depth + "x" + "{1,99})" * depth) for depth in (2, 3, 5, 9, 20)]
    found += [
        ("regex", source)
        for source in ("", "(", "[", "\\", "a{", "*", "(?=a)b", "\\1", "(?<x>a)\\k<x>", "[z-a]", "\ud800", "\x00")
    ]
    found += [("regex", f"({'|'.join(str(i) * 5 for i in range(n))})*") for n in (10, 300, 3_000)]
    found += [("regex", f"(.*{letter}){{{n}}}.*") for letter in "ab" for n in (3, 20, 300, 5_000)]
    found += [("regex", "[" + "".join(chr(rng.randrange(33, 0x2FFF)) for _ in range(n)) + "]+") for n in (5, 50, 5_000)]
    found += [("regex", "\\p{L}{1,5000}"), ("regex", "(\\w+\\s?)*$"), ("regex", ".{9999}" * 5), ("regex", "x" * 65_536)]
    schema: object = {"type": "string"}
    for _ in range(15):
        schema = {"type": "array", "items": schema}
    deep = '{"items":' * 3_000 + "{}" + "}" * 3_000
    found += [("json_schema", json.dumps(schema)), ("json_schema", deep), ("json_schema", "[" * 60_000)]
    found += [
        ("json_schema", json.dumps({"type": "array", "items": {}, "minItems": n, "maxItems": n}))
        for n in (0, 50, 9_999, 10**9)
    ]
    found += [("json_schema", json.dumps({"type": "string", "maxLength": n})) for n in (0, 5_000, 10**8)]
    found += [
        ("json_schema", json.dumps({"type": "string", "pattern": source}))
        for source in ("(a*)*b", "((((", "(a{1,99}){1,99}", "^$")
    ]
    found += [
        ("json_schema", json.dumps({"enum": [rng.randbytes(4).hex() for _ in range(n)]})) for n in (1, 100, 4_000)
    ]
    found += [
        (
            "json_schema",
            json.dumps(
                {
                    "properties": {f"p{i}": {"type": "integer"} for i in range(n)},
                    "required": [f"p{i}" for i in range(n)],
                }
            ),
        )
        for n in (1, 200, 1_000)
    ]
    found += [
        ("json_schema", json.dumps({"oneOf": [{"properties": {f"p{i}": {"const": i}}} for i in range(n)]}))
        for n in (2, 30, 300)
    ]
    loop = {
        "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    }
    found += [
        ("json_schema", json.dumps(each))
        for each in (
            loop, {"$ref": "#"}, {"$ref": "https://example.com/x.json"}, {"$ref": "../../etc/passwd"}, {"type": "nothing"},
            {"not": {}}, {"allOf": [{"type": "string"}, {"type": "integer"}]}, {"multipleOf": 1e-300, "type": "number"},
            {"type": "integer", "minimum": -(10**30), "maximum": 10**30}, {"type": "integer", "minimum": 5, "maximum": 1},
            {"x-guidance": {"whitespace_pattern": "(a*)*"}}, {"type": ["string", "null"]}, {"format": "nonsense", "type": "string"},
            {"patternProperties": {"(": {}}}, {"if": {}, "then": {}}, {"dependentSchemas": {}}, {"unevaluatedItems": False},
        )
    ]  # fmt: skip
    found += [("json_schema", source) for source in ("", "null", "1", '"x"', "{", "[]", "true", '{"a":', "\x00")]
    found += [
        ("grammar", source)
        for source in (
            "", "start: start", "start: start start", "start: start | ", "start: a\na: b\nb: a", "start: undefined", "s: 'x'",
            "start: /((((/", "start: /(a?){9000}a{9000}/", 'start: "a"*', "start: a* b*\na: b*\nb: a*", 'start: "x"~1000000',
            'start: a a a a a\na: b b b b b\nb: c c c c c\nc: "x"?', "%import common.NUMBER\nstart: NUMBER", "%ignore /(/\nstart: \"a\"",
            "start: %json { }", 'start: %json {"type": "array", "items": {"$ref": "#"}}', "start: <|endoftext|>",
            "start[max_tokens=0]: /.*/",
            "start: /.*/ /.*/ /.*/ /.*/",
            "start: ((((((((((a))))))))))\na: \"x\"", 'start: "\ud800"',
        )
    ]  # fmt: skip
    found += [
        (
            "grammar",
            f"start: {' '.join(f'r{i}' for i in range(n))}\n"
            + "\n".join(f'r{i}: "a" | "b" r{(i + 1) % n}?' for i in range(n)),
        )
        for n in (2, 100, 1_500)
    ]
    while len(found) < 200:  # noise of each kind
        kind: Kind = rng.choice(("json_schema", "regex", "grammar"))
        alphabet = {"json_schema": '{}[]":,0a$', "regex": "(|)*+?{9,}[^]\\a.", "grammar": 'start: a"/|()*~9\n'}[kind]
        found.append((kind, "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 200)))))
    assert len(found) == 200, len(found)
    return found
