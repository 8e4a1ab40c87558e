"""kohya's form of a LoRA, which ComfyUI, A1111 and Forge read: its names, and α beside each pair of matrices.

Stable Diffusion 1.x and 2.x keep diffusers' names of the UNet's layers; of SDXL everybody has those of Stability's own
code (sgm), in which the layers of all blocks are counted through.
"""

import re

import torch

from ..errors import UserError

SIDES = {"lora_A": "lora_down", "lora_B": "lora_up"}
DOWN, UP = r"down_blocks_(\d+)_attentions_(\d+)_", r"up_blocks_(\d+)_attentions_(\d+)_"


def convert(lora):
    """{diffusers' name: matrix} of a UNet's LoRA -> the same in kohya's form, with ".alpha" (a scalar) for each layer.

    α is the rank, since the scale here is 1; readers that find no α assume another. Raises UserError for a
    transformer's, for which kohya's form fuses matrices.
    """
    if foreign := [name for name in lora if not name.startswith("unet.")]:
        raise UserError(
            f"{foreign[0]}: kohya's form is for UNets (Stable Diffusion, SDXL); ComfyUI reads SD3's and FLUX's "
            "LoRAs in diffusers' form, --format diffusers"
        )
    xl = not any(name.startswith("unet.down_blocks.0.attentions") for name in lora)
    names = {name: name.removeprefix("unet.").rsplit(".", 2) for name in lora}
    layers = [layer.replace(".", "_") for layer, _, _ in names.values()]
    found, counted = {}, 2 + max((int(match[2]) for layer in layers if (match := re.match(DOWN, layer))), default=1)
    for layer, (name, matrix) in zip(layers, lora.items(), strict=True):
        side, key = names[name][1], f"lora_unet_{_sgm(layer, counted) if xl else layer}"
        found[f"{key}.{SIDES[side]}.weight"] = matrix
        if side == "lora_A":
            found[f"{key}.alpha"] = torch.tensor(float(len(matrix)))
    return found


def _sgm(layer, counted):
    """A layer's name in Stability's code; counted: layers of a block there, the one that changes the size included."""
    for pattern, name, offset in ((DOWN, "input_blocks", 1), (UP, "output_blocks", 0)):
        if match := re.match(pattern, layer):
            return f"{name}_{counted * int(match[1]) + int(match[2]) + offset}_1_{layer[match.end() :]}"
    return layer.replace("mid_block_attentions_0_", "middle_block_1_")
