"""A tiny student: the teacher's answers, straight lines to them, and what it does by itself."""

import dataclasses
import itertools

import pytest
import torch

from models import sampling
from models.distillation import examples, method, pairs, roles, tensor_files, trainer
from models.tiny import apprentices, loop, on_policy, recipes, reflow, teacher, words

SMALL = recipes.Transformer(dim=32, ffn_dim=48, num_heads=2, num_layers=1)
RECIPE = recipes.Reflow(pairs=6, teacher_steps=10, steps=60, batch=4, rate=1e-2)
OWN = recipes.OnPolicy(
    rounds=2, states=20, collect_batch=8, teacher_steps=20, steps=15, batch=8, rate=1e-2
)
SHAPE = (16, 2, 4, 4)


@pytest.fixture
def data():
    made = torch.Generator().manual_seed(2)
    contexts = torch.randn(6, words.TEXT_LEN, 64, generator=made)
    negative = torch.randn(1, words.TEXT_LEN, 64, generator=made)
    return examples.MemoryExamples(contexts, negative, latent_shape=SHAPE)


def begun(weights):
    network = teacher.new(SMALL.text_to_video, 0)
    torch.nn.init.normal_(network.head.head.weight, std=0.1)
    student = method.student_tuning(weights)
    how = method.Method(student=student, guidance=2.0, batch=4, gradient_checkpointing=False)
    return roles.of_teacher(network.eval(), how), how


def answers(nets, how, data, folder, *, batch=6):
    wanted = pairs.Pairs(
        folder=folder, made_from="a", how=how, steps=RECIPE.teacher_steps, count=RECIPE.pairs
    )
    pairs.ask(nets.teacher, wanted, data=data, batch=batch, report=lambda done, count: None)
    return wanted


def latents(answered, data):
    return answered.take(range(6), data, torch.device("cpu"))[2]


def train(nets, how, data, answered, path):
    reflow.train(
        nets.student,
        how,
        RECIPE,
        data=data,
        answered=answered,
        path=path,
        say=lambda line: None,
    )


def error(nets, how, data, answered):
    """Of what the student sees in pure noise."""
    batch, noise, answers_ = answered.take(range(6), data, torch.device("cpu"))
    with torch.no_grad():
        velocity = nets.student.velocity(noise, torch.ones(6), batch.context_BSG, None)
    return (noise - velocity - answers_).square().mean()


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_a_student_that_is_drawn_back_keeps_a_share_of_what_it_learnt(weights):
    nets, _ = begun(weights)
    layer = nets.student.network.blocks[0].self_attn.q
    x = torch.randn(3, 32)

    def difference():
        with torch.no_grad(), nets.student.switched():
            ours = layer(x)
        with torch.no_grad(), nets.teacher.switched():
            return ours - nets.teacher.network.blocks[0].self_attn.q(x)

    with torch.no_grad():
        for parameter in nets.student.trained.values():
            parameter.add_(torch.randn(parameter.shape))
    learnt = difference()
    assert learnt.norm() > 1
    apprentices.draw_back(nets, 1.0)
    torch.testing.assert_close(difference(), learnt)
    apprentices.draw_back(nets, 0.3)
    torch.testing.assert_close(difference(), 0.3 * learnt)


def test_an_answer_is_the_guided_teachers_whatever_its_batch(data, tmp_path):
    nets, how = begun("full")
    made = answers(nets, how, data, tmp_path / "whole")
    whole = latents(made, data)
    two = answers(nets, how, data, tmp_path / "two", batch=2)
    torch.testing.assert_close(latents(two, data), whole)
    batch = data.batch([3], torch.device("cpu"))

    def velocity(latents, timestep):
        told, untold = (
            nets.teacher.at(context, None)(latents, timestep)
            for context in (batch.context_BSG, batch.negative_BSG)
        )
        return untold + 2 * (told - untold)

    levels = sampling.noise_levels(range(1000, 0, -100), 5.0)
    _, noise, _ = made.take([3], data, torch.device("cpu"))
    alone = sampling.denoise(velocity, noise, levels, step_rule="euler")
    torch.testing.assert_close(whole[3:4], alone)


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_a_student_comes_nearer_to_the_answers_and_the_teacher_stays(weights, data, tmp_path):
    nets, how = begun(weights)
    answered = answers(nets, how, data, tmp_path / "answers")
    before = error(nets, how, data, answered)
    train(nets, how, data, answered, tmp_path / "reflow.pt")
    assert error(nets, how, data, answered) < 0.9 * before
    again = answers(nets, how, data, tmp_path / "again")
    assert torch.equal(latents(again, data), latents(answered, data))


@pytest.mark.parametrize("steps", [1, 3, 30, 300])
def test_an_answer_takes_as_many_steps_as_were_asked_for(steps, data, tmp_path):
    nets, how = begun("full")
    calls = []
    nets.teacher.network.register_forward_hook(lambda *_: calls.append(1))
    asked = pairs.Pairs(folder=tmp_path, made_from="a", how=how, steps=steps, count=1)
    pairs.ask(nets.teacher, asked, data=data, batch=1, report=lambda done, count: None)
    assert len(calls) == 2 * steps


def test_answers_are_made_once_and_those_to_other_questions_are_others(data, tmp_path):
    nets, how = begun("full")
    made = answers(nets, how, data, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(files) == 6
    lost = made.path(4)
    lost.unlink()
    answers(nets, how, data, tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in files if path != lost}
    assert lost.exists()
    assert kept == {path: time for path, time in files.items() if path != lost}
    other = answers(nets, dataclasses.replace(how, guidance=3.0), data, tmp_path)
    assert not torch.equal(latents(other, data), latents(made, data))


def test_answers_to_the_noise_of_another_seed_are_others(data, tmp_path):
    nets, how = begun("full")
    answers(nets, how, data, tmp_path)
    other = dataclasses.replace(how, seed=how.seed + 1)
    alone = answers(nets, other, data, tmp_path / "alone")
    beside = answers(nets, other, data, tmp_path)
    assert torch.equal(latents(beside, data), latents(alone, data))


def test_regression_moves_the_student_towards_the_answers(data, tmp_path):
    """The very same updates with a large weight of it end nearer, and nearer than they began."""
    errors, before = [], []
    for weight in (1e-9, 30.0):
        nets, how = begun("full")
        how = dataclasses.replace(
            how,
            regression=weight,
            student=method.student_tuning("full", learning_rate=3e-3),
            ratio=1,
            guidance=2.0,
        )
        answered = answers(nets, how, data, tmp_path / "answers")
        before.append(error(nets, how, data, answered))
        train = trainer.Trainer(how, nets=nets, data=data, answered=answered)
        for _ in range(12):
            train.step()
        errors.append(error(nets, how, data, answered))
    assert errors[1] < 0.9 * errors[0]
    assert errors[1] < 0.9 * before[1]


def test_a_beginning_that_was_stopped_goes_on_to_the_same_numbers(data, tmp_path, monkeypatch):
    nets, how = begun("lora")
    answered = answers(nets, how, data, tmp_path / "answers")
    train(nets, how, data, answered, tmp_path / "straight.pt")
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    flow = reflow.losses.flow
    calls = []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return flow(*arguments)

    monkeypatch.setattr(reflow.losses, "flow", stop)
    stopped, _ = begun("lora")
    with pytest.raises(KeyboardInterrupt):
        train(stopped, how, data, answered, tmp_path / "stopped.pt")
    resumed, _ = begun("lora")
    train(resumed, how, data, answered, tmp_path / "stopped.pt")
    assert len(calls) == 60 + 1
    for name, weight in nets.student.trained.items():
        assert torch.equal(resumed.student.trained[name], weight)


def gone_on(nets, how, data, answered, folder, say=lambda line: None):
    on_policy.train(
        nets, how, OWN, data=data, answered=answered, path=folder / "on_policy.pt", say=say
    )


def collect(nets, how, data, folder, turn=0):
    path = folder / "states.safetensors"
    device = torch.device("cpu")
    return on_policy.collect(
        nets, how, OWN, turn=turn, data=data, path=path, say=lambda line: None, device=device
    )


@pytest.mark.parametrize("rule", sampling.STEP_RULES)
def test_a_state_is_the_students_and_its_answer_the_teachers_from_there(rule, data, tmp_path):
    nets, how = begun("lora")
    how = dataclasses.replace(how, rollout=rule)
    reflowed(nets, how, data, tmp_path)
    there = collect(nets, how, data, tmp_path)
    assert there.steps_N.tolist() == [1] * 3 + [2] * 6 + [3] * 11
    levels = sampling.noise_levels(how.denoising_step_list, how.sample_shift)
    fine = sampling.noise_levels(range(1000, 0, -50), how.sample_shift)
    for row in (0, 5, 19):
        batch = data.batch([int(there.numbers_N[row])], torch.device("cpu"))
        gone = int(there.steps_N[row])
        sigma = levels.sigmas[gone]
        onward = [sigma, *(level for level in fine.sigmas if level < sigma), 0.0]
        latents = there.latents_NCTHW[row : row + 1]
        for level, after in itertools.pairwise(onward):
            told, untold = (
                nets.teacher.velocity(latents, torch.tensor([level]), context, None)
                for context in (batch.context_BSG, batch.negative_BSG)
            )
            latents = latents - (level - after) * (untold + 2 * (told - untold)).detach()
        torch.testing.assert_close(there.answers_NCTHW[row : row + 1], latents)
    # The first state: one step of the student from the very noise.
    generator = loop.generator(how.seed, -1)
    numbers = torch.randint(len(data), (3,), generator=generator)
    noise = torch.randn((3, *SHAPE), generator=generator)
    batch = data.batch(numbers.tolist(), torch.device("cpu"))
    velocity = nets.student.velocity(noise, torch.ones(3), batch.context_BSG, None)
    stepped = noise - (1 - levels.sigmas[1]) * velocity
    if rule == "renoise":
        fresh = torch.randn((3, *SHAPE), generator=generator)
        stepped = sampling.mix(noise - velocity, fresh, levels.sigmas[1])
    torch.testing.assert_close(there.latents_NCTHW[:3], stepped.detach())


@pytest.mark.parametrize(("weights", "share"), [("full", 0.8), ("lora", 0.95)])
def test_a_student_learns_where_the_teacher_ends_from_its_own_states(
    weights, share, data, tmp_path
):
    nets, how = begun(weights)
    answered = reflowed(nets, how, data, tmp_path)
    there = collect(nets, how, data, tmp_path)
    before = error_at(nets, how, data, there)
    gone_on(nets, how, data, answered, tmp_path / "own")
    assert error_at(nets, how, data, there) < share * before


@pytest.mark.parametrize("kept_at", [10, 20])
def test_rounds_that_were_stopped_go_on_to_the_same_numbers(kept_at, data, tmp_path, monkeypatch):
    """Also from a checkpoint of the round before: the states of both are there."""
    nets, how = begun("full")
    answered = reflowed(nets, how, data, tmp_path)
    gone_on(nets, how, data, answered, tmp_path / "straight")
    stopped, _ = begun("full")
    reflowed(stopped, how, data, tmp_path)
    set_rate, calls = loop.set_rate, []

    def stop(*arguments):
        calls.append(arguments)
        monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0 if len(calls) == kept_at else 1e6)
        if len(calls) == 25:  # in the second round
            raise KeyboardInterrupt
        set_rate(*arguments)

    monkeypatch.setattr(on_policy.loop, "set_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        gone_on(stopped, how, data, answered, tmp_path / "stopped")
    resumed, _ = begun("full")
    lines = []
    gone_on(resumed, how, data, answered, tmp_path / "stopped", lines.append)
    assert not any(line.startswith("states") for line in lines)
    assert len(calls) == 25 + 30 - kept_at
    for name, weight in nets.student.trained.items():
        assert torch.equal(resumed.student.trained[name], weight)


def reflowed(nets, how, data, folder):
    answered = answers(nets, how, data, folder / "answers")
    train(nets, how, data, answered, folder / f"{how.student.weights}.pt")
    return answered


def test_a_student_is_taught_the_straight_way_from_where_it_stands(data, tmp_path, monkeypatch):
    """(where it is - the end) / its level, by hand; a quarter are noises and their answers."""
    nets, how = begun("full")
    answered = answers(nets, how, data, tmp_path / "answers")
    normal = torch.Generator().manual_seed(5)
    x, ends = torch.randn((2, 20, *SHAPE), generator=normal)
    steps, places = torch.arange(20) % 3 + 1, torch.arange(20) % 6
    there = on_policy.States(x, ends, steps, places)
    tensor_files.save(dataclasses.asdict(there), tmp_path / "on_policy_states_0.safetensors")
    taught = []

    def learn(_role, error, **_options):
        taught.append(float(error(0).detach()))

    monkeypatch.setattr(on_policy.learning, "learn", learn)
    gone_on(nets, how, data, answered, tmp_path)
    generator = loop.generator(how.seed, 0)
    rows = torch.randint(20, (6,), generator=generator).tolist()
    drawn = torch.randint(6, (2,), generator=generator).tolist()
    _, noise, made = answered.take(drawn, data, torch.device("cpu"))
    states = [(x[row], ends[row], int(steps[row]), int(places[row])) for row in rows]
    states += [(*each, 0, number) for *each, number in zip(noise, made, drawn, strict=True)]
    assert {gone for _, _, gone, _ in states} == {0, 1, 2, 3}
    assert any(drawn)
    expected = 0.0
    for latents_, end, gone, place in states:
        sigma = [1, 0.9375, 5 / 6, 0.625][gone]
        batch = data.batch([place], torch.device("cpu"))
        asked = latents_[None], torch.tensor([sigma]), batch.context_BSG, None
        told = nets.student.velocity(*asked).detach()
        expected += float((told - (latents_ - end) / sigma).square().mean()) / len(states)
    assert taught == [pytest.approx(expected, rel=1e-4)]


def error_at(nets, how, data, there):
    levels = sampling.noise_levels(how.denoising_step_list, how.sample_shift)
    sigma = torch.tensor(levels.sigmas)[there.steps_N]
    batch = data.batch(there.numbers_N.tolist(), torch.device("cpu"))
    with torch.no_grad():
        velocity = nets.student.velocity(there.latents_NCTHW, sigma, batch.context_BSG, None)
    clean = there.latents_NCTHW - sigma.view(-1, 1, 1, 1, 1) * velocity
    return (clean - there.answers_NCTHW).square().mean()
