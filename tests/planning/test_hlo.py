"""Small programs as the compiler writes them, and what they cost."""

import jax
import jax.numpy as jnp
import pytest

from aromni_jax.planning import hlo


def cost(text, wire=lambda collective: ("ICI", collective.nbytes)):
  """With 1 operation and 1 byte a second: seconds are counts."""
  return hlo.cost(hlo.Module(text), 1.0, 1.0, wire)


NESTED = """HloModule nested, is_scheduled=true

%inner_condition (c: (s32[], f32[8,8])) -> pred[] {
  %c = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%inner_body (b: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %b = (s32[], f32[8,8]{1,0}) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%b), index=1
  %j = s32[] get-tuple-element(%b), index=0
  %y = f32[8,8]{1,0:T(8,128)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[8,8]{1,0}) tuple(%j, %y)
}

%outer_condition (oc: (s32[], f32[8,8])) -> pred[] {
  %oc = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %unread = pred[] custom-call(%oc), custom_call_target="more"
}

%outer_body (ob: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %ob = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %inner = (s32[], f32[8,8]{1,0}) while(%ob), condition=%inner_condition, body=%inner_body
}

ENTRY %main (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %outer = (s32[], /*index=1*/f32[8,8]{1,0}) while(%p), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_loops_in_loops_are_multiplied():
  module = hlo.Module(NESTED)
  loops = {i.name: i for b in module.computations.values() for i in b.values()}
  assert module.trip_count(loops["outer"]) == 3  # known
  assert module.trip_count(loops["inner"]) == 5  # read from its condition
  found = cost(NESTED)
  assert found.flops == 3 * 5 * 2 * 8 * 8 * 8
  assert found.seconds == found.compute == found.flops  # 1024 operations, 768 bytes


def test_a_loop_of_unknown_length_is_refused():
  text = NESTED.replace("%n = s32[] constant(5)", "%n = s32[] get-tuple-element(%c), index=0")
  with pytest.raises(ValueError, match="trip count of the loop inner is not known"):
    cost(text)


def test_loops_that_the_compiler_wrote():
  """The CPU's: 7 products in a loop, in one of 3."""

  def step(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

  def nest(x, w):
    return jax.lax.fori_loop(0, 3, lambda _, x: step(x, w), x)

  x, w = jnp.zeros((16, 32)), jnp.zeros((32, 32))
  compiled = jax.jit(nest).lower(x, w).compile()
  assert cost(compiled.as_text()).flops == 3 * 7 * 2 * 16 * 32 * 32


@pytest.mark.parametrize("index", [jnp.int32(1), jnp.bool_(True)])
def test_of_branches_the_longest_counts(index):
  def two(x):
    return x @ x @ x

  def one(x):
    return jnp.sin(x @ x)

  x = jnp.zeros((64, 64))
  if index.dtype == bool:
    function = jax.jit(lambda i, x: jax.lax.cond(i, two, one, x))
  else:
    function = jax.jit(lambda i, x: jax.lax.switch(i, [one, two, jnp.cos], x))
  text = function.lower(index, x).compile().as_text()
  assert "conditional(" in text
  assert cost(text).flops == 2 * 2 * 64**3


def test_of_predicated_branches_the_longest_counts():
  text = """
%yes (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %y = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%no (b: f32[8,8]) -> f32[8,8] {
  %b = f32[8,8]{1,0} parameter(0)
  ROOT %n = f32[8,8]{1,0} copy(%b)
}

ENTRY %main (q: pred[], p: f32[8,8]) -> f32[8,8] {
  %q = pred[] parameter(0)
  %p = f32[8,8]{1,0} parameter(1)
  ROOT %c = f32[8,8]{1,0} conditional(%q, %p, %p), true_computation=%yes, false_computation=%no
}
"""
  assert cost(text).flops == 2 * 8**3


def entry(*lines, arguments=""):
  return "\n".join([f"ENTRY %main ({arguments}) -> f32[] {{", *(f"  {s}" for s in lines), "}"])


def test_products():
  batched = entry(
    "%a = bf16[4,16,32]{2,1,0} parameter(0)",
    "%b = bf16[4,32,64]{2,1,0} parameter(1)",
    "ROOT %d = bf16[4,16,64]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
    "rhs_batch_dims={0}, rhs_contracting_dims={1}",
  )
  assert cost(batched).flops == 2 * 4 * 16 * 64 * 32


def convolution(lhs, rhs, out, labels, window=""):
  return entry(
    f"%a = bf16[{lhs}]{{2,1,0}} parameter(0)",
    f"%b = bf16[{rhs}]{{2,1,0}} parameter(1)",
    f"ROOT %d = bf16[{out}]{{2,1,0:T(8,128)(2,1)}} convolution(%a, %b), {window}"
    f"dim_labels={labels}",
  )


def test_products_that_a_tpu_writes_as_convolutions():
  """A window that hangs over on both sides computes only what lies inside."""
  plain = convolution("256,512", "512,128", "256,128", "bf_io->bf")
  assert cost(plain).flops == 2 * 256 * 512 * 128
  heads = convolution(
    "4096,4096,1",
    "32,128,4096",
    "4096,32,128",
    "bf0_0oi->b0f",
    "window={size=32 pad=31_31 rhs_reversal=1}, ",
  )
  assert cost(heads).flops == 2 * 4096 * 4096 * 4096
  batched = convolution(
    "4,16,32",
    "4,32,64",
    "4,16,64",
    "0bf_0io->0bf",
    "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, ",
  )  # a batch dimension: every place sees one kernel
  assert cost(batched).flops == 2 * 4 * 16 * 32 * 64


def test_convolutions():
  """Kernel 3, padding 1, of 8 places: the two at the ends see 2."""
  text = convolution("2,8,16", "3,16,32", "2,8,32", "b0f_0io->b0f", "window={size=3 pad=1_1}, ")
  assert cost(text).flops == 2 * 2 * 16 * 32 * (3 * 8 - 2)


FUSIONS = """
%slicing (s: f32[12,100], i: s32[]) -> f32[100] {
  %s = f32[12,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,100]{1,0} dynamic-slice(%s, %i, %zero), dynamic_slice_sizes={1,100}
  ROOT %row = f32[100]{0} bitcast(%slice)
}

%updating (t: f32[12,100], u: f32[1,100], j: s32[]) -> f32[12,100] {
  %t = f32[12,100]{1,0} parameter(0)
  %u = f32[1,100]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %none = s32[] constant(0)
  %double = f32[1,100]{1,0} add(%u, %u)
  ROOT %new = f32[12,100]{1,0} dynamic-update-slice(%t, %double, %j, %none)
}

%whole (w: f32[12,100]) -> f32[12,100] {
  %w = f32[12,100]{1,0} parameter(0)
  ROOT %sine = f32[12,100]{1,0} sine(%w)
}

"""


@pytest.mark.parametrize(
  "line, nbytes",
  [
    # A row of 400 bytes is read, and written; the index has 4.
    ("fusion(%p, %k), kind=kLoop, calls=%slicing", 400 + 400 + 4),
    ("fusion(%p, %r, %k), kind=kLoop, calls=%updating", 400 + 400 + 4),
    ("fusion(%p), kind=kLoop, calls=%whole", 2 * 4800),
    ("dynamic-update-slice(%p, %r, %k, %k)", 2 * 400),
    ("sine(%p)", 2 * 4800),
    ("sine(%near)", 4800),  # the operand lies in the chip's own memory
  ],
)
def test_bytes(line, nbytes):
  shape = "f32[100]{0}" if "slicing" in line else "f32[12,100]{1,0}"
  text = FUSIONS + entry(
    "%p = f32[12,100]{1,0} parameter(0)",
    "%near = f32[12,100]{1,0:T(8,128)S(1)} parameter(3)",
    "%r = f32[1,100]{1,0} parameter(1)",
    "%k = s32[] parameter(2)",
    f"ROOT %f = {shape} {line}",
  )
  assert cost(text).seconds == cost(text).memory == nbytes


def test_local_memory_costs_nothing():
  text = entry(
    "%p = f32[12,100]{1,0:S(1)} parameter(0)",
    "ROOT %f = f32[12,100]{1,0:T(8,128)S(1)} sine(%p)",
  )
  assert cost(text).seconds == 0


def between(first, *middle, last):
  """A program that starts something, multiplies (1024 s) as often, and waits."""
  dots = [
    f"%d{i} = f32[8,8]{{1,0}} dot(%p, %p), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
    for i in range(len(middle))
  ]
  return entry(
    "%p = f32[8,8]{1,0} parameter(0)",
    "%far = f32[400]{0} parameter(1)",
    first,
    *dots,
    "ROOT %end = " + last,
  )


COPY = "%s = (f32[400]{0:S(1)}, f32[400]{0}, u32[]{:S(2)}) copy-start(%far)"
COPIED = "f32[400]{0:S(1)} copy-done(%s)"
GATHER = (
  "%s = (f32[50]{0}, f32[400]{0}) all-gather-start(%far), channel_id=1, "
  "replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}"
)
GATHERED = "f32[400]{0} all-gather-done(%s)"


@pytest.mark.parametrize(
  "start, done, kind", [(COPY, COPIED, "copy_waits"), (GATHER, GATHERED, "wire_waits")]
)
def test_what_goes_on_beside_a_product_is_hidden_and_waited_for(start, done, kind):
  """A copy or a gather of 1600 bytes, that is seconds, beside products of 1024 s."""
  alone, some, enough = (cost(between(start, *"x" * n, last=done)) for n in range(3))
  for found, waits, seconds in ((alone, 1600, 1600), (some, 576, 1600), (enough, 0, 2048)):
    assert getattr(found, kind) == waits
    assert found.seconds == seconds
    assert found.copy_waits + found.wire_waits == waits


def test_copies_share_the_memory_and_collectives_their_network():
  two = between(
    GATHER + "\n  " + GATHER.replace("%s", "%s2").replace("channel_id=1", "channel_id=2"),
    last="f32[400]{0} all-gather-done(%s2)",
  )
  assert cost(two).wire_waits == 3200
  apart = iter(("ICI", "DCN"))
  assert cost(two, wire=lambda c: (next(apart), c.nbytes)).wire_waits == 1600


def test_a_collective_that_is_not_asynchronous_is_waited_for():
  text = entry(
    "%p = f32[400]{0} parameter(0)",
    "ROOT %r = f32[50]{0} reduce-scatter(%p), channel_id=3, replica_groups=[1,8]<=[8], "
    "dimensions={0}, to_apply=%add",
  )
  found = cost(text)
  assert found.seconds == found.wire_waits == 1600  # of the whole array
  (collective, count, seconds) = found.collectives[0]
  assert (collective.opcode, collective.group) == ("reduce-scatter", tuple(range(8)))
  assert (collective.shape, count, seconds) == ("f32[50]", 1, 1600)


def test_collectives_in_loops_are_counted_as_often():
  (dot,) = (line for line in NESTED.splitlines() if " dot(" in line)
  reduce = "%y = f32[8,8]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add"
  found = cost(NESTED.replace(dot, f"  {reduce}"))
  ((collective, count, seconds),) = found.collectives
  assert (collective.opcode, count, seconds) == ("all-reduce", 15, 256)
  assert found.seconds == found.wire_waits == 15 * 256


FUSED = """
%start (a: f32[50]) -> (f32[50], f32[400]) {
  %a = f32[50]{0} parameter(0)
  %g = f32[400]{0} all-gather(%a), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %h = (f32[50]{0}, f32[400]{0}) custom-call(%a, %g), custom_call_target="AsyncCollectiveStart"
}

%beside (b: f32[8,8], c: f32[400]) -> f32[8,8] {
  %b = f32[8,8]{1,0} parameter(0)
  %c = f32[400]{0} parameter(1)
  %go = f32[400]{0} all-gather(%c), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %d = f32[8,8]{1,0} dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%done (e: f32[400]) -> f32[400] {
  %e = f32[400]{0} parameter(0)
  %f = f32[400]{0} all-gather(%e), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %z = f32[400]{0} custom-call(%f), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: f32[8,8], q: f32[50]) -> f32[400] {
  %p = f32[8,8]{1,0} parameter(0)
  %q = f32[50]{0:S(1)} parameter(1)
  %s = (f32[50]{0}, f32[400]{0:S(1)}) fusion(%q), kind=kCustom, calls=%start
  %half = f32[400]{0:S(1)} get-tuple-element(%s), index=1
  %y = f32[8,8]{1,0} fusion(%p, %half), kind=kOutput, calls=%beside
  ROOT %all = f32[400]{0} fusion(%half), kind=kCustom, calls=%done
}
"""


def test_collectives_that_are_fused_with_products():
  """A TPU's: one part starts it, one goes on beside a product, one waits; the gather is one."""
  found = cost(FUSED)
  ((collective, count, _),) = found.collectives
  assert (collective.opcode, count, collective.nbytes) == ("all-gather", 1, 1600)
  assert found.flops == found.compute == 1024
  assert found.wire_waits == 576 and found.seconds == 1600


@pytest.mark.parametrize(
  "groups, group",
  [
    ("replica_groups={{0,1},{2,3}}", (0, 1)),
    ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
    ("source_target_pairs={{0,1},{1,0}}", (0, 1)),
    ("replica_groups={}", ()),
  ],
)
def test_groups(groups, group):
  text = entry(
    "%p = bf16[400]{0} parameter(0)",
    f"ROOT %r = bf16[400]{{0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add",
  )
  assert cost(text).collectives[0][0].group == group


def test_splash_kernels_count_the_blocks_below_the_diagonal():
  """[2, 4, 1024, 128] in blocks of 256: 10 of 16 blocks; three, two and four products of each."""
  for kind, products in (("fwd", 2), ("dq", 3), ("dkv", 4)):
    text = entry(
      "%q = bf16[2,4,1024,128]{3,2,1,0} parameter(0)",
      "ROOT %o = bf16[2,4,1024,128]{3,2,1,0} custom-call(%q, %q, %q), "
      'custom_call_target="tpu_custom_call", metadata={op_name="splash_mha_' + kind + '"}, '
      r'backend_config={"x": "\"block_q\": 256"}',
    )
    assert cost(text).flops == products * 2 * 2 * 4 * 128 * (10 * 256 * 256)
