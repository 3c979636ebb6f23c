"""Parsing the text of compiled programs."""

import pytest

from popi_jax.modes.cost import collectives, hlo


@pytest.mark.parametrize(
    ("text", "size", "spaces"),
    [
        ("f32[8,128]{1,0}", 4096, [0]),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048, [1]),
        ("pred[]{:T(512)}", 1, [0]),
        ("s32[<=5,2]", 40, [0]),
        ("f8e4m3fn[3]", 3, [0]),
        ("u4[4]{0:E(4)}", 2, [0]),
        ("c64[2]", 16, [0]),
        ("token[]", 0, [0]),
        ("()", 0, []),
        ("((u8[7]{0}, bf16[2]), f32[1]{0:T(128)S(1)}, u32[]{:S(2)}, token[])", 7 + 4 + 4 + 4, [0, 0, 1, 2, 0]),
    ],
)
def test_bytes_of_shapes(text, size, spaces):
    shape = hlo.shape(text)
    assert shape.bytes == size
    assert [leaf.memory_space for leaf in hlo.leaves(shape)] == spaces


def test_parse_with_and_without_percent_signs_and_operand_shapes():
    text = """HloModule m, num_partitions=4, replica_count=2

FileNames
1 "a {"

helper (p: f32[2]) -> f32[2] {
  p = f32[2]{0} parameter(0)
  ROOT kernel = (f32[2]{0}, s32[]) custom-call(f32[2]{0} p, p), custom_call_target="k(,", frontend_attributes={meta={
"a":"{\\"b\\": 1"
}}, metadata={op_name="jit(f)/a, calls=b"}, backend_config={"n":"}"}
}

ENTRY %main.1 (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0), sharding={replicated}
  %c = s32[2]{0} constant({1, 2})
  ROOT %y = f32[2]{0} fusion(%x, /*index=1*/%c), kind=kLoop, calls=%helper
}
"""
    module = hlo.parse(text)
    assert (module.entry, module.devices, list(module.computations)) == ("main.1", 8, ["helper", "main.1"])
    kernel = module.computations["helper"].root
    assert (kernel.name, kernel.opcode, kernel.operands) == ("kernel", "custom-call", ("p", "p"))
    assert kernel.attributes["custom_call_target"] == '"k(,"'
    assert kernel.attributes["backend_config"] == '{"n":"}"}'
    assert "calls" not in kernel.attributes
    fusion = module.computations["main.1"].root
    assert (fusion.operands, fusion.computation("calls")) == (("x", "c"), "helper")
    assert module.computations["main.1"].instructions["c"].literal == "{1, 2}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HloModule m\n", "no ENTRY"),
        ("ENTRY %e (x: f32[2]) -> f32[2] {\n  %x = f32[2] parameter(0)\n", "ends within computation 'e'"),
        ("ENTRY %e () -> f32[2] {\nnonsense\n}\n", "not an HLO instruction"),
        ("ENTRY %e () -> f32[2] {\n  ROOT %x = float[2] parameter(0)\n}\n", None),
    ],
)
def test_invalid_text_raises(text, message):
    if message is None:
        with pytest.raises(ValueError, match="'float' has no known size"):
            next(hlo.leaves(hlo.parse(text).computations["e"].root.shape)).bytes  # noqa: B018
    else:
        with pytest.raises(ValueError, match=message):
            hlo.parse(text)


def instruction(line):
    return hlo.parse(f"ENTRY e () -> f32[] {{\n  {line}\n}}\n").computations["e"].root


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3}}", 2),
        ("{{0,1,2},{3}}", 3),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=16] {'axis_0'}", 16),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_1'}", 2),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0','axis_1'}", 16),
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", 2),
        ("mesh['a'=8] {'a':(1)2}", 2),
        ("{}", 8),
    ],
)
def test_sizes_of_replica_groups(groups, size):
    i = instruction(f"ROOT r = f32[] all-reduce(), channel_id=1, replica_groups={groups}, to_apply=add")
    assert collectives.group_size(i, 8) == size


def test_unknown_forms_of_replica_groups_raise():
    with pytest.raises(ValueError, match="not understood"):
        collectives.group_size(instruction("ROOT r = f32[] all-reduce(), replica_groups=all, to_apply=add"), 8)
