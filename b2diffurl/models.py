"""What a run computes with, each part loaded when it is first used, and then kept."""

import contextlib
import copy
import ctypes
import dataclasses
import functools
import platform

import torch

from .errors import UserError
from .families import load_family, lora, memory
from .guidance import to_device
from .policy import Policy
from .run.processes import device

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's numbers, from malloc.h


class Models:
    """The family's parts and the reward; run_process.sh keeps one for the whole run, a script one for its step."""

    def __init__(self, config):
        prepare(config)
        self.config, self.fits = config, device().type != "cuda"

    @functools.cached_property
    def family(self):
        """The Family of config.pretrained.model.

        Raises UserError, before any weights are loaded, for steps or pictures that the model does not allow, be it only
        in the evaluation.
        """
        family, evaluate = load_family(self.config), self.config.evaluate
        self.kernel = family.kernel(self.config.sample.num_steps, self.config.sample)
        family.latent_shape  # noqa: B018
        if evaluate.num_steps or evaluate.resolution:
            own = copy.copy(family)
            own.config = _evaluated(self.config)
            try:
                own.kernel(own.config.sample.num_steps, own.config.sample), own.latent_shape
            except UserError as error:
                raise UserError(str(error).replace("config.sample.", "config.evaluate.")) from None
        return family

    def require_memory(self):
        """Raise UserError, before any weights are loaded, where the GPU has too little memory to train the model."""
        if not self.fits:  # counted once
            memory.require(self.family, self.config, torch.cuda.mem_get_info()[1])
            self.fits = True

    @functools.cached_property
    def kernel(self):
        """The run's kernel, of config.sample.num_steps steps; it comes with the family."""
        self.family  # noqa: B018
        return vars(self)["kernel"]

    @functools.cached_property
    def _reward(self):
        from .rewards import load_reward

        return load_reward(self.config, device())

    def evaluating(self):
        """The same models, by the settings of config.evaluate where they say otherwise than config.sample."""
        config, own = _evaluated(self.config), self.config.evaluate
        self.family.denoiser, self.family.vae  # noqa: B018 - what is loaded now, the copy shares
        other, family = copy.copy(self), copy.copy(self.family)
        other.config = family.config = config
        other.family, other.kernel = family, self.kernel
        if own.num_steps or own.resolution:
            other.kernel = family.kernel(config.sample.num_steps, config.sample)
        if own.ode:
            other.kernel = dataclasses.replace(other.kernel, random_from=config.sample.num_steps)
        return other

    def policy(self, checkpoint=None, negative=None):
        """The denoising Policy, with a checkpoint folder's LoRA where one is given, else the base model's.

        negative: Conditioning (1, ...) of the empty prompt, embedded here unless given.
        """
        denoiser = self.family.denoiser
        if checkpoint:
            lora.load(denoiser, checkpoint)
        lora.switch(denoiser, bool(checkpoint))
        return self._policy(negative)

    def trainable(self, checkpoint=None, negative=None):
        """The same with a checkpoint folder's LoRA or a fresh one, and {name: parameter} of it, float32."""
        self.require_memory()
        denoiser, train = self.family.denoiser, self.config.train
        if checkpoint:
            parameters = lora.load(denoiser, checkpoint)
        else:
            parameters = lora.add(denoiser, self.family.trained_layers, train.lora_rank, self.config.seed)
        lora.switch(denoiser, True)
        if train.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        return self._policy(negative), parameters

    def _policy(self, negative):
        negative = self.family.embed([""]) if negative is None else negative
        negative = to_device(negative, device())
        guidance = self.config.sample.guidance_scale
        return Policy(self.family, self.family.denoiser, self.kernel, negative, guidance)

    @contextlib.contextmanager
    def scoring(self):
        """The Reward, on the run's device; between two uses a GPU's reward models wait in the machine's memory."""
        self._reward.move(device())
        yield self._reward
        if device().type == "cuda":
            self._reward.move("cpu")
            torch.cuda.empty_cache()


def _evaluated(config):
    """The configuration with config.evaluate's settings in config.sample."""
    own = config.copy_and_resolve_references()
    for name in ("num_steps", "guidance_scale", "resolution"):
        own.sample[name] = config.evaluate[name] or config.sample[name]
    return own


def prepare(config):
    """How this process computes: float32 in TF32 on a GPU where config.allow_tf32 says so, kept memory on the CPU.

    glibc hands a large freed block back to the system, and every page of the next one costs a fault and a zeroing:
    a fifth of the time of sampling. mallopt makes it keep the blocks.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if platform.libc_ver()[0] == "glibc" and not torch.cuda.is_available():
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # older glibc's most
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
