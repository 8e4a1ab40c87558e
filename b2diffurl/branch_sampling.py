"""Branch-based sampling: denoise a group's prefix once, then branch (paper section 4.2)."""

import dataclasses

import torch

from .ddim import gaussian_log_prob, transition
from .guidance import guided_noise
from .noise import stream_noise

FEWEST = 3  # images a UNet call on the CPU: its kernels round otherwise for fewer, and no batch size may show


@dataclasses.dataclass
class Trajectories:
    """What the interval's training needs of N images from R roots, each latent once. s is the interval's length."""

    start_latents: torch.Tensor  # (R, C, H, W) where the branches part; image n starts at root n // (N / R)
    latents: torch.Tensor  # (N, s, C, H, W) after each of the interval's steps
    log_probs: torch.Tensor  # (N, s) float32, log p_old of each step
    unet_evals: int  # latents that went through the UNet, both guidance halves counted


@dataclasses.dataclass
class Sampler:
    """The denoising policy: UNet, scheduler (after set_timesteps) and how they are run."""

    unet: torch.nn.Module
    scheduler: object
    negative_embeds: torch.Tensor  # (1, L, D) of the empty prompt
    guidance_scale: float
    eta: float
    batch_size: int  # images a UNet call; the call's batch is twice that

    @property
    def latent_shape(self):
        """(C, H, W) of the UNet's latents."""
        config = self.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    def initial(self, noise):
        """x_T from standard normal noise (B, C, H, W), in the precision that latents are carried and stored in.

        That is float32, but float16 under a float16 UNet: half the disk, and a rounding of a twentieth of the last
        step's σ. bfloat16 would round by half a σ there.
        """
        dtype = torch.float16 if self.unet.dtype == torch.float16 else torch.float32
        return (noise * self.scheduler.init_noise_sigma).to(self.unet.device, dtype)

    @torch.no_grad()
    def denoise(self, latents, embeds, noise, steps):
        """Run the step indices `steps` from latents (B, C, H, W) with noise (B, len(steps), C, H, W).

        -> latents after each step (B, len(steps), C, H, W) and log-probs (B, len(steps)). Latents keep their dtype; the
        log-probability is that of the rounded latent.
        """
        if latents.device.type == "cpu" and len(latents) < FEWEST:
            rows = torch.arange(FEWEST).clamp(max=len(latents) - 1)
            path, log_probs = self.denoise(latents[rows], embeds[rows], noise[rows], steps)
            return path[: len(latents)], log_probs[: len(latents)]
        negative = self.negative_embeds.expand(len(latents), -1, -1)
        noise = noise.to(latents.device)
        path, log_probs = [], []
        for i, step in enumerate(steps):
            timesteps = self.scheduler.timesteps[step].to(latents.device).expand(len(latents))
            predicted = guided_noise(self.unet, latents, timesteps, embeds, negative, self.guidance_scale)
            mean, sigma = transition(self.scheduler, predicted, timesteps, latents, self.eta)
            latents = (mean + sigma * noise[:, i]).to(latents.dtype)
            path.append(latents)
            log_probs.append(gaussian_log_prob(latents, mean, sigma))
        return torch.stack(path, 1), torch.stack(log_probs, 1)

    @torch.no_grad()
    def sample(self, embeds, root_seeds, branch_seeds, interval, on_batch):
        """Denoise each root's steps 0..start-1 once and each of its branches' steps start..stop-1.

        embeds: (R, L, D), a prompt for each root. root_seeds: R noise streams, which give x_T and the prefix's noise.
        branch_seeds: N = R x fan-out streams, roots in order. interval: (start, T). Images of any roots share
        UNet batches. on_batch(first, final) gets the finished latents (B, C, H, W) of images first…;
        Trajectories come back on the CPU.
        """
        start, stop = interval
        device, shape = self.unet.device, self.latent_shape
        starts = []
        for first in range(0, len(root_seeds), self.batch_size):
            seeds = root_seeds[first : first + self.batch_size]
            noise = torch.stack([stream_noise(seed, start + 1, shape) for seed in seeds])
            latents = self.initial(noise[:, 0])
            if start:
                latents = self.denoise(latents, embeds[first : first + len(seeds)], noise[:, 1:], range(start))[0][
                    :, -1
                ]
            starts.append(latents)
        starts = torch.cat(starts)
        fan_out = len(branch_seeds) // len(root_seeds)
        root = torch.arange(len(branch_seeds), device=device) // fan_out
        paths, log_probs = [], []
        for first in range(0, len(branch_seeds), self.batch_size):
            seeds = branch_seeds[first : first + self.batch_size]
            rows = root[first : first + len(seeds)]
            noise = torch.stack([stream_noise(seed, stop - start, shape) for seed in seeds])
            path, log_prob = self.denoise(starts[rows], embeds[rows], noise, range(start, stop))
            on_batch(first, path[:, -1])
            paths.append(path.cpu())
            log_probs.append(log_prob.cpu())
        return Trajectories(
            start_latents=starts.cpu(),
            latents=torch.cat(paths),
            log_probs=torch.cat(log_probs),
            unet_evals=2 * (start * len(root_seeds) + (stop - start) * len(branch_seeds)),
        )
