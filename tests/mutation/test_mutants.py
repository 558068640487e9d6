"""The changes themselves; `make mutate` runs tests on them (docs/testing.md)."""

import ast

import pytest

from tests.mutation.__main__ import ROOT, TESTS, nearest
from tests.mutation.mutants import mutants
from tests.mutation.named import NAMED

SOURCE = '''"""A module."""
import jax

def f(x: int | None, weights, flag=True) -> float:
  """Doc, 1 + 1."""
  if x is None:
    raise ValueError(f"x is {x + 1}")
  logging.info("a", 1)
  x += 2
  out["x"] = x
  y = zip(x, strict=True)
  return jnp.sum(weights * x, axis=0) + abs(x)
'''


def test_every_kind_of_change_is_made_once_and_alone():
  found = [(line, what) for line, what, _ in mutants(SOURCE)]
  texts = [text for *_, text in mutants(SOURCE)]
  plain = ast.unparse(ast.parse(SOURCE))
  assert len(set(texts)) == len(texts) and plain not in texts
  for text in texts:
    changed = [(a, b) for a, b in zip(plain.split("\n"), text.split("\n"), strict=True) if a != b]
    assert len(changed) == 1, changed
  for line, what in (
    (4, "True  ->  False"),
    (6, "x is None  ->  x is not None"),
    (9, "x += 2  ->  pass"),
    (9, "x += 2  ->  x -= 2"),
    (9, "2  ->  3"),
    (10, "out['x'] = x  ->  pass"),
    (12, "weights * x  ->  weights"),
    (12, "weights * x  ->  x"),
    (12, "weights * x  ->  weights / x"),
    (12, "jnp.sum(weights * x, axis=0)  ->  jnp.sum(weights * x)"),
    (12, "jnp.sum(weights * x, axis=0)  ->  jnp.mean(weights * x, axis=0)"),
    (12, "abs(x)  ->  x"),
  ):
    assert (line, what) in found
  assert not any(line in (1, 2, 5, 7, 8, 11) for line, _ in found)


@pytest.mark.parametrize("name", NAMED)
def test_named_mistakes_can_still_be_made(name):
  file, code, mistake = NAMED[name]
  source = (ROOT / file).read_text()
  assert source.count(code) == 1, f"{file} has {source.count(code)} of {code!r}; change named.py"
  ast.parse(source.replace(code, mistake))


def test_the_tests_that_should_notice_exist():
  for file in TESTS:
    assert (ROOT / file).exists(), file
    for test in nearest(file):
      assert (ROOT / test).exists(), test
