"""The before/after measures against brute force."""

import contextlib
import itertools
import json
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image

from b2diffurl.errors import UserError
from b2diffurl.evaluate import before_after, measures
from b2diffurl.evaluate.__main__ import command
from b2diffurl.evaluate.before_after import bootstrap_interval, table
from b2diffurl.evaluate.measures import feature_distance
from b2diffurl.families import lora as lora_module
from b2diffurl.models import Models
from b2diffurl.noise import stream_noise, stream_seed
from b2diffurl.rewards import clip_of
from b2diffurl.rollout import denoise
from b2diffurl.run import storage
from b2diffurl.run.command import parse
from b2diffurl.run.folder import Run


def pictures(count, size=64):
    noise = np.random.default_rng(0).integers(256, size=(count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in noise]


def configure(*flags):
    return parse(["x", "--config", "config/stage_process.py:shapes", *flags])[0]


def test_diversity_is_the_mean_cosine_distance_of_pairs_within_a_prompt():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, 5, 8))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    pairs = [1 - a @ b for prompt in features for a, b in itertools.combinations(prompt, 2)]
    assert feature_distance(features) == pytest.approx(np.mean(pairs))
    assert feature_distance(np.repeat(features[:, :1], 3, axis=1)) == pytest.approx(0, abs=1e-12)


def test_interval_covers_the_mean_at_the_nominal_rate():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(0.5, 0.2, size=40))
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_table_has_a_row_for_each_model_and_list():
    row = {
        "images": 8,
        "reward": 0.1,
        "reward_interval": [0, 0.2],
    }
    results = [
        {
            "model": m,
            "prompts": p,
            **row,
            **({"oracle": 0.5, "oracle_interval": [0.4, 0.6]} if p == "train" else {}),
            "diversity": 0.3,
        }
        for m in ("before", "after")
        for p in ("train", "held-out")
    ]
    lines = table(results).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["train", "before"], ["train", "after"], ["held-out", "before"], ["held-out", "after"],
    ]  # fmt: skip
    assert lines[0].split() == ["prompts", "model", "images", "reward", "oracle", "alignment", "diversity"]
    assert "0.500 [0.400, 0.600]" in lines[1]
    assert lines[3].split()[-2] == "-"


def test_lpips_is_the_mean_over_the_pairs_of_a_prompt(monkeypatch):
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import alexnet

    torch.manual_seed(0)
    random = alexnet()  # the real network; its weights cannot be downloaded here
    monkeypatch.setattr("torchvision.models.alexnet", lambda weights: random)
    measured = measures.Quality(configure("--config.evaluate.lpips=True"), torch.device("cpu"))
    monkeypatch.setattr(measures, "LPIPS_PAIRS", 4)
    images = pictures(6)
    found = measured(images, 3)["lpips"]
    alone = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)  # takes pixels in 0..1

    def tensor(image):
        return torch.from_numpy(np.asarray(image) / 255).float().permute(2, 0, 1)[None]

    pairs = [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
    with torch.no_grad():
        expected = np.mean([alone(tensor(images[i]), tensor(images[j])).item() for i, j in pairs])
    assert found == pytest.approx(expected, rel=1e-4)
    assert found > 0.01
    assert "lpips" not in measured(images, 1)


def test_inception_score_is_the_exponential_of_the_mean_divergence():
    from torchmetrics.image.inception import InceptionScore

    class Logits(torch.nn.Module):
        def forward(self, x):
            return x.float().mean((2, 3)) / 3

    images = pictures(40, 8)
    mean, _ = measures.inception_score(InceptionScore(Logits(), splits=1), images)
    logits = np.stack([np.asarray(image).reshape(-1, 3).mean(0) / 3 for image in images])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert mean == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()), rel=1e-4)
    split = InceptionScore(Logits(), splits=10)
    assert measures.inception_score(split, images) == measures.inception_score(
        split, images
    )  # whatever the global seed


def test_missing_weights_of_a_measure_are_named_before_anything_is_sampled(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for switch in ("lpips", "inception_score"):
        with pytest.raises(UserError, match=rf"put them into {tmp_path}.*--config\.evaluate\.{switch}=False"):
            measures.Quality(configure(f"--config.evaluate.{switch}=True"), torch.device("cpu"))


@pytest.fixture
def checkpoint(tmp_path):
    policy, parameters = Models(configure()).trainable()
    torch.manual_seed(0)
    for parameter in parameters.values():
        parameter.data += 0.02 * torch.randn_like(parameter)
    (tmp_path / "lora").mkdir()
    lora_module.save(policy.denoiser, tmp_path / "lora")
    return tmp_path / "lora"


def test_evaluation_depends_on_the_batch_by_rounding_alone_and_takes_a_list_of_ones_own(checkpoint, elsewhere):
    (elsewhere / "mine.json").write_text('["a red circle", "a purple zebra", "a blue ring"]')
    reward = "--config.reward.name=jpeg_compressibility:0.5 + clip"
    stored = []
    for batch_size in ("1", "16"):
        steps = (f"--config.{setting}" for setting in ("sample.num_steps=4", "schedule.left=2", "schedule.right=4"))
        config = configure(reward, *steps)
        command(config, str(checkpoint), f"out{batch_size}", "mine.json", "5", batch_size)
        stored.append(json.loads((elsewhere / f"out{batch_size}/eval.json").read_text()))
    assert stored[0]["settings"] == stored[1]["settings"]
    for one, other in zip(stored[0]["results"], stored[1]["results"], strict=True):
        assert one.pop("images_sha256")
        assert other.keys() - one.keys() == {"images_sha256"}
        assert {name: other[name] for name in one} == {
            name: pytest.approx(value, abs=0.01) if not isinstance(value, str) else value for name, value in one.items()
        }
    one, other = (np.asarray(Image.open(elsewhere / f"out{size}/before_after.png")).astype(int) for size in (1, 16))
    assert np.abs(one - other).max() <= 3  # of 255
    before, after = stored[1]["results"]
    assert before["images_sha256"] != after["images_sha256"]
    assert (before["model"], before["prompts"], before["images"]) == ("before", "mine", 15)
    assert before["reward"] == pytest.approx(0.5 * before["jpeg_compressibility"] + before["clip"])
    assert "oracle" not in before  # a zebra is not of its world
    with Image.open(elsewhere / "out1/before_after.png") as sheet:
        assert sheet.height > 3 * 96
    whole = (elsewhere / "out16/before_after.png").read_bytes()
    (elsewhere / "out16/before_after.png").unlink()
    command(config, str(checkpoint), "out16", "mine.json", "5", "16")  # a picture that was lost is made again
    assert (elsewhere / "out16/before_after.png").read_bytes() == whole
    for flags in (("mine.json", "0", ""), ("mine.json", "", "many")):
        with pytest.raises(UserError, match="must be a whole number of at least 1"):
            command(config, str(checkpoint), "out", *flags)


@torch.no_grad()
def test_a_picture_of_the_evaluation_is_that_of_its_own_noise_prompt_and_model(checkpoint):
    steps = (
        "sample.num_steps=3",
        "schedule.left=1",
        "schedule.right=3",
        "evaluate.images_per_prompt=2",
        "evaluate.seed=5",
        "seed=11",
    )
    loaded = Models(configure(*(f"--config.{own}" for own in steps)))
    prompts = ["a red circle", "a blue ring"]
    for folder in (None, checkpoint):
        images = before_after.generate(loaded.evaluating(), {"own": prompts}, folder, "")["own"]
        policy = loaded.policy(folder)
        for image, (prompt, number) in zip(images, itertools.product(prompts, range(2)), strict=True):
            noise = stream_noise(stream_seed(5, "evaluation", prompt, number), 4, loaded.family.latent_shape)[None]
            given = policy.initial(noise[:, 0]), loaded.family.embed([prompt]), noise[:, 1:], range(3)
            wanted = loaded.family.decode(denoise(policy, *given)[0][-1])[0].numpy()
            assert np.abs(np.asarray(image).astype(int) - wanted).max() <= 2


def test_before_is_the_base_after_the_checkpoint_and_a_reward_is_of_its_pictures_prompt(
    checkpoint, elsewhere, monkeypatch
):
    (elsewhere / "mine.json").write_text('["a", "b"]')
    (elsewhere / "grey.py").write_text(
        "def reward(images, prompts):\n"
        "    return [i.getpixel((0, 0))[0] + 1000 * (p == 'b') for i, p in zip(images, prompts)]\n"
    )
    monkeypatch.syspath_prepend(elsewhere)
    drawn = []

    def generate(loaded, lists, folder, label):
        drawn.append(folder)
        levels = [1, 2, 3, 11, 12, 13] if folder is None else [101, 102, 103, 111, 112, 113]
        return {name: [Image.new("RGB", (32, 32), (level,) * 3) for level in levels] for name in lists}

    monkeypatch.setattr(before_after, "generate", generate)
    given = ("--config.reward.name=grey:reward", "--config.evaluate.images_per_prompt=3")

    def evaluate():
        before_after.main(configure(*given), checkpoint, elsewhere / "out", "mine.json")

    evaluate()
    before, after = json.loads((elsewhere / "out/eval.json").read_text())["results"]
    assert drawn == [None, checkpoint]
    assert (before["model"], before["reward"], before["reward_interval"]) == ("before", 507, [2, 1012])
    assert (after["model"], after["reward"], after["reward_interval"]) == ("after", 607, [102, 1112])
    evaluate()
    assert len(drawn) == 2
    path = checkpoint / "pytorch_lora_weights.safetensors"
    storage.write_tensors(path, {n: 2 * t for n, t in storage.read_tensors(path, "").items()}, {"format": "pt"})
    evaluate()
    assert len(drawn) == 4  # other weights in the same place
    assert not Run(configure(*given)).folder.exists()  # nothing of a run is touched that it is not about
    assert not Run(configure(*given)).log.exists()
    (elsewhere / "mine.json").write_text('["a", "b", "a"]')
    evaluate()
    assert len(drawn) == 4  # the second "a" would have the same noise
    evaluate_more = configure(*given, "--config.sample.groups=3", "--config.reward.timeout=1")
    before_after.main(evaluate_more, checkpoint, elsewhere / "out", "mine.json")
    assert len(drawn) == 4  # neither matters here


def test_one_prompt_has_no_interval_and_one_picture_no_diversity():
    config = configure("--config.reward.name=jpeg_compressibility", "--config.evaluate.images_per_prompt=1")
    with Models(config).scoring() as reward:
        clip = clip_of(reward, config, "cpu")

        def measured(*prompts):
            own = pictures(len(prompts), 32)
            return before_after.measure(config, before_after.score(reward, prompts, own, 1), clip, prompts, own)

        assert set(measured("a")) == {"images", "images_sha256", "reward", "clip", "jpeg_compressibility"}
        assert "reward_interval" in measured("a", "b")


def test_figures_are_taken_while_the_rewards_models_are_on_the_device(tmp_path, monkeypatch):
    """The figures' CLIP can be a term of the reward, which waits in the machine's memory between two uses."""
    inside, seen, scoring, measure = [], [], Models.scoring, before_after.measure

    @contextlib.contextmanager
    def watched(self):
        with scoring(self) as reward:
            inside.append(True)
            yield reward
            inside.pop()

    monkeypatch.setattr(Models, "scoring", watched)
    monkeypatch.setattr(before_after, "measure", lambda *given: seen.append(bool(inside)) or measure(*given))
    (tmp_path / "one.json").write_text('["a red circle"]')
    config = configure("--config.evaluate.images_per_prompt=1", "--config.sample.num_steps=1",
                       "--config.schedule.left=1", "--config.schedule.right=1")  # fmt: skip
    loaded = Models(config)
    loaded.trainable()
    lora_module.save(loaded.family.denoiser, tmp_path, {})
    before_after.main(config, tmp_path, tmp_path / "out", str(tmp_path / "one.json"), loaded)
    assert seen == [True, True]
