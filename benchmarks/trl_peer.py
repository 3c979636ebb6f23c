"""The peers' side: a worker of the peers' environment, which has torch, transformers and TRL, and neither JAX nor us.

    python -m benchmarks.trl_peer --work=DIR --case=CASE --variant=PEER [--check]

float32, as many threads as cores, nothing logged or saved; all else as the libraries have it, but for what a variant is
named after and gradient checkpointing: TRL's default costs time, so the case that wants it asks for it.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import datasets
import peft
import safetensors.torch
import torch
import transformers
import trl

from benchmarks import cases, roofline
from benchmarks.peer_reward import render
from benchmarks.protocol import Channel

STEPS = 10_000  # More than any run takes: the driver ends it.
# Hub names of the targets of an adapter.
TARGETS = {name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


class Job:
    """What a worker was asked for, and what every case needs."""

    def __init__(self, case: str, variant: str, work: pathlib.Path, rows: dict[str, Any]):
        self.case, self.variant, self.work, self.rows = case, variant, work, rows
        self.sizes = cases.Sizes(**rows["sizes"])
        self.started = time.perf_counter()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(rows["model"])

    def load_model(self) -> Any:
        """The checkpoint, float32."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.rows["model"], dtype=torch.float32)

    def arguments(self, **more: Any) -> dict[str, Any]:
        """Training arguments of all trainers."""
        return {
            "output_dir": str(self.work / "trl"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": self.variant == "trl_checkpointing",
            "learning_rate": self.sizes.learning_rate,
            "lr_scheduler_type": "constant",
            "max_steps": STEPS,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **more,
        }


class TakeTurns(transformers.TrainerCallback):
    """Holds a trainer between two steps until the driver wants the next: a measurement is all from there to there."""

    def __init__(self, channel: Channel, job: Job, **setup: Any):
        self.channel, self.job, self.setup = channel, job, setup
        self.began = 0.0
        self.extra: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The warm-up starts."""
        self.setup["load_s"] = time.perf_counter() - self.job.started
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says how long the step took, and waits."""
        taken = time.perf_counter() - self.began
        if state.global_step == 1:
            self.channel.ready(**self.setup, warmup_s=taken, first=self.extra)
        else:
            self.channel.done(taken, **self.extra)
        control.should_training_stop = not self.channel.wait()
        self.began = time.perf_counter()


class DPO(trl.DPOTrainer):
    """DPOTrainer that remembers its last loss."""

    last_loss: torch.Tensor

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As the class above."""
        loss = super().compute_loss(*args, **kwargs)
        self.last_loss = loss.detach()
        return loss


def pair_texts(job: Job, rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Preference pairs as the trainer takes them: texts, the prompt rendered."""
    return datasets.Dataset.from_list(
        [
            {"prompt": render(job.tokenizer, row["message"]), "chosen": row["chosen"], "rejected": row["rejected"]}
            for row in rows
        ]
    )


def same_tokens(trainer: trl.DPOTrainer, rows: list[dict[str, Any]]) -> bool:
    """Whether the trainer made of the texts the ids that the other side works on."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    made = [{name: row[name] for name in names} for row in trainer.train_dataset]
    return all(ours == {name: row[name] for name in names} for ours, row in zip(made, rows, strict=False))


def dpo_trainer(job: Job, copies: int, **changes: Any) -> DPO:
    """DPOTrainer on the case's pairs, `copies` times over: every step has the same batch."""
    sizes = job.sizes
    lora = None
    if cases.is_lora(job.case):
        # alpha as in the config that is measured on the other side.
        lora = peft.LoraConfig(
            r=sizes.lora_rank, lora_alpha=16, lora_dropout=0.0, target_modules=[TARGETS[t] for t in sizes.lora_targets]
        )
    args = trl.DPOConfig(
        **job.arguments(
            per_device_train_batch_size=sizes.pairs,
            per_device_eval_batch_size=sizes.evaluation_batch,
            train_sampling_strategy="sequential",
            max_grad_norm=10.0,
            beta=sizes.beta,
            max_length=None,
            precompute_ref_log_probs=job.variant == "trl_precomputed",
            model_init_kwargs={"dtype": "float32"},
            **changes,
        )
    )
    rows = job.rows["evaluation" if job.case == "evaluation" else f"dpo_{cases.context_kind(job.case)}"]
    data = pair_texts(job, rows)
    trainer = DPO(
        model=job.rows["model"],
        args=args,
        train_dataset=data,
        eval_dataset=data if job.case == "evaluation" else None,
        processing_class=job.tokenizer,
        peft_config=lora,
    )
    if copies > 1:
        # Only now: reference log-probabilities that are precomputed are those of one copy.
        trainer.train_dataset = datasets.concatenate_datasets([trainer.train_dataset] * copies)
    return trainer


def dpo(job: Job, channel: Channel) -> None:
    """Steps of DPOTrainer.train, from its data loader to its optimizer."""
    started = time.perf_counter()
    trainer = dpo_trainer(job, 100)
    rows = job.rows[f"dpo_{cases.context_kind(job.case)}"]
    turns = TakeTurns(
        channel, job, prepare_s=time.perf_counter() - started, tokens_identical=same_tokens(trainer, rows)
    )

    class Loss(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.extra = {"nats": float(trainer.last_loss)}

    trainer.add_callback(Loss())
    trainer.add_callback(turns)
    trainer.train()


def check_dpo(job: Job) -> None:
    """The loss of one batch and the gradient of every trained weight."""
    trainer = dpo_trainer(job, 1)
    model, folder = trainer.model, job.work / "check"
    model.train()
    # SmolLM2's pad token is the one that ends a message: torch leaves its embedding's gradient out, ours has it.
    model.get_input_embeddings().padding_idx = None
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if cases.is_lora(job.case):
        given = safetensors.torch.load_file(folder / f"{job.case}_adapter.safetensors")
        for name, value in own.items():
            value.data.copy_(given[name.replace(".default", "")])
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    grads = {name.replace(".default", ""): value.grad.contiguous() for name, value in own.items()}
    safetensors.torch.save_file(grads, folder / f"{job.case}_peer.safetensors")
    _write_check(job, {"loss": float(loss.detach())})


def generate(job: Job, model: Any, **options: Any) -> torch.Tensor:
    """New tokens of transformers' generate, [rows, new], for all users at once."""
    job.tokenizer.padding_side = "left"
    texts = [render(job.tokenizer, user["message"]) for user in job.rows["sampling"]]
    inputs = job.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=job.sizes.summary,
            eos_token_id=job.rows["stop_ids"],
            pad_token_id=job.rows["pad_id"],
            **options,
        )
    return out[:, inputs["input_ids"].shape[1] :]


def drawn_lengths(job: Job, new: torch.Tensor) -> list[int]:
    """Tokens of each row up to the first that stops it, which counts."""
    stops = torch.isin(new, torch.tensor(job.rows["stop_ids"]))
    ended = torch.where(stops.any(1), stops.int().argmax(1) + 1, new.shape[1])
    return ended.tolist()


def sampling(job: Job, channel: Channel) -> None:
    """Transformers' generate, K samples of each prompt."""
    model = job.load_model().eval()
    # The whole distribution, as REINFORCE needs it: top_k is 50 unless told otherwise.
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": job.sizes.k}

    def measure() -> dict[str, Any]:
        lengths = drawn_lengths(job, generate(job, model, **options))
        return {"items": sum(lengths), "decode_steps": max(lengths) - 1}

    channel.serve(job.started, measure)


def check_sampling(job: Job) -> None:
    """Greedy tokens."""
    new = generate(job, job.load_model().eval(), do_sample=False)
    _write_check(job, {"tokens": [row[:n].tolist() for row, n in zip(new, drawn_lengths(job, new), strict=True)]})


def evaluation(job: Job, channel: Channel) -> None:
    """DPOTrainer.evaluate: the policy's and the reference's log-probabilities of every pair."""
    trainer = dpo_trainer(job, 1)

    def evaluate(data: datasets.Dataset) -> dict[str, float]:
        return {"margin": trainer.evaluate(data)["eval_rewards/margins"] / job.sizes.beta}

    whole = trainer.eval_dataset
    one_batch = whole.select(range(job.sizes.evaluation_batch))  # Nothing is compiled that the others would need.
    channel.serve(job.started, lambda: evaluate(whole), warm_up=lambda: evaluate(one_batch))


def check_evaluation(job: Job) -> None:
    """Mean log-probabilities; of batches of one size, for the trainer means their means."""
    trainer = dpo_trainer(job, 1)
    trainer.args.per_device_eval_batch_size = 1
    found = trainer.evaluate()
    _write_check(job, {f"logps_{part}": found[f"eval_logps/{part}"] for part in ("chosen", "rejected")})


def check_rewards(job: Job) -> None:
    """The rewards of the POPI iteration, of summaries that are given."""
    from benchmarks import trl_popi

    _write_check(job, trl_popi.TorchGenerator(job).check())


def measure_roofline(job: Job, channel: Channel) -> None:
    """See roofline.py."""
    channel.serve(job.started, lambda: roofline.with_torch(job.sizes.matmul, job.sizes.copy_mb))


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
    torch.set_num_threads(rows["threads"])
    transformers.utils.logging.disable_progress_bar()
    job = Job(flags.case, flags.variant, flags.work, rows)
    if flags.check:
        checks = {"sampling": check_sampling, "evaluation": check_evaluation, "popi_iteration": check_rewards}
        checks.get(job.case, check_dpo)(job)
        channel.ready()
    elif job.case == "popi_iteration":
        from benchmarks import trl_popi

        trl_popi.popi_iteration(job, channel)
    else:
        runs = {"sampling": sampling, "evaluation": evaluation, "roofline": measure_roofline}
        runs.get(job.case, dpo)(job, channel)
    versions = {p.__name__: p.__version__ for p in (torch, transformers, trl, peft, datasets)}
    channel.end(versions=versions, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
