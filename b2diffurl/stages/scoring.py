"""Scoring a stage's pictures: every process its own share of them, and servers while others are still denoised."""

import concurrent.futures
import contextlib
import queue
import threading

import numpy as np
from PIL import Image

from ..errors import UserError
from ..rewards import load_reward
from ..run import metrics, processes, storage
from ..run.config import is_url
from ..shapes.oracle import verdicts


def score(config, reward, paths, prompts, beside=None):
    """Rewards (N,), {term: rewards (N,)}, the oracle's verdicts (N,) or None, and what `beside` found.

    paths, prompts: of N pictures. The verdicts are those of config.evaluate.oracle, where all prompts are of the
    oracle's world. beside(images, share): of each process's own images, its slice of the N -> anything; a list of them.
    """
    share = processes.share(len(paths))
    own = prompts[share]

    def work():
        with concurrent.futures.ThreadPoolExecutor() as pool:  # decoding a large PNG takes longer than scoring it
            images = [*pool.map(read_picture, paths[share])]
        return {
            "scores": reward.score(images, own) if images else None,
            "verdicts": verdicts(images, own) if config.evaluate.oracle and images else None,
            "beside": beside(images, share) if beside and images else None,
        }

    found = processes.agree(work)
    scores, right, others = ([own[name] for own in found if own[name] is not None] for name in found[0])
    terms = {name: np.concatenate([own[name] for _, own in scores]) for name in scores[0][1]}
    right = np.concatenate(right) if sum(map(len, right)) == len(paths) else None
    return np.concatenate([total for total, _ in scores]), terms, right, others


@contextlib.contextmanager
def asking(config, folder, log):
    """Let the servers among the rewards judge pictures while others are denoised; its end waits for them.

    Yields ask(pictures, copied, prompts), pictures: (B, H, W, 3) uint8, there once the CUDA event `copied`, if there is
    one, has passed. The answers are kept in the folder for run_select.py, which asks again where a server failed.
    """
    servers, waiting = load_reward(config, "cpu", wanted=is_url), queue.SimpleQueue()
    if not servers.terms:
        yield lambda *given: None
        return

    def work():
        try:
            processes.use_device()
            for images, prompts in _requests(waiting, config.reward.batch_size):
                servers.ask(images, prompts)
        except Exception as error:  # whatever it is, sampling goes on
            log.warning(f"stage {config.stage} sample: run_select.py will ask again: {error}")

    def ask(*given):
        if thread.is_alive():
            waiting.put(given)

    with servers.answers_in(folder):
        thread = threading.Thread(target=work, daemon=True)  # an interrupted process does not wait for it
        thread.start()
        try:
            yield ask
        except BaseException:  # nobody will read the answers to what is waiting
            while not waiting.empty():
                waiting.get()
            waiting.put(None)
            raise
        waiting.put(None)
        thread.join()


def _requests(waiting, size):
    """(PIL images, prompts) of a queue of what ask gets, up to None: `size` or more each, fewer where none wait."""
    images, prompts = [], []
    for pictures, copied, own in iter(waiting.get, None):
        if copied:
            copied.synchronize()
        images += [Image.fromarray(picture) for picture in pictures]
        prompts += own
        if len(images) >= size or waiting.empty():
            yield images, prompts
            images, prompts = [], []
    if images:
        yield images, prompts


def earlier_targets(config, run):
    """How many of D-Fusion's targets the stages before config.stage have scored."""
    return sum(line.get("fuse/targets", 0) for line in metrics.read(run.metrics) if line["stage"] < config.stage)


def history_of(path):
    """The RewardHistory state that an earlier stage's scores.json holds."""
    return storage.read_json(path, "run_select.py", "history")


def read_picture(path):
    """A PNG as an RGB image. Raises UserError where it cannot be read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): delete the stage's folder and run it again") from None
