"""Other students than the shipped one: `python -m models.tiny.variants FOLDER [NAME ...]`.

Seeds say how much of a mark is luck; each of the others leaves something out or adds a term, and
most leave out `on_policy` as well: they compare with `no_on_policy`. They need the teacher and the
autoencoder in FOLDER and are kept in FOLDER/variants; all are marked on the same held-back prompts.
"""

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch

from models.tiny import apprentices, exam, teacher, train, workshop

SEEDS = (2, 3, 4, 5)
CLIPS = 240
FROZEN = 1e-12  # a learning rate: the critic stays a copy of the teacher

NO_ON_POLICY: Mapping[str, Any] = {"on_policy": None}  # its rounds would hide the difference

CHANGES: Mapping[str, Mapping[str, Any]] = {
    **{f"seed_{seed}": {"seed": seed} for seed in SEEDS},
    "no_distribution_matching": {"updates": 0},
    "no_on_policy": NO_ON_POLICY,
    "reflow_alone": {**NO_ON_POLICY, "updates": 0},
    "no_regression": {**NO_ON_POLICY, "regression": None},
    "critic_frozen": {**NO_ON_POLICY, "regression": None, "critic_rate": FROZEN},
    "no_guidance": {**NO_ON_POLICY, "guidance": 1.0},
    "ida": {**NO_ON_POLICY, "ida": 0.95},
    "sgmd": {**NO_ON_POLICY, "sgmd": 0.1},
}


def variant(shop: workshop.Workshop, name: str) -> apprentices.Apprentice:
    """`name`: one of CHANGES. What leaves the start as it is begins where the student began."""
    base = apprentices.named(shop, "student")
    changes = dict(CHANGES[name])
    of_method = {key: changes.pop(key) for key in ("seed", "ida", "sgmd") if key in changes}
    recipe = dataclasses.replace(base.recipe, **changes)
    how = apprentices.settings(recipe, shop.recipe.seed)
    output = shop.folder / "variants" / name
    starts_alike = "seed" not in of_method and "guidance" not in changes
    return dataclasses.replace(
        base,
        name=name,
        recipe=recipe,
        how=dataclasses.replace(how, **of_method),
        output=output,
        start=base.start if starts_alike else output / "reflow.pt",
    )


@torch.no_grad()
def mark(shop: workshop.Workshop, who: apprentices.Apprentice) -> Mapping[str, float]:
    """Marks of a student of full weights on the exam's prompts."""
    network = teacher.new(shop.recipe.transformer.text_to_video, shop.recipe.seed)
    weights = safetensors.torch.load_file(who.file)
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    network.eval().requires_grad_(requires_grad=False)
    decoder = copy.deepcopy(shop.autoencoder).cpu()
    asked = exam.paper(shop.text_encoder, decoder, count=CLIPS, seed=11)
    sampler = exam.Sampler(steps=who.how.denoising_step_list, step_rule=who.how.rollout)
    return exam.take(network, decoder, asked, sampler)[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m models.tiny.variants", description=__doc__)
    train.add_options(parser)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CHANGES))
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(CHANGES))
    if unknown:
        parser.error(f"no variant {unknown[0]!r}; there are {', '.join(CHANGES)}")
    shop = train.opened(parser, options)
    rows = {}
    for name in options.names or CHANGES:
        who = variant(shop, name)
        apprentices.train(shop, who)
        rows[name] = mark(shop, who)
        path = who.output / "marks.json"
        path.write_text(json.dumps(dict(rows[name]), indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(exam.table(rows) + "\n")


if __name__ == "__main__":
    main()
