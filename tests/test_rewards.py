"""Every reward's own loading code on a tiny model of its real class, and the mix."""

import http.server
import importlib.util
import io
import json
import pathlib
import shutil
import socket
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from b2diffurl.errors import UserError
from b2diffurl.rewards import Reward, load_reward, remote
from b2diffurl.run.command import parse
from b2diffurl.run.config import reward_terms

spec = importlib.util.spec_from_file_location("reward_server", "docs/reward_server.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)

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


class Judge(http.server.BaseHTTPRequestHandler):
    """Answers as the test's list says, then as the reference server does."""

    answers = ()

    def do_POST(self):
        if self.answers:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, text = self.answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text)
        else:
            reference.Handler.do_POST(self)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """The URL of a server that answers with Judge."""
    monkeypatch.setattr(remote, "WAITS", (0, 0))
    Judge.answers = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}/score"
        made.shutdown()


def grey(*values):
    return [Image.new("RGB", (4, 4), (value,) * 3) for value in values]


def test_a_servers_scores_are_of_the_very_images_in_order_and_batches(server):
    reward = load(f"--config.reward.name={server}", "--config.reward.batch_size=2")
    found, _ = reward.score(grey(0, 51, 102, 153, 204), ["p"] * 5)
    assert found.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


def test_metadata_reaches_a_function_and_a_server(server, tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text('{"prompt": "p", "worth": 7}\n{"prompt": "q"}\n')
    body = "def worth(images, prompts, metadata):\n    return [own.get('worth', 1) for own in metadata]\n"
    (tmp_path / "knowing.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(reference, "score", lambda images, prompts, metadata: [own.get("worth", 1) for own in metadata])
    lists = [f"--config.prompts.{part}={tmp_path}/p.jsonl" for part in ("train", "test")]
    reward = load(*lists, f"--config.reward.name=knowing:worth + {server}:10", "--config.reward.batch_size=2")
    _, found = reward.score(grey(0, 51, 102), ["q", "p", "of no file"])
    assert found["knowing:worth"].tolist() == found[server].tolist() == [1, 7, 1]


def test_a_server_that_comes_back_is_asked_again(server):
    Judge.answers = [(503, b"starting"), (429, b"busy")]
    assert remote.Remote(server, 8, 5)(grey(51), ["p"], [{}]) == pytest.approx([0.2])


@pytest.mark.parametrize(("answers", "message"), [
    ([(503, b"down")] * 3, r"did not score 1 images \(HTTP 503: down\)"),
    ([(400, b"no such field")], r"did not score 1 images \(HTTP 400: no such field\)"),
    ([(200, b"hello")], r"must answer .* it said b'hello'"),
    ([(200, b'{"scores": [1, 2]}')], "2 scores for 1 images"),
    ([(200, b'{"scores": 1}')], "must answer"),
])  # fmt: skip
def test_a_server_that_is_wrong_is_one_line(server, answers, message):
    Judge.answers = [*answers]
    with pytest.raises(UserError, match=message):
        remote.Remote(server, 8, 5)(grey(51), ["p"], [{}])


def test_a_server_that_is_not_there_or_silent_is_one_line(server, monkeypatch):
    with pytest.raises(UserError, match=r"did not score 1 images .*refused"):
        remote.Remote("http://127.0.0.1:9/score", 8, 5)(grey(51), ["p"], [{}])
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        asked, post = [], remote.Remote._post
        monkeypatch.setattr(remote.Remote, "_post", lambda *given: asked.append(1) or post(*given))
        with pytest.raises(UserError, match="timed out"):
            remote.Remote(f"http://127.0.0.1:{silent.getsockname()[1]}/", 8, 0.05)(grey(51), ["p"], [{}])
        assert len(asked) == 2 < len(remote.WAITS) + 1


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
