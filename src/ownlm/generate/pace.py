"""How much of a prompt a step may read beside those who write."""


class Pace:
    """How long steps take here, from those seen: so that a prompt is let in without holding up those who write."""

    UNKNOWN = 16.0  # prompt tokens a step
    SLOWER = 0.7  # how much longer a step of writing may take for a prompt's sake
    LOOK = 16  # after so many steps one reads nothing: what writing takes grows with the texts

    def __init__(self) -> None:
        self.step_seconds = self.token_seconds = 0.0
        self.mixed = 0

    def saw(self, writing: int, reading: float, seconds: float) -> None:
        """After a step of `writing` rows and `reading` prompt tokens; of a token that went through some layers, its share."""
        if not reading:
            # What is blamed on writing is never blamed on the prompt: the newest figure counts most.
            self.step_seconds, self.mixed = _blend(self.step_seconds, seconds, 0.5), 0
        else:
            self.mixed += 1
            rest = seconds - (self.step_seconds if writing else 0.0)
            least = seconds / (writing + reading) / 4
            self.token_seconds = _blend(self.token_seconds, max(rest / reading, least), 0.2)

    def prompt_tokens(self) -> float:
        """How many a step may read beside those who write."""
        if not self.step_seconds or not self.token_seconds:
            return self.UNKNOWN
        if self.mixed >= self.LOOK:
            return 0.0
        return self.SLOWER * self.step_seconds / self.token_seconds


def _blend(before: float, new: float, weight: float) -> float:
    return new if not before else (1 - weight) * before + weight * new
