"""The optimisation algorithms, one pure loss function each; tensors are (B,), one entry per transition.

Log-probabilities come as a mean or as a sum over the latent's dimensions (config.train.log_prob); the functions do not
care. Each returns losses (B,) and statistics (B,), detached: ratio ρ, clipped (whether the algorithm's clip is passed),
approx_kl (log ρ)² / 2, and its own. ALGORITHMS names them for config.train.algorithm.
"""

import math
import typing

LARGEST = 80.0  # of log ρ: float32 ends at 88, and beyond it a loss that is clipped would have the gradient 0 · ∞


def ddpo_is(log_prob, old_log_prob, advantage, clip_range):
    """DDPO's importance-sampled, clipped loss (arXiv 2305.13301 eq. 4 with PPO's clip).

    ρ = exp(log_prob - old_log_prob); loss = max(-A ρ, -A clip(ρ, 1-ε, 1+ε)). With log-probabilities averaged over the
    latent's dimensions, as in the authors' code, ε = 0.1 is a joint ratio of about exp(1638) for SD's 16384 of them, so
    the clip hardly ever acts; summed ones are another algorithm.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.where(advantage < 0, log_ratio.clamp(max=LARGEST)).exp()
    loss = (-advantage * ratio).maximum(-advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
    return loss, _statistics(log_prob - old_log_prob, clip_range)


def ddpo_sf(log_prob, old_log_prob, advantage):
    """DDPO's score-function loss, REINFORCE (arXiv 2305.13301 eq. 3): -A log p_θ.

    Its gradient is the policy gradient only where the policy is the one that sampled, so it allows one update for a
    stage's samples; old_log_prob serves the statistics.
    """
    return -advantage * log_prob, _statistics(log_prob - old_log_prob)


def dpok(log_prob, old_log_prob, advantage, clip_range, kl, kl_weight):
    """DPOK: policy gradient plus β KL(p_θ || p_pre) at every step (arXiv 2305.16381, its KL-regularised objective).

    Off-policy by the importance ratio, clipped as in ddpo_is. kl: gaussian.kl to the pre-trained model's transition,
    averaged or summed as the log-probabilities are. Statistics also: kl_pretrained.
    """
    loss, statistics = ddpo_is(log_prob, old_log_prob, advantage, clip_range)
    return loss + kl_weight * kl, {**statistics, "kl_pretrained": kl.detach()}


def dpo(winner_log_ratio, loser_log_ratio, beta, clip_range=0.0, base=None):
    """D3PO, direct preference optimisation of one denoising step (arXiv 2311.13231, its loss of a step).

    -log σ(β (log p_θ(w)/p_ref(w) - log p_θ(l)/p_ref(l))): w and l are the same step of a group's best and worst image,
    the reference is the policy that sampled them, renewed every stage. D3PO's code keeps the base model: base, the two
    log-ratios to it, is then what is compared. Where clip_range is above 0, the ratios are clipped to 1 ± clip_range,
    as there. At θ = ref it is log 2. The statistics are of the ratios to the policy that sampled, means over the two,
    but ratio is the one further from 1; preferred says how often what is compared is larger of the winner, base_clipped
    how often the ratios to the base model are beyond the clip.
    """
    from torch.nn.functional import logsigmoid

    sampling, base_clip = (winner_log_ratio, loser_log_ratio), float("inf") if base else clip_range or float("inf")
    winner, loser = base or sampling
    margin = (winner - loser).detach()
    both = [_statistics(ratio, base_clip) for ratio in sampling]
    statistics = {name: (both[0][name] + both[1][name]) / 2 for name in both[0]}
    ratios = [own["ratio"] for own in both]
    statistics["ratio"] = ratios[0].where((ratios[0] - 1).abs() > (ratios[1] - 1).abs(), ratios[1])
    statistics["preferred"] = (margin > 0).float()
    if clip_range:
        low, high = math.log1p(-clip_range), math.log1p(clip_range)
        if base:
            beyond = [((own < low) | (own > high)).float() for own in (winner.detach(), loser.detach())]
            statistics["base_clipped"] = (beyond[0] + beyond[1]) / 2
        winner, loser = winner.clamp(low, high), loser.clamp(low, high)
    return -logsigmoid(beta * (winner - loser)), statistics


def _statistics(log_ratio, clip_range=float("inf")):
    ratio, log_ratio = log_ratio.detach().exp(), log_ratio.detach()
    return {
        "ratio": ratio,
        "clipped": ((ratio - 1).abs() > clip_range).float(),
        "approx_kl": log_ratio.square() / 2,
    }


class Terms(typing.NamedTuple):
    """What a loss may need of B transitions; tensors (B,)."""

    log_prob: object  # under the current policy
    old_log_prob: object  # under the one that sampled
    advantage: object
    rival_log_ratio: object = None  # of the loser's transitions, for preferences
    kl: object = None  # to the pre-trained model
    base_log_ratios: object = None  # log p_θ/p_pre of winners and losers, where these are what is compared


class Algorithm(typing.NamedTuple):
    """A loss and what it asks of the stage around it."""

    loss: typing.Callable  # of Terms and config.train -> losses (B,), statistics
    preference: bool = False  # compares a winner with a loser
    on_policy: bool = False  # allows one update of everything, since after it the samples are another policy's
    pretrained: bool = False  # needs the pre-trained model's transitions, and may subtract a learned baseline


ALGORITHMS = {
    "ddpo_is": Algorithm(lambda t, train: ddpo_is(t.log_prob, t.old_log_prob, t.advantage, train.clip_range)),
    "ddpo_sf": Algorithm(lambda t, train: ddpo_sf(t.log_prob, t.old_log_prob, t.advantage), on_policy=True),
    "dpok": Algorithm(
        lambda t, train: dpok(t.log_prob, t.old_log_prob, t.advantage, train.clip_range, t.kl, train.kl_weight),
        pretrained=True,
    ),
    "dpo": Algorithm(
        lambda t, train: dpo(
            t.log_prob - t.old_log_prob, t.rival_log_ratio, train.dpo_beta, train.dpo_clip_range, t.base_log_ratios
        ),
        preference=True,
    ),
}


def refers_to_base(train):
    """Whether the algorithm compares preferences with the pre-trained model."""
    return ALGORITHMS[train.algorithm].preference and train.dpo_reference == "base"
