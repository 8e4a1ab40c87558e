"""CLIP by transformers, in float32, for the rewards whose weights are published in that form."""

import torch

from ..ahead import ahead
from .loading import load_model, reported


class HuggingFaceClip:
    """Unit features of a CLIPModel; model: a hub id or a local folder with model, tokenizer and image processor.

    setting: the configuration's name of `model`, for the error message.
    """

    def __init__(self, setting, model, batch_size, device):
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        self.model = load_model(setting, CLIPModel, model, torch.float32, device)
        with reported(setting, model):
            self.tokenizer = CLIPTokenizer.from_pretrained(model)
            self.processor = CLIPImageProcessor.from_pretrained(model)
        self.batch_size, self.device = batch_size, device

    @torch.no_grad()
    def of_images(self, images):
        """PIL images -> (N, D) float32 unit vectors."""

        def prepare(first):
            return self.processor(images[first : first + self.batch_size], return_tensors="pt").pixel_values

        batches = [
            self.model.get_image_features(pixels.to(self.device)).pooler_output
            for pixels in ahead(prepare, range(0, len(images), self.batch_size))
        ]
        return torch.nn.functional.normalize(torch.cat(batches), dim=1)

    @torch.no_grad()
    def of_texts(self, texts):
        """Strings -> (N, D) float32 unit vectors; long ones are cut at the model's length."""
        batches = []
        for first in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                texts[first : first + self.batch_size], padding=True, truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings, return_tensors="pt",
            )  # fmt: skip
            batches.append(self.model.get_text_features(**batch.to(self.device)).pooler_output)
        return torch.nn.functional.normalize(torch.cat(batches), dim=1)
