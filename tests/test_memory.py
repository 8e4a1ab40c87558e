"""Memory counted on the meta device, against published sizes and against what autograd really keeps."""

import pytest
import tiny
import torch

from b2diffurl.bench import geometries, random_weights
from b2diffurl.bench.memory import table
from b2diffurl.errors import UserError
from b2diffurl.families import load_family, memory
from b2diffurl.models import Models
from b2diffurl.run.command import parse


def configure(preset, *settings):
    flags = [f"--config.{setting}" for setting in settings]
    return parse(["x", "--config", f"config/stage_process.py:{preset}", *flags])[0]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    random_weights.write_pipeline(folder, torch.float32, tiny.GEOMETRY)
    return folder


@pytest.mark.parametrize(("preset", "parameters"), [
    ("sdv1.4", 859_520_964), ("sdxl", 2_567_463_684), ("flux", 11_901_408_320),
])  # fmt: skip
def test_the_presets_models_have_their_published_sizes(preset, parameters, tmp_path):
    config = configure(preset)
    geometries.write(tmp_path, config.pretrained.model)
    config.pretrained.model = str(tmp_path)
    family = load_family(config)
    assert sum(own.numel() for own in family.geometry.parameters()) == parameters
    assert family.resolution == {"sdv1.4": 512, "sdxl": 1024, "flux": 512}[preset]


def test_counted_activations_are_what_autograd_keeps(pipeline):
    """In bf16, where CPU and GPU compute the LoRA apart, every storage once."""
    config = configure("shapes", f"pretrained.model={pipeline}", "mixed_precision=bf16", "train.log_prob=mean")
    loaded = Models(config)
    policy, parameters = loaded.trainable()
    cond = loaded.family.embed(["a red circle"])
    ours = {own.untyped_storage().data_ptr() for own in policy.denoiser.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    latents = torch.zeros(1, *loaded.family.latent_shape, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loaded.family.predict(policy.denoiser, latents, torch.tensor([5]), cond, cond, 5.0)
    wanted = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in ours)
    sizes = memory.count(loaded.family, config)
    assert sizes["activations"] == pytest.approx(wanted, rel=0.05)  # the backward pass itself keeps a little
    assert sizes["lora"] == 16 * sum(own.numel() for own in parameters.values())
    assert sizes["weights"] == sum(own.nbytes for own in policy.denoiser.parameters() if not own.requires_grad)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(pipeline):
    config = configure("shapes", f"pretrained.model={pipeline}", "train.batch_size=3")
    family = load_family(config)
    sizes = memory.count(family, config)
    states = 48 * 2 * 21 * 4 * 8 * 8  # best and worst of each group, all 20 steps in the last stage
    assert memory.trajectories(family, config) == 4 * states
    needed = sizes["weights"] + sizes["lora"] + 3 * sizes["activations"] + 4 * states
    memory.require(family, config, needed)
    with pytest.raises(UserError, match=r"config\.train\.batch_size=3: training .* takes 0\.0 GiB \(weights"):
        memory.require(family, config, needed - 1)
    assert "denoiser" not in vars(family)
    for settings, wanted in (
        (["method=ddpo", "train.algorithm=dpok"], 8 * 48 * 5 * 21 * 256),  # every image, and the base model's means
        (["train.algorithm=dpo"], 4 * states), (["train.algorithm=dpo", "train.dpo_reference=base"], 8 * states),
        (["method=dfusion", "sample.branches=9"], 4 * 48 * 8 * 21 * 256),  # 4 pairs
    ):  # fmt: skip
        assert memory.trajectories(family, configure("shapes", f"pretrained.model={pipeline}", *settings)) == wanted
    pairs = configure("shapes", f"pretrained.model={pipeline}", "train.batch_size=1", "train.algorithm=dpo")
    needed -= sizes["activations"]  # a call of one pair has two transitions
    memory.require(family, pairs, needed)
    with pytest.raises(UserError):
        memory.require(family, pairs, needed - 1)


def test_a_part_of_the_weights_and_two_whole_blocks():
    class Block(torch.nn.Linear):
        pass

    denoiser = torch.nn.Sequential(Block(3, 5), Block(4, 5), torch.nn.Linear(10, 10), Block(2, 5))
    denoiser._no_split_modules = ["Block"]
    total = 4 * (20 + 25 + 110 + 15)
    assert memory.own_part(denoiser, 1) == total
    assert memory.own_part(denoiser, 4) == total // 4 + 4 * (20 + 25)


def test_the_table_of_a_preset():
    lines = table(configure("sd3.5")).splitlines()
    figures = {line[:52].strip(): float(line[52:].split()[0]) for line in lines}
    assert figures["weights"] == pytest.approx(4.18, abs=0.01)
    whole, recomputed = (figures[f"activations per transition{how}"] for how in ("", ", gradient_checkpointing"))
    assert 10 * recomputed < whole < 8


def test_what_is_computed_again_keeps_no_attention_matrix_either():
    """At 64 x 64 tokens a head's is 32 MiB, and a layer has eight of them for both halves of guidance: 0.5 GiB."""
    figures = [line.split() for line in table(configure("sdv1.4")).splitlines()]
    (recomputed,) = (float(line[-2]) for line in figures if "gradient_checkpointing" in line)
    assert recomputed < 0.5
