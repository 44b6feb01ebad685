"""What an update does to the three networks."""

import dataclasses

import pytest
import torch

from models.distillation import checkpointing, cost, losses, precision, roles, trainer, tuner

MODES = [("full", "full"), ("lora", "lora"), ("lora", "full"), ("full", "lora")]


def weights(tuned):
    return {name: weight.detach().clone() for name, weight in tuned.trained.items()}


def changed(before, tuned):
    return any(not torch.equal(before[name], weight) for name, weight in tuned.trained.items())


def micro_of(train, action=0):
    return next(train._micros(action=action))


@pytest.mark.parametrize("student", ["full", "lora"])
def test_at_the_beginning_without_guidance_there_is_nothing_to_learn(train, student):
    """Student, critic and teacher are one: loss and gradient are exactly zero."""
    beginning = train(student, guidance=1)
    loss, facts = beginning._student_loss(micro_of(beginning))
    loss.backward()
    assert loss == 0
    assert facts["score_gap"] == 0
    assert all(not weight.grad.any() for weight in beginning.student.trained.values())


def test_at_the_beginning_guidance_is_all_there_is_to_learn(train, monkeypatch):
    """gradient = -g (cond - uncond) / norm, with g = guidance - 1."""
    beginning = train(guidance=4)
    seen = {}

    def spy(x0, gradient):
        seen.update(x0=x0.detach(), gradient=gradient)
        return (x0 * gradient).sum()

    monkeypatch.setattr(losses, "dmd", spy)
    micro = micro_of(beginning)
    beginning._student_loss(micro)

    again = micro_of(beginning)
    x0, _ = beginning._make(again)
    assert torch.equal(x0, seen["x0"])
    sigma, noise = beginning._score_levels(again), beginning._noise(again)
    noisy = (1 - sigma) * x0 + sigma * noise
    teacher, batch = beginning.nets.teacher, again.batch
    cond = noisy - sigma * teacher.velocity(noisy, sigma.flatten(), batch.context_BSG, None)
    uncond = noisy - sigma * teacher.velocity(noisy, sigma.flatten(), batch.negative_BSG, None)
    real = cond + 3 * (cond - uncond)
    norm = losses.per_sample_mean((x0 - real).abs())
    torch.testing.assert_close(seen["gradient"], -3 * (cond - uncond) / norm, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("student", "critic"), MODES)
def test_each_network_moves_in_its_own_update_only(train, student, critic):
    beginning = train(student, critic)
    teacher = beginning.nets.teacher
    frozen = {
        name: tensor.clone()
        for name, tensor in teacher.network.state_dict().items()
        if ".adapters." not in name
    }
    of_student, of_critic = weights(beginning.student), weights(beginning.critic)
    beginning._update_student()
    assert changed(of_student, beginning.student)
    assert not changed(of_critic, beginning.critic)
    of_student = weights(beginning.student)
    beginning._update_critic(1)
    assert not changed(of_student, beginning.student)
    assert changed(of_critic, beginning.critic)
    now = teacher.network.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
    assert all(
        parameter.grad is None
        for name, parameter in teacher.network.named_parameters()
        if ".adapters." not in name
    )


@pytest.mark.parametrize(("sgmd", "factor"), [(None, 1.0), (0.1, 0.5)])
def test_the_critic_learns_the_velocity_to_what_the_student_makes(train, sgmd, factor):
    beginning = train(sgmd=sgmd)
    loss = beginning._critic_loss(micro_of(beginning, 1))
    micro = micro_of(beginning, 1)
    x0, _ = beginning._make(micro)
    sigma, noise = beginning._score_levels(micro), beginning._noise(micro)
    noisy = (1 - sigma) * x0 + sigma * noise
    made = beginning.nets.critic.velocity(noisy, sigma.flatten(), micro.batch.context_BSG, None)
    expected = factor * (made - (noise - x0)).square().mean()
    torch.testing.assert_close(loss.detach(), expected.detach())


def test_sgmds_passage_through_the_critic_leaves_it_as_it_was(train):
    beginning = train(sgmd=0.1)
    of_critic, of_student = weights(beginning.critic), weights(beginning.student)
    beginning._update_student()
    assert not changed(of_critic, beginning.critic)
    assert changed(of_student, beginning.student)
    assert all(weight.grad is None for weight in beginning.critic.trained.values())


def test_one_student_update_brings_ratio_critic_updates(train, monkeypatch):
    beginning = train(ratio=5)
    actions = []
    for who in ("student", "critic"):
        tuned = getattr(beginning, who)
        monkeypatch.setattr(tuned, "step", lambda who=who: actions.append(who) or 1.0)
    assert beginning.step().number == 1
    assert actions == ["student"] + 5 * ["critic"]
    assert beginning.updates == 1


def test_forwards_of_an_update_are_what_the_cost_model_counts(train, monkeypatch):
    """exit + 1 of the student, one critic, two teacher; then exit + 1 and one per critic update."""
    beginning = train(ratio=3)
    counts = dict.fromkeys(("student", "teacher", "critic"), 0)

    def count(_module, _inputs, *, name):
        counts[name] += 1

    for name in counts:
        network = getattr(beginning.nets, name).network
        network.register_forward_pre_hook(lambda *given, name=name: count(*given, name=name))
    exits = [micro_of(beginning, action).drawn.exit_step(4) for action in range(4)]
    assert cost.walked_in(beginning.how, 1) == sum(exits) + 4
    beginning.step()
    assert counts == {"student": sum(exits) + 4, "teacher": 2, "critic": 1 + 3}


@pytest.mark.parametrize("who", ["student", "critic"])
def test_accumulated_batches_count_as_one(train, who):
    """The gradient of an update, and what is told of it, is the mean over its batches."""
    beginning = train(accumulate=3, batch=1)
    trained = list(getattr(beginning, who).trained.values())
    sums = [torch.zeros_like(weight) for weight in trained]
    mean_loss = 0.0
    for micro in beginning._micros(action=1 if who == "critic" else 0):
        if who == "critic":
            loss = beginning._critic_loss(micro)
        else:
            loss, _ = beginning._student_loss(micro)
        mean_loss += float(loss.detach()) / 3
        for total, gradient in zip(sums, torch.autograd.grad(loss, trained), strict=True):
            total += gradient / 3
    norm = torch.stack([total.norm() for total in sums]).norm()
    if who == "critic":
        told, made = beginning._update_critic(1)
    else:
        facts, made = beginning._update_student()
        told = facts["student_loss"]
    assert made == pytest.approx(float(norm), rel=1e-5)
    assert told == pytest.approx(mean_loss, rel=1e-5)


def test_no_two_actions_draw_the_same(train):
    beginning = train(ratio=2, accumulate=2, batch=1)
    drawn = []
    for beginning.updates in range(2):
        for action in range(3):
            drawn += [float(each.drawn.normal((1,))) for each in beginning._micros(action=action)]
    assert len(set(drawn)) == len(drawn) == 12


def test_a_gradient_is_clipped_and_weights_decay(how):
    """w (1 - rate decay) - rate sign(gradient): Adam's first step."""
    tuning = dataclasses.replace(how().student, learning_rate=0.1, weight_decay=0.5, clip=2.0)
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    tuned = tuner.Tuner(roles.Role(torch.nn.Identity(), {"w": weight}), tuning)
    weight.grad = torch.tensor([3.0, -4.0])
    assert tuned.step() == pytest.approx(5.0)
    moments = dict(tuned.tensors())
    torch.testing.assert_close(moments["exp_avg.w"], torch.tensor([1.2, -1.6]))  # betas[0] is 0
    torch.testing.assert_close(weight.detach(), torch.tensor([0.85, 2.0]))


@pytest.mark.parametrize("student", ["full", "lora"])
@pytest.mark.parametrize("sgmd", [None, 0.1])
def test_gradient_checkpointing_changes_no_gradient(train, student, sgmd):
    plain, checkpointed = train(student, sgmd=sgmd), train(student, sgmd=sgmd)
    for network in checkpointed.nets.networks:
        checkpointing.checkpoint_blocks(network, checkpointed.nets.student.switch)
    for each in (plain, checkpointed):
        each._student_loss(micro_of(each))[0].backward()
        each._critic_loss(micro_of(each, 1)).backward()
    for who in ("student", "critic"):
        for name, weight in getattr(plain, who).trained.items():
            other = getattr(checkpointed, who).trained[name]
            assert weight.grad is not None
            torch.testing.assert_close(weight.grad, other.grad, rtol=1e-6, atol=1e-8)


def test_the_average_follows_its_formula(train):
    """A copy until `ema_start`, then decay * average + (1 - decay) * student."""
    beginning = train(ema=0.9, ema_start=1)
    beginning.step()
    expected = weights(beginning.student)
    assert all(torch.equal(beginning.average.tensors[name], expected[name]) for name in expected)
    for _ in range(2):
        beginning.step()
        now = beginning.student.trained
        expected = {name: 0.9 * expected[name] + 0.1 * now[name].detach() for name in expected}
    for name, tensor in beginning.average.tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_ida_moves_the_critic_towards_the_student(train):
    """After its update, before the critic's own."""
    beginning = train(ida=0.97)
    of_critic = weights(beginning.critic)
    beginning._act(beginning.underway)
    of_student = weights(beginning.student)
    for name, weight in beginning.critic.trained.items():
        expected = 0.97 * of_critic[name] + 0.03 * of_student[name]
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("student", ["full", "lora"])
def test_image_to_video_shows_all_three_networks_the_same_condition(train, monkeypatch, student):
    beginning = train(student, image=True)
    seen = []

    def record(_module, inputs):
        joined, _, context, tokens = inputs
        seen.append((joined[:, 16:].clone(), tokens.clone(), context.clone()))

    for network in beginning.nets.networks:
        network.register_forward_pre_hook(record)
    micro = micro_of(beginning)
    beginning._student_loss(micro)
    condition, batch = micro.batch.condition, micro.batch
    assert all(torch.equal(y, condition.y_BCTHW) for y, _, _ in seen)
    assert all(torch.equal(tokens, condition.image_tokens_BIG) for _, tokens, _ in seen)
    contexts = [context for _, _, context in seen]
    assert torch.equal(contexts[-1], batch.negative_BSG), "the second of the teacher"
    assert all(torch.equal(context, batch.context_BSG) for context in contexts[:-1])


def test_a_gradient_that_is_not_finite_ends_the_training_and_changes_nothing(train):
    beginning = train()
    with torch.no_grad():
        beginning.nets.critic.network.head.head.weight.fill_(float("inf"))
    before = weights(beginning.critic)
    with pytest.raises(tuner.DivergedError, match=r"critic is not finite in update 1"):
        beginning.step()
    assert not changed(before, beginning.critic)


def test_lora_students_start_as_the_teacher_to_the_bit(train):
    beginning = train("lora")
    noise, sigma = torch.randn(2, 16, 2, 4, 4), torch.tensor([1.0, 0.625])
    context = torch.randn(2, 6, 16)
    student, teacher = (
        role.velocity(noise, sigma, context, None)
        for role in (beginning.nets.student, beginning.nets.teacher)
    )
    assert torch.equal(student, teacher)


@pytest.mark.parametrize(("student", "critic"), MODES)
def test_each_network_is_prepared_before_the_next_is_read(teacher, how, student, critic):
    """Then main memory holds one at a time."""
    happened, base = [], teacher()

    def start(name):
        happened.append(f"read {name}")
        return teacher()

    def prepare(network, switch):
        happened.append("prepared" if network is not base else f"teacher {switch is not None}")

    roles.of_teacher(base, how(student, critic), start=start, prepare=prepare)
    full = [name for name, kind in (("student", student), ("critic", critic)) if kind == "full"]
    expected = [f"teacher {'lora' in (student, critic)}"]
    for name in full:
        expected += [f"read {name}", "prepared"]
    assert happened == expected


def test_student_and_critic_of_one_base_do_not_see_each_other(train):
    beginning = train("lora")
    beginning._update_critic(1)
    noise, sigma = torch.randn(2, 16, 2, 4, 4), torch.tensor([1.0, 0.625])
    context = torch.randn(2, 6, 16)
    nets = beginning.nets
    student, teacher, critic = (
        role.velocity(noise, sigma, context, None)
        for role in (nets.student, nets.teacher, nets.critic)
    )
    assert torch.equal(student, teacher)
    assert not torch.equal(critic, teacher)


def test_rounded_weights_compute_as_the_renderers_bf16_network(teacher):
    """To the bit, and the gradient arrives in fp32."""
    from models import transformer

    masters = teacher()
    rendered = teacher()
    for name, parameter in rendered.named_parameters():
        parameter.data = parameter.data.to(transformer.parameter_dtype(name, torch.bfloat16))
    precision.compute_in_bf16(masters)
    inputs = torch.randn(2, 16, 2, 4, 4), torch.tensor([900.0, 30.0]), torch.randn(2, 6, 16)
    made = masters(*inputs)
    assert torch.equal(made, rendered(*inputs))
    made.sum().backward()
    gradients = [parameter.grad for parameter in masters.parameters()]
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_each_lora_begins_as_its_own_tuning_and_layer_say(teacher, how):
    asked = how("lora")
    asked = dataclasses.replace(asked, critic=dataclasses.replace(asked.critic, rank=2))
    nets = roles.of_teacher(teacher(), asked)
    for role, rank in ((nets.student, 4), (nets.critic, 2)):
        down = [weight.detach() for name, weight in role.trained.items() if name.endswith("down")]
        assert {len(each) for each in down} == {rank}
        assert len({float(each[0, 0]) for each in down}) == len(down)


def test_a_copy_of_a_teacher_in_bf16_has_wide_weights_and_computes_as_it(teacher, how):
    from models import transformer

    narrow = teacher()
    for name, parameter in narrow.named_parameters():
        parameter.data = parameter.data.to(transformer.parameter_dtype(name, torch.bfloat16))
    nets = roles.of_teacher(narrow, how())
    for role in (nets.student, nets.critic):
        assert {weight.dtype for weight in role.trained.values()} == {torch.float32}
    inputs = torch.randn(2, 16, 2, 4, 4), torch.tensor([0.9, 0.03]), torch.randn(2, 6, 16), None
    with torch.no_grad():
        made = [role.velocity(*inputs) for role in (nets.student, nets.teacher, nets.critic)]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[2], made[1])


def test_a_student_makes_its_samples_by_the_rule_that_will_render_it(train):
    euler, renoise = (train(rollout=rule) for rule in ("euler", "renoise"))
    steps = []
    for action in range(3):
        (one, exit_step), (other, _) = (
            each._make(micro_of(each, action)) for each in (euler, renoise)
        )
        assert torch.equal(one, other) is (exit_step == 0)
        steps.append(exit_step)
    assert any(steps)


def test_three_networks_of_any_kind_can_be_trained(data, how):
    """The trainer asks nothing of a network but its call."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Conv3d(16, 16, 1)

        def forward(self, latents, timestep_B, *_text_and_image):
            return self.mix(latents) + timestep_B.view(-1, 1, 1, 1, 1) / 1000

    nets = roles.of_networks(Net(), Net(), Net())
    update = trainer.Trainer(how(), nets=nets, data=data()).step()
    assert update.number == 1
    assert update.score_gap > 0
