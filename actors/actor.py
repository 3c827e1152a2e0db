"""What a worker may ask of an actor, and tell it."""

from collections.abc import Callable, Sequence

from dailies.actors.device_lock import NO_LOCK, DeviceLock


class Actor:
    """A list of values in, as many out. Making it loads, calling it only works; threads may call it side by side.

    A subclass says what differs. A plain callable will do where nothing does (`as_actor`).
    """

    # what it says of itself
    device: str = ""                                    # where it computes, as torch names it; "": it does not
    device_id: str | None = None                        # all processes' name for it, where torch does not know one
    takes_turns = True                                  # with other processes on its GPU
    further_steps = 0                                   # of a sampler, after those that a request names
    partly = False                                      # some of this thread's last batch had been done before
    notes: Sequence[tuple[str, str]] = ()               # of that batch: clip_id, and what is to be told of it

    # what it is told
    lock: DeviceLock = NO_LOCK                          # taken while it computes
    safe = False                                        # its values have failed twice: make them with care

    @staticmethod
    def halted() -> bool:
        """Asked where it can stop in the middle and lose nothing: is it to?  A worker puts its own here."""
        return False

    def __call__(self, batch: list) -> list:
        raise NotImplementedError


class Plain(Actor):
    """A callable that wishes for nothing."""

    def __init__(self, call: Callable[[list], list]):
        self.call = call

    def __call__(self, batch: list) -> list:
        return self.call(batch)


def as_actor(made: Callable[[list], list]) -> Actor:
    return made if isinstance(made, Actor) else Plain(made)
