"""Every key that a preset file may have, and what is done with it.

docs/presets.md names each of them; a test compares.
"""

from dataclasses import dataclass

LOOK_KEYS: dict[str, str] = {
    "task": 'what is made: "t2v", text to video, or "i2v", image to video',
    "model_path": "folder of the weights, below the worker's models folder or absolute",
    "denoising_step_list": "the denoising steps; their number is the length of the list",
    "step_rule": 'how a step is made: "euler" or "renoise"',
    "sample_shift": "shift of the noise levels",
    "target_width": "width in pixels, a multiple of 16",
    "target_height": "height in pixels, a multiple of 16",
    "target_video_length": "number of frames, 4n+1",
    "num_frames": "newer name of target_video_length",
    "size": "[height, width]: newer form of target_height and target_width",
    "fps": "frames per second of the mp4",
    "resize_mode": "how the image decides the size",
    "resolution": 'size with resize_mode "adaptive": "480p", "540p" or "720p"',
    "dit_original_ckpt": "a complete transformer checkpoint, file or folder",
    "dit_distill_ckpt": "older name of dit_original_ckpt",
    "dit_quantized_ckpt": "the same, quantized; needs dit_quantized",
    "dit_quantized": "the transformer's weights are fp8 or int8",
    "dit_quant_scheme": "which of both, beginning with fp8- or int8-",
    "mm_config": '{"mm_type": ...}: older form of dit_quantized and dit_quant_scheme',
    "lora_path": "LoRA files, applied in this order",
    "strength_model": "strength of the LoRAs in lora_path",
    "lora_configs": "newer form of both: [{path, strength, name}]",
    "boundary_step_index": "Wan2.2: the first step of the low-noise network",
    "high_noise_original_ckpt": "Wan2.2: checkpoint of the first steps",
    "low_noise_original_ckpt": "Wan2.2: checkpoint of the last steps",
    "high_noise_quantized_ckpt": "the same, quantized",
    "low_noise_quantized_ckpt": "the same, quantized",
    "cpu_offload": "the transformer waits in main memory",
    "offload_granularity": 'all of it ("model") or block by block ("block")',
    "t5_cpu_offload": "the text encoder waits in main memory",
    "clip_cpu_offload": "the image encoder waits in main memory",
    "vae_cpu_offload": "the VAE waits in main memory",
    "use_tiling_vae": "the VAE works in tiles",
    "vae_dtype": 'what frames are decoded in: "bf16" or "fp32"',
    "unload_modules": "prompts are encoded on the processor; nothing of the encoder is on the GPU",
    "lazy_load": "the same",
    "t5_lazy_load": "the same",
    "description": "a line for people: shown in lists, decides nothing",
}

CHECKED_KEYS: dict[str, str] = {
    "infer_steps": "must be the length of denoising_step_list",
    "enable_cfg": "must be false: distilled models render without CFG",
    "model_cls": 'must be "wan2.1_distill", or "wan2.2_moe_distill" with boundary_step_index',
    "use_image_encoder": "image to video: must be true for Wan2.1, false for Wan2.2",
}

_KERNEL = "which kernel runs is the worker's choice"
_OFFLOAD = "what stays in GPU memory is the worker's choice"
_PARALLEL = "one job runs on one GPU"
_NO_CFG = "distilled models render without CFG"
_FULL_T5 = "the text encoder of the model folder is used, as it is"
_FULL_CLIP = "the image encoder of the model folder is used, as it is"
_NO_CALIBRATION = "scales are read from the checkpoint"
_NO_TINY_VAE = "the full VAE is used"
_FROM_WEIGHTS = "read from the config.json beside the weights"
_NO_CACHING = "every step is computed"

NO_IMAGE = "text to video reads no image"

KEYS_WITHOUT_EFFECT: dict[str, str] = {
    "seed": "each job has its own seed, fixed at submit",
    "sample_guide_scale": _NO_CFG,
    "cfg_scale": _NO_CFG,
    "lora_dynamic_apply": "whether a LoRA is merged or applied at run time is the worker's choice",
    "t5_quantized": _FULL_T5,
    "t5_quantized_ckpt": _FULL_T5,
    "t5_quant_scheme": _FULL_T5,
    "clip_quantized": _FULL_CLIP,
    "clip_quantized_ckpt": _FULL_CLIP,
    "clip_quant_scheme": _FULL_CLIP,
    "do_mm_calib": _NO_CALIBRATION,
    "offload_ratio": _OFFLOAD,
    "t5_offload_granularity": _OFFLOAD,
    "clean_cuda_cache": _OFFLOAD,
    "warmup": "networks stay warm between jobs",
    "parallel": _PARALLEL,
    "seq_parallel": _PARALLEL,
    "cfg_parallel": _PARALLEL,
    "parallel_attn_type": _PARALLEL,
    "parallel_vae": _PARALLEL,
    "vae_weight_dtype": _KERNEL,
    "use_bfloat16": _KERNEL,
    "rope_type": _KERNEL,
    "rope_chunk": _KERNEL,
    "rope_chunk_size": _KERNEL,
    "rms_norm_type": _KERNEL,
    "layer_norm_type": _KERNEL,
    "modulate_type": _KERNEL,
    "vae_stride": _FROM_WEIGHTS,
    "patch_size": _FROM_WEIGHTS,
    "tae_path": _NO_TINY_VAE,
    "tiny_vae_path": _NO_TINY_VAE,
    "need_scaled": _NO_TINY_VAE,
    "teacache_thresh": _NO_CACHING,
    "use_ret_steps": _NO_CACHING,
    "sub_servers": "prompts are rendered as they are",
}

IMAGE_KEYS = frozenset(
    {
        "cross_attn_2_type",
        "use_image_encoder",
        "resize_mode",
        "resolution",
        "max_area",
        "clip_cpu_offload",
        "clip_quantized",
        "clip_quant_scheme",
        "clip_original_ckpt",
        "clip_quantized_ckpt",
    }
)
"""Have no effect in a text-to-video preset, whatever their value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitedKey:
    """A key that would change the picture in a way this version does not render."""

    harmless: tuple[object, ...]
    """Values with which it changes nothing."""
    while_harmless: str
    otherwise: str

    def allows(self, value: object) -> bool:
        return _is_among(value, self.harmless)


OFF: tuple[object, ...] = (False, None, "", [], {})


def is_off(value: object) -> bool:
    return _is_among(value, OFF)


def _is_among(value: object, known: tuple[object, ...]) -> bool:
    """0 is not among those with False, though they are equal."""
    return any(type(value) is type(one) and value == one for one in known)


def _off(otherwise: str) -> LimitedKey:
    return LimitedKey(harmless=OFF, while_harmless="off", otherwise=otherwise)


def _only(*harmless: object, why: str, otherwise: str) -> LimitedKey:
    return LimitedKey(harmless=harmless, while_harmless=why, otherwise=otherwise)


DENSE_ATTENTION = (
    "flash_attn2",
    "flash_attn3",
    "flash_attn4",
    "sage_attn2",
    "sage_attn3",
    "torch_sdpa",
)
_ATTENTION = _only(
    *DENSE_ATTENTION,
    why=_KERNEL,
    otherwise="this version computes full attention: sparse or unknown kinds are not supported; "
    f"remove the key or use one of {', '.join(DENSE_ATTENTION)}",
)
_OTHER_WEIGHTS = _off(
    "other encoders than those in model_path are not supported in this version: "
    "put the file into that folder and remove the key"
)
_TINY_VAE = _off("small VAEs are not supported in this version: set the key to false")
_POSTPROCESSING = _off("not supported in this version: remove the key")

LIMITED_KEYS: dict[str, LimitedKey] = {
    "distill_method": _only(
        "dmd2",
        why="step_rule decides how a step is made",
        otherwise='only "dmd2" is supported in this version',
    ),
    "scheduler_type": _only(
        "WanStepDistillScheduler",
        why="step_rule decides how a step is made",
        otherwise='only "WanStepDistillScheduler" is supported: use step_rule to choose',
    ),
    "text_len": _only(
        512,
        why=_FROM_WEIGHTS,
        otherwise="only 512, what Wan was trained with, is supported: remove the key",
    ),
    "self_attn_1_type": _ATTENTION,
    "cross_attn_1_type": _ATTENTION,
    "cross_attn_2_type": _ATTENTION,
    "attention_type": _ATTENTION,
    "feature_caching": _only(
        "NoCaching",
        None,
        why=_NO_CACHING,
        otherwise='with 4 steps there is nothing to cache: use "NoCaching" or remove the key',
    ),
    "enable_dynamic_cfg": _off("needs special weights, not supported in this version: use false"),
    "max_area": _off("not supported: target_width times target_height is the area; remove the key"),
    "t5_original_ckpt": _OTHER_WEIGHTS,
    "t5_tokenizer_path": _OTHER_WEIGHTS,
    "clip_original_ckpt": _OTHER_WEIGHTS,
    "vae_path": _OTHER_WEIGHTS,
    "vae_pth": _OTHER_WEIGHTS,
    "use_tae": _TINY_VAE,
    "use_lightvae": _TINY_VAE,
    "use_tiny_vae": _TINY_VAE,
    "boundary": _off("is for models with 40 steps: use boundary_step_index, 2 for 4 steps"),
    "video_frame_interpolation": _POSTPROCESSING,
    "video_super_resolution": _POSTPROCESSING,
    "use_prompt_enhancer": _off("prompts are rendered as they are: use false"),
    "prompt": _off("a preset has no prompt: it belongs in the prompt file"),
    "negative_prompt": _off("a preset has no negative prompt: it belongs in the prompt file"),
}

KEYS = frozenset(LOOK_KEYS) | set(CHECKED_KEYS) | set(KEYS_WITHOUT_EFFECT) | set(LIMITED_KEYS)
