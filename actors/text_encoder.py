"""The actor that turns prompts into embeddings."""

import gc
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from dailies.actors.determinism import class_on
from dailies.actors.device_lock import NO_LOCK
from dailies.actors.messages import Embedding, Request
from dailies.model.catalog import ModelCard


class TextEncoder:
    """Requests in, Embeddings out; one text encoder on one device. Making it loads; calling it only computes.

    Threads may call it side by side.
    """

    lock = NO_LOCK                                      # the worker's
    takes_turns = False                                 # with a sampler on its GPU: a prompt takes 20 ms, a step longer

    def __init__(self, card: ModelCard, weights: Path, device: str = "cpu", *, precision: str | None = None,
                 threads: int = 1, remember: int = 32):
        """threads: torch's, for the whole process; fixed, since the last bits of a result may depend on it.
        remember: texts kept encoded.

        Raises CheckpointError.
        """
        torch.set_num_threads(threads)
        self.device, self.determinism = device, class_on(device, threads=threads)
        self.model = card.text_encoder(weights, device, precision)
        self.remember = remember
        self.recent: OrderedDict[str, Tensor] = OrderedDict()          # the negative prompt is mostly the same

    def __call__(self, batch: list[Request]) -> list[Embedding]:
        return [self.embed(request) for request in batch]

    def embed(self, request: Request) -> Embedding:
        return Embedding(request=request, prompt={"video": self.encode(request.prompt)},
                         negative={"video": self.encode(request.negative_prompt)}, fallbacks=self.cuts(request),
                         determinism=(self.determinism,))

    def cuts(self, request: Request) -> tuple[str, ...]:
        """What of the request's texts the model does not read."""
        with self.lock:                                 # a tokenizer does not bear two threads
            cuts = {"prompt": self.model.cut(request.prompt),
                    "negative prompt": self.model.cut(request.negative_prompt)}
        return tuple(f"{name} cut to {self.model.max_tokens} tokens, {tokens} left out"
                     for name, tokens in cuts.items() if tokens)

    def encode(self, text: str) -> Tensor:
        """[L, E] on the CPU."""
        with self.lock:
            if text not in self.recent:
                self.recent[text] = self.model(text)
                if len(self.recent) > self.remember:
                    self.recent.popitem(last=False)
            self.recent.move_to_end(text)
            return self.recent[text]

    def release(self) -> None:
        """Give the memory back at once; the actor is of no use afterwards."""
        del self.model
        self.recent.clear()
        gc.collect()                                    # transformers' modules refer to each other in circles
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
