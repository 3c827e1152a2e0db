"""What a person sees while a run goes on."""

import io
import re
import time

import pytest

from dailies.jobs import progress
from dailies.jobs.progress import Display, Rate, duration_text, printable, rate_text
from dailies.pipeline.scheduler.progress import Progress, StageProgress


def stage(name, done, **changes):
    return StageProgress(**(dict(name=name, replicas=1, starting=0, queued=3, in_flight=2, done=done,
                                 seconds=0.1) | changes))


def told(done, failed=0, notes=()):
    return Progress(stages=(stage("encode", done + 5), stage("sample", done, replicas=0, starting=1)), done=done,
                    failed=failed, notes=notes)


def test_text_from_elsewhere_cannot_command_a_terminal():
    assert printable("a\x1b[2J\r\n\t\x9b\u202eb é 日本 🦊") == r"a\x1b[2J\r\n\t\x9b\u202eb é 日本 🦊"


@pytest.mark.parametrize("seconds, text", [(0.2, "0 s"), (99, "99 s"), (120, "2 min"), (5999, "1 h 40 min"),
                                           (3 * 3600, "3 h 0 min"), (50 * 3600, "2 d 2 h")])
def test_durations_are_short(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize("per_s, text", [(None, "-"), (2.5, "2.5/s"), (0.5, "30/min"), (0.001, "3.6/h")])
def test_rates_have_a_unit_that_fits(per_s, text):
    assert rate_text(per_s) == text


def test_a_rate_is_that_of_the_last_minutes_and_falls_when_nothing_happens():
    rate = Rate()
    rate.add(0.0, 0)
    assert rate.per_s(50.0) is None
    for second in range(100, 1100):                     # the first clip after 100 s: models were loading
        rate.add(float(second), second - 99)
    assert rate.per_s(1099.0) == pytest.approx(1.0)
    for second in range(1100, 1700, 2):
        rate.add(float(second), 1000 + (second - 1100) // 2)
    assert rate.per_s(1698.0) == pytest.approx(0.5, rel=0.02)
    assert rate.per_s(3000.0) < 0.1 and len(rate.samples) < 310


def test_few_slow_clips_still_have_a_rate():
    rate = Rate()
    for count in range(6):
        rate.add(600.0 * count, count)
    assert rate.per_s(3000.0) == pytest.approx(1 / 600)


def test_elsewhere_than_on_a_terminal_it_is_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.02)
    out = io.StringIO()
    with Display(total=1000, view=Display.view_for(out), stream=out) as display:
        display.update(told(12, failed=1, notes=("sample-1 died\x1b[31m",)))
        time.sleep(0.2)
    lines = out.getvalue().splitlines()
    assert lines[0] == r"sample-1 died\x1b[31m" and len(lines) > 2
    assert "13/1,000 clips, 1 failed" in lines[-1] and "encode 17 done, 2 in flight  sample starting" in lines[-1]


def test_on_a_terminal_it_is_a_table_that_ends_with_the_last_state(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")
    with Display(total=20, view=Display.view_for(out), stream=out) as display:
        display.update(told(3))
        display.note("[bold]as it is\x1b[2J")
        display.update(told(19, failed=1))
    text = out.getvalue()
    assert "[bold]as it is\\x1b[2J" in text and "20/20 clips, 1 failed" in text and "finishing" in text
    assert text.rindex("24") > text.rindex("20/20") and "0+1" in text


@pytest.mark.parametrize("term", ["dumb", "", None])
def test_a_terminal_that_draws_nothing_anew_gets_lines(term, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setenv("TERM", term) if term is not None else monkeypatch.delenv("TERM", raising=False)
    assert Display.view_for(out) == "lines"
    monkeypatch.setenv("TERM", "xterm-256color")
    assert Display.view_for(out) == "live"


@pytest.mark.parametrize("width", [120, 80, 60])
def test_a_table_fits_its_terminal_and_shortens_no_number(width, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    stages = stage("encode", 123_456, queued=12_345), stage("publish", 98_765, replicas=128, starting=16)
    large = Progress(stages=stages, done=98_765, failed=1_234, notes=())
    with Display(total=100_000, view="live", stream=out) as display:
        display.update(large)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).replace("\r", "\n")
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert all(number in text for number in ("123,456", "12,345", "128+16", "98,765"))


@pytest.mark.parametrize("width", [80, 60])
def test_what_a_person_reads_is_broken_between_words_on_a_terminal_only(width, monkeypatch, capsys):
    sentence = "wan2.1-t2v-14b              weights missing  Wan 2.1, 14 billion parameters, text to video at 832x480"
    progress.say(sentence, indent=45)
    assert capsys.readouterr().out == sentence + "\n"
    monkeypatch.setattr(progress, "columns", lambda: width)
    progress.say(sentence, indent=45)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= width
    assert " ".join(lines).split() == sentence.split()


def test_what_is_said_on_standard_error_fits_that_terminal_whatever_standard_output_is(monkeypatch, capsys):
    stream = io.StringIO()
    monkeypatch.setenv("COLUMNS", "30")
    progress.say("one sentence that is longer than this terminal is wide", stream=stream)
    assert stream.getvalue().count("\n") == 1          # a file
    monkeypatch.setattr(stream, "isatty", lambda: True)
    stream.truncate(stream.seek(0))
    progress.say("one sentence that is longer than this terminal is wide", stream=stream)
    assert stream.getvalue().splitlines() == ["one sentence that is longer", "than this terminal is wide"]
    assert capsys.readouterr().out == ""
