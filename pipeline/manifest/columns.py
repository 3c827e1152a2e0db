"""The columns' names: which are ours, which are nearly ours, and what --map makes of them.

A column that is nearly ours is asked about, never taken for what it may not be and never left unused in silence. Nearly
ours are other spellings of a name, the words that other programs have for it (diffusers, the releases of Wan and LTX,
public sets of prompts), and a slip of a letter.
"""

import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache

from dailies.model.settings import LENGTHS, SETTINGS

COLUMN_NAMES = tuple(setting.name for setting in SETTINGS)
# what other programs read for each row, and no column here says
NOT_A_COLUMN = {
    "fps": "the model's own frames per second are made; say the length by duration_s or frames",
    "frame_rate": "the model's own frames per second are made; say the length by duration_s or frames",
    "width": "resolution says both sides, as 832x480",
    "height": "resolution says both sides, as 832x480",
    "aspect_ratio": "resolution says both sides, as 832x480",
    "sampler": "the model's own sampler is used", "scheduler": "the model's own sampler is used",
    "sample_solver": "the model's own sampler is used",
    "shift": "the model's own shift is used", "flow_shift": "the model's own shift is used",
    "sample_shift": "the model's own shift is used",
}
INSTEAD = dict(zip(LENGTHS, reversed(LENGTHS), strict=True))
SLIPS_FROM = 6                          # letters of a name in which one may be wrong


def bare(name: str) -> str:
    """The name without case, blanks, hyphens and underscores."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name).casefold())


SPELLED = {bare(name): name for name in COLUMN_NAMES}
_WORDS = {bare(word): setting.name for setting in SETTINGS for word in setting.other_words.split()}
STRANGERS = {bare(word): reason for word, reason in NOT_A_COLUMN.items()}


@lru_cache(maxsize=10_000)                             # a folder's files mostly have the same columns
def nearly(name: str) -> str | None:
    """The column of ours that `name` may be meant for; None for ours themselves and for all that are far from them."""
    if name in COLUMN_NAMES:
        return None
    plain = bare(name)
    if found := SPELLED.get(plain) or _WORDS.get(plain) or _WORDS.get(plain + "s"):
        return found
    if not re.fullmatch(r"[\w\s.\-]+", name):           # several names in one, or a sentence
        return None
    for known, long_enough in ((SPELLED, SLIPS_FROM), (_WORDS, 2 * SLIPS_FROM)):
        for word, ours in known.items():
            if len(word) >= long_enough and is_slip(plain, word) or known is SPELLED and plain + "s" == word or (
                    known is SPELLED and plain == word + "s"):
                return ours
    return None


def repeated(names: Iterable[str]) -> list[str]:
    """The names that are there more than once, in order."""
    return sorted(name for name, times in Counter(names).items() if times > 1)


def is_slip(one: str, other: str) -> bool:
    """Whether a single letter is missing, too many, wrong, or changed places with its neighbour."""
    if abs(len(one) - len(other)) > 1 or one[-1:].isdigit():           # prompt2 is another prompt, no slip
        return False
    start = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    left, right = one[start:], other[start:]
    return left[1:] == right[1:] or left[1:] == right or left == right[1:] or (
        left[:2] == right[:2][::-1] and left[2:] == right[2:])


class Names:
    """What the columns of a manifest's files become.  mapping: name in a file -> ours, or "" to carry it along."""

    def __init__(self, mapping: Mapping[str, str] = {}):
        self.mapping = dict(mapping)
        self.used: set[str] = set()

    def target(self, name: str) -> str:
        """A name of ours, or user.NAME."""
        if name in self.mapping:
            self.used.add(name)
            return self.mapping[name] or f"user.{name}"
        return name if name in COLUMN_NAMES else f"user.{name}"

    def unused(self) -> list[str]:
        """What was to be mapped, and no file has."""
        return [name for name in self.mapping if name not in self.used]

    def collisions(self, names: Iterable[str]) -> list[tuple[str, list[str]]]:
        """Of one file's columns: what several would become, and which."""
        by_target: dict[str, list[str]] = {}
        for name in names:
            by_target.setdefault(self.target(name), []).append(name)
        return [(target, sources) for target, sources in by_target.items() if len(sources) > 1]

    def questions(self, names: list[str]) -> list[tuple[str, str | None, str]]:
        """Of one file's columns, those to ask about: (name, what of ours it may be, the question).

        Another spelling is always asked about, another word only where nothing says what it would. Where there is no
        prompt, the columns that may be it come with prompt.
        """
        there = {self.target(name) for name in names}
        asked: list[tuple[str, str | None, str]] = []
        for name in names:
            if name in self.mapping:
                continue
            ours, stranger = nearly(name), STRANGERS.get(bare(name))
            if ours and (bare(name) in SPELLED or not {ours, INSTEAD.get(ours, ours)} & there):
                asked.append((name, ours, f"Did you mean {ours}? ({map_flag(name, ours)}, or {map_flag(name, '')} to "
                                          "carry it along)"))
            elif stranger and not (stranger.startswith("resolution") and "resolution" in there):
                asked.append((name, None, f"No column sets it: {stranger} ({map_flag(name, '')} carries it along)"))
        return asked


def map_flag(name: str, ours: str) -> str:
    """How a command line says it."""
    return f"--map {shlex.quote(f'{name}={ours}')}"
