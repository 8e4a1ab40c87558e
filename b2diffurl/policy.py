"""The denoising policy p(x_{t-1} | x_t, prompt): the one place where a transition is built.

Sampling, the update, DPOK's reference and the evaluation all ask here, so that what is trained is exactly what sampled.
"""

import contextlib
import dataclasses

import torch

from .errors import UserError
from .families import lora, sharding


@dataclasses.dataclass
class Policy:
    """A denoiser and how it is run."""

    family: object  # families/: how this kind of denoiser is called
    denoiser: torch.nn.Module
    kernel: object  # from a prediction to the transition's Gaussian: ddim.DDIM
    negative: dict  # the Conditioning of the empty prompt, (1, ...)
    guidance: float  # classifier-free guidance weight

    @property
    def device(self):
        """Where the denoiser is."""
        return self.denoiser.device

    @property
    def latent_dtype(self):
        """The precision in which latents are carried and stored: float32, but float16 under a float16 denoiser.

        That halves the disk, and rounds by a twentieth of the last step's σ. bfloat16 would round by half a σ there.
        """
        return torch.float16 if self.denoiser.dtype == torch.float16 else torch.float32

    def initial(self, noise):
        """x_T from standard normal noise (B, ...)."""
        return (noise * self.kernel.initial_sigma).to(self.device, self.latent_dtype)

    def transition(self, latents, step, cond):
        """Mean (B, ...) and σ (B, 1, ...), float32, of the steps (B,) from latents (B, ...).

        cond: Conditioning (B, ...).
        """
        if sharding.is_sharded(self.denoiser):
            sharding.calls(True)
        time = self.kernel.time(step)
        prediction = self.family.predict(self.denoiser, latents, time, cond, self.negative, self.guidance)
        return self.kernel.transition(prediction, step, latents)

    @contextlib.contextmanager
    def pretrained(self):
        """The policy meanwhile is the base model's: without its LoRA."""
        lora.switch(self.denoiser, False)
        try:
            yield
        finally:
            lora.switch(self.denoiser, True)

    @contextlib.contextmanager
    def together(self, backward=False):
        """Within, all processes call a sharded denoiser equally often: who is done calls it for nothing until all are.

        backward: whether every call is followed by its backward pass.
        """
        try:
            yield
        except UserError:  # of this process alone; the others are told afterwards
            self._wait(backward)
            raise
        self._wait(backward)

    def _wait(self, backward):
        while sharding.is_sharded(self.denoiser) and sharding.calls(False):
            latents = torch.zeros(1, *self.family.latent_shape, device=self.device, dtype=self.latent_dtype)
            time = self.kernel.time(torch.zeros(1, dtype=torch.long, device=self.device))
            with torch.set_grad_enabled(backward):
                found = self.family.predict(self.denoiser, latents, time, self.negative, self.negative, self.guidance)
            if backward:
                found.backward(torch.zeros_like(found))
