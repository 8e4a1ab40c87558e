"""CLIPScore: the raw cosine of OpenCLIP's image and text features (the paper's reward)."""

import torch

from ..configuration import UserError


class ClipReward:
    """reward(images, prompts) -> (N,) float32; `features(images)` also serves the diversity measure.

    model: an OpenCLIP architecture name with a weights tag, or "local-dir:<folder>" with weights "".
    """

    def __init__(self, model, weights, batch_size, device):
        import open_clip

        try:
            self.model, self.preprocess = open_clip.create_model_from_pretrained(
                model, pretrained=weights or None, device=device
            )
            self.tokenizer = open_clip.get_tokenizer(model)
        except (RuntimeError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"config.reward.model={model!r}, weights={weights!r} do not load: {reason}") from None
        self.model.eval()
        self.batch_size, self.device = batch_size, device

    @torch.no_grad()
    def features(self, images):
        """PIL images -> unit feature vectors (N, D) on the device."""
        rows = []
        for first in range(0, len(images), self.batch_size):
            batch = torch.stack([self.preprocess(image) for image in images[first : first + self.batch_size]])
            rows.append(self.model.encode_image(batch.to(self.device), normalize=True))
        return torch.cat(rows)

    @torch.no_grad()
    def __call__(self, images, prompts):
        """Cosine of each PIL image with its own prompt -> (N,) float32 on the CPU."""
        distinct = list(dict.fromkeys(prompts))
        text = torch.cat(
            [
                self.model.encode_text(
                    self.tokenizer(distinct[i : i + self.batch_size]).to(self.device), normalize=True
                )
                for i in range(0, len(distinct), self.batch_size)
            ]
        )
        own = text[[distinct.index(prompt) for prompt in prompts]]
        return (self.features(images) * own).sum(1).float().cpu()
