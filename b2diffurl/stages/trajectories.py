"""samples.safetensors, fused.safetensors, selected.safetensors: a stage's Rollouts with Conditioning, and its Credit.

The tensors have the names of the fields of Rollout and Credit; "cond." and "negative." stand before the names of the
denoiser's arguments.
"""

import contextlib

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..experience import Experience
from ..rollout import Rollout, assemble
from ..run import storage

MADE_BY = {"samples.safetensors": "run_sample.py", "fused.safetensors": "run_fuse.py"}
FOREIGN = "holds files of another run: delete it and run all steps of the stage again"


def write_rollout(path, rollout, cond, negative):
    """Write samples.safetensors or fused.safetensors: a Rollout, its prompts' Conditioning, and the empty one's."""
    named = {f"cond.{name}": tensor for name, tensor in cond.items()}
    named |= {f"negative.{name}": tensor for name, tensor in negative.items()}
    storage.write_tensors(path, vars(rollout) | named)


def write_credit(path, credit):
    """Write selected.safetensors: a Credit."""
    storage.write_tensors(path, as_tensors(credit))


def as_tensors(credit):
    """A Credit as {name: tensor}, without rivals where there are none."""
    return {name: torch.from_numpy(array) for name, array in vars(credit).items() if array is not None}


def read_credit(path, step):
    """What write_credit wrote in run_select.py or run_fuse.py: {name: tensor}. UserError for a file of another kind."""
    stored = storage.read_tensors(path, step)
    if stored.keys() - {"rival"} != {"row", "advantage", "sample"}:
        raise UserError(f"{path.parent} {FOREIGN}")
    return stored


def read_experience(path, plan, groups, credit):
    """The transitions that a credit names, {name: tensor} as read_credit gives it; no others are read.

    -> Experience on the CPU, and the Conditioning of the empty prompt. Raises UserError for a file that is broken, or
    that does not hold `groups` groups of the plan.
    """
    rows = torch.cat([credit["row"], credit.get("rival", credit["row"])]).unique()
    count = groups * len(plan.transitions.step)
    with _opened(path) as stored:
        states, table, prompts = _stored(stored, plan)
        if len(table["log_prob"]) != count or (len(rows) and not 0 <= rows[0] <= rows[-1] < count):
            raise UserError(f"{path.parent} {FOREIGN}")
        states_of = torch.cat([table["before"][rows], table["after"][rows]]).unique()
        latents = torch.cat([states[:0], *(states[i : i + 1] for i in states_of.tolist())])
    own = {name: tensor[rows] for name, tensor in table.items()}
    own |= {name: torch.searchsorted(states_of, own[name]) for name in ("before", "after")}
    places = {name: torch.searchsorted(rows, credit[name]) for name in ("row", "rival") if name in credit}
    rollout = Rollout(states=latents, **own)
    return Experience(rollout, prompts[0], **{**credit, **places}), prompts[1]


def read_images(path, plan, images, whole=True):
    """Of some images of a plan without branches, by number in the stage: {"states", "log_prob"}, (n, ...) each.

    States from the interval's start to the last that is trained on, or without whole the first alone; only theirs are
    read. UserError as in read_experience.
    """
    roots, stored, found = plan.roots, plan.stored(1), {"states": [], "log_prob": []}
    with _opened(path) as file:
        states, log_prob = file.get_slice("states"), file.get_slice("log_prob")
        for group, root in (divmod(number, roots) for number in images):
            first, row = group * plan.states, (group * roots + root) * stored
            path_of = first + roots + root * stored
            after = [states[path_of : path_of + stored]] if whole else []
            found["states"].append(torch.cat([states[first + root : first + root + 1], *after]))
            found["log_prob"].append(log_prob[row : row + stored])
    return {name: torch.stack(own) for name, own in found.items()} if images else {}


@contextlib.contextmanager
def _opened(path):
    """A rollout's file, open. Raises UserError where it is missing or broken."""
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run {MADE_BY[path.name]} on this stage first") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is broken ({error}): delete the stage's folder and run it again") from None


def _stored(stored, plan):
    """An open samples.safetensors -> sliceable states, {field: tensor} of the other fields, [cond, negative]."""
    names = stored.keys()
    if "latents" in names:
        return _shared_beginnings(stored, plan)
    prompts = [
        {name.removeprefix(kind): stored.get_tensor(name) for name in names if name.startswith(kind)}
        for kind in ("cond.", "negative.")
    ]
    fields = ("before", "after", "step", "log_prob", "prompt")
    return stored.get_slice("states"), {name: stored.get_tensor(name) for name in fields}, prompts


def _shared_beginnings(stored, plan):
    """The same of the form that files had before trees: each root's last shared latent, and each image's interval."""
    starts, latents = stored.get_tensor("start_latents"), stored.get_tensor("latents")
    groups = len(starts) // plan.roots
    wanted = groups * plan.images, len(plan.transitions.step) // plan.images
    if latents.shape[:2] != wanted:
        raise OSError(f"it has {tuple(latents.shape[:2])} images and steps where the run has {wanted}")
    states = torch.cat([own.unflatten(0, (groups, -1)).flatten(1, -4) for own in (starts[:, None], latents)], 1)
    table = vars(assemble(plan, states, stored.get_tensor("log_probs").view(groups, -1), torch.zeros(groups).long()))
    table["prompt"] = stored.get_tensor("prompt_index").repeat_interleave(latents.shape[1])
    prompts = [{"encoder_hidden_states": stored.get_tensor(f"{name}_embeds")} for name in ("prompt", "negative")]
    return table.pop("states"), table, prompts
