import io
import json

from ownlm.report import Reporter, duration, quantity, size


def test_people_see_sentences_and_programs_see_json():
    people, programs = io.StringIO(), io.StringIO()
    for audience, out in (("people", people), ("programs", programs)):
        reporter = Reporter(audience, out)
        reporter.line("Reading documents.")
        reporter.event("step", step=1, loss=2.5)
        reporter.table(["name", "n"], [["a", 1]])
    assert people.getvalue().startswith("Reading documents.\n")
    assert "a" in people.getvalue()
    assert json.loads(programs.getvalue()) == {"event": "step", "step": 1, "loss": 2.5}


def test_status_is_rewritten_on_a_terminal_and_rare_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal, file = Terminal(), io.StringIO()
    for out in (terminal, file):
        reporter = Reporter("people", out)
        for step in range(3):
            reporter.status(f"step {step}")
        reporter.line("done")
    assert terminal.getvalue().count("\r\x1b[2K") == 4
    assert file.getvalue() == "step 0\ndone\n"


def test_silence(capsys):
    reporter = Reporter.silent()
    reporter.line("x")
    reporter.status("x")
    reporter.event("x")
    reporter.table(["x"], [["x"]])
    assert capsys.readouterr().out == ""


def test_units_for_people():
    assert [duration(s) for s in (5, 75, 120, 4000)] == ["5 s", "1 min 15 s", "2 min", "1 h 6 min"]
    assert [size(n) for n in (12, 1_500_000, 730_000_000)] == ["12 B", "1.5 MB", "730 MB"]
    assert [quantity(n) for n in (12, 650_000, 1_100_000_000)] == ["12", "650 k", "1.1 B"]
