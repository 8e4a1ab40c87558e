"""DPOK's learned baseline: V(x_t, t, prompt), the advantage to expect from here (arXiv 2305.16381)."""

import math

import torch

from . import adam

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

    def __init__(self, config, policy):
        embed_size = policy.negative["encoder_hidden_states"].shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = ValueNetwork(math.prod(policy.family.latent_shape), embed_size).to(policy.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.train.value_learning_rate)
        self.batch_size = config.train.trajectories_per_update
        self.kernel = policy.kernel

    def predict(self, experience, chosen):
        """V of the states that the experience's rows `chosen` leave -> (B,)."""
        rollout, rows = experience.rollout, experience.row[chosen]
        embeds = experience.cond["encoder_hidden_states"][rollout.prompt[rows]]
        return self.network(rollout.states[rollout.before[rows]], self.kernel.time(rollout.step[rows]), embeds)

    @torch.no_grad()
    def of(self, experience):
        """V of all rows -> (n,)."""
        everything = torch.arange(len(experience.row))
        return torch.cat([self.predict(experience, batch) for batch in everything.split(self.batch_size)])

    def fit(self, experience, epochs, generator):
        """Regress V on the rows' advantages -> mean squared error of the last epoch."""
        count = len(experience.row)
        for _ in range(epochs):
            total = 0.0
            for batch in torch.randperm(count, generator=generator).split(self.batch_size):
                error = self.predict(experience, batch) - experience.advantage[batch]
                error.square().mean().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                total += error.detach().square().sum().item()
        return total / count

    def state(self):
        """{name: tensor} of the network and of Adam's moments."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        return tensors | adam.state_of(self.optimizer, dict(self.network.named_parameters()))

    def restore(self, stored):
        """Put back what state gave."""
        self.network.load_state_dict({name: stored[f"network.{name}"] for name in self.network.state_dict()})
        adam.restore(self.optimizer, dict(self.network.named_parameters()), stored)
