"""The presets: each can be read, and those of the web service are there."""

from collections.abc import Iterator

from jobs import errors, presets, settings
from jobs.doctor import checks


def check(config: settings.Settings) -> Iterator[checks.Check]:
    try:
        presets.check_folder(config.presets_dir)
    except errors.FileUnusable as error:
        yield checks.fail(
            "presets", str(error), "make the folder, correct the setting or remove it"
        )
        return
    found = presets.available(config.presets_dir)
    broken = [entry for entry in found if isinstance(entry, presets.BrokenPreset)]
    for entry in broken:
        yield checks.warn(f"preset {entry.name}", entry.reason, "correct or remove the file")
    for problem in presets.problems_of(config.default_presets, folder=config.presets_dir):
        advice = "name a preset that is there: the web service does not start"
        yield checks.fail("default preset", problem.message, advice)
    if not broken:
        yield checks.ok("presets", ", ".join(preset.name for preset in found))
