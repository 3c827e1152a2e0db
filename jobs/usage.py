"""What is wrong with a command as it was given, and the model that it names; needs no library beside torch."""

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.card import ModelCard


class UsageError(Exception):
    """The command cannot work as it was given; nothing was started or written."""


def suggestion(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def card_named(name: str) -> "ModelCard":
    """The catalogue's card of this name.  Raises UsageError."""
    from model.catalog import CATALOG
    if name not in CATALOG:
        raise UsageError(f"no model is called {name!r}.{suggestion(name, list(CATALOG))} "
                         f"There are: {', '.join(CATALOG)}")
    return CATALOG[name]
