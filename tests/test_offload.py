"""Layers whose weights wait in host memory and come in turn: the same bits as of layers that stay."""

from copy import deepcopy

import pytest
import torch

from dailies.model.offload import LayersInTurn


def through(layers, x):
    for layer in layers:
        x = layer(x)
    return x


@pytest.mark.parametrize("count", [1, 2, 5])
def test_of_layers_in_turn_two_are_there_at_a_time_and_a_forward_that_was_broken_off_disturbs_none(count):
    stay = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.LayerNorm(6)) for _ in range(count))
    come, x, seen = deepcopy(stay).requires_grad_(False), torch.randn(3, 6), []
    turn = LayersInTurn(come, "cpu")
    waiting = {host.data_ptr() for pairs in turn.pairs for _, host in pairs}
    for place, layer in enumerate(come):
        layer[0].register_forward_hook(lambda module, *_, place=place: seen.append(
            (place, module.weight.data_ptr() in waiting, len(turn.there))))
    want = through(stay, x)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(through(come, x), want)
        through(come[:1], x)
        assert torch.equal(through(come, x), want)
    assert {(waits, there) for _, waits, there in seen} == {(False, min(2, count))}
    assert [place for place, *_ in seen] == [*range(count)] * 2 + [0] + [*range(count)]
    for (name, before), after in zip(stay.state_dict().items(), come.state_dict().values(), strict=True):
        assert torch.equal(before, after), name


@pytest.mark.gpu
def test_on_a_gpu_layers_in_turn_come_from_pinned_memory_and_make_the_same_bits():
    stay = torch.nn.ModuleList(torch.nn.Linear(512, 512, bias=False) for _ in range(7)).requires_grad_(False)
    come, x = deepcopy(stay), torch.randn(2048, 512, device="cuda")
    turn, want = LayersInTurn(come, "cuda"), through(stay.cuda(), x)
    torch.cuda.reset_peak_memory_stats()
    used = torch.cuda.memory_allocated()
    with torch.inference_mode():
        for _ in range(20):
            assert torch.equal(through(come, x), want)
    assert come[3].weight.is_cpu and come[3].weight.is_pinned() and len(turn.there) == 1
    assert torch.cuda.max_memory_allocated() - used <= 3 * stay[0].weight.nbytes + 4 * x.nbytes
