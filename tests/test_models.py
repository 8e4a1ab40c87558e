"""Loading parts of a pipeline, and the reward against OpenCLIP's own features."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from b2diffurl.errors import UserError
from b2diffurl.families import load_family, lora, sd
from b2diffurl.families.loading import revision
from b2diffurl.models import Models
from b2diffurl.rewards import load_clip
from b2diffurl.run.command import parse
from b2diffurl.shapes.scene import SIZE


def configure(*more):
    return parse(["test", "--config", "config/stage_process.py:shapes", *more])[0]


def scheduler_of(config):
    return load_family(config).kernel(config.sample.num_steps, config.sample).scheduler


@pytest.fixture
def with_scheduler(tmp_path):
    """A pipeline folder whose scheduler_config.json is the given one."""

    def make(**scheduler):
        folder = tmp_path / "pipeline"
        (folder / "scheduler").mkdir(parents=True)
        shutil.copy("model/shapes/pipeline/model_index.json", folder)
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
        return configure(f"--config.pretrained.model={folder}")

    return make


def test_scheduler_of_sd_v1_4_is_read_as_ddim(with_scheduler):
    """SD v1.4 ships a PNDM configuration; without steps_offset and clip_sample DDIM's defaults would be wrong."""
    scheduler = scheduler_of(
        with_scheduler(
            _class_name="PNDMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            num_train_timesteps=1000, set_alpha_to_one=False, skip_prk_steps=True,
        )
    )  # fmt: skip
    assert scheduler.timesteps.tolist() == list(range(951, 0, -50))
    assert not scheduler.config.clip_sample
    assert scheduler.alphas_cumprod[999].item() == pytest.approx(0.00466, rel=1e-2)


@pytest.mark.parametrize(
    "broken",
    [
        {"timestep_spacing": "linspace"},
        {"thresholding": True},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ],
)
def test_scheduler_without_densities_is_refused(with_scheduler, broken):
    with pytest.raises(UserError, match="steps without a density"):
        scheduler_of(with_scheduler(**broken))


@pytest.mark.parametrize("section", ["sample", "evaluate"])
def test_more_steps_than_timesteps(section):
    with pytest.raises(UserError, match=rf"config\.{section}\.num_steps=1001: the model has 1000 timesteps"):
        Models(configure(f"--config.{section}.num_steps=1001")).family  # noqa: B018


def test_a_part_that_is_missing_is_named(with_scheduler):
    with pytest.raises(UserError, match="its unet does not load"):
        Models(with_scheduler()).family.denoiser  # noqa: B018


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_sampler_runs_the_trained_lora(tmp_path, precision):
    config = configure(f"--config.mixed_precision={precision}", "--config.train.log_prob=mean")
    policy, parameters = Models(config).trainable()
    for parameter in parameters.values():
        parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    trained = policy.denoiser
    lora.save(trained, tmp_path)
    sampler = Models(config).policy(tmp_path)
    negative = sampler.negative["encoder_hidden_states"]
    x, t = torch.randn(3, 4, 8, 8).to(trained.dtype), torch.tensor([951, 501, 1])
    with torch.no_grad():
        base = Models(config).family.denoiser(x, t, negative.expand(3, -1, -1)).sample
        wanted = trained(x, t, negative.expand(3, -1, -1)).sample
        given = sampler.denoiser(x, t, negative.expand(3, -1, -1)).sample
    assert (wanted - base).abs().max() > 0.1
    assert torch.equal(given, wanted)


def test_one_unet_serves_base_sampler_and_trainer_and_each_has_the_bits_of_its_own(tmp_path):
    """However often the steps of a run take turns."""
    config = configure()
    policy, parameters = Models(config).trainable()
    for parameter in parameters.values():
        parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    trained = policy.denoiser
    lora.save(trained, tmp_path)
    roles = {
        "base": lambda loaded: loaded.policy().denoiser,
        "sampler": lambda loaded: loaded.policy(tmp_path).denoiser,
        "trainer": lambda loaded: loaded.trainable(tmp_path)[0].denoiser,
    }
    x, t, embeds = torch.randn(3, 4, 8, 8), torch.tensor([951, 501, 1]), torch.randn(3, 16, 64)
    with torch.no_grad():
        alone = {name: role(Models(config))(x, t, embeds).sample for name, role in roles.items()}
        kept = Models(config)
        for name in ("base", "sampler", "trainer", "sampler", "base", "trainer", "base", "sampler"):
            unet = roles[name](kept)
            assert torch.equal(unet(x, t, embeds).sample, alone[name])
            assert unet is kept.family.denoiser
            trainable = {parameter for parameter, own in unet.named_parameters() if own.requires_grad}
            assert trainable == (set() if name == "base" else set(parameters))


def test_an_embedding_depends_on_its_prompt_alone():
    one, other = (Models(configure()).family for _ in range(2))
    prompts = ["a red circle", "", "a blue ring", "a red circle"]
    together = one.embed(prompts)["encoder_hidden_states"]
    assert torch.equal(together[0], together[3])
    for prompt, embedding in zip(reversed(prompts), together.flip(0), strict=True):
        assert torch.equal(other.embed([prompt])["encoder_hidden_states"][0], embedding)


def test_a_pipeline_of_another_family_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(UserError, match="is a KandinskyPipeline: the families here are StableDiffusionXLPipeline, "):
        Models(configure(f"--config.pretrained.model={tmp_path}")).family  # noqa: B018
    for text in ("{", "[]"):
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(UserError, match=r"its model_index\.json does not load"):
            Models(configure(f"--config.pretrained.model={tmp_path}")).family  # noqa: B018


@pytest.mark.parametrize(
    "kind", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", ["pipeline", "StableDiffusionPipeline"], None]
)
def test_any_pipeline_of_stable_diffusions_kind_is_its_family(tmp_path, kind):
    """Others' too, that bring code of their own, and folders whose index names none."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind} if kind else {}))
    assert type(load_family(configure(f"--config.pretrained.model={tmp_path}"))) is sd.StableDiffusion


def test_a_hubs_model_whose_index_is_not_in_the_cache_is_stable_diffusion():
    """As where earlier runs have put its parts there; the tests' hub is offline."""
    assert type(load_family(configure("--config.pretrained.model=nobody/nothing-at-all"))) is sd.StableDiffusion


def test_the_revision_is_a_commit_where_one_is_known():
    config = parse(["test", "--config", "config/stage_process.py:sdv1.4"])[0]
    assert len(revision(config)) == 40
    config.pretrained.model = "somebody/else"
    assert revision(config) == "main"
    config.pretrained.revision = "v2"
    assert revision(config) == "v2"


def test_decoding_in_parts_is_decoding_at_once(monkeypatch):
    family = Models(configure()).family
    latents = torch.randn(5, 4, 8, 8)
    whole = family.decode(latents)
    assert whole.shape == (5, SIZE, SIZE, 3)
    monkeypatch.setattr(sd, "DECODED_LATENT_PIXELS", 2 * 8 * 8)
    assert (whole.int() - family.decode(latents).int()).abs().max() <= 1


def test_clip_score_is_the_raw_cosine_of_openclips_features():
    import open_clip

    reward = load_clip(configure("--config.reward.batch_size=3"), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (7, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    images = [Image.fromarray(p.numpy()) for p in pixels]
    prompts = [
        "a red circle",
        "a blue ring",
        "a red circle",
        "a green cross",
        "a cyan square",
        "a blue ring",
        "a zebra",
    ]
    model, preprocess = open_clip.create_model_from_pretrained("local-dir:model/shapes/clip")
    model.eval()
    tokenizer = open_clip.get_tokenizer("local-dir:model/shapes/clip")
    for image, prompt, score in zip(images, prompts, reward(images, prompts), strict=True):
        with torch.no_grad():
            features = model.encode_image(preprocess(image)[None]), model.encode_text(tokenizer([prompt]))
        assert score.item() == pytest.approx(F.cosine_similarity(*features).item(), abs=1e-5)
    assert reward(images, prompts).dtype == torch.float32
