"""kohya's form of a LoRA, which ComfyUI, A1111 and Forge read: its names, and α beside each pair of matrices.

Stable Diffusion 1.x and 2.x keep diffusers' names of the UNet's layers; of SDXL everybody has those of Stability's own
code (sgm), in which the layers of all blocks are counted through. For SD3 and FLUX see transformers.py.
"""

import re

import torch

from ..errors import UserError
from . import transformers

SIDES = {"lora_A": "lora_down", "lora_B": "lora_up"}
DOWN, UP = r"down_blocks_(\d+)_attentions_(\d+)_", r"up_blocks_(\d+)_attentions_(\d+)_"
MODULES = {"SD3Transformer2DModel": "networks.lora_sd3", "FluxTransformer2DModel": "networks.lora_flux"}


def convert(lora, denoiser):
    """{diffusers' name: matrix} of a LoRA -> the same in kohya's form, with ".alpha" (a scalar) for each layer.

    denoiser: its class in diffusers. α is the number of rows of the layer's lora_down, since the scale here is 1;
    readers that find no α assume another. Raises UserError for a layer that has no name there.
    """
    pairs = {}
    for name, matrix in lora.items():
        layer, side, _ = name.split(".", 1)[1].rsplit(".", 2)
        pairs.setdefault(layer, {})[side] = matrix
    if denoiser in transformers.PLACES:
        pairs = transformers.fuse(pairs, denoiser)
    elif all(name.startswith("unet.") for name in lora):
        pairs = {layer: pairs[name] for name, layer in _unet_layers(pairs).items()}
    else:
        what = denoiser or "a file that does not name its denoiser"
        raise UserError(f"{what}: kohya's form of its LoRA is not known; --format diffusers")
    found = {}
    for layer, matrices in pairs.items():
        found |= {f"lora_unet_{layer}.{SIDES[side]}.weight": matrix for side, matrix in matrices.items()}
        found[f"lora_unet_{layer}.alpha"] = torch.tensor(float(len(matrices["lora_A"])))
    return found


def header(found, denoiser):
    """What kohya's scripts read in the head of a file in their form: {name: text}."""
    rank = max(len(matrix) for name, matrix in found.items() if ".lora_down." in name)
    return {
        "ss_network_module": MODULES.get(denoiser, "networks.lora"),
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
    }


def _unet_layers(names):
    """{a UNet layer's name in diffusers: in kohya's form}."""
    layers = [name.replace(".", "_") for name in names]
    xl = not any(layer.startswith("down_blocks_0_attentions") for layer in layers)
    counted = 2 + max((int(match[2]) for layer in layers if (match := re.match(DOWN, layer))), default=1)
    return {name: _sgm(layer, counted) if xl else layer for name, layer in zip(names, layers, strict=True)}


def _sgm(layer, counted):
    """A layer's name in Stability's code; counted: layers of a block there, the one that changes the size included."""
    for pattern, name, offset in ((DOWN, "input_blocks", 1), (UP, "output_blocks", 0)):
        if match := re.match(pattern, layer):
            return f"{name}_{counted * int(match[1]) + int(match[2]) + offset}_1_{layer[match.end() :]}"
    if not layer.startswith("mid_block_attentions_0_"):
        raise UserError(f"{layer}: kohya's form of an SDXL's LoRA has no name for it; --format diffusers")
    return layer.replace("mid_block_attentions_0_", "middle_block_1_")
