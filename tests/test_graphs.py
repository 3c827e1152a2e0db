"""Forwards recorded per shape: the same results, new inputs in the old places, few kept; on a GPU, CUDA's graphs."""

import pytest
import torch

from golden import error
from graph_recorder import Recorder
from model.catalog import DEMO, DEMO_SPARSE
from model.graphs import KEPT, Graphed


def inputs(dit, frames=2, words=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    device = dit.latent_scale.device
    latent = torch.randn(1, 16, frames, 8, 8, generator=generator).to(device)
    rows = torch.randn(words, 128, generator=generator).to(device)
    return latent, torch.tensor([100.0 * seed], device=device), dit.embed_text([rows])


@torch.inference_mode()
def test_a_replay_is_of_the_inputs_it_is_given():
    dit, recorder = DEMO.dit(DEMO.folder, "cpu", "fp32"), Recorder()
    graphed = Graphed(dit.forward, recorder)
    for seed, words in ((1, 7), (2, 7), (3, 12)):
        given = inputs(dit, words=words, seed=seed)
        assert torch.equal(graphed(*given), dit(*given))
    assert recorder.made == 1                           # texts are padded: one shape


@torch.inference_mode()
def test_a_result_outlives_the_next_replay():
    dit = DEMO.dit(DEMO.folder, "cpu", "fp32")
    graphed = Graphed(dit.forward, Recorder())
    first = graphed(*inputs(dit, seed=1))
    kept = first.clone()
    graphed(*inputs(dit, seed=2))
    assert torch.equal(first, kept)


def test_each_shape_has_its_recording_and_the_oldest_goes():
    recorder = Recorder()
    graphed = Graphed(lambda x, pair, nothing: x + pair[0] if nothing is None else x, recorder)
    for length in (1, 2, 1, 2, 3, 3, 1):
        x = torch.full((length,), float(length))
        assert torch.equal(graphed(x, (x, x), None), 2 * x)
    assert recorder.made == 4 and len(graphed.recordings) == KEPT


def test_set_aside_it_records_nothing_and_holds_nothing():
    recorder = Recorder()
    graphed = Graphed(lambda x: 2 * x, recorder)
    x = torch.ones(3)
    graphed(x)
    with graphed.set_aside():
        assert torch.equal(graphed(x), 2 * x) and not graphed.recordings
    graphed(x)
    assert recorder.made == 2


def test_what_cannot_be_copied_is_refused():
    with pytest.raises(TypeError, match="tuples and dataclasses of them; got list"):
        Graphed(lambda x: x, Recorder())([torch.ones(1)])


@pytest.mark.gpu
@pytest.mark.parametrize("card, precision, attention", [
    (DEMO, "bf16", "dense"), (DEMO, "int8", "dense"), (DEMO, "int8", "sage"), (DEMO_SPARSE, "bf16", "sparse")])
@torch.inference_mode()
def test_a_cuda_graph_says_what_the_model_says(card, precision, attention):
    dit = card.dit(card.folder, "cuda", precision, attention)
    graphed = Graphed(dit.forward)
    for frames in (2, 13):
        for seed in (1, 2, 3):
            given = inputs(dit, frames, seed=seed)
            assert error(graphed(*given), dit(*given)) < 1e-3
