"""Every key of every experiment, with its default. An experiment's config starts here and changes what it must."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the default configuration, locked: a key that is not here cannot be set."""
    c = ml_collections.ConfigDict()
    c.name = "base"  # Goes into results.json.
    c.seed = 0

    # The checkpoint that both models start from: a hub folder, a hub id, or "stylebook" (the tiny one in the package).
    c.model = ml_collections.ConfigDict()
    c.model.path = "stylebook"
    c.model.compute_dtype = "float32"
    # Of the base model's weights, which are not trained: "bfloat16" is half the memory, and exact for checkpoints that
    # are stored so.
    c.model.frozen_dtype = "float32"
    # Of the weights that are trained: "bfloat16" is half the memory, too; each update is rounded up or down by chance,
    # for a small one would be lost by rounding to the nearest.
    c.model.trained_dtype = "float32"
    # What the backward pass computes again instead of keeping it: none, attention, dots (all but products with weights)
    # or full (every layer). In this order less memory, and more time.
    c.model.remat = "none"
    c.model.attention = "auto"  # auto (by the devices), xla, splash (TPUs) or cudnn (NVIDIA GPUs, bfloat16).
    c.model.tokenizer = ""  # Another tokenizer than the checkpoint's own.
    # A config.json in the hub's form: the shape that --mode=compile takes where model.path is no folder.
    c.model.shape = ""

    # rank = 0: both models are fine-tuned in full. rank > 0: one frozen base, one adapter per role.
    c.lora = ml_collections.ConfigDict()
    c.lora.rank = 0
    c.lora.alpha = 16.0
    c.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")

    c.data = ml_collections.ConfigDict()
    c.data.dataset = "stylebook"  # stylebook, psoups or users.
    c.data.path = ""  # psoups: the json file. users: the training users.jsonl.
    c.data.test_path = ""  # users: the test users.jsonl; empty: a share of the users is held out.
    c.data.prepared_dir = ""  # Where TFDS keeps prepared data; empty: <workdir>/data.
    c.data.seed = 0  # Draws the split and the signals; kept apart from the run's seed.
    c.data.test_fraction = 0.3  # psoups and users.
    c.data.signals = "disjoint"  # psoups: disjoint or shipped.
    c.data.signals_per_user = 4  # stylebook and psoups (disjoint).
    c.data.train_users = 0  # 0: all that there are. stylebook draws this many.
    c.data.test_users = 0
    c.data.train_draws = 1  # psoups (disjoint): draws of signals per training row.
    c.data.test_draws = 1
    c.data.queries_per_user = 1  # M: queries that share one user's K summaries in a step.
    c.data.test_queries_per_user = 1

    # Tokens. What exceeds a limit is refused, or costs whole signals, as on_overflow says; nothing is cut.
    c.limits = ml_collections.ConfigDict()
    c.limits.signals = 1024
    c.limits.prompt = 512  # The generator's whole prompt: summary, question and template.
    c.limits.response = 256
    c.limits.summary = 48
    c.limits.bin = 512  # Pairs to score are packed into bins of this length, or of a bucket's where it suits better.
    c.limits.on_overflow = "error"  # error, or drop: whole signals, the oldest first; counted and logged.
    # Lengths that prompts and bins are padded to, each compiled for itself; (): few, chosen from the data.
    c.limits.buckets = ()

    c.prompts = ml_collections.ConfigDict()  # See data/templates.py for the fields that are filled in.
    c.prompts.inference_instruction = (
        "The examples above show which responses a user prefers. Describe in one short sentence what kind of responses"
        " this user prefers, so that it helps to answer any other prompt."
    )
    c.prompts.summary_start = ""  # Every summary starts with this text; the inference model writes on from there.
    c.prompts.summary_stop = ""  # One token, such as ".", that ends a summary and belongs to it.
    # What the inference model sees of a pair. To read a taste off a difference is hard for a small model, which may
    # learn it from the preferred responses alone, at less than half the tokens.
    c.prompts.pair_fields = ("prompt", "chosen", "rejected")
    c.prompts.generator_instruction = "Answer the prompt below in the way this user prefers."

    # How summaries are drawn in training; from the whole distribution (no top_p), as REINFORCE needs it.
    c.sampling = ml_collections.ConfigDict()
    c.sampling.k = 4  # K summaries per user.
    # The generator learns from the first k_generator of them, at a fraction of the cost; 0: from all. The inference
    # model is rewarded for all K either way.
    c.sampling.k_generator = 0
    c.sampling.temperature = 1.0

    c.objective = ml_collections.ConfigDict()
    c.objective.loss = "dpo"  # dpo or ipo.
    c.objective.beta = 0.1
    c.objective.logp_reduction = "sum"  # sum or mean over response tokens, EOS included.
    c.objective.reference_context = "prompt"  # prompt, summary or signals.
    c.objective.advantage = "rloo"  # rloo, reinforce, group_mean or grpo.
    c.objective.baseline_decay = 0.9  # reinforce: the moving average's decay.
    c.objective.kl = "exact"  # exact, k1_reward or k3_loss.
    c.objective.kl_coef = 2e-3  # lambda; the loss that it is weighed against is in nats / beta.

    c.schedule = ml_collections.ConfigDict()
    c.schedule.name = "joint"  # joint, alternate, two_phase, inference_only or generator_only.
    c.schedule.steps = 100
    # alternate: n_phi inference steps, then n_theta generator steps, repeated for `steps` in all.
    # two_phase: n_phi inference steps, then n_theta generator steps; popi does not read `steps`, the other methods do.
    c.schedule.n_phi = 1
    c.schedule.n_theta = 1

    # What the generator is told of the user: the method that this run trains.
    c.method = "popi"  # popi, base, population, raw_signals, zero_shot_summary or oracle.

    c.optim = ml_collections.ConfigDict()
    c.optim.lr_inference = 1e-6
    c.optim.lr_generator = 1e-6
    c.optim.schedule = "cosine"  # cosine or constant, after warmup_steps of linear warm-up.
    c.optim.warmup_steps = 0
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.weight_decay = 0.0
    c.optim.clip_inference = 1.0  # Global gradient norm; 0: no clipping.
    c.optim.clip_generator = 10.0

    c.train = ml_collections.ConfigDict()
    c.train.users_per_step = 8
    # Micro-batches per step of either model: as many times less memory for activations, the same update.
    c.train.accumulation_inference = 1  # Of users.
    c.train.accumulation_generator = 1  # Of bins of rows: users x summaries x queries.
    c.train.checkpoint_every = 20
    c.train.checkpoints_kept = 2
    c.train.profile_steps = ()  # (first, last): a profiler trace of these steps.

    c.eval = ml_collections.ConfigDict()
    c.eval.every = 0  # Steps; 0: only at the end.
    c.eval.users = 0  # Test users in a periodic evaluation; 0: all. The final one takes all.
    c.eval.users_per_batch = 16
    c.eval.summaries_per_user = 4
    c.eval.temperature = 0.6
    c.eval.top_p = 1.0
    c.eval.samples = 8  # Users shown in samples.jsonl with generated responses.
    c.eval.response_tokens = 64
    c.eval.bootstrap = 2000  # Resamples behind each 95% interval.

    c.table = ml_collections.ConfigDict()  # experiments/results_table.py
    c.table.methods = (
        "base",
        "population",
        "raw_signals",
        "zero_shot_summary",
        "popi",
        "oracle",
        "bayes_signals",
        "bayes_persona",
    )
    c.table.seeds = (0,)

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # -1 fills what is left.
    c.mesh.fsdp = 1
    c.mesh.tensor = 1
    return c.lock()
