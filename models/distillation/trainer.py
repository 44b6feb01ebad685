"""Distribution matching distillation, update by update; data, files and devices are elsewhere."""

# B batch, C latent channels, T H W latent frames, rows, columns

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models import sampling
from models.distillation import (
    average,
    draws,
    examples,
    losses,
    method,
    pairs,
    processes,
    roles,
    rollout,
    scores,
    tuner,
)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one student update, with the critic updates after it, looked like.

    Neither loss says how good the student is.
    """

    number: int
    """Counted from 1; only student updates count."""
    student_loss: float
    critic_loss: float
    """Of the last critic update."""
    student_gradient: float
    critic_gradient: float
    """Norms before clipping."""
    score_gap: float
    """Mean |p_fake - p_real|."""
    latent_std: float
    """Of a sample that the student made; grows where it saturates."""
    exit_step: float
    """The mean over the batches."""
    seconds: float


class Stopped(Exception):
    """An update was asked to end between two batches: the next `step` goes on from there."""


@dataclass
class Underway:
    """What is done of an update that was stopped."""

    actions: int = 0
    """None; the student's; then each of the critic's."""
    facts: dict[str, float] = field(default_factory=dict)
    """What the `Update` will say of them; the mean over all processes once it was stopped."""
    norms: dict[str, float] = field(default_factory=dict)
    """Of the gradients."""
    seconds: float = 0.0


def never() -> bool:
    """What a training without a watcher is asked to do."""
    return False


@dataclass(frozen=True)
class _Micro:
    """A batch with its random numbers."""

    batch: examples.Batch
    drawn: draws.Draws


class Trainer:
    """Changes the student and the critic of `nets`; the teacher only answers.

    Which random numbers and examples an update takes depends on the seed and its number alone.
    With torch.distributed every process calls `step` with its share of the networks; `batch` is per
    process then.
    """

    def __init__(
        self,
        how: method.Method,
        *,
        nets: roles.Roles,
        data: examples.Examples,
        device: torch.device | str = "cpu",
        answered: pairs.Pairs | None = None,
        origin: Mapping[str, str | int | None] | None = None,
    ) -> None:
        """`answered` goes with `how.regression`.

        `origin` names what else decides the numbers, such as the teacher's weights: a checkpoint is
        continued with the same only.
        """
        assert (answered is None) == (how.regression is None)
        self.how = how
        self.origin = dict(origin or {})
        self.answered = answered
        self.nets = nets
        self.data = data
        self.device = torch.device(device)
        self.updates = 0
        self.underway = Underway()
        self._asks_to_stop = never
        self.student = tuner.Tuner(nets.student, how.student)
        self.critic = tuner.Tuner(nets.critic, how.critic)
        self.average = (
            average.Average(nets.student.trained, decay=how.ema, start=how.ema_start)
            if how.ema is not None
            else None
        )
        self._levels = sampling.noise_levels(how.denoising_step_list, how.sample_shift)
        for network in nets.networks:
            network.eval()

    def step(self, asks_to_stop: Callable[[], bool] = never) -> Update:
        """One student update, then `ratio` critic updates; or the rest of one that was stopped.

        Raises DivergedError for gradients that are not finite; Stopped where `asks_to_stop` says
        so, which is asked before each batch and answers the same in every process.
        """
        began = time.perf_counter()
        self._asks_to_stop = asks_to_stop
        done = self.underway
        try:
            while done.actions <= self.how.ratio:
                self._act(done)
        except Stopped:
            self._leave(done)
            raise
        finally:
            done.seconds += time.perf_counter() - began
        self.underway = Underway()
        self.updates += 1
        if self.average is not None:
            self.average.update(self.updates)
        facts = processes.mean(done.facts, self.device)
        return Update(number=self.updates, seconds=done.seconds, **facts, **done.norms)

    def _act(self, done: Underway) -> None:
        """The next action of an update."""
        if done.actions == 0:
            done.facts, done.norms["student_gradient"] = self._update_student()
            self._check("student", done.norms["student_gradient"])
            self._mix_critic()
        else:
            loss, norm = self._update_critic(done.actions)
            self._check("critic", norm)
            done.facts["critic_loss"] = loss
            done.norms["critic_gradient"] = norm
        done.actions += 1

    def _leave(self, done: Underway) -> None:
        """An action that was begun is as if it had not been; its batches come again."""
        self.student.forget()
        self.critic.forget()
        if done.actions:
            done.facts = processes.mean(done.facts, self.device)

    def _update_student(self) -> tuple[dict[str, float], float]:
        total: dict[str, float] = {}
        for micro in self._micros(action=0):
            loss, facts = self._student_loss(micro)
            (loss / self.how.accumulate).backward()  # type: ignore[no-untyped-call]  # torch's own
            if self.answered is not None and self.how.regression is not None:
                # After the other term's activations are gone.
                error = self.how.regression * self._error_to(self.answered, micro)
                (error / self.how.accumulate).backward()  # type: ignore[no-untyped-call]
                facts["student_loss"] += float(error.detach())
            for name, value in facts.items():
                total[name] = total.get(name, 0.0) + value / self.how.accumulate
        self.critic.forget()  # SGMD's loss passes through it
        return total, self.student.step()

    def _update_critic(self, action: int) -> tuple[float, float]:
        total = 0.0
        for micro in self._micros(action=action):
            loss = self._critic_loss(micro)
            (loss / self.how.accumulate).backward()  # type: ignore[no-untyped-call]  # torch's own
            total += float(loss.detach()) / self.how.accumulate
        return total, self.critic.step()

    def _student_loss(self, micro: _Micro) -> tuple[Tensor, dict[str, float]]:
        x0_BCTHW, exit_step = self._make(micro)
        sigma = self._score_levels(micro)
        noise_BCTHW = self._noise(micro)
        if self.how.sgmd is None:
            with torch.no_grad():
                noisy = sampling.mix(x0_BCTHW, noise_BCTHW, sigma)
                p_fake = self._predict(self.nets.critic, noisy, sigma, micro.batch)
                p_real = self._predict_guided(noisy, sigma, micro.batch)
                gradient = losses.dmd_gradient(x0_BCTHW, p_fake, p_real)
            loss = losses.dmd(x0_BCTHW, gradient)
        else:
            noisy = sampling.mix(x0_BCTHW, noise_BCTHW, sigma)
            p_fake = self._predict(self.nets.critic, noisy, sigma, micro.batch)
            with torch.no_grad():
                p_real = self._predict_guided(noisy, sigma, micro.batch)
            loss = losses.sgmd(x0_BCTHW, p_fake, p_real, sigma, self.how.sgmd)
        facts = {
            "student_loss": float(loss.detach()),
            "score_gap": float((p_fake.detach() - p_real).abs().mean()),
            "latent_std": float(x0_BCTHW.detach().flatten(1).std(dim=1).mean()),
            "exit_step": float(exit_step),
        }
        return loss, facts

    def _error_to(self, answered: pairs.Pairs, micro: _Micro) -> Tensor:
        """Of the student's velocity on the straight line from a noise to the teacher's answer."""
        numbers = micro.drawn.integers(answered.count).tolist()
        batch, noise, answers = answered.take(numbers, self.data, self.device)
        levels = torch.tensor(self._levels.sigmas)[micro.drawn.integers(len(self._levels))]
        sigma_B = levels.to(self.device)
        noisy = sampling.mix(answers, noise, sigma_B.view(-1, 1, 1, 1, 1))
        student = self.nets.student
        velocity = student.velocity(noisy, sigma_B, batch.context_BSG, batch.condition)
        return losses.flow(velocity, answers, noise)

    def _critic_loss(self, micro: _Micro) -> Tensor:
        with torch.no_grad():
            x0_BCTHW, _ = self._make(micro)
        sigma = self._score_levels(micro)
        noise_BCTHW = self._noise(micro)
        noisy = sampling.mix(x0_BCTHW, noise_BCTHW, sigma)
        batch = micro.batch
        velocity = self.nets.critic.velocity(
            noisy, sigma.flatten(), batch.context_BSG, batch.condition
        )
        loss = losses.flow(velocity, x0_BCTHW, noise_BCTHW)
        return loss if self.how.sgmd is None else 0.5 * loss

    def _make(self, micro: _Micro) -> tuple[Tensor, int]:
        """What the student makes of noise, up to a random step."""
        batch = micro.batch
        exit_step = micro.drawn.exit_step(len(self._levels))
        made = rollout.until(
            exit_step,
            self.nets.student.at(batch.context_BSG, batch.condition),
            self._noise(micro),
            self._levels,
            rule=self.how.rollout,
            draw_noise=lambda: self._noise(micro),
        )
        return made, exit_step

    def _predict(
        self, role: roles.Role, noisy: Tensor, sigma: Tensor, batch: examples.Batch
    ) -> Tensor:
        velocity = role.velocity(noisy, sigma.flatten(), batch.context_BSG, batch.condition)
        return sampling.predict_clean(noisy, velocity, sigma)

    def _predict_guided(self, noisy: Tensor, sigma: Tensor, batch: examples.Batch) -> Tensor:
        velocity = pairs.guided(self.nets.teacher, batch, self.how.guidance)
        return sampling.predict_clean(noisy, velocity(noisy, 1000 * sigma.flatten()), sigma)

    def _score_levels(self, micro: _Micro) -> Tensor:
        """[B, 1, 1, 1, 1]"""
        sigma_B = scores.draw_levels(micro.drawn, self.how).to(self.device)
        return sigma_B.view(-1, 1, 1, 1, 1)

    def _noise(self, micro: _Micro) -> Tensor:
        return micro.drawn.normal(self.data.latent_shape).to(self.device)

    @torch.no_grad()
    def _mix_critic(self) -> None:
        """SenseFlow's implicit distribution alignment."""
        if self.how.ida is None:
            return
        for name, weight in self.critic.trained.items():
            weight.lerp_(self.student.trained[name], 1 - self.how.ida)

    def _micros(self, *, action: int) -> Iterator[_Micro]:
        """The batches of one update; `action` 0 is the student's, 1..ratio are the critic's."""
        how = self.how
        first = (self.updates * (how.ratio + 1) + action) * how.accumulate
        for number in range(first, first + how.accumulate):
            if self._asks_to_stop():
                raise Stopped
            place = draws.Place(
                batch=number,
                first=processes.rank() * how.batch,
                size=how.batch,
                total=processes.count() * how.batch,
            )
            chosen = draws.examples_of(how.seed, place, len(self.data))
            yield _Micro(self.data.batch(chosen, self.device), draws.Draws(how.seed, place))

    def _check(self, who: str, norm: float) -> None:
        if not norm < float("inf"):
            raise tuner.DivergedError(who, self.updates + 1)
