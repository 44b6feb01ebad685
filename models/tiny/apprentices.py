"""Distil the tiny teachers to four steps without guidance, by the trainer that real models use.

All students begin with `reflow`; those for text go on with `on_policy`. Then distributions are
matched, and those for images are drawn back towards the teacher.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from models.distillation import examples, export, method, pairs, roles, saving, trainer
from models.tiny import loop, on_policy, recipes, reflow, replay, workshop, world

SAVE_EVERY = 20  # updates
ANSWER_BATCH = 200

NAMES = ("student", "lora", "student_i2v", "lora_i2v")


@dataclass(frozen=True, kw_only=True)
class Apprentice:
    """One student or LoRA: who it is, how it is trained and where it is kept."""

    name: str
    with_images: bool
    recipe: recipes.Student
    how: method.Method
    output: Path
    start: Path
    """What `reflow` made; it may be another's with the same seed."""

    @property
    def file(self) -> Path:
        """What the renderer takes."""
        is_full = self.how.student.weights == "full"
        return self.output / (export.FULL_FILE if is_full else export.LORA_FILE)


def named(shop: workshop.Workshop, name: str) -> Apprentice:
    """`name`: one of NAMES."""
    recipe: recipes.Student = getattr(shop.recipe, name)
    return Apprentice(
        name=name,
        with_images=name.endswith("_i2v"),
        recipe=recipe,
        how=settings(recipe, shop.recipe.seed),
        output=shop.folder / name,
        start=shop.folder / name / "reflow.pt",
    )


def train(shop: workshop.Workshop, who: Apprentice) -> Path:
    """Train it, or go on training; the file that the renderer takes."""
    if who.file.exists():
        return who.file
    recipe, how, with_images = who.recipe, who.how, who.with_images
    teacher = shop.teacher(with_images=with_images)
    nets = roles.of_teacher(teacher, how)
    replay.make_all(nets)
    data = lessons(shop, with_images=with_images)
    answered = pairs.Pairs(
        folder=shop.folder / workshop.named("answers", with_images),
        made_from=workshop.named("teacher", with_images),
        how=how,
        steps=recipe.reflow.teacher_steps,
        count=recipe.reflow.pairs,
    )
    pairs.ask(
        nets.teacher,
        answered,
        data=data,
        batch=ANSWER_BATCH,
        device=shop.device,
        report=lambda done, count: shop.say(f"answers  {done}/{count}"),
    )
    reflow.train(
        nets.student,
        how,
        recipe.reflow,
        data=data,
        answered=answered,
        path=who.start,
        say=shop.say,
        device=shop.device,
    )
    if recipe.on_policy is not None:
        on_policy.train(
            nets,
            how,
            recipe.on_policy,
            data=data,
            answered=answered,
            path=who.output / "on_policy.pt",
            say=shop.say,
            device=shop.device,
        )
    kept = None if how.regression is None else answered
    train = trainer.Trainer(how, nets=nets, data=data, answered=kept, device=shop.device)
    match_distributions(train, who, shop.say)
    assert train.average is not None
    train.average.give()
    draw_back(nets, recipe.share)
    train.average.restart()
    export.write(train, who.output)
    return who.file


def match_distributions(train: trainer.Trainer, who: Apprentice, say: loop.Say) -> None:
    """All updates of the recipe, or those that are left after the last checkpoint."""
    for found in saving.complete(who.output)[-1:]:
        saving.load(train, found)
    updates = who.recipe.updates
    while train.updates < updates:
        update = train.step()
        if update.number % SAVE_EVERY == 0 or update.number == updates:
            saving.save(train, who.output)
            left = (updates - update.number) * update.seconds / 60
            numbers = f"latent std {update.latent_std:.3f}  gap {update.score_gap:.3f}"
            pace = f"{update.seconds:.2f} s/update  {left:.1f} min left"
            say(f"{who.name}  {update.number}/{updates}  {numbers}  {pace}")


@torch.no_grad()
def draw_back(nets: roles.Roles, share: float) -> None:
    """Leave the student this share of what makes it another than the teacher.

    A mean of the weights before and after a training is often better than either (WiSE-FT, arXiv
    2109.01903).
    """
    before = dict(nets.teacher.network.named_parameters())
    for name, weight in nets.student.trained.items():
        if nets.student.adapter is None:
            weight.lerp_(before[name].to(weight.dtype), 1 - share)
        elif name.endswith(".up"):
            weight.mul_(share)


def settings(recipe: recipes.Student, seed: int) -> method.Method:
    student = {"learning_rate": recipe.rate, "betas": (0.0, 0.999), "weight_decay": 0.01}
    critic = student | {"learning_rate": recipe.critic_rate}
    if recipe.rank is not None:
        student |= {"rank": recipe.rank, "alpha": float(recipe.rank)}
    return method.Method(
        denoising_step_list=recipe.denoising_step_list,
        rollout=recipe.rollout,
        student=method.student_tuning(recipe.weights, **student),
        critic=method.critic_tuning("full", **critic),
        guidance=recipe.guidance,
        regression=recipe.regression,
        ratio=recipe.ratio,
        batch=recipe.batch,
        ema=recipe.ema,
        ema_start=0,
        seed=seed,
        gradient_checkpointing=False,
    )


def lessons(shop: workshop.Workshop, *, with_images: bool) -> examples.MemoryExamples:
    """Prompts, and for image-to-video first frames; what follows a first frame is not shown."""
    clips = shop.clips(with_images=with_images)
    dice = loop.dice(shop.recipe.seed, -7)
    contexts = shop.contexts.choose(clips.scenes, dice, empty_share=0.0)
    shape = shop.autoencoder.config.latent_shape(
        num_frames=world.NUM_FRAMES, height=world.SIZE, width=world.SIZE
    )
    return examples.MemoryExamples(
        contexts,
        shop.contexts.empty_SD[None],
        latent_shape=shape,
        y_NCTHW=clips.y.float() if with_images else None,
        image_tokens_NIG=clips.tokens.float() if with_images else None,
    )
