"""TRL and transformers. Runs in an environment with neither JAX nor popi_jax.

float32, as many threads as cores, nothing logged or saved. Everything else has the libraries' defaults, except for what
a variant's name says and gradient checkpointing, which costs time and is on in trl_checkpointing alone.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import peft
import torch
import transformers
import trl

from benchmarks import roofline
from benchmarks.cases import DPO, Cases, Checked, Job, Prepared, Turn, repeat
from benchmarks.sides.reward import Generator, render

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets")
STEPS = 10_000  # More than any run takes; the driver ends it.

transformers.utils.logging.disable_progress_bar()


def load_model(job: Job) -> Any:
    """The checkpoint, float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(job.rows["model"], dtype=torch.float32)


def load_tokenizer(job: Job) -> Any:
    """The checkpoint's tokenizer."""
    return transformers.AutoTokenizer.from_pretrained(job.rows["model"])


def arguments(job: Job, **more: Any) -> dict[str, Any]:
    """Training arguments that all trainers share."""
    return {
        "output_dir": str(job.work / "trl"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": job.peer == "trl_checkpointing",
        "learning_rate": job.sizes.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **more,
    }


class TakeTurns(transformers.TrainerCallback):
    """Holds a trainer between two steps until the driver wants the next one."""

    def __init__(self, turn: Turn, values: Callable[[], dict[str, Any]]):
        self.turn, self.values = turn, values

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ends a measurement."""
        control.should_training_stop = not self.turn(self.values())


class DPOTrainer(trl.DPOTrainer):
    """Remembers its last loss."""

    last_loss: torch.Tensor

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """See the base class."""
        loss = super().compute_loss(*args, **kwargs)
        self.last_loss = loss.detach()
        return loss


def dpo_trainer(job: Job, copies: int = 1) -> DPOTrainer:
    """DPOTrainer on the case's pairs, repeated `copies` times so that every step has the same batch."""
    sizes, tokenizer = job.sizes, load_tokenizer(job)
    lora = None
    if job.lora:
        targets = [f"{name}_proj" for name in sizes.lora_targets]
        # alpha as in our side's config.
        lora = peft.LoraConfig(r=sizes.lora_rank, lora_alpha=16, lora_dropout=0.0, target_modules=targets)
    args = trl.DPOConfig(
        **arguments(job, per_device_train_batch_size=sizes.pairs, per_device_eval_batch_size=sizes.evaluation_batch),
        train_sampling_strategy="sequential",
        max_grad_norm=10.0,
        beta=sizes.beta,
        max_length=None,
        precompute_ref_log_probs=job.peer == "trl_precomputed",
        model_init_kwargs={"dtype": "float32"},
    )
    data = datasets.Dataset.from_list(
        [
            {"prompt": render(tokenizer, pair["message"]), "chosen": pair["chosen"], "rejected": pair["rejected"]}
            for pair in job.pairs
        ]
    )
    trainer = DPOTrainer(
        model=job.rows["model"],
        args=args,
        train_dataset=data,
        eval_dataset=data if job.case == "evaluation" else None,
        processing_class=tokenizer,
        peft_config=lora,
    )
    # Copied afterwards, so that the reference's log-probabilities are precomputed for one copy.
    trainer.train_dataset = datasets.concatenate_datasets([trainer.train_dataset] * copies)
    return trainer


def same_tokens(trainer: trl.DPOTrainer, pairs: list[dict[str, Any]]) -> bool:
    """Whether the trainer tokenised the texts into the ids that our side has."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    made = trainer.train_dataset.select(range(len(pairs)))
    return all(row[name] == pair[name] for row, pair in zip(made, pairs, strict=True) for name in names)


def dpo(job: Job) -> Prepared:
    """Steps of DPOTrainer.train, from its data loader to its optimizer."""
    started = time.perf_counter()
    trainer = dpo_trainer(job, 100)
    setup = {"prepare_s": time.perf_counter() - started, "tokens_identical": same_tokens(trainer, job.pairs)}

    def measure(turn: Turn) -> dict[str, Any]:
        trainer.add_callback(TakeTurns(turn, lambda: {"nats": float(trainer.last_loss)}))
        trainer.train()
        return {}

    return measure, setup


def check_dpo(job: Job) -> Checked:
    """The loss of one batch and the gradient of every trained weight."""
    trainer = dpo_trainer(job)
    model = trainer.model
    model.train()
    # SmolLM2 pads with the token that ends a message. torch would leave it out of the embedding's gradient.
    model.get_input_embeddings().padding_idx = None
    own = {name.replace(".default", ""): value for name, value in model.named_parameters() if value.requires_grad}
    if job.lora:
        given = np.load(job.check_file("adapter.npz"))
        for name, value in own.items():
            value.data.copy_(torch.from_numpy(given[name]))
    loss = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    return {"loss": float(loss.detach())}, {name: value.grad.numpy() for name, value in own.items()}


class Sampling:
    """Transformers' generate, for all users at once."""

    def __init__(self, job: Job):
        self.job, self.model, tokenizer = job, load_model(job).eval(), load_tokenizer(job)
        tokenizer.padding_side = "left"
        texts = [render(tokenizer, user["message"]) for user in job.rows["sampling"]]
        self.inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)

    def __call__(self, **options: Any) -> list[list[int]]:
        """New tokens of each row, up to and including the one that stops it."""
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.job.sizes.summary,
                eos_token_id=self.job.rows["stop_ids"],
                pad_token_id=self.job.rows["pad_id"],
                **options,
            )
        new = out[:, ids.shape[1] :]
        stops = torch.isin(new, torch.tensor(self.job.rows["stop_ids"]))
        ends = torch.where(stops.any(1), stops.int().argmax(1) + 1, new.shape[1])
        return [row[:end].tolist() for row, end in zip(new, ends, strict=True)]


def sampling(job: Job) -> Prepared:
    """K samples of each prompt."""
    sample = Sampling(job)
    # From the whole distribution, as REINFORCE needs it; top_k is 50 by default.
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": job.sizes.k}

    def measurement() -> dict[str, Any]:
        lengths = [len(row) for row in sample(**options)]
        return {"items": sum(lengths), "decode_steps": max(lengths) - 1}

    return repeat(measurement), {}


def check_sampling(job: Job) -> Checked:
    """Each prompt as it was read, with its greedy tokens."""
    sample = Sampling(job)
    inputs = zip(sample.inputs["input_ids"], sample.inputs["attention_mask"], strict=True)
    read = [ids[mask.bool()].tolist() for ids, mask in inputs]
    return {"tokens": [ids + new for ids, new in zip(read, sample(do_sample=False), strict=True)]}, {}


def evaluation(job: Job) -> Prepared:
    """DPOTrainer.evaluate: log-probabilities of every pair under the policy and the reference."""
    trainer = dpo_trainer(job)

    def evaluate(data: datasets.Dataset) -> dict[str, float]:
        return {"margin": trainer.evaluate(data)["eval_rewards/margins"] / job.sizes.beta}

    whole = trainer.eval_dataset
    one_batch = whole.select(range(job.sizes.evaluation_batch))  # Enough to warm up: torch compiles nothing.
    return repeat(lambda: evaluate(whole), lambda: evaluate(one_batch)), {}


def check_evaluation(job: Job) -> Checked:
    """Mean log-probabilities. The batches have equal sizes, because the trainer averages their means."""
    trainer = dpo_trainer(job)
    trainer.args.per_device_eval_batch_size = 1
    found = trainer.evaluate()
    return {f"logps_{part}": found[f"eval_logps/{part}"] for part in ("chosen", "rejected")}, {}


class TorchGenerator(Generator):
    """Scores with the transformers model."""

    def __init__(self, job: Job):
        self.model = load_model(job).eval()
        self.batch = 2 * job.sizes.micro_pairs
        super().__init__(job.rows, load_tokenizer(job))

    @torch.inference_mode()
    def logps(self, pairs: Sequence[dict[str, Any]]) -> np.ndarray:
        """See the base class. Computes logits for the responses' positions only."""
        sequences = [(pair["prompt_ids"], pair[part]) for pair in pairs for part in ("chosen_ids", "rejected_ids")]
        out = []
        for start in range(0, len(sequences), self.batch):
            some = sequences[start : start + self.batch]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p + r) for p, r in some], batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(p + r)) for p, r in some], batch_first=True)
            hidden = self.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            row = torch.cat([torch.full((len(r),), i) for i, (_, r) in enumerate(some)])
            place = torch.cat([torch.arange(len(p), len(p) + len(r)) for p, r in some])
            logits = self.model.lm_head(hidden[row, place - 1])
            logp = -torch.nn.functional.cross_entropy(logits, ids[row, place], reduction="none")
            out.append(torch.zeros(len(some)).index_add(0, row, logp))
        return torch.cat(out).reshape(-1, 2).numpy()


def popi_iteration(job: Job) -> Prepared:
    """A POPI iteration as a user of TRL would compose it.

    RLOOTrainer trains q_phi with rewards from a frozen generator. After each of its steps DPOTrainer trains pi_theta on
    the pairs with the summaries that were drawn. Both trainers are made once, and one measurement is a step of each.
    """
    sizes, generator = job.sizes, TorchGenerator(job)
    steps = sizes.popi_users * sizes.k // sizes.micro_pairs
    micro = {"per_device_train_batch_size": sizes.micro_pairs, "gradient_accumulation_steps": steps}
    prompts = [
        {"prompt": render(generator.tokenizer, user["query_message"].replace(generator.mark, ""))}
        | {part: user[part] for part in ("chosen", "rejected")}
        for user in generator.users
    ]
    dpo = trl.DPOTrainer(
        model=generator.model,
        ref_model=None,
        args=trl.DPOConfig(
            **arguments(job, **micro, max_steps=1, max_grad_norm=10.0, beta=sizes.beta, max_length=None),
            precompute_ref_log_probs=job.peer == "trl_precomputed",
            model_init_kwargs=None,
        ),
        train_dataset=datasets.Dataset.from_list(prompts),  # Replaced in every iteration.
        processing_class=generator.tokenizer,
    )
    tokenizer = generator.tokenizer
    tokenizer.padding_side = "left"
    users = [{"prompt": render(tokenizer, user["message"]), "user": i} for i, user in enumerate(generator.users)]
    rloo = trl.RLOOTrainer(
        model=job.rows["model"],
        reward_funcs=generator.rewards,
        args=trl.RLOOConfig(
            **arguments(job, **micro, max_grad_norm=1.0, beta=sizes.kl_coef, model_init_kwargs={"dtype": "float32"}),
            num_generations=sizes.k,
            max_completion_length=sizes.summary,
            temperature=1.0,
            shuffle_dataset=False,
        ),
        train_dataset=datasets.Dataset.from_list(users * 100),
        processing_class=tokenizer,
    )

    def dpo_step() -> dict[str, Any]:
        started = time.perf_counter()
        dpo.model.train()
        dpo.train_dataset = datasets.Dataset.from_list(generator.pairs)
        dpo.train()
        generator.model.eval()
        return {"reward_s": generator.reward_s, "dpo_s": time.perf_counter() - started}

    def measure(turn: Turn) -> dict[str, Any]:
        rloo.add_callback(TakeTurns(turn, dpo_step))
        rloo.train()
        return {}

    return measure, {}


def check_rewards(job: Job) -> Checked:
    """The rewards of given summaries."""
    return {"rewards": TorchGenerator(job).persona_rewards()}, {}


def measure_roofline(job: Job) -> Prepared:
    """See roofline.py. The results go into memory that is there already."""
    width = job.sizes.matmul
    matrix, out = torch.randn(width, width), torch.empty(width, width)
    array = torch.ones(job.sizes.copy_mb * 2**20 // 4)
    target = torch.empty_like(array)

    @torch.inference_mode()
    def measurement() -> dict[str, Any]:
        product, copy = lambda: torch.matmul(matrix, matrix, out=out), lambda: torch.add(array, 1, out=target)
        return roofline.rates(product, width, copy, array.numel() * 4)

    return repeat(measurement), {}


CASES: Cases = dict.fromkeys(DPO, (dpo, check_dpo)) | {
    "roofline": (measure_roofline, None),
    "sampling": (sampling, check_sampling),
    "evaluation": (evaluation, check_evaluation),
    "popi_iteration": (popi_iteration, check_rewards),
}
