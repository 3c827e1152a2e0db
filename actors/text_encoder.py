"""The actor that turns prompts into embeddings."""

import gc
from collections import OrderedDict
from pathlib import Path

import torch

from dailies.actors.actor import Actor
from dailies.actors.determinism import class_on
from dailies.actors.messages import Embedding, Request
from dailies.model.card import ModelCard
from dailies.model.family import family_of
from dailies.model.runtime import Runtime
from dailies.model.samplers import Streams


class TextEncoder(Actor):
    """Requests in, Embeddings out; one text encoder on one device. Threads may call it side by side."""

    takes_turns = False                                 # with a sampler on its GPU: a prompt takes 20 ms, a step longer

    def __init__(self, card: ModelCard, weights: Path, on: Runtime | None = None, *, remember: int = 32):
        """on: by default the model's own on a CPU.  remember: texts kept encoded.  Raises CheckpointError."""
        on = on or card.runtime()
        torch.set_num_threads(on.threads)
        self.device, self.determinism = on.device, class_on(on.device, threads=on.threads)
        self.model = family_of(card).load_encoder(card, weights, on)
        self.remember = remember
        self.recent: OrderedDict[str, Streams] = OrderedDict()         # the negative prompt is mostly the same

    def __call__(self, batch: list[Request]) -> list[Embedding]:
        return [self.embed(request) for request in batch]

    def embed(self, request: Request) -> Embedding:
        return Embedding(request=request, prompt=self.encode(request.prompt),
                         negative=self.encode(request.negative_prompt), fallbacks=self.cuts(request),
                         determinism=(self.determinism,))

    def cuts(self, request: Request) -> tuple[str, ...]:
        """What of the request's texts the model does not read."""
        with self.lock:                                 # a tokenizer does not bear two threads
            cuts = {"prompt": self.model.cut(request.prompt),
                    "negative prompt": self.model.cut(request.negative_prompt)}
        return tuple(f"{name} cut to {self.model.max_tokens} tokens, {tokens} left out"
                     for name, tokens in cuts.items() if tokens)

    def encode(self, text: str) -> Streams:
        """[L, E] on the CPU for each stream that is told by text."""
        with self.lock:
            if text not in self.recent:
                self.recent[text] = self.model.encode(text)
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
