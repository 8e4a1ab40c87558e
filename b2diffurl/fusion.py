"""D-Fusion (arXiv 2505.22002): denoise an image again with a better one's self-attention mixed in where the words are.

Reference and target go through the denoiser in one batch. Where the mask M of the reference's cross-attention is 1, the
target's keys and values are the reference's: K = M K_ref + (1 - M) K_tgt, V alike, in the self-attentions of the
middle and of the way up; the queries stay the target's. Hooks on the projections do it, so that whatever attention the
denoiser has computes as before, with its LoRA.
"""

import contextlib

import torch

from . import gaussian


def region(maps, thresholds, kind):
    """Where the words are: bool (B, n), the union over the words' tokens.

    maps: (B, n, L) softmax attention of n image tokens to L text tokens. thresholds: (B, L), nan where a token is no
    word's. kind, of a token's map: "quantile" takes that share of the image tokens, the strongest; "maximum" those from
    that share of the strongest on; "absolute" (the authors') those from that attention on; "all" everything.
    """
    if kind == "all":
        return torch.ones(maps.shape[:2], dtype=torch.bool, device=maps.device)
    words, level = ~thresholds.isnan(), thresholds.nan_to_num()[:, None]
    if kind == "maximum":
        level = level * maps.amax(1, keepdim=True)
    if kind == "quantile":
        count = (level * maps.shape[1]).round().long().clamp(1, maps.shape[1])
        level = maps.sort(1, descending=True).values.gather(1, count - 1)
    return ((maps >= level) & words[:, None]).any(-1)


def mix(projected, mask, halves):
    """Keys or values (halves · 2 · B, n, D), by guidance's half, reference or target, and pair -> the targets' mixed.

    mask: bool (B, side²), brought to the layer's n tokens by nearest neighbours.
    """
    own = projected.unflatten(0, (halves, 2, -1)).clone()
    side, wanted = (round(count**0.5) for count in (mask.shape[1], projected.shape[1]))
    square = mask.unflatten(1, (1, side, side)).float()
    here = torch.nn.functional.interpolate(square, size=(wanted, wanted), mode="nearest").flatten(1).bool()
    own[:, 1] = torch.where(here[..., None], own[:, 0], own[:, 1])
    return own.flatten(0, 2)


class Fusion:
    """The fusion of B pairs in a denoiser, with a mask renewed in every call of it."""

    def __init__(self, family, denoiser, thresholds, kind):
        """thresholds, kind: as region takes them; family.attentions says which are fused, and which looked at."""
        self.denoiser, self.thresholds, self.kind = denoiser, thresholds, kind
        self.fused, self.looked = family.attentions(denoiser)
        self.halves, self.attention_map = family.evaluations, family.attention_map
        self.maps, self.mask = [], None

    @contextlib.contextmanager
    def on(self):
        """Within, calls of the denoiser with (halves · 2 · B) rows fuse; afterwards self.mask is the last one's."""
        hooks = [self.denoiser.register_forward_pre_hook(self._begin)]
        hooks += [attention.register_forward_pre_hook(self._look, with_kwargs=True) for attention in self.looked]
        hooks += [
            projection.register_forward_hook(self._mix)
            for attention in self.fused
            for projection in (attention.to_k, attention.to_v)
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, denoiser, given):
        self.maps, self.mask = [], None

    def _look(self, attention, given, named):
        """Keep the map of an attention to the text: the references', in guidance's conditional half."""
        rows = slice(-2 * len(self.thresholds), -len(self.thresholds))
        self.maps.append(self.attention_map(attention, rows, *given, **named))

    def _mix(self, projection, given, projected):
        if self.mask is None:
            self.mask = region(torch.stack(self.maps).mean(0), self.thresholds, self.kind)
        return mix(projected, self.mask, self.halves)


@torch.no_grad()
def denoise(policy, fusion, latents, noise, cond, interval):
    """Denoise B pairs; latents: of references and bases, 2 x (B, ...), noise: theirs, 2 x (B, steps, ...).

    interval: the steps, and the first that is fused. cond: Conditioning (B, ...). -> the targets' states [(B, ...)]
    before the first and after each step, their log-probabilities [(B,)] under the policy without fusion, the KL [(B,)]
    of the fused transition from that one, both averaged over the dimensions, and the masks (B, n) averaged over the
    fused steps.
    """
    steps, fused_from = interval
    both, noise = torch.cat(latents), torch.cat(noise)
    twice = {name: torch.cat([own, own]) for name, own in cond.items()}
    pairs = len(both) // 2
    states, log_probs, divergences, masks = [both[pairs:]], [], [], []
    for i, step in enumerate(steps):
        index = torch.full((2 * pairs,), step, device=both.device)
        fused = step >= fused_from
        with fusion.on() if fused else contextlib.nullcontext():
            mean, sigma = policy.transition(both, index, twice)
        plain = policy.transition(both[pairs:], index[pairs:], cond)[0] if fused else mean[pairs:]
        both = (mean + sigma * noise[:, i]).to(both.dtype)
        states.append(both[pairs:])
        log_probs.append(gaussian.log_prob(states[-1], plain, sigma[pairs:]))
        divergences.append(gaussian.kl(mean[pairs:], plain, sigma[pairs:]))
        masks += [fusion.mask.float()] if fused else []
    return states, log_probs, divergences, torch.stack(masks).mean(0)
