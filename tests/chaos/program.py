"""The program `dailies` with a model whose actors are fakes; all else is what ships.

    CHAOS_SCRIPT='{"notes": "notes.jsonl"}' python -m tests.chaos.program render night.jsonl --out out/ --model tiny
"""

import json
import os
from functools import partial

from dailies.jobs import render
from dailies.jobs.cli import program
from dailies.pipeline import text_to_video as recipe
from dailies.pipeline.scheduler import watchdog
from tests import tiny  # noqa: F401  adds the model to the catalogue
from tests.chaos import fakes
from tests.chaos.full_disk import FillingStore
from tests.chaos.losses import GuardedStore

SCRIPT = "CHAOS_SCRIPT"                 # in the environment: a fakes.Script as JSON


def put_fakes_in(script: fakes.Script) -> None:
    recipe.TextEncoder = partial(fakes.FakeEncoder, script=script)
    recipe.Decoder = partial(fakes.FakeDecoder, script=script)
    recipe.Denoiser = partial(fakes.FakeDenoiser, script=script)
    recipe.PersistSampled = partial(fakes.NotedKeep, script=script)
    recipe.ClipWriter = partial(fakes.NotedWriter, script=script)
    recipe.ENCODED_AHEAD = script.ahead
    recipe.OVERLAP["cpu"] = recipe.OVERLAP["cuda" if script.overlap else "cpu"]
    watchdog.LEAST_LIMIT_S = script.least_limit_s or watchdog.LEAST_LIMIT_S
    if script.fill:
        render.open_store = partial(FillingStore, folder=script.fill, ballast=script.ballast)
    if script.lost:
        render.open_store = partial(GuardedStore, lost=script.lost)


if __name__ == "__main__":
    put_fakes_in(fakes.Script(**json.loads(os.environ[SCRIPT])))
    program()
