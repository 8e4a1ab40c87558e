"""LoRAs in other programs' forms: read back by diffusers' own readers of them, for the same picture; the model card."""

import argparse
import hashlib
import json
import pathlib
import re
import shutil

import pytest
import tiny
import tiny_flux
import tiny_sd3
import tiny_sdxl
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from b2diffurl.bench import random_weights
from b2diffurl.errors import UserError
from b2diffurl.export import __main__ as command
from b2diffurl.export import kohya
from b2diffurl.families import lora
from b2diffurl.models import Models
from b2diffurl.run.command import parse
from b2diffurl.run.folder import flat

TRANSFORMER_LAYERS = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{kind: (pipeline folder, checkpoint folder)} with random numbers in every matrix."""
    made = {}
    for kind in ("sd", "sdxl", "sd3", "flux"):
        folder = tmp_path_factory.mktemp(kind)
        if kind == "sd":
            random_weights.write_pipeline(folder, torch.float32, tiny.GEOMETRY)
            pipeline = folder
        else:
            write = {"sdxl": tiny_sdxl.write, "flux": tiny_flux.write, "sd3": lambda f: tiny_sd3.write(f, True)}[kind]
            pipeline = write(folder)
        flags = [f"--config.pretrained.model={pipeline}", "--config.schedule.untrained=1"]
        loaded = Models(parse(["x", "--config", "config/stage_process.py:shapes", *flags])[0])
        denoiser = loaded.family.denoiser
        torch.manual_seed(1)
        more = TRANSFORMER_LAYERS if kind in ("sd3", "flux") else ()
        for own in lora.add(denoiser, (*loaded.family.lora_targets, *more), 2, 0).values():
            torch.nn.init.normal_(own, 0, 0.3)
        checkpoint = folder / "run/stage3/checkpoints/checkpoint_1"
        checkpoint.mkdir(parents=True)
        lora.save(denoiser, checkpoint, {"base_model": "a/b"})
        made[kind] = pipeline, checkpoint
    return made


def run(checkpoint, out, form="kohya", card=False, push=None):
    command.main(argparse.Namespace(checkpoint=checkpoint, out=out, format=form, card=card, push=push))


def _copied(checkpoint, folder):
    return pathlib.Path(shutil.copytree(checkpoint, folder))


def _stock(pipeline, **options):
    from diffusers import DiffusionPipeline

    stock = DiffusionPipeline.from_pretrained(pipeline, local_files_only=True, **options)
    stock.set_progress_bar_config(disable=True)
    return stock


def _drawn(stock):
    """A picture of two steps, as a tensor."""
    given = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return stock("a cat", **given).images


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_the_stock_pipeline_reads_kohyas_form_and_draws_the_same(kind, checkpoints, tmp_path):
    pipeline, checkpoint = checkpoints[kind]
    if kind == "flux":  # diffusers' reader takes single blocks of FLUX's own size alone: see the next test
        checkpoint = _copied(checkpoint, tmp_path / "double")
        kept = {n: m for n, m in load_file(checkpoint / command.NAME).items() if ".single_" not in n}
        with safe_open(checkpoint / command.NAME, "pt") as stored:
            save_file(kept, checkpoint / command.NAME, stored.metadata())
    out = tmp_path / "new/lora.safetensors"
    run(checkpoint, out)
    pictures = []
    for source in (None, checkpoint, out):
        stock = _stock(pipeline, **({"add_watermarker": False} if kind == "sdxl" else {}))
        if source:
            stock.load_lora_weights(source)
        pictures.append(_drawn(stock))
    base, ours, theirs = pictures
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours - base).abs().max() > 1e-3


def _outputs(lora):
    """{layer: what its LoRA adds for a fixed input} of a LoRA in diffusers' form."""
    found = {}
    for layer in {name.rsplit(".lora_", 1)[0] for name in lora}:
        down, up = (lora[f"{layer}.lora_{side}.weight"] for side in "AB")
        found[layer] = up @ (down @ torch.linspace(-1, 1, down.shape[1]))
    return found


def test_fluxs_single_blocks_come_back_from_diffusers_reader():
    """At FLUX's own width, which the reader expects; the MLP's first layer is there or gets zeros."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    torch.manual_seed(0)
    rank, width, block = 2, 3072, "transformer.single_transformer_blocks.1"
    sizes = {
        "attn.to_q": (width, width), "attn.to_k": (width, width), "attn.to_v": (width, width),
        "proj_out": (5 * width, width), "proj_mlp": (width, 4 * width),
    }  # fmt: skip
    lora = {
        f"{block}.{part}.lora_{side}.weight": torch.randn((rank, inner) if side == "A" else (outer, rank))
        for part, (inner, outer) in sizes.items()
        for side in "AB"
    }
    for without in ("proj_mlp", "attn.to_k", ""):
        given = {name: matrix for name, matrix in lora.items() if not without or without not in name}
        made = kohya.convert(given, "FluxTransformer2DModel")
        linear1 = "lora_unet_single_blocks_1_linear1"
        assert made[f"{linear1}.lora_up.weight"].shape == (7 * width, 4 * rank)
        assert made[f"{linear1}.alpha"] == len(made[f"{linear1}.lora_down.weight"]) == 4 * rank
        found, wanted = _outputs(_convert_kohya_flux_lora_to_diffusers(dict(made))), _outputs(given)
        for name, output in found.items():
            assert torch.allclose(output, wanted[name], rtol=1e-4, atol=1e-3) if name in wanted else not output.any(), (
                name
            )
        assert found.keys() == _outputs(lora).keys()


class Checkpoint(dict):
    """Of SD3 by its authors' names: every weight that is not given is there, and small."""

    def pop(self, name):
        return super().pop(name, torch.zeros(6))


def test_sd3s_layers_are_those_of_diffusers_converter(checkpoints, tmp_path):
    """diffusers' reader of SD3's own checkpoints splits what kohya's LoRA adds to its layers, and each comes back."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    pipeline, checkpoint = checkpoints["sd3"]
    out = tmp_path / "lora.safetensors"
    run(checkpoint, out)
    stored, added = load_file(out), Checkpoint({"context_embedder.weight": torch.zeros(3, 2)})
    for name in [name for name in stored if name.endswith(".lora_down.weight")]:
        layer, down = name.split(".")[0], stored[name]
        scale = stored[f"{layer}.alpha"] / len(down)
        block, number, place = re.fullmatch(r"lora_unet_(joint_blocks)_(\d)_(.+)", layer).groups()
        place = re.sub(r"^(x|context)_block_(attn2?|mlp)_", r"\1_block.\2.", place)
        added[f"{block}.{number}.{place}.weight"] = scale * stored[f"{layer}.lora_up.weight"] @ down
    given = _outputs(load_file(checkpoint / command.NAME))
    found = convert_sd3_transformer_checkpoint_to_diffusers(added)
    assert sum(".attn2." in name for name in given) == 4
    for name, output in given.items():
        weight = found[f"{name.removeprefix('transformer.')}.weight"]
        assert torch.allclose(weight @ torch.linspace(-1, 1, weight.shape[1]), output, atol=1e-5), name
    merged, loaded = _stock(pipeline), _stock(pipeline)
    for name in given:
        layer = name.removeprefix("transformer.")
        merged.transformer.get_submodule(layer).weight.data += found[f"{layer}.weight"]
    loaded.load_lora_weights(checkpoint)
    assert torch.allclose(_drawn(merged), _drawn(loaded), atol=1e-5)
    assert (_drawn(merged) - _drawn(_stock(pipeline))).abs().max() > 1e-3
    with safe_open(out, "pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.lora_sd3"


def test_kohyas_names_and_alpha(checkpoints, tmp_path):
    """The names that a kohya file of each kind has, by its documentation; α is the rank."""
    for kind, name in (
        ("sd", r"lora_unet_(down_blocks_\d|mid_block|up_blocks_\d)_attentions_\d_transformer_blocks_0_attn[12]_to_\w+"),
        ("sdxl", r"lora_unet_((input|output)_blocks_\d_1|middle_block_1)_transformer_blocks_\d_attn[12]_to_\w+"),
    ):
        out = tmp_path / f"{kind}.safetensors"
        run(checkpoints[kind][1], out)
        found = load_file(out)
        for key, value in found.items():
            assert re.fullmatch(rf"{name}\.(lora_down\.weight|lora_up\.weight|alpha)", key), key
            if key.endswith("alpha"):
                assert value.item() == 2
        assert 3 * len(load_file(checkpoints[kind][1] / "pytorch_lora_weights.safetensors")) == 2 * len(found)
        with safe_open(out, "pt") as stored:
            assert stored.metadata()["ss_network_dim"] == "2"
            assert stored.metadata()["base_model"] == "a/b"


def test_sdxl_layers_by_stabilitys_names():
    """Against the places of SDXL's attention in Stability's code: input 4, 5, 7, 8; middle; output 0 to 5."""
    layers = [f"down_blocks.{block}.attentions.{layer}" for block in (1, 2) for layer in (0, 1)]
    layers += ["mid_block.attentions.0", *(f"up_blocks.{b}.attentions.{n}" for b in (0, 1) for n in (0, 1, 2))]
    rest = ".transformer_blocks.0.attn1.to_q.lora_A.weight"
    found = kohya.convert({f"unet.{layer}{rest}": torch.zeros(2, 3) for layer in layers}, "UNet2DConditionModel")
    blocks = [key.split("_transformer")[0].removeprefix("lora_unet_") for key in found if "lora_down" in key]
    assert blocks == [
        *(f"input_blocks_{n}_1" for n in (4, 5, 7, 8)), "middle_block_1", *(f"output_blocks_{n}_1" for n in range(6))
    ]  # fmt: skip


def test_a_layer_of_sdxl_that_has_no_name_there_is_refused():
    names = ("unet.down_blocks.1.resnets.0.time_emb_proj", "unet.down_blocks.1.attentions.0.proj_in")
    lora = {f"{name}.{side}.weight": torch.zeros(2, 2) for name in names for side in ("lora_A", "lora_B")}
    with pytest.raises(UserError, match="down_blocks_1_resnets_0_time_emb_proj: kohya's form of an SDXL's"):
        kohya.convert(lora, "UNet2DConditionModel")


def test_diffusers_form_is_the_checkpoints_own(checkpoints, tmp_path):
    _, checkpoint = checkpoints["flux"]
    run(checkpoint, tmp_path / "l.safetensors", "diffusers")
    assert (tmp_path / "l.safetensors").read_bytes() == (checkpoint / command.NAME).read_bytes()


def test_what_cannot_be_exported_is_one_line(checkpoints, tmp_path):
    layer = "transformer.transformer_blocks.0.norm1.linear.lora_A.weight"
    with pytest.raises(UserError, match=r"norm1\.linear: kohya's form of a FluxTransformer2DModel has no such layer"):
        kohya.convert({layer: torch.zeros(2, 3)}, "FluxTransformer2DModel")
    with pytest.raises(UserError, match="Other: kohya's form of its LoRA is not known"):
        kohya.convert({layer: torch.zeros(2, 3)}, "Other")
    with pytest.raises(UserError, match="must be a file that ends in"):
        run(checkpoints["sd"][1], tmp_path)
    with pytest.raises(UserError, match="missing"):
        run(tmp_path, tmp_path / "l.safetensors")
    with pytest.raises(UserError, match=r"/nowhere/pytorch_lora_weights\.safetensors is missing"):
        run(pathlib.Path("/nowhere"), tmp_path / "l.safetensors")
    (tmp_path / "bare").mkdir()
    save_file({"unet.x": torch.zeros(1)}, tmp_path / "bare/pytorch_lora_weights.safetensors")
    run(tmp_path / "bare", tmp_path / "l.safetensors", "diffusers")
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"README\.md is no model card.*a folder of its own"):
        run(checkpoints["sd"][1], tmp_path / "l.safetensors", card=True)
    assert (tmp_path / "README.md").read_text() == "mine"
    with pytest.raises(UserError, match="--card needs a run's"):
        run(_copied(checkpoints["sd"][1], tmp_path / "lone"), tmp_path / "new/l.safetensors", card=True)


def _no_network(*_, **__):
    raise RuntimeError("no network")


def test_card(checkpoints, tmp_path, monkeypatch):
    """Front matter as the hub reads it, the run's settings, its results, how to load; pushed file by file."""
    _, checkpoint = checkpoints["sd"]
    folder = checkpoint.parents[2]
    config = parse(["x", "--config", "config/stage_process.py:sdv1.4"])[0]
    (folder / "config.json").write_text(json.dumps(flat(config)))
    row = {"prompts": "train", "images": 8, "images_sha256": "", "reward_interval": [0, 1]}
    results = [{**row, "model": model, "reward": reward} for model, reward in (("before", 0.25), ("after", 0.75))]
    weights = (checkpoint / "pytorch_lora_weights.safetensors").read_bytes()
    settings = {"sha256": hashlib.sha256(weights).hexdigest()}
    (folder / "eval.json").write_text(json.dumps({"settings": settings, "results": results}))
    for name in ("before_after.png", "curves.png"):
        (folder / name).write_bytes(b"png")
    with pytest.raises(UserError, match="--card needs a run's"):  # what the stage began with is of the stage before
        run(_copied(checkpoint, checkpoint.with_name("checkpoint_0")), tmp_path / "0/l.safetensors", card=True)
    lines = [{"stage": stage, "step": "select", "reward/queries": 1300 * (stage + 1)} for stage in range(6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sent = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, exist_ok: sent.append(name))
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_file",
        lambda self, path_or_fileobj, path_in_repo, repo_id: sent.append(path_in_repo),
    )
    run(checkpoint, tmp_path / "card/l.safetensors", "diffusers", card=True, push="me/mine")
    assert sent == ["me/mine", "l.safetensors", "README.md", "before_after.png", "curves.png"]
    text = (tmp_path / "card/README.md").read_text()
    from huggingface_hub import ModelCard

    card = ModelCard(text)
    found = card.data.to_dict()
    assert (found["base_model"], found["library_name"]) == ("CompVis/stable-diffusion-v1-4", "diffusers")
    assert "| stages | 4 |" in text
    assert found["license"] == "creativeml-openrail-m"
    assert "| reward queries | 5200 |" in text  # of the stages up to the checkpoint's
    assert "to raise the reward `clip`" in text
    assert "0.750 [0.000, 1.000]" in text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'load_lora_weights("me/mine", weight_name="l.safetensors")' in code
    assert "eta=1.0" in code
    assert pathlib.Path(tmp_path / "card/before_after.png").read_bytes() == b"png"
    settings_now = (folder / "config.json").read_text()
    fewer = {name: value for name, value in json.loads(settings_now).items() if name != "sample.resolution"}
    (folder / "config.json").write_text(json.dumps(fewer))  # of an earlier version
    run(checkpoint, folder / "mine.safetensors", "diffusers", card=True)  # beside the run's own pictures
    assert (folder / "README.md").read_text().replace("mine.s", "l.s").replace('"."', '"me/mine"') == text
    (folder / "config.json").write_text(settings_now)
    sent.clear()
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", _no_network)
    with pytest.raises(UserError, match=r"--push me/mine: no network; .*l\.safetensors is written"):
        run(checkpoint, tmp_path / "card/l.safetensors", "diffusers", push="me/mine")
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # the hub's own way to fail
    with pytest.raises(UserError, match=r"--push me/mine: "):
        run(checkpoint, tmp_path / "card/l.safetensors", "diffusers", push="me/mine")
    average = _copied(checkpoint, checkpoint / "ema")  # the same numbers, so the results are its own too
    run(average, tmp_path / "ema/l.safetensors", "diffusers", card=True)
    assert "0.750 [0.000, 1.000]" in (tmp_path / "ema/README.md").read_text()
    (folder / "eval.json").write_text(json.dumps({"settings": {"sha256": "another's"}, "results": results}))
    run(checkpoint, tmp_path / "other/l.safetensors", "diffusers", card=True)
    text = (tmp_path / "other/README.md").read_text()
    assert "Before and after" not in text
    assert "![the run, stage by stage](curves.png)" in text
    assert (tmp_path / "other/curves.png").exists()
    assert not (tmp_path / "other/before_after.png").exists()
    config.pretrained.model = str(checkpoints["sd"][0])
    (folder / "config.json").write_text(json.dumps(flat(config)))
    run(checkpoint, tmp_path / "local/l.safetensors", "diffusers", card=True)
    text = (tmp_path / "local/README.md").read_text()
    assert str(tmp_path.parent) not in text  # no path of this machine
    assert f'from_pretrained("path/to/{checkpoints["sd"][0].name}")' in text
    _, sd3 = checkpoints["sd3"]
    shutil.copy(folder / "config.json", sd3.parents[2])
    run(sd3, tmp_path / "sd3/l.safetensors", "kohya", card=True)
    assert "`l.safetensors` in ComfyUI's `models/loras`" in (tmp_path / "sd3/README.md").read_text()
