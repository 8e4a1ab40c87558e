"""CLIPScore: the raw cosine of OpenCLIP's image and text features (the paper's reward)."""

import concurrent.futures

import torch

from ..ahead import ahead
from ..errors import UserError
from .loading import full_float32


class ClipReward:
    """reward(images, prompts) -> (N,) float32; `features(images)` also serves the diversity measure.

    model: an OpenCLIP architecture name with a weights tag, or "local-dir:<folder>" with weights "". It computes in
    float32, as the authors' scoring does.
    """

    setting = ""  # what stands before model and weights in their settings' names

    def __init__(self, model, weights, batch_size, device):
        import open_clip
        from safetensors import SafetensorError

        try:
            self.model, self.preprocess = open_clip.create_model_from_pretrained(
                model, pretrained=weights or None, device=device
            )
            self.tokenizer = open_clip.get_tokenizer(model)
        except (RuntimeError, OSError, ValueError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            setting = f"config.reward.{self.setting}"
            raise UserError(f"{setting}model={model!r}, weights={weights!r} do not load: {reason}") from None
        self.model.eval()
        self.batch_size, self.device = batch_size, device

    @torch.no_grad()
    @full_float32()  # of the evaluation and the diversity too, which ask here and not at Reward.score
    def features(self, images):
        """PIL images -> unit feature vectors (N, D), float32 on the device."""
        with concurrent.futures.ThreadPoolExecutor() as pool:  # resizing takes longer than scoring on a GPU

            def prepare(first):
                return torch.stack([*pool.map(self.preprocess, images[first : first + self.batch_size])])

            rows = [
                torch.nn.functional.normalize(self.model.encode_image(batch.to(self.device)), dim=1)
                for batch in ahead(prepare, range(0, len(images), self.batch_size))
            ]
        return torch.cat(rows)

    @torch.no_grad()
    @full_float32()
    def __call__(self, images, prompts):
        """Cosine of each PIL image with its own prompt -> (N,) float32 on the CPU."""
        distinct = list(dict.fromkeys(prompts))
        batches = [distinct[i : i + self.batch_size] for i in range(0, len(distinct), self.batch_size)]
        text = torch.cat([self.model.encode_text(self.tokenizer(batch).to(self.device)) for batch in batches])
        own = torch.nn.functional.normalize(text, dim=1)[[distinct.index(prompt) for prompt in prompts]]
        return (self.features(images) * own).sum(1).cpu()
