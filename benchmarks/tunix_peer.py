"""Tunix's side: a worker of an environment of its own, which has Tunix with its own JAX, and not us.

    python -m benchmarks.tunix_peer --work=DIR --case=CASE --variant=PEER [--check]

Tunix as its users have it: its Llama3 and loader, its DPOTrainer, its Sampler, qwix's adapters. float32; one device,
thus no mesh; nothing logged or saved; ids padded as far as their longest row; all else as the libraries have it.
"""

import argparse
import importlib.metadata
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
import safetensors.numpy
import transformers
from flax import nnx
from tunix.generate import sampler as sampler_lib
from tunix.models.llama3 import model as model_lib
from tunix.models.llama3 import params as params_lib
from tunix.sft.dpo import dpo_trainer as dpo_lib

from benchmarks import cases
from benchmarks.peer_reward import render
from benchmarks.protocol import Channel

STEPS = 10_000  # More than any run takes: the driver ends it.
# The trainer's second step compiles once more, for its optimizer's state now lies where a step leaves it; so does the
# comparison of the sampler's second call with its first.
WARMUP = 2
PACKAGES = ("google-tunix", "jax", "jaxlib", "flax", "optax", "qwix", "transformers")
# Hub names of what Tunix names otherwise; {} is the layer.
HUB_NAMES = {
    "embedder.input_embedding": "model.embed_tokens.weight",
    "final_norm.w": "model.norm.weight",
    "input_layernorm.w": "model.layers.{}.input_layernorm.weight",
    "post_attention_layernorm.w": "model.layers.{}.post_attention_layernorm.weight",
    **{
        f"attn.{name}.w": f"model.layers.{{}}.self_attn.{name}.weight"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    },
    **{f"mlp.{name}.kernel": f"model.layers.{{}}.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")},
}


class Job:
    """What a worker was asked for, and what every case needs."""

    def __init__(self, case: str, variant: str, work: pathlib.Path, rows: dict[str, Any]):
        self.case, self.variant, self.work, self.rows = case, variant, work, rows
        self.sizes = cases.Sizes(**rows["sizes"])
        self.micro_batches = self.sizes.pairs if variant == "tunix_micro" else 1
        self.started = time.perf_counter()

    def load_model(self) -> model_lib.Llama3:
        """The checkpoint, float32."""
        hub = json.loads((pathlib.Path(self.rows["model"]) / "config.json").read_text(encoding="utf-8"))
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
        return params_lib.create_model_from_safe_tensors(self.rows["model"], config, dtype=jnp.float32)

    def load_tokenizer(self) -> Any:
        """The checkpoint's, with a pad that no text has."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.rows["model"])
        if tokenizer.pad_token_id in self.rows["stop_ids"]:
            # Tunix masks every id that is the pad's, and SmolLM2's ends each turn of a prompt as well.
            tokenizer.pad_token = tokenizer.unk_token
        return tokenizer


def with_adapters(job: Job, model: model_lib.Llama3) -> Any:
    """The model with qwix's adapters on the case's targets."""
    targets = "|".join(f".*{name}_proj" for name in job.sizes.lora_targets)
    # alpha as in the config that is measured on the other side.
    provider = qwix.LoraProvider(module_path=targets, rank=job.sizes.lora_rank, alpha=16.0)
    return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())


def padded(rows: list[list[int]], width: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and their mask, [rows, width]; padding is masked, so that any id will do."""
    ids_BxL, mask_BxL = (np.zeros((len(rows), width), np.int32) for _ in range(2))
    for i, row in enumerate(rows):
        own = slice(width - len(row), width) if left else slice(0, len(row))
        ids_BxL[i, own], mask_BxL[i, own] = row, 1
    return ids_BxL, mask_BxL


def batches(pairs: Sequence[dict[str, Any]], size: int, prompt_width: int = 0) -> list[dpo_lib.TrainingInput]:
    """Pairs as ids, `size` to a batch: of texts the trainer takes each id that is the pad's for padding.

    All are of one width, for Tunix compiles its steps for each: the longest prompt's, which is at least `prompt_width`.
    """
    prompts, chosen, rejected = ([pair[f"{part}_ids"] for pair in pairs] for part in ("prompt", "chosen", "rejected"))
    # The trainer stacks chosen and rejected ones, so both are as wide as the longest of all.
    response = max(map(len, chosen + rejected))
    prompt_ids, prompt_mask = padded(prompts, max(prompt_width, *map(len, prompts)), left=True)
    chosen_ids, chosen_mask = padded(chosen, response, left=False)
    rejected_ids, rejected_mask = padded(rejected, response, left=False)
    arrays = (prompt_ids, prompt_mask, chosen_ids, chosen_mask, rejected_ids, rejected_mask)
    starts = range(0, len(pairs), size)
    return [dpo_lib.TrainingInput(*(x[start : start + size] for x in arrays)) for start in starts]


def micro_batches(job: Job) -> list[dpo_lib.TrainingInput]:
    """The DPO case's pairs."""
    pairs = job.rows[f"dpo_{cases.context_kind(job.case)}"]
    return batches(pairs, len(pairs) // job.micro_batches)


def adamw(job: Job, clip: float) -> optax.GradientTransformation:
    """AdamW of clipped gradients, as the other side's."""
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(job.sizes.learning_rate, weight_decay=0.0))


def dpo_trainer(job: Job, optimizer: optax.GradientTransformation) -> dpo_lib.DPOTrainer:
    """DPOTrainer on the checkpoint, in full or with adapters; its reference is the checkpoint."""
    reference = job.load_model()
    # Adapters leave the model that they are put on as it is; in full the policy needs weights of its own.
    policy = with_adapters(job, reference) if cases.is_lora(job.case) else job.load_model()
    config = dpo_lib.DPOTrainingConfig(
        eval_every_n_steps=STEPS,
        beta=job.sizes.beta,
        gradient_accumulation_steps=job.micro_batches if job.micro_batches > 1 else None,
    )
    return dpo_lib.DPOTrainer(policy, reference, optimizer, config)


def take_turns(job: Job, channel: Channel, trainer: dpo_lib.DPOTrainer) -> Iterator[dpo_lib.TrainingInput]:
    """The same pairs for every step, each when the driver wants it; a measurement is all to the end of its update.

    The trainer asks for the next batch when the step is dispatched, not when it is done.
    """
    batch = micro_batches(job)
    load_s = time.perf_counter() - job.started
    began = time.perf_counter()
    for _ in range(WARMUP):
        yield from batch
        jax.block_until_ready(nnx.state(trainer.model))
    channel.ready(load_s=load_s, warmup_s=time.perf_counter() - began)
    while channel.wait():
        began = time.perf_counter()
        yield from batch
        jax.block_until_ready(nnx.state(trainer.model))
        channel.done(time.perf_counter() - began)


def dpo(job: Job, channel: Channel) -> None:
    """Steps of DPOTrainer.train, from its inputs, the reference's log-probabilities among them, to its optimizer."""
    trainer = dpo_trainer(job, adamw(job, 10.0))
    trainer.train(take_turns(job, channel, trainer))


def hub_name(path: tuple[Any, ...]) -> str:
    """The hub's name of a weight of Tunix's, PEFT's of an adapter's."""
    name = ".".join(map(str, path))
    layer = re.match(r"layers\.(\d+)\.", name)
    own = name[layer.end() :] if layer else name
    adapter = re.fullmatch(r"(.*)_lora_([ab])", own)
    if adapter is None:
        return HUB_NAMES[own].format(layer[1] if layer else "")
    base = HUB_NAMES[adapter[1]].format(layer[1] if layer else "").removesuffix(".weight")
    return f"base_model.model.{base}.lora_{adapter[2].upper()}.weight"


def to_hub(path: tuple[Any, ...], value: np.ndarray) -> np.ndarray:
    """A weight, or what has its shape, in the hub's shape: [out, in], heads flattened."""
    if value.ndim == 1 or path[-1] == "input_embedding":
        return value
    # Of all kernels that have heads, o_proj's alone has them in its input.
    return np.ascontiguousarray(
        value.reshape(-1, value.shape[-1]).T if "o_proj" in path else value.reshape(len(value), -1).T
    )


def set_adapters(model: Any, given: dict[str, np.ndarray]) -> None:
    """Puts the adapters that the other side has in place of fresh ones."""
    state = nnx.state(model, nnx.LoRAParam)
    for path, value in nnx.to_flat_state(state):
        value[...] = jnp.asarray(given[hub_name(path)].T.reshape(value.shape))
    nnx.update(model, state)


def check_dpo(job: Job) -> None:
    """The loss of one batch and the gradient of every trained weight, which an optimizer keeps that changes nothing."""
    folder = job.work / "check"
    trainer = dpo_trainer(job, optax.chain(optax.trace(decay=0.0), optax.scale(0.0)))
    if cases.is_lora(job.case):
        set_adapters(trainer.model, safetensors.numpy.load_file(folder / f"{job.case}_adapter.safetensors"))
    trainer.train(micro_batches(job))
    kept = {path: np.asarray(value[...]) for path, value in nnx.to_flat_state(nnx.state(trainer.optimizer))}
    grads = {path[path.index("trace") + 1 :]: value for path, value in kept.items() if "trace" in path}
    tensors = {hub_name(path): to_hub(path, value) for path, value in grads.items()}
    safetensors.numpy.save_file(tensors, folder / f"{job.case}_peer.safetensors")
    _write_check(job, {"loss": float(trainer.metrics_logger.get_metric("", "loss", "train"))})


class Sampling:
    """Tunix's Sampler on the users' prompts, each of them `copies` times."""

    def __init__(self, job: Job, copies: int):
        self.job, model, tokenizer = job, job.load_model(), job.load_tokenizer()
        self.users = job.rows["sampling"]
        self.texts = [render(tokenizer, user["message"]) for user in self.users for _ in range(copies)]
        self.longest = max(len(user["prompt_ids"]) for user in self.users)
        config = model.config
        cache = sampler_lib.CacheConfig(
            self.longest + job.sizes.summary, config.num_layers, config.num_kv_heads, config.head_dim
        )
        self.sampler = sampler_lib.Sampler(model, tokenizer, cache)

    def __call__(self, **options: Any) -> Any:
        """The sampler's output."""
        return self.sampler(
            self.texts,
            max_generation_steps=self.job.sizes.summary,
            max_prompt_length=self.longest,
            eos_tokens=self.job.rows["stop_ids"],
            **options,
        )

    def tokens(self, out: Any) -> list[list[int]]:
        """New tokens of each row up to the one that stops it, which counts; the sampler leaves it out."""
        rows = [tokens.tolist() for tokens in out.tokens]
        return [row + self.job.rows["stop_ids"][:1] if len(row) < self.job.sizes.summary else row for row in rows]


def sampling(job: Job, channel: Channel) -> None:
    """K samples of each prompt, of the whole distribution."""
    sample, seeds = Sampling(job, job.sizes.k), iter(range(STEPS))

    def measure() -> dict[str, Any]:
        out = sample(temperature=1.0, top_p=1.0, seed=next(seeds))
        lengths = [len(row) for row in sample.tokens(out)]
        return {"items": sum(lengths), "decode_steps": max(lengths) - 1}

    channel.serve(job.started, measure, warm_ups=WARMUP)


def check_sampling(job: Job) -> None:
    """Greedy tokens, of the ids that the other side reads."""
    sample = Sampling(job, 1)
    out = sample()
    read = [
        ids.tolist()[-len(user["prompt_ids"]) :]
        for ids, user in zip(out.padded_prompt_tokens, sample.users, strict=True)
    ]
    _write_check(
        job, {"tokens": sample.tokens(out), "tokens_identical": read == [user["prompt_ids"] for user in sample.users]}
    )


class Evaluation:
    """DPOTrainer's evaluation, from its inputs to its metrics; reference and policy are the checkpoint."""

    def __init__(self, job: Job, size: int):
        self.trainer = dpo_trainer(job, optax.identity())
        self.trainer.is_managed_externally = True  # It would close its metrics at the end of `train` otherwise.
        self.batches = batches(job.rows["evaluation"], size)

    def __call__(self, some: list[dpo_lib.TrainingInput], *names: str) -> list[float]:
        """Means, over these batches, of the metrics of these names: `train` evaluates before its first step."""
        self.trainer.train([], some)
        logger = self.trainer.metrics_logger
        return [float(logger.get_metric_history("", name, "eval")[-1]) for name in names]


def evaluation(job: Job, channel: Channel) -> None:
    """Log-probabilities of every pair, the policy's and the reference's."""
    evaluate = Evaluation(job, job.sizes.evaluation_batch)

    def measure(some: list[dpo_lib.TrainingInput]) -> dict[str, float]:
        (rewards,) = evaluate(some, "rewards/margin")
        return {"margin": rewards / job.sizes.beta}

    # The last batch may have fewer pairs than the first, and all others are as one of these.
    ends = [evaluate.batches[0], evaluate.batches[-1]]
    channel.serve(job.started, lambda: measure(evaluate.batches), lambda: measure(ends), WARMUP)


def check_evaluation(job: Job) -> None:
    """Mean log-probabilities; of batches of one size, for the trainer means their means."""
    evaluate = Evaluation(job, 1)
    values = evaluate(evaluate.batches, "log_probs/chosen", "log_probs/rejected")
    _write_check(job, dict(zip(("logps_chosen", "logps_rejected"), values, strict=True)))


def check_rewards(job: Job) -> None:
    """The rewards of the POPI iteration, of summaries that are given."""
    from benchmarks import tunix_popi

    _write_check(job, tunix_popi.NnxGenerator(job).check())


def _write_check(job: Job, values: dict[str, Any]) -> None:
    (job.work / "check" / f"{job.case}_peer.json").write_text(json.dumps(values), encoding="utf-8")


def main() -> None:
    """Serves the driver, or writes the check."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--case", required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--check", action="store_true")
    flags = parser.parse_args()
    channel = Channel()
    rows = json.loads((flags.work / "rows.json").read_text(encoding="utf-8"))
    job = Job(flags.case, flags.variant, flags.work, rows)
    if flags.check:
        checks = {"sampling": check_sampling, "evaluation": check_evaluation, "popi_iteration": check_rewards}
        checks.get(job.case, check_dpo)(job)
        channel.ready()
    elif job.case == "popi_iteration":
        from benchmarks import tunix_popi

        tunix_popi.popi_iteration(job, channel)
    else:
        {"sampling": sampling, "evaluation": evaluation}.get(job.case, dpo)(job, channel)
    channel.end(versions={name: importlib.metadata.version(name) for name in PACKAGES})


if __name__ == "__main__":
    main()
