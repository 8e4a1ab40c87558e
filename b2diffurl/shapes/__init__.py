"""The embedded world: drawn shapes with a tiny Stable Diffusion, a tiny OpenCLIP and an oracle that knows the truth."""
