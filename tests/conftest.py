"""Small real models shared by the tests; nothing here reaches the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from b2diffurl.shapes import diffusion


@pytest.fixture
def scheduler():
    made = diffusion.build_scheduler()
    made.set_timesteps(20)
    return made


@pytest.fixture(scope="session")
def unet():
    torch.manual_seed(0)
    return diffusion.build_unet(64).eval().requires_grad_(False)
