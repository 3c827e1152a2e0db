"""Guidance of LTX-2: what the prompt, the blocks' attention and the other stream add to a prediction, for each stream
on its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

# the evaluations of one step, in the vendor's order
COND, UNCONDITIONAL, PERTURBED, ISOLATED = "cond", "unconditional", "perturbed", "isolated"


@dataclass(frozen=True, kw_only=True)
class StreamGuide:
    """How far the prediction of one stream is moved away from those that lack something. All of it neutral: not."""

    text: float = 1.0                                   # from the one by the negative prompt
    perturbed: float = 0.0                              # from the one whose self-attention in `blocks` is the identity
    blocks: tuple[int, ...] = ()
    isolated: float = 1.0                               # from the one of a stream that does not hear of the other
    rescale: float = 0.0                                # how far the standard deviation is brought back, 0 to 1

    @property
    def wants(self) -> frozenset[str]:
        """The evaluations that it takes beside the prompt's own."""
        wanted = {UNCONDITIONAL: self.text != 1, PERTURBED: self.perturbed != 0 and bool(self.blocks),
                  ISOLATED: self.isolated != 1}
        return frozenset(name for name, is_wanted in wanted.items() if is_wanted)

    def __call__(self, predicted: Mapping[str, Tensor]) -> Tensor:
        """The guided prediction.

        predicted: by evaluation, the stream without noise, fp32, all of one shape; those that it wants, and `cond`.
        The statistics are of the whole tensor, as the vendor takes them.
        """
        cond, guided = predicted[COND], predicted[COND]
        shares = {UNCONDITIONAL: self.text - 1, PERTURBED: self.perturbed, ISOLATED: self.isolated - 1}
        for name in (UNCONDITIONAL, PERTURBED, ISOLATED):
            if name in self.wants:
                guided = guided + shares[name] * (cond - predicted[name])
        if self.rescale and self.wants:
            guided = guided * (self.rescale * cond.std() / guided.std() + 1 - self.rescale)
        return guided


NEUTRAL = StreamGuide()
