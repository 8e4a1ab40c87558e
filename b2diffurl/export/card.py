"""A model card, as the hub expects it: what the LoRA was made from, how, what it changed, and how to load it."""

import hashlib
import json
import pathlib

from ..evaluate.before_after import table
from ..run.prompts import read_prompts
from ..run.storage import read_json

CARD = """---
{base}library_name: diffusers
pipeline_tag: text-to-image
tags: [lora, text-to-image, reinforcement-learning]
---

# {name}

A LoRA of `{model}`, trained by reinforcement learning with
B²-DiffuRL ([arXiv 2503.11240](https://arxiv.org/abs/2503.11240)) so that images match their prompts better.

| | |
| --- | --- |
| method, algorithm | {method}, {algorithm} |
| reward | {reward} |
| prompts | {prompts} |
| stages | {stages} |
| reward queries | {queries} |
| denoising steps, guidance | {steps}, {guidance} |
| LoRA rank, learning rate | {rank}, {learning_rate} |
| seed | {seed} |
{results}
## Load it

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{model}")
pipeline.load_lora_weights("FOLDER_OR_REPOSITORY", weight_name="{file}")
pipeline({prompt}, num_inference_steps={steps}, guidance_scale={guidance}).images[0]
```

## Licence and limits

The licence of the base model holds for what is made with it. The reward is a model's judgement: what pleases it is not
always what a prompt says.
"""


def write(run, stage, checkpoint, file, path):
    """Write the card of a run's stage to path; file: the name of the LoRA's file. -> pictures that belong beside it.

    run: the run's folder, whose config.json tells how it was made; the results are those of eval.json, if it is
    there and of the checkpoint's LoRA.
    """
    config, pictures = read_json(run / "config.json", "run_sample.py"), []
    weights = (checkpoint / "pytorch_lora_weights.safetensors").read_bytes()
    found = read_json(run / "eval.json", "b2diffurl.evaluate") if (run / "eval.json").exists() else None
    if found and found["settings"]["sha256"] == hashlib.sha256(weights).hexdigest():
        pictures = [picture for picture in [run / "before_after.png"] if picture.exists()]
    else:
        found = None
    model, prompts = config["pretrained.model"], read_prompts(config["prompts.train"])
    hub_id = not pathlib.Path(model).exists() and model.count("/") == 1
    text = CARD.format(
        base=f"base_model: {json.dumps(model)}\n" if hub_id else "", model=model, name=config["exp_name"], file=file,
        results=_results(found, pictures), method=config["method"], algorithm=config["train.algorithm"],
        reward=config["reward.name"], prompts=f"{len(prompts)} of `{config['prompts.train']}`", stages=stage + 1,
        queries=(stage + 1) * config["sample.groups"] * config["sample.branches"],
        steps=config["sample.num_steps"], guidance=config["sample.guidance_scale"], rank=config["train.lora_rank"],
        learning_rate=config["train.learning_rate"], seed=config["seed"], prompt=json.dumps(prompts[0]),
    )  # fmt: skip
    path.write_text(text, encoding="utf-8")
    return pictures


def _results(found, pictures):
    """The table of an eval.json, or None, and its pictures."""
    lines = ["", "## Before and after", "", "```", table(found["results"]), "```"] if found else []
    for picture in pictures:
        lines += ["", f"![the same noise before and after]({picture.name})"]
    return "\n".join([*lines, ""])
