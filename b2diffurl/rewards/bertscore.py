"""BERTScore of a LLaVA-1.5 description against the prompt (the paper's second reward, after DDPO's section 5.1)."""

import torch

from .loading import load_model, reported

QUESTION = "USER: <image>\nAnswer concisely: what is going on in this image? ASSISTANT:"  # DDPO's question
MAX_NEW_TOKENS = 64


class BertScore:
    """reward(images, prompts) -> (N,) float32: how much of the prompt the description of the image recalls.

    The scale has no zero: with roberta-large, layer 17, two unrelated English sentences score above 0.8 (BERTScore's
    authors rescale for that; not measured here), and so does the description of a meaningless image. 0.8 is not good;
    compare differences.
    llava, bert: hub ids or local folders; layer: which of bert's layers gives the token features.
    """

    def __init__(self, llava, bert, layer, batch_size, device, dtype):
        from transformers import AutoModel, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

        self.llava = load_model("llava_model", LlavaForConditionalGeneration, llava, dtype, device)
        with reported("llava_model", llava):
            self.processor = AutoProcessor.from_pretrained(llava)
        # float32, since torchmetrics computes in bert's precision, and prompts differ in the third decimal
        self.bert = load_model("bert_model", AutoModel, bert, torch.float32, device, unused=["pooler."])
        with reported("bert_model", bert):
            self.tokenizer = AutoTokenizer.from_pretrained(bert)
        self.processor.tokenizer.padding_side = "left"  # answers continue the questions of a batch
        self.layer, self.batch_size, self.device, self.dtype = layer, batch_size, device, dtype

    @torch.no_grad()
    def describe(self, images):
        """PIL images -> LLaVA's descriptions, greedily decoded."""
        said = []
        for first in range(0, len(images), self.batch_size):
            batch = images[first : first + self.batch_size]
            inputs = self.processor(text=[QUESTION] * len(batch), images=batch, return_tensors="pt", padding=True)
            inputs = inputs.to(self.device, self.dtype)
            tokens = self.llava.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            answers = tokens[:, inputs["input_ids"].shape[1] :]
            texts = self.processor.batch_decode(answers, skip_special_tokens=True)
            said += [text.strip() or "nothing" for text in texts]  # BERTScore gives no words a 0, far below the rest
        return said

    def recall(self, descriptions, prompts):
        """BERTScore's recall of each prompt by its description -> (N,) float32."""
        from torchmetrics.functional.text import bert_score

        def tokens(text):
            found = self.tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
            return {name: found[name] for name in ("input_ids", "attention_mask")}

        # A pair at a time: for several, torchmetrics 1.9 sorts by length and does not undo it, so it mixes the pairs.
        options = {"model": self.bert, "num_layers": self.layer, "device": self.device}
        scores = [
            torch.as_tensor(bert_score(tokens(said), tokens(asked), **options)["recall"]).float().reshape(())
            for said, asked in zip(descriptions, prompts, strict=True)
        ]
        return torch.stack(scores).cpu()

    def __call__(self, images, prompts):
        """PIL images and their prompts -> (N,) float32 on the CPU."""
        return self.recall(self.describe(images), prompts)
