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


class Portions:
    """The same where a prompt is a call of its own beside the writers' (PyTorch): a call has a price however few tokens it reads, so
    portions double as long as one takes no more than a step of writing bears, or than twice what the cheapest takes."""

    LEAST = 16  # prompt tokens
    FORGET = 0.99  # after each step, of what too large a portion took: it is tried again

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self.seconds: dict[int, float] = {}  # by portion: LEAST, twice that, and so on

    def saw(self, writing: int, reading: float, seconds: float) -> None:
        """As `Pace.saw` has it. Without writers there may be nothing that waits for a device to be done, and so no time to see."""
        if not reading:
            self.step_seconds = _blend(self.step_seconds, seconds, 0.5)
            return
        portion = self._portion(reading)
        if writing and portion is not None:
            self.seconds[portion] = _blend(self.seconds.get(portion, 0.0), max(seconds - self.step_seconds, 0.0), 0.5)

    def prompt_tokens(self) -> float:
        """How many a step may read beside those who write."""
        portion, bearable = (
            self.LEAST,
            max(Pace.SLOWER * self.step_seconds, 2 * min(self.seconds.values(), default=0.0)),
        )
        while (seconds := self.seconds.get(portion)) is not None:
            if seconds > bearable:
                self.seconds[portion] = seconds * self.FORGET
                return float(max(self.LEAST, portion // 2))
            portion *= 2
        return float(portion)

    def _portion(self, reading: float) -> int | None:
        """The portion that so many tokens come near to, if any."""
        portion = self.LEAST
        while 2 * portion <= reading:
            portion *= 2
        return portion if portion <= reading <= 1.25 * portion else None


def _blend(before: float, new: float, weight: float) -> float:
    return new if not before else (1 - weight) * before + weight * new
