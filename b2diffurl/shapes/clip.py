"""The world's reward model: a small OpenCLIP (modified ResNet and text transformer) trained on clean captions.

Saved as a folder that `open_clip.create_model_from_pretrained("local-dir:<folder>")` loads, tokenizer included. Its
text tower, copied into transformers' CLIPTextModel, is the diffusion model's frozen text encoder, as in SD.
"""

import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F

from .captions import TEMPLATES, all_captions, caption_scenes, parse, swap
from .scene import render, sample_scenes

IMAGE_SIZE, CONTEXT_LENGTH, WIDTH = 64, 16, 64
STEPS, BATCH, LEARNING_RATE = 1500, 128, 2e-3
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


def write_tokenizer(folder):
    """Write CLIP's byte-level BPE tokenizer, with one merged token for every word of the world, into a folder.

    As in CLIP, ids run over bytes, then bytes that end a word, then merges, then the start token; the end token has the
    highest id, by which CLIP's text pooling finds it. Unknown words fall apart into letters.
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = sorted({word for t in TEMPLATES for caption in all_captions(t) for word in caption.split()})
    letters = list(bytes_to_unicode().values())
    tokens, merges = letters + [letter + "</w>" for letter in letters], []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # right to left: no piece of one word can then block another word's merges
            pair = tuple(pieces[-2:])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            pieces[-2:] = ["".join(pair)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return len(vocab)


def _canonical(caption):
    """One form for all captions that mean the same: 'a A above a B' is 'a B below a A'; 'x and y' is 'y and x'."""
    template, words = parse(caption)
    if template == "relation" and words[1] in ("below", "right of"):
        return f"{words[2]} {'above' if words[1] == 'below' else 'left of'} {words[0]}"
    if template == "composition":
        return " ".join(sorted((" ".join(words[:2]), " ".join(words[2:]))))
    return " ".join(words)


def _degrade(pictures, rng):
    """Random contrast, blur and noise: the reward must keep its judgement on a decoder's slightly soft pictures."""
    draw = lambda low, high: torch.tensor(rng.uniform(low, high, size=(len(pictures), 1, 1, 1)), dtype=torch.float32)  # noqa: E731
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = torch.lerp(pictures, blurred, draw(0, 0.8))
    pictures = 0.5 + (pictures - 0.5) * draw(0.85, 1.1) + draw(-0.05, 0.05)
    noise = torch.tensor(rng.standard_normal(pictures.shape), dtype=torch.float32)
    return (pictures + noise * draw(0, 0.06)).clamp(0, 1)


def _batch(rng, size, degrade=True):
    pictures, captions = [], []
    for template, share in zip(TEMPLATES, (0.25, 0.4, 0.35), strict=True):
        scenes = sample_scenes(template, round(share * size), rng)
        pictures.append(render(scenes))
        captions += caption_scenes(template, scenes)
    pictures = torch.cat(pictures)
    if degrade:
        pictures = _degrade(pictures, rng)
    pictures = F.interpolate(pictures, size=IMAGE_SIZE, mode="bicubic", antialias=True).clamp(0, 1)
    return (pictures - 0.5) / 0.5, captions


def contrastive_loss(image, text, same, scale):
    """CLIP's symmetric loss where a caption may fit several images: -log of the softmax mass on what fits.

    image (N, D) and text (M, D) are unit vectors, same (N, M) is True where the text is true of the image.
    """
    logits = scale * image @ text.T
    positive = logits.masked_fill(~same, -torch.inf)
    to_text = (logits.logsumexp(1) - positive.logsumexp(1)).mean()
    some = same.any(0)
    to_image = (logits[:, some].logsumexp(0) - positive[:, some].logsumexp(0)).mean()
    return (to_text + to_image) / 2


def train(folder, seed, progress):
    """Train the reward from scratch and save it, with its tokenizer, as an OpenCLIP folder; returns the model."""
    import open_clip
    from safetensors.torch import save_file

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(folder)
    config = {
        "embed_dim": WIDTH,
        "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 16},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "width": WIDTH,
            "heads": 2,
            "layers": 2,
            "hf_tokenizer_name": "local",  # any non-empty name: OpenCLIP then reads the tokenizer in this folder
        },
    }
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}, indent=2) + "\n"
    )
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = open_clip.CLIP(**config).train().to(memory_format=torch.channels_last)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.05)
    for _ in progress(range(STEPS), "reward (OpenCLIP)"):
        pictures, captions = _batch(rng, BATCH)
        texts = sorted({*captions, *(swap(c, rng) for c in captions)})
        meanings = {t: _canonical(t) for t in texts}
        same = torch.tensor([[meanings[c] == meanings[t] for t in texts] for c in captions])
        image, text, scale = model(pictures.contiguous(memory_format=torch.channels_last), tokenizer(texts))
        loss = contrastive_loss(image, text, same, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(50))
    model.eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return model


@torch.no_grad()
def swap_accuracy(folder, template, n, seed):
    """Share of n clean renders for which the reward prefers the true caption to its swapped twin."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(template, n, rng)
    captions = caption_scenes(template, scenes)
    pictures = F.interpolate(render(scenes), size=IMAGE_SIZE, mode="bicubic", antialias=True).clamp(0, 1)
    image = model.encode_image((pictures - 0.5) / 0.5, normalize=True)
    true, false = (
        model.encode_text(tokenizer(texts), normalize=True) for texts in (captions, [swap(c, rng) for c in captions])
    )
    return ((image * true).sum(1) > (image * false).sum(1)).float().mean().item()


def text_encoder(clip_folder, projection=False):
    """The reward's text tower as a transformers CLIPTextModel with equal outputs (last hidden state after the norm).

    projection: as a CLIPTextModelWithProjection, whose projection is zero: see flow.py.
    """
    import open_clip
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    clip = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    vocab_size = clip.token_embedding.num_embeddings
    layers = clip.transformer.resblocks
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=len(layers),
        num_attention_heads=layers[0].attn.num_heads,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act="gelu",
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    weights = {
        "embeddings.token_embedding.weight": clip.token_embedding.weight,
        "embeddings.position_embedding.weight": clip.positional_embedding,
        "final_layer_norm.weight": clip.ln_final.weight,
        "final_layer_norm.bias": clip.ln_final.bias,
    }
    for i, layer in enumerate(layers):
        to = f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            query_key_value = getattr(layer.attn, f"in_proj_{kind}").chunk(3)
            for name, value in zip(("q_proj", "k_proj", "v_proj"), query_key_value, strict=True):
                weights[f"{to}self_attn.{name}.{kind}"] = value
            weights[f"{to}self_attn.out_proj.{kind}"] = getattr(layer.attn.out_proj, kind)
            weights[f"{to}layer_norm1.{kind}"] = getattr(layer.ln_1, kind)
            weights[f"{to}layer_norm2.{kind}"] = getattr(layer.ln_2, kind)
            weights[f"{to}mlp.fc1.{kind}"] = getattr(layer.mlp.c_fc, kind)
            weights[f"{to}mlp.fc2.{kind}"] = getattr(layer.mlp.c_proj, kind)
    if projection:
        weights = {f"text_model.{name}": value for name, value in weights.items()}
        weights["text_projection.weight"] = torch.zeros(WIDTH, WIDTH)
    model.load_state_dict({name: value.detach().clone() for name, value in weights.items()})
    return model
