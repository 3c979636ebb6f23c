"""Tunix. Runs in an environment with its own version of JAX and without popi_jax.

Its Llama3 and loader, DPOTrainer, Sampler and GRPOLearner, and qwix's adapters. float32, one device and therefore no
mesh, nothing logged or saved, ids padded to the longest row. Everything else has the libraries' defaults.
"""

import json
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
import transformers
from flax import nnx
from tunix.generate import sampler as sampler_lib
from tunix.models.llama3 import model as model_lib
from tunix.models.llama3 import params as params_lib
from tunix.rl import rl_cluster as cluster_lib
from tunix.rl.grpo import grpo_learner as grpo_lib
from tunix.rl.rollout import base_rollout
from tunix.sft import utils
from tunix.sft.dpo import dpo_trainer as dpo_lib

from benchmarks.cases import DPO, Cases, Checked, Job, Prepared, Turn, repeat
from benchmarks.sides.reward import Generator, render

PACKAGES = ("google-tunix", "jax", "jaxlib", "flax", "optax", "qwix", "transformers")
STEPS = 10_000  # More than any run takes; the driver ends it.
# Hub names of the weights to which Tunix gives other names; {} is the layer.
HUB_NAMES = {
    "embedder.input_embedding": "model.embed_tokens.weight",
    "final_norm.w": "model.norm.weight",
    "input_layernorm.w": "model.layers.{}.input_layernorm.weight",
    "post_attention_layernorm.w": "model.layers.{}.post_attention_layernorm.weight",
}
HUB_NAMES |= {f"attn.{name}_proj.w": f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkvo"}
HUB_NAMES |= {f"mlp.{name}_proj.kernel": f"model.layers.{{}}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}


def load_model(job: Job) -> model_lib.Llama3:
    """The checkpoint, float32."""
    hub = json.loads((pathlib.Path(job.rows["model"]) / "config.json").read_text(encoding="utf-8"))
    config = model_lib.ModelConfig(
        num_layers=hub["num_hidden_layers"],
        vocab_size=hub["vocab_size"],
        embed_dim=hub["hidden_size"],
        hidden_dim=hub["intermediate_size"],
        num_heads=hub["num_attention_heads"],
        head_dim=hub.get("head_dim", hub["hidden_size"] // hub["num_attention_heads"]),
        num_kv_heads=hub["num_key_value_heads"],
        rope_theta=int(hub["rope_theta"]),
        norm_eps=hub["rms_norm_eps"],
        weight_tying=hub["tie_word_embeddings"],
    )
    return params_lib.create_model_from_safe_tensors(job.rows["model"], config, dtype=jnp.float32)


def load_tokenizer(job: Job) -> Any:
    """The checkpoint's tokenizer, with a pad token that no text contains."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.rows["model"])
    if tokenizer.pad_token_id in job.rows["stop_ids"]:
        # Tunix masks every pad id, and SmolLM2's pad token also ends each turn of a prompt.
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def with_adapters(job: Job, model: model_lib.Llama3) -> Any:
    """The model with qwix's adapters on the case's targets."""
    targets = "|".join(f".*{name}_proj" for name in job.sizes.lora_targets)
    # alpha as in our side's config.
    provider = qwix.LoraProvider(module_path=targets, rank=job.sizes.lora_rank, alpha=16.0)
    return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())


def padded(rows: list[list[int]], width: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and their mask, [rows, width]. Padding ids are 0, which is any token, because they are masked."""
    ids_BxL, mask_BxL = (np.zeros((len(rows), width), np.int32) for _ in range(2))
    for i, row in enumerate(rows):
        own = slice(width - len(row), width) if left else slice(0, len(row))
        ids_BxL[i, own], mask_BxL[i, own] = row, 1
    return ids_BxL, mask_BxL


def batches(pairs: Sequence[dict[str, Any]], size: int, prompt_width: int = 0) -> list[dpo_lib.TrainingInput]:
    """Pairs as ids, `size` to a batch. Given texts, the trainer would take every pad id for padding.

    All batches have the width of the longest prompt, at least `prompt_width`: Tunix compiles its step for each width.
    """
    prompts, chosen, rejected = ([pair[f"{part}_ids"] for pair in pairs] for part in ("prompt", "chosen", "rejected"))
    # The trainer stacks chosen and rejected responses, so both are as wide as the longest of all.
    response = max(map(len, chosen + rejected))
    arrays = [
        *padded(prompts, max(prompt_width, *map(len, prompts)), left=True),
        *padded(chosen, response, left=False),
        *padded(rejected, response, left=False),
    ]
    starts = range(0, len(pairs), size)
    return [dpo_lib.TrainingInput(*(x[start : start + size] for x in arrays)) for start in starts]


def adamw(job: Job, clip: float) -> optax.GradientTransformation:
    """AdamW on clipped gradients, as on our side."""
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(job.sizes.learning_rate, weight_decay=0.0))


def dpo_trainer(job: Job, optimizer: optax.GradientTransformation, micro_batches: int = 1) -> dpo_lib.DPOTrainer:
    """DPOTrainer on the checkpoint, which is also its reference. It stays usable after `train` returns."""
    reference = load_model(job)
    # Adapters leave the model below them as it is. In full fine-tuning the policy needs weights of its own.
    policy = with_adapters(job, reference) if job.lora else load_model(job)
    config = dpo_lib.DPOTrainingConfig(
        eval_every_n_steps=STEPS,
        beta=job.sizes.beta,
        gradient_accumulation_steps=micro_batches if micro_batches > 1 else None,
    )
    trainer = dpo_lib.DPOTrainer(policy, reference, optimizer, config)
    trainer.is_managed_externally = True  # It would close its metrics at the end of the first `train` otherwise.
    return trainer


def dpo_inputs(job: Job, optimizer: optax.GradientTransformation) -> tuple[dpo_lib.DPOTrainer, list[Any]]:
    """A DPO case's trainer and the micro-batches of one step; tunix_micro has one pair in each."""
    count = job.sizes.pairs if job.peer == "tunix_micro" else 1
    return dpo_trainer(job, optimizer, count), batches(job.pairs, len(job.pairs) // count)


def dpo(job: Job) -> Prepared:
    """Steps of DPOTrainer.train, from its inputs to its optimizer, with the reference's log-probabilities."""
    trainer, batch = dpo_inputs(job, adamw(job, 10.0))

    def inputs(turn: Turn) -> Iterator[dpo_lib.TrainingInput]:
        wanted = True
        while wanted:
            yield from batch
            # The trainer asks for the next batch when it has dispatched the step, not when the step is done.
            jax.block_until_ready(nnx.state(trainer.model))
            wanted = turn({})

    def measure(turn: Turn) -> dict[str, Any]:
        trainer.train(inputs(turn))
        return {}

    return measure, {}


def hub_name(path: tuple[Any, ...]) -> str:
    """The hub's name of one of Tunix's weights; PEFT's name of an adapter."""
    name = ".".join(map(str, path))
    layer = re.match(r"layers\.(\d+)\.", name)
    own = name[layer.end() :] if layer else name
    adapter = re.fullmatch(r"(.*)_lora_([ab])", own)
    hub = HUB_NAMES[adapter[1] if adapter else own].format(layer[1] if layer else "")
    return f"base_model.model.{hub.removesuffix('.weight')}.lora_{adapter[2].upper()}.weight" if adapter else hub


def to_hub(path: tuple[Any, ...], value: np.ndarray) -> np.ndarray:
    """A weight or its gradient in the hub's shape: [out, in], heads flattened."""
    if value.ndim == 1 or path[-1] == "input_embedding":
        return value
    # o_proj is the only kernel with heads on its input side.
    return value.reshape(-1, value.shape[-1]).T if "o_proj" in path else value.reshape(len(value), -1).T


def check_dpo(job: Job) -> Checked:
    """The loss of one batch and the gradient of every trained weight."""
    # An optimizer that keeps the gradient and changes nothing.
    trainer, batch = dpo_inputs(job, optax.chain(optax.trace(decay=0.0), optax.scale(0.0)))
    if job.lora:
        given, state = np.load(job.check_file("adapter.npz")), nnx.state(trainer.model, nnx.LoRAParam)
        for path, value in nnx.to_flat_state(state):
            value[...] = jnp.asarray(given[hub_name(path)].T.reshape(value.shape))
        nnx.update(trainer.model, state)
    trainer.train(batch)
    trainer.close()  # Writes the loss.
    kept = {path: np.asarray(value[...]) for path, value in nnx.to_flat_state(nnx.state(trainer.optimizer))}
    grads = {path[path.index("trace") + 1 :]: value for path, value in kept.items() if "trace" in path}
    loss = float(trainer.metrics_logger.get_metric("", "loss", "train"))
    return {"loss": loss}, {hub_name(path): to_hub(path, value) for path, value in grads.items()}


class Sampling:
    """Tunix's Sampler on the users' prompts, each of them `copies` times."""

    def __init__(self, job: Job, copies: int):
        self.job, model, tokenizer = job, load_model(job), load_tokenizer(job)
        users = job.rows["sampling"]
        self.texts = [render(tokenizer, user["message"]) for user in users for _ in range(copies)]
        self.longest = max(len(user["prompt_ids"]) for user in users)
        config, length = model.config, self.longest + job.sizes.summary
        cache = sampler_lib.CacheConfig(length, config.num_layers, config.num_kv_heads, config.head_dim)
        self.sampler = sampler_lib.Sampler(model, tokenizer, cache)

    def __call__(self, **options: Any) -> tuple[Any, list[list[int]]]:
        """The padded prompts as read, and the new tokens of each row, up to and including the one that stops it."""
        limit, stop_ids = self.job.sizes.summary, self.job.rows["stop_ids"]
        out = self.sampler(
            self.texts,
            max_generation_steps=limit,
            max_prompt_length=self.longest,
            eos_tokens=stop_ids,
            **options,
        )
        new = [tokens.tolist() for tokens in out.tokens]
        # The sampler leaves out the token that stops a row.
        return out.padded_prompt_tokens, [row + stop_ids[:1] if len(row) < limit else row for row in new]


def sampling(job: Job) -> Prepared:
    """K samples of each prompt, from the whole distribution."""
    sample, seeds = Sampling(job, job.sizes.k), iter(range(STEPS))

    def measurement() -> dict[str, Any]:
        _, rows = sample(temperature=1.0, top_p=1.0, seed=next(seeds))
        lengths = [len(row) for row in rows]
        return {"items": sum(lengths), "decode_steps": max(lengths) - 1}

    return repeat(measurement), {}


def check_sampling(job: Job) -> Checked:
    """Each prompt as it was read, with its greedy tokens."""
    prompts, rows = Sampling(job, 1)()
    users = job.rows["sampling"]
    read = [ids.tolist()[-len(user["prompt_ids"]) :] for ids, user in zip(prompts, users, strict=True)]
    return {"tokens": [ids + new for ids, new in zip(read, rows, strict=True)]}, {}


class Evaluation:
    """DPOTrainer's evaluation, from its inputs to its metrics."""

    def __init__(self, job: Job, size: int):
        self.trainer = dpo_trainer(job, optax.identity())
        self.batches = batches(job.pairs, size)

    def __call__(self, some: list[dpo_lib.TrainingInput], *names: str) -> list[float]:
        """The means of these metrics over these batches; `train` evaluates before its first step."""
        self.trainer.train([], some)
        logger = self.trainer.metrics_logger
        return [float(logger.get_metric_history("", name, "eval")[-1]) for name in names]


def evaluation(job: Job) -> Prepared:
    """Log-probabilities of every pair under the policy and the reference."""
    evaluate = Evaluation(job, job.sizes.evaluation_batch)

    def measurement(some: list[dpo_lib.TrainingInput]) -> dict[str, Any]:
        (rewards,) = evaluate(some, "rewards/margin")
        return {"margin": rewards / job.sizes.beta}

    # Enough to warm up: the last batch may have fewer pairs, and all others have the first one's shape.
    ends = [evaluate.batches[0], evaluate.batches[-1]]
    return repeat(lambda: measurement(evaluate.batches), lambda: measurement(ends)), {}


def check_evaluation(job: Job) -> Checked:
    """Mean log-probabilities. The batches have equal sizes, because the trainer averages their means."""
    evaluate = Evaluation(job, 1)
    values = evaluate(evaluate.batches, "log_probs/chosen", "log_probs/rejected")
    return dict(zip(("logps_chosen", "logps_rejected"), values, strict=True)), {}


class NnxGenerator(Generator):
    """Scores with the model that its DPOTrainer trains."""

    def __init__(self, job: Job):
        self.job, sizes = job, job.sizes
        self.trainer = dpo_trainer(job, adamw(job, 10.0), sizes.popi_users * sizes.k // sizes.micro_pairs)
        self.width = 0
        super().__init__(job.rows, load_tokenizer(job))
        # For all iterations. A summary's text may take more tokens than it was drawn in; then the width grows.
        self.width = max(len(self.told("", user)["prompt_ids"]) for user in self.users) + sizes.summary

    def batches(self, pairs: Sequence[dict[str, Any]]) -> list[dpo_lib.TrainingInput]:
        """The pairs in micro-batches, as wide as any before."""
        self.width = max(self.width, *(len(pair["prompt_ids"]) for pair in pairs))
        return batches(pairs, self.job.sizes.micro_pairs, self.width)

    def logps(self, pairs: Sequence[dict[str, Any]]) -> np.ndarray:
        """See the base class. Uses Tunix's own function."""
        out = []
        for batch in self.batches(pairs):
            responses = np.concatenate([batch.chosen_ids, batch.rejected_ids])
            response_mask = np.concatenate([batch.chosen_mask, batch.rejected_mask])
            ids = np.concatenate([np.tile(batch.prompt_ids, (2, 1)), responses], 1)
            mask = jnp.asarray(np.concatenate([np.tile(batch.prompt_mask, (2, 1)), response_mask], 1))
            where = utils.build_positions_from_mask(mask), utils.make_causal_attn_mask(mask)
            both = dpo_lib.compute_logps(self.trainer.model, ids, *where, responses.shape[1], response_mask)
            out.append(np.stack(both, 1))
        return np.concatenate(out)

    def step(self) -> dict[str, Any]:
        """A whole DPO step on the pairs of the last rewards."""
        started = time.perf_counter()
        self.trainer.train(self.batches(self.pairs))
        jax.block_until_ready(nnx.state(self.trainer.model))
        return {"reward_s": self.reward_s, "width": self.width, "dpo_s": time.perf_counter() - started}


def grpo_learner(job: Job, generator: NnxGenerator) -> grpo_lib.GRPOLearner:
    """The learner of q_phi, with leave-one-out advantages."""
    sizes = job.sizes
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ("fsdp", "tp"))
    roles = (cluster_lib.Role.ACTOR, cluster_lib.Role.REFERENCE, cluster_lib.Role.ROLLOUT)
    longest = max(len(user["prompt_ids"]) for user in generator.users)
    # These sizes count prompts, and each prompt has K summaries.
    micro = max(1, sizes.micro_pairs // sizes.k)
    config = cluster_lib.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh),
        training_config=cluster_lib.RLTrainingConfig(
            actor_optimizer=adamw(job, 1.0),
            eval_every_n_steps=STEPS,
            max_steps=STEPS,
            mini_batch_size=sizes.popi_users,
            train_micro_batch_size=micro,
            rollout_micro_batch_size=sizes.popi_users,
            compute_logps_micro_batch_size=micro,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=sizes.summary,
            max_prompt_length=longest,
            kv_cache_size=longest + sizes.summary,
            temperature=1.0,
            eos_tokens=job.rows["stop_ids"],
        ),
    )
    models = {"actor": load_model(job), "reference": load_model(job)}
    cluster = cluster_lib.RLCluster(**models, tokenizer=generator.tokenizer, cluster_config=config)
    algorithm = grpo_lib.GRPOConfig(advantage_estimator="rloo", num_generations=sizes.k, beta=sizes.kl_coef)
    return grpo_lib.GRPOLearner(cluster, algorithm, generator.rewards)


def popi_iteration(job: Job) -> Prepared:
    """A POPI iteration as a user of Tunix would compose it.

    GRPOLearner trains q_phi with rewards from a frozen generator. After each of its steps DPOTrainer trains pi_theta on
    the pairs with the summaries that were drawn. Both are made once, and one measurement is a step of each.
    """
    generator = NnxGenerator(job)
    learner = grpo_learner(job, generator)
    texts = [render(generator.tokenizer, user["message"]) for user in generator.users]
    batch = {"prompts": texts, "user": np.arange(len(texts))}

    def inputs(turn: Turn) -> Iterator[dict[str, Any]]:
        wanted = True
        while wanted:
            yield batch
            # The learner asks for the next batch when its step is dispatched.
            jax.block_until_ready(nnx.state(learner.rl_cluster.actor_trainer.model))
            wanted = turn(generator.step())

    def measure(turn: Turn) -> dict[str, Any]:
        learner.train(inputs(turn))
        return {}

    return measure, {}


def check_rewards(job: Job) -> Checked:
    """The rewards of given summaries."""
    return {"rewards": NnxGenerator(job).persona_rewards()}, {}


CASES: Cases = dict.fromkeys(DPO, (dpo, check_dpo)) | {
    "sampling": (sampling, check_sampling),
    "evaluation": (evaluation, check_evaluation),
    "popi_iteration": (popi_iteration, check_rewards),
}
