"""Presets: LightX2V's files load as they are, and nothing that decides the picture is ignored."""

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import json5
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs import errors, looks, preset_keys, presets

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
HIGH = "high_noise_model"
MM_FP8 = "W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Vllm"
MM_INT8 = "W-int8-channel-sym-A-int8-channel-sym-dynamic-Vllm"
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


def tiny(**changes: Any) -> looks.Look:
    return looks.Look.model_validate(presets.load("tiny").look.model_dump() | changes)


def is_preset_or_told(path: Path) -> bool:
    """It loads, or a PresetError says what is wrong with this file."""
    try:
        return presets.load(str(path)).look.num_steps >= 1
    except errors.PresetError as error:
        return str(error).startswith(f"{path}: ")


SHIPPED = {
    "tiny",
    "tiny_i2v",
    "tiny_i2v_lora",
    "tiny_lora",
    "wan21/wan_i2v_distill_lora_4step_cfg",
    "wan21/wan_t2v_distill_lora_4step_cfg",
    "wan_i2v_distill_4step_cfg",
    "wan_i2v_distill_4step_cfg_4090",
    "wan_i2v_distill_4step_cfg_720p",
    "wan_i2v_distill_4step_cfg_lora",
    "wan_i2v_distill_4step_cfg_lora_720p",
    "wan_i2v_distill_fp8_4step_cfg",
    "wan_i2v_distill_int8_4step_cfg",
    "wan_i2v_distill_lora_4step_cfg",
    "wan_i2v_distill_lora_4step_cfg_4090",
    "wan_i2v_distill_model_4step_cfg",
    "wan_moe_i2v_distill_4090",
    "wan_moe_i2v_distill_model",
    "wan_moe_i2v_distill_quant",
    "wan_moe_i2v_distill_with_lora",
    "wan_moe_t2v_distill_lora",
    "wan_t2v_1_3b_distill_4step_cfg",
    "wan_t2v_distill_4step_cfg",
    "wan_t2v_distill_4step_cfg_4090",
    "wan_t2v_distill_4step_cfg_8gb",
    "wan_t2v_distill_4step_cfg_720p",
    "wan_t2v_distill_4step_cfg_lora",
    "wan_t2v_distill_fp8_4step_cfg",
    "wan_t2v_distill_int8_4step_cfg",
    "wan_t2v_distill_lora_4step_cfg",
    "wan_t2v_distill_lora_4step_cfg_4090",
    "wan_t2v_distill_model_4step_cfg",
}
WAN = {
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
"""What LightX2V's plain preset says; everything else has its default."""
WAN_I2V = WAN | {"task": "i2v", "model_path": "Wan2.1-I2V-14B-480P", "size_rule": "area"}
DISTILL_LORA = "loras/Wan21_{}_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors"


def said(preset: presets.Preset) -> dict[str, Any]:
    """The fields of its look that are not at their defaults."""
    return preset.look.model_dump(exclude_defaults=True)


class TestShippedPresets:
    def test_these_are_shipped(self):
        assert {preset.name for preset in presets.available()} == SHIPPED

    @pytest.mark.parametrize("name", sorted(SHIPPED))
    def test_each_loads_by_its_name(self, name):
        preset = presets.load(name)
        assert preset.name == name
        assert preset.description
        assert preset.look.num_steps == 4
        assert ("i2v" in name) == preset.look.needs_image
        assert ("lora" in name) == bool(preset.look.loras)

    @pytest.mark.parametrize("name", sorted(SHIPPED))
    def test_each_is_documented_with_what_it_needs(self, name):
        preset = presets.load(name)
        table = (ROOT / "docs" / "presets.md").read_text()
        line = next(line for line in table.splitlines() if line.startswith(f"| `{name}`"))
        assert f"`{preset.look.model_path}`" in line

    @pytest.mark.parametrize(
        ("name", "fields"),
        [
            ("wan_t2v_distill_4step_cfg", WAN),
            ("wan_i2v_distill_4step_cfg", WAN_I2V),
            (
                "wan_t2v_distill_4step_cfg_lora",
                WAN | {"base": "original", "loras": ({"path": DISTILL_LORA.format("T2V")},)},
            ),
            (
                "wan_i2v_distill_4step_cfg_lora",
                WAN_I2V | {"base": "original", "loras": ({"path": DISTILL_LORA.format("I2V")},)},
            ),
        ],
    )
    def test_lightx2vs_four_say_this(self, name, fields):
        assert said(presets.load(f"distill/{name}")) == fields

    @pytest.mark.parametrize(
        ("name", "guidance", "text_len"),
        [
            ("wan_t2v_distill_4step_cfg", 6, True),
            ("wan_i2v_distill_4step_cfg", 5, False),
            ("wan_t2v_distill_4step_cfg_lora", 6, True),
            ("wan_i2v_distill_4step_cfg_lora", 5, False),
        ],
    )
    def test_lightx2vs_four_have_its_keys_and_values(self, name, guidance, text_len):
        text = (ROOT / "configs" / "distill" / f"{name}.json").read_text()
        fields = json5.loads(text)
        del fields["description"]
        fields.pop("lora_path", None)
        wanted = LIGHTX2V | {"sample_guide_scale": guidance}
        if not text_len:
            del wanted["text_len"]
        assert fields == wanted

    def test_the_smallest_gpu_gets_fp8_block_by_block(self):
        assert said(presets.load("wan_i2v_distill_4step_cfg_4090")) == WAN_I2V | {
            "transformer": "Wan2.1-I2V-14B-480P/distill_fp8",
            "quantization": "fp8",
            "offload": "block",
        }

    def test_two_networks_have_their_own_checkpoints_and_loras(self):
        complete = presets.load("wan22/wan_moe_i2v_distill_model").look
        assert complete.boundary_step_index == 2
        assert "high_noise" in (complete.high_noise_transformer or "")
        assert "low_noise" in (complete.low_noise_transformer or "")
        with_loras = presets.load("wan_moe_t2v_distill_lora").look
        assert [lora.name for lora in with_loras.loras] == list(looks.EXPERTS)
        assert with_loras.base == "original"

    def test_the_tiny_preset_is_small(self):
        look = presets.load("tiny.json").look
        assert (look.width, look.height, look.num_frames, look.fps) == (48, 48, 17, 8)
        assert look.model_path == "tiny"

    @pytest.mark.parametrize(
        ("name", "look_id"),
        [("tiny", "ec16e6b9705e9824"), ("wan_t2v_distill_4step_cfg", "54cfac8bcc761bda")],
    )
    def test_an_id_never_changes(self, name, look_id):
        """Queued jobs and result folders carry these ids."""
        assert presets.load(name).look.id == look_id

    def test_a_look_that_was_stored_before_later_fields_has_its_old_id(self):
        assert (
            looks.Look.model_validate(WAN).id == presets.load("wan_t2v_distill_4step_cfg").look.id
        )


class TestLook:
    def test_equal_looks_have_equal_ids_however_they_were_written(self):
        assert tiny(sample_shift=5, model_path="tiny/").id == tiny(sample_shift=5.0).id

    @pytest.mark.parametrize(
        "changes",
        [
            {"step_rule": "euler"},
            {"fps": 9},
            {"width": 80},
            {"denoising_step_list": [999, 750, 500, 250]},
            {"sample_shift": 5.000001},
            {"model_path": "Tiny"},
            {"task": "i2v"},
            {"task": "i2v", "size_rule": "area"},
            {"transformer": "a"},
            {"base": "original"},
            {"quantization": "fp8"},
            {"loras": [{"path": "a"}]},
            {"boundary_step_index": 1},
            {"offload": "model"},
            {"vae_tiling": True},
            {"text_encoder_on_cpu": True},
            {"image_encoder_on_cpu": True},
            {"vae_on_cpu": True},
            {"unload_encoders": True},
        ],
    )
    def test_each_field_is_part_of_the_id(self, changes):
        assert tiny(**changes).id != tiny().id

    def test_a_spec_survives_json_with_its_id(self):
        spec = looks.RenderSpec(look=tiny(), prompt="猫", negative_prompt=None, seed=2**63 - 1)
        for again in (
            looks.RenderSpec.model_validate_json(spec.model_dump_json()),
            looks.RenderSpec.model_validate(json.loads(spec.model_dump_json())),
        ):
            assert again == spec
            assert again.look.id == spec.look.id

    def test_a_look_cannot_be_changed(self):
        with pytest.raises(ValidationError):
            tiny().width = 80  # type: ignore[misc]  # that it is frozen is the point

    def test_loras_count_with_strength_network_and_order(self):
        a, b = {"path": "a"}, {"path": "b"}
        ids = [
            tiny(loras=loras, boundary_step_index=2).id
            for loras in ([a, b], [b, a], [a | {"strength": 0.5}, b], [a | {"name": HIGH}, b])
        ]
        assert len(set(ids)) == 4

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"size_rule": "area"}, 'size_rule "area" is for images'),
            ({"high_noise_transformer": "a"}, "the low-noise checkpoint is missing"),
            ({"low_noise_transformer": "a"}, "the high-noise checkpoint is missing"),
            (
                {"high_noise_transformer": "a", "low_noise_transformer": "b"},
                "two checkpoints need boundary_step_index",
            ),
            ({"boundary_step_index": 0}, "from 1 to 3, got 0: 2 would do"),
            ({"boundary_step_index": 4}, "from 1 to 3, got 4: 2 would do"),
            ({"boundary_step_index": True}, "boundary_step_index must be a whole number"),
            ({"boundary_step_index": 2, "transformer": "a"}, "instead of one checkpoint"),
            ({"loras": [{"path": "a", "name": HIGH}]}, "Wan2.1 has one, leave it"),
            (
                {"loras": [{"path": "a", "name": "both"}]},
                'entry 1: name must be "high_noise_model"',
            ),
            ({"loras": [{"path": "a"}, {"path": "a", "strength": 2}]}, 'LoRA "a" is there twice'),
            ({"loras": [{"path": str(n)} for n in range(9)]}, "there may be 8 LoRAs, got 9"),
            ({"loras": [{"path": "a"}, {"path": "../b"}]}, "loras entry 2: path must be below"),
            ({"loras": [{"path": "a", "strength": 11}]}, "strength must be from -10 to 10, got 11"),
            ({"loras": [{"path": "a", "strength": float("nan")}]}, "strength must be from -10"),
            ({"transformer": "a.GGUF"}, "names a GGUF file, which is not supported"),
            ({"transformer": "~/a"}, "without '..' and '~'"),
            ({"offload": "phase"}, 'offload must be "none" or "model" or "block"'),
            ({"quantization": "nvfp4"}, 'quantization must be "fp8" or "int8"'),
        ],
    )
    def test_what_does_not_fit_together_is_told(self, changes, part):
        with pytest.raises(ValueError, match=r".") as caught:
            presets.load("tiny").look.with_changes(changes)
        assert part in str(caught.value)

    @pytest.mark.parametrize("seed", [-1, 2**63])
    def test_a_seed_fits_both_databases(self, seed):
        with pytest.raises(ValidationError):
            looks.RenderSpec(look=tiny(), prompt="a", negative_prompt=None, seed=seed)


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

    def test_the_rows_loras_come_after_the_presets(self):
        style = looks.LoraUse(path="loras/film.safetensors", strength=0.8)
        look = presets.load("tiny_lora").look_for(loras=[style])
        assert [lora.path for lora in look.loras] == [
            "tiny/loras/distill_lora.safetensors",
            "loras/film.safetensors",
        ]
        assert look.base == "original"
        assert presets.load("tiny").look_for(loras=[style]).base == "distilled"

    @pytest.mark.parametrize(
        ("path", "part"),
        [
            ("/etc/secret.safetensors", 'loras must lie below the models folder, got "/etc/'),
            ("tiny/loras/distill_lora.safetensors", "is there twice"),
        ],
    )
    def test_a_row_cannot_name_every_file(self, path, part):
        with pytest.raises(ValueError, match=r".") as caught:
            presets.load("tiny_lora").look_for(loras=[looks.LoraUse(path=path)])
        assert part in str(caught.value)


class TestSizeOfAnImage:
    """`area` and `bucket` as LightX2V's command line and server have them."""

    @pytest.mark.parametrize(
        ("image", "size"),
        [
            ((832, 480), (832, 480)),
            ((480, 832), (480, 832)),
            ((1280, 720), (832, 464)),
            ((4000, 3000), (720, 544)),
            ((1024, 1024), (624, 624)),
            ((1, 1), (624, 624)),
        ],
    )
    def test_area_keeps_the_aspect(self, image, size):
        look = presets.load("wan_i2v_distill_4step_cfg").look.sized(*image)
        assert (look.width, look.height) == size
        assert not look.crops_image

    @given(st.integers(16, 9000), st.integers(16, 9000))
    def test_area_is_lightx2vs_formula_in_whole_numbers(self, width, height):
        look = presets.load("wan_i2v_distill_4step_cfg").look
        aspect = height / width
        sides = math.sqrt(480 * 832 / aspect), math.sqrt(480 * 832 * aspect)
        near = [min(side % 16, 16 - side % 16) < 1e-6 for side in sides]
        wanted = [round(side // 8 // 2 * 2) * 8 for side in sides]
        try:
            sized = look.sized(width, height)
        except ValueError:
            assert max(wanted) > 2048 or min(wanted) < 16
            return
        for side, lightx2v, is_near in zip((sized.width, sized.height), wanted, near, strict=True):
            assert side == lightx2v or (is_near and side == lightx2v + 16)

    @pytest.mark.parametrize(
        ("resolution", "sizes"),
        [
            ("480p", [(832, 480), (480, 480), (480, 832)]),
            ("540p", [(960, 544), (576, 576), (544, 960)]),
            ("720p", [(1280, 720), (960, 960), (720, 1280)]),
        ],
    )
    def test_bucket_is_the_nearest_of_three_shapes(self, write, resolution, sizes):
        fields = LIGHTX2V | {"resize_mode": "adaptive", "resolution": resolution}
        preset = presets.load(write(fields, "wan_i2v_.json"))
        found = [preset.look.sized(*image) for image in ((1600, 900), (1000, 1010), (900, 1600))]
        assert [(look.width, look.height) for look in found] == sizes
        assert found[0].crops_image
        assert "resolution decides" in dict(preset.keys_without_effect)["target_width"]

    @pytest.mark.parametrize(
        ("image", "size"),
        [
            ((1000, 833), (832, 480)),
            ((1000, 834), (480, 480)),
            ((1000, 1249), (480, 480)),
            ((1000, 1250), (480, 832)),  # 1.25 lies in the middle: portrait comes before square
            ((4000, 100), (832, 480)),
        ],
    )
    def test_the_edges_between_buckets(self, write, image, size):
        fields = {"task": "i2v", "resize_mode": "adaptive", "size": [480, 832]}
        look = presets.load(write(fields)).look.sized(*image)
        assert (look.width, look.height) == size

    def test_bucket_without_a_resolution_takes_the_nearest_to_the_target(self, write):
        fields = {"task": "i2v", "resize_mode": "adaptive", "size": [720, 1280]}
        look = presets.load(write(fields)).look.sized(100, 100)
        assert (look.width, look.height) == (960, 960)

    def test_fixed_is_fixed(self, write):
        fields = {"task": "i2v", "resize_mode": "fixed_shape", "size": [480, 640]}
        look = presets.load(write(fields)).look
        assert look.sized(10, 1000) is look
        assert look.crops_image

    def test_text_to_video_has_its_size_already(self):
        look = presets.load("tiny").look
        assert look.sized(10, 1000) is look

    @pytest.mark.parametrize("image", [(10_000, 10), (1, 2000)])
    def test_a_ribbon_makes_no_video(self, image):
        with pytest.raises(ValueError, match=r"pixels is too narrow .*: crop it"):
            presets.load("wan_i2v_distill_4step_cfg").look.sized(*image)

    def test_a_row_may_ask_for_another_area(self):
        preset = presets.load("wan_i2v_distill_4step_cfg")
        look = preset.look_for(width=1280, height=720).sized(1920, 1080)
        assert (look.width, look.height) == (1280, 720)


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
        (mine,) = [p for p in presets.available(tmp_path) if p.name == "tiny"]
        assert mine.path.parent.name == "sub"

    def test_one_name_in_two_folders_reaches_both(self):
        outer = presets.load("wan_t2v_distill_lora_4step_cfg")
        inner = presets.load("wan21/wan_t2v_distill_lora_4step_cfg")
        assert (outer.path.parent.name, inner.path.parent.name) == ("distill", "wan21")
        assert inner.name == "wan21/wan_t2v_distill_lora_4step_cfg"
        assert presets.load("distill/wan21/wan_t2v_distill_lora_4step_cfg.json").name == inner.name

    def test_a_name_that_two_files_have_is_asked_about(self, write, tmp_path):
        write({"fps": 5}, "a/x.json")
        write({"fps": 6}, "b/x.json")
        with pytest.raises(errors.NotFound, match=r"^preset 'x' may be 'a/x' or 'b/x': say which$"):
            presets.load("x", folder=tmp_path)
        assert presets.load("b/x", folder=tmp_path).look.fps == 6
        names = [p.name for p in presets.available(tmp_path)]
        assert names.count("x") == 0
        assert {"a/x", "b/x"} <= set(names)

    def test_the_outer_of_two_files_has_the_short_name(self, write, tmp_path):
        write({"fps": 5}, "x.json")
        write({"fps": 6}, "b/x.json")
        assert presets.load("x", folder=tmp_path).look.fps == 5
        assert presets.load("b/x", folder=tmp_path).name == "b/x"

    def test_ones_own_file_hides_only_its_own_name(self, write, tmp_path):
        write({"fps": 5}, "wan_t2v_distill_lora_4step_cfg.json")
        names = [p.name for p in presets.available(tmp_path)]
        assert "wan21/wan_t2v_distill_lora_4step_cfg" in names
        assert presets.load("wan_t2v_distill_lora_4step_cfg", folder=tmp_path).look.fps == 5
        assert (
            presets.load("distill/wan_t2v_distill_lora_4step_cfg", folder=tmp_path).look.fps == 16
        )

    def test_the_current_folder_may_be_ones_own(self, write, tmp_path, monkeypatch):
        write({"fps": 5}, "mine.json")
        monkeypatch.chdir(tmp_path)
        for folder in (Path(), tmp_path.relative_to(tmp_path.parent).parent):
            assert presets.load("mine", folder=folder).look.fps == 5

    def test_files_in_hidden_folders_are_no_presets(self, write, tmp_path):
        write({"fps": 5}, ".checkpoints/tiny.json")
        assert presets.load("tiny", folder=tmp_path).look.fps == 8

    def test_a_folder_that_is_not_there_is_told_to_who_wants_a_preset(self, tmp_path):
        """A worker, which only lists them, may do without."""
        with pytest.raises(errors.FileUnusable, match="there is no folder"):
            presets.load("tiny", folder=tmp_path / "none")
        assert {preset.name for preset in presets.available(tmp_path / "none")} == SHIPPED

    def test_an_unknown_name_is_told_with_what_was_meant(self):
        with pytest.raises(errors.NotFound) as caught:
            presets.load("tinny")
        assert str(caught.value) == (
            "no preset 'tinny': did you mean 'tiny'? "
            f"`rushes presets` lists all {len(SHIPPED)}. A path to a preset file would do too."
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

    def test_a_file_whose_name_is_no_text_is_a_broken_one(self, tmp_path):
        """No answer, no page and no database takes such a name."""
        (tmp_path / os.fsdecode(b"caf\xff.json")).write_text("{}")
        (broken,) = [p for p in presets.available(tmp_path) if p.name.startswith("caf")]
        assert isinstance(broken, presets.BrokenPreset)
        assert broken.name == r"caf\xff"
        assert broken.reason == rf"{tmp_path}/caf\xff.json: its name is not UTF-8: rename it"
        with pytest.raises(errors.PresetError, match="not UTF-8"):
            presets.load("caf\udcff", folder=tmp_path)

    def test_a_name_that_ends_in_json_twice_is_found_as_it_is_listed(self, write, tmp_path):
        write({"fps": 5}, "x.json.json")
        assert presets.load("x.json", folder=tmp_path).name == "x.json"
        assert presets.load("x.json.json", folder=tmp_path).name == "x.json"
        write({"fps": 6}, "x.json")
        assert presets.load("x.json", folder=tmp_path).look.fps == 5
        assert presets.load("x", folder=tmp_path).look.fps == 6

    def test_a_broken_file_does_not_hide_the_others(self, write, tmp_path):
        write("{", "broken.json")
        broken, *others = presets.available(tmp_path)
        assert isinstance(broken, presets.BrokenPreset)
        assert broken.name == "broken"
        assert "line 1" in broken.reason
        assert len(others) == len(SHIPPED)

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
        assert listed["sample_guide_scale"] == "distilled models render without CFG"
        assert listed["cross_attn_2_type"] == "text to video reads no image"
        assert listed["use_tae"] == "off"
        table = preset_keys.LOOK_KEYS | preset_keys.CHECKED_KEYS
        assert listed.keys() == (LIGHTX2V | OFF).keys() - table.keys()

    def test_what_is_off_changes_nothing(self, write):
        assert presets.load(write(LIGHTX2V | OFF)).look == presets.load(write(LIGHTX2V)).look

    @pytest.mark.parametrize("name", ["wan_i2v_distill_4step_cfg.json", "i2v.json", "x-i2v.json"])
    def test_an_image_to_video_file_is_known_by_its_name(self, write, name):
        look = presets.load(write(LIGHTX2V, name)).look
        assert look == presets.load("wan_i2v_distill_4step_cfg").look

    def test_the_task_in_the_file_goes_before_its_name(self, write):
        assert presets.load(write({"task": "t2v"}, "wan_i2v_.json")).look.task == "t2v"
        assert presets.load(write({"task": "i2v"}, "wan_t2v.json")).look.task == "i2v"

    @pytest.mark.parametrize("name", ["wan_t2v_.json", "wan_i2v_.json"])
    def test_the_older_list_with_a_lora_loads(self, write, name):
        """The example of LightX2V's page on step distillation."""
        content = """{
          "infer_steps": 4,                              // Inference steps
          "denoising_step_list": [999, 750, 500, 250],   // Denoising timestep list
          "enable_cfg": false,                           // Disable CFG for speed improvement
          "lora_path": [                                 // LoRA weights path (optional)
            "path/to/distill_lora.safetensors"
          ]
        }"""
        look = presets.load(write(content, name)).look
        assert look.denoising_step_list == (999, 750, 500, 250)
        assert look.loras == (looks.LoraUse(path="path/to/distill_lora.safetensors"),)


class TestWeights:
    """Which files a preset asks for."""

    @pytest.mark.parametrize(
        "fields",
        [
            {"lora_path": "a"},
            {"lora_path": ["a"]},
            {"lora_path": ["a"], "strength_model": 1},
            {"lora_configs": [{"path": "a"}]},
            {"lora_configs": [{"path": "a", "strength": 1, "name": None}]},
        ],
    )
    def test_a_lora_has_five_spellings(self, write, fields):
        look = presets.load(write(fields)).look
        assert look.loras == (looks.LoraUse(path="a"),)
        assert look.base == "original"

    def test_strength_model_is_for_all_of_lora_path(self, write):
        look = presets.load(write({"lora_path": ["a", "b"], "strength_model": 0.5})).look
        assert [lora.strength for lora in look.loras] == [0.5, 0.5]

    def test_what_a_lora_says_without_effect_is_listed(self, write):
        fields = {
            "lora_configs": [{"path": "a", "alpha": 8}],
            "lora_dynamic_apply": True,
            "strength_model": 2,
        }
        listed = dict(presets.load(write(fields)).keys_without_effect)
        assert listed.keys() == {"lora_configs.alpha", "lora_dynamic_apply", "strength_model"}
        assert listed["lora_configs.alpha"] == "alpha is read from the LoRA file"

    def test_a_lora_on_a_named_checkpoint_changes_that_one(self, write):
        """A style in the preset of a distilled model."""
        look = presets.load(write({"dit_original_ckpt": "a.safetensors", "lora_path": "b"})).look
        assert (look.transformer, look.base) == ("a.safetensors", "distilled")

    @pytest.mark.parametrize("key", ["dit_original_ckpt", "dit_distill_ckpt"])
    def test_a_checkpoint_is_named(self, write, key):
        assert presets.load(write({key: "a/b.pt"})).look.transformer == "a/b.pt"

    @pytest.mark.parametrize(
        ("fields", "transformer", "quantization"),
        [
            ({"dit_quantized": True, "dit_quant_scheme": "fp8-sgl"}, "{}/distill_fp8", "fp8"),
            ({"dit_quantized": True, "dit_quant_scheme": "int8-vllm"}, "{}/distill_int8", "int8"),
            ({"mm_config": {"mm_type": MM_FP8}}, "{}/distill_fp8", "fp8"),
            ({"mm_config": {"mm_type": MM_INT8}, "dit_quantized": True}, "{}/distill_int8", "int8"),
            (
                {"dit_quantized": True, "dit_quant_scheme": "fp8-q8f", "dit_quantized_ckpt": "/x"},
                "/x",
                "fp8",
            ),
            ({"dit_quantized": True, "dit_quantized_ckpt": "x"}, "x", None),
            (
                {"dit_quantized": True, "dit_quant_scheme": "fp8-q8f", "lora_path": "a"},
                "{}/fp8",
                "fp8",
            ),
        ],
    )
    def test_quantized_weights_lie_where_lightx2v_has_them(
        self, write, fields, transformer, quantization
    ):
        look = presets.load(write(fields)).look
        assert look.transformer == transformer.format("Wan2.1-T2V-14B")
        assert look.quantization == quantization

    def test_quantized_weights_lie_in_ones_own_folder(self, write):
        fields = {"dit_quantized": True, "dit_quant_scheme": "fp8-sgl", "model_path": "/m/"}
        assert presets.load(write(fields)).look.transformer == "/m/distill_fp8"

    def test_a_scheme_alone_quantizes_nothing(self, write):
        preset = presets.load(write({"dit_quantized": False, "dit_quant_scheme": "nvfp4"}))
        assert preset.look == presets.load(write({})).look
        assert dict(preset.keys_without_effect) == {"dit_quant_scheme": "dit_quantized is not true"}

    @pytest.mark.parametrize("task", ["t2v", "i2v"])
    def test_two_networks_are_another_model(self, write, task):
        fields = {"task": task, "boundary_step_index": 2, "model_cls": "wan2.2_moe_distill"}
        look = presets.load(write(fields)).look
        assert look.model_path == f"Wan2.2-{task.upper()}-A14B"
        assert look.boundary_step_index == 2

    def test_quantized_networks_lie_side_by_side(self, write):
        fields = {"dit_quantized": True, "dit_quant_scheme": "int8-q8f", "boundary_step_index": 2}
        look = presets.load(write(fields)).look
        assert look.high_noise_transformer == "Wan2.2-T2V-A14B/distill_int8/high_noise_model"
        assert look.low_noise_transformer == "Wan2.2-T2V-A14B/distill_int8/low_noise_model"


class TestMemory:
    """What a preset asks of the machine."""

    @pytest.mark.parametrize(
        ("fields", "offload"),
        [
            ({}, "none"),
            ({"cpu_offload": False, "offload_granularity": "block"}, "none"),
            ({"cpu_offload": True}, "block"),
            ({"cpu_offload": True, "offload_granularity": "block"}, "block"),
            ({"cpu_offload": True, "offload_granularity": "phase"}, "block"),
            ({"cpu_offload": True, "offload_granularity": "model"}, "model"),
        ],
    )
    def test_offload(self, write, fields, offload):
        assert presets.load(write(fields)).look.offload == offload

    @pytest.mark.parametrize(
        ("granularity", "cpu_offload", "reason"),
        [
            ("block", False, "cpu_offload is not true"),
            ("phase", True, "parts of a block are not moved alone: as block"),
        ],
    )
    def test_a_granularity_that_is_not_followed_is_told(
        self, write, granularity, cpu_offload, reason
    ):
        fields = {"cpu_offload": cpu_offload, "offload_granularity": granularity}
        listed = presets.load(write(fields)).keys_without_effect
        assert listed == (("offload_granularity", reason),)

    def test_with_offload_the_encoders_wait_too_unless_they_are_told_not_to(self, write):
        look = presets.load(write({"cpu_offload": True, "task": "i2v"})).look
        assert (look.text_encoder_on_cpu, look.image_encoder_on_cpu, look.vae_on_cpu) == (True,) * 3
        fields = {"cpu_offload": True, "task": "i2v", "t5_cpu_offload": False}
        look = presets.load(write(fields | {"clip_cpu_offload": False})).look
        assert (look.text_encoder_on_cpu, look.image_encoder_on_cpu) == (False, False)
        assert look.vae_on_cpu

    @pytest.mark.parametrize(
        ("key", "field"),
        [
            ("t5_cpu_offload", "text_encoder_on_cpu"),
            ("clip_cpu_offload", "image_encoder_on_cpu"),
            ("vae_cpu_offload", "vae_on_cpu"),
            ("use_tiling_vae", "vae_tiling"),
            ("unload_modules", "unload_encoders"),
            ("lazy_load", "unload_encoders"),
            ("t5_lazy_load", "unload_encoders"),
        ],
    )
    def test_each_switch(self, write, key, field):
        assert getattr(presets.load(write({key: True, "task": "i2v"})).look, field) is True
        assert getattr(presets.load(write({key: False, "task": "i2v"})).look, field) is False

    def test_an_image_encoder_that_is_not_there_waits_nowhere(self, write):
        fields = {"clip_cpu_offload": True}
        for more in ({}, {"task": "i2v", "boundary_step_index": 2}):
            preset = presets.load(write(fields | more))
            assert not preset.look.image_encoder_on_cpu
            assert "clip_cpu_offload" in dict(preset.keys_without_effect)


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
            ({"sample_shift": 0}, "sample_shift must be from 0.01 to 100, got 0: 5 would do"),
            ({"sample_shift": 1e-9}, "sample_shift must be from 0.01 to 100"),
            ({"sample_shift": "5"}, "sample_shift must be a number"),
            ({"denoising_step_list": []}, "must have 1 to 50 entries"),
            ({"denoising_step_list": 4}, "must be a list of whole numbers"),
            ({"denoising_step_list": [1000, 750.0]}, "must be a list of whole numbers"),
            ({"denoising_step_list": [1001, 750]}, "got [1001, 750]: [1000, 750] would do"),
            ({"denoising_step_list": [500, 0]}, "[500, 1] would do"),
            ({"denoising_step_list": [250, 500, 500]}, "[500, 250] would do"),
            ({"denoising_step_list": list(range(51, 0, -1))}, "must have 1 to 50 entries, got 51"),
            ({"step_rule": "lcm"}, 'step_rule must be "euler" or "renoise", got "lcm"'),
            ({"task": "s2v"}, 'task must be "t2v" or "i2v", got "s2v"'),
            ({"model_path": ""}, "model_path must name a folder"),
            ({"model_path": "../x"}, "without '..'"),
            ({"model_path": "~/x"}, "without '..' and '~'"),
            ({"model_path": "."}, "model_path must"),
            (
                {"model_path": "m/" + "é" * 128},
                "model_path must be at most 1000 bytes, of which 255",
            ),
            ({"model_path": "m/" * 600}, "model_path must be at most 1000 bytes"),
            ({"lora_path": "l" * 256}, "path must be at most 1000 bytes"),
            ({"description": 5}, "description must be one line of text"),
            ({"description": "a\nb"}, "description must be one line of text"),
            ({"model_path": "\ud800"}, "model_path must name a folder"),
            ({"denoising_steplist": [1]}, "did you mean denoising_step_list?"),
            ({"zzz": 1}, 'unknown key "zzz": remove it'),
            ({"lora_path": ["a"], "lora_configs": [{"path": "a"}]}, "the same thing: keep one"),
            ({"lora_path": [5]}, "lora_path entry 1: path must name a LoRA file"),
            ({"lora_path": ["a", "a"]}, "is there twice"),
            ({"lora_path": ["a"], "strength_model": "1"}, "entry 1: strength must be a number"),
            ({"lora_configs": "a"}, "lora_configs must be a list such as"),
            ({"lora_configs": ["a"]}, "lora_configs: entry 1 must have path, strength and name"),
            ({"lora_configs": [{"path": "a", "scale": 1}]}, "must have path, strength and name"),
            ({"lora_configs": [{"strength": 1}]}, "lora_configs entry 1: path"),
            ({"lora_configs": [{"path": "a"}, {"path": ""}]}, "entry 2: path must name a LoRA"),
            ({"lora_configs": [{"path": "a", "name": HIGH}]}, "Wan2.1 has one, leave it"),
            ({"lora_path": "a", "boundary_step_index": 2}, "use lora_configs"),
            ({"lora_configs": [{"path": "a"}], "boundary_step_index": 2}, "entry 1 name must be"),
            ({"dit_quantized": True}, "dit_quantized needs dit_quant_scheme, such as fp8-sgl"),
            ({"dit_quantized": "yes"}, 'dit_quantized must be true or false, got "yes"'),
            ({"dit_quantized": 1}, "dit_quantized must be true or false, got 1"),
            ({"dit_quantized": True, "dit_quant_scheme": "nvfp4"}, "NVFP4, MXFP and GGUF are not"),
            ({"dit_quantized": True, "dit_quant_scheme": "gguf-Q4_K_S"}, "use the fp8 checkpoint"),
            ({"dit_quantized": True, "dit_quant_scheme": 8}, "fp8 and int8 weights are supported"),
            ({"dit_quantized_ckpt": "/x"}, "dit_quantized_ckpt is given but dit_quantized is not"),
            (
                {"dit_quantized": True, "dit_original_ckpt": "a"},
                "dit_original_ckpt names unquantized weights: name them as dit_quantized_ckpt",
            ),
            (
                {"dit_original_ckpt": "a", "dit_distill_ckpt": "b"},
                "dit_original_ckpt and dit_distill_ckpt both name the transformer: keep one",
            ),
            ({"dit_original_ckpt": "a.gguf"}, "dit_original_ckpt names a GGUF file"),
            ({"dit_distill_ckpt": "../a"}, "dit_distill_ckpt must be below the models folder"),
            ({"mm_config": {"mm_type": "W-nvfp4"}}, 'mm_config is "W-nvfp4": fp8 and int8'),
            ({"mm_config": {"mm_type": MM_FP8}, "dit_quantized": False}, "dit_quantized is false"),
            ({"mm_config": "fp8"}, 'mm_config must be {"mm_type": "..."}'),
            (
                {"mm_config": {"mm_type": MM_FP8, "weight_auto_quant": True}},
                "weights are not quantized while they are loaded",
            ),
            (
                {
                    "mm_config": {"mm_type": MM_FP8},
                    "dit_quantized": True,
                    "dit_quant_scheme": "int8-x",
                },
                "say different things",
            ),
            ({"t5_original_ckpt": "/x"}, "other encoders than those in model_path"),
            ({"vae_path": "/x"}, "other encoders"),
            ({"task": "i2v", "clip_original_ckpt": "/x"}, "other encoders"),
            ({"task": "i2v", "cross_attn_2_type": "svg_attn"}, "full attention"),
            ({"task": "i2v", "max_area": 5}, "target_width times target_height is the area"),
            ({"task": "i2v", "resize_mode": "fixed_min_area"}, '"adaptive" and "fixed_shape" are'),
            ({"task": "i2v", "resize_mode": ["adaptive"]}, "resize_mode is"),
            (
                {"task": "i2v", "resize_mode": "adaptive", "resolution": "1080p"},
                'resolution must be "480p" or "540p" or "720p", got "1080p"',
            ),
            ({"task": "i2v", "use_image_encoder": False}, "needs the image encoder"),
            (
                {"task": "i2v", "use_image_encoder": True, "boundary_step_index": 2},
                "Wan2.2 has no image encoder",
            ),
            ({"cpu_offload": "model"}, "cpu_offload must be true or false"),
            ({"use_tiling_vae": 1}, "use_tiling_vae must be true or false, got 1"),
            ({"offload_granularity": "layer"}, 'offload_granularity must be "model" or "block"'),
            ({"use_tae": True}, "small VAEs are not supported"),
            ({"use_tae": 0}, "use_tae is 0: small VAEs are not supported"),
            ({"boundary": 0.0}, "boundary is 0.0: is for models with 40 steps"),
            ({"dit_original_ckpt": 0}, "dit_original_ckpt must name a file or folder of weights"),
            ({"lora_path": 0}, "path must name a LoRA file"),
            ({"use_lightvae": True}, "small VAEs are not supported"),
            ({"enable_dynamic_cfg": True}, "needs special weights"),
            ({"feature_caching": "Tea"}, 'feature_caching is "Tea"'),
            ({"self_attn_1_type": "radial_attn"}, "sparse or unknown kinds are not supported"),
            ({"cross_attn_1_type": "svg_attn"}, "full attention"),
            ({"boundary_step_index": 4}, "from 1 to 3, got 4: 2 would do"),
            ({"boundary_step_index": 1, "denoising_step_list": [1000]}, "use two steps"),
            ({"boundary": 0.9}, "use boundary_step_index, 2 for 4 steps"),
            ({"high_noise_original_ckpt": "a", "low_noise_original_ckpt": "b"}, "need boundary_st"),
            (
                {"boundary_step_index": 2, "low_noise_original_ckpt": "b"},
                "the high-noise checkpoint is missing",
            ),
            (
                {
                    "boundary_step_index": 2,
                    "low_noise_original_ckpt": "b",
                    "low_noise_quantized_ckpt": "c",
                },
                "name the same network: keep one",
            ),
            (
                {"boundary_step_index": 2, "high_noise_quantized_ckpt": "b"},
                "high_noise_quantized_ckpt is given but dit_quantized is not true",
            ),
            ({"boundary_step_index": 2, "dit_original_ckpt": "a"}, "instead of one checkpoint"),
            ({"model_cls": "wan2.2_moe_distill"}, "needs boundary_step_index: 2 would do"),
            ({"model_cls": "wan2.1_distill", "boundary_step_index": 2}, "has one network"),
            ({"model_cls": "wan2.1"}, 'use "wan2.1_distill" or "wan2.2_moe_distill"'),
            ({"video_frame_interpolation": {"algo": "rife"}}, "not supported in this version"),
            ({"video_super_resolution": {"ratio": 2}}, "not supported in this version"),
            ({"text_len": 77}, "only 512"),
            ({"negative_prompt": "blur"}, "it belongs in the prompt file"),
        ],
    )
    def test_what_cannot_be_rendered_is_refused_with_what_would_do(self, fault, fields, part):
        assert part in fault(fields)

    def test_everything_wrong_is_told_at_once(self, fault):
        message = fault({"fpss": 1, "use_tae": True, "infer_steps": 3, "target_width": 1})
        for part in ("fpss", "use_tae", "infer_steps", "target_width"):
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
            st.sampled_from(sorted(preset_keys.KEYS)),
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


def test_a_file_is_read_again_when_it_was_changed(tmp_path, monkeypatch):
    """Whether it has been as it is for long, or for so short that its time tells nothing."""
    path = tmp_path / "own.json"
    reads = []
    parse = presets._parse
    monkeypatch.setattr(presets, "_parse", lambda path: reads.append(path) or parse(path))
    for age in (3_600, 0):
        for number, fps in enumerate((8, 9)):  # the same number of bytes
            path.write_text(
                (ROOT / "configs" / "tiny.json").read_text().replace('"fps": 8', f'"fps": {fps}')
            )
            settled = time.time() - age + number
            os.utime(path, (settled, settled))
            assert [presets.read(path).look.fps for _ in range(3)] == [fps] * 3
    assert len(reads) == 2 + 6


def test_each_key_has_one_meaning():
    tables = (
        preset_keys.LOOK_KEYS,
        preset_keys.CHECKED_KEYS,
        preset_keys.KEYS_WITHOUT_EFFECT,
        preset_keys.LIMITED_KEYS,
    )
    assert sum(map(len, tables)) == len(preset_keys.KEYS)
    assert preset_keys.IMAGE_KEYS < preset_keys.KEYS


def test_the_documentation_names_every_key():
    text = (ROOT / "docs" / "presets.md").read_text()
    assert sorted(key for key in preset_keys.KEYS if f"`{key}`" not in text) == []


def test_presets_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "configs" / "tiny.json", tmp_path / "own.json")
    assert presets.load("tiny").name == "tiny"
    assert presets.load("own.json").name == "own"
