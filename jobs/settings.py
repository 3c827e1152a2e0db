"""What a person can say about a render, from flags and from a TOML file, checked before anything heavy is imported."""

import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, create_model, field_validator

from dailies.jobs.usage import UsageError, checked_place, seconds_meant, suggestion
from dailies.model.settings import ROW_OPTIONS, Scalar, Setting
from dailies.pipeline.manifest.columns import COLUMN_NAMES
from dailies.pipeline.manifest.validation import shown
from dailies.pipeline.run.masking import without_secrets
from dailies.pipeline.store import plain_uri

Whole = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_CONFIG_BYTES = 65_536
KEY_PARTS = 100                                         # a.b.c has three; Python's reader takes minutes for 30,000
# what TOML is made of, as far as it decides where a key ends; a string that is not closed ends the reader's work
TOML = re.compile(r'''"""(?s:\\.|[^"\\]|"(?!""))*+"*+|'{3}(?s:[^']|'(?!''))*+'*+|"(?:\\.|[^"\\\n])*+"?+|'[^'\n]*+'?+'''
                  r"|[ \t\w-]++|#[^\n]*+|.|\n")


def key_of(setting: Setting) -> Any:
    """A row setting as a key of TOML, None where nothing is said; how much of it is allowed, the model says."""
    if setting.type in (str, bool):
        return setting.type | None, None
    least = {"gt": 0} if setting.type is float and setting.low > 0 else {"ge": setting.low}
    return Annotated[setting.type, Field(**least, allow_inf_nan=False if setting.type is float else None)] | None, None


RowDefaults = create_model("RowDefaults", **{setting.option: key_of(setting) for setting in ROW_OPTIONS})


class RenderJob(RowDefaults):                           # type: ignore[valid-type, misc]  # made of a table
    """One `dailies render`: for rows that do not say (RowDefaults), and for all. None is: let the model, the machine or
    the cluster decide.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    manifest: str | tuple[str, ...] | None = None       # files, folders or globs; local, s3://, https://, - for stdin
    prompt: tuple[str, ...] = ()                        # rows without a manifest, one each
    map: dict[str, str] = {}                            # column of the manifest -> ours; "": carry it along
    out: str                                            # the run folder
    model: str = "demo"
    weights: str | None = None                          # folder or s3://
    ray: str = "local"                                  # local, auto (the cluster around this machine) or an address
    device: Literal["cpu", "cuda"] | None = None
    cpus: Whole | None = None                           # of a local run: cores of this machine; None: all it may use
    allow_images: list[str] = []                        # s3:// prefixes, beside the manifest's own bucket

    precision: Literal["fp32", "bf16", "int8", "fp8", "auto"] | None = None
    decode_precision: Literal["fp32", "bf16"] | None = None
    attention: Literal["dense", "sage", "sparse", "auto"] | None = None
    compile: bool = False                               # the diffusion model, for each shape of clip
    batch: Whole = 1                                    # clips sampled at once, of one shape and sampling
    samplers: Whole | None = None                       # copies of the diffusion model
    threads_per_sampler: Whole | None = None

    # what this command may take; the next one has a budget of its own
    until: str | None = None                            # 07:00, the next one; or a date and time
    max_gpu_hours: Amount | None = None                 # of GPUs that are held, each counted whole
    max_cost: Amount | None = None                      # USD
    price: Amount | None = None                         # USD per GPU hour

    report: str | None = None                           # 5m: the morning report is written so often, and at the end

    limit: Whole | None = None                          # the most clips that this command makes
    max_attempts: Whole = 3                             # of one row whose worker died
    skip_invalid: bool = False
    strict: bool = False                                # a fallback is an error
    keep_latents: bool = False
    changed: Literal["render", "keep"] | None = None    # rows that ask for something else than they did; None: refuse
    wait: bool = False                                  # until another driver has ended
    reuse: tuple[str, ...] = ()                         # other run folders, whose clips are not made again
    take_over: bool = False                             # wait whether another driver stays silent, instead of refusing

    @field_validator("out", "weights", mode="before")
    @classmethod
    def in_one_spelling(cls, said: Any) -> Any:
        return plain_uri(said) if isinstance(said, str) else said

    @field_validator("manifest", mode="before")
    @classmethod
    def one_or_several(cls, said: Any) -> Any:
        several = [said] if isinstance(said, str) else said
        if not isinstance(several, (list, tuple)) or not all(isinstance(each, str) for each in several):
            return said
        several = tuple(map(plain_uri, several))
        return several if len(several) > 1 else several[0] if several else None

    @field_validator("prompt", mode="before")
    @classmethod
    def all_of_them(cls, said: Any) -> Any:
        return (said,) if isinstance(said, str) else tuple(said) if isinstance(said, list) else said

    @field_validator("reuse", mode="before")
    @classmethod
    def run_folders(cls, said: Any) -> Any:
        several = (said,) if isinstance(said, str) else said
        return tuple(map(plain_uri, several)) if isinstance(several, (list, tuple)) and all(
            isinstance(each, str) for each in several) else said

    @field_validator("map", mode="before")
    @classmethod
    def to_columns_of_ours(cls, said: Any) -> Any:
        mapping = parsed_map(said)
        for name, ours in mapping.items():
            if ours and ours not in COLUMN_NAMES:
                raise ValueError(f"NAME=COLUMN with a column of ours, or NAME= to carry it along, for {shown(name)}."
                                 f"{suggestion(ours, list(COLUMN_NAMES))} There are {', '.join(COLUMN_NAMES)}")
        return mapping

    def row_defaults(self) -> dict[str, Scalar]:
        """What was said for rows that do not say, by the settings' names."""
        said = {setting.name: getattr(self, setting.option) for setting in ROW_OPTIONS}
        return {name: value for name, value in said.items() if value is not None}

    @property
    def sources(self) -> tuple[str, ...]:
        """The manifest, as one or several; none where prompts were typed."""
        return (self.manifest,) if isinstance(self.manifest, str) else self.manifest or ()

    @field_validator("allow_images")
    @classmethod
    def can_hold_images(cls, said: list[str]) -> list[str]:
        prefixes = [plain_uri(prefix) for prefix in said]
        if not all(re.fullmatch(r"s3://[\w.-]{3,255}(/[^/]+)*/?", prefix, re.ASCII) for prefix in prefixes):
            raise ValueError("s3://BUCKET/PREFIX, once for each prefix")
        return prefixes

    @field_validator("report")
    @classmethod
    def is_a_time(cls, said: str | None) -> str | None:
        try:
            if said is not None:
                seconds_meant("report", said)
        except UsageError:
            raise ValueError("a time such as 5m, 12h or 2d") from None
        return said

    @field_validator("until")
    @classmethod
    def can_be_a_deadline(cls, said: str | None) -> str | None:
        if said is not None and ((moment := time_meant(said)) is None or moment < datetime.now().astimezone()):
            raise ValueError("a time of day such as 07:00, or a date and time to come such as 2026-02-01T07:00")
        return said

    def deadline(self) -> datetime | None:
        """In local time; None: there is no hurry."""
        return None if self.until is None else time_meant(self.until)

    @property
    def until_is_one_moment(self) -> bool:
        """Whether the deadline is a date, which does not come again tomorrow."""
        return self.until is not None and not is_time_of_day(self.until)

    def gpu_hours(self) -> float | None:
        """The smaller of what may be held and what can be paid."""
        paid = None if self.max_cost is None or self.price is None else self.max_cost / self.price
        return min((hours for hours in (self.max_gpu_hours, paid) if hours is not None), default=None)

    def flags(self) -> list[str]:
        """What was said beside manifest, out and what is of this machine, as the options of a command line that says
        the same elsewhere.
        """
        said: list[str] = []
        for name in sorted(self.model_fields_set - {"manifest", "prompt", "out", "ray", "cpus"}):
            flag, value = name.replace("_", "-"), getattr(self, name)
            if name == "until":                         # 07:00 here, whatever another clock shows
                value = (moment := self.deadline()) and moment.isoformat(timespec="seconds")
            if isinstance(value, bool):
                said.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is not None:
                if isinstance(value, Mapping):
                    value = [f"{key}={column}" for key, column in value.items()]
                for each in value if isinstance(value, (list, tuple)) else [value]:
                    said += [f"--{flag}", str(each)]
        return said

    @classmethod
    def read(cls, flags: Mapping[str, Any], config: Path | None = None, *, needs_out: bool = True) -> Self:
        """Flags that were given (not None) over the keys of the file, over the defaults.  Raises UsageError.

        needs_out: whether it is an error to say no `out`, which is "" otherwise.
        """
        said = read_config(config, known=list(cls.model_fields)) if config else {}
        if not needs_out:
            said.setdefault("out", "")
        given = {name: value for name, value in flags.items() if value not in (None, [], ())}
        if "manifest" in given or "prompt" in given:    # what is typed stands in place of both
            said = {name: value for name, value in said.items() if name not in ("manifest", "prompt")}
        if "map" in said and "map" in given:
            with suppress(ValueError):                  # said below, of what is wrong
                given["map"] = parsed_map(said["map"]) | parsed_map(given["map"])
        both = said | given
        if both.get("manifest") and both.get("prompt"):
            raise UsageError("Give a manifest or prompts, not both: a row for each prompt is all that --prompt makes")
        for name, what in (("manifest", "A manifest"), ("out", "An output folder")):
            if not both.get(name) and (needs_out or name != "out") and not (name == "manifest" and both.get("prompt")):
                raise UsageError(f"{what} is needed: dailies render MANIFEST --out URI" +
                                 (f", or {name} = \"...\" in {config}" if config else ""))
        try:
            job = cls(**both)
        except ValidationError as error:
            problems = [problem(detail, set(given), config) for detail in error.errors()]
            raise UsageError(*problems) from None
        for name, places in (("manifest", job.sources), ("out", [job.out]), ("weights", [job.weights])):
            for place in filter(None, places):
                checked_place(f"--{name}" if name in given and name != "manifest" else name, place)
        if job.max_cost is not None and job.price is None:
            raise UsageError("--max-cost needs --price, USD per GPU hour" + (f" (price in {config})" if config else ""))
        return job


def parsed_map(said: Any) -> dict[str, str]:
    """--map NAME=COLUMN, once or several times, or a table.  Raises ValueError for anything else."""
    if isinstance(said, Mapping) and all(isinstance(ours, str) for ours in said.values()):
        return dict(said)
    pairs = [said] if isinstance(said, str) else said
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(pair, str) and "=" in pair[1:] for pair in pairs):
        raise ValueError("NAME=COLUMN, such as caption=prompt, or NAME= to carry it along")
    found = [pair.rpartition("=") for pair in pairs]
    return {name: ours for name, _, ours in found}


def time_meant(said: str) -> datetime | None:
    """The next time that a local clock shows HH:MM, or the moment that an ISO date and time means; None for neither."""
    now = datetime.now().astimezone()
    try:
        wanted = time.fromisoformat(said)
        day = now.date() + timedelta(days=now.time() >= wanted)
        return datetime.combine(day, wanted).astimezone()
    except (ValueError, TypeError):                     # TypeError: a time of day with a zone
        pass
    try:
        return datetime.fromisoformat(said).astimezone() if ":" in said else None
    except (ValueError, OverflowError, OSError):
        return None


def is_time_of_day(said: str) -> bool:
    try:
        time.fromisoformat(said)
        return True
    except ValueError:
        return False


def read_config(path: Path, known: list[str]) -> dict[str, Any]:
    """A TOML file's keys, `max-attempts` as `max_attempts`.  Raises UsageError for what is no TOML or no setting."""
    try:
        with path.open("rb") as file:                   # a device has no end
            text = file.read(_CONFIG_BYTES + 1)
        if len(text) > _CONFIG_BYTES:
            raise ValueError(f"at most {_CONFIG_BYTES:,} bytes are read")
        said = tomllib.loads(without_long_keys(text.decode()))
    except RecursionError:
        raise UsageError(f"--config {path} must be TOML: it is nested too deeply") from None
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:                         # bad TOML, and bytes that are no UTF-8
        raise UsageError(f"--config {path} must be TOML: {error}") from None
    settings: dict[str, Any] = {}
    for key, value in said.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UsageError(f"{path}: unknown key {shown(key)}.{suggestion(name, known)} Known: {', '.join(known)}")
        if name in settings:
            raise UsageError(f"{path}: {name} is given twice")
        # TOML has times of its own: until = 07:00:00
        settings[name] = value.isoformat() if isinstance(value, (time, datetime)) else value
    return settings


def without_long_keys(text: str) -> str:
    """The same text.  Raises ValueError for a key of more than KEY_PARTS parts: every part is a table of its own."""
    parts = 1
    for token in TOML.finditer(text):
        if token.group() == ".":
            parts += 1
        elif not re.match(r"[\"' \t\w-]", token.group()):
            parts = 1
        if parts > KEY_PARTS:
            raise ValueError(f"a key has more than {KEY_PARTS} parts")
    return text


def problem(detail: Mapping[str, Any], flags: set[str], config: Path | None) -> str:
    """One pydantic error as a sentence that names the flag or the key."""
    name = str(detail["loc"][0])
    where = f"--{name.replace('_', '-')}" if name in flags else f"{config}: {name}"
    allowed = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("a valid ")
    return f"{where} must be {allowed}; got {shown(without_secrets({name: detail['input']})[name])}"
