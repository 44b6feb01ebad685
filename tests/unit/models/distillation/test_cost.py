"""What the dry run counts is what a training takes."""

import contextlib
import dataclasses

import pytest
import torch

from models import config
from models.distillation import checkpointing, cost, method

VIDEO = (16, 21, 60, 104)  # latents of 81 frames of 832x480


LORA = method.Method(student=method.student_tuning("lora"), critic=method.critic_tuning("lora"))


def test_the_counts_are_those_of_wan():
    found = cost.estimate(config.WAN_T2V_1_3B, VIDEO, LORA, student_updates=1)
    assert found.parameters == 1_418_996_800
    assert found.tokens == 32_760
    assert found.flops_per_forward == pytest.approx(0.283e15, rel=0.01)


@pytest.mark.parametrize("sizes", [config.WAN_T2V_1_3B, config.WAN_T2V_14B])
def test_flops_of_a_block_are_those_by_hand(sizes):
    """Two per multiply-add: q, k, v, o; q and o for the text; both of the feed-forward net."""
    one, two = (
        cost.estimate(
            dataclasses.replace(sizes, num_layers=count), VIDEO, LORA, student_updates=1
        ).flops_per_forward
        for count in (1, 2)
    )
    dim, length = sizes.dim, 32_760
    matrices = 6 * 2 * dim**2 + 4 * dim * sizes.ffn_dim
    attention = 4 * (length + sizes.text_len) * dim
    assert two - one == pytest.approx(length * (matrices + attention), rel=0.01)


def test_forwards_are_counted_as_they_are_run():
    """Rollout 2.5, critic 1, teacher 2, backward 2, again 1; five times 2.5 + 1 + 2 + 1."""
    assert cost.forwards_per_update(method.Method()) == 8.5 + 5 * 6.5
    assert cost.forwards_per_update(method.Method(gradient_checkpointing=False)) == 35
    assert cost.forwards_per_update(method.Method(guidance=1)) == 40
    assert cost.forwards_per_update(method.Method(regression=1.0)) == 8.5 + 4 + 5 * 6.5
    assert cost.forwards_per_update(LORA) == 7.5 + 5 * 5.5


def test_the_exits_of_an_update_follow_from_the_seed():
    """As in the measured training: 16 forwards in its second and third update, not 15."""
    how = method.Method(ratio=1)
    assert cost.forwards_per_update(how) == 15
    assert [cost.forwards_per_update(how, walked=cost.walked_in(how, n)) for n in (1, 2, 3)] == [
        13,
        16,
        16,
    ]


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_static_bytes_are_those_of_a_real_training(train, how, weights):
    """Of parameters, gradients, optimizer and average, after real updates in fp32."""
    real = train(weights)
    sizes = real.nets.teacher.network.config
    found = cost.estimate(
        sizes, (16, 2, 4, 4), how(weights), student_updates=1, dtype=torch.float32
    ).static_bytes
    assert found["frozen weights"] == sum(
        parameter.nbytes
        for network in real.nets.networks
        for parameter in network.parameters()
        if not parameter.requires_grad
    )
    trained = [*real.student.trained.values(), *real.critic.trained.values()]
    assert found["trained weights"] == sum(weight.nbytes for weight in trained)
    moments = sum(
        tensor.nbytes
        for tuned in (real.student, real.critic)
        for name, tensor in tuned.tensors()
        if name.startswith("exp_")
    )
    assert found["optimizer"] == moments
    assert found["average"] == sum(tensor.nbytes for tensor in real.average.tensors.values())


@contextlib.contextmanager
def keeping(train):
    """What autograd keeps on the processor, beside the weights, by its place in memory."""
    kept, networks = {}, train.nets.networks
    weights = {each.untyped_storage().data_ptr() for net in networks for each in net.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def kept_bytes(kept):
    return sum(storage.nbytes() for storage in kept.values())


def test_activations_are_fewer_with_checkpointing_and_those_of_the_forward_without(train, how):
    """Without checkpointing: what autograd really keeps on the processor."""
    sizes = train().nets.teacher.network.config
    shape = (16, 4, 8, 8)

    def counted(**changes):
        described = how("full", batch=1, **changes)
        return cost.estimate(
            sizes, shape, described, student_updates=1, dtype=torch.float32
        ).activation_bytes

    real = train("full", batch=1)
    batch = next(real._micros(action=0)).batch
    with keeping(real) as kept:
        real.nets.student.velocity(
            torch.randn(1, *shape), torch.ones(1), batch.context_BSG[:1], batch.condition
        )
    everything = counted(gradient_checkpointing=False)
    assert everything == pytest.approx(kept_bytes(kept), rel=0.1)
    assert counted(gradient_checkpointing=True) < 0.75 * everything


@pytest.mark.parametrize(("weights", "again"), [("full", True), ("lora", False)])
def test_sgmd_keeps_the_critics_forward_as_well(train, how, weights, again):
    def real(**changes):
        beginning = train(weights, batch=1, **changes)
        if again:
            for network in beginning.nets.networks:
                checkpointing.checkpoint_blocks(network, beginning.nets.student.switch)
        micro = next(beginning._micros(action=0))
        with keeping(beginning) as kept:
            beginning._student_loss(micro)
        return kept_bytes(kept)

    def counted(**changes):
        return cost.estimate(
            train().nets.teacher.network.config,
            (16, 2, 4, 4),
            how(weights, batch=1, gradient_checkpointing=again, **changes),
            student_updates=1,
            dtype=torch.float32,
        ).activation_bytes

    more = real(sgmd=0.1) - real()
    of_the_loss = 2 * 4 * 16 * 2 * 4 * 4  # two latents, which are not counted
    assert counted(sgmd=0.1) - counted() == pytest.approx(more, rel=0.05, abs=of_the_loss)


def test_processes_share_what_is_kept_but_not_activations(train, how):
    sizes = train().nets.teacher.network.config
    one, four = (
        cost.estimate(sizes, (16, 2, 4, 4), how(), student_updates=1, processes=count)
        for count in (1, 4)
    )
    assert four.activation_bytes == one.activation_bytes
    shared = sum(four.static_bytes.values())
    assert shared == pytest.approx(sum(one.static_bytes.values()) / 4, rel=0.01)
