"""What every error that a person can put right has in common."""


class DailiesError(Exception):
    """The message says what was needed, what came, and what to do next."""

    exit_code = 2                       # of a command that ends with it; 2: what was given is wrong, nothing was started
