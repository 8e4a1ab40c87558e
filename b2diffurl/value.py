"""DPOK's learned baseline: V(x_t, t, prompt), the advantage to expect from here (arXiv 2305.16381)."""

import math

import torch

from . import adam
from .run import storage

WIDTH = 256
FREQUENCIES = 16


class ValueNetwork(torch.nn.Module):
    """An MLP on a latent, its timestep and its prompt's mean embedding -> expected advantage (B,)."""

    def __init__(self, latent_size, embed_size):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(latent_size + 2 * FREQUENCIES + embed_size, WIDTH), torch.nn.ReLU(),
            torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 1),
        )  # fmt: skip
        torch.nn.init.zeros_(self.layers[-1].weight)  # no baseline until it has learnt one
        torch.nn.init.zeros_(self.layers[-1].bias)

    def forward(self, latents, timesteps, embeds):
        """latents (B, C, H, W), timesteps (B,), embeds (B, L, D) -> (B,) float32."""
        frequencies = torch.exp(-math.log(1000) * torch.arange(FREQUENCIES, device=latents.device) / FREQUENCIES)
        phases = timesteps[:, None] * frequencies
        return self.layers(
            torch.cat([latents.float().flatten(1), phases.sin(), phases.cos(), embeds.float().mean(1)], dim=1)
        )[:, 0]


class Baseline:
    """The network with its Adam. What it subtracts in a stage it has learnt in earlier ones alone.

    So it adds no bias where all images are trained on and the ratio is 1; a selection by outcome (b2, ddpo_bs) or a
    clip makes it a heuristic.
    """

    def __init__(self, config, unet):
        latent_size = unet.config.in_channels * unet.config.sample_size**2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = ValueNetwork(latent_size, unet.config.cross_attention_dim).to(unet.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.train.value_learning_rate)
        self.batch_size = config.train.trajectories_per_update

    def predict(self, pairs, rows, steps):
        """V of the pairs (rows[b], steps[b]) -> (B,)."""
        return self.network(pairs.latents[rows, steps], pairs.timesteps[steps], pairs.embeds[rows])

    @torch.no_grad()
    def of(self, pairs):
        """V of all pairs -> (n, s)."""
        rows, steps = _all(pairs)
        parts = zip(rows.split(self.batch_size), steps.split(self.batch_size), strict=True)
        return torch.cat([self.predict(pairs, r, k) for r, k in parts]).view(pairs.log_probs.shape)

    def fit(self, pairs, epochs, generator):
        """Regress V on the pairs' advantages; -> mean squared error of the last epoch."""
        rows, steps = _all(pairs)
        for _ in range(epochs):
            order, total = torch.randperm(len(rows), generator=generator).to(rows.device), 0.0
            for part in order.split(self.batch_size):
                error = self.predict(pairs, rows[part], steps[part]) - pairs.advantages[rows[part]]
                error.square().mean().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                total += error.detach().square().sum().item()
        return total / len(rows)

    def save(self, path):
        """The network and Adam's state, one safetensors file."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        storage.write_tensors(path, tensors | adam.state_of(self.optimizer, dict(self.network.named_parameters())))

    def load(self, path):
        """Put back what save wrote. Raises UserError for a file that is missing or broken."""
        stored = storage.read_tensors(path, "run_train.py")
        self.network.load_state_dict({name: stored[f"network.{name}"] for name in self.network.state_dict()})
        adam.restore(self.optimizer, dict(self.network.named_parameters()), stored)


def _all(pairs):
    count, length = pairs.log_probs.shape
    everything = torch.arange(count * length, device=pairs.latents.device)
    return everything // length, everything % length
