"""T5 and umT5 text encoders: a prompt in, a row of numbers per token out; by transformers, from local files only."""

import html
import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
import transformers  # loads its parts when they are asked for, so not in annotations
from torch import Tensor

from dailies.kernels import processor
from dailies.model import checkpoint, keys
from dailies.model.files import CheckpointError, first_line, read_json
from dailies.model.samplers import Streams
from dailies.model.tokenizer import Tokenizer, refuse_code

CONFIG_BYTES = 1_000_000
# Of transformers' config what decides an encoder, and the largest that there could be: a layer more is a table more to
# describe, so a number must not keep the reader busy for ever. The released ones have 24 layers and 256,384 pieces.
LARGEST = dict(vocab_size=2**21, d_model=2**16, d_kv=2**12, d_ff=2**18, num_layers=256, num_heads=1024)
POSITIONS = dict(relative_attention_num_buckets=2**12, relative_attention_max_distance=2**20)
FEED_FORWARDS = ("gated-gelu", "relu")                  # of T5 v1.1 and umT5; of the first T5


class T5TextEncoder:
    """A T5 v1.1 encoder and its tokenizer, loaded; calling it only computes.

    Prompts are taken as they are, one at a time and unpadded: a batch would change the last bits of its rows.
    In bf16 the whole module is bf16, residual stream and norms too, as the Linum v2 and Wan releases run it.
    """

    family = "T5"
    tables: tuple[keys.KeyTable, ...] = (keys.T5,)

    def __init__(self, encoder: Path, tokenizer: Path, device: str, *, name: str, precision: str, max_tokens: int,
                 width: int, config: Mapping[str, Any] | None = None):
        """encoder, tokenizer: folders as transformers saves them.  name: of the model, for messages.
        width: of the rows that the DiT takes.  config: of an encoder that is one file and says nothing of itself.

        Raises CheckpointError for folders that do not hold such a model.
        """
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.device, self.max_tokens = device, max_tokens
        self.tokenizer = Tokenizer(tokenizer, name)
        self.model = described_encoder(self.family, config or encoder / "config.json", name)
        self.model.encoder.embed_tokens = self.model.shared             # one tensor, whatever the config says of tying
        if self.model.config.d_model != width:
            raise CheckpointError(f"{name}: {encoder} gives rows of {self.model.config.d_model} numbers; "
                                  f"the model takes {width}")
        self.load(encoder, name, processor.dtype_of(precision, device))
        self.model.requires_grad_(False).eval()

    def load(self, encoder: Path, name: str, dtype: torch.dtype) -> None:
        """The weights onto the device.  Raises CheckpointError."""
        checkpoint.load(self.model, encoder, *self.tables, name=name, device=self.device, dtypes=dtype)

    def checked(self, name: str) -> Self:
        """Raises CheckpointError where the tokenizer has pieces that the encoder has no row for."""
        rows = self.model.config.vocab_size
        if self.tokenizer.largest >= rows:
            raise CheckpointError(f"{name}: its tokenizer has a piece {self.tokenizer.largest}, and its text encoder "
                                  f"{rows} rows: they are not of one model. Fetch both from one repository")
        return self

    def tokens(self, text: str) -> list[int]:
        """Token ids, the end mark last, which is all there is of an empty text.

        A long text is cut to max_tokens, and keeps the end mark.
        """
        return self.tokenizer.ids(self.prepared(text), self.max_tokens)

    def cut(self, text: str) -> int:
        """How many tokens of the text do not fit."""
        return max(0, len(self.tokenizer.ids(self.prepared(text))) - self.max_tokens)

    def prepared(self, text: str) -> str:
        """The text as the tokenizer gets it."""
        return text

    def encode(self, text: str) -> Streams:
        """As TextModel.encode."""
        return {"video": self(text)}

    def __call__(self, text: str) -> Tensor:
        """[L, E] on the CPU, 1 <= L <= max_tokens, in the precision it was computed in."""
        return self.rows(self.tokens(text))

    @torch.inference_mode()
    def rows(self, tokens: list[int]) -> Tensor:
        """[L, E] on the CPU, a row per token."""
        return self.model(input_ids=torch.tensor([tokens], device=self.device)).last_hidden_state[0].cpu()


class UMT5TextEncoder(T5TextEncoder):
    """umT5: as T5, but every block has its own table of relative positions; texts are cleaned first, as for Wan."""

    family = "umT5"
    tables = (keys.UMT5, keys.UMT5_WAN)

    def prepared(self, text: str) -> str:
        return cleaned(text)


def cleaned(text: str) -> str:
    """Broken encodings mended, HTML entities resolved twice, every run of white space made one space.

    Raises ImportError for a text that only ftfy can mend, where it is not installed.
    """
    return " ".join(html.unescape(html.unescape(mended(text))).split())


def mended(text: str) -> str:
    """ftfy's text; it leaves printable ASCII without entities as it is, so it is imported for other texts alone."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    try:
        import ftfy
    except ImportError as error:
        raise ImportError("a text beyond plain ASCII is cleaned by ftfy for this model, and ftfy is not installed: "
                          "pip install ftfy") from error
    return ftfy.fix_text(text)


def described_encoder(family: str, config: Mapping[str, Any] | Path, name: str) -> "transformers.PreTrainedModel":
    """new_encoder without weights, of fields or of the file that has them.  Raises CheckpointError."""
    where = config if isinstance(config, Path) else "what this program says of it"
    try:
        if not isinstance(config, Path):
            return new_encoder(family, config, "meta")
        said = read_json(config, CONFIG_BYTES)
        refuse_code(said, config)
        return new_encoder(family, said, "meta")
    except Exception as error:                          # the config class checks its own values, with its own errors
        raise CheckpointError(f"{name}: {where} is not the config of a {family} encoder "
                              f"({type(error).__name__}: {first_line(error)[:400]})") from error


def check_encoder(family: str, name: str, path: Path, config: Mapping[str, Any] | Path | None,
                  tables: tuple[keys.KeyTable, ...]) -> None:
    """That the encoder which the config describes can be loaded from this file.  Raises CheckpointError."""
    model = described_encoder(family, path.with_name("config.json") if config is None else config, name)
    model.encoder.embed_tokens = model.shared
    checkpoint.load(model, path, *tables, name=name, device="meta")


def new_encoder(family: str, said: Mapping[str, Any], device: str | None = None) -> "transformers.PreTrainedModel":
    """A T5 or umT5 encoder of these fields of transformers' config; all that does not decide one is passed over.

    device: None for torch's default.  Raises ValueError and KeyError.
    """
    if said["model_type"] != family.lower():
        raise ValueError(f"model_type is {str(said['model_type'])[:40]!r}")
    make_config, make_model = {"T5": (transformers.T5Config, transformers.T5EncoderModel),
                               "umT5": (transformers.UMT5Config, transformers.UMT5EncoderModel)}[family]
    config = make_config(**fields_of(said))
    config._attn_implementation = "eager"               # softmax in fp32, as the releases run it
    # not before: on meta torch 2.8 cannot load its compiler, as transformers does
    with torch.device(device) if device else nullcontext():
        return make_model(config)


def fields_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """What decides an encoder, each number a whole one in its range.  Raises ValueError and KeyError."""
    fields = {name: said[name] for name in LARGEST} | {name: said[name] for name in POSITIONS if name in said}
    for name, number in fields.items():
        most = (LARGEST | POSITIONS)[name]
        if type(number) is not int or not 1 <= number <= most:
            raise ValueError(f"{name} must be a whole number from 1 to {most:,}; got {str(number)[:40]}")
    # half of the buckets are for each direction, and half of those for single steps
    single, distance = (fields.get(name, default) for name, default in zip(POSITIONS, (32, 128), strict=True))
    if single < 4 or distance <= single // 4:
        raise ValueError(f"relative_attention_max_distance must be more than a quarter of the buckets; got {distance} "
                         f"of {single}")
    if "layer_norm_epsilon" in said:
        epsilon = said["layer_norm_epsilon"]
        if type(epsilon) is not float or not math.isfinite(epsilon) or not 0 < epsilon < 1:
            raise ValueError(f"layer_norm_epsilon must be a number between 0 and 1; got {str(epsilon)[:40]}")
        fields["layer_norm_epsilon"] = epsilon
    if "feed_forward_proj" in said:
        if said["feed_forward_proj"] not in FEED_FORWARDS:
            raise ValueError(f"feed_forward_proj must be {' or '.join(FEED_FORWARDS)}; "
                             f"got {str(said['feed_forward_proj'])[:40]!r}")
        fields["feed_forward_proj"] = said["feed_forward_proj"]
    return fields


def new_t5(**config: int) -> "transformers.T5EncoderModel":
    """A T5 v1.1 encoder with random weights, to be trained.  config: fields of transformers.T5Config."""
    return transformers.T5EncoderModel(transformers.T5Config(
        feed_forward_proj="gated-gelu", dropout_rate=0.0, is_encoder_decoder=False, use_cache=False,
        pad_token_id=0, eos_token_id=1, **config))
