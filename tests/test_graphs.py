"""Forwards recorded when a shape comes again: same results, new inputs in the old places, few kept; CUDA's graphs."""

import pytest
import torch
from golden import error
from graph_recorder import Recorder
from parts import dit_of

from dailies.model.catalog import DEMO, DEMO_SPARSE
from dailies.model.graphs import KEPT, CudaGraphs, Graphed


def inputs(dit, frames=2, words=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    device = dit.latent_scale.device
    latent = torch.randn(1, 16, frames, 8, 8, generator=generator).to(device)
    rows = torch.randn(words, 128, generator=generator).to(device)
    return latent, torch.tensor([100.0 * seed], device=device), dit.embed_text([rows])


@torch.inference_mode()
def test_a_replay_is_of_the_inputs_it_is_given():
    dit, recorder = dit_of(DEMO, DEMO.folder, "cpu", "fp32"), Recorder()
    graphed = Graphed(dit.forward, recorder)
    for seed, words in ((1, 7), (2, 7), (3, 12), (4, 7)):
        given = inputs(dit, words=words, seed=seed)
        assert torch.equal(graphed(*given), dit(*given))
    assert recorder.made == 1                           # texts are padded: one shape


@torch.inference_mode()
def test_a_result_outlives_the_next_replay():
    dit = dit_of(DEMO, DEMO.folder, "cpu", "fp32")
    graphed = Graphed(dit.forward, Recorder())
    graphed(*inputs(dit, seed=3))
    first = graphed(*inputs(dit, seed=1))
    kept = first.clone()
    graphed(*inputs(dit, seed=2))
    assert torch.equal(first, kept)


def test_a_shape_is_recorded_when_it_comes_again_and_the_oldest_recording_goes():
    recorder = Recorder()
    graphed = Graphed(lambda x, pair, nothing: x + pair[0] if nothing is None else x, recorder)
    made = []
    for length in (*range(1, KEPT + 2), 1, 1, *range(2, KEPT + 2), 1):
        x = torch.full((length,), float(length))
        assert torch.equal(graphed(x, (x, x), None), 2 * x)
        made.append(recorder.made)
    firsts, again = [0] * (KEPT + 1), [1, 1, *range(2, KEPT + 2)]
    assert made == [*firsts, *again, KEPT + 2] and len(graphed.recordings) == KEPT


def test_nothing_is_recorded_during_a_pause_but_recordings_are_replayed():
    recorder = Recorder()
    graphed = Graphed(lambda x: 2 * x, recorder)
    one, two = torch.ones(1), torch.ones(2)
    graphed(one), graphed(one)
    with graphed.pause():
        assert torch.equal(graphed(two), 2 * two) and torch.equal(graphed(two), 2 * two)
        graphed(one)
    assert recorder.made == 1 and len(graphed.recordings) == 1
    graphed(two)
    assert recorder.made == 2


def test_set_aside_it_records_nothing_and_holds_nothing():
    recorder = Recorder()
    graphed = Graphed(lambda x: 2 * x, recorder)
    x = torch.ones(3)
    graphed(x), graphed(x)
    with graphed.set_aside():
        assert torch.equal(graphed(x), 2 * x) and not graphed.recordings
    graphed(x)
    assert recorder.made == 2


def test_what_cannot_be_recorded_runs_as_it_is_and_is_said_once(caplog):
    def record(run):
        raise RuntimeError("no room")
    graphed, x = Graphed(lambda x: 2 * x, record), torch.ones(3)
    for _ in range(4):
        assert torch.equal(graphed(x), 2 * x)
    assert [entry.message for entry in caplog.records] == [
        "this shape of clip runs without a CUDA graph, which may be slower: no room"]


def test_a_forward_that_does_not_fit_beside_the_recordings_runs_without_them():
    def forward(x):
        if len(x) > 1 and graphed.recordings:
            raise torch.OutOfMemoryError
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return 2 * x
    recorder = Recorder()
    graphed = Graphed(forward, recorder)
    one, two = torch.ones(1), torch.ones(2)
    graphed(one), graphed(one)
    assert torch.equal(graphed(two), 2 * two) and not graphed.recordings
    assert torch.equal(graphed(one), 2 * one) and recorder.made == 1            # it would be in the way again
    with pytest.raises(torch.OutOfMemoryError):
        graphed(torch.ones(3))


def test_what_cannot_be_copied_is_refused():
    with pytest.raises(TypeError, match="tuples and dataclasses of them; got list"):
        Graphed(lambda x: x, Recorder())([torch.ones(1)])


@pytest.mark.gpu
@pytest.mark.parametrize("card, precision, attention", [
    (DEMO, "bf16", "dense"), (DEMO, "int8", "dense"), (DEMO, "int8", "sage"), (DEMO_SPARSE, "bf16", "sparse")])
@torch.inference_mode()
def test_a_cuda_graph_says_what_the_model_says(card, precision, attention):
    dit = dit_of(card, card.folder, "cuda", precision, attention)
    graphed = Graphed(dit.forward)
    for frames in (2, 13):
        for seed in (1, 2, 3):
            given = inputs(dit, frames, seed=seed)
            assert error(graphed(*given), dit(*given)) < 1e-3


@pytest.mark.gpu
@torch.inference_mode()
def test_recordings_share_their_memory_and_one_that_breaks_off_leaves_the_device_as_it_was():
    record, stream = CudaGraphs(), torch.cuda.current_stream()
    graphed = Graphed(lambda x: (x + 1).square().sum(0), record)
    waits = Graphed(lambda x: x * x.sum().item(), record)
    small, large = (torch.ones(1 << 26, width, device="cuda") for width in (1, 2))
    for x in (large, large, small, small, 2 * large, 2 * small):
        assert torch.equal(graphed(x), (x + 1).square().sum(0))
    assert len(graphed.recordings) == 2 and len(record.alive) == 2
    few = torch.ones(3, device="cuda")
    for _ in range(3):
        assert torch.equal(waits(few), 3 * few) and torch.cuda.current_stream() == stream
    assert waits.refused and torch.equal(graphed(large), (large + 1).square().sum(0))
    with graphed.set_aside():
        pass
    assert not record.alive and torch.equal(graphed(large), (large + 1).square().sum(0)) and len(record.alive) == 1
