"""Rewards from another process: the server of the docs, what it is asked and when, and what its failures cost."""

import contextlib
import http.server
import importlib.util
import json
import math
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image
from test_distributed import drive

from b2diffurl.errors import UserError
from b2diffurl.evaluate import before_after
from b2diffurl.models import Models
from b2diffurl.rewards import Reward, load_reward, remote
from b2diffurl.rewards.answers import Answers
from b2diffurl.run.command import parse
from b2diffurl.stages import sample, select
from b2diffurl.stages.begin import COMPLETE
from b2diffurl.stages.scoring import asking

spec = importlib.util.spec_from_file_location("reward_server", "docs/reward_server.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)


def load(*flags):
    return load_reward(parse(["x", "--config", "config/stage_process.py:shapes", *flags])[0], "cpu")


class Judge(http.server.BaseHTTPRequestHandler):
    """Answers as the test's list says, then as the reference server does; counts the pictures it has scored."""

    answers, seen = (), []

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
    Judge.answers, Judge.seen = [], []
    score = reference.score
    monkeypatch.setattr(reference, "score", lambda images, *more: Judge.seen.extend(images) or score(images, *more))
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
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(UserError, match=r"did not score 1 images .*refused"):
        remote.Remote(f"http://127.0.0.1:{port}/score", 8, 5)(grey(51), ["p"], [{}])
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        asked, post = [], remote.Remote._post
        monkeypatch.setattr(remote.Remote, "_post", lambda *given: asked.append(1) or post(*given))
        with pytest.raises(UserError, match="timed out"):
            remote.Remote(f"http://127.0.0.1:{silent.getsockname()[1]}/", 8, 0.05)(grey(51), ["p"], [{}])
        assert len(asked) == 2 < len(remote.WAITS) + 1


def test_no_proxy_leads_to_this_machine_and_a_torn_error_is_an_error(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert remote.Remote(server, 8, 5)(grey(51), ["p"], [{}]) == pytest.approx([0.2])
    with pytest.raises(UserError, match=r"refused"):
        remote.Remote("http://judge.example/score", 8, 5)(grey(51), ["p"], [{}])

    def torn(*_):
        raise ConnectionResetError

    Judge.answers = [(400, b"x")]
    monkeypatch.setattr("urllib.error.HTTPError.read", torn, raising=False)
    with pytest.raises(UserError, match=r"\(HTTP 400\)"):
        remote.Remote(server, 8, 5)(grey(51), ["p"], [{}])


def test_no_picture_is_asked_about_twice(server, tmp_path):
    """In a folder of answers: not by the same process, nor by the next one, nor after a torn line."""
    Judge.answers = [(200, b'{"scores": [0.25, NaN]}'), (400, b"broken")]
    reward = load(f"--config.reward.name={server}", "--config.reward.batch_size=2")
    with reward.answers_in(tmp_path / "answers"):
        with pytest.raises(UserError, match="HTTP 400: broken"):
            reward.ask(grey(0, 51, 102, 153), ["p"] * 4)
        (path,) = (tmp_path / "answers").iterdir()
        path.write_text(path.read_text() + '["torn')
        found = reward.ask(grey(0, 51, 102), ["p"] * 3)[server]
        assert found == pytest.approx([0.25, 0.2, 0.4])  # the first was kept, which the reference server has at 0
        assert len(Judge.seen) == 2
        assert reward.ask(grey(0, 51, 102), ["p"] * 3)[server] == found
        assert len(Judge.seen) == 2
        assert reward.ask(grey(0), ["q"])[server] == [0]  # another prompt is another question
    assert reward.ask(grey(102), ["p"])[server] == pytest.approx([0.4])  # without the folder everything is asked
    assert len(Judge.seen) == 4
    assert sorted(Answers(tmp_path / "answers").values()) == pytest.approx([0, 0.2, 0.25, 0.4])
    assert all(math.isfinite(score) for score in Answers(tmp_path / "answers").values())


def within(seconds, happened):
    """Wait until something has happened, so long at most."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def small_stage(folder, server, *more):
    settings = {
        "save_path": folder, "exp_name": "t", "sample.groups": 3, "sample.branches": 3, "sample.num_steps": 4,
        "sample.batch_size": 3, "schedule.left": 2, "schedule.right": 2, "reward.name": server, "reward.batch_size": 2,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return parse(["x", "--config", "config/stage_process.py:shapes", *flags, *more])[0]


@pytest.mark.usefixtures("elsewhere")
def test_a_server_judges_while_others_are_sampled(server, tmp_path, monkeypatch):
    """The second batch is denoised only when the first has been judged; run_select.py asks nothing any more."""
    judged, decode = threading.Event(), sample.rollout.sample
    score = reference.score
    monkeypatch.setattr(reference, "score", lambda *given: (score(*given), judged.set())[0])

    def waiting(policy, plan, cond, seeds, batch_size, on_batch):
        def and_wait(first, latents):
            on_batch(first, latents)
            assert judged.wait(20)

        return decode(policy, plan, cond, seeds, batch_size, and_wait)

    monkeypatch.setattr(sample.rollout, "sample", waiting)
    config = small_stage(tmp_path / "runs", server)
    loaded, stage = Models(config), tmp_path / "runs/t/stage0"
    sample.main(config, loaded=loaded)
    assert len(Judge.seen) == 9
    assert len(Answers(stage / "answers")) == 9
    select.main(config, loaded=loaded)
    assert len(Judge.seen) == 9
    assert "perf/images_per_s" not in (tmp_path / "runs/t/metrics.jsonl").read_text().splitlines()[-1]
    rewards = [row["reward"] for row in json.loads((stage / COMPLETE["select"]).read_text())["scores"]]
    pictures = [Image.open(path).convert("RGB") for path in sorted((stage / "images").iterdir())]
    assert rewards == pytest.approx(score(pictures, None, None))
    assert not (stage / "answers").exists()


@pytest.mark.slow
def test_two_processes_ask_about_every_picture_once(server, tmp_path):
    """Each asks about what it denoises, and scores another share of the pictures: three groups of three, then two."""
    done = drive(tmp_path, "sample.groups=5", "schedule.stage_count=1", f"reward.name={server}", "reward.batch_size=2")
    assert done.returncode == 0, done.stderr
    stage, evaluation = tmp_path / "t/stage0", json.loads((tmp_path / "t/eval.json").read_text())
    assert len(Judge.seen) == 15 + sum(row["images"] for row in evaluation["results"])
    pictures = [Image.open(path).convert("RGB") for path in sorted((stage / "images").iterdir())]
    rewards = [row["reward"] for row in json.loads((stage / COMPLETE["select"]).read_text())["scores"]]
    assert rewards == pytest.approx(reference.score(pictures, None, None))
    assert not (stage / "answers").exists()


@pytest.mark.usefixtures("elsewhere")
def test_a_server_that_fails_meanwhile_is_asked_again_for_the_rest(server, tmp_path, capsys):
    config = small_stage(tmp_path / "runs", server)
    loaded, stage = Models(config), tmp_path / "runs/t/stage0"
    good = json.dumps({"scores": [0.5, 0.75]}).encode()
    Judge.answers = [(200, good), (400, b"out of memory")]
    sample.main(config, loaded=loaded)
    assert (stage / COMPLETE["sample"]).exists()
    said = capsys.readouterr().out
    assert "run_select.py will ask again" in said
    assert "HTTP 400: out of memory" in said
    Judge.answers = [(200, good), (400, b"still")]
    with pytest.raises(UserError, match="HTTP 400: still"):
        select.main(config, loaded=loaded)
    assert not (stage / COMPLETE["select"]).exists()
    select.main(config, loaded=loaded)
    assert len(Judge.seen) == 5  # of nine: two times two had been answered before
    rewards = [row["reward"] for row in json.loads((stage / COMPLETE["select"]).read_text())["scores"]]
    assert rewards[:4] == [0.5, 0.75, 0.5, 0.75]


@pytest.mark.usefixtures("elsewhere")
def test_what_is_sampled_is_safe_while_a_server_still_judges(server, tmp_path, monkeypatch):
    """The server's first answer comes only when samples.json is there."""
    stage, score, write = tmp_path / "runs/t/stage0", reference.score, sample.storage.write_json

    def late(*given):
        for _ in range(2000):
            if (stage / COMPLETE["sample"]).exists():
                return score(*given)
            time.sleep(0.01)
        raise TimeoutError

    monkeypatch.setattr(reference, "score", late)
    monkeypatch.setattr(sample.storage, "write_json", lambda *given: (write(*given), time.sleep(1)))
    sample.main(small_stage(tmp_path / "runs", server))
    assert len(Answers(stage / "answers")) == 9
    (line,) = map(json.loads, (tmp_path / "runs/t/metrics.jsonl").read_text().splitlines())
    assert line["time_s"] > 9 / line["perf/images_per_s"] + line["perf/startup_s"] + 0.9  # with the wait


def test_requests_are_as_large_as_what_waits_and_what_waits_is_dropped_with_the_block(server, tmp_path, monkeypatch):
    asked, go = [], threading.Event()

    def ask(self, images, prompts):
        asked.append(len(images))
        assert go.wait(20)

    monkeypatch.setattr(Reward, "ask", ask)
    config = small_stage(tmp_path, server, "--config.reward.batch_size=5")
    pictures = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    with asking(config, tmp_path, None) as give:
        give(pictures, None, ["p"] * 2)
        within(20, lambda: asked)
        for _ in range(4):
            give(pictures, None, ["p"] * 2)
        go.set()
    assert asked == [2, 6, 2]
    asked.clear()
    go.clear()
    with contextlib.suppress(KeyboardInterrupt), asking(config, tmp_path, None) as give:
        give(pictures, None, ["p"] * 2)
        within(20, lambda: asked)
        give(pictures, None, ["p"] * 2)
        raise KeyboardInterrupt
    go.set()
    time.sleep(0.2)
    assert asked == [2]


@pytest.mark.usefixtures("elsewhere")
def test_an_evaluation_that_a_server_stopped_asks_for_the_rest_alone(server, tmp_path, monkeypatch):
    config = small_stage(tmp_path / "runs", server, "--config.evaluate.images_per_prompt=1")
    checkpoint, out, count = tmp_path / "lora", tmp_path / "out", []
    checkpoint.mkdir()
    (checkpoint / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (out / "answers").mkdir(parents=True)  # somebody's own

    def generate(loaded, lists, folder, label):
        count.append(sum(map(len, lists.values())))
        pictures = iter(range(100 * len(count), 1000))
        return {
            name: [Image.new("RGB", (32, 32), (next(pictures) % 256,) * 3) for _ in own] for name, own in lists.items()
        }

    monkeypatch.setattr(before_after, "generate", generate)
    Judge.answers = [(200, b'{"scores": [0.5, 0.5]}'), (400, b"no")]
    with pytest.raises(UserError, match="HTTP 400: no"):
        before_after.main(config, checkpoint, out)
    assert len(Answers(out)) == 2
    count.clear()
    before_after.main(config, checkpoint, out)
    assert len(Judge.seen) == sum(count) - 2
    assert sorted(path.name for path in out.iterdir()) == ["answers", "before_after.png", "eval.json"]
