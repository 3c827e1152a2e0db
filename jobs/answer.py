"""A command's answer: one JSON object on standard output for a program, or sentences for a person."""

import json as jsonlib
from collections.abc import Callable, Mapping
from typing import Any


def answer(said: Mapping[str, Any], tell: Callable[[], None], *, json: bool) -> int:
    """Give it in the one form or the other; returns the exit code that it says, 0 where it says none.

    tell: prints what a person should know.
    """
    if json:
        print(jsonlib.dumps(said))
    else:
        tell()
    return said.get("exit_code") or 0
