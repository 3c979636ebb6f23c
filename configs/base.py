"""Every key of every experiment, with its default value. An experiment starts from these and changes some of them.

The comments above and beside a key are its reference: they give its unit and its choices, and say what 0 or an empty
value means.
"""

import ml_collections

from popi_jax.configs import check_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the default configuration. It is locked, so that setting an unknown key is an error; it takes no arg."""
    check_arg(arg, "base")
    c = ml_collections.ConfigDict()
    c.name = "base"  # Name of the experiment, shown by the progress bar and in results.json.
    c.seed = 0  # Seed of the run: initial adapters, order of the training data, sampled summaries and responses.

    # The checkpoint that both models start from, and how they compute.
    c.model = ml_collections.ConfigDict()
    # A folder in the hub's format, a hub id, or "stylebook", the tiny checkpoint in the package.
    c.model.path = "stylebook"
    # Type of activations and matrix products: float32 or bfloat16. bfloat16 is faster on accelerators and on CPUs with
    # AMX, and slower on other CPUs.
    c.model.compute_dtype = "float32"
    # Type in which the untrained weights are stored: float32 or bfloat16. bfloat16 takes half the memory, and loses
    # nothing for a checkpoint that is itself stored in bfloat16.
    c.model.frozen_dtype = "float32"
    # Type in which the trained weights are stored: float32 or bfloat16. bfloat16 takes half the memory. Its updates are
    # rounded up or down at random, because rounding to the nearest value would lose small ones.
    c.model.trained_dtype = "float32"
    # Recomputation in the backward pass, which replaces stored activations, from most memory and least time to least
    # memory and most time: none, dots (everything but the products with weights and the results of attention) or full
    # (everything but the input of each layer).
    c.model.remat = "none"
    # Attention kernel: auto, xla (any device), splash (TPUs) or cudnn (NVIDIA GPUs, with compute_dtype bfloat16). auto
    # takes splash on TPUs, cudnn on GPUs in bfloat16, and xla otherwise.
    c.model.attention = "auto"
    c.model.tokenizer = ""  # Folder of a tokenizer to use instead of the checkpoint's own; "": the checkpoint's own.
    # A config.json in the hub's format. --mode=compile takes the model's shape from it if model.path is not a local
    # folder. "": none.
    c.model.shape = ""

    # Low-rank adapters.
    c.lora = ml_collections.ConfigDict()
    # Rank of the adapters; 0: none. With 0 both models are fine-tuned in full. Above 0 the checkpoint is frozen, and
    # each of the two models is an adapter on it.
    c.lora.rank = 0
    c.lora.alpha = 16.0  # Scale of the adapters: their product is multiplied by alpha / rank.
    # The matrices of each layer that get an adapter: q, k, v and o of attention; gate, up and down of the MLP.
    c.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")
    # The folder of a PEFT adapter that the inference model starts from; "" is a fresh adapter. The reference and method
    # zero_shot_summary stay without it.
    c.lora.init_inference = ""
    c.lora.init_generator = ""  # The same for the generator.

    # The users to train and test on.
    c.data = ml_collections.ConfigDict()
    # stylebook (generated, ships with the package), users (your own users.jsonl), psoups (a P-Soups file), or one of
    # the public benchmarks: elix, review, roleplay, alignx, prefeval and traits.
    c.data.dataset = "stylebook"
    # users: the users.jsonl to train on. psoups: the JSON file. Benchmarks: the folder or file of the data as
    # published, or hf://datasets/OWNER/NAME to take it from the hub. stylebook reads no file, so leave it "".
    c.data.path = ""
    # users: the users.jsonl to test on. elix, review, roleplay and alignx: the folder or file to test on. "": the test
    # split in data.path, or if there is none, a share of it, see test_fraction. The other data sets do not use it.
    c.data.test_path = ""
    c.data.prepared_dir = ""  # Folder for the prepared data; "": the folder data in the run's workdir.
    # Seed of the data: it draws the users, their signals and the train/test split. It is separate from seed, so that
    # runs with different seeds share their data.
    c.data.seed = 0
    # Share to test on, between 0 and 1, both excluded, where the data have no test split. psoups: of the rows. users
    # and prefeval: of the users. traits: of the statements. Other benchmarks: of the prompts. With unseen = "topics":
    # the topics.
    c.data.test_fraction = 0.3
    # How rows become users. disjoint: nothing of the test split is seen in training, as far as the data allow.
    # published: as in the published code of a benchmark, for figures that compare with the paper's; for psoups, the
    # signals are the feedback pairs in the file.
    c.data.protocol = "disjoint"
    # What a benchmark's builder does with rows whose label or text is null or blank: error, or drop, which counts them.
    c.data.on_null = "error"
    # alignx: what a test user shows: DEMO (a demographic text), UGC (comments), PAIR (preference pairs) or arbitrary (a
    # mix). Each is a test file of its own; the training users are the same.
    c.data.variant = "arbitrary"
    # prefeval and traits: what the test users have that no training user has: users (nothing but themselves and their
    # texts) or topics (topics of prefeval, or traits).
    c.data.unseen = "users"
    # traits: the numbers of traits of a user, one of which is drawn for each.
    c.data.traits_per_user = (2,)
    # Signals per user. users always takes all signals in the file, and so do psoups with protocol = "published", alignx
    # and prefeval.
    c.data.signals_per_user = 4
    # Number of training users. stylebook (at least 1) and traits (0: 640) draw that many. The others take the first
    # ones, and all of them for 0.
    c.data.train_users = 0
    # Number of test users. stylebook (at least 1) and traits (0: 300) draw that many. The others take the first ones,
    # and all of them for 0.
    c.data.test_users = 0
    # Passes over the training rows, each with newly drawn signals: psoups, elix, review and roleplay with protocol =
    # "disjoint". The published protocol has its own number.
    c.data.train_draws = 1
    c.data.test_draws = 1  # The same for the test rows.
    # M: queries of a user in one training step, each of which is scored with all of the user's K summaries. A user with
    # more queries shows a new random choice in every step. Data sets that draw their users give them at most this many.
    c.data.queries_per_user = 1
    # Queries of a test user, at most. stylebook and traits give them exactly this many. users tests on all in the file.
    c.data.test_queries_per_user = 1

    # Longest inputs and outputs, in tokens. Inputs are never cut: one that exceeds its limit is an error, or, with
    # on_overflow = "drop", costs the user whole signals.
    c.limits = ml_collections.ConfigDict()
    # Tokens of the inference model's prompt: signals, instruction, chat template and summary_start.
    c.limits.signals = 1024
    # Tokens of the generator's prompt: what it is told of the user, instruction, question and chat template.
    c.limits.prompt = 512
    c.limits.response = 256  # Tokens of a chosen or rejected response, its end token included.
    # Tokens of a summary, without summary_start. A summary that reaches the limit ends there, and is counted as cut.
    c.limits.summary = 48
    # Length, in tokens, of the bins into which prompts with both responses are packed for scoring. Two or three times a
    # typical prompt with its responses is a good value. Where a bucket pads less, or a single prompt with its responses
    # is longer, the length of a bucket is used instead.
    c.limits.bin = 512
    # For what exceeds a limit: error, or drop. drop leaves out a user's oldest signals, and queries and users that do
    # not fit even so; it counts both, and leaves out the same queries and users for every method.
    c.limits.on_overflow = "error"
    # Lengths, in tokens, to which prompts and bins are padded. Each one is compiled separately, so a few are enough.
    # (): chosen from the data.
    c.limits.buckets = ()

    # The text around signals and summaries; popi_jax/data/layouts.py puts it together.
    c.prompts = ml_collections.ConfigDict()
    # The request for a summary. It follows the signals in the inference model's prompt.
    c.prompts.inference_instruction = (
        "The examples above show which responses a user prefers. Describe in one short sentence what kind of responses"
        " this user prefers, so that it helps to answer any other prompt."
    )
    # Text that every summary starts with; the inference model continues from there. "": it writes the whole summary.
    c.prompts.summary_start = ""
    # Text of one token, such as ".", that ends a summary and is part of it. "": only the model's own end tokens do.
    c.prompts.summary_stop = ""
    # The fields of a pair that the inference model sees: chosen, and optionally prompt and rejected. A small model may
    # learn a user's taste more easily from the chosen responses alone, which also take less than half the tokens.
    c.prompts.pair_fields = ("prompt", "chosen", "rejected")
    # How to use what the generator is told of the user. It comes between that and the question.
    c.prompts.generator_instruction = "Answer the prompt below in the way this user prefers."
    # The headings and sections around all of this: plain (ours); published_pairs, published_brackets or
    # published_alignx (as in the public code for the benchmarks); or the path of a JSON file like those in
    # popi_jax/assets/layouts.
    c.prompts.layout = "plain"

    # How summaries are sampled in training: from the whole distribution, without top-p, as REINFORCE requires.
    c.sampling = ml_collections.ConfigDict()
    # K: summaries sampled per user in a step. At least 2, unless objective.advantage is reinforce.
    c.sampling.k = 4
    # How many of a user's K summaries the generator learns from; 0: all. Fewer make its update cheaper, and it stays
    # unbiased. The inference model is rewarded for all K in any case. The second phase of two_phase always takes one.
    c.sampling.k_generator = 0
    c.sampling.k_warm_start = 0  # K in the steps of schedule.warm_start = "best_of_k"; 0: sampling.k.
    c.sampling.temperature = 1.0  # Temperature of the sampled summaries, above 0.

    # The losses of the two models.
    c.objective = ml_collections.ConfigDict()
    c.objective.loss = "dpo"  # Preference loss: dpo or ipo.
    # Beta of the preference loss, above 0. The larger it is, the closer the generator stays to the reference.
    c.objective.beta = 0.1
    # How the log-probability of a response is taken from those of its tokens, the end token included: sum or mean.
    c.objective.logp_reduction = "sum"
    # The reference model reads the question, and besides it: prompt (nothing), summary (the generator's context) or
    # signals (the user's signals).
    c.objective.reference_context = "prompt"
    # How the rewards of a user's summaries become the weights of their gradients: rloo (minus the mean of the others),
    # reinforce (minus a moving average over earlier steps), group_mean (minus the mean of all) or grpo (group_mean,
    # divided by the standard deviation).
    c.objective.advantage = "rloo"
    # Decay per step of the moving average of rewards, between 0 and 1; for advantage = "reinforce" only.
    c.objective.baseline_decay = 0.9
    # How the inference model's KL divergence from the untrained model is estimated: exact (over the whole vocabulary at
    # each token), k1_reward (the log-ratio, subtracted from the reward) or k3_loss (the k3 estimator, as a loss).
    c.objective.kl = "exact"
    # Lambda: weight of that KL divergence, in nats, against the preference loss, in nats / beta. 0: it has no effect.
    c.objective.kl_coef = 2e-3
    # Share of kl_coef that is gone at the end of the run, 0 to 1. It goes linearly, step by step.
    c.objective.kl_decay = 0.0
    # That many of the user's own pairs, drawn anew in each step, are left out of the inference model's prompt and asked
    # like queries, as a further test of the summary. One signal always stays.
    c.objective.reward_signals = 0
    # Whether the reward is relative to a generator that is told nothing: by how much the summary lowers the loss. It
    # changes nothing among a user's summaries, but it is the level that warm_start = "best_of_k" asks for, and a better
    # baseline of advantage = "reinforce".
    c.objective.relative_reward = False
    c.objective.length_penalty = 0.0  # What each token of a summary takes from its reward, in nats / beta.
    # What a summary loses that is copied from the user's signals, in nats / beta. It is multiplied by the share of the
    # summary's words that are in copied runs of three or more.
    c.objective.copy_penalty = 0.0

    # Which of the two models each step trains.
    c.schedule = ml_collections.ConfigDict()
    # joint (both in every step), alternate (in turns), two_phase (first the inference model, then the generator),
    # inference_only or generator_only.
    c.schedule.name = "joint"
    # Steps before anything else in which popi's generator learns to use what it is told, from a context that is known
    # to inform. The other methods train their generators for that many more steps of their own.
    c.schedule.n_generator_warmup = 0
    c.schedule.generator_warmup = "persona"  # That context: persona or raw_signals.
    # Steps after those, and before the schedule, in which the inference model learns by imitation.
    c.schedule.n_warm_start = 0
    # What it imitates: best_of_k (each user's best summary of K, by the reward) or persona (the training users'
    # personas, which the data has to contain).
    c.schedule.warm_start = "best_of_k"
    # Training steps of the schedule `name`. popi with two_phase takes n_phi + n_theta steps instead.
    c.schedule.steps = 100
    # Inference steps: in each turn of alternate, or in the first phase of two_phase. Not used otherwise.
    c.schedule.n_phi = 1
    # Generator steps: in each turn of alternate, or in the second phase of two_phase. Not used otherwise.
    c.schedule.n_theta = 1

    # The method to train, which decides what the generator is told of the user: popi (a summary by the inference model,
    # trained with it), base (nothing; nothing is trained either), population (nothing), raw_signals (the signals
    # themselves), zero_shot_summary (a summary by the untrained model) or oracle (the true persona, which the data has
    # to contain).
    c.method = "popi"

    # AdamW, separately for each model.
    c.optim = ml_collections.ConfigDict()
    c.optim.lr_inference = 1e-6  # Peak learning rate of the inference model.
    c.optim.lr_generator = 1e-6  # Peak learning rate of the generator.
    c.optim.schedule = "cosine"  # Learning rate after the warm-up: cosine (to 0 at the end of the run) or constant.
    c.optim.warmup_steps = 0  # Updates of a model over which its learning rate rises linearly; 0: no warm-up.
    c.optim.b1 = 0.9  # Decay of the mean of the gradients.
    c.optim.b2 = 0.999  # Decay of the mean of the squared gradients.
    c.optim.weight_decay = 0.0  # Decoupled weight decay, multiplied by the learning rate; 0: none.
    c.optim.clip_inference = 1.0  # Largest global norm of the inference model's gradient; 0: no clipping.
    c.optim.clip_generator = 10.0  # Largest global norm of the generator's gradient; 0: no clipping.

    # The training loop.
    c.train = ml_collections.ConfigDict()
    # Users in a training step. On several devices the batch is padded to a multiple of mesh.data x mesh.fsdp.
    c.train.users_per_step = 8
    # Micro-batches, of users, into which the inference model's part of a step is split. The update stays the same, and
    # activations take that many times less memory. 1: no split.
    c.train.accumulation_inference = 1
    # Micro-batches, of packed bins, into which the generator's part of a step is split. The update stays the same, and
    # activations take that many times less memory. 1: no split.
    c.train.accumulation_generator = 1
    c.train.checkpoint_every = 20  # Steps from one checkpoint to the next. The last step always leaves one.
    c.train.checkpoints_kept = 2  # How many of the newest checkpoints are kept.
    # (first, last): the steps, from 0 and both included, that a profiler trace is taken of, into the workdir's folder
    # profile. (): no trace.
    c.train.profile_steps = ()

    # Evaluation. --mode=summarize and --mode=generate use temperature, top_p and users_per_batch, too.
    c.eval = ml_collections.ConfigDict()
    # Training steps from one evaluation to the next; 0: only at the end, where there is always one.
    c.eval.every = 0
    c.eval.users = 0  # Test users in an evaluation during training, the first ones; 0: all. The last one takes all.
    c.eval.users_per_batch = 16  # Users whose texts are generated or scored at a time. More take more memory.
    c.eval.summaries_per_user = 4  # Summaries written for each test user, over which the results are averaged.
    c.eval.temperature = 0.6  # Temperature of summaries and responses; 0: always the most likely token.
    # Nucleus sampling of summaries and responses: the most likely tokens up to this total probability, above 0 and at
    # most 1. 1: all tokens.
    c.eval.top_p = 1.0
    c.eval.samples = 8  # Test users shown in samples.jsonl, each with a generated response; 0: none.
    c.eval.response_tokens = 64  # Longest response that is generated for samples.jsonl, in tokens.
    c.eval.bootstrap = 2000  # Bootstrap resamples behind each 95% interval.

    # The runs of experiments/results_table.py, unless its flags say otherwise.
    c.table = ml_collections.ConfigDict()
    # Rows of the table: values of method, or popi with another schedule (popi_joint, popi_two_phase, popi_alternate,
    # inference_only, generator_only), or the best possible decision given the signals or the persona (bayes_signals,
    # bayes_persona), which is known for stylebook alone and left out for other data.
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
    c.table.seeds = (0,)  # Every method is run once with each of these seeds.

    # The number of devices along each axis of the mesh. At most one axis can be -1: all devices that the others leave.
    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # Replicas, each with all weights and its own users; -1: all devices that the other axes leave.
    c.mesh.fsdp = 1  # Devices that split users and weights among them; -1: all devices that the other axes leave.
    # Devices that split attention heads, MLP and vocabulary among them; -1: all devices that the other axes leave.
    c.mesh.tensor = 1
    return c.lock()
