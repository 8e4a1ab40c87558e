"""A moving average of the LoRA over its updates: what is evaluated and used where config.train.ema_decay is not 0.

Training goes on from the LoRA itself. The average has less of what the last few updates' noise did.
"""

import contextlib

import torch

FOLDER = "ema"  # of a checkpoint, with the average in the LoRA's form
_STEP = "ema.step"


class Average:
    """diffusers' EMAModel of {name: parameter}, by name."""

    def __init__(self, parameters, decay):
        from diffusers.training_utils import EMAModel

        self.parameters = parameters
        self._model = EMAModel(parameters.values(), decay=decay)

    def step(self):
        """Take in what an update made: decay · average + (1 - decay) · parameter, with a smaller decay at first."""
        self._model.step(self.parameters.values())

    def state(self):
        """{"ema.<name>": tensor}, as a safetensors file can hold it."""
        named = zip(self.parameters, self._model.shadow_params, strict=True)
        return {_STEP: torch.tensor(self._model.optimization_step), **{f"ema.{name}": own for name, own in named}}

    def restore(self, stored):
        """Go on from what state gave; from a checkpoint that has none, from its LoRA."""
        if _STEP in stored:
            self._model.optimization_step = int(stored[_STEP])
            for name, own in zip(self.parameters, self._model.shadow_params, strict=True):
                own.copy_(stored[f"ema.{name}"])

    @contextlib.contextmanager
    def in_place(self):
        """Meanwhile the parameters are the average."""
        self._model.store(self.parameters.values())
        self._model.copy_to(self.parameters.values())
        try:
            yield
        finally:
            self._model.restore(self.parameters.values())


def evaluated(config, checkpoint):
    """The folder whose LoRA is evaluated: a checkpoint's (pathlib.Path) average where the run keeps one, or itself."""
    return checkpoint / FOLDER if config.train.ema_decay else checkpoint
