"""Distil the tiny teachers to four steps without guidance, by the trainer that real models use.

Both kinds of student begin with `reflow`.
"""

from pathlib import Path

from models.distillation import examples, export, method, pairs, roles, saving, trainer
from models.tiny import exam, loop, recipes, reflow, workshop, world

SAVE_EVERY = 20  # updates

NAMES = ("student", "lora", "student_i2v", "lora_i2v")


def train(shop: workshop.Workshop, name: str) -> Path:
    """Train `name` of NAMES, or go on training; the file that the renderer takes."""
    with_images = name.endswith("_i2v")
    recipe = shop.recipe.student if name.startswith("student") else shop.recipe.lora
    output = shop.folder / name
    relative = export.FULL_FILE if recipe.weights == "full" else export.LORA_FILE
    if (output / relative).exists():
        return output / relative
    how = settings(recipe, shop.recipe.seed)
    teacher = shop.teacher(with_images=with_images)
    nets = roles.of_teacher(teacher, how)
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
        batch=exam.BATCH,
        report=lambda done, count: shop.say(f"answers  {done}/{count}"),
    )
    reflow.train(
        nets.student,
        how,
        recipe.reflow,
        data=data,
        answered=answered,
        path=output / "reflow.pt",
        say=shop.say,
    )
    train = trainer.Trainer(how, nets=nets, data=data, answered=answered)
    for found in saving.complete(output)[-1:]:
        saving.load(train, found)
    while train.updates < recipe.updates:
        update = train.step()
        if update.number % SAVE_EVERY == 0 or update.number == recipe.updates:
            saving.save(train, output)
            left = (recipe.updates - update.number) * update.seconds / 60
            numbers = f"latent std {update.latent_std:.3f}  gap {update.score_gap:.3f}"
            pace = f"{update.seconds:.2f} s/update  {left:.1f} min left"
            shop.say(f"{name}  {update.number}/{recipe.updates}  {numbers}  {pace}")
    export.write(train, output)
    return output / relative


def settings(recipe: recipes.Student, seed: int) -> method.Method:
    student = {"learning_rate": recipe.rate, "betas": (0.0, 0.999), "weight_decay": 0.01}
    critic = student | {"learning_rate": recipe.critic_rate}
    if recipe.rank is not None:
        student |= {"rank": recipe.rank, "alpha": float(recipe.rank)}
    return method.Method(
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
    shape = shop.autoencoder.latent_shape(
        num_frames=world.NUM_FRAMES, height=world.SIZE, width=world.SIZE
    )
    return examples.MemoryExamples(
        contexts,
        shop.contexts.empty_SD[None],
        latent_shape=shape,
        y_NCTHW=clips.y.float() if with_images else None,
        image_tokens_NIG=clips.tokens.float() if with_images else None,
    )
