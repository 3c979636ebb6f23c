"""The benchmark's profile, by hand. test_benchmarks traces a run, in a process of its own."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import profile, summary
from popi_jax.modes.cost import hlo

TEXT = """HloModule jit_step

%fused_dot (a: f32[2,4], b: f32[4,2]) -> f32[2,2] {
  %a = f32[2,4]{1,0} parameter(0)
  %b = f32[4,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[2,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/transpose(jvp(mlp))/dot_general"}
}

%fused_slice (c: f32[3,4,2]) -> f32[4,2] {
  %c = f32[3,4,2]{2,1,0} parameter(0)
  %slice.1 = f32[1,4,2]{2,1,0} slice(%c), slice={[0:1], [0:4], [0:2]}
  ROOT %bitcast.1 = f32[4,2]{1,0} bitcast(%slice.1)
}

ENTRY %main (x: f32[2,4], w: f32[3,4,2]) -> f32[2,2] {
  %x = f32[2,4]{1,0} parameter(0)
  %w = f32[3,4,2]{2,1,0} parameter(1)
  %fusion.1 = f32[4,2]{1,0} fusion(%w), kind=kLoop, calls=%fused_slice, metadata={op_name="jit(embed)/while/body/slice"}
  %fusion.2 = f32[2,2]{1,0} fusion(%x, %fusion.1), kind=kCustom, calls=%fused_dot, metadata={op_name="jit(step)/reduce_max"}
  ROOT %tanh.1 = f32[2,2]{1,0} tanh(%fusion.2), metadata={op_name="jit(step)/decode/while/body/attend/tanh"}
}
"""  # noqa: E501
# Another program whose operations have the same names.
OTHER = TEXT.replace("mlp", "qkv")


def test_shares_by_hand():
    programs = {6: hlo.parse(OTHER), 7: hlo.parse(TEXT)}
    # XLA is busy from 1 to 5 and from 6 to 8 of 10 microseconds: the product overlaps the copy.
    events = [(7, "fusion.1", 1000, 2000), (7, "fusion.2", 2000, 3000), (7, "tanh.1", 6000, 2000)]
    found = profile.shares(events, programs, seconds=1e-5)
    assert found["busy"] == pytest.approx(0.6)
    assert found["kinds"] == pytest.approx({"products": 3 / 7, "copies": 2 / 7, "arithmetic": 2 / 7})
    assert found["parts"] == pytest.approx({"backward mlp": 3 / 7, "else": 2 / 7, "decode attend": 2 / 7})
    assert profile.shares([(6, "fusion.2", 0, 1)], programs, 1)["parts"] == {"backward qkv": 1}


def test_a_nameless_operation_is_part_of_what_reads_it():
    nameless = TEXT.replace(', metadata={op_name="jit(step)/reduce_max"}', "").replace(
        ', metadata={op_name="jit(step)/transpose(jvp(mlp))/dot_general"}', ""
    )
    found = profile.shares([(7, "fusion.2", 0, 1)], {7: hlo.parse(nameless)}, 1)
    assert (found["kinds"], found["parts"]) == ({"products": 1}, {"decode attend": 1})
    # If nothing that reads it has a name either, it is part of what feeds it.
    nameless = nameless.replace(', metadata={op_name="jit(step)/decode/while/body/attend/tanh"}', "")
    named = nameless.replace("body/slice", "body/o/slice")
    assert profile.shares([(7, "tanh.1", 0, 1)], {7: hlo.parse(named)}, 1)["parts"] == {"o": 1}
    without = named.replace(', metadata={op_name="jit(embed)/while/body/o/slice"}', "")
    assert profile.shares([(7, "tanh.1", 0, 1)], {7: hlo.parse(without)}, 1)["parts"] == {"else": 1}


def test_a_program_s_number():
    compiled = [jax.jit(lambda x, n=n: x + n).lower(jnp.ones(3)).compile() for n in (1, 2)]
    protos = [c.runtime_executable().hlo_modules()[0].as_serialized_hlo_module_proto() for c in compiled]
    first, second = map(profile.program_id, protos)
    assert second > first > 0
    assert profile.program_id(b"\x0a\x02ab\x20\x01\x28\xac\x02\x30\x07") == 300  # 0xac 0x02 is 44 + 2 * 128.
    assert profile.program_id(b"\x0a\x02ab") == 0


def test_the_table_shows_a_case_once():
    def row(case, **ours):
        return {"case": case, "ours": ours}

    known = {"kinds": {"products": 0.75, "arithmetic": 0.25}, "parts": {"mlp": 0.6, "else": 0.4}, "busy": 0.9}
    rows = [row("a"), row("b", profile=known), {"case": "c", "note": "failed"}, row("b", profile=known | {"busy": 0.1})]
    assert summary.profile_cells(rows) == [("b", "75%", "0%", "25%", "mlp 60%, else 40%", "90%")]
    side = summary.side({}, [{"seconds": 1.0}], {"peak_bytes": 1, "profile": known}, 1)
    assert side["profile"] == known
