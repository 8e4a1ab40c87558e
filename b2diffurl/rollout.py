"""Branch-based sampling: denoise a group's prefix once, then branch (paper section 4.2)."""

import dataclasses

import torch

from .ahead import ahead
from .ddim import gaussian_log_prob, transition
from .guidance import guided_noise
from .noise import stream_noise


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
        negative = self.negative_embeds.expand(len(latents), -1, -1)
        noise = noise.to(latents.device, non_blocking=True)
        path, log_probs = [], []
        for i, step in enumerate(steps):
            timesteps = self.scheduler.timesteps[step].expand(len(latents))
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
        device = self.unet.device
        starts = []
        for first, noise in self._noise(root_seeds, start + 1):
            latents = self.initial(noise[:, 0])
            if start:
                own = embeds[first : first + len(noise)]
                latents = self.denoise(latents, own, noise[:, 1:], range(start))[0][:, -1]
            starts.append(latents)
        starts = torch.cat(starts)
        fan_out = len(branch_seeds) // len(root_seeds)
        root = torch.arange(len(branch_seeds), device=device) // fan_out
        paths, log_probs = [], []
        for first, noise in self._noise(branch_seeds, stop - start):
            rows = root[first : first + len(noise)]
            path, log_prob = self.denoise(starts[rows], embeds[rows], noise, range(start, stop))
            on_batch(first, path[:, -1])
            paths.append(path.to("cpu", non_blocking=True))
            log_probs.append(log_prob.to("cpu", non_blocking=True))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return Trajectories(
            start_latents=starts.cpu(),
            latents=torch.cat(paths),
            log_probs=torch.cat(log_probs),
            unet_evals=2 * (start * len(root_seeds) + (stop - start) * len(branch_seeds)),
        )

    def _noise(self, seeds, steps):
        """(first image, noise (B, steps, C, H, W)) of every batch; the next one is drawn while the last is used."""

        def draw(first):
            noise = torch.stack(
                [stream_noise(seed, steps, self.latent_shape) for seed in seeds[first : first + self.batch_size]]
            )
            return first, noise.pin_memory() if self.unet.device.type == "cuda" else noise

        return ahead(draw, range(0, len(seeds), self.batch_size))
