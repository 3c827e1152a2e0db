"""The T5 text encoder: a prompt in, one row of numbers per token out; through transformers, from local folders only."""

import json
from pathlib import Path

import torch
import transformers                                     # loads its parts when they are asked for, so not in annotations
from torch import Tensor

from model import checkpoint, keys
from model.weights import CheckpointError, first_line


class T5TextEncoder:
    """A T5 v1.1 encoder and its tokenizer, loaded; calling it only computes.

    Prompts are taken as they are, one at a time and unpadded: a batch would change the last bits of its rows.
    In bf16 the whole module is bf16, residual stream and norms too, as the Linum v2 release runs it.
    """

    def __init__(self, encoder: Path, tokenizer: Path, device: str, *, name: str, precision: str, max_tokens: int,
                 width: int):
        """encoder, tokenizer: folders as transformers saves them.  name: of the model, for messages.
        width: of the rows that the DiT takes.

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
            raise CheckpointError(f"{name}: {encoder} gives rows of {self.model.config.d_model} numbers; "
                                  f"the model takes {width}")
        checkpoint.load(self.model, encoder, keys.T5, name=name, device=device,
                        dtypes=torch.bfloat16 if precision == "bf16" else torch.float32)
        self.model.requires_grad_(False).eval()

    def tokens(self, text: str) -> list[int]:
        """Token ids, the end mark last, which is all there is of an empty text.

        A long text is cut to max_tokens, and keeps the end mark.
        """
        return self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]

    def __call__(self, text: str) -> Tensor:
        """[L, E] on the CPU, 1 <= L <= max_tokens, in the precision it was computed in."""
        return self.rows(self.tokens(text))

    @torch.inference_mode()
    def rows(self, tokens: list[int]) -> Tensor:
        """[L, E] on the CPU, a row per token."""
        return self.model(input_ids=torch.tensor([tokens], device=self.device)).last_hidden_state[0].cpu()


def load_tokenizer(folder: Path, name: str) -> "transformers.PreTrainedTokenizerBase":
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:                          # it raises what its parsers raise
        raise CheckpointError(f"{name}: {folder} does not hold a tokenizer that transformers can read "
                              f"({type(error).__name__}: {first_line(error)})") from error


def read_config(folder: Path, name: str) -> "transformers.T5Config":
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
