"""The moving average of the LoRA: its numbers by hand, through a run's files, and resumed with the same bits."""

import json

import torch
from safetensors.torch import load_file
from test_run import configure, run_stage

from b2diffurl.average import Average, evaluated
from b2diffurl.stages import loop


def test_its_numbers_by_hand_and_after_a_restart():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, generator=generator) for _ in range(7)]
    parameter = torch.nn.Parameter(values[0].clone())
    made, wanted = Average({"w": parameter}, decay=0.3), values[0]
    for number, value in enumerate(values[1:], 1):
        parameter.data.copy_(value)
        if number == 4:  # in another process, as a stage is
            stored = made.state()
            made = Average({"w": parameter}, decay=0.3)
            made.restore(stored)
        made.step()
        decay = 0.0 if number == 1 else min(0.3, number / (9 + number))  # diffusers' beginning
        wanted = decay * wanted + (1 - decay) * value
        torch.testing.assert_close(made.state()["ema.w"], wanted)
    with made.in_place():
        torch.testing.assert_close(parameter.detach(), wanted)
    assert torch.equal(parameter.detach(), values[-1])


def test_a_run_keeps_it_evaluates_it_and_trains_as_without(tmp_path):
    few = tmp_path / "few.json"
    few.write_text('["a red circle", "a blue ring"]')
    same = [f"--config.prompts.train={few}"]
    more = [*same, f"--config.prompts.test={few}", "--config.train.ema_decay=0.5"]
    more += ["--config.evaluate.images_per_prompt=1"]
    config = configure(tmp_path / "a", *more)
    loop.main(config)
    run_stage(tmp_path / "b", 0, *same)  # without
    for stage in (0, 1):  # each stage in models of its own
        run_stage(tmp_path / "c", stage, *more)

    def lora(name, stage, where):
        folder = tmp_path / name / "t" / f"stage{stage}/checkpoints/checkpoint_1" / where
        return load_file(folder / "pytorch_lora_weights.safetensors")

    plain, average = lora("a", 0, ""), lora("a", 0, "ema")
    assert all(torch.equal(value, lora("b", 0, "")[name]) for name, value in plain.items())
    assert any(not torch.equal(value, average[name]) for name, value in plain.items())
    for stage in (0, 1):
        assert all(torch.equal(value, lora("c", stage, "ema")[k]) for k, value in lora("a", stage, "ema").items())
    settings = json.loads((tmp_path / "a/t/eval.json").read_text())["settings"]
    assert settings["checkpoint"] == str(evaluated(config, tmp_path / "a/t/stage1/checkpoints/checkpoint_1"))
    assert settings["checkpoint"].endswith("checkpoint_1/ema")
