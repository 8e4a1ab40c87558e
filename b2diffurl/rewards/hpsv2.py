"""Human Preference Score v2: OpenCLIP's ViT-H-14, fine-tuned on human choices (Wu et al., arXiv 2306.09341)."""

from .clip import ClipReward


class HpsV2(ClipReward):
    """reward(images, prompts) -> (N,) float32: the cosine under HPSv2's weights.

    weights: a safetensors file of the published checkpoint's tensors; "" where model is local-dir:<folder>.
    """

    setting = "hpsv2_"
