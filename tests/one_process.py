"""The program `dailies` with its stages one after the other in this process, without Ray."""

from contextlib import nullcontext
from functools import partial

from dailies.jobs import cli
from dailies.pipeline import stages


class OneProcess:
    """What a render is given for pipeline/scheduler/cluster.py."""

    def connect(self, address, **options):
        return nullcontext()

    def run(self, steps, requests, **options):
        return stages.run_local(steps, requests)


ENGINE = OneProcess()
main = partial(cli.main, engine=ENGINE)
