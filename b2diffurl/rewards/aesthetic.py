"""The LAION aesthetic predictor: a linear head on CLIP ViT-L/14 features (DDPO's second task)."""

import re

import torch

from ..errors import UserError
from .hf_clip import HuggingFaceClip


class Aesthetic:
    """reward(images, prompts) -> (N,) float32, on the scale of its labels, 1 to 10; the prompt plays no part.

    head: a safetensors file with the published head's tensors, layers.<i>.weight and layers.<i>.bias.
    """

    def __init__(self, model, head, batch_size, device):
        self.layers = _read_head(head, device)
        self.clip = HuggingFaceClip("aesthetic_model", model, batch_size, device)
        wanted, given = self.layers[0][0].shape[1], self.clip.model.config.projection_dim
        if wanted != given:
            raise UserError(f"config.reward.aesthetic_head={head!r} takes {wanted} features, the model gives {given}")

    @torch.no_grad()
    def __call__(self, images, prompts):
        """PIL images -> (N,) float32 on the CPU."""
        features = self.clip.of_images(images)
        for weight, bias in self.layers:  # one after another: the published head has dropout, no activations
            features = torch.nn.functional.linear(features, weight, bias)
        return features[:, 0].cpu()


def _read_head(path, device):
    """[(weight, bias)] of the head's linear layers, in order, float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path, device=str(device))
        numbers = sorted({int(re.fullmatch(r"layers\.(\d+)\.(weight|bias)", name)[1]) for name in stored})
        return [(stored[f"layers.{n}.weight"].float(), stored[f"layers.{n}.bias"].float()) for n in numbers]
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise UserError(
            f"config.reward.aesthetic_head={path!r} is not the published head as safetensors: {error} (docs/rewards.md)"
        ) from None
