"""How much memory a model needs to be trained, counted on the meta device: before it is loaded, and without a GPU."""

import math

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..credit import most_chosen
from ..errors import UserError
from ..losses import ALGORITHMS, refers_to_base
from ..run import processes
from . import lora, sharding
from .loading import DTYPES, load_geometry


class Saved:
    """Bytes of what autograd keeps for the backward pass: now, and at most so far. Each storage counts once."""

    def __init__(self, ignored):
        self.now = self.peak = 0
        self.ignored, self.holders = ignored, {}  # storages of the weights; {storage: how many keep it}

    def keep(self, storage):
        """One more tensor of a storage is kept."""
        held = self.holders[storage._cdata] = self.holders.get(storage._cdata, 0) + 1
        if held == 1 and storage._cdata not in self.ignored:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def release(self, storage):
        """One tensor of a storage is kept no longer."""
        self.holders[storage._cdata] -= 1
        if not self.holders[storage._cdata] and storage._cdata not in self.ignored:
            self.now -= storage.nbytes()


class Kept:
    """A tensor that autograd keeps, and that says so."""

    def __init__(self, saved, tensor):
        self.saved, self.tensor, self.storage = saved, tensor, tensor.untyped_storage()
        saved.keep(self.storage)

    def __del__(self):
        self.saved.release(self.storage)


class FlashAttention(TorchFunctionMode):
    """Attention that keeps no matrix, as a GPU's keeps none; by itself the meta device takes the one that does."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Take the place of scaled_dot_product_attention alone."""
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
        return function(*args, **(kwargs or {}))


def count(family, config):
    """Bytes of {"weights", "lora", "activations"} of training with batch_size 1: the denoiser's, for one transition.

    weights: in the run's precision; with config.sharded this process's part, and the two largest blocks whole: one
    that computes, one that is gathered meanwhile. lora: float32, with its gradient and AdamW's two moments.
    activations: what is kept for the backward pass, both halves of guidance together, at most at one time; with
    train.gradient_checkpointing that is while one block is computed again. VAE, reward and what the allocator wastes
    come on top.
    """
    denoiser = load_geometry(family.denoiser_class(), config, family.component, DTYPES[config.mixed_precision])
    weights = [*denoiser.requires_grad_(False).parameters()]
    kept = own_part(denoiser, processes.size() if config.sharded else 1)
    trained = lora.add(denoiser, family.trained_layers, config.train.lora_rank, seed=0).values()
    if config.train.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing(_recomputed)
    saved = Saved({own.untyped_storage()._cdata for own in (*weights, *trained)})
    cond = {name: torch.zeros(1, *shape, device="meta") for name, shape in family.text_shapes().items()}
    latents = torch.zeros(1, *family.latent_shape, device="meta", requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: Kept(saved, tensor), lambda kept: kept.tensor)
    with FlashAttention(), hooks:
        family.predict(denoiser, latents, latents.new_zeros(1), cond, cond, 5.0).sum().backward()
    return {
        "weights": kept,
        "lora": 4 * 4 * sum(own.numel() for own in trained),
        "activations": saved.peak,
    }


def _recomputed(block, *inputs):
    """A block's outputs; in the backward pass it is computed again, through our hooks (reentrant) and our attention."""

    def compute(*own):
        with FlashAttention():
            return block(*own)

    return checkpoint(compute, *inputs, use_reentrant=True)


def own_part(denoiser, parts):
    """Bytes of the weights that a process holds at a time, of so many parts."""
    total = _bytes(denoiser)
    if parts == 1:
        return total
    return total // parts + sum(sorted(map(_bytes, sharding.blocks(denoiser)))[-2:])


def _bytes(module):
    return sum(own.nbytes for own in module.parameters())


def trajectories(family, config):
    """Bytes on the GPU of what the longest stage trains on at most: its states, and the base model's means."""
    last = config.copy_and_resolve_references()
    last.stage = config.schedule.stage_count - 1
    states = sum(nodes * stored for nodes, stored in most_chosen(last)) * math.prod(family.latent_shape)
    asks_base = ALGORITHMS[config.train.algorithm].pretrained or refers_to_base(config.train)
    return states * ((2 if config.mixed_precision == "fp16" else 4) + (4 if asks_base else 0))


def require(family, config, available):
    """Raise UserError where training, train.batch_size transitions per call, would not fit into the bytes available."""
    sizes, batch = count(family, config), config.train.batch_size
    sizes["activations"] *= max(batch, 2) if ALGORITHMS[config.train.algorithm].preference else batch
    sizes["trajectories"] = trajectories(family, config)
    if sum(sizes.values()) > available:
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in sizes.items())
        shared = "several GPUs with config.sharded=True"
        if config.sharded:
            shared = f"more processes than {processes.size()} with config.sharded=True"
        raise UserError(
            f"config.train.batch_size={batch}: training {config.pretrained.model} takes "
            f"{sum(sizes.values()) / 2**30:.1f} GiB ({parts}), this GPU has {available / 2**30:.1f}; a smaller one, "
            "config.train.gradient_checkpointing=True, a smaller config.sample.resolution, or "
            f"{shared} take less"
        )
