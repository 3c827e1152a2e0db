"""`python -m dailies` is the command `dailies`."""

from dailies.jobs.cli import program

program()
