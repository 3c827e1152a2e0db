"""T5 and umT5 text encoders: a prompt in, a row of numbers per token out; by transformers, from local files only."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers                                     # loads its parts when they are asked for, so not in annotations
from torch import Tensor

from kernels import cpu
from model import checkpoint, keys
from model.weights import CheckpointError, first_line


class T5TextEncoder:
    """A T5 v1.1 encoder and its tokenizer, loaded; calling it only computes.

    Prompts are taken as they are, one at a time and unpadded: a batch would change the last bits of its rows.
    In bf16 the whole module is bf16, residual stream and norms too, as the Linum v2 and Wan releases run it.
    """

    family = "T5"
    tables = (keys.T5,)

    def __init__(self, encoder: Path, tokenizer: Path, device: str, *, name: str, precision: str, max_tokens: int,
                 width: int, config: Mapping[str, Any] | None = None):
        """encoder, tokenizer: folders as transformers saves them.  name: of the model, for messages.
        width: of the rows that the DiT takes.  config: of an encoder that is one file and says nothing of itself.

        Raises CheckpointError for folders that do not hold such a model.
        """
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.device, self.max_tokens = device, max_tokens
        self.tokenizer = load_tokenizer(tokenizer, name)
        with torch.device("meta"):
            self.model = self.describe(encoder, config, name)
        self.model.encoder.embed_tokens = self.model.shared             # one tensor, whatever the config says of tying
        if self.model.config.d_model != width:
            raise CheckpointError(f"{name}: {encoder} gives rows of {self.model.config.d_model} numbers; "
                                  f"the model takes {width}")
        self.load(encoder, name, cpu.dtype_of(precision, device))
        self.model.requires_grad_(False).eval()

    def load(self, encoder: Path, name: str, dtype: torch.dtype) -> None:
        """The weights onto the device.  Raises CheckpointError."""
        checkpoint.load(self.model, encoder, *self.tables, name=name, device=self.device, dtypes=dtype)

    def describe(self, encoder: Path, config: Mapping[str, Any] | None, name: str) -> "transformers.PreTrainedModel":
        try:
            return new_encoder(self.family, config or json.loads((encoder / "config.json").read_text()))
        except Exception as error:                      # the config class checks its own values, with its own errors
            raise CheckpointError(f"{name}: {encoder / 'config.json'} is not the config of a {self.family} encoder "
                                  f"({type(error).__name__}: {first_line(error)})") from error

    def tokens(self, text: str) -> list[int]:
        """Token ids, the end mark last, which is all there is of an empty text.

        A long text is cut to max_tokens, and keeps the end mark.
        """
        return self.tokenizer(self.prepared(text), truncation=True, max_length=self.max_tokens)["input_ids"]

    def cut(self, text: str) -> int:
        """How many tokens of the text do not fit."""
        return max(0, len(self.tokenizer(self.prepared(text), verbose=False)["input_ids"]) - self.max_tokens)

    def prepared(self, text: str) -> str:
        """The text as the tokenizer gets it."""
        return text

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


def load_tokenizer(folder: Path, name: str) -> "transformers.PreTrainedTokenizerBase":
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:                          # it raises what its parsers raise
        raise CheckpointError(f"{name}: {folder} does not hold a tokenizer that transformers can read "
                              f"({type(error).__name__}: {first_line(error)})") from error


def new_encoder(family: str, said: Mapping[str, Any]) -> "transformers.PreTrainedModel":
    """A T5 or umT5 encoder of these fields of transformers' config.  Raises what that class raises, and KeyError."""
    if said["model_type"] != family.lower():
        raise ValueError(f"model_type is {said['model_type']!r}")
    make_config, make_model = {"T5": (transformers.T5Config, transformers.T5EncoderModel),
                               "umT5": (transformers.UMT5Config, transformers.UMT5EncoderModel)}[family]
    config = make_config(**said)
    config._attn_implementation = "eager"               # softmax in fp32, as the releases run it
    return make_model(config)


def new_t5(**config: int) -> "transformers.T5EncoderModel":
    """A T5 v1.1 encoder with random weights, to be trained.  config: fields of transformers.T5Config."""
    return transformers.T5EncoderModel(transformers.T5Config(
        feed_forward_proj="gated-gelu", dropout_rate=0.0, is_encoder_decoder=False, use_cache=False,
        pad_token_id=0, eos_token_id=1, **config))


def new_tokenizer(sentences: list[str], *, pieces: int, folder: Path) -> None:
    """Train a byte-pair tokenizer with T5's special tokens: pad 0, end 1, which is appended, unknown 2.

    AutoTokenizer can load what it leaves in `folder`.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))        # unigram's pruning would leave few whole words
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(sentences, trainers.BpeTrainer(
        vocab_size=pieces, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789.,:'-")))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                                unk_token="<unk>")
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(str(folder))
