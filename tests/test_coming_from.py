"""Every figure and equivalence of docs/coming-from.md, against our functions and the peers' formulas in NumPy.

The peers' formulas are written anew here, from their sources at the versions that the page names. No peer is installed.
Letters as in objective.py; Z all sequences of a tiny policy, P its prefixes, V its vocabulary.
"""

import functools
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from popi_jax import config
from popi_jax.configs import base
from popi_jax.data import encoding
from popi_jax.data.schema import Query
from popi_jax.errors import UserError
from popi_jax.training import objective

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "coming-from.md"
CONFIG = base.get_config()

# The page's batch: chosen and rejected.
POLICY_2, REFERENCE_2, TOKENS_2, BETA = np.array([-12.0, -15.0]), np.array([-13.0, -14.0]), np.array([8, 4]), 0.1


# The page.


def tables() -> list[list[dict[str, str]]]:
    """The rows of each table, by column, with the backticks taken off the column names."""
    found, block = [], []
    for line in [*PAGE.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            block.append([cell.strip() for cell in line.strip("|").split("|")])
        elif block:
            header, _, *rows = block
            assert all(len(row) == len(header) for row in rows), header
            found.append([dict(zip((name.replace("`", "") for name in header), row, strict=True)) for row in rows])
            block = []
    return found


def table(*columns: str) -> list[dict[str, str]]:
    """The one table that has these columns."""
    (rows,) = (rows for rows in tables() if set(columns) <= set(rows[0]))
    return rows


def prose() -> str:
    """The page with its lines joined."""
    return " ".join(PAGE.read_text(encoding="utf-8").split())


def keys(cell: str) -> list[str]:
    """What a cell has in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def assert_shows(cell: str, value: float | None, digits: int = 4) -> None:
    """The cell begins with the value, or with a word where there is none."""
    shown = cell.split(",")[0].split(";")[0]
    if value is None:
        assert re.fullmatch(r"[a-z ]+", shown), cell
    else:
        assert shown == f"{value:.{digits}f}", (cell, value)


def test_every_table_is_one_that_the_tests_read() -> None:
    """A new table needs a test, and then a new count."""
    assert len(tables()) == 12


def test_every_peer_in_a_table_has_a_version() -> None:
    versions = {row["Peer"] for row in table("Peer", "Version")}
    named = {
        peer
        for row in table("Trainer", "DPO") + table("Trainer", "Divided by")
        for peer in row["Trainer"].replace(" (read)", "").split("; ")
    }
    assert named == versions | {"popi_jax"}


# The generator.


def log_sigmoid(x: float) -> float:
    return -np.log1p(np.exp(-x))


def peer_h(reduction: str) -> float:
    """The difference of log-ratios, each divided by its number of tokens for "mean"."""
    ratio_2 = POLICY_2 - REFERENCE_2
    if reduction == "mean":
        ratio_2 = ratio_2 / TOKENS_2
    return float(ratio_2[0] - ratio_2[1])


def peer_dpo(reduction: str = "sum", smoothing: float = 0.0) -> float:
    logits = BETA * peer_h(reduction)
    return -(1 - smoothing) * log_sigmoid(logits) - smoothing * log_sigmoid(-logits)


def peer_ipo(reduction: str) -> float:
    return (peer_h(reduction) - 1 / (2 * BETA)) ** 2


def our_h(reduction: str) -> jax.Array:
    policy_2, reference_2 = (
        objective.reduce_logp(jnp.asarray(logp_2, jnp.float32), jnp.asarray(TOKENS_2), reduction)
        for logp_2 in (POLICY_2, REFERENCE_2)
    )
    return objective.implicit_reward_margin(policy_2, reference_2)


def our_loss(loss: str, reduction: str) -> float:
    return float(objective.preference_loss(loss)(our_h(reduction), BETA))


def test_h_is_as_the_page_says() -> None:
    sums, means = float(our_h("sum")), float(our_h("mean"))
    np.testing.assert_allclose([sums, means], [peer_h("sum"), peer_h("mean")])
    assert f"h is {sums:.4f} with sums and {means:.4f} with means" in prose()


def test_the_same_loss_elsewhere() -> None:
    rows = table("Ours", "Theirs")
    factors = {"beta": BETA, "2 / beta": 2 / BETA}
    names = [(keys(row["objective.loss"])[0], keys(row["objective.logp_reduction"])[0]) for row in rows]
    assert sorted(names) == sorted(itertools.product(objective.LOSSES, objective.LOGP_REDUCTIONS))
    for row, (loss, reduction) in zip(rows, names, strict=True):
        ours, theirs = our_loss(loss, reduction), {"dpo": peer_dpo, "ipo": peer_ipo}[loss](reduction)
        np.testing.assert_allclose(theirs, ours * factors[row["Theirs = ours times"]], rtol=1e-6)
        assert_shows(row["Ours"], ours)
        assert_shows(row["Theirs"], theirs)


# DPO, DPO with label smoothing 0.1, IPO.
SMOOTHED = peer_dpo(smoothing=0.1)
LOSSES = {
    "TRL": (peer_dpo(), peer_dpo(), peer_ipo("mean")),
    "OpenRLHF": (peer_dpo(), SMOOTHED, peer_ipo("sum")),
    "LLaMA-Factory": (peer_dpo(), SMOOTHED, peer_dpo("mean")),
    "ms-swift": (peer_dpo(), SMOOTHED, peer_ipo("mean")),
    "oat": (peer_dpo(), SMOOTHED, peer_ipo("mean")),
    "areal": (peer_dpo(), None, peer_ipo("mean")),
    "mlx-lm-lora": (peer_dpo(), None, peer_ipo("mean")),
    "torchtune": (peer_dpo(), SMOOTHED, None),
    "Tunix; MaxText (read)": (peer_dpo(), SMOOTHED, None),
    "Liger-Kernel": (peer_dpo(), peer_dpo(), None),
    "popi_jax": (our_loss("dpo", "sum"), None, our_loss("ipo", "sum")),
}


def test_losses_of_all_trainers() -> None:
    rows = table("Trainer", "DPO")
    assert [row["Trainer"] for row in rows] == list(LOSSES)
    for row in rows:
        for column, value in zip(("DPO", "DPO, label smoothing 0.1", "IPO"), LOSSES[row["Trainer"]], strict=True):
            assert_shows(row[column], value)
    assert rows[-1]["beta by default"] == str(CONFIG.objective.beta)
    assert rows[-1]["End token scored"] == "yes"


class FakeTokenizer:
    """Every text is the tokens 5 and 6; 2 ends a response."""

    end_id = 2

    def encode(self, text: str) -> list[int]:
        return [5, 6]

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        return [1]


def test_the_end_token_of_a_response_is_scored() -> None:
    settings = config.parse(CONFIG)
    encoder = encoding.Encoder(FakeTokenizer(), settings.prompts, settings.limits)
    assert encoder.pair(Query("why", "yes", "no", ""), None)[1:] == ([5, 6, 2], [5, 6, 2])


def test_slope_at_zero_is_minus_half_for_every_loss_and_beta() -> None:
    for loss in objective.LOSSES:
        slopes = jax.jit(jax.vmap(jax.grad(objective.preference_loss(loss)), (None, 0)))
        np.testing.assert_allclose(slopes(0.0, jnp.array([0.01, 0.1, 0.5])), -0.5, rtol=1e-6)
    assert "Both have slope -1/2 at h = 0" in prose()
    np.testing.assert_allclose(jax.grad(lambda h: -jax.nn.log_sigmoid(BETA * h))(0.0), -BETA / 2, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda h: (h - 1 / (2 * BETA)) ** 2)(0.0), -1 / BETA, rtol=1e-6)
    assert "the slope there is -beta / 2 for DPO and -1 / beta for IPO" in prose()


def test_clipping_and_losses_at_zero() -> None:
    rows = table("DPO elsewhere", "IPO elsewhere")
    assert [row["beta"] for row in rows] == ["0.01", "0.1", "0.5"]
    for row in rows:
        beta = float(row["beta"])
        clip = "optim.clip_generator for max_grad_norm = 1, dpo"
        # A norm scales as the loss does: by what our loss is times the peers'.
        assert_shows(row[clip], float(objective.dpo_loss(0.3, beta)) / -log_sigmoid(0.3 * beta))
        assert_shows(row["the same, ipo"], float(objective.ipo_loss(0.3, beta)) / (0.3 - 1 / (2 * beta)) ** 2)
        assert_shows(row["dpo at h = 0"], float(objective.dpo_loss(0.0, beta)))
        assert_shows(row["DPO elsewhere"], -log_sigmoid(0.0))
        assert_shows(row["ipo at h = 0"], float(objective.ipo_loss(0.0, beta)))
        assert_shows(row["IPO elsewhere"], 1 / (4 * beta**2))
    assert CONFIG.objective.loss == "dpo"
    assert CONFIG.optim.clip_generator * CONFIG.objective.beta == 1.0
    assert "`clip_generator` = 10.0 with `dpo` at beta = 0.1, are the 1.0" in prose()
    assert 1 / BETA == 10 and "our `loss` curve for `dpo` is ten times TRL's" in prose()


@pytest.mark.parametrize(("loss", "scale"), [("dpo", 1 / BETA), ("ipo", BETA / 2)])
def test_rescaled_clipping_makes_adamw_take_the_same_steps(loss: str, scale: float) -> None:
    rng = np.random.default_rng(0)
    features_NxD = jnp.asarray(rng.normal(size=(16, 3)) * 10, jnp.float32)
    theirs = {
        "dpo": lambda w: jnp.mean(-jnp.log(jax.nn.sigmoid(BETA * features_NxD @ w))),
        "ipo": lambda w: jnp.mean((features_NxD @ w - 1 / (2 * BETA)) ** 2),
    }[loss]

    def ours(w):
        return jnp.mean(objective.preference_loss(loss)(features_NxD @ w, BETA))

    start = jnp.asarray([0.1, -0.2, 0.05])
    # Between the first gradients' norms and later ones, so that some steps are clipped and others not.
    g = 0.98 * float(optax.tree.norm(jax.grad(theirs)(start)))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def steps(fn, clip):
        adamw = optax.adamw(0.01, b1=CONFIG.optim.b1, b2=CONFIG.optim.b2, weight_decay=0.0)
        tx = optax.chain(optax.clip_by_global_norm(clip), adamw)

        def step(carry, _):
            w, state = carry
            grads = jax.grad(fn)(w)
            updates, state = tx.update(grads, state, w)
            return (optax.apply_updates(w, updates), state), optax.tree.norm(grads) > clip

        (w, _), clipped = jax.lax.scan(step, (start, tx.init(start)), length=8)
        return w, clipped

    (their_w, their_clipped), (our_w, our_clipped) = steps(theirs, g), steps(ours, g * scale)
    assert 0 < np.sum(their_clipped) < 8
    np.testing.assert_array_equal(our_clipped, their_clipped)
    np.testing.assert_allclose(our_w, their_w, rtol=1e-4)
    assert np.any(steps(ours, g)[1] != their_clipped)


def test_learning_curves() -> None:
    h_N = np.array([-3.0, 0.0, 0.5, 8.0])
    assert [row["Here"] for row in table("Elsewhere", "Here")] == [
        "`nats`; `loss` is `nats` / beta",
        "`loss` times 2 / beta",
        "`margin` times beta",
        "`accuracy`; a tie counts as wrong",
    ]
    trl_loss_N = -log_sigmoid(BETA * h_N)
    np.testing.assert_allclose(objective.preference_nats(jnp.asarray(h_N), BETA), trl_loss_N, rtol=1e-5)
    np.testing.assert_allclose(objective.dpo_loss(jnp.asarray(h_N), BETA) * BETA, trl_loss_N, rtol=1e-5)
    trl_ipo_N = (h_N - 1 / (2 * BETA)) ** 2
    np.testing.assert_allclose(objective.ipo_loss(jnp.asarray(h_N), BETA) * 2 / BETA, trl_ipo_N, rtol=1e-5)
    # TRL's rewards are beta times log-ratios, and the chosen one has to be strictly the greater.
    np.testing.assert_array_equal(objective.preference_accuracy(jnp.asarray(h_N)), BETA * h_N > 0)
    ratio_2 = BETA * (POLICY_2 - REFERENCE_2)
    np.testing.assert_allclose(ratio_2[0] - ratio_2[1], BETA * float(our_h("sum")))


# Advantages.

REWARDS_4, EQUAL_8, ALONE_1 = np.array([1.0, 0.0, 0.0, 1.0]), np.full(8, 0.7), np.array([2.0])
STEP = float(np.spacing(np.float32(0.7)))  # As far as most peers' float32 mean of eight rewards of 0.7 was off.


def leave_one_out(reward_K: np.ndarray) -> np.ndarray:
    return reward_K - (reward_K.sum() - reward_K) / (len(reward_K) - 1)


def centred(reward_K: np.ndarray, off: float = 0.0) -> np.ndarray:
    """Reward less a mean that is `off` by rounding."""
    return reward_K - (reward_K.mean() + off)


def standardised(epsilon: float, ddof: int = 1):
    def advantage(reward_K: np.ndarray, off: float = 0.0) -> np.ndarray:
        deviation_K = centred(reward_K, off)
        std = np.sqrt((deviation_K**2).sum() / (len(reward_K) - ddof)) if len(reward_K) > ddof else np.nan
        return deviation_K / (std + epsilon)

    return advantage


def verl_opo(reward_K: np.ndarray, length_K: np.ndarray | None = None) -> np.ndarray:
    length_K = np.ones(len(reward_K)) if length_K is None else length_K
    return reward_K - (length_K * reward_K).sum() / length_K.sum()


def verl_gpg(reward_K: np.ndarray) -> np.ndarray:
    return len(reward_K) / max(np.count_nonzero(reward_K), 1) * centred(reward_K)


# (formula, advantage of the one reward 2 where K = 1 is let pass, rounding of the mean of eight rewards of 0.7).
# areal computes in float64 and NumPy, which mlx-lm-lora uses, sums in an order that is exact here.
ESTIMATORS = {
    ("TRL", "RLOO"): (leave_one_out, None, 0.0),
    ("TRL", "GRPO"): (standardised(1e-4), None, STEP),
    ("OpenRLHF", "rloo"): (leave_one_out, None, 0.0),
    ("OpenRLHF", "group_norm"): (standardised(1e-9), None, STEP),
    ("OpenRLHF", "dr_grpo"): (centred, None, STEP),
    ("verl", "rloo"): (leave_one_out, ALONE_1[0], 0.0),  # A group of one keeps its reward.
    ("verl", "grpo"): (standardised(1e-6), (ALONE_1[0] - 0.0) / (1.0 + 1e-6), STEP),  # Mean 0, std 1.
    ("verl", "opo"): (verl_opo, ALONE_1[0] - 0.0, 0.0),
    ("verl", "gpg"): (verl_gpg, 1 / 1 * ALONE_1[0], 0.0),
    ("SkyRL", "rloo"): (leave_one_out, 0.0, 0.0),
    ("SkyRL", "grpo"): (standardised(1e-6), (ALONE_1[0] - 0.0) / (1.0 + 1e-6), STEP),
    ("areal", "group of 4"): (standardised(1e-5), centred(ALONE_1)[0] / (1.0 + 1e-5), 0.0),
    ("oat", "drgrpo"): (centred, centred(ALONE_1)[0], STEP),
    ("oat", "grpo"): (standardised(1e-8), standardised(1e-8)(ALONE_1)[0], STEP),
    ("tinker-cookbook", "centred"): (centred, centred(ALONE_1)[0], STEP),
    ("mlx-lm-lora", "GRPO"): (standardised(1e-4, ddof=0), standardised(1e-4, ddof=0)(ALONE_1)[0], 0.0),
}
DIVISORS = {
    "nothing": None,
    **{f"std + {text}": standardised(float(text)) for text in ("1e-4", "1e-5", "1e-6", "1e-8", "1e-9")},
    "population std + 1e-4": standardised(1e-4, ddof=0),
}


OURS = {
    "rloo": (leave_one_out, None, 0.0),
    "grpo": (standardised(objective.GRPO_EPSILON), None, STEP),
    "group_mean": (centred, None, STEP),
    "reinforce": (lambda reward_K: reward_K - 0.0, ALONE_1[0] - 0.0, 0.0),  # The baseline of a first step is 0.
}


def our_advantage(name: str, reward_K: np.ndarray, baseline: float = 0.0) -> np.ndarray:
    return np.asarray(objective.advantages(name, jnp.asarray(reward_K, jnp.float32)[None], baseline)[0])


def test_advantages_of_all_trainers() -> None:
    rows = table("Trainer", "Divided by")
    formulas = ESTIMATORS | {("popi_jax", f"`{name}`"): formula for name, formula in OURS.items()}
    assert [(row["Trainer"], row["Estimator"]) for row in rows] == list(formulas)
    for row in rows:
        formula, alone, off = formulas[row["Trainer"], row["Estimator"]]
        (name,) = keys(row["objective.advantage"])
        advantage = formula(REWARDS_4)[0]
        assert_shows(row["Reward 1 of 1, 0, 0, 1"], advantage)
        assert_shows(row["Theirs = ours times"], advantage / our_advantage(name, REWARDS_4)[0], digits=3)
        assert_shows(row["K = 1, reward 2"], alone)
        assert_shows(row["Eight rewards of 0.7"], abs((formula(EQUAL_8, off) if off else formula(EQUAL_8))[0]))
        divided = DIVISORS[row["Divided by"]]
        assert (divided is None) == (name != "grpo")
        if divided is not None:
            np.testing.assert_allclose(divided(REWARDS_4), formula(REWARDS_4), rtol=1e-12)


@pytest.mark.parametrize("name", objective.ADVANTAGES)
def test_our_advantages_are_the_formulas_that_stand_for_them(name: str) -> None:
    formula, alone, _ = OURS[name]
    for reward_K in (REWARDS_4, np.array([-3.0, -7.5, 2.0])):
        np.testing.assert_allclose(our_advantage(name, reward_K), formula(reward_K), rtol=1e-6)
    one_sample = base.get_config()
    one_sample.objective.advantage, one_sample.sampling.k = name, 1
    if alone is None:
        with pytest.raises(ValueError, match="needs K >= 2, got K = 1"):
            our_advantage(name, ALONE_1)
        with pytest.raises(UserError, match="config.sampling.k is 1"):
            config.parse(one_sample)
    else:
        np.testing.assert_array_equal(our_advantage(name, ALONE_1), [alone])
        assert config.parse(one_sample).sampling.k == 1


def test_what_the_page_says_of_the_advantages() -> None:
    reward_K = np.array([-3.0, -7.5, 2.0, 0.5])
    K = len(reward_K)
    group_mean_K = our_advantage("group_mean", reward_K)
    np.testing.assert_allclose(group_mean_K, our_advantage("rloo", reward_K) * (K - 1) / K, rtol=1e-6)
    np.testing.assert_allclose(group_mean_K, verl_opo(reward_K, np.full(K, 7.0)), rtol=1e-6)
    assert np.abs(group_mean_K - verl_opo(reward_K, np.array([7.0, 1.0, 2.0, 3.0]))).max() > 0.1
    factor = np.sqrt(K / (K - 1))
    np.testing.assert_allclose(
        standardised(1e-4, ddof=0)(reward_K), our_advantage("grpo", reward_K) * factor, rtol=1e-4
    )
    assert f"{factor:.3f} at K = 4" in prose()


def test_reinforce_is_not_reinforce_plus_plus() -> None:
    """OpenRLHF's whitening takes off what all rewards of the batch have in common; a baseline of the past does not."""

    def whitened(reward_N: np.ndarray) -> np.ndarray:
        return (reward_N - reward_N.mean()) / np.sqrt(reward_N.var())

    np.testing.assert_allclose(whitened(REWARDS_4 + 5), whitened(REWARDS_4))
    ours_4 = our_advantage("reinforce", REWARDS_4, baseline=0.3)
    np.testing.assert_allclose(our_advantage("reinforce", REWARDS_4 + 5, baseline=0.3), ours_4 + 5, rtol=1e-6)
    np.testing.assert_allclose(ours_4, REWARDS_4 - 0.3, rtol=1e-6)
    # The next baseline: 0.9 of the old one and 0.1 of this step's mean.
    moved = objective.update_baseline(jnp.float32(0.3), (jnp.float32(2.0), jnp.float32(4.0)), decay=0.9)
    np.testing.assert_allclose(moved, 0.9 * 0.3 + 0.1 * 0.5, rtol=1e-6)


# Equal rewards.


def largest_error_of_a_mean(reward, K: int):
    """Of K equal float32 rewards: K - 1 sums, 1 / K and the product round by 2^-24 at most each, and none at K = 2."""
    return (K + 1) * np.abs(reward) * 2.0**-24 * (K > 2)


def test_the_bounds_on_equal_rewards() -> None:
    for row in table("Largest grpo advantage"):
        for beta, r, largest in (
            (0.1, "r of dpo at h = 0, beta = 0.1", "Largest grpo advantage"),
            (0.01, "r of dpo at h = 0, beta = 0.01", "Largest grpo advantage there"),
        ):
            reward = -float(objective.dpo_loss(0.0, beta))
            assert_shows(row[r], reward)
            assert_shows(row[largest], largest_error_of_a_mean(reward, int(row["K"])) / objective.GRPO_EPSILON)


@pytest.mark.parametrize("K", [2, 3, 4, 8, 16])
def test_equal_rewards_leave_no_more_than_rounding(K: int) -> None:
    """In groups alone and in a batch, which XLA may sum in another order."""
    reward_U = -np.random.default_rng(K).uniform(0.1, 70.0, size=2000).astype(np.float32)
    advantages = jax.jit(objective.advantages, static_argnums=0)
    for part_U in (reward_U, *reward_U[:20, None]):
        reward_UxK = np.repeat(part_U[:, None], K, axis=1)
        error_U = largest_error_of_a_mean(part_U, K)
        for name, bound_U in (
            ("grpo", error_U / 1e-4),
            ("group_mean", error_U),
            ("rloo", error_U * K / (K - 1)),
        ):
            advantage_UxK = np.asarray(advantages(name, reward_UxK, 0.0))
            assert np.all(np.abs(advantage_UxK) <= bound_U[:, None]), name
            assert np.all(advantage_UxK == advantage_UxK[:, :1])
    if K == 3:  # Cannot be added without rounding, in any order.
        assert np.any(np.asarray(advantages("grpo", np.repeat(reward_U[:, None], K, axis=1), 0.0)) != 0)


# KL, by enumeration: every sequence of `length` tokens over three.

VOCABULARY = 3
PEER_KL = {
    "full KL at each position, with the score function for what follows": None,
    "k1 in the reward": lambda d_ZxS: np.broadcast_to(d_ZxS.sum(axis=1, keepdims=True), d_ZxS.shape),
    "k3 in the loss": lambda d_ZxS: 1 - np.exp(-d_ZxS),
    "k1 in the loss": np.ones_like,
    "k2 in the loss": lambda d_ZxS: d_ZxS,
    # The ratio is 1, and its gradient that of log q.
    "k3 in the loss, weighted by the ratio": lambda d_ZxS: (np.exp(-d_ZxS) - 1 + d_ZxS) + (1 - np.exp(-d_ZxS)),
}
"""What multiplies grad log q of each sampled token, of d = log q - log q_0, in each estimator's gradient."""


class TinyPolicy:
    """A table of logits over three tokens, a row for each prefix; and the reference's."""

    def __init__(self, length: int, same: bool = False) -> None:
        rng = np.random.default_rng(length)
        prefixes = [p for t in range(length) for p in itertools.product(range(VOCABULARY), repeat=t)]
        self.tokens_ZxS = np.array(list(itertools.product(range(VOCABULARY), repeat=length)))
        self.nodes_ZxS = np.array([[prefixes.index(tuple(z[:t])) for t in range(length)] for z in self.tokens_ZxS])
        self.logits_PxV = rng.normal(size=(len(prefixes), VOCABULARY))
        other_PxV = 0.0 if same else 0.8 * rng.normal(size=self.logits_PxV.shape)
        self.reference_PxV = self.logits_PxV + other_PxV

    def logp_ZxS(self, logits_PxV: np.ndarray) -> np.ndarray:
        logp_PxV = logits_PxV - np.log(np.exp(logits_PxV).sum(axis=1, keepdims=True))
        return logp_PxV[self.nodes_ZxS, self.tokens_ZxS]

    def prob_Z(self) -> np.ndarray:
        return np.exp(self.logp_ZxS(self.logits_PxV).sum(axis=1))

    def kl(self, logits_PxV: np.ndarray) -> float:
        """KL(q || q_0) of whole sequences."""
        logp_Z, ref_logp_Z = self.logp_ZxS(logits_PxV).sum(axis=1), self.logp_ZxS(self.reference_PxV).sum(axis=1)
        return float(np.exp(logp_Z) @ (logp_Z - ref_logp_Z))

    def true_gradient_PxV(self) -> np.ndarray:
        """Central differences of the KL."""
        gradient_PxV = np.zeros_like(self.logits_PxV)
        for index in np.ndindex(*gradient_PxV.shape):
            shift_PxV = np.zeros_like(gradient_PxV)
            shift_PxV[index] = 1e-5
            gradient_PxV[index] = (self.kl(self.logits_PxV + shift_PxV) - self.kl(self.logits_PxV - shift_PxV)) / 2e-5
        return gradient_PxV

    def peer_gradient_PxV(self, estimator: str) -> np.ndarray:
        """Expected gradient of an estimator that multiplies grad log q of each token."""
        coefficient_ZxS = PEER_KL[estimator](self.logp_ZxS(self.logits_PxV) - self.logp_ZxS(self.reference_PxV))
        prob_PxV = np.exp(self.logits_PxV) / np.exp(self.logits_PxV).sum(axis=1, keepdims=True)
        gradient_PxV = np.zeros_like(self.logits_PxV)
        for prob, nodes_S, tokens_S, coefficient_S in zip(
            self.prob_Z(), self.nodes_ZxS, self.tokens_ZxS, coefficient_ZxS, strict=True
        ):
            for node, token, coefficient in zip(nodes_S, tokens_S, coefficient_S, strict=True):
                gradient_PxV[node] += prob * coefficient * (np.eye(VOCABULARY)[token] - prob_PxV[node])
        return gradient_PxV

    def our_gradient_PxV(self, kl: str) -> np.ndarray:
        """Expected gradient of our whole loss with rewards of 0 and lambda = 1."""
        gradient_ZxPxV = kl_gradients(self.logits_PxV, self.reference_PxV, self.nodes_ZxS, self.tokens_ZxS, kl)
        return np.tensordot(self.prob_Z(), np.asarray(gradient_ZxPxV), axes=1)


@functools.partial(jax.jit, static_argnums=4)
@functools.partial(jax.vmap, in_axes=(None, None, 0, 0, None))
@jax.grad
def kl_gradients(logits_PxV, reference_PxV, nodes_S, tokens_S, kl):
    """Gradient of the inference model's loss on each sequence, [Z, P, V]."""
    logp_PxV, ref_logp_PxV = jax.nn.log_softmax(logits_PxV), jax.nn.log_softmax(reference_PxV)
    kl_P = jnp.sum(jnp.exp(logp_PxV) * (logp_PxV - ref_logp_PxV), axis=1)
    total, count = objective.inference_loss(
        advantage="reinforce",
        kl=kl,
        kl_coef=1.0,
        reward_UxK=jnp.zeros((1, 1)),
        baseline=0.0,
        logp_UxKxS=logp_PxV[nodes_S, tokens_S][None, None],
        ref_logp_UxKxS=ref_logp_PxV[nodes_S, tokens_S][None, None],
        mask_UxKxS=jnp.ones((1, 1, len(nodes_S)), bool),
        position_kl_UxKxS=kl_P[nodes_S][None, None],
    ).loss
    return total / count


@pytest.mark.parametrize(("length", "column"), [(1, "True gradient, one token"), (2, "True gradient, several tokens")])
def test_which_kl_estimators_have_the_true_gradient(length: int, column: str) -> None:
    policy = TinyPolicy(length)
    true_PxV = policy.true_gradient_PxV()
    rows = table("Estimator", "objective.kl")
    assert [row["Estimator"] for row in rows] == list(PEER_KL)
    assert [keys(row["objective.kl"]) for row in rows] == [["exact"], ["k1_reward"], ["k3_loss"], [], [], []]
    for row in rows:
        gradients = [policy.our_gradient_PxV(name) for name in keys(row["objective.kl"])]
        if PEER_KL[row["Estimator"]]:
            gradients.append(policy.peer_gradient_PxV(row["Estimator"]))
        # Ours is the estimator that the peers have.
        np.testing.assert_allclose(gradients[0], gradients[-1], atol=1e-6)
        off = np.abs(gradients[0] - true_PxV).max()
        assert off < 1e-6 if row[column] == "yes" else off > 0.01, (row["Estimator"], off)


def test_what_the_page_says_of_the_kl_estimators() -> None:
    policy = TinyPolicy(2)
    np.testing.assert_allclose(policy.peer_gradient_PxV("k1 in the loss"), 0.0, atol=1e-12)
    np.testing.assert_allclose(
        policy.peer_gradient_PxV("k2 in the loss"),
        policy.peer_gradient_PxV("k3 in the loss, weighted by the ratio"),
        atol=1e-12,
    )
    # k3 and the true gradient point the same way, and both vanish at the reference.
    assert np.sum(policy.our_gradient_PxV("k3_loss") * policy.true_gradient_PxV()) > 0
    for kl in objective.KL_ESTIMATORS:
        np.testing.assert_allclose(TinyPolicy(2, same=True).our_gradient_PxV(kl), 0.0, atol=1e-6)
    # The KL of each token with the tokens before it held fixed: q of a prefix times the KL's gradient at its logits.
    for estimator, forward in (("k2 in the loss", False), ("k3 in the loss", True)):
        expected_PxV = np.zeros_like(policy.logits_PxV)
        for node in range(len(expected_PxV)):
            weight = 1.0 if node == 0 else policy.prob_Z()[policy.nodes_ZxS[:, 1] == node].sum()
            q_V, q_0_V = (
                np.exp(logits_PxV[node]) / np.exp(logits_PxV[node]).sum()
                for logits_PxV in (policy.logits_PxV, policy.reference_PxV)
            )
            ratio_V = np.log(q_V / q_0_V)
            expected_PxV[node] = weight * (q_V - q_0_V if forward else q_V * (ratio_V - q_V @ ratio_V))
        np.testing.assert_allclose(policy.peer_gradient_PxV(estimator), expected_PxV, atol=1e-12)
    with pytest.raises(ValueError, match="'k1'"):
        objective.kl_terms("k1", jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1), bool))


# Units, and tokens summed or averaged, on a batch of summaries of unequal lengths.

N_USERS, K, LENGTH = 2, 4, 6
RNG = np.random.default_rng(1)
LENGTH_UxK = RNG.integers(1, LENGTH, size=(N_USERS, K))
MASK_UxKxS = np.arange(LENGTH) < LENGTH_UxK[..., None]
LOGP_UxKxS, REF_LOGP_UxKxS = -RNG.random((2, N_USERS, K, LENGTH))
POSITION_KL_UxKxS = RNG.random((N_USERS, K, LENGTH))
REWARD_UxK = RNG.normal(size=(N_USERS, K))


@functools.partial(jax.jit, static_argnames=("advantage", "kl"))
@functools.partial(jax.grad, argnums=(0, 1))
def gradients(logp_UxKxS, position_kl_UxKxS, kl_coef, reward_UxK, *, advantage, kl):
    total, count = objective.inference_loss(
        advantage=advantage,
        kl=kl,
        kl_coef=kl_coef,
        reward_UxK=reward_UxK,
        baseline=0.0,
        logp_UxKxS=logp_UxKxS,
        ref_logp_UxKxS=jnp.asarray(REF_LOGP_UxKxS),
        mask_UxKxS=jnp.asarray(MASK_UxKxS),
        position_kl_UxKxS=position_kl_UxKxS,
    ).loss
    return total / count


def our_gradients(advantage: str, kl: str, kl_coef: float, reward_UxK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """With respect to the log-probabilities and to the KL at each position."""
    of_logp, of_kl = gradients(LOGP_UxKxS, POSITION_KL_UxKxS, kl_coef, reward_UxK, advantage=advantage, kl=kl)
    return np.asarray(of_logp), np.asarray(of_kl)


def assert_multiple(gradients, others, factor: float, rtol: float) -> None:
    assert np.abs(others[0]).max() > 0.01
    for gradient, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(gradient, other * factor, rtol=rtol, atol=1e-6)


def test_units_of_kl_coef() -> None:
    rows = table("Their coefficient", "objective.kl_coef")
    assert [keys(row["objective.advantage"]) for row in rows[1:]] == [
        *[keys(rows[0]["objective.advantage"])] * 2,
        ["grpo"],
    ]
    assert {*keys(rows[0]["objective.advantage"]), "grpo"} == set(objective.ADVANTAGES)
    for row in rows:
        theirs, beta, coefficient = (
            float(row[c]) for c in ("Their coefficient", "objective.beta", "objective.kl_coef")
        )
        for name in keys(row["objective.advantage"]):
            kinds = keys(row["Reward elsewhere"]) or objective.KL_ESTIMATORS
            for kl in kinds:
                in_nats = our_gradients(name, kl, theirs, REWARD_UxK)
                over_beta = our_gradients(name, kl, coefficient, REWARD_UxK / beta)
                # grpo's own epsilon is what its last digits owe to the unit.
                factor, rtol = (1.0, 1e-3) if name == "grpo" else (1 / beta, 1e-5)
                assert_multiple(over_beta, in_nats, factor, rtol)
    # A penalty in the reward is divided with it.
    assert_multiple(
        our_gradients("grpo", "k1_reward", 0.5, REWARD_UxK / BETA),
        our_gradients("grpo", "k1_reward", 0.05, REWARD_UxK),
        1.0,
        rtol=1e-3,
    )
    np.testing.assert_allclose(CONFIG.objective.kl_coef * CONFIG.objective.beta, 2e-4)
    assert "default of 2e-3 at beta = 0.1 is 2e-4 against nats" in prose()


def trl_rloo_gradient(beta: float) -> np.ndarray:
    """Of TRL's RLOO: k1 in the reward, a ratio of 1 for the sequence, a mean over sequences."""
    reward_UxK = REWARD_UxK - beta * ((LOGP_UxKxS - REF_LOGP_UxKxS) * MASK_UxKxS).sum(axis=-1)
    advantage_UxK = np.stack([leave_one_out(reward_K) for reward_K in reward_UxK])
    return -advantage_UxK[..., None] * MASK_UxKxS / MASK_UxKxS[..., 0].size


def token_gradient(beta: float) -> np.ndarray:
    """Of each token's loss in TRL's GRPO, k3 included, before tokens are added up."""
    advantage_UxK = np.stack([standardised(1e-4)(reward_K) for reward_K in REWARD_UxK])
    k3_UxKxS = 1 - np.exp(REF_LOGP_UxKxS - LOGP_UxKxS)
    return (-advantage_UxK[..., None] + beta * k3_UxKxS) * MASK_UxKxS


def test_k1_reward_with_rloo_is_trl_s_rloo() -> None:
    assert_multiple(
        (trl_rloo_gradient(0.05),), our_gradients("rloo", "k1_reward", 0.05, REWARD_UxK)[:1], 1.0, rtol=1e-5
    )


def test_tokens_summed_or_averaged() -> None:
    rows = table("Elsewhere", "Their gradient = ours times")
    N, T, L = LENGTH_UxK.size, LENGTH_UxK.sum(), LENGTH
    ours = our_gradients("grpo", "k3_loss", 0.04, REWARD_UxK)[:1]
    tokens_UxKxS = token_gradient(0.04)
    theirs = {
        "1": (1.0, tokens_UxKxS / N),
        "N / T": (N / T, tokens_UxKxS / T),
        "1 / L": (1 / L, tokens_UxKxS / (N * L)),
    }
    for row, (factor, gradient) in zip(rows[:-1], theirs.items(), strict=True):
        assert row["Their gradient = ours times"] == factor
        assert_multiple((gradient[1],), ours, gradient[0], rtol=1e-4)
    assert rows[-1]["Their gradient = ours times"].startswith("no multiple")
    mean_UxKxS = tokens_UxKxS / LENGTH_UxK[..., None] / N
    share_UxK = np.abs(mean_UxKxS[..., 0] / ours[0][..., 0])
    np.testing.assert_allclose(share_UxK, 1 / LENGTH_UxK, rtol=1e-3)
    assert len(set(LENGTH_UxK.ravel())) > 1


# Keys.


def test_keys_and_defaults() -> None:
    for rows in (table("Here", "LLaMA-Factory"), table("Here", "verl")):
        for row in rows:
            values = []
            for key in keys(row["Here"]):
                section, name = key.split(".")
                values.append(str(CONFIG[section][name]))
            assert row["Default"] == ", ".join(values)


def test_every_key_on_the_page_exists() -> None:
    sections = "|".join(name for name, section in CONFIG.items() if hasattr(section, "keys"))
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(rf"`(?:--config\.)?((?:{sections})\.[a-z_0-9]+)", text)) - VERL_KEYS
    assert len(named) > 20
    for key in named:
        section, name = key.split(".")
        assert name in CONFIG[section], key


# verl has a section of the same name.
VERL_KEYS = {"data.max_response_length", "data.train_batch_size"}


def test_pairs_of_a_generator_update() -> None:
    users, k, queries = CONFIG.train.users_per_step, CONFIG.sampling.k, CONFIG.data.queries_per_user
    assert f"{users * k * queries} by default ({users} x {k} x {queries})" in prose()
    assert CONFIG.sampling.k_generator == 0
