"""PEFT folders: what we write and read, against values by hand, and against peft where torch is installed."""

import json

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from popi_jax.errors import UserError
from popi_jax.model import hub, lora, peft
from popi_jax.model.config import LoraConfig
from popi_jax.model.policy import Policy
from tests import tiny

ALL = LoraConfig(rank=8, alpha=4.0, targets=("q", "k", "v", "o", "gate", "up", "down"))


@pytest.fixture(scope="module")
def base():
    return tiny.policy().init_base(jax.random.key(0))


def fresh(settings, base):
    return jax.device_get(tiny.policy(settings).init_delta(base, jax.random.key(1)))


def adapter(folder, tensors, **settings):
    folder.mkdir(exist_ok=True)
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]} | settings
    (folder / peft.CONFIG).write_text(json.dumps(described))
    safetensors.numpy.save_file(tensors, folder / peft.WEIGHTS)
    return folder


def tensors(ranks, seed=0):
    """A and B of modules by "LAYER.NAME" with their ranks, as PEFT names and shapes them."""
    rng, out = np.random.default_rng(seed), {}
    c = tiny.CONFIG
    sizes = {
        "q": (16, 16),
        "k": (16, 8),
        "v": (16, 8),
        "o": (16, 16),
        "gate": (16, 24),
        "up": (16, 24),
        "down": (24, 16),
    }
    assert c.d_model == c.n_heads * c.head_dim == 16 and c.n_kv_heads * c.head_dim == 8 and c.d_ff == 24
    for name, rank in ranks.items():
        layer, target = name.split(".")
        into, wide = sizes[target]
        module = f"base_model.model.model.layers.{layer}.{'mlp' if target in ('gate', 'up', 'down') else 'self_attn'}"
        out[f"{module}.{target}_proj.lora_A.weight"] = rng.normal(size=(rank, into)).astype(np.float32)
        out[f"{module}.{target}_proj.lora_B.weight"] = rng.normal(size=(wide, rank)).astype(np.float32)
    return out


def hub_weights(params):
    """The model's matrices as the hub stores them, [out, in]."""
    leaves = hub.leaves(tiny.CONFIG)
    return dict(hub._hub_tensors(leaves, tiny.CONFIG.n_layers, params, np.dtype(np.float32)))


def test_what_is_written_is_what_peft_computes(base, tmp_path):
    delta = tiny.perturbed(tiny.policy(tiny.LORA).init_delta(base, jax.random.key(1)), 2)
    peft.save(tmp_path / "out", delta, tiny.LORA, "base", hub.STYLEBOOK, {"popi.json": "{}"})
    described = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
    assert described["r"] == 3 and described["lora_alpha"] == 6
    assert described["target_modules"] == ["down_proj", "o_proj", "q_proj", "v_proj"]
    stored = safetensors.numpy.load_file(tmp_path / "out" / peft.WEIGHTS)
    assert len(stored) == 2 * 4 * tiny.CONFIG.n_layers
    before, after = hub_weights(base), hub_weights(lora.fuse(base, delta, tiny.LORA))
    for name, weight in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (stored.get(f"{module}.lora_{which}.weight") for which in "AB")
        expected = weight if a is None else weight + 6 / 3 * b @ a  # PEFT: W + alpha / r B A.
        np.testing.assert_allclose(after[name], expected, atol=1e-5)
    back = peft.load(tmp_path / "out", fresh(tiny.LORA, base), tiny.LORA)
    chex.assert_trees_all_equal(back, jax.device_get(delta))


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, {"0.q": 8 / 2, "1.q": 8 / 2, "0.down": 8 / 2, "1.down": 8 / 2}),
        ({"use_rslora": True}, dict.fromkeys(("0.q", "1.q", "0.down", "1.down"), 8 / np.sqrt(2))),
        # The first pattern in the file's order counts.
        (
            {"rank_pattern": {"layers.1.self_attn.q_proj": 4, "q_proj": 1}, "alpha_pattern": {"down_proj": 3}},
            {"0.q": 8 / 1, "1.q": 8 / 4, "0.down": 3 / 2, "1.down": 3 / 2},
        ),
    ],
)
def test_rank_alpha_and_patterns_give_peft_s_scale(settings, scales, base, tmp_path):
    ranks = {name: 2 for name in scales}
    if "rank_pattern" in settings:
        ranks |= {"0.q": 1, "1.q": 4}
    stored = tensors(ranks)
    folder = adapter(tmp_path / "a", stored, target_modules=["q_proj", "down_proj"], **settings)
    start = fresh(ALL, base)
    read = peft.load(folder, start, ALL)
    before, after = hub_weights(base), hub_weights(lora.fuse(base, read, ALL))
    for name, weight in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (stored.get(f"{module}.lora_{which}.weight") for which in "AB")
        expected = weight
        if a is not None:
            short = f"{name.split('.')[2]}.{name.split('.')[4].removesuffix('_proj')}"
            expected = weight + scales[short] * b @ a
        np.testing.assert_allclose(after[name], expected, atol=1e-4)
    # What the adapter leaves out can still be trained: a is drawn, b is zero.
    np.testing.assert_array_equal(read["layers"]["gate"]["a"], start["layers"]["gate"]["a"])
    assert (read["layers"]["q"]["a"][..., 4:] != 0).all() and (read["layers"]["q"]["b"][:, 4:] == 0).all()


REFUSED = {
    "use_dora": ({"use_dora": True}, "use_dora is true; adapters with it are not read"),
    "bias": ({"bias": "all"}, 'bias is "all"; adapters with it are not read'),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
    "layers": ({"layers_to_transform": [0]}, "layers_to_transform is [0]"),
    "an init that changes the base": ({"init_lora_weights": "lora_ga"}, 'init_lora_weights is "lora_ga"'),
    "excluded": ({"exclude_modules": ["k_proj"]}, "exclude_modules is"),
    "a future setting": ({"nosuch": 1}, "nosuch is 1; adapters with it are not read"),
    "another base": ({"init_lora_weights": "pissa_niter_4"}, "whose adapter may belong to another base"),
    "another method": ({"peft_type": "LOHA"}, "peft_type is not LORA"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, None),
    "rank": ({"r": 0}, "r is 0; it must be a whole number above 0"),
    "no targets": ({"target_modules": []}, "target_modules is []; it must name"),
    "more targets": ({"target_modules": ["q_proj", "k_proj"]}, "has no adapter of model.layers.0.self_attn.k_proj"),
    "pattern": ({"target_modules": "(q_proj"}, "target_modules: missing )"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern of 'q_proj' is 0; it must be above 0"),
    "shape": ({"rank_pattern": {"q_proj": 3}}, "has shape [2, 16]; rank 3 and this model mean [3, 16]"),
    "too large": ({"rank_pattern": {"q_proj": 9}}, "has rank 9, but config.lora.rank is 8; raise it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_is_not_read_is_one_line(name, base, tmp_path):
    settings, message = REFUSED[name]
    stored = tensors({"0.q": 2, "1.q": 2})
    if name == "head":
        stored["base_model.model.lm_head.lora_A.weight"] = np.zeros((2, 16), np.float32)
        stored["base_model.model.lm_head.lora_B.weight"] = np.zeros((30, 2), np.float32)
        message = "target_modules name lm_head; only q, k, v, o, gate, up and down"
    folder = adapter(tmp_path / "a", stored, **settings)
    with pytest.raises(UserError) as error:
        peft.load(folder, fresh(ALL, base), ALL)
    assert message in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_weights_that_do_not_fit_are_one_line(base, tmp_path):
    def refused(stored, message, settings=ALL):
        folder = adapter(tmp_path / "a", stored)
        with pytest.raises(UserError, match=message):
            peft.load(folder, fresh(settings, base), settings)

    good = tensors({"0.q": 2, "1.q": 2})
    first = next(iter(good))
    refused(good | tensors({"0.v": 2}), "has model.layers.0.self_attn.v_proj, which target_modules .* does not name")
    refused(good | {first: good[first] * np.float32("nan")}, "is not of finite floats")
    refused(good | {first: good[first].astype(np.float64)}, "is not of finite floats of 16 or 32 bits")
    refused({name: value for name, value in good.items() if name != first}, "has lora_B alone")
    refused(good | {"base_model.model.lm_head.weight": np.zeros((1, 1), np.float32)}, "is not an adapter's A or B")
    only_v = LoraConfig(rank=8, alpha=4.0, targets=("v",))
    refused(good, "adapts q, which config.lora.targets lacks; add it", only_v)
    (tmp_path / "a" / peft.WEIGHTS).write_bytes(b"{}")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        peft.load(tmp_path / "a", fresh(ALL, base), ALL)
    with pytest.raises(UserError, match="no such file or directory; give the folder that PEFT"):
        peft.load(tmp_path / "nosuch", fresh(ALL, base), ALL)


@pytest.mark.torch
def test_peft_loads_ours_and_we_load_peft_s(tmp_path):
    torch = pytest.importorskip("torch", reason="live parity needs torch: pip install -e '.[torch]'")
    library = pytest.importorskip("peft", reason="live parity needs peft: pip install -e '.[torch]'")
    import transformers

    checkpoint = hub.load(hub.STYLEBOOK)
    policy = Policy(checkpoint.config, ALL)
    start = policy.init_delta(checkpoint.params, jax.random.key(1))
    tokens = np.arange(3, 27, dtype=np.int32)[None]

    def ours(delta):
        decoder = policy.bind(checkpoint.params, delta)
        hidden, _ = decoder.prefill(tokens, np.arange(tokens.size)[None], np.zeros_like(tokens), 1, 1)
        return np.asarray(decoder.logits(hidden))

    def theirs(model):
        with torch.no_grad():
            return model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()

    def base():
        return transformers.AutoModelForCausalLM.from_pretrained(hub.STYLEBOOK, dtype=torch.float32)

    delta = tiny.perturbed(start, 2, 0.1)
    peft.save(tmp_path / "ours", delta, ALL, str(hub.STYLEBOOK), str(hub.STYLEBOOK), {})
    loaded = library.PeftModel.from_pretrained(base(), tmp_path / "ours")
    np.testing.assert_allclose(theirs(loaded), ours(delta), atol=1e-4)
    settings = library.LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "down_proj", "v_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 8, "v_proj": 2},
        alpha_pattern={"down_proj": 3},
        task_type="CAUSAL_LM",
    )
    made = library.get_peft_model(base(), settings)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    made.save_pretrained(tmp_path / "theirs")
    read = peft.load(tmp_path / "theirs", start, ALL)
    np.testing.assert_allclose(ours(read), theirs(made), atol=1e-4)
