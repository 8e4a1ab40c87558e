"""B²-DiffuRL: backward progressive, branch-based reinforcement learning for diffusion models (arXiv 2503.11240)."""
