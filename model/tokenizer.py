"""A tokenizer as its tokenizer.json has it: a text in, numbers of pieces out; by the tokenizers library.

transformers makes a new one of the vocabulary instead, with an unknown piece of its own choice (umT5's is 3, it takes
2), and can run code that lies in the folder. Here nothing of a folder runs, and no part of the file decides how long
its reader is busy: what is read is checked first, and what no released tokenizer has is refused.
"""

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from dailies.model.files import CheckpointError, first_line, read_json

FILE = "tokenizer.json"
FILE_BYTES = 40_000_000                                 # Gemma's has 34 MB, umT5's 17 MB
_CONFIG_BYTES = 4_000_000
PIECES = 1_000_000                                      # umT5 has 256,300, Gemma 262,145
PIECE_CHARS = 256
VOCABULARY_CHARS = 8_000_000                            # every one may become a table of its own
ADDED = 10_000                                          # Gemma has 6,415
ADDED_CHARS = 128
STEPS = 16                                              # of normalising, or of cutting into words
GROWTH = 256                                            # bytes that a table of replacements may make of one character
GROWN = 18                                              # characters of one in Unicode's own NFKC, at most (U+FDFA)
MODELS = ("Unigram", "BPE")                             # of T5, umT5 and Gemma
_LONGEST = 2000                                          # characters that all steps together may make of one, at most
# Steps whose time and result grow with the text alone, what each may say beside its type, and how many characters it
# makes of one at most. Replace and Split come with a pattern, see `check_pattern`.
STEPS_KNOWN: dict[str, dict[str, tuple[set[str], int]]] = {
    "normalizer": {
        "NFC": (set(), 4), "NFD": (set(), 4), "NFKC": (set(), GROWN), "NFKD": (set(), GROWN), "Nmt": (set(), 1),
        "Lowercase": (set(), 3), "Strip": ({"strip_left", "strip_right"}, 1), "StripAccents": (set(), 1),
        "Prepend": ({"prepend"}, 1), "Precompiled": ({"precompiled_charsmap"}, 1),
        "Replace": ({"pattern", "content"}, 1),
        "BertNormalizer": ({"clean_text", "handle_chinese_chars", "strip_accents", "lowercase"}, 36)},
    "pre_tokenizer": {
        "Metaspace": ({"replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"}, 2),
        "Whitespace": (set(), 1),
        "WhitespaceSplit": (set(), 1), "Punctuation": ({"behavior"}, 1), "Digits": ({"individual_digits"}, 1),
        "UnicodeScripts": (set(), 1), "BertPreTokenizer": (set(), 1), "CharDelimiterSplit": ({"delimiter"}, 1),
        "Split": ({"pattern", "behavior", "invert"}, 1)},
}
SEQUENCES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}     # where a Sequence has its steps
PREPENDED = 4                                           # characters before a text, and before each of its parts
PATTERNS = (" {2,}", r"\s+", " +", r"\s{2,}")           # regular expressions that cannot run away
_END = "</s>"
_START = "<bos>"                                       # of Gemma


class Tokenizer:
    """Pieces of a text, the end mark last. Nothing of it changes, so threads may share it."""

    def __init__(self, folder: Path, name: str):
        """folder: with a tokenizer.json.  name: of the model, for messages.  Raises CheckpointError."""
        said = read_tokenizer(folder, name)
        self.where = f"{name}: {folder / FILE}"
        with quietly(self.where):
            self.made = tokenizers.Tokenizer.from_str(json.dumps(said))
            # asked of the table: a dictionary of umT5's pieces takes the library two seconds
            vocabulary = said["model"]["vocab"]
            added = [number for token in said["added_tokens"] or ()
                     if (number := self.made.token_to_id(token["content"])) is not None]
            self.largest = max(max(vocabulary.values(), default=0) if isinstance(vocabulary, dict)
                               else len(vocabulary) - 1,
                               *added)
        self.check_marks()

    def check_marks(self) -> None:
        """Raises CheckpointError where the file does not put the end mark behind a text."""
        with quietly(self.where):
            end = self.made.token_to_id(_END)
            self.end = -1 if end is None else end       # then no text ends in it
        if self.ids("") != [self.end] or self.ids("a")[-1:] != [self.end]:
            raise CheckpointError(f"{self.where} must put {_END} behind a text, as T5's and umT5's do; it makes "
                                  f"{self.ids('a')[:8]} of 'a'. Is it another model's?")

    def ids(self, text: str, at_most: int | None = None) -> list[int]:
        """The numbers of the text's pieces, the end mark last. at_most: how many; the end mark is kept.

        Raises CheckpointError where the file's tables do not bear this text.
        """
        ids = self.pieces(text)
        return ids if at_most is None or len(ids) <= at_most else [*ids[:at_most - 1], self.end]

    def pieces(self, text: str) -> list[int]:
        """What the file makes of a text, whatever its length.  Raises CheckpointError."""
        with quietly(self.where):
            steps = self.made.normalizer
            # before it is cut into pieces, which is what takes long
            if steps is not None and (grown := len(steps.normalize_str(text))) > GROWN * len(text) + 4 * ADDED_CHARS:
                raise ValueError(f"its normalizer makes {grown:,} characters of {len(text):,}; Unicode makes {GROWN} "
                                 f"of one at most")
            return self.made.encode(text).ids

    def padded(self, texts: Iterable[str], device: str, at_most: int | None = None) -> tuple[Tensor, Tensor]:
        """ids [B, L] int64, padded with 0 to the longest, and a mask [B, L] that is 1 where there is a piece."""
        rows = [torch.tensor(self.ids(text, at_most)) for text in texts]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), mask.to(device)


class GemmaTokenizer(Tokenizer):
    """Pieces of a text, the start mark first, and none at the end."""

    def check_marks(self) -> None:
        with quietly(self.where):
            start = self.made.token_to_id(_START)
        if start is None:
            raise CheckpointError(f"{self.where} has no {_START}, which stands before a text. Is it Gemma's?")
        self.start = start
        if self.ids("") != [start] or len(self.ids("a")) < 2:
            raise CheckpointError(f"{self.where} must put nothing but {_START} around a text, as Gemma's does; it "
                                  f"makes {self.ids('')[:8]} of an empty one and {self.ids('a')[:8]} of 'a'. Is it "
                                  "another model's?")

    def ids(self, text: str, at_most: int | None = None) -> list[int]:
        """As Tokenizer.ids; the text without blanks around it. at_most: the start mark is kept."""
        ids = self.pieces(text.strip())
        return (ids if ids[:1] == [self.start] else [self.start, *ids])[:at_most]


class quietly:
    """The library's own errors, and its panics, which are no Exception, as a CheckpointError."""

    def __init__(self, where: str):
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise CheckpointError(f"{self.where} does not hold a tokenizer that can be used "
                                  f"({type(error).__name__}: {first_line(error)[:200]})") from error


def read_tokenizer(folder: Path, name: str) -> dict[str, Any]:
    """The table that a tokenizer is made of, without what only matters when ids become text.  Raises
    CheckpointError."""
    config = folder / "tokenizer_config.json"
    if not (folder / FILE).exists() and (folder / "spiece.model").exists():
        raise CheckpointError(f"{name}: {folder} does not hold a tokenizer.json, only a spiece.model, of which others "
                              "make other pieces. Fetch tokenizer.json too, from the repository that it came from")
    try:
        if config.exists():
            refuse_code(read_json(config, _CONFIG_BYTES), config)
        said = read_json(folder / FILE, FILE_BYTES)
        refuse_code(said, folder / FILE)
        check_model(said["model"])
        check_added(said.get("added_tokens") or [])
        longer = math.prod(check_steps(part, said.get(part)) for part in STEPS_KNOWN)
        if longer > _LONGEST:
            raise ValueError(f"its steps could make {longer:,} characters of one, where {_LONGEST:,} are allowed: a "
                             f"text becomes longer again and again")
        # which the library normalizes, each one, when it reads the file
        if longer * sum(len(token["content"]) for token in said.get("added_tokens") or []
                        if token.get("normalized") is not False) > VOCABULARY_CHARS:
            raise ValueError(f"its steps make more than {VOCABULARY_CHARS:,} characters of the tokens that it adds")
        check_post(said.get("post_processor"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"{name}: {folder} does not hold a tokenizer that can be used: {error}") from error
        why = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else first_line(error)[:300]
        raise CheckpointError(f"{name}: {folder} does not hold a tokenizer as T5, umT5 or Gemma have it: "
                              f"{why}. Fetch it again, from the model's publisher") from error
    return {part: said.get(part) for part in ("version", "added_tokens", "normalizer", "pre_tokenizer",
                                              "post_processor", "model")}


def refuse_code(said: Any, path: Path) -> None:
    """Raises CheckpointError for a table that names Python files to be run (auto_map)."""
    if isinstance(said, Mapping) and "auto_map" in said:
        raise CheckpointError(f"{path} has auto_map: it names code beside it that is to be run. dailies runs no code "
                              f"of a weights folder; if you trust the rest of it, remove auto_map from the file")


def check_model(model: Mapping[str, Any]) -> None:
    """Raises ValueError for a vocabulary that is none, or larger than any of these models."""
    if model["type"] not in MODELS:
        raise ValueError(f"its model must be {' or '.join(MODELS)}, not {str(model['type'])[:40]!r}")
    if model.get("dropout"):
        raise ValueError("its dropout makes other pieces of a text each time")
    vocabulary = model["vocab"]
    if not isinstance(vocabulary, {"Unigram": list, "BPE": dict}[model["type"]]):
        raise ValueError("its vocab is not one of its kind of model")
    if len(vocabulary) > PIECES:
        raise ValueError(f"it has {len(vocabulary):,} pieces, where {PIECES:,} are allowed")
    if isinstance(vocabulary, dict):
        names, numbers = list(vocabulary), list(vocabulary.values())
        if any(type(number) is not int or not 0 <= number < PIECES for number in numbers):
            raise ValueError(f"the numbers of its pieces must be whole, from 0 to {PIECES:,}")
        if len(set(numbers)) != len(numbers):
            raise ValueError("two of its pieces have one number")
        if not isinstance(model["merges"], list) or len(model["merges"]) > PIECES:
            raise ValueError(f"its merges must be a list of at most {PIECES:,}")
    else:
        names = [name for name, _ in vocabulary]
        if not all(type(score) in (int, float) and math.isfinite(score) for _, score in vocabulary):
            raise ValueError("the scores of its pieces must be numbers")
        if type(model["unk_id"]) is not int or not 0 <= model["unk_id"] < len(vocabulary):
            raise ValueError(f"its unknown piece must be one of its {len(vocabulary)}; got {str(model['unk_id'])[:40]}")
    if not all(isinstance(name, str) for name in names) or max(map(len, names), default=0) > PIECE_CHARS \
            or sum(map(len, names)) > VOCABULARY_CHARS:
        raise ValueError(f"its pieces must be texts of at most {PIECE_CHARS} characters, {VOCABULARY_CHARS:,} in all")


def check_added(added: list[Any]) -> None:
    if not isinstance(added, list) or len(added) > ADDED:
        raise ValueError(f"it may add at most {ADDED:,} tokens")
    for token in added:
        if not isinstance(token["content"], str) or not 0 < len(token["content"]) <= ADDED_CHARS:
            raise ValueError(f"a token that it adds must have 1 to {ADDED_CHARS} characters")
        if type(token["id"]) is not int or not 0 <= token["id"] < 2 * PIECES:
            raise ValueError(f"the number of a token that it adds must be from 0 to {2 * PIECES:,}")


def check_steps(part: str, said: Any) -> int:
    """How many characters the steps make of one, at most.

    Raises ValueError for a step that is not known, or whose time or result could grow without measure.
    """
    steps, longer = list(_flat(said, SEQUENCES[part])), 1
    if len(steps) > STEPS:
        raise ValueError(f"its {part} has {len(steps)} steps, where {STEPS} are allowed")
    for step in steps:
        if step["type"] not in STEPS_KNOWN[part]:
            raise ValueError(f"its {part} has a step {str(step['type'])[:40]!r}; known are "
                             f"{', '.join(('Sequence', *STEPS_KNOWN[part]))}")
        fields, each = STEPS_KNOWN[part][step["type"]]
        refuse_others(step, fields)
        longer *= each
        if step["type"] == "Precompiled":
            longer *= check_replacements(step["precompiled_charsmap"])
        if step["type"] == "Prepend":
            if len(step["prepend"]) > PREPENDED:
                raise ValueError(f"its {part} puts more than {PREPENDED} characters before a text")
            longer *= 1 + len(step["prepend"])          # added tokens cut a text into parts, and each gets it
        if step["type"] in ("Replace", "Split"):
            check_pattern(step["pattern"], step.get("content", ""))
    return longer


def refuse_others(step: Mapping[str, Any], fields: Iterable[str]) -> None:
    """Raises ValueError for what a step says beside its type and these: the library would take it in its own way."""
    if others := step.keys() - {"type", *fields}:
        raise ValueError(f"its step {step['type']} says {str(sorted(others)[0])[:40]!r}, which no such step has")


def _flat(said: Any, inner: str, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """The steps of a sequence of sequences, which has them under `inner`.  Raises ValueError."""
    if said is None:
        return
    if depth > 4:
        raise ValueError("its sequences of steps lie in each other more than 4 deep")
    if said["type"] != "Sequence":
        yield said
        return
    refuse_others(said, [inner])
    for step in said[inner]:
        yield from _flat(step, inner, depth + 1)


def check_pattern(pattern: Mapping[str, str], content: str) -> None:
    """Raises ValueError unless what is replaced is a plain text, or one of PATTERNS, and does not grow."""
    (kind, text), = pattern.items()
    if kind not in ("String", "Regex") or not text or kind == "Regex" and text not in PATTERNS:
        raise ValueError(f"it looks for {str(text)[:60]!r}; a plain text is allowed, and the expressions "
                         f"{', '.join(map(repr, PATTERNS))}, since others can take for ever")
    if len(content) > max(1, len(text) if kind == "String" else 1):
        raise ValueError("it replaces a text by a longer one")


def check_replacements(table: str) -> int:
    """SentencePiece's table: 4 bytes that say the length of a trie, the trie, texts with a NUL behind each.

    Returns how many characters the longest text has.
    """
    data = base64.b64decode(table, validate=True)
    length = int.from_bytes(data[:4], "little")
    if length % 4 or not 4 <= length <= len(data) - 4:
        raise ValueError("its table of replacements is damaged")
    texts = data[4 + length:].split(b"\0")
    if max(map(len, texts)) > GROWTH:
        raise ValueError(f"its table of replacements makes more than {GROWTH} bytes of one character")
    return max(1, *(len(text.decode(errors="replace")) for text in texts))


def check_post(said: Any) -> None:
    if said is None or said["type"] != "TemplateProcessing":
        raise ValueError(f"its post_processor must be a TemplateProcessing that puts {_END} behind a text, or {_START} "
                         "before it")
    tables = [said["single"], said["pair"], *(token["ids"] for token in said["special_tokens"].values())]
    if len(tables) > 16 or any(len(table) > 8 for table in tables):
        raise ValueError("its post_processor puts more than 8 pieces around a text")


def new_tokenizer(sentences: list[str], *, pieces: int, folder: Path, for_gemma: bool = False) -> None:
    """Train a byte-pair tokenizer with T5's special tokens: pad 0, end 1, which is appended, unknown 2.

    Tokenizer can load what it leaves in `folder`.  for_gemma: GemmaTokenizer can: pad 0, end 1, start 2, which is put
    in front, unknown 3.
    """
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<pad>", "<eos>", _START, "<unk>"] if for_gemma else ["<pad>", _END, "<unk>"]
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))     # unigram's pruning would leave few whole words
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(sentences, trainers.BpeTrainer(
        vocab_size=pieces, special_tokens=special, show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789.,:'-")))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A" if for_gemma else f"$A {_END}",
        special_tokens=[(_START, 2) if for_gemma else (_END, 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / FILE))
