"""The T5 text encoder: a prompt in, one row of numbers per token out; through transformers, from local folders only."""

import json
from pathlib import Path

import torch
import transformers
from torch import Tensor

from model import checkpoint, keys
from model.weights import CheckpointError, first_line


class T5TextEncoder:
    """A T5 v1.1 encoder and its tokenizer, loaded; calling it only computes.

    Prompts are taken as they are, one at a time and unpadded: a batch would change the last bits of its rows.
    In bf16 the whole module is bf16, residual stream and norms too, as the Linum v2 release runs it.
    """

    def __init__(self, encoder: Path, tokenizer: Path, device: str, *, name: str, precision: str, max_tokens: int, width: int):
        """encoder, tokenizer: folders as transformers saves them.  name: of the model, for messages.  width: rows the DiT takes.

        Raises CheckpointError for folders that do not hold such a model.
        """
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.device, self.max_tokens = device, max_tokens
        self.tokenizer = load_tokenizer(tokenizer, name)
        with torch.device("meta"):
            self.model = transformers.T5EncoderModel(read_config(encoder, name))
        self.model.encoder.embed_tokens = self.model.shared             # one tensor, whatever the config says of tying
        if self.model.config.d_model != width:
            raise CheckpointError(f"{name}: {encoder} gives rows of {self.model.config.d_model} numbers; the model takes {width}")
        checkpoint.load(self.model, encoder, keys.T5, name=name, device=device,
                        dtypes=torch.bfloat16 if precision == "bf16" else torch.float32)
        self.model.requires_grad_(False).eval()

    def tokens(self, text: str) -> list[int]:
        """Token ids, the end mark last; a long text is cut to max_tokens, the end mark kept. An empty text is the end mark alone."""
        return self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]

    @torch.inference_mode()
    def __call__(self, text: str) -> Tensor:
        """[L, E] on the CPU, 1 <= L <= max_tokens, in the precision it was computed in."""
        ids = torch.tensor([self.tokens(text)], device=self.device)
        return self.model(input_ids=ids).last_hidden_state[0].cpu()


def load_tokenizer(folder: Path, name: str) -> transformers.PreTrainedTokenizerBase:
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:                          # it raises what its parsers raise
        raise CheckpointError(f"{name}: {folder} does not hold a tokenizer that transformers can read "
                              f"({type(error).__name__}: {first_line(error)})") from error


def read_config(folder: Path, name: str) -> transformers.T5Config:
    try:
        said = json.loads((folder / "config.json").read_text())
        if said["model_type"] != "t5":
            raise ValueError(f"model_type is {said['model_type']!r}")
        config = transformers.T5Config(**said)
    except Exception as error:                          # the config class checks its own values, with its own errors
        raise CheckpointError(f"{name}: {folder / 'config.json'} is not the config of a T5 encoder "
                              f"({type(error).__name__}: {first_line(error)})") from error
    config._attn_implementation = "eager"               # softmax in fp32, as the release runs it
    return config
