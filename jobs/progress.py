"""What a person sees while a run goes on: a live table on a terminal, one line every ten seconds elsewhere."""

import os
import shutil
import sys
import textwrap
import threading
import time
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO

from dailies.model.errors import printable

if TYPE_CHECKING:
    from dailies.pipeline.scheduler.progress import Progress, StageProgress

LINE_EVERY_S = 10.0
RATE_OVER_S = 300.0                     # a rate is what was done in the last minutes, not since the start
RATE_OVER_COUNT = 20
SAMPLE_EVERY_S = 1.0

BAR = 30                                # columns, where there are so many

View = Literal["live", "lines"]


def columns(stream: TextIO | None = None) -> int | None:
    """Of the terminal that a stream is, or standard output; None for a file or a pipe, which has lines of any
    length."""
    stream = stream or sys.stdout
    return shutil.get_terminal_size().columns if stream is not None and stream.isatty() else None


def say(text: str, *, indent: int = 0, stream: TextIO | None = None) -> None:
    """Print a sentence, on a terminal broken between words; what follows its first line is indented so far. All that
    commands print of others' making comes through here, and nothing in it reaches the terminal as it is.

    stream: None is standard output.
    """
    text = printable(text)
    width = columns(stream) if stream else columns()
    if width is None or len(text) <= width:
        print(text, file=stream, flush=stream is not None)
        return
    if indent > width // 2:                             # a narrow terminal: the second column goes below the first
        first, text = text[:indent].rstrip(), text[indent:]
        print(first, file=stream)
        print(textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    ", break_long_words=False),
              file=stream, flush=stream is not None)
        return
    print(textwrap.fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False,
                        replace_whitespace=False, drop_whitespace=True), file=stream, flush=stream is not None)


def duration_text(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min, 2 d 4 h"""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def rate_text(per_s: float | None) -> str:
    """Per second, minute or hour, whichever gives a number that can be read."""
    if per_s is None:
        return "-"
    for unit, seconds in (("s", 1), ("min", 60)):
        if per_s * seconds >= 1:
            return f"{per_s * seconds:.3g}/{unit}"
    return f"{per_s * 3600:.3g}/h"


class Rate:
    """How fast a count grows: over the last RATE_OVER_S, or longer where that saw less than RATE_OVER_COUNT."""

    def __init__(self):
        self.samples: deque[tuple[float, int]] = deque()

    def add(self, now: float, count: int) -> None:
        if self.samples and (count <= self.samples[-1][1] or now - self.samples[-1][0] < SAMPLE_EVERY_S):
            return
        self.samples.append((now, count))
        if self.samples[0][1] == 0 and len(self.samples) > 2:
            self.samples.popleft()                      # machines start and models load before the first
        while len(self.samples) > 2 and now - self.samples[0][0] > RATE_OVER_S \
                and count - self.samples[1][1] >= RATE_OVER_COUNT:
            self.samples.popleft()

    def per_s(self, now: float) -> float | None:
        """None until something was done."""
        if len(self.samples) < 2:
            return None
        return (self.samples[-1][1] - self.samples[0][1]) / max(now - self.samples[0][0], 1e-3)


class Display:
    """Shown from a thread of its own, so that a driver which waits for the cluster does not look dead."""

    def __init__(self, *, total: int, view: View, stream: TextIO | None = None):
        """total: clips to make when the run starts."""
        self.total, self.view, self.stream = total, view, stream or sys.stderr
        self.done = self.failed = 0
        self.stages: tuple[StageProgress, ...] = ()
        self.rates: dict[str, Rate] = defaultdict(Rate)     # by stage
        self.made, self.ended = Rate(), Rate()          # clips; and those that failed too, which are left no more
        for rate in (self.made, self.ended):
            rate.add(time.monotonic(), 0)
        self.lock, self.over = threading.Lock(), threading.Event()
        self.began = time.monotonic()
        self.live: Any = None                           # rich's Live

    @classmethod
    def view_for(cls, stream: TextIO | None = None) -> View:
        """A table that is drawn anew where a terminal can do that; also with --json, which is about standard output."""
        stream = stream or sys.stderr
        can_redraw = os.environ.get("TERM", "") not in ("dumb", "unknown", "")
        return "live" if stream is not None and stream.isatty() and can_redraw else "lines"

    def __enter__(self) -> Self:
        if self.view == "live":
            from rich.console import Console
            from rich.live import Live
            # what other libraries print goes above the table, not through it
            self.live = Live(get_renderable=self.table, console=Console(file=self.stream), refresh_per_second=4)
            self.live.start()
        elif self.view == "lines":
            threading.Thread(target=self.print_lines, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.live:
            self.live.stop()

    def update(self, progress: "Progress") -> None:
        now = time.monotonic()
        with self.lock:
            self.done, self.failed, self.stages = progress.done, progress.failed, progress.stages
            self.made.add(now, progress.done)
            self.ended.add(now, progress.done + progress.failed)
            for stage in progress.stages:
                self.rates[stage.name].add(now, stage.done)
        for note in progress.notes:
            self.note(note)

    def note(self, text: str) -> None:
        """Something the person should know, printed at once and kept."""
        if self.live:
            self.live.console.print(printable(text), markup=False, highlight=False)
        else:
            print(printable(text), file=self.stream, flush=True)

    def headline(self) -> str:
        now = time.monotonic()
        ended, per_s = self.done + self.failed, self.ended.per_s(now)
        failed = f", {self.failed:,} failed" if self.failed else ""
        if ended >= self.total:
            left = "finishing"
        elif per_s is None:
            left = f"for {duration_text(now - self.began)}"
        else:
            eta_s = (self.total - ended) / per_s
            left = f"ETA {duration_text(eta_s)} ({time.strftime('%H:%M', time.localtime(time.time() + eta_s))})"
        return f"{ended:,}/{self.total:,} clips{failed}  {rate_text(self.made.per_s(now))}  {left}"

    def line(self) -> str:
        with self.lock:
            stages = "  ".join(f"{stage.name} starting" if stage.starting and not stage.replicas else
                               f"{stage.name} {stage.done:,} done, {stage.in_flight:,} in flight"
                               for stage in self.stages)
            return f"{time.strftime('%H:%M:%S')}  {self.headline()}" + (f"  | {stages}" if stages else "")

    def print_lines(self) -> None:
        while not self.over.wait(LINE_EVERY_S):
            print(self.line(), file=self.stream, flush=True)

    def table(self):
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        bar = min(BAR, self.live.console.width - 62) if self.live else BAR     # what the other columns leave
        with self.lock:
            table = Table(box=None, pad_edge=False, title=self.headline(), title_justify="left", title_style="bold")
            for name in ("stage", "copies", "queued", "in flight", "done", "rate"):
                table.add_column(name, justify="left" if name == "stage" else "right", header_style="dim", no_wrap=True)
            if bar > 4:
                table.add_column("", width=bar)
            for stage in self.stages:
                starting = f"+{stage.starting}" if stage.starting else ""
                rate = rate_text(self.rates[stage.name].per_s(time.monotonic())) if stage.replicas else "-"
                row = [stage.name, f"{stage.replicas}{starting}", f"{stage.queued:,}", f"{stage.in_flight:,}",
                       f"{stage.done:,}", rate]
                table.add_row(*row, *([ProgressBar(total=max(1, self.total), completed=stage.done, width=bar)]
                                      if bar > 4 else []))
            return table
