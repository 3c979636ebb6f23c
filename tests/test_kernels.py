"""The attention kernels against the plain attention. Splash attention runs in Pallas's interpreter on the CPU."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.config import parse
from popi_jax.configs import quickstart
from popi_jax.data.batch import PrefixBatch
from popi_jax.errors import UserError
from popi_jax.model import attention, kernels, sharding
from popi_jax.model.config import ModelConfig
from popi_jax.model.policy import Policy
from popi_jax.modes import setup
from popi_jax.training import scoring
from tests import tiny

# Blocks of 128, so that short lines have several.
splash = functools.partial(kernels.splash, block=128, interpret=True)


def line_segments(T: int, N: int, S: int) -> np.ndarray:
    """Returns segments of lines [prefix | branches] with padding in each part; the last line is all padding."""
    prefix_length_B, branch_length_BxN = np.array([T, T * 2 // 3, 0]), np.full((3, N), S)
    branch_length_BxN[1] = S // (1 + np.arange(N))
    branch_length_BxN[2] = 0
    ids = np.zeros((3, T), np.int32), np.zeros((3, N, S), np.int32)
    return np.asarray(scoring.layout(PrefixBatch(ids[0], prefix_length_B, ids[1], branch_length_BxN))[2])


def bin_segments(L: int) -> np.ndarray:
    """Returns segments of bins of several rows of all lengths, packed as for training."""
    lines = tiny.rows(np.random.default_rng(4), B=9, N=3, T=100, S=70)
    return tiny.packed(lines, length=L).segments_CxL


def ragged_segments() -> np.ndarray:
    """Returns segments with padding before, between and within prefixes and branches, in an uneven last block."""
    segments_BxL = np.full((2, 300), -1, np.int32)
    segments_BxL[0, 3:90], segments_BxL[0, 100:160], segments_BxL[0, 165:200], segments_BxL[0, 200:280] = 0, 1, 2, 3
    segments_BxL[0, 40:50] = segments_BxL[0, 120:140] = segments_BxL[0, 220] = -1
    segments_BxL[1, :150], segments_BxL[1, 150:180], segments_BxL[1, 190:230] = 0, 7, attention.ROW
    segments_BxL[1, 230:240], segments_BxL[1, 240:290] = attention.ROW + 1, attention.ROW + 2
    return segments_BxL


CASES = {
    "lines": (line_segments(100, 4, 71), 4, 2, 64),  # L = 384.
    "bins": (bin_segments(512), 2, 2, 128),
    "ragged": (ragged_segments(), 3, 1, 64),
}


def draw(segments_BxL: np.ndarray, H: int, Kv: int, Dh: int, dtype=jnp.float32) -> list[jax.Array]:
    """Returns queries, keys, values and a gradient of the result, 0 at padding, where nothing depends on it."""
    rng = np.random.default_rng(5)
    *qkv, g_BxLxHxDh = (rng.normal(size=(*segments_BxL.shape, heads, Dh)) for heads in (H, Kv, Kv, H))
    return [jnp.asarray(x, dtype) for x in (*qkv, g_BxLxHxDh * (segments_BxL >= 0)[:, :, None, None])]


def run(attend, arrays, segments_BxL):
    """Returns the result at real tokens, and the gradients."""

    @jax.jit
    def forward_and_backward(q, k, v, g):
        out_BxLxHxDh, vjp = jax.vjp(lambda *qkv: attend(*qkv, segments_BxL), q, k, v)
        return out_BxLxHxDh, *vjp(g)

    out_BxLxHxDh, *grads = (np.asarray(x.astype(jnp.float32)) for x in forward_and_backward(*arrays))
    assert all(np.isfinite(x).all() for x in (out_BxLxHxDh, *grads))
    return [out_BxLxHxDh[segments_BxL >= 0], *grads]


def assert_same(got, want, tolerance):
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max(), err_msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("case", CASES)
def test_splash_equals_the_plain_attention(case, dtype, tolerance):
    segments_BxL, H, Kv, Dh = CASES[case]
    arrays = draw(segments_BxL, H, Kv, Dh, dtype)
    assert_same(run(splash, arrays, segments_BxL), run(attention.attend, arrays, segments_BxL), tolerance)


@pytest.mark.parametrize("attend", [splash, functools.partial(kernels.cudnn, implementation="xla")])
def test_padding_attends_to_itself(attend):
    """Every query then has a key, so a layer's values and gradients at padding are finite."""
    segments_BxL = line_segments(30, 2, 10)
    q, k, v, g = draw(segments_BxL, 2, 1, 64)
    out_BxLxHxDh, vjp = jax.vjp(jax.jit(lambda *qkv: attend(*qkv, segments_BxL)), q, k, v)
    itself_BxLxHxDh = jnp.repeat(v, 2, axis=2)
    padding_BxL = segments_BxL < 0
    np.testing.assert_allclose(out_BxLxHxDh[padding_BxL], itself_BxLxHxDh[padding_BxL], atol=1e-6)
    *_, dv = vjp(jnp.ones_like(g))
    np.testing.assert_allclose(dv[padding_BxL], 2.0, atol=1e-5)  # From its two heads, and from no other query.


def test_splash_skips_blocks_that_no_query_sees():
    """A NaN in the values of a processed block reaches all its queries, masked or not, since 0 * NaN is NaN."""
    segments_1xL = np.repeat([0, 1, 2, attention.ROW, attention.ROW + 1], 128)[None]
    q, k, v, _ = draw(segments_1xL, 1, 1, 64)
    jitted = jax.jit(splash)
    for poisoned, reached in ((1, [1]), (2, [2]), (3, [3, 4]), (0, [0, 1, 2])):
        at = slice(poisoned * 128, (poisoned + 1) * 128)
        out_1xLx1xDh = jitted(q, k, v.at[:, at].set(np.nan), segments_1xL)
        hit_L = np.isnan(np.asarray(out_1xLx1xDh)).any(axis=(0, 2, 3))
        np.testing.assert_array_equal(np.flatnonzero(hit_L.reshape(5, 128).any(axis=1)), reached)


def test_each_device_attends_to_its_own_lines_and_heads():
    segments_BxL = np.concatenate([line_segments(50, 2, 40)[:2]] * 2)
    arrays = draw(segments_BxL, 4, 2, 64)
    want = run(attention.attend, arrays, segments_BxL)
    mesh = sharding.make_mesh(2, 2, 2)
    attend = kernels.per_device(splash, mesh)
    by_heads = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor", None))
    placed = [jax.device_put(x, by_heads) for x in arrays[:3]]
    compiled = jax.jit(attend).lower(*placed, segments_BxL).compile()
    assert compiled.output_shardings.is_equivalent_to(by_heads, 4)
    assert not any(name in compiled.as_text() for name in ("all-gather", "all-reduce", "all-to-all"))
    assert_same(run(attend, arrays, segments_BxL), want, 1e-5)
    with pytest.raises(UserError, match="attention: 'batch' of size 3 does not divide over mesh.data=2"):
        jax.eval_shape(attend, *(x[:3] for x in (*arrays[:3], segments_BxL)))


@pytest.mark.parametrize("case", CASES)
def test_cudnn_mask_equals_the_plain_attention(case):
    segments_BxL, H, Kv, Dh = CASES[case]
    arrays = draw(segments_BxL, H, Kv, Dh)
    masked = functools.partial(kernels.cudnn, implementation="xla")
    assert_same(run(masked, arrays, segments_BxL), run(attention.attend, arrays, segments_BxL), 1e-5)


def test_the_decoder_runs_the_attention_of_its_config():
    """Lowering for a TPU needs no TPU; a Mosaic kernel in the result is splash attention."""
    config = ModelConfig(
        vocab_size=9, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=64, d_ff=8, remat="full"
    )
    ids_BxL = jax.ShapeDtypeStruct((2, 200), jnp.int32)

    def kernels_in(name: str) -> int:
        policy = Policy(dataclasses.replace(config, attention=name))

        def loss(base, *args):
            return jnp.sum(policy.bind(base, None)(*args))

        traced = jax.jit(jax.grad(loss)).trace(policy.abstract_base(), ids_BxL, ids_BxL, ids_BxL)
        return traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")

    assert kernels_in("xla") == 0
    assert kernels_in("splash") >= 3  # Forward, and the two kernels of the backward pass.
    with pytest.raises(UserError, match=r"model.attention='flash': choose xla, splash or cudnn"):
        dataclasses.replace(config, attention="flash")


def test_pallas_is_not_imported_before_it_is_needed():
    program = (
        "import sys; from popi_jax.model import kernels; kernels.bind('xla', None); kernels.bind('cudnn', None);"
        " sys.exit(any('pallas' in name for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "resolved"),
    [
        ("auto", "tpu", "float32", "splash"),
        ("auto", "tpu", "bfloat16", "splash"),
        ("auto", "gpu", "bfloat16", "cudnn"),
        ("auto", "gpu", "float32", "xla"),
        ("auto", "cpu", "bfloat16", "xla"),
        ("xla", "tpu", "float32", "xla"),
        ("splash", "tpu", "float32", "splash"),
        ("cudnn", "gpu", "bfloat16", "cudnn"),
    ],
)
def test_resolve(name, platform, dtype, resolved):
    assert kernels.resolve(name, platform, dtype) == resolved


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "shown"),
    [
        ("splash", "gpu", "bfloat16", "'splash', which needs a TPU, .* for GPU; set it to 'auto' or 'xla'"),
        ("splash", "cpu", "float32", "'splash', which needs a TPU, .* for CPU; set it to 'auto' or 'xla'"),
        ("cudnn", "tpu", "bfloat16", "'cudnn', which needs a GPU, .* for TPU; set it to 'auto' or 'xla'"),
        (
            "cudnn",
            "gpu",
            "float32",
            "'cudnn', which needs config.model.compute_dtype 'bfloat16', not 'float32'; change",
        ),
    ],
)
def test_unsupported_choices_raise_a_user_error(name, platform, dtype, shown):
    with pytest.raises(UserError, match=f"config.model.attention is {shown}") as raised:
        kernels.resolve(name, platform, dtype)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "shown"), [("flash", "is 'flash'; choose one of auto, xla, splash, cudnn"), ("splash", "needs a TPU")]
)
def test_a_run_refuses_unsupported_attention(name, shown):
    config = quickstart.get_config("runlocal")
    config.model.attention = name
    with pytest.raises(UserError, match=f"config.model.attention .*{shown}"):
        setup.load(parse(config))
