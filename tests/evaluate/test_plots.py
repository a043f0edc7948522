"""Pictures are well-formed, say what they show, hide nothing outside their frame and escape what they are given."""

import math
import xml.etree.ElementTree as xml

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ownlm.evaluate.metrics import reliability as bins_of
from ownlm.evaluate.plots import Bar, Curve, loss_curve, reliability, skills

SVG = "{http://www.w3.org/2000/svg}"
SHARE = st.floats(0, 1)


def parse(svg: str) -> xml.Element:
    root = xml.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    title, told = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None
    assert told is not None
    assert root.get("aria-labelledby") == f"{title.get('id')} {told.get('id')}"
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    width, height = map(float, (root.get("viewBox") or "").split()[2:])
    for element in root.iter():
        for key in ("x", "x1", "x2", "cx"):
            assert -0.1 <= float(element.get(key, 0)) <= width + 0.1
        for key in ("y", "y1", "y2", "cy"):
            assert -0.1 <= float(element.get(key, 0)) <= height + 0.1
    return root


@settings(max_examples=25)
@given(st.lists(st.tuples(st.text(max_size=40), SHARE, SHARE, SHARE), min_size=1, max_size=5))
def test_skills(rows) -> None:
    allowed = [("".join(c for c in label if c.isprintable()), *sorted(shares)) for label, *shares in rows]
    bars = [Bar(label=label, value=value, low=low, high=high, n=9) for label, low, value, high in allowed]
    parse(skills(bars))


def test_text_is_escaped_and_told() -> None:
    root = parse(skills([Bar(label="<b>&\"'", value=0.5, low=0.4, high=0.6, n=1234, baseline=0.45)], title="a < b"))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "<b>&\"'" in texts
    assert "n = 1,234" in texts
    assert "50.0 %" in texts
    assert "50.0 % (n = 1234)" in (root.find(f"{SVG}desc").text or "")
    assert len([line for line in root.iter(f"{SVG}line") if line.get("class") == "mark"]) == 2  # legend and bar


@pytest.mark.parametrize("log_x", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 50, 5000])
def test_loss_curve(log_x: bool, steps: int) -> None:
    train = [(step, 7 / math.sqrt(step)) for step in range(1, steps + 1)]
    root = parse(loss_curve(Curve("x@1", train, train[::10]), log_x=log_x))
    lines = [line for line in root.iter(f"{SVG}polyline") if line.get("class") == "one"]
    points = [tuple(map(float, point.split(","))) for point in lines[0].get("points", "").split()]
    assert len(points) <= 1202
    assert points == sorted(points)
    assert [y for _, y in points] == sorted(y for _, y in points)  # falling loss: y grows downwards
    assert all(0 <= y <= 280 for _, y in points)
    parse(loss_curve(Curve("x@1", train)))


def test_reliability() -> None:
    confidence = [index / 200 for index in range(200)] + [1.0]
    bins = bins_of(confidence, [index % 3 == 0 for index in range(201)])
    root = parse(reliability(bins, 0.123))
    assert len(list(root.iter(f"{SVG}circle"))) == 10
    assert "12.3 %" in "".join(element.text or "" for element in root.iter(f"{SVG}text"))
