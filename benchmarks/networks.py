"""Full-size networks without files, for what is counted and measured."""

from typing import Any, TypeVar

import torch
from torch import nn

from models import config, quantization, transformer, vae
from models import text_encoder as text_encoders
from models.distillation import cost

Network = TypeVar("Network", bound=nn.Module)
SIZES = {"1.3B": config.WAN_T2V_1_3B, "14B": config.WAN_T2V_14B}
LATENTS = {
    "480p": config.WAN_VAE.latent_shape(num_frames=81, height=480, width=832),
    "720p": config.WAN_VAE.latent_shape(num_frames=81, height=720, width=1280),
}


def on_meta(
    sizes: config.TransformerConfig, *, scheme: quantization.Scheme | None = None
) -> transformer.WanTransformer:
    """In bf16 as it is loaded, or with the matrices of its blocks in 8 bits."""
    with torch.device("meta"):
        network = transformer.WanTransformer(sizes)
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(transformer.parameter_dtype(name, torch.bfloat16))
    if scheme is not None:
        for name, layer in block_matrices(network):
            scale_shape = (layer.out_features, 1)
            replace(network, name, quantization.QuantizedLinear(layer, scheme, scale_shape))
    return network.requires_grad_(requires_grad=False).eval()


def autoencoder(sizes: config.VAEConfig = config.WAN_VAE) -> vae.WanVAE:
    """On `meta`, as a worker holds it that decodes in bf16: what encodes images is fp32."""
    with torch.device("meta"):
        network = vae.WanVAE(sizes)
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(vae.parameter_dtype(name, torch.bfloat16))
    return network.requires_grad_(requires_grad=False).eval()


def text_encoder(sizes: config.TextEncoderConfig = config.UMT5_XXL) -> Any:
    """On `meta`, without its tokenizer."""
    with torch.device("meta"):
        return text_encoders.build_network(sizes).to(torch.bfloat16)


@torch.inference_mode(mode=False)  # weights that a mode may move
@torch.no_grad()
def filled(network: Network) -> Network:
    """From `meta` to the GPU where there is one, with weights that keep signals at their size."""
    network = network.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.ndim > 1 and not name.endswith(("modulation", "gamma")):
            tensor.normal_(std=tensor[0].numel() ** -0.5)
        elif name.endswith(("bias", "modulation")):
            tensor.normal_(std=0.02)
        else:
            tensor.fill_(1.0)
    return network.requires_grad_(requires_grad=False).eval()


def flops(sizes: config.TransformerConfig, latents: tuple[int, ...]) -> float:
    """Of one forward, counted on `meta`."""
    with torch.device("meta"):
        context = torch.randn(1, sizes.text_len, sizes.text_dim, dtype=torch.bfloat16)
        inputs = torch.randn(1, *latents), torch.ones(1), context
    return cost.count_flops(on_meta(sizes), inputs)


def block_matrices(network: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The layers that are quantized, by name."""
    return [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear)
        and quantization.is_block_matrix(f"{name}.weight", tuple(layer.weight.shape))
    ]


def replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, layer)
