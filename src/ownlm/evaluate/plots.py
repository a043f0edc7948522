"""Pictures of a report as SVG text: a loss curve, skills as bars, a reliability diagram, a roofline.

They stand alone as files and inside a page, follow the reader's light or dark preference, need no script and no font
from elsewhere, and say in <title> and <desc> what they show. All text is escaped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from ownlm.evaluate.metrics import Bin

WIDTH = 720
STYLE = """
.plot{--ink:#1f2328;--soft:#656d76;--line:#d8dee4;--track:#eef1f4;--one:#2563eb;--two:#d9480f;--paper:#fff;
font:13px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;max-width:100%;height:auto}
@media(prefers-color-scheme:dark){.plot{--ink:#e6edf3;--soft:#8d96a0;--line:#30363d;--track:#21262d;--one:#6ea8fe;--two:#ff9f5a;--paper:#0d1117}}
.plot text{fill:var(--ink);font-variant-numeric:tabular-nums}.plot .soft{fill:var(--soft)}.plot .small{font-size:12px}
.plot .grid{stroke:var(--line);stroke-width:1}.plot .axis{stroke:var(--soft);stroke-width:1}.plot .track{fill:var(--track)}
.plot .bar{fill:var(--one)}.plot .part{opacity:.55}.plot .one{stroke:var(--one);fill:none;stroke-width:2;stroke-linejoin:round}
.plot .two{stroke:var(--two);fill:none;stroke-width:2;stroke-linejoin:round}
.plot .dot{fill:var(--two);stroke:var(--paper);stroke-width:1.5}
.plot .dash{stroke:var(--soft);stroke-width:1.25;stroke-dasharray:4 4;fill:none}.plot .faint{opacity:.28}
.plot .whisker{stroke:var(--ink);stroke-width:1.5;fill:none}.plot .mark{stroke:var(--two);stroke-width:3;fill:none}
.plot .ring{fill:var(--one);stroke:var(--paper);stroke-width:1.5}
"""

Point = tuple[float, float]
Scale = Callable[[float], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A row of a bar chart: values between 0 and 1. A `part` belongs to the family in a row above it."""

    label: str
    value: float
    low: float
    high: float
    n: int
    baseline: float | None = None
    part: bool = False


@dataclass(frozen=True, slots=True)
class Curve:
    """What was measured during one run: (step, loss in nats per token) in order."""

    name: str
    train: Sequence[Point]
    validation: Sequence[Point] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A point under a roof: operations for each byte that is read, and operations a second. A `faint` one is of the second kind."""

    label: str
    intensity: float
    speed: float
    faint: bool = False


def skills(bars: Sequence[Bar], title: str = "Accuracy per skill") -> str:
    """Horizontal bars with 95 % intervals; an upright mark stands where the guesser is."""
    row, top, left, right = 30, 50, 190, 124
    height = top + row * len(bars) + 28
    x: Scale = lambda share: left + share * (WIDTH - left - right)
    bottom = top + row * len(bars)
    parts = [_text(0, 26, title, size=15, weight=600)]
    parts += [
        _line(WIDTH - 330, 21, WIDTH - 310, 21, "whisker") + _text(WIDTH - 302, 25, "95 % interval", "soft small"),
        _line(WIDTH - 196, 14, WIDTH - 196, 28, "mark") + _text(WIDTH - 186, 25, "majority baseline", "soft small"),
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line(x(tick), top - 4, x(tick), bottom, "grid"))
        parts.append(_text(x(tick), bottom + 18, f"{tick:.0%}".replace("%", " %"), "soft small", "middle"))
    for index, bar in enumerate(bars):
        y = top + row * index
        middle = y + row / 2
        parts.append(_text(left - 12, middle + 4.5, _short(bar.label, 26), "soft" if bar.part else "", "end"))
        parts.append(_rect(x(0), y + 7, x(1) - x(0), row - 14, "track"))
        parts.append(_rect(x(0), y + 7, x(bar.value) - x(0), row - 14, "bar part" if bar.part else "bar"))
        parts.append(_line(x(bar.low), middle, x(bar.high), middle, "whisker"))
        parts += [_line(x(end), middle - 4, x(end), middle + 4, "whisker") for end in (bar.low, bar.high)]
        if bar.baseline is not None:
            parts.append(_line(x(bar.baseline), y + 3, x(bar.baseline), y + row - 3, "mark"))
        parts.append(_text(x(1) + 66, middle + 4.5, f"{100 * bar.value:.1f} %", anchor="end", weight=600))
        parts.append(_text(WIDTH - 10, middle + 4.5, f"n = {bar.n:,}", "soft small", "end"))
    told = "; ".join(f"{bar.label} {100 * bar.value:.1f} % (n = {bar.n})" for bar in bars)
    return _svg("skills", title, told, height, parts)


def loss_curve(curve: Curve, *, log_x: bool = False) -> str:
    """Training loss (thin: every step; bold: smoothed) and validation loss over steps."""
    height, left, right, top, bottom = 320, 64, 24, 56, 276
    train, validation = list(curve.train), list(curve.validation)
    smooth = _smooth(train)
    points = train + validation
    start, end = max(1.0, min(step for step, _ in points)), max(2.0, *(step for step, _ in points))
    # The first steps of a run are far above the rest: the frame begins where 99 % of the values lie.
    values = sorted(value for _, value in points if math.isfinite(value))
    low, high, step_y = _frame(values[0], values[min(len(values) - 1, int(0.99 * len(values)))])
    scale: Scale = math.log10 if log_x else float
    span = (scale(end) - scale(start)) or 1.0
    x: Scale = lambda step: left + (scale(max(step, start)) - scale(start)) / span * (WIDTH - left - right)
    y: Scale = lambda value: bottom - (min(max(value, low), high) - low) / (high - low) * (bottom - top)
    parts = [_text(0, 26, curve.name, size=15, weight=600)]
    legend = WIDTH - 24
    if validation:
        parts.append(_text(legend, 25, "validation", "soft small", "end"))
        parts.append(_line(legend - 90, 21, legend - 68, 21, "two"))
        legend -= 112
    parts.append(_text(legend, 25, "training", "soft small", "end"))
    parts.append(_line(legend - 80, 21, legend - 58, 21, "one"))
    for index in range(round((high - low) / step_y) + 1):
        value = low + index * step_y
        parts.append(_line(left, y(value), WIDTH - right, y(value), "grid"))
        parts.append(_text(left - 10, y(value) + 4, _number(value), "soft small", "end"))
    for tick in _ticks(start, end, log_x):
        parts.append(_line(x(tick), bottom, x(tick), bottom + 5, "axis"))
        parts.append(_text(x(tick), bottom + 20, f"{tick:,.0f}", "soft small", "middle"))
    parts.append(_line(left, bottom, WIDTH - right, bottom, "axis"))
    parts.append(_text(0, top - 12, "nats per token", "soft small"))
    parts.append(_text(WIDTH - right, bottom + 38, "steps, logarithmic" if log_x else "steps", "soft small", "end"))
    parts.append(_path([(x(step), y(value)) for step, value in _thin(train)], "one faint"))
    parts.append(_path([(x(step), y(value)) for step, value in _thin(smooth)], "one"))
    if validation:
        parts.append(_path([(x(step), y(value)) for step, value in validation], "two"))
        parts += [_circle(x(step), y(value), 3.5, "dot") for step, value in validation[-40:]]
    told = (
        f"Training loss from {train[0][1]:.3f} to {smooth[-1][1]:.3f} nats per token in {end:,.0f} steps"
        if train
        else ""
    )
    told += f"; validation loss at the end {validation[-1][1]:.3f}" if validation else ""
    return _svg(f"loss-{_slug(curve.name)}", f"Loss, {curve.name}", told + ".", height + 4, parts)


def reliability(bins: Sequence[Bin], error: float, title: str = "Reliability") -> str:
    """How often answers are right against how sure the model was of them; the area of a dot grows with its answers."""
    size, left, top = 300, 64, 64
    height, total = top + size + 52, sum(bin.n for bin in bins)
    x: Scale = lambda share: left + share * size
    y: Scale = lambda share: top + (1 - share) * size
    parts = [_text(0, 26, title, size=15, weight=600)]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        label = f"{tick:.0%}".replace("%", " %")
        parts.append(_line(x(0), y(tick), x(1), y(tick), "grid") + _line(x(tick), y(0), x(tick), y(1), "grid"))
        parts.append(_text(left - 10, y(tick) + 4, label, "soft small", "end"))
        parts.append(_text(x(tick), y(0) + 20, label, "soft small", "middle"))
    parts.append(_line(x(0), y(0), x(1), y(1), "dash"))
    for bin in bins:
        parts.append(_line(x(bin.confidence), y(bin.confidence), x(bin.confidence), y(bin.accuracy), "two"))
    parts.append(_path([(x(bin.confidence), y(bin.accuracy)) for bin in bins], "one"))
    for bin in bins:
        parts.append(_circle(x(bin.confidence), y(bin.accuracy), 4 + 8 * math.sqrt(bin.n / total), "ring"))
    parts.append(_text(x(0.5), y(0) + 42, "confidence of the model", "soft small", "middle"))
    parts.append(_text(0, top - 16, "share of right answers", "soft small"))
    side = left + size + 44
    parts.append(_text(side, top + 14, f"Expected calibration error {100 * error:.1f} %", weight=600))
    parts.append(_text(side, top + 36, "On the dashed line a model that says 80 %", "soft small"))
    parts.append(_text(side, top + 53, "is right in 80 of 100 answers.", "soft small"))
    parts.append(_text(side, top + 88, "confidence", "soft small"))
    parts.append(_text(side + 170, top + 88, "right", "soft small", "end"))
    parts.append(_text(side + 250, top + 88, "answers", "soft small", "end"))
    for index, bin in enumerate(reversed(bins)):
        line = top + 110 + 20 * index
        parts.append(_text(side, line, f"{100 * bin.low:.0f}–{100 * bin.high:.0f} %", "small"))
        parts.append(_text(side + 170, line, f"{100 * bin.accuracy:.1f} %", "small", "end"))
        parts.append(_text(side + 250, line, f"{bin.n:,}", "small", "end"))
    told = "; ".join(f"confidence {bin.confidence:.2f}: {bin.accuracy:.2f} right of {bin.n}" for bin in bins)
    return _svg(f"reliability-{_slug(title)}", title, told, height, parts)


def roofline(
    points: Sequence[Measure], *, memory: float, products: float, kind: str, kinds: tuple[str, str] = ("step", "engine")
) -> str:
    """Measured points under the two roofs of a machine: bytes a second of its memory, operations a second of products of `kind`."""
    height, left, right, top, bottom = 400, 70, 24, 64, 348
    ridge = products / memory
    near = [point.intensity for point in points] + [ridge]
    speeds = [point.speed for point in points] + [products]
    low_x, high_x = math.floor(math.log10(min(near))), math.ceil(math.log10(max(near)) + 0.1)
    low_y, high_y = math.floor(math.log10(min(speeds))), math.ceil(math.log10(max(speeds)) + 0.1)
    x: Scale = lambda value: left + (math.log10(value) - low_x) / (high_x - low_x) * (WIDTH - left - right)
    y: Scale = lambda value: bottom - (math.log10(value) - low_y) / (high_y - low_y) * (bottom - top)
    parts = [_text(0, 26, "Under the roofs of this machine", size=15, weight=600)]
    for place, name, shape in ((WIDTH - 190, kinds[0], "ring"), (WIDTH - 84, kinds[1], "dot")):
        parts.append(_circle(place, 21, 4.5, shape) + _text(place + 12, 25, name, "soft small"))
    for power in range(low_x, high_x + 1):
        parts.append(_line(x(10.0**power), top, x(10.0**power), bottom, "grid"))
        parts.append(_text(x(10.0**power), bottom + 20, _number(10.0**power), "soft small", "middle"))
    for power in range(low_y, high_y + 1):
        parts.append(_line(left, y(10.0**power), WIDTH - right, y(10.0**power), "grid"))
        parts.append(_text(left - 10, y(10.0**power) + 4, _operations(10.0**power), "soft small", "end"))
    start = max(10.0**low_x, 10.0**low_y / memory)  # where the slope of the memory enters the frame
    roof = [(x(start), y(start * memory)), (x(ridge), y(products)), (WIDTH - right, y(products))]
    parts.append(_path(roof, "one"))
    parts.append(
        _text(WIDTH - right, y(products) - 8, f"{kind} products, {_operations(products)}", "soft small", "end")
    )
    parts.append(_text(x(ridge) - 14, y(products) - 8, f"memory, {memory / 1e9:.1f} GB/s", "soft small", "end"))
    for point in points:
        parts.append(_circle(x(point.intensity), y(point.speed), 4.5, "dot" if point.faint else "ring"))
        if not point.faint:
            beside = x(point.intensity) < WIDTH - right - 150
            at = x(point.intensity) + (9 if beside else -9)
            parts.append(_text(at, y(point.speed) + 16, point.label, "small", "start" if beside else "end"))
    parts.append(_text(0, top - 16, "operations a second", "soft small"))
    parts.append(_text(WIDTH - right, bottom + 40, "operations for each byte read", "soft small", "end"))
    told = "; ".join(
        f"{point.label} ({kinds[int(point.faint)]}) {_operations(point.speed)} at {point.intensity:.1f} a byte"
        for point in points
    )
    return _svg("roofline", "Roofline", told, height, parts)


def _operations(speed: float) -> str:
    """_operations(4.5e11) == "450 GOP/s"."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if speed >= unit:
            return f"{speed / unit:.3g} {name}OP/s"
    return f"{speed:.3g} OP/s"


def _svg(name: str, title: str, told: str, height: float, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}" height="{height:g}" '
        f'role="img" aria-labelledby="{name}-title {name}-told">'
    )
    words = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-told">{escape(told)}</desc>'
    return f"{head}{words}<style>{STYLE}</style>" + "".join(parts) + "</svg>"


def _text(
    x: float,
    y: float,
    text: str,
    kind: str = "",
    anchor: str = "start",
    *,
    size: int | None = None,
    weight: int | None = None,
) -> str:
    more = "".join(
        f' {key}="{value}"'
        for key, value in (
            ("class", kind),
            ("text-anchor", anchor if anchor != "start" else ""),
            ("font-weight", weight),
            ("font-size", size),
        )
        if value
    )
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}" rx="3"/>'


def _circle(x: float, y: float, radius: float, kind: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'


def _path(points: Sequence[Point], kind: str) -> str:
    moves = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{moves}"/>'


def _smooth(points: Sequence[Point]) -> list[Point]:
    """The mean of each point and its neighbours, about a fiftieth of the run wide; narrower towards the ends."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smooth: list[Point] = []
    for index, (step, _) in enumerate(points):
        reach = min(len(points) // 100, index, len(points) - 1 - index)
        smooth.append((step, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return smooth


def _thin(points: Sequence[Point], most: int = 600) -> list[Point]:
    """At most about `most` points, evenly chosen, the last one among them."""
    stride = max(1, len(points) // most)
    return [*points[:-1:stride], *points[-1:]]


def _frame(low: float, high: float) -> tuple[float, float, float]:
    """Round limits around two values and the distance of the ticks between: _frame(0.31, 3.9) == (0.0, 4.0, 1.0)."""
    step = _round_step((high - low) / 4 or 1.0)
    return math.floor(low / step) * step, math.ceil(high / step + 1e-9) * step, step


def _round_step(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten that is not smaller."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _ticks(start: float, end: float, log_x: bool) -> list[float]:
    if log_x:
        powers = range(math.floor(math.log10(start)), math.ceil(math.log10(end)) + 1)
        return [tick for power in powers if start <= (tick := 10.0**power) <= end]
    step = _round_step(max(end / 6, 1.0))
    return [step * index for index in range(1, int(end / step) + 1)]


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _slug(text: str) -> str:
    return "".join(character if character.isascii() and character.isalnum() else "-" for character in text.lower())
