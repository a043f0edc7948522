"""Stop strings in text that arrives in pieces."""

from hypothesis import given
from hypothesis import strategies as st

from ownlm.generate.text import StopText, overlap


def test_holds_back_only_what_may_become_a_stop_string() -> None:
    stop = StopText(["END", "\n\n"])
    assert stop.push("the E") == "the "
    assert stop.push("N") == ""
    assert stop.push("Joy\n") == "ENJoy"
    assert stop.flush() == "\n"
    assert stop.push("a\n") == "a"
    assert stop.push("\nb") == ""
    assert stop.stopped


def test_overlap() -> None:
    assert overlap("an EN", "END") == 2
    assert overlap("aaa", "aab") == 2
    assert overlap("END", "END") == 0
    assert overlap("", "END") == 0


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=20),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_shows_the_text_up_to_the_first_stop_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    stop, shown = StopText(stops), ""
    for piece in pieces:
        shown += stop.push(piece)
        if stop.stopped:
            break
    else:
        shown += stop.flush()
    text = "".join(pieces)
    ends = [text.find(one) + len(one) for one in stops if one in text]
    if not ends:
        assert shown == text
        assert not stop.stopped
        return
    assert stop.stopped
    # Found as soon as it is complete: no stop string is ever shown, and nothing but text before one is.
    assert text.startswith(shown)
    assert not any(one in shown for one in stops)
    assert any(text[len(shown) :].startswith(one) for one in stops)
