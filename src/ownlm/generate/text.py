"""Stop strings in an answer that arrives piece by piece: nothing is shown that one may yet take back."""

from collections.abc import Sequence


class StopText:
    """Finds stop strings in text that arrives piece by piece. Mutable: one per answer.

    StopText(("END",)): push("the E") == "the "; push("N") == ""; push("Joy") == "ENJoy".
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.stopped = False
        self.held = ""

    def push(self, piece: str) -> str:
        """The text that is now safe to show. After `stopped` turns true, nothing more is."""
        if not self.stop:
            return piece
        text = self.held + piece
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = max(overlap(text, stop) for stop in self.stop)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when the answer ends for another reason."""
        held, self.held = self.held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`: overlap("an EN", "END") == 2."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
