"""Full-size networks without files, for what is counted and measured."""

import torch
from torch import nn

from models import config, quantization, transformer, vae
from models.distillation import cost

SIZES = {"1.3B": config.WAN_T2V_1_3B, "14B": config.WAN_T2V_14B}


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
