"""Presets: LightX2V's files load as they are, and nothing that decides the picture is ignored."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs import errors, presets

ROOT = Path(__file__).resolve().parents[3]
LIGHTX2V = {
    "infer_steps": 4,
    "target_video_length": 81,
    "text_len": 512,
    "target_height": 480,
    "target_width": 832,
    "self_attn_1_type": "flash_attn3",
    "cross_attn_1_type": "flash_attn3",
    "cross_attn_2_type": "flash_attn3",
    "sample_guide_scale": 6,
    "sample_shift": 5,
    "enable_cfg": False,
    "cpu_offload": False,
    "denoising_step_list": [1000, 750, 500, 250],
}
OFF = {
    "lora_configs": None, "lora_path": [], "dit_quantized": False, "use_tae": False,
    "feature_caching": "NoCaching", "mm_config": {"mm_type": "Default"},
    "model_cls": "wan2.1_distill", "enable_dynamic_cfg": False, "dit_original_ckpt": "",
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Write a preset file; returns its path as text."""

    def write(content: Any, name: str = "mine.json") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture
def fault(write):
    """What is wrong with a preset of this content."""

    def fault(content: Any, name: str = "mine.json") -> str:
        path = write(content, name)
        with pytest.raises(errors.PresetError) as caught:
            presets.load(path)
        assert str(caught.value).startswith(f"{path}: ")
        return str(caught.value).removeprefix(f"{path}: ")

    return fault


def tiny(**changes: Any) -> presets.Look:
    return presets.Look.model_validate(presets.load("tiny").look.model_dump() | changes)


def is_preset_or_told(path: Path) -> bool:
    """It loads, or a PresetError says what is wrong with this file."""
    try:
        return presets.load(str(path)).look.num_steps >= 1
    except errors.PresetError as error:
        return str(error).startswith(f"{path}: ")


class TestShippedPresets:
    def test_every_shipped_preset_loads(self):
        found = presets.available()
        assert {preset.name for preset in found} == {"tiny", "wan_t2v_distill_4step_cfg"}
        assert [p for p in found if isinstance(p, presets.BrokenPreset)] == []

    def test_the_distilled_wan_preset_is_lightx2vs(self):
        look = presets.load("wan_t2v_distill_4step_cfg").look
        assert look.model_dump() == {
            "task": "t2v",
            "model_path": "Wan2.1-T2V-14B",
            "denoising_step_list": (1000, 750, 500, 250),
            "step_rule": "euler",
            "sample_shift": 5.0,
            "width": 832,
            "height": 480,
            "num_frames": 81,
            "fps": 16,
        }
        assert look.num_steps == 4

    def test_the_tiny_preset_is_small(self):
        look = presets.load("tiny.json").look
        assert (look.width, look.height, look.num_frames, look.fps) == (64, 64, 17, 8)
        assert look.model_path == "tiny"

    def test_an_id_never_changes(self):
        """Queued jobs and result folders carry these ids."""
        assert presets.load("tiny").look.id == "32c19b5938250002"


class TestLook:
    def test_equal_looks_have_equal_ids_however_they_were_written(self):
        assert tiny(sample_shift=5, model_path="tiny/").id == tiny(sample_shift=5.0).id

    @pytest.mark.parametrize(
        "changes",
        [
            {"step_rule": "renoise"},
            {"fps": 9},
            {"width": 80},
            {"denoising_step_list": [999, 750, 500, 250]},
            {"sample_shift": 5.000001},
            {"model_path": "Tiny"},
        ],
    )
    def test_each_field_is_part_of_the_id(self, changes):
        assert tiny(**changes).id != tiny().id

    def test_a_spec_survives_json_with_its_id(self):
        spec = presets.RenderSpec(look=tiny(), prompt="猫", negative_prompt=None, seed=2**63 - 1)
        for again in (
            presets.RenderSpec.model_validate_json(spec.model_dump_json()),
            presets.RenderSpec.model_validate(json.loads(spec.model_dump_json())),
        ):
            assert again == spec
            assert again.look.id == spec.look.id

    def test_a_look_cannot_be_changed(self):
        with pytest.raises(ValidationError):
            tiny().width = 80  # type: ignore[misc]  # that it is frozen is the point

    @pytest.mark.parametrize("seed", [-1, 2**63])
    def test_a_seed_fits_both_databases(self, seed):
        with pytest.raises(ValidationError):
            presets.RenderSpec(look=tiny(), prompt="a", negative_prompt=None, seed=seed)


class TestLookFor:
    def test_without_wishes_it_is_the_presets_own(self):
        preset = presets.load("tiny")
        assert preset.look_for() is preset.look

    def test_a_row_changes_what_it_asks_for_only(self):
        look = presets.load("tiny").look_for(width=96, num_frames=9)
        assert look == tiny(width=96, num_frames=9)

    @pytest.mark.parametrize(
        ("wishes", "part"),
        [
            ({"width": 833}, "width must be a multiple of 16 from 16 to 2048, got 833: 832 or 848"),
            ({"height": 5}, "height must be a multiple of 16 from 16 to 2048, got 5: 16 would do"),
            ({"height": 10**9}, "2048 would do"),
            ({"num_frames": 80}, "num_frames must be 4n+1"),
            ({"num_frames": 80}, "got 80: 77 or 81 would do"),
            ({"num_frames": 10**9}, "481 would do"),
            ({"fps": 0}, "fps must be from 1 to 120, got 0: 1 would do"),
        ],
    )
    def test_the_message_names_the_number_that_would_do(self, wishes, part):
        with pytest.raises(ValueError, match=r"would do") as caught:
            presets.load("tiny").look_for(**wishes)
        assert part in str(caught.value)

    def test_all_wrong_wishes_are_told_at_once(self):
        with pytest.raises(ValueError, match=r"^width .*; num_frames "):
            presets.load("tiny").look_for(width=1, num_frames=2)

    @given(st.integers(-(10**6), 10**6))
    def test_a_number_that_would_do_does(self, number):
        preset = presets.load("tiny")
        for field in ("width", "num_frames"):
            try:
                preset.look_for(**{field: number})
            except ValueError as error:
                good = str(error).rpartition(": ")[2].removesuffix(" would do").split(" or ")
                for hint in good:
                    preset.look_for(**{field: int(hint)})


class TestFramesForSeconds:
    @pytest.mark.parametrize(
        ("seconds", "fps", "frames"),
        [(5, 16, 81), (2, 8, 17), (1, 8, 9), (0.01, 16, 1), (3, 30, 89), (2.5, 16, 41)],
    )
    def test_the_nearest_length_that_the_vae_can_make(self, seconds, fps, frames):
        assert presets.frames_for_seconds(seconds, fps) == frames

    @given(st.floats(0.001, 4), st.integers(1, 120))
    def test_it_is_4n_plus_1_and_at_most_two_frames_off(self, seconds, fps):
        frames = presets.frames_for_seconds(seconds, fps)
        assert frames % 4 == 1
        assert frames == 1 or abs(frames - seconds * fps) <= 2.001

    @pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
    def test_no_time_at_all_is_refused(self, seconds):
        with pytest.raises(ValueError, match="seconds must be above 0"):
            presets.frames_for_seconds(seconds, 16)

    def test_a_length_beyond_all_models_is_told_in_seconds(self):
        with pytest.raises(ValueError, match=r"at most 30 at 16 fps \(481 frames\), got 3600"):
            presets.frames_for_seconds(3600, 16)


class TestLoad:
    @pytest.mark.parametrize(
        "name",
        [
            "wan_t2v_distill_4step_cfg",
            "wan_t2v_distill_4step_cfg.json",
            "distill/wan_t2v_distill_4step_cfg",
            "distill/wan_t2v_distill_4step_cfg.json",
            str(ROOT / "configs/distill/wan_t2v_distill_4step_cfg.json"),
        ],
    )
    def test_a_preset_is_found_by_name_or_path(self, name):
        assert presets.load(name).name == "wan_t2v_distill_4step_cfg"

    def test_ones_own_folder_goes_first(self, write, tmp_path):
        write({"fps": 5}, "sub/tiny.json")
        assert presets.load("tiny", folder=tmp_path).look.fps == 5
        assert presets.load("tiny").look.fps == 8
        assert [p.path.parent.name for p in presets.available(tmp_path)] == ["sub", "distill"]

    def test_files_in_hidden_folders_are_no_presets(self, write, tmp_path):
        write({"fps": 5}, ".checkpoints/tiny.json")
        assert presets.load("tiny", folder=tmp_path).look.fps == 8

    def test_a_folder_that_is_not_there_holds_no_presets(self, tmp_path):
        assert presets.load("tiny", folder=tmp_path / "none").name == "tiny"

    def test_an_unknown_name_is_told_with_what_was_meant(self):
        with pytest.raises(errors.NotFound) as caught:
            presets.load("tinny")
        assert str(caught.value) == (
            "no preset 'tinny': did you mean 'tiny'? Presets: tiny, wan_t2v_distill_4step_cfg. "
            "A path to a preset file would do too."
        )

    @pytest.mark.parametrize("name", ["", ".", "..", "/", "a\0b", "x" * 5000, "../configs", "~"])
    def test_odd_names_are_not_found(self, name):
        with pytest.raises(errors.NotFound):
            presets.load(name)

    def test_a_name_from_the_network_reads_no_other_file(self, write):
        path = write({"fps": 5})
        assert presets.load(path).look.fps == 5
        for name in (path, "/etc/passwd", "../configs/tiny.json", "distill/../tiny"):
            with pytest.raises(errors.NotFound):
                presets.load(name, names_only=True)

    def test_a_broken_file_does_not_hide_the_others(self, write, tmp_path):
        write("{", "broken.json")
        broken, *others = presets.available(tmp_path)
        assert isinstance(broken, presets.BrokenPreset)
        assert broken.name == "broken"
        assert "line 1" in broken.reason
        assert len(others) == 2

    def test_presets_ship_beside_the_package(self):
        assert presets.SHIPPED_FOLDER == ROOT / "configs"
        patterns = (ROOT / "pyproject.toml").read_text()
        assert 'configs = ["**/*.json"]' in patterns


class TestLightX2VFiles:
    def test_a_plain_file_is_a_480p_video_of_5_seconds(self, write):
        look = presets.load(write(LIGHTX2V, "wan_t2v_distill_4step_cfg.json")).look
        assert look == presets.load("wan_t2v_distill_4step_cfg").look

    def test_the_newer_spelling_is_the_same_look(self, write):
        newer = {key: value for key, value in LIGHTX2V.items() if not key.startswith("target_")}
        newer |= {"num_frames": 81, "size": [480, 832], "distill_method": "dmd2"}
        assert presets.load(write(newer)).look == presets.load(write(LIGHTX2V)).look

    def test_the_older_list_and_a_seed_load(self, write):
        preset = presets.load(
            write(LIGHTX2V | {"denoising_step_list": [999, 750, 500, 250], "seed": 42})
        )
        assert preset.look.denoising_step_list == (999, 750, 500, 250)
        assert "fixed at submit" in dict(preset.keys_without_effect)["seed"]

    def test_an_empty_object_is_all_defaults(self, write):
        assert presets.load(write({})).look == presets.load("wan_t2v_distill_4step_cfg").look

    def test_comments_and_trailing_commas_are_fine(self, write):
        content = '// mine\n{"fps": 8, /* slow */\n "denoising_step_list": [900, 100,],}\n'
        assert presets.load(write(content)).look.denoising_step_list == (900, 100)

    @pytest.mark.parametrize("content", [b'\xef\xbb\xbf{"fps": 8}', b'{"fps":\r\n8}'])
    def test_windows_files_are_fine(self, write, content):
        assert presets.load(write(content)).look.fps == 8

    def test_keys_without_effect_are_listed_with_their_reason(self, write):
        listed = dict(presets.load(write(LIGHTX2V | OFF)).keys_without_effect)
        assert listed["cpu_offload"] == "what stays in GPU memory is the worker's choice"
        assert listed["lora_configs"] == "off"
        assert listed.keys() == (LIGHTX2V | OFF).keys() - presets.LOOK_KEYS.keys() - {
            "infer_steps",
            "enable_cfg",
        }

    @pytest.mark.parametrize("name", ["wan_i2v_distill_4step_cfg.json", "i2v.json", "x-i2v.json"])
    def test_an_image_to_video_file_is_refused_by_its_name(self, fault, name):
        assert "text-to-video presets (t2v) are what this version renders" in fault(LIGHTX2V, name)

    def test_the_task_in_the_file_goes_before_its_name(self, write, fault):
        assert presets.load(write({"task": "t2v"}, "wan_i2v_.json")).look.task == "t2v"
        assert "image-to-video" in fault({"task": "i2v"}, "wan_t2v.json")


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "part"),
        [
            ({"infer_steps": 8}, "infer_steps is 8 but denoising_step_list has 4 entries: 4 would"),
            ({"infer_steps": "4"}, 'infer_steps is "4"'),
            ({"enable_cfg": True}, "enable_cfg must be false, got true"),
            ({"target_width": 833}, "target_width must be a multiple of 16"),
            ({"target_width": 833}, "832 or 848 would do"),
            ({"target_height": "480"}, 'target_height must be a whole number such as 480, got "'),
            ({"target_height": 480.0}, "target_height must be a whole number"),
            ({"target_video_length": 80}, "target_video_length must be 4n+1"),
            ({"num_frames": 80}, "num_frames must be 4n+1"),
            ({"num_frames": 81, "target_video_length": 81}, "are the same thing: keep one"),
            ({"size": [480, 832], "target_width": 832}, "keep one form"),
            ({"size": [480]}, "size must be [height, width]"),
            ({"size": [481, 832]}, "size: the height must be a multiple of 16"),
            ({"fps": 121}, "120 would do"),
            ({"fps": True}, "fps must be a whole number such as 16, got true"),
            ({"sample_shift": 0}, "sample_shift must be above 0"),
            ({"sample_shift": "5"}, "sample_shift must be a number"),
            ({"denoising_step_list": []}, "must have 1 to 50 entries"),
            ({"denoising_step_list": 4}, "must be a list of whole numbers"),
            ({"denoising_step_list": [1000, 750.0]}, "must be a list of whole numbers"),
            ({"denoising_step_list": [1001, 750]}, "got [1001, 750]: [1000, 750] would do"),
            ({"denoising_step_list": [500, 0]}, "[500, 1] would do"),
            ({"denoising_step_list": [250, 500, 500]}, "[500, 250] would do"),
            ({"denoising_step_list": list(range(51, 0, -1))}, "must have 1 to 50 entries, got 51"),
            ({"step_rule": "lcm"}, 'step_rule must be "euler" or "renoise", got "lcm"'),
            ({"task": "s2v"}, 'task must be "t2v", got "s2v"'),
            ({"model_path": ""}, "model_path must name a folder"),
            ({"model_path": "../x"}, "without '..'"),
            ({"model_path": "~/x"}, "without '..' and '~'"),
            ({"model_path": "."}, "model_path must"),
            ({"description": 5}, "description must be one line of text"),
            ({"description": "a\nb"}, "description must be one line of text"),
            ({"model_path": "\ud800"}, "model_path must name a folder"),
            ({"denoising_steplist": [1]}, "did you mean denoising_step_list?"),
            ({"zzz": 1}, 'unknown key "zzz": remove it'),
            ({"lora_configs": [{"path": "a", "strength": 1}]}, "LoRA is not supported"),
            ({"lora_path": ["a.safetensors"]}, "LoRA is not supported"),
            ({"dit_quantized": True}, "quantized weights are not supported in this version"),
            ({"dit_quantized_ckpt": "/x"}, "quantized weights are not supported"),
            ({"mm_config": {"mm_type": "W-fp8"}}, "quantized weights"),
            ({"dit_original_ckpt": "/x.safetensors"}, "put the file into that folder"),
            ({"dit_distill_ckpt": "/x"}, "other weights"),
            ({"use_tae": True}, "small VAEs are not supported"),
            ({"use_lightvae": True}, "small VAEs are not supported"),
            ({"enable_dynamic_cfg": True}, "needs special weights"),
            ({"feature_caching": "Tea"}, 'feature_caching is "Tea"'),
            ({"self_attn_1_type": "radial_attn"}, "sparse or unknown kinds are not supported"),
            ({"cross_attn_1_type": "svg_attn"}, "full attention"),
            ({"boundary_step_index": 2}, "two-expert models are not supported"),
            ({"video_frame_interpolation": {"algo": "rife"}}, "not supported in this version"),
            ({"video_super_resolution": {"ratio": 2}}, "not supported in this version"),
            ({"text_len": 77}, "only 512"),
            ({"model_cls": "wan2.2_moe_distill"}, "step-distilled Wan2.1 only"),
            ({"negative_prompt": "blur"}, "it belongs in the prompt file"),
        ],
    )
    def test_what_cannot_be_rendered_is_refused_with_what_would_do(self, fault, fields, part):
        assert part in fault(fields)

    def test_everything_wrong_is_told_at_once(self, fault):
        message = fault({"fpss": 1, "lora_path": ["a"], "infer_steps": 3, "target_width": 1})
        for part in ("fpss", "lora_path", "infer_steps", "target_width"):
            assert part in message

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            ("", "is empty"),
            ("\n", "is empty"),
            ('{\n"fps": }', "line 2: not JSON: Unexpected"),
            ('{"fps": 8\n', "line 2: not JSON"),
            ('{\n"fps": 8,\n"fps": 9}', "line 3: fps is given twice: keep one"),
            ('// c\n{\n"fps": 8,\n"fps": 9}', "line 4: fps is given twice"),
            ('{"sample_shift": NaN}', "NaN is not a number"),
            ('{"sample_shift": Infinity,}', "Infinity is not a number"),
            ('{"sample_shift": 1e999}', "1e999 is not a number"),
            ('{"fps": ' + "9" * 5000 + "}", "thousands of digits"),
            ('{"size": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
            ("[]", "must hold one object {...}, got []"),
            ("null", "must hold one object"),
            (b'{\n"description": "caf\xe9"}', "line 2: byte 0xe9 is not UTF-8"),
            ('{"fps": 8}'.encode("utf-16"), "not UTF-8"),
            ("//" + "x" * 70_000, "larger than 65536 bytes"),
        ],
    )
    def test_a_file_that_cannot_be_read_is_told_with_its_line(self, fault, content, part):
        assert part in fault(content)

    def test_a_folder_is_not_a_preset(self, tmp_path):
        (tmp_path / "x.json").mkdir()
        with pytest.raises(errors.PresetError, match="cannot be read"):
            presets.load("x", folder=tmp_path)

    def test_a_message_can_always_be_printed(self, fault):
        fault({"task": "\ud800\x1b", "\udfff": "x", "fps": "\n"}).encode()
        for depth in range(100, 1200, 50):
            fault('{"fps": ' + "[" * depth + "]" * depth + "}")

    @settings(max_examples=150, deadline=None)
    @given(
        st.dictionaries(
            st.sampled_from(sorted(presets.KEYS)),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                lambda inner: (
                    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
                ),
                max_leaves=4,
            ),
            max_size=4,
        )
    )
    def test_any_values_make_a_preset_or_a_preset_error(self, tmp_path_factory, fields):
        path = tmp_path_factory.getbasetemp() / "any.json"
        path.write_text(json.dumps(fields))
        assert is_preset_or_told(path)

    @settings(max_examples=150, deadline=None)
    @given(st.binary(max_size=60))
    def test_any_bytes_make_a_preset_or_a_preset_error(self, tmp_path_factory, content):
        path = tmp_path_factory.getbasetemp() / "any.json"
        path.write_bytes(content)
        assert is_preset_or_told(path)


def test_each_key_has_one_meaning():
    tables = (
        presets.LOOK_KEYS,
        presets.CHECKED_KEYS,
        presets.KEYS_WITHOUT_EFFECT,
        presets.LIMITED_KEYS,
    )
    assert sum(map(len, tables)) == len(presets.KEYS)


def test_the_documentation_names_every_key():
    text = (ROOT / "docs" / "presets.md").read_text()
    assert sorted(key for key in presets.KEYS if f"`{key}`" not in text) == []


def test_presets_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "configs" / "tiny.json", tmp_path / "own.json")
    assert presets.load("tiny").name == "tiny"
    assert presets.load("own.json").name == "own"
