"""What the stages of the tiny training share: a folder, a recipe, and networks made on demand."""

from functools import cached_property
from pathlib import Path

import torch

from models import image_encoder, text_encoder, transformer, vae
from models.tiny import autoencoder, clips, loop, recipes, teacher, words, world


class Workshop:
    """Networks of one folder; each is trained, or read, when it is first asked for.

    All but the text encoder are on the device.
    """

    def __init__(
        self,
        folder: Path,
        recipe: recipes.Recipe,
        say: loop.Say,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder = folder
        self.recipe = recipe
        self.say = say
        self.device = torch.device(device)

    @cached_property
    def autoencoder(self) -> vae.WanVAE:
        return autoencoder.train(
            self.recipe.autoencoder,
            self.recipe.seed,
            path=self.folder / "autoencoder.pt",
            say=self.say,
            device=self.device,
        )

    @cached_property
    def text_encoder(self) -> text_encoder.TextEncoder:
        return words.encoder(self.recipe.seed, self.folder / "tokenizer")

    @cached_property
    def image_tower(self) -> image_encoder.ImageEncoder:
        return clips.image_tower(self.recipe.seed).to(self.device)

    @cached_property
    def contexts(self) -> words.Contexts:
        return words.Contexts(self.text_encoder, world.trained(world.scenes()))

    def clips(self, *, with_images: bool) -> clips.Clips:
        recipe = self.recipe.clips
        return clips.prepare(
            self.autoencoder,
            count=recipe.image_to_video if with_images else recipe.text_to_video,
            seed=self.recipe.seed + with_images,
            passing_share=recipe.passing_share,
            tower=self.image_tower if with_images else None,
            path=self.folder / f"{named('clips', with_images)}.pt",
            say=self.say,
        )

    def teacher(self, *, with_images: bool) -> transformer.WanTransformer:
        name = named("teacher", with_images)
        sizes = self.recipe.transformer
        if with_images:
            base = self.teacher(with_images=False)
            start = teacher.for_images(base, sizes.image_to_video, self.recipe.seed)
        else:
            start = teacher.new(sizes.text_to_video, self.recipe.seed)
        return teacher.train(
            start.to(self.device),
            self.recipe.image_to_video if with_images else self.recipe.text_to_video,
            self.recipe.seed,
            data=self.clips(with_images=with_images),
            contexts=self.contexts,
            path=self.folder / f"{name}.pt",
            say=self.say,
            name=name,
        )


def named(what: str, with_images: bool) -> str:
    return f"{what}_i2v" if with_images else what
