"""`rushes presets`."""

from typing import Any

import click

from jobs import presets as preset_files
from jobs import settings
from jobs.cli import exits, options, output


@click.group(invoke_without_command=True)
@options.output
@click.pass_context
def presets(ctx: click.Context, as_json: bool) -> int | None:
    """List the presets, or show one."""
    if ctx.invoked_subcommand is None:
        return list_them(as_json)
    return None


@presets.command("list")
@options.output
def list_presets(as_json: bool) -> int:
    """List the presets; exit code 1 when a file cannot be used."""
    return list_them(as_json)


@presets.command("show")
@click.argument("name", metavar="NAME|FILE")
@options.output
def show_preset(name: str, as_json: bool) -> None:
    """Show the look, its file, and keys that have no effect here."""
    found = preset_files.load(name, folder=settings.load().presets_dir)
    if as_json:
        output.emit(_shape(found))
    else:
        _print(found)


def list_them(as_json: bool) -> int:
    folder = settings.load().presets_dir
    preset_files.check_folder(folder)
    found = preset_files.available(folder)
    broken = [entry for entry in found if isinstance(entry, preset_files.BrokenPreset)]
    good = [entry for entry in found if isinstance(entry, preset_files.Preset)]
    if as_json:
        output.emit(
            {
                "presets": [_shape(preset) for preset in good],
                "broken": [
                    {"name": entry.name, "file": str(entry.path), "message": entry.reason}
                    for entry in broken
                ],
            }
        )
    else:
        headers = ("PRESET", "SIZE", "FRAMES", "FPS", "STEPS", "MODEL", "DESCRIPTION")
        output.table(headers, [_row(preset) for preset in good])
    for entry in broken:
        output.note(f"cannot be used: {entry.reason}")
    return exits.ERROR if broken else exits.OK


def _row(preset: preset_files.Preset) -> tuple[str, ...]:
    look = preset.look
    return (
        output.plain(preset.name),
        f"{look.width}x{look.height}",
        str(look.num_frames),
        str(look.fps),
        str(look.num_steps),
        output.cut(look.model_path, 40),
        output.cut(preset.description or "", 80),
    )


def _shape(preset: preset_files.Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "file": str(preset.path),
        "description": preset.description,
        "look_id": preset.look.id,
        "look": preset.look.model_dump(mode="json"),
        "keys_without_effect": dict(preset.keys_without_effect),
    }


def _print(preset: preset_files.Preset) -> None:
    look = preset.look
    seconds = look.num_frames / look.fps
    output.facts(
        [
            ("preset", output.plain(preset.name)),
            ("file", output.plain(str(preset.path))),
            ("description", output.plain(preset.description or "")),
            ("size", f"{look.width}x{look.height}"),
            ("length", f"{look.num_frames} frames at {look.fps} fps: {seconds:.1f} s"),
            ("steps", f"{', '.join(map(str, look.denoising_step_list))} ({look.step_rule})"),
            ("shift", f"{look.sample_shift:g}"),
            ("task", {"t2v": "text to video", "i2v": "image to video"}[look.task]),
            ("model", output.plain(look.model_path)),
            ("weights", output.plain(look.transformer or look.quantization or "")),
            ("LoRA", output.plain(", ".join(use.path for use in look.loras))),
            ("offload", "" if look.offload == "none" else look.offload),
            ("look", look.id),
        ]
    )
    if preset.keys_without_effect:
        output.line("without effect here:")
        rows = [(f"  {output.plain(key)}", why) for key, why in preset.keys_without_effect]
        output.table(("  KEY", "WHY"), rows)
