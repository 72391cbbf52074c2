"""The reader of compiled programs, on a text in which everything that it knows occurs once."""

from __future__ import annotations

import pytest

from vixml_jax.planning.compiled_text import Array, Program

TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[]}

%region_0.3 (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[]{:T(128)} parameter(0)
  %b.1 = f32[]{:T(128)} parameter(1)
  ROOT %add.9 = f32[]{:T(128)} add(%a.1, %b.1)
}

%fused_computation (param_0.1: f32[3,8,4], param_1.2: s32[]) -> bf16[8,4] {
  %param_0.1 = f32[3,8,4]{2,1,0:T(8,128)} parameter(0)
  %param_1.2 = s32[]{:T(128)} parameter(1)
  %slice.1 = f32[1,8,4]{2,1,0} dynamic-slice(%param_0.1, %param_1.2), dynamic_slice_sizes={1,8,4}
  ROOT %convert.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} convert(%slice.1), metadata={op_name="jit(step)/cast"}
}

%body.7 (p: (s32[], f32[3,8,4])) -> (s32[], f32[3,8,4]) {
  %p = (s32[]{:T(128)}, f32[3,8,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = f32[3,8,4]{2,1,0} get-tuple-element(%p), index=1
  %fusion.2 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %i), kind=kLoop, calls=%fused_computation
  ROOT %t = (s32[], f32[3,8,4]{2,1,0}) tuple(%i, %w)
}

%condition.8 (q: (s32[], f32[3,8,4])) -> pred[] {
  %q = (s32[], f32[3,8,4]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main.20 (x: f32[8,4], w.1: f32[3,8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %w.1 = f32[3,8,4]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], /*index=1*/f32[3,8,4]{2,1,0}) tuple(s32[] %zero, f32[3,8,4]{2,1,0} %w.1)
  %loop = (s32[], f32[3,8,4]{2,1,0}) while(%start), condition=%condition.8, body=%body.7
  %again = (s32[], f32[3,8,4]{2,1,0}) while(%loop), condition=%condition.8, body=%body.7, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %sum = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%region_0.3, \
metadata={op_name="jit(step)/psum, \\"of\\" it" source_line=3}
}
"""


@pytest.fixture(scope="module")
def program():
    return Program(TEXT)


def test_computations_and_their_results(program):
    assert list(program.computations) == [
        *("region_0.3", "fused_computation", "body.7", "condition.8", "main.20")
    ]
    assert program.entry == "main.20"
    assert program.computations["condition.8"].root.name == "less"
    assert {n: i.name for n, i in program.computations["main.20"].parameters.items()} == {0: "x", 1: "w.1"}


def test_an_instruction(program):
    entry = program.computations["main.20"].instructions
    fusion = program.computations["body.7"].instructions["fusion.2"]
    assert fusion.arrays == (Array("bf16", (8, 4), "{1,0:T(8,128)(2,1)S(1)}"),)
    assert (fusion.nbytes, fusion.arrays[0].on_chip, entry["x"].arrays[0].on_chip) == (64, True, False)
    assert fusion.operands == ("w", "i")
    assert fusion.called("calls") == "fused_computation"
    assert fusion.attribute("kind") == "kLoop"
    assert entry["start"].operands == ("zero", "w.1")
    assert [array.dims for array in entry["start"].arrays] == [(), (3, 8, 4)]
    assert entry["sum"].attribute("replica_groups") == "{{0,1},{2,3}}"
    assert entry["sum"].source.startswith("jit(step)/psum")
    assert not entry["sum"].attribute("groups")


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [("f32", 48), ("bf16", 24), ("pred", 12), ("s4", 6), ("f8e4m3fn", 12), ("c64", 96), ("token", 0)],
)
def test_bytes(dtype, nbytes):
    assert Array(dtype, (3, 4)).nbytes == nbytes


def test_loops_are_multiplied_out(program):
    """The first loop's length stands in its condition, the second's beside it."""
    times = {}
    for use in program.uses():
        times.setdefault(use.instruction.name, []).append((use.times, use.fused))
    assert times["fusion.2"] == [(3, False), (5, False)]
    assert times["slice.1"] == [(3, True), (5, True)]
    assert times["sum"] == [(1, False)]
    assert "add.9" not in times  # a reduction's own function is not work of the program


def test_a_loop_may_count_in_larger_steps():
    """A product whose operand is gathered piece by piece takes two pieces a turn."""
    step = "  %one = s32[] constant(1)\n  %more = s32[] add(%i, %one)\n  %next = s32[] add(%one, %more)\n"
    text = TEXT.replace("  ROOT %t = (s32[], f32[3,8,4]{2,1,0}) tuple(%i, %w)",
                        f"{step}  ROOT %t = (s32[], f32[3,8,4]{{2,1,0}}) tuple(%next, %w)")  # fmt: skip
    assert text != TEXT
    turns = [use.times for use in Program(text).uses() if use.instruction.name == "fusion.2"]
    assert turns == [2, 5]  # 0 and 2 are below 3; the other loop says its own


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no entry"):
        Program("func.func public @main(%arg0: tensor<8xf32>)")
