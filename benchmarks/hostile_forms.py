"""How long two hundred hostile schemas, regular expressions and grammars take: each is built or refused within a second.

    python benchmarks/hostile_forms.py

The forms are those of tests/hostile.py. Prints how many were refused and the slowest; exits with 1 beyond the second.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hostile import forms
from ownlm.errors import UserError
from ownlm.generate.grammar import Form, Grammars
from tiny import tiny_tokenizer

LIMIT_S = 1.0


def main() -> None:
    tokenizer = tiny_tokenizer()
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    grammars.matcher(Form("regex", "a"))  # the vocabulary is read once
    times: list[tuple[float, str]] = []
    refused = 0
    for kind, source in forms():
        began = time.perf_counter()
        try:
            grammars.matcher(Form(kind, source)).allowed()
        except UserError:
            refused += 1
        times.append((time.perf_counter() - began, f"{kind} {source[:60]!r}"))
    times.sort(reverse=True)
    print(f"{len(times)} forms, {refused} refused, none ended the process; the slowest:")
    for seconds, form in times[:5]:
        print(f"  {seconds:6.3f} s  {form}")
    sys.exit(times[0][0] > LIMIT_S)


if __name__ == "__main__":
    main()
