"""Does a stage's gradient say anything? What two halves of its groups agree on, by denoising step.

`python -m b2diffurl.gradient_signal --config config/stage_process.py:PRESET --config.stage=I --out DIR`, with the run's
settings, after run_sample.py and run_select.py of that stage; writes gradient_signal.json into DIR. The more groups the
stage has, the finer the answer: 160 with shapes, which takes two minutes.

Both halves' gradients are estimates of one policy gradient S, with noise N of their own. So their cosine is about
|S|² / (|S|² + |N|²), N of a half, and 0 where the step is noise alone, but for the prompts and their normalisation,
which the halves share. Unrelated gradients that fill n directions alike have a cosine of ±1/√n. A step's share says how
much of the whole gradient it is, whatever it is worth. The cosines of all steps up to one say where to stop: with
config.schedule.untrained the later ones are left out.
"""

import pathlib

import torch

from .errors import UserError
from .models import Models
from .run import storage
from .run.command import run_main
from .run.folder import Run
from .stages.train import credit_of, rollout_of
from .stages.trajectories import read_experience
from .step_weights import KINDS, step_weights
from .update import ask_pretrained, loss_scale, losses_of


def main(config, out):
    """Print the table of config.stage and write it; raises UserError where the stage was not selected."""
    run = Run(config)
    credit = credit_of(config, run)
    if not len(credit["row"]):
        raise UserError(f"stage {config.stage} of {run.folder}: nothing was selected, so there is no gradient")
    path, plan, groups = rollout_of(config, run)
    experience, negative = read_experience(path, plan, groups, credit)
    policy, parameters = Models(config).trainable(run.require_previous(), negative)
    half, experience = credit["row"] // len(plan.transitions.step) % 2, experience.to(policy.device)
    ask_pretrained(policy, experience, config.train)
    found = gradients(policy, parameters, experience, half, config.train)
    table = summary(found, {step: policy.kernel.gain(step) for step in found})
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    storage.write_json(out / "gradient_signal.json", table)
    for row in table["steps"]:
        own = "step {step:3d}  gain {gain:7.3f}  share {share:6.3f}  halves' cosine {cosine:+.3f}".format(**row)
        print(own + "".join(f"  up to it, {kind} {until:+.3f}" for kind, until in row["up_to"].items()))
    for kind, cosine in table["all_steps"].items():
        print(f"all steps, config.train.step_weights={kind}: halves' cosine {cosine:+.3f}")


def gradients(policy, parameters, experience, half, train):
    """{step: gradient (2, numbers) of the losses' sum over the transitions of either half} at the LoRA's parameters.

    half: (n,) 0 or 1 for every row of the experience; parameters: {name: parameter}.
    """
    steps, found = experience.rollout.step[experience.row], {}
    scale = loss_scale(policy, experience, 1, train)  # of one transition: losses are summed here
    for step in steps.unique().tolist():
        own = []
        for number in (0, 1):
            for parameter in parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            own_rows = torch.nonzero((half == number) & (steps == step)).flatten()
            if not len(own_rows):
                raise UserError(
                    f"step {step}: one half of the groups has no transition there; give more, config.sample.groups"
                )
            for rows in own_rows.split(train.batch_size):
                (losses_of(policy, experience, rows, train)[0].sum() * scale).backward()
            own.append(torch.cat([parameter.grad.flatten() / scale for parameter in parameters.values()]))
        found[step] = torch.stack(own)
    return found


def summary(found, gains):
    """The table of `gradients`: by step {step, gain, share, cosine, up_to}, and the cosine of all by kind of weights.

    Raises UserError where all of them are 0.

    share: of the squared norm of the whole gradient, were the steps' orthogonal. up_to: the cosine of the steps up to
    this one together, by kind.
    """
    squares = {step: own.sum(0).square().sum().item() for step, own in found.items()}
    if not sum(squares.values()):
        raise UserError("the gradient is 0: no reward differs from the others of its prompt")
    steps, rows, sums = torch.tensor([*found]), [], {}
    weights = {kind: step_weights(gains.get, steps, kind) for kind in KINDS}
    for place, (step, own) in enumerate(found.items()):
        for kind, of_kind in weights.items():
            sums[kind] = sums.get(kind, 0.0) + own * (1.0 if of_kind is None else of_kind[place].item())
        rows.append({"step": step, "gain": gains[step], "share": squares[step] / sum(squares.values())})
        rows[-1] |= {"cosine": cosine(own), "up_to": {kind: cosine(total) for kind, total in sums.items()}}
    return {"steps": rows, "all_steps": rows[-1]["up_to"]}


def cosine(halves):
    """Of two gradients (2, numbers): a number."""
    return torch.nn.functional.cosine_similarity(*halves.double(), dim=0).item()


if __name__ == "__main__":
    run_main(main, out=None)
