"""PickScore: human preference between images of one prompt (Kirstain et al., arXiv 2305.01569)."""

from .hf_clip import HuggingFaceClip


class PickScore:
    """reward(images, prompts) -> (N,) float32: the fine-tuned CLIP-H's cosine times its logit scale, as published."""

    def __init__(self, model, batch_size, device):
        self.clip = HuggingFaceClip("pickscore_model", model, batch_size, device)

    def __call__(self, images, prompts):
        """PIL images and their prompts -> (N,) float32 on the CPU."""
        distinct = list(dict.fromkeys(prompts))
        texts = self.clip.of_texts(distinct)[[distinct.index(prompt) for prompt in prompts]]
        scale = self.clip.model.logit_scale.float().exp().item()
        return (scale * (self.clip.of_images(images) * texts).sum(1)).cpu()
