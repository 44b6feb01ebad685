"""Other students: what each changes, and what it shares with the shipped one."""

import pytest

from models.tiny import apprentices, recipes, train, variants, workshop


@pytest.fixture
def shop(tmp_path):
    return workshop.Workshop(tmp_path, recipes.load(), lambda line: None)


@pytest.mark.parametrize("name", variants.CHANGES)
def test_each_variant_changes_what_it_says_and_nothing_else(name, shop):
    base = apprentices.named(shop, "student")
    other = variants.variant(shop, name)
    changed = {
        key: value
        for key, value in variants.CHANGES[name].items()
        if key not in ("updates", "critic_rate", "on_policy")
    }
    assert all(getattr(other.how, key) == value for key, value in changed.items())
    same = {"denoising_step_list", "sample_shift", "ratio", "batch", "ema", "guidance", "seed"}
    for key in same - changed.keys():
        assert getattr(other.how, key) == getattr(base.how, key)
    assert other.output != base.output


def test_a_frozen_critic_learns_nothing_and_no_updates_are_none(shop):
    assert variants.variant(shop, "critic_frozen").how.critic.learning_rate == variants.FROZEN
    assert variants.variant(shop, "reflow_alone").recipe.updates == 0
    assert variants.variant(shop, "no_on_policy").recipe.on_policy is None


@pytest.mark.parametrize(("name", "shares"), [("ida", True), ("seed_2", False)])
def test_only_what_leaves_the_beginning_alone_shares_it(name, shares, shop):
    base = apprentices.named(shop, "student")
    assert (variants.variant(shop, name).start == base.start) == shares


@pytest.mark.parametrize(
    ("main", "words", "told"),
    [
        (train.main, ["--device", "cuda:99"], "--device cuda:99"),
        (train.main, ["--device", "warp"], "--device warp"),
        (variants.main, ["ides"], "no variant 'ides'"),
    ],
)
def test_a_wrong_word_is_told(main, words, told, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), *words])
    assert told in capsys.readouterr().err
