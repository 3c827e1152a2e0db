"""`dailies bench [WHAT]`: what things cost and how good they are, measured here and now; device, versions, commit.

`python -m dailies.jobs.bench` is the same from a checkout, and on a machine with torch and Triton alone it measures
what can be measured with them.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from dailies.jobs.answer import answer
from dailies.jobs.bench.machine import machine
from dailies.jobs.bench.memory import memory
from dailies.jobs.usage import UsageError
from dailies.model.catalog import CATALOG, DEMO

Rows = Iterator[tuple[str, dict[str, Any]]]


def bench(what: str | None, model: str | None = None, *, random_weights: bool = False, gpu_shapes: bool = False,
          json: bool, **of_clip: Any) -> int:
    """Run one part or all; prints a line of figures per case.  Raises UsageError for a part that does not exist.

    model: of the part "model", this model's transformer and not the VAE; of the part "clip", this model.
    gpu_shapes: of the part "pipeline", how busy GPUs are kept.
    of_clip: ways, steps, frames, size, as bench_clip.rows takes them; None is not said.
    """
    of_clip = {name: value for name, value in of_clip.items() if value is not None}
    if of_clip and (what != "clip" or model is None):
        raise UsageError(f"--{next(iter(of_clip))} is of a clip of a model: dailies bench clip NAME")
    if what is not None and what not in _PARTS:
        raise UsageError(f"bench has no part {what!r}. There are: {', '.join(_PARTS)}; and, with files of its own, gpu")
    if (model is not None or random_weights) and what not in OF_A_MODEL:
        raise UsageError(f"a model is named for: {', '.join(OF_A_MODEL)}; as in: dailies bench clip NAME")
    if what == "model" and (model is None) == random_weights:
        raise UsageError("a transformer is timed with random weights: dailies bench model NAME --random-weights")
    if random_weights and model is None:
        raise UsageError(f"--random-weights are of a model: dailies bench {what} NAME --random-weights")
    if gpu_shapes and what != "pipeline":
        raise UsageError("--gpu-shapes are of the pipeline: dailies bench pipeline --gpu-shapes")
    parts = _PARTS | ({"pipeline": busy_gpus} if gpu_shapes else {})
    about = machine()
    if not json:
        print(", ".join(f"{name} {value}" for name, value in about.items()))
    cases = []
    for part in [what] if what else _PARTS:
        rows = partial(OF_A_MODEL[part], model, random_weights, **of_clip) if model else parts[part]
        for case, figures in measured(part, rows, alone=what is not None):
            cases.append({"part": part, "case": case, **figures})
            if not json:
                said = ", ".join(f"{name} {cell(value)}" for name, value in figures.items())
                print(f"{part}: {case}: {said}", flush=True)
    return answer({**about, "cases": cases}, lambda: None, json=json)


def measured(part: str, rows: Callable[[], Rows], *, alone: bool) -> Rows:
    """The part's rows.  Where a library that it needs is not installed: UsageError if it is asked for alone, or else
    a row that says so, and the other parts follow."""
    try:
        yield from rows()
    except ModuleNotFoundError as error:
        if alone:
            raise UsageError(f"bench {part} needs {error.name}, which is not installed: "
                             f"pip install {error.name}") from error
        yield "not measured", {"not installed": error.name}


def demo() -> Rows:
    """200 unseen prompts through the demo model, read back by the checker."""
    yield from demo_rows((("fp32", "dense"),))


def quality() -> Rows:
    """The same prompts in fp32, in 50 steps, in INT8, with sage and with sparse attention; how far the frames are from
    fp32's."""
    yield from demo_rows((("fp32", "dense"), ("fp32", "dense", 50), ("int8", "dense"), ("fp32", "sage"),
                          ("fp32", "sparse"), ("int8", "sparse")))


def demo_rows(ways: tuple[tuple, ...], prompts: int = 200) -> Rows:
    """Each way a precision, an attention and the steps, if not the model's own. The first is what the others are
    compared with; then what was made of the demo model, where it is shipped."""
    from dailies.jobs.demo.evaluate import evaluate, psnr
    runs = [(DEMO, *way) for way in ways]
    if len(ways) > 1:
        made_of_it = [card for card in CATALOG.values() if card.folder == DEMO.folder and card is not DEMO]
        runs += [(card, "fp32", card.attentions[0]) for card in made_of_it]
    first: list = []
    for card, precision, attention, *steps in runs:
        frames: list = []
        num_steps, = steps or (card.num_steps,)
        figures = evaluate(prompts, card=card, precision=precision, attention=attention, num_steps=num_steps,
                           keep=frames)
        figures["wrong"] = len(figures["wrong"])
        by_attribute = figures.pop("by_attribute")
        if first:
            figures["psnr_db"] = psnr(frames, first)
        first = first or frames
        case = f"attributes shown of those said, {card.name}, {precision}, {attention} attention, {num_steps} steps"
        yield case, figures | by_attribute


def _pipeline() -> Rows:
    """The driver with stages that only sleep; the peer is the ideal, with no driver at all."""
    from dailies.jobs.bench.pipeline import rows
    yield from rows("all")


def busy_gpus() -> Rows:
    """The driver with pretended GPUs; the peer is what the seconds of sampling and decoding leave room for."""
    from dailies.jobs.bench.pipeline import rows
    yield from rows("gpu-shapes")


def _memory() -> Rows:
    """Resident memory of every process over 500 tiny clips."""
    yield "500 tiny clips", memory()


def model() -> Rows:
    """The Wan VAE's decoder; the peer is diffusers', with the same weights."""
    from dailies.jobs.bench.model import rows
    yield from rows()


def transformer(name: str, random_weights: bool) -> Rows:
    """One forward of a model's transformer; the peer is diffusers', with the same weights."""
    from dailies.jobs.bench.dit import rows
    from dailies.jobs.bench.ltx2 import RELEASES, ltx2_rows
    yield from (ltx2_rows if name in RELEASES else rows)(name)


def clips() -> Rows:
    """One clip of each demo model, stage by stage."""
    for card in CATALOG.values():
        if card.folder is not None:
            yield from clip(card.name)


def clip(name: str, random_weights: bool = False, **of_clip: Any) -> Rows:
    """One clip of a model, stage by stage."""
    from dailies.jobs.bench.clip import rows
    yield from rows(name, random_weights=random_weights, **of_clip)


def report() -> Rows:
    """The morning report of 10,000 and of 100,000 clips: writing it, opening it, from clip to clip."""
    from dailies.jobs.bench.report import rows
    yield from rows()


def kernels() -> Rows:
    """Each kernel against a named rival; on a CPU what runs there instead."""
    from dailies.jobs.bench.kernels import rows
    yield from rows()


_PARTS: dict[str, Callable[[], Rows]] = {"demo": demo, "quality": quality, "pipeline": _pipeline, "memory": _memory,
                                        "model": model, "kernels": kernels, "clip": clips, "report": report}
OF_A_MODEL: dict[str, Callable[..., Rows]] = {"model": transformer, "clip": clip}


def cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> int:
    """`dailies bench` without the libraries of its command line."""
    parser = argparse.ArgumentParser(prog="python -m dailies.jobs.bench",
                                     description="Time a part of dailies against a named "
                                     "peer in the same run.")
    parser.add_argument("what", nargs="?", metavar="WHAT", help=f"one of {', '.join(_PARTS)}; default: all of them")
    parser.add_argument("model", nargs="?", metavar="NAME",
                        help="`model`: this model's transformer; `clip`: a clip of it")
    parser.add_argument("--random-weights", action="store_true", help="with NAME: weights are made up")
    parser.add_argument("--gpu-shapes", action="store_true", help="of `pipeline`: how busy GPUs are kept")
    parser.add_argument("--ways", metavar="WAY,WAY", help="of `clip NAME`: int8:sparse,bf16:dense:compiled")
    parser.add_argument("--steps", type=int, metavar="N", help="of `clip NAME`")
    parser.add_argument("--frames", type=int, metavar="N", help="of `clip NAME`")
    parser.add_argument("--size", metavar="WIDTHxHEIGHT", help="of `clip NAME`")
    parser.add_argument("--json", action="store_true", help="one JSON object, and nothing else")
    try:
        return bench(**vars(parser.parse_args(arguments)))
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2

