"""Rewards: one file each, one common call `reward(images, prompts) -> (N,)`, higher is better.

images are N PIL images, prompts N strings. A reward with a third argument `metadata` gets N dicts: what a JSON Lines
prompt file says of the prompts. config.reward.name is one of run.config.REWARDS, your own
"package.module:function", a server's URL, or a weighted mix of them: "clip:1.0 + aesthetic:0.2".
"""

import contextlib
import copy
import importlib
import inspect

import numpy as np
import torch

from ..errors import UserError
from ..run.config import is_function, is_url, reward_terms
from ..run.prompts import read_metadata, read_prompts
from .loading import full_float32
from .remote import Remote


class Reward:
    """The weighted sum of rewards.

    terms: [(name, weight, reward(images, prompts) -> N numbers)]; metadata: {prompt: dict} for those that take it.
    """

    def __init__(self, terms, metadata=None):
        self.terms, self.metadata = terms, metadata or {}

    def score(self, images, prompts):
        """The sum, float64 numpy (N,), and {name: the same} of its terms; UserError for a bad shape or score."""
        with full_float32():
            found = {name: _checked(name, raw, prompts) for name, raw in self.ask(images, prompts).items()}
        return sum(weight * found[name] for name, weight, _ in self.terms), found

    def ask(self, images, prompts):
        """{term: what it returns}, unchecked, in the precision that is set."""
        found, metadata = {}, [self.metadata.get(prompt, {}) for prompt in prompts]
        for name, _, reward in self.terms:
            given = images, prompts, metadata
            if is_function(name):  # a user's may change what it gets
                given = [image.copy() for image in images], [*prompts], [copy.deepcopy(own) for own in metadata]
            own, asked, more = given
            found[name] = reward(own, asked, **({"metadata": more} if takes_metadata(reward) else {}))
        return found

    @contextlib.contextmanager
    def answers_in(self, folder):
        """Meanwhile servers' answers are written into the folder, and what is answered there is not asked again."""
        servers = [reward for _, _, reward in self.terms if isinstance(reward, Remote)]
        for server in servers:
            server.folder = folder
        try:
            yield self
        finally:
            for server in servers:
                server.folder = None

    def __call__(self, images, prompts):
        """N PIL images and their prompts -> (N,) float32."""
        return torch.from_numpy(self.score(images, prompts)[0]).float()

    def move(self, device):
        """Put the models of all terms but a user's there: what waits for the next stage need not fill the GPU."""
        holders = [term for name, _, term in self.terms if not is_function(name)]
        holders += [term.clip for term in holders if hasattr(term, "clip")]
        for model in [value for holder in holders for value in getattr(holder, "__dict__", {}).values()]:
            if isinstance(model, torch.nn.Module):
                model.to(device)


def takes_metadata(reward):
    """Whether a reward has an argument of that name."""
    try:
        return "metadata" in inspect.signature(reward).parameters
    except ValueError:  # one without a signature, written in C
        return False


def load_reward(config, device, wanted=lambda name: True):
    """The Reward that config.reward.name names, each term loaded once, on the device, in float32 (LLaVA: the run's).

    wanted(name): whether a term is to be loaded.
    """
    named = [own for own in reward_terms(config.reward.name) if wanted(own[0])]
    terms = [(name, weight, _load(name, config, device)) for name, weight in named]
    own, metadata = set(read_prompts(config.prompts.train)), read_metadata(config.prompts.test)
    metadata = {prompt: more for prompt, more in metadata.items() if prompt not in own}
    return Reward(terms, metadata | read_metadata(config.prompts.train))


def _load(name, config, device):
    from ..families.loading import DTYPES

    reward = config.reward
    where = {"batch_size": reward.batch_size, "device": device}
    if name == "clip":
        return load_clip(config, device)
    if name == "bertscore":
        from .bertscore import BertScore

        dtype = DTYPES[config.mixed_precision]
        return BertScore(reward.llava_model, reward.bert_model, reward.bert_layer, **where, dtype=dtype)
    if name == "aesthetic":
        from .aesthetic import Aesthetic

        return Aesthetic(reward.aesthetic_model, reward.aesthetic_head, **where)
    if name == "pickscore":
        from .pickscore import PickScore

        return PickScore(reward.pickscore_model, **where)
    if name == "hpsv2":
        from .hpsv2 import HpsV2

        return HpsV2(reward.hpsv2_model, reward.hpsv2_weights, **where)
    if is_url(name):
        return Remote(name, reward.batch_size, reward.timeout)
    if name.startswith("jpeg_"):
        from . import jpeg

        return jpeg.compressibility if name == "jpeg_compressibility" else jpeg.incompressibility
    return user_function(name)


def user_function(name):
    """The function of a "package.module:function"; UserError where it does not import, or is none."""
    module, _, function = name.partition(":")
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"config.reward.name={name!r} does not load: {error}") from None
    found = getattr(imported, function, None)
    if found is None:
        raise UserError(f"config.reward.name={name!r} does not load: {module} has no {function!r}")
    if not callable(found):
        raise UserError(f"config.reward.name={name!r} does not load: it is no function, but {type(found).__name__}")
    return found


def load_clip(config, device):
    """The OpenCLIP model of config.reward: the reward "clip", and the features of the diversity measure."""
    from .clip import ClipReward

    reward = config.reward
    return ClipReward(reward.model, reward.weights, reward.batch_size, device)


def clip_of(reward, config, device):
    """load_clip's model: the one that is a term of the loaded Reward, where one is."""
    return next((term for name, _, term in reward.terms if name == "clip"), None) or load_clip(config, device)


def _checked(name, raw, prompts):
    try:
        if not isinstance(raw, torch.Tensor):
            if not hasattr(raw, "shape"):  # a list's tensors may be on a GPU, or have a gradient
                raw = [value.item() if hasattr(value, "item") else value for value in raw]
            raw = torch.from_numpy(np.array(raw, dtype=np.float64))
        raw = raw.detach().double().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"config.reward.name: {name!r} returned no numbers ({error})") from None
    if raw.shape != (len(prompts),):
        raise UserError(f"config.reward.name: {name!r} returned shape {tuple(raw.shape)}, not ({len(prompts)},)")
    if bad := int((~raw.isfinite()).sum()):
        first = prompts[int((~raw.isfinite()).nonzero()[0])]
        raise UserError(
            f"config.reward.name: {name!r} returned {bad} non-finite scores of {len(raw)}, the first for {first!r}: "
            "nothing was written; mend the reward and run the same command again"
        )
    return raw.numpy()
