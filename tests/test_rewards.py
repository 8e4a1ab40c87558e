"""Every reward's own loading code on a tiny model of its real class, and the mix."""

import decimal
import io
import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from b2diffurl.errors import UserError
from b2diffurl.rewards import Reward, load_reward
from b2diffurl.run.command import parse
from b2diffurl.run.config import reward_terms

PROMPTS = ["a red circle", "a blue ring", "a red circle", "a long green cross above a cyan square", "a ring"]
SAID = "image answer concisely what is going on in this blue square"
WORDS = sorted({word for text in [*PROMPTS, SAID] for word in text.split()})


def images(size=48):
    noise = np.random.default_rng(0).integers(256, size=(len(PROMPTS), size, size, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in noise]


def load(*flags):
    return load_reward(parse(["x", "--config", "config/stage_process.py:shapes", *flags])[0], torch.device("cpu"))


def save_tokenizer(folder, *, special, template=None):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*special.values(), "<image>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(t, vocabulary[t]) for t in (special["cls_token"], special["sep_token"])]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<image>"], **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def hf_clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("hf_clip")
    tokenizer = CLIPTokenizer.from_pretrained("model/shapes/pipeline/tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **small,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    vision = {**small, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def test_pickscore_is_the_scaled_cosine_of_its_clip(hf_clip):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    scores = load("--config.reward.name=pickscore", f"--config.reward.pickscore_model={hf_clip}",
                  "--config.reward.batch_size=2")(images(), PROMPTS)  # fmt: skip
    model, tokenizer = CLIPModel.from_pretrained(hf_clip).eval(), CLIPTokenizer.from_pretrained(hf_clip)
    processor = CLIPImageProcessor.from_pretrained(hf_clip)
    with torch.no_grad():
        for score, image, prompt in zip(scores, images(), PROMPTS, strict=True):
            inputs = {**tokenizer(prompt, return_tensors="pt"), **processor(image, return_tensors="pt")}
            assert score.item() == pytest.approx(model(**inputs).logits_per_image.item(), abs=1e-4)
    assert scores.dtype == torch.float32


def test_a_folder_that_lacks_weights_is_refused(hf_clip, tmp_path):
    shutil.copytree(hf_clip, tmp_path, dirs_exist_ok=True)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in stored.items() if "visual_projection" not in name},
              tmp_path / "model.safetensors", {"format": "pt"})  # fmt: skip
    flags = ["--config.reward.name=pickscore", f"--config.reward.pickscore_model={tmp_path}"]
    with pytest.raises(UserError, match="lacks 1 weights of a CLIPModel, visual_projection"):
        load(*flags)
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="does not load"):
        load(*flags)


def test_aesthetic_is_the_linear_head_on_unit_features(hf_clip, tmp_path):
    torch.manual_seed(1)
    head = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Dropout(0.2), torch.nn.Linear(6, 1)).eval()
    path = tmp_path / "head.safetensors"
    save_file({f"layers.{name}": tensor for name, tensor in head.state_dict().items()}, path)
    flags = ["--config.reward.name=aesthetic", f"--config.reward.aesthetic_model={hf_clip}"]
    reward = load(*flags, f"--config.reward.aesthetic_head={path}")
    scores = reward(images(), PROMPTS)
    features = reward.terms[0][2].clip.of_images(images())
    assert torch.allclose(features.norm(dim=1), torch.ones(len(PROMPTS)))
    assert torch.allclose(scores, head(features)[:, 0], atol=1e-6)
    assert torch.equal(scores, reward(images(), ["another prompt"] * len(PROMPTS)))

    save_file({"other": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"config\.reward\.aesthetic_head=.*is not the published head"):
        load(*flags, f"--config.reward.aesthetic_head={path}")
    save_file({"layers.0.weight": torch.zeros(1, 5), "layers.0.bias": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="takes 5 features, the model gives 8"):
        load(*flags, f"--config.reward.aesthetic_head={path}")


def test_hpsv2_is_openclip_with_the_given_weights_file(tmp_path, monkeypatch):
    import open_clip

    folder = pathlib.Path("model/shapes/clip")
    scores = load("--config.reward.name=hpsv2", f"--config.reward.hpsv2_model=local-dir:{folder}",
                  "--config.reward.hpsv2_weights=")(images(), PROMPTS)  # fmt: skip
    assert torch.equal(scores, load()(images(), PROMPTS))
    tiny = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    tiny["text_cfg"] |= {"hf_tokenizer_name": str(folder)}
    (tmp_path / "tiny.json").write_text(json.dumps(tiny))
    open_clip.add_model_config(tmp_path / "tiny.json")
    torch.manual_seed(2)
    model = open_clip.create_model("tiny").eval()
    save_file(model.state_dict(), tmp_path / "hpsv2.safetensors")
    reward = load("--config.reward.name=hpsv2", "--config.reward.hpsv2_model=tiny",
                  f"--config.reward.hpsv2_weights={tmp_path}/hpsv2.safetensors").terms[0][2]  # fmt: skip
    stored = reward.model.state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    assert reward(images(), PROMPTS).isfinite().all()


def test_scores_are_float32s_whatever_the_runs_precision(hf_clip):
    for flags in ([], ["--config.reward.name=pickscore", f"--config.reward.pickscore_model={hf_clip}"]):
        full = load(*flags)(images(), PROMPTS)
        half = load(*flags, "--config.mixed_precision=fp16", "--config.train.log_prob=mean")(images(), PROMPTS)
        assert torch.equal(half, full)


def test_a_users_function_gets_pictures_of_its_own(monkeypatch, tmp_path):
    (tmp_path / "shrinking.py").write_text(
        "def reward(images, prompts):\n    return [image.thumbnail((2, 2)) or image.width for image in images]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = images()
    assert load("--config.reward.name=shrinking:reward").score(given, PROMPTS)[0].tolist() == [2.0] * len(given)
    assert [image.size for image in given] == [image.size for image in images()]
    with pytest.raises(UserError, match="it is no function, but float"):
        load("--config.reward.name=math:pi")
    with pytest.raises(UserError, match="math has no 'nothing'"):
        load("--config.reward.name=math:nothing")
    (tmp_path / "broken.py").write_text("import math\n\nmath.nothing\n")
    with pytest.raises(AttributeError, match="nothing"):  # with the user's own file and line
        load("--config.reward.name=broken:reward")


def test_a_users_function_gets_prompts_and_metadata_of_its_own_and_keeps_its_model():
    asked, metadata = [], {PROMPTS[0]: {"weight": 3}}

    class Reward_:
        def __init__(self):
            self.model = torch.nn.Linear(1, 1)

        def __call__(self, images, prompts, metadata):
            asked.append(([*prompts], [{**own} for own in metadata]))
            prompts[0] = "another"
            return [own.pop("weight", 0) for own in metadata]

    own = Reward_()
    reward, given = Reward([("mine:reward", 1.0, own)], metadata), [*PROMPTS]
    for _ in range(2):
        assert reward.score(images(), given)[0].tolist() == [3, 0, 3, 0, 0]  # the same prompt twice
    assert given == PROMPTS
    assert asked[0] == asked[1]
    reward.move("meta")
    assert own.model.weight.device.type == "cpu"


@pytest.mark.parametrize(
    "raw",
    [
        [np.array(1.0), np.array(2.0)], np.array([2.0, 1.0])[::-1], np.array([1, 2], dtype=object),
        [decimal.Decimal(1), decimal.Decimal(2)], (i + 1 for i in range(2)), torch.tensor([1.0, 2.0]), [1, 2],
        [torch.tensor(1.0), torch.tensor(2.0, requires_grad=True)],
    ],
    ids=lambda raw: type(raw).__name__,
)  # fmt: skip
def test_scores_in_any_usual_form(raw):
    reward = Reward([("mine:reward", 2.0, lambda images, prompts: raw)])
    assert reward.score(images()[:2], PROMPTS[:2])[0].tolist() == [2.0, 4.0]


@pytest.mark.parametrize("raw", [None, ["a", "b"], [1j, 2j], 3.0, [[1, 2], [3]]], ids=str)
def test_scores_in_no_form_are_one_line(raw):
    with pytest.raises(UserError, match="'mine:reward' returned") as caught:
        Reward([("mine:reward", 1.0, lambda images, prompts: raw)]).score(images()[:2], PROMPTS[:2])
    assert "\n" not in str(caught.value)


def test_clips_features_are_float32s_outside_of_the_score_too(monkeypatch):
    seen, clip, switch = [], load().terms[0][2], torch.backends.cuda.matmul
    encode, before = clip.model.encode_image, switch.allow_tf32
    monkeypatch.setattr(clip.model, "encode_image", lambda batch: seen.append(switch.allow_tf32) or encode(batch))
    switch.allow_tf32 = True
    clip.features(images())
    assert switch.allow_tf32
    switch.allow_tf32 = before
    assert seen == [False]


def test_rewards_never_compute_in_tf32_and_leave_the_setting_as_it_was():
    seen, switches = [], (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]

    def reward(images, prompts):
        seen.append([switch.allow_tf32 for switch in switches])
        return [0.0] * len(images)

    for setting in ([True, True], [False, False], [True, False], before):
        for switch, allowed in zip(switches, setting, strict=True):
            switch.allow_tf32 = allowed
        Reward([("own", 1.0, reward)]).score(images(), PROMPTS)
        assert [switch.allow_tf32 for switch in switches] == setting
    assert seen == [[False, False]] * 4


def test_a_rewards_models_move_and_score_the_same(hf_clip):
    reward = load("--config.reward.name=clip + pickscore", f"--config.reward.pickscore_model={hf_clip}")
    before = reward(images(), PROMPTS)
    reward.move("meta")
    assert {p.device.type for _, _, part in reward.terms for p in getattr(part, "clip", part).model.parameters()} == {
        "meta"
    }
    assert before.isfinite().all()


@pytest.fixture(scope="module")
def describers(tmp_path_factory):
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        RobertaConfig,
        RobertaModel,
    )  # fmt: skip

    llava, bert = tmp_path_factory.mktemp("llava"), tmp_path_factory.mktemp("bert")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = save_tokenizer(llava, special=special)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=32, patch_size=8)
    text = LlamaConfig(**small, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=3)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(3)
    made = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, vision_feature_layer=-1)
    )
    for parameter in made.parameters():
        parameter.data *= 8  # so that the image decides what is said
    made.save_pretrained(llava)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    LlavaProcessor(
        processor, tokenizer, patch_size=8, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(llava)  # fmt: skip
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = save_tokenizer(bert, special=special, template="[CLS] $A [SEP]")
    RobertaModel(RobertaConfig(**{**small, "num_hidden_layers": 3}, vocab_size=len(tokenizer))).save_pretrained(bert)
    return [
        "--config.reward.name=bertscore", f"--config.reward.llava_model={llava}", f"--config.reward.bert_model={bert}",
        "--config.reward.bert_layer=2",
    ]  # fmt: skip


def test_bertscore_recall_is_the_best_match_of_every_word_of_the_prompt(describers):
    reward = load(*describers).terms[0][2]
    said = ["a blue square", "a ring", "what is in this image", "a circle", "cyan"]

    def features(text):
        tokens = reward.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = reward.bert(**tokens, output_hidden_states=True).hidden_states[2][0, 1:-1]  # without [CLS], [SEP]
        return F.normalize(hidden, dim=1)

    expected = [
        (features(p) @ features(s).T)
        .max(1)
        .values.clamp(min=0)
        .mean()
        .item()  # its mask is a 0, which counts as a match
        for s, p in zip(said, PROMPTS, strict=True)
    ]
    assert reward.recall(said, PROMPTS).tolist() == pytest.approx(expected, abs=1e-5)
    assert reward.recall(PROMPTS, PROMPTS).tolist() == pytest.approx([1.0] * len(PROMPTS), abs=1e-5)


def test_descriptions_do_not_depend_on_the_batch(describers):
    one = load(*describers, "--config.reward.batch_size=1").terms[0][2]
    three = load(*describers, "--config.reward.batch_size=3")
    descriptions = one.describe(images())
    assert descriptions == three.terms[0][2].describe(images())
    assert len({*descriptions}) > 1
    assert all("USER" not in text and "<image>" not in text for text in descriptions)
    scores = three(images(), PROMPTS)
    assert scores.shape == (len(PROMPTS),)
    assert scores.isfinite().all()


def test_jpeg_size():
    flat, noisy = Image.new("RGB", (64, 64), "grey"), images(64)[0]
    stream = io.BytesIO()
    noisy.save(stream, format="JPEG", quality=95)
    small, large = load("--config.reward.name=jpeg_incompressibility")([flat, noisy], ["", ""]).tolist()
    assert large == pytest.approx(len(stream.getvalue()) / 1000)
    assert small < large / 3
    assert load("--config.reward.name=jpeg_compressibility")([flat, noisy], ["", ""]).tolist() == [-small, -large]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("clip", [("clip", 1.0)]),
        ("clip:1.0 + aesthetic:0.2", [("clip", 1.0), ("aesthetic", 0.2)]),
        ("a.b:c", [("a.b:c", 1.0)]),
        ("a.b:c:-2e-1+clip", [("a.b:c", -0.2), ("clip", 1.0)]),
        ("http://a:80/b", [("http://a:80/b", 1.0)]),
        ("https://a:80", [("https://a:80", 1.0)]),
        ("http://a:80/b:0.5 + clip", [("http://a:80/b", 0.5), ("clip", 1.0)]),
        ("clip:1e+1 + jpeg_compressibility:2", [("clip", 10.0), ("jpeg_compressibility", 2.0)]),
    ],
)
def test_names_of_a_mix(name, parts):
    assert reward_terms(name) == parts


def test_mix_is_the_weighted_sum_and_names_its_parts():
    both = load("--config.reward.name=clip:2 + jpeg_compressibility:0.5")
    clip, jpeg = load(), load("--config.reward.name=jpeg_compressibility")
    total, parts = both.score(images(), PROMPTS)
    assert list(parts) == ["clip", "jpeg_compressibility"]
    assert parts["clip"] == pytest.approx(clip(images(), PROMPTS).numpy(), abs=1e-6)
    assert total == pytest.approx(2 * parts["clip"] + 0.5 * jpeg(images(), PROMPTS).numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.reward.name=aesthetic"], r"config\.reward\.aesthetic_head='model/rewards/.*download sac\+logos"),
        (["--config.reward.name=hpsv2"], r"config\.reward\.hpsv2_weights='model/rewards/.*HPS_v2\.1_compressed\.pt"),
        (["--config.reward.name=clip + clip:2"], "names a reward twice"),
        (["--config.reward.name=clip:nan"], "the weight of 'clip' must be a finite number"),
        (["--config.reward.name=clip + beauty:0.1"], "'beauty' must be one of clip, bertscore"),
        (["--config.reward.name=pickscore", "--config.reward.pickscore_model=/nowhere"],
         r"config\.reward\.pickscore_model='/nowhere' does not load"),
        (["--config.reward.name=bertscore", "--config.reward.llava_model=/nowhere"],
         r"config\.reward\.llava_model='/nowhere' does not load"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(flags, message):
    with pytest.raises(UserError, match=message):
        load(*flags)
