"""The program with models of the tests', and a command that writes their weights: write MODEL FOLDER."""

import sys
from pathlib import Path

from dailies.model.catalog import CATALOG


def run(cards, write_weights):
    CATALOG.update({card.name: card for card in cards})
    if sys.argv[1:2] == ["write"]:
        write_weights(Path(sys.argv[3]), CATALOG[sys.argv[2]])
        sys.exit()
    from dailies.jobs.cli import program
    program()
