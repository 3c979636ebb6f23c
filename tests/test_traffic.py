"""Traffic of programs compiled for this CPU and of literal TPU texts, against values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from popi_jax.model import sharding
from popi_jax.modes.cost import executed, hlo, traffic
from popi_jax.modes.cost.traffic import Collective

X = jnp.zeros((8, 16))
STACK_7 = jnp.zeros((7, 16, 16))


def layers(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


# Programs compiled for the CPU ---------------------------------------------------------------------------------------


def compiled(f, *args, **kwargs):
    return jax.jit(f, **kwargs).lower(*args).compile().as_text()


def loop_trips(text):
    """Returns, for each loop, how often its body runs each time that the loop is reached."""
    program = executed.walk(hlo.parse(text), (1000, 7), lambda *_: 0.0)
    return [
        next(e.times for e in program.executions if e.computation.name == i.computation("body")) // run.times
        for run in program.executions
        if (i := run.instruction).opcode == "while"
    ]


@pytest.mark.parametrize("written_down", [True, False])
def test_trip_count_of_a_scan(written_down):
    text = compiled(layers, X, STACK_7)
    assert "known_trip_count" in text
    if not written_down:  # As on a TPU: derived from the constant in the condition.
        text = text.replace("known_trip_count", "another_figure")
    assert loop_trips(text) == [7]


def test_a_scan_reads_its_weights_once():
    def moved(length):
        text = compiled(layers, jnp.zeros((1, 512)), jnp.zeros((length, 512, 512)))
        return traffic.measure(text).hbm_bytes

    weights = 512 * 512 * 4
    a_turn = (moved(14) - moved(7)) / 7
    # One layer is read, or copied and then read; the whole stack would be 7 or 14 times that.
    assert weights <= a_turn < 3.2 * weights


def test_data_dependent_loops_are_named():
    def decode(x):
        return jax.lax.while_loop(lambda s: (s[0] < 100) & (s[1] < 3.0), lambda s: (s[0] + 1, s[1] * 2), (0, x))

    text = compiled(decode, jnp.float32(1))
    once, thrice = traffic.measure(text), traffic.measure(text, (3,))
    assert len(once.unknown_loops) == 1
    assert thrice.hbm_bytes > once.hbm_bytes
    assert loop_trips(text) == [1000]
    assert loop_trips(compiled(lambda x: decode(decode(x)[1]), jnp.float32(1))) == [1000, 7]


def over(mesh, shape, *axes):
    spec = PartitionSpec(*axes)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))


def test_a_product_over_a_split_dimension_is_an_all_reduce():
    mesh = sharding.make_mesh(2, 1, 4)
    a, b = over(mesh, (16, 64), None, "tensor"), over(mesh, (64, 32), "tensor")
    found = traffic.measure(compiled(jnp.matmul, a, b, out_shardings=sharding.replicated(mesh)))
    assert found.collectives == {"all-reduce": Collective(1, 2 * 16 * 32 * 4 * 3 / 4)}


@pytest.mark.parametrize(
    ("name", "f", "size"),
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, "fsdp"), 3 * 1024),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), 1024 * 3 / 4),
        ("all-reduce", lambda x: jax.lax.psum(x, "fsdp"), 2 * 1024 * 3 / 4),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True), 1024 * 3 / 4),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "fsdp", [(n, (n + 1) % 4) for n in range(4)]), 1024),
    ],
)
def test_bytes_that_a_device_sends(name, f, size):
    mesh = sharding.make_mesh(2, 4, 1)
    split = PartitionSpec("fsdp")
    f = jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    x = over(mesh, (16, 64), "fsdp")  # On each device 4 x 64 float32: 1024 bytes.
    assert traffic.measure(compiled(f, x)).collectives == {name: Collective(1, size)}


def test_collectives_in_a_scan_count_for_every_iteration():
    mesh = sharding.make_mesh(1, 8, 1)

    def gathered(x, stack):
        return jax.lax.scan(lambda x, w: (x @ jax.lax.all_gather(w, "fsdp", tiled=True), None), x, stack)[0]

    def again(x, stack):
        return jax.lax.scan(lambda x, _: (gathered(x, stack), None), x, length=3)[0]

    in_specs = (PartitionSpec(), PartitionSpec(None, "fsdp"))
    for f, turns in ((gathered, 7), (again, 3 * 7)):
        f = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False)
        text = compiled(f, over(mesh, (8, 16)), over(mesh, (7, 16, 16), None, "fsdp"))
        expected = Collective(turns, turns * 16 * 16 * 4 * 7 / 8)
        assert traffic.measure(text).collectives == {"all-gather": expected}


def test_a_callback_is_a_host_transfer():
    def f(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct((4,), jnp.float32), x) + 1

    (name,) = traffic.measure(compiled(f, jnp.zeros(4))).host_transfers
    assert "callback" in name
    assert traffic.measure(compiled(lambda x: jnp.sin(x) + 1, jnp.zeros(4))).host_transfers == []


# Literal texts -------------------------------------------------------------------------------------------------------


def moved(body, before="", unknown_trips=(), devices=4):
    """Returns the traffic of an entry computation with this body."""
    text = f"HloModule m, num_partitions={devices}\n{before}\nENTRY %e () -> f32[] {{\n{body}\n}}\n"
    return traffic.measure(text, unknown_trips)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("ROOT %y = f32[8]{0} add(%x, %x)", 3 * 32),
        ("ROOT %y = f32[8]{0:S(1)} add(%x, %x)", 2 * 32),
        ("ROOT %y = f32[8]{0} add(%v, %v)", 32),
        ("ROOT %y = f32[2,4]{1,0} bitcast(%x)", 0),
        ("ROOT %y = (f32[8]{0}, f32[8]{0}) tuple(%x, %v)", 0),
        ("ROOT %y = f32[2]{0} dynamic-slice(%x, %i), dynamic_slice_sizes={2}", 8 + 4 + 8),
        ("ROOT %y = f32[8]{0} dynamic-update-slice(%x, %u, %i)", 8 + 4 + 8),
        ("ROOT %y = f32[8]{0:S(1)} dynamic-update-slice(%v, %u, %i)", 8 + 4),
        ("ROOT %y = f32[3,2]{1,0} gather(%big, %rows), slice_sizes={1,2}", 24 + 12 + 24),
        ("ROOT %y = f32[99,2]{1,0} scatter(%big, %rows, %new), to_apply=%add", 12 + 24 + 2 * 24),
        ("%s = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%x)\nROOT %y = f32[8]{0:S(1)} copy-done(%s)", 32),
        ("ROOT %s = ((f32[8]{0}), f32[2]{0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[2:4]}", 8),
        ('ROOT %y = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"', 0),
        ('ROOT %y = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"', 64),
    ],
)
def test_hbm_bytes_of_an_instruction(body, expected):
    given = [
        "%x = f32[8]{0} parameter(0)",
        "%v = f32[8]{0:T(128)S(1)} parameter(1)",
        "%i = s32[] parameter(2)",
        "%u = f32[2]{0} parameter(3)",
        "%big = f32[99,2]{1,0} parameter(4)",
        "%rows = s32[3]{0} parameter(5)",
        "%new = f32[3,2]{1,0} parameter(6)",
    ]
    assert moved("\n".join(f"  {line}" for line in [*given, *body.split("\n")])).hbm_bytes == expected


# Fusions slice a scan's weights and write its results into their stack.
FUSED = """
%slice_inside (p0: bf16[7,16,16], p1: s32[], p2: bf16[8,16]) -> bf16[8,16] {
  %p0 = bf16[7,16,16]{2,1,0} parameter(0)
  %b = bf16[7,256]{1,0} bitcast(%p0)
  %p1 = s32[] parameter(1)
  %c = s32[] constant(0)
  %w = bf16[1,256]{1,0} dynamic-slice(%b, %p1, %c), dynamic_slice_sizes={1,256}
  %v = bf16[16,16]{1,0} bitcast(%w)
  %p2 = bf16[8,16]{1,0} parameter(2)
  ROOT %d = bf16[8,16]{1,0} convolution(%p2, %v), dim_labels=bf_io->bf
}

%update_inside (q0: f32[7,8,16], q1: s32[], q2: bf16[8,16]) -> (f32[7,8,16], f32[8,16]) {
  %q0 = f32[7,8,16]{2,1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = bf16[8,16]{1,0} parameter(2)
  %f = f32[8,16]{1,0} convert(%q2)
  %g = f32[1,8,16]{2,1,0} bitcast(%f)
  %z = s32[] constant(0)
  %u = f32[7,8,16]{2,1,0} dynamic-update-slice(%q0, %g, %q1, %z, %z)
  ROOT %t = (f32[7,8,16]{2,1,0}, f32[8,16]{1,0}) tuple(%u, %f)
}

%update_then_use (r0: f32[7,8], r1: s32[], r2: f32[1,8]) -> f32[7,8] {
  %r0 = f32[7,8]{1,0} parameter(0)
  %r1 = s32[] parameter(1)
  %r2 = f32[1,8]{1,0} parameter(2)
  %k = s32[] constant(0)
  %m = f32[7,8]{1,0} dynamic-update-slice(%r0, %r2, %r1, %k)
  ROOT %n = f32[7,8]{1,0} negate(%m)
}
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ROOT %y = bf16[8,16]{1,0} fusion(%w, %i, %x), kind=kOutput, calls=%slice_inside", 512 + 4 + 256 + 256),
        ("ROOT %y = (f32[7,8,16]{2,1,0}, f32[8,16]{1,0}) fusion(%s, %i, %x), calls=%update_inside", 4 + 256 + 2 * 512),
        ("ROOT %y = f32[7,8]{1,0} fusion(%a, %i, %r), kind=kLoop, calls=%update_then_use", 224 + 4 + 32 + 224),
    ],
)
def test_hbm_bytes_of_a_fusion(line, expected):
    given = [
        "%w = bf16[7,16,16]{2,1,0} parameter(0)",
        "%i = s32[] parameter(1)",
        "%x = bf16[8,16]{1,0} parameter(2)",
        "%s = f32[7,8,16]{2,1,0} parameter(3)",
        "%a = f32[7,8]{1,0} parameter(4)",
        "%r = f32[1,8]{1,0} parameter(5)",
    ]
    assert moved("\n".join(f"  {one}" for one in [*given, line]), FUSED).hbm_bytes == expected


def loop(start, step, direction, limit, swapped=False, inner=""):
    """Returns a loop over (counter, limit, x), whose iterations move 64 bytes for x, and the computations it calls."""
    compared = "%l, %c" if swapped else "%c, %l"
    before = f"""
%body (s: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {{
  %s = (s32[], s32[], f32[8]{{0}}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %m = s32[] get-tuple-element(%s), index=1
  %x = f32[8]{{0}} get-tuple-element(%s), index=2
  %step = s32[]{{:S(6)}} constant({step})
  %next = s32[]{{:S(6)}} add(%n, %step)
  %y = f32[8]{{0}} negate(%x)
  ROOT %t = (s32[], s32[], f32[8]{{0}}) tuple(%next, %m, %y)
}}

%less (p0: s32[], p1: s32[]) -> pred[] {{
  %p0 = s32[] parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %o = pred[]{{:S(6)}} compare(%p0, %p1), direction={direction}
}}

%condition (q: (s32[], s32[], f32[8])) -> pred[] {{
  %q = (s32[]{{:S(6)}}, s32[]{{:S(6)}}, f32[8]{{0}}) parameter(0)
  %c = s32[]{{:S(6)}} get-tuple-element(%q), index=0
  %l = s32[]{{:S(6)}} get-tuple-element(%q), index=1
  ROOT %r = pred[]{{:S(6)}} fusion({compared}), kind=kLoop, calls=%less
}}
"""
    body = f"""  %a = f32[8]{{0}} parameter(0)
  %d = s32[] parameter(1)
  %start = s32[] {start}
  %limit = s32[] {limit}
  %copied = s32[] bitcast(%start)
  %state = (s32[], s32[], f32[8]{{0}}) tuple(%copied, %limit, %a)
  ROOT %loop = (s32[], s32[], f32[8]{{0}}) while(%state), condition=%condition, body=%body"""
    return body, before.replace("s32[] get", "s32[]{:S(6)} get")


@pytest.mark.parametrize(
    ("start", "step", "direction", "limit", "swapped", "turns"),
    [
        (0, 1, "LT", 28, False, 28),
        (3, 1, "LT", 28, False, 25),
        (0, 1, "LE", 28, False, 29),
        (0, 2, "LT", 8, False, 4),  # Like a product over gathered pieces, unrolled once.
        (0, 2, "LT", 9, False, 5),
        (0, 1, "NE", 5, False, 5),
        (28, -1, "GT", 0, False, 28),
        (28, -1, "GE", 0, False, 29),
        (0, 1, "GT", 28, True, 28),  # The limit first.
        (9, 1, "LT", 5, False, 0),
    ],
)
def test_trip_count_of_a_counted_loop(start, step, direction, limit, swapped, turns):
    found = moved(*loop(f"constant({start})", step, direction, f"constant({limit})", swapped))
    assert (found.hbm_bytes, found.unknown_loops) == (64 * turns, [])


@pytest.mark.parametrize(
    ("start", "step", "direction", "limit"),
    [
        ("constant(0)", 1, "LT", "copy(%d)"),
        ("copy(%d)", 1, "LT", "constant(5)"),
        ("constant(0)", 0, "LT", "constant(5)"),
        ("constant(0)", 1, "EQ", "constant(5)"),
        ("constant(0)", 2, "NE", "constant(5)"),
    ],
)
def test_unknown_trip_counts_come_from_the_caller(start, step, direction, limit):
    found = moved(*loop(start, step, direction, limit), unknown_trips=(11,))
    copied = 8 if "copy" in start + limit else 0
    assert (found.hbm_bytes, found.unknown_loops) == (64 * 11 + copied, ["loop"])


def test_printed_trip_counts_are_used():
    body, before = loop("constant(0)", 1, "LT", "constant(5)")
    found = moved(body + ', backend_config={"known_trip_count":{"n":"13"},"known_init_step":{"init":"0"}}', before)
    assert (found.hbm_bytes, found.unknown_loops) == (64 * 13, [])


def test_a_conditional_counts_as_its_heaviest_branch():
    before = """
%light (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p)
}

%heavy (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %g = f32[8]{0} all-reduce(%q), replica_groups=[1,4]<=[4], to_apply=%add
}
"""
    body = """  %i = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %c = f32[8]{0} conditional(%i, %x, %x, %x), branch_computations={%light, %heavy, %light}"""
    found = moved(body, before)
    assert (found.hbm_bytes, found.collectives) == (64, {"all-reduce": Collective(1, 48)})


def test_an_asynchronous_collective_counts_where_it_starts():
    body = """  %x = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}
  %g = f32[32]{0} all-gather-done(%s)
  %p = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1}}
  %q = f32[8]{0} collective-permute-done(%p)
  %r = f32[32]{0} all-reduce-start(%g), replica_groups={{0,1,2,3}}, to_apply=%add
  %t = f32[32]{0} all-reduce-done(%r)
  %a = ((f32[32]{0}), f32[8]{0}, u32[]{:S(2)}) async-start(%t), calls=%wrapped
  ROOT %d = f32[8]{0} async-done(%a)"""
    before = """
%wrapped (w: f32[32]) -> f32[8] {
  %w = f32[32]{0} parameter(0)
  ROOT %k = f32[8]{0} reduce-scatter(%w), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
}
"""
    found = moved(body, before)
    assert found.collectives == {
        "all-gather": Collective(1, 96),
        "all-reduce": Collective(1, 192),
        "collective-permute": Collective(1, 32),
        "reduce-scatter": Collective(1, 96),
    }
    assert found.hbm_bytes == (32 + 128) + (32 + 32) + (128 + 128) + (128 + 32)


def test_work_of_another_core_counts_where_it_starts():
    """A gather on a SparseCore: its scratch memory is not traffic, and the update passes its operands."""
    body = """  %x = f32[8]{0} parameter(0)
  %rows = s32[3]{0} parameter(1)
  %s = ((), (), (s32[99]{0}, s32[1]{0:S(2)})) custom-call-start(), called_computations={%elsewhere}
  %u = ((f32[8]{0}, s32[3]{0}), f32[3]{0}, (s32[99]{0})) custom-call-update(%s, %x, %rows)
  ROOT %d = f32[3]{0} custom-call-done(%u)"""
    before = """
%run (x: f32[8], rows: s32[3]) -> f32[3] {
  %x = f32[8]{0} parameter(0)
  %rows = s32[3]{0} parameter(1)
  ROOT %g = f32[3]{0} gather(%x, %rows), slice_sizes={1}
}

%elsewhere (x: f32[8], rows: s32[3]) -> f32[3] {
  %x = f32[8]{0} parameter(0)
  %rows = s32[3]{0} parameter(1)
  %c = ((f32[8]{0}, s32[3]{0}), f32[3]{0}, u32[]{:S(8)}) call-start(%x, %rows), to_apply=%run
  ROOT %d = f32[3]{0} call-done(%c)
}
"""
    found = moved(body, before)
    assert (found.hbm_bytes, found.collectives, found.unknown_loops) == (12 + 12 + 12, {}, [])


def test_only_sends_to_the_host_are_host_transfers():
    body = """  %x = f32[8]{0} parameter(0)
  %k = token[] after-all()
  %s = (f32[8]{0}, u32[]{:S(2)}, token[]) send(%x, %k), channel_id=1, is_host_transfer=true
  %d = token[] send-done(%s), channel_id=1, is_host_transfer=true
  %r = (f32[8]{0}, u32[]{:S(2)}, token[]) recv(%d), channel_id=2
  %o = token[] outfeed(%x, %k)
  ROOT %y = f32[8]{0} negate(%x)"""
    found = moved(body)
    assert found.host_transfers == ["s", "o"]
    assert found.hbm_bytes == 32 + 32 + 32 + 64


@pytest.mark.parametrize(
    ("part", "expected"), [(8, {"reduce-scatter": Collective(1, 96)}), (16, {"all-reduce": Collective(1, 192)})]
)
def test_an_all_reduce_that_keeps_one_part_is_a_reduce_scatter(part, expected):
    before = f"""
%all-reduce-scatter (p: f32[32], i: s32[]) -> f32[{part}] {{
  %p = f32[32]{{0}} parameter(0)
  %i = s32[]{{:S(6)}} parameter(1)
  %r = f32[32]{{0}} all-reduce(%p), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %d = f32[{part}]{{0}} dynamic-slice(%r, %i), dynamic_slice_sizes={{{part}}}
}}
"""
    body = f"""  %x = f32[32]{{0}} parameter(0)
  %i = s32[]{{:S(6)}} parameter(1)
  ROOT %f = f32[{part}]{{0}} fusion(%x, %i), kind=kCustom, calls=%all-reduce-scatter"""
    found = moved(body, before)
    assert found.collectives == expected
    assert found.hbm_bytes == 128 + 4 * part


# The gradients of one decoder layer, summed over the four devices of v5e:2x2: one instruction, nine arrays.
ADDED_UP = """
  %all-reduce.156 = (f32[1,64]{1,0:T(1,128)S(1)}, f32[1,192,64]{1,2,0:T(8,128)S(1)}, f32[1,64,192]{2,1,0:T(8,128)S(1)}, f32[1,64,2,32]{1,3,2,0:T(8,128)S(1)}, f32[1,64]{1,0:T(1,128)S(1)}, /*index=5*/f32[1,2,32,64]{3,2,1,0:T(8,128)S(1)}, f32[1,64,2,32]{1,3,2,0:T(8,128)S(1)}, f32[1,64,192]{2,1,0:T(8,128)S(1)}, f32[1,64,2,32]{1,3,2,0:T(8,128)S(1)}) all-reduce(%n, %d, %u, %q, %n, /*index=5*/%o, %q, %u, %q), channel_id=28, replica_groups=mesh['axis_0'=4] {'axis_0'}, use_global_device_ids=true, to_apply=%region_127.135.clone
  ROOT %y = f32[1,64]{1,0:T(1,128)S(1)} get-tuple-element(%all-reduce.156), index=0"""  # noqa: E501


def test_an_all_reduce_of_many_arrays():
    given = """  %n = f32[1,64]{1,0:T(1,128)S(1)} parameter(0)
  %d = f32[1,192,64]{1,2,0:T(8,128)S(1)} parameter(1)
  %u = f32[1,64,192]{2,1,0:T(8,128)S(1)} parameter(2)
  %q = f32[1,64,2,32]{1,3,2,0:T(8,128)S(1)} parameter(3)
  %o = f32[1,2,32,64]{3,2,1,0:T(8,128)} parameter(4)"""
    found = moved(given + ADDED_UP, devices=4)
    weights = 3 * 192 * 64 + 4 * 64 * 64 + 2 * 64
    assert found.collectives == {"all-reduce": Collective(1, 2 * 4 * weights * 3 / 4)}
    assert found.hbm_bytes == 4 * 64 * 64  # Its results and all but one of its operands are in VMEM.


# Shortened TPU text of a gather that is overlapped with products: the same collective, with one channel, occurs in the
# fusion that starts it, in one within a loop that continues it, and in the one that ends it.
OVERLAPPED = """
%fused_computation.429 (param_0.1641: bf16[192,3072]) -> (bf16[192,3072], bf16[3072,3072], s32[2], u32[]) {
  %param_0.1641 = bf16[192,3072]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.93 = bf16[3072,3072]{1,0:T(8,128)(2,1)} all-gather(%param_0.1641), channel_id=44, replica_groups=mesh['axis_0'=16] {'axis_0'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  ROOT %custom-call.50 = (bf16[192,3072]{1,0:T(8,128)(2,1)}, bf16[3072,3072]{1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) custom-call(%all-gather.93), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.475 (param_0.1645: bf16[192,3072], param_1.1745: bf16[3072,3072], param_2.1324: s32[2], param_3.814: u32[], param_4.1: f32[8,128]) -> (bf16[8,128], bf16[192,3072], bf16[3072,3072], bf16[3072,3072], s32[2], /*index=5*/u32[]) {
  %param_4.1 = f32[8,128]{1,0:T(8,128)} parameter(4)
  %convert.427 = bf16[8,128]{1,0:T(8,128)(2,1)} convert(%param_4.1)
  %param_0.1645 = bf16[192,3072]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1745 = bf16[3072,3072]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.95 = bf16[3072,3072]{1,0:T(8,128)(2,1)} all-gather(%param_0.1645), channel_id=44, replica_groups=mesh['axis_0'=16] {'axis_0'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  %param_2.1324 = s32[2]{0:S(4)} parameter(2)
  %param_3.814 = u32[]{:S(2)} parameter(3)
  ROOT %tuple.443 = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[192,3072]{1,0:T(8,128)(2,1)}, bf16[3072,3072]{1,0:T(8,128)(2,1)}, bf16[3072,3072]{1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, /*index=5*/u32[]{:S(2)}) tuple(%convert.427, %param_0.1645, %param_1.1745, %all-gather.95, %param_2.1324, /*index=5*/%param_3.814)
}

%fused_computation.432 (param_0.1652: bf16[192,3072], param_1.1752: bf16[3072,3072], param_2.1332: s32[2], param_3.820: u32[]) -> bf16[3072,3072] {
  %param_0.1652 = bf16[192,3072]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1752 = bf16[3072,3072]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.99 = bf16[3072,3072]{1,0:T(8,128)(2,1)} all-gather(%param_0.1652), channel_id=44, replica_groups=mesh['axis_0'=16] {'axis_0'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  %param_2.1332 = s32[2]{0:S(4)} parameter(2)
  %param_3.820 = u32[]{:S(2)} parameter(3)
  ROOT %custom-call.52 = bf16[3072,3072]{1,0:T(8,128)(2,1)} custom-call(%param_0.1652, %param_1.1752, %all-gather.99, %param_2.1332, %param_3.820), custom_call_target="AsyncCollectiveDone"
}

%wide.body (wide.param.19: (u32[], bf16[192,3072], bf16[3072,3072], s32[2], u32[], /*index=5*/f32[8,128])) -> (u32[], bf16[192,3072], bf16[3072,3072], s32[2], u32[], /*index=5*/f32[8,128]) {
  %constant.2283 = u32[]{:T(128)} constant(2)
  %wide.param.19 = (u32[]{:T(128)}, bf16[192,3072]{1,0:T(8,128)(2,1)}, bf16[3072,3072]{1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, u32[]{:S(2)}, /*index=5*/f32[8,128]{1,0:T(8,128)}) parameter(0)
  %gte.0 = u32[]{:T(128)S(6)} get-tuple-element(%wide.param.19), index=0
  %gte.1 = bf16[192,3072]{1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.19), index=1
  %gte.2 = bf16[3072,3072]{1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.19), index=2
  %gte.3 = s32[2]{0:S(4)} get-tuple-element(%wide.param.19), index=3
  %gte.4 = u32[]{:S(2)} get-tuple-element(%wide.param.19), index=4
  %gte.5 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%wide.param.19), index=5
  %fusion.475 = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[192,3072]{1,0:T(8,128)(2,1)}, bf16[3072,3072]{1,0:T(8,128)(2,1)}, bf16[3072,3072]{1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, /*index=5*/u32[]{:S(2)}) fusion(%gte.1, %gte.2, %gte.3, %gte.4, %gte.5), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {}), {4}: (2, {}), {5}: (3, {})}, calls=%async_collective_fusion.475
  %gte.6 = bf16[192,3072]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.475), index=1
  %gte.7 = bf16[3072,3072]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.475), index=2
  %gte.8 = s32[2]{0:S(4)} get-tuple-element(%fusion.475), index=4
  %gte.9 = u32[]{:S(2)} get-tuple-element(%fusion.475), index=5
  %add.2233 = u32[]{:T(128)S(6)} add(%gte.0, %constant.2283)
  ROOT %tuple.9 = (u32[]{:T(128)}, bf16[192,3072]{1,0:T(8,128)(2,1)}, bf16[3072,3072]{1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, u32[]{:S(2)}, /*index=5*/f32[8,128]{1,0:T(8,128)}) tuple(%add.2233, %gte.6, %gte.7, %gte.8, %gte.9, /*index=5*/%gte.5)
}

%wide.condition (wide.param.80: (u32[], bf16[192,3072], bf16[3072,3072], s32[2], u32[], /*index=5*/f32[8,128])) -> pred[] {
  %constant.2207 = u32[]{:T(128)S(6)} constant(8)
  %wide.param.80 = (u32[]{:T(128)}, bf16[192,3072]{1,0:T(8,128)(2,1)}, bf16[3072,3072]{1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, u32[]{:S(2)}, /*index=5*/f32[8,128]{1,0:T(8,128)}) parameter(0)
  %get-tuple-element.2285 = u32[]{:T(128)S(6)} get-tuple-element(%wide.param.80), index=0
  ROOT %compare.131 = pred[]{:T(512)S(6)} compare(%get-tuple-element.2285, %constant.2207), direction=LT
}
"""  # noqa: E501
OVERLAPPED_ENTRY = """  %w = bf16[192,3072]{1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} parameter(1)
  %constant.0 = u32[]{:T(128)S(6)} constant(0)
  %async-collective-start = (bf16[192,3072]{1,0:T(8,128)(2,1)}, bf16[3072,3072]{1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) fusion(%w), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%fused_computation.429
  %g.0 = bf16[192,3072]{1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=0
  %g.1 = bf16[3072,3072]{1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=1
  %g.2 = s32[2]{0:S(4)} get-tuple-element(%async-collective-start), index=2
  %g.3 = u32[]{:S(2)} get-tuple-element(%async-collective-start), index=3
  %state = (u32[]{:T(128)}, bf16[192,3072]{1,0:T(8,128)(2,1)}, bf16[3072,3072]{1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, u32[]{:S(2)}, /*index=5*/f32[8,128]{1,0:T(8,128)}) tuple(%constant.0, %g.0, %g.1, %g.2, %g.3, /*index=5*/%x)
  %while.753 = (u32[]{:T(128)}, bf16[192,3072]{1,0:T(8,128)(2,1)}, bf16[3072,3072]{1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, u32[]{:S(2)}, /*index=5*/f32[8,128]{1,0:T(8,128)}) while(%state), condition=%wide.condition, body=%wide.body
  %h.0 = bf16[192,3072]{1,0:T(8,128)(2,1)} get-tuple-element(%while.753), index=1
  %h.1 = bf16[3072,3072]{1,0:T(8,128)(2,1)} get-tuple-element(%while.753), index=2
  %h.2 = s32[2]{0:S(4)} get-tuple-element(%while.753), index=3
  %h.3 = u32[]{:S(2)} get-tuple-element(%while.753), index=4
  ROOT %async-collective-done = bf16[3072,3072]{1,0:T(8,128)(2,1)} fusion(%h.0, %h.1, %h.2, %h.3), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%fused_computation.432"""  # noqa: E501


def test_an_overlapped_collective_counts_once():
    found = moved(OVERLAPPED_ENTRY, OVERLAPPED, devices=16)
    gathered, shard, turns = 3072 * 3072 * 2, 192 * 3072 * 2, 4
    assert found.collectives == {"all-gather": Collective(1, gathered * 15 / 16)}
    assert found.unknown_loops == []
    # The gather's traffic counts where it starts; an iteration adds its conversion and the step of its counter.
    assert found.hbm_bytes == shard + gathered + turns * (8 * 128 * 4 + 8 * 128 * 2 + 4)
