"""Where the layers of SD3's and FLUX's transformers stand in their authors' code, by whose names kohya's form goes.

There query, key and value are one layer, in FLUX's single blocks together with the first half of the MLP. So the LoRAs
of diffusers' layers become one: its lora_down is theirs below each other, its lora_up theirs along the diagonal.
"""

import re

import torch

from ..errors import UserError

QKV, ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
# {denoiser: {kind of block in diffusers: (its name there, {layer there: the layers in diffusers})}}
PLACES = {
    "SD3Transformer2DModel": {
        "transformer_blocks": ("joint_blocks", {
            "x_block_attn_qkv": QKV, "x_block_attn_proj": ("attn.to_out.0",),
            "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block_attn2_proj": ("attn2.to_out.0",),
            "x_block_mlp_fc1": ("ff.net.0.proj",), "x_block_mlp_fc2": ("ff.net.2",),
            "context_block_attn_qkv": ADDED, "context_block_attn_proj": ("attn.to_add_out",),
            "context_block_mlp_fc1": ("ff_context.net.0.proj",), "context_block_mlp_fc2": ("ff_context.net.2",),
        }),
    },
    "FluxTransformer2DModel": {
        "transformer_blocks": ("double_blocks", {
            "img_attn_qkv": QKV, "img_attn_proj": ("attn.to_out.0",),
            "img_mlp_0": ("ff.net.0.proj",), "img_mlp_2": ("ff.net.2",),
            "txt_attn_qkv": ADDED, "txt_attn_proj": ("attn.to_add_out",),
            "txt_mlp_0": ("ff_context.net.0.proj",), "txt_mlp_2": ("ff_context.net.2",),
        }),
        "single_transformer_blocks": ("single_blocks", {"linear1": (*QKV, "proj_mlp"), "linear2": ("proj_out",)}),
    },
}  # fmt: skip
MLP_RATIO = 4  # of FLUX


def fuse(pairs, denoiser):
    """{layer in diffusers: {"lora_A": (rank, in), "lora_B": (out, rank)}} -> the same by the names of PLACES.

    A part of a fused layer that has no LoRA gets zeros. Raises UserError for a layer that is not in PLACES.
    """
    found, blocks, kinds = {}, {}, PLACES[denoiser]
    for layer, matrices in pairs.items():
        match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", layer)
        if not match or not any(match[3] in parts for parts in kinds.get(match[1], ("", {}))[1].values()):
            raise UserError(f"{layer}: kohya's form of a {denoiser} has no such layer; --format diffusers")
        blocks.setdefault((match[1], match[2]), {})[match[3]] = matrices
    for (kind, number), own in blocks.items():
        block, places = kinds[kind]
        for place, parts in places.items():
            if present := {part: own[part] for part in parts if part in own}:
                found[f"{block}_{number}_{place}"] = _below_each_other(parts, present)
    return found


def _below_each_other(parts, present):
    """One LoRA for the parts of a layer, from those of them that have one: {part: matrices}."""
    down, up = next((own["lora_A"], own["lora_B"]) for own in present.values())
    width = len(up) // _ratio(next(iter(present)))
    downs, ups = [], []
    for part in parts:
        own = present.get(part, {"lora_A": torch.zeros_like(down)})
        downs.append(own["lora_A"])
        ups.append(own.get("lora_B", up.new_zeros(_ratio(part) * width, len(down))))
    return {"lora_A": torch.cat(downs), "lora_B": torch.block_diag(*ups)}


def _ratio(part):
    """Outputs of a part of a fused layer for one of its attention's."""
    return MLP_RATIO if part == "proj_mlp" else 1
