"""Progress: the time left goes by recent steps, lines come at their interval, a terminal gets a bar."""

import io
import re
import sys

import pytest

from mad import progress
from mad.progress import Steps, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def strftime(self, _: str) -> str:
        return "12:00:00"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_the_time_left_forgets_slow_first_steps(clock: Clock) -> None:
    steps = Steps("a", total=1000)
    for seconds in [60] + 300 * [0.5]:
        clock.now += seconds
        steps.advance(str)
    assert steps.left_s() == pytest.approx(699 * 0.5)


def test_what_happens_between_steps_counts(clock: Clock) -> None:
    """A health check of 10 s after every 20th step of 1 s: 1.5 s per step."""
    steps = Steps("a", total=1000)
    for step in range(400):
        clock.now += 1 + (10 if step % 20 == 0 else 0)
        steps.advance(str)
    assert steps.left_s() == pytest.approx(600 * 1.5)


def test_a_log_gets_a_line_at_the_interval_and_when_forced(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    steps, asked = Steps("run", total=40, done=10, every_s=10), []
    for step in range(30):
        clock.now += 1
        steps.advance(lambda: asked.append(1) or "loss 4.000", force=step == 29)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "12:00:00 run: step 20/40 loss 4.000, 20 s left",
        "12:00:00 run: step 30/40 loss 4.000, 10 s left",
        "12:00:00 run: step 40/40 loss 4.000, 0 s left",
    ]
    assert len(asked) == 3, "facts cost something: only what is shown is asked for"


def test_a_terminal_gets_a_bar_and_messages_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    steps = Steps("run", total=4)
    steps.advance(lambda: "loss 4.000")
    progress.log("something else")
    steps.advance(lambda: "loss 3.000", force=True)
    steps.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "2/4" in shown and "something else" in shown and "loss 3.000, " in shown
    assert re.search(r"run: step 2/4 loss 3.000, \d+ s left", shown)
    assert sys.stderr is terminal, "what the bar took is given back"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5999, "100 min"),
        (6000, "1.7 h"),
        (172_799, "48.0 h"),
        (300_000, "3.5 days"),
    ],
)
def test_durations_are_in_a_person_s_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
