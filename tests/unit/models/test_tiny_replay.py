"""Replayed forwards: what a graph overwrites is not needed any more, and a wrong graph is not used.

There is no GPU: `capture` stands for torch's, with one place for inputs and one for outputs.
"""

import pytest
import torch
from torch import nn

from models.distillation import adapters
from models.tiny import replay


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.layer(x)).square()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network()


class Graph(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph, *_weights):
        ctx.graph = graph
        graph.output.copy_(graph.plain(graph.input) + graph.error)
        return graph.output.detach()

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            made = ctx.graph.plain(ctx.graph.input)
            return None, *torch.autograd.grad(made, ctx.graph.weights, gradient)


class Captured:
    def __init__(self, network, sample, error):
        self.plain = network.forward
        self.weights = tuple(network.parameters())
        self.input = sample[0].clone()
        self.output = torch.zeros_like(self.plain(sample[0]).detach())
        self.error = error

    def __call__(self, x):
        self.input = x.detach().clone()
        return Graph.apply(self, *self.weights)


@pytest.fixture
def captures(monkeypatch):
    """Shapes of what was captured; `error` is what a graph computes too much."""
    found = []

    def capture(network, sample, *, allow_unused_input):
        found.append(sample[0].shape)
        network.forward = Captured(network, sample, capture.error)

    capture.error = 0.0
    found_and_capture = (found, capture)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    return found_and_capture


def replayed(network, switch=None):
    network.forward = replay.Replay(network, network.forward, switch)
    return network


def test_two_forwards_before_a_backward_keep_their_gradients(network, captures):
    first, second = torch.randn(2, 4, 3)
    wanted = torch.autograd.grad(
        network(first).sum() + 2 * network(second).sum(), list(network.parameters())
    )
    replayed(network)
    made = network(first).sum() + 2 * network(second).sum()
    found = torch.autograd.grad(made, list(network.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert len(captures[0]) == 2


@torch.no_grad()
def test_a_result_stays_when_the_graph_is_replayed(network, captures):
    first, second = torch.randn(2, 4, 3)
    wanted = network(first), network(second)
    replayed(network)
    found = network(first), network(second)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    network(torch.randn(5, 3))
    assert captures[0] == [(4, 3), (5, 3)]


@torch.no_grad()
def test_a_graph_that_computes_something_else_is_not_used(network, captures):
    captures[1].error = 1e-3
    x = torch.randn(4, 3)
    wanted = network(x)
    replayed(network)
    assert torch.equal(network(x), wanted)
    assert torch.equal(network(x), wanted)
    assert len(captures[0]) == 1


@torch.no_grad()
def test_what_no_graph_may_hold_is_computed_as_usual(network, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    x = torch.randn(4, 3)
    wanted = network(x)
    assert torch.equal(replayed(network)(x), wanted)


@torch.no_grad()
def test_each_lora_has_a_graph_of_its_own(network, captures):
    switch = adapters.Switch()
    replayed(network, switch)
    network(torch.randn(4, 3))
    with switch.using("student"):
        network(torch.randn(4, 3))
    network(torch.randn(4, 3))
    assert len(captures[0]) == 2


def test_a_gradient_of_the_inputs_is_computed_as_usual(network, captures):
    replayed(network)
    x = torch.randn(4, 3, requires_grad=True)
    network(x).sum().backward()
    assert x.grad is not None
    assert captures[0] == []


def test_nothing_changes_on_a_processor(network):
    replay.make(network)
    assert not isinstance(network.forward, replay.Replay)
