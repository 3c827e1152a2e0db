"""What every error that a person can put right has in common."""


class DailiesError(Exception):
    """The message says what was needed, what came, and what to do next."""

    # of a command that ends with it; 2: what was given is wrong, nothing was started
    exit_code = 2

    def __init__(self, *said: object):
        """said: names and texts of others in it are escaped: none makes a line of its own, or moves a cursor."""
        super().__init__(*(printable(each) if isinstance(each, str) else each for each in said))


class SettingError(DailiesError, ValueError):
    """A run cannot be made as it is asked for; the message names the setting as the command line does."""


def printable(text: str) -> str:
    """A text of others' making for a terminal, on one line: nothing in it moves the cursor or changes a colour."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
