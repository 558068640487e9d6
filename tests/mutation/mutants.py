"""Small changes of a source file, each of which some test should notice."""

import ast
import copy
from collections.abc import Iterator

_COMPARE = {
  ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
  ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_ARITHMETIC = {
  ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
  ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
  ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
# Operators of which one side alone is what somebody forgot: weight * loss, loss + z_loss.
_ONE_SIDE = (ast.Mult, ast.BitAnd, ast.BitOr, ast.Add)
_NAMES = {
  "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all",
  "all": "any", "sum": "mean", "mean": "sum", "zeros": "ones", "ones": "zeros",
}  # fmt: skip
_SILENT = ("logging", "warnings")
_CHECKS = ("strict",)  # arguments of no effect on what is right


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
  """Yields (line, what was changed, the changed source) of a module.

  Left alone are docstrings and other strings, annotations, decorators, imports, what an error says,
  logging, and `strict` of zip.
  """
  tree = ast.parse(source)
  for node, put in list(_sites(tree)):
    old = ast.unparse(node)
    for new in _changes(node):
      put(new)
      text = ast.unparse(ast.fix_missing_locations(tree))
      put(node)
      yield node.lineno, f"{_short(old)}  ->  {_short(ast.unparse(new))}", text


def _short(text: str) -> str:
  line = " ".join(text.split())
  return line if len(line) <= 100 else f"{line[:97]}..."


def _sites(node: ast.AST) -> Iterator[tuple[ast.AST, object]]:
  """Yields every node that may be changed, with a function that puts another in its place."""
  for name, value in ast.iter_fields(node):
    if name in ("annotation", "returns", "decorator_list"):
      continue
    for i, child in enumerate(value if isinstance(value, list) else [value]):
      if not isinstance(child, ast.AST) or _is_skipped(child):
        continue
      if isinstance(child, (ast.expr, ast.stmt)):
        if isinstance(value, list):
          yield child, lambda new, value=value, i=i: value.__setitem__(i, new)
        else:
          yield child, lambda new, node=node, name=name: setattr(node, name, new)
      yield from _sites(child)


def _is_skipped(node: ast.AST) -> bool:
  if isinstance(node, ast.Expr):
    node = node.value
  if isinstance(node, ast.Call):
    root = node.func
    while isinstance(root, ast.Attribute):
      root = root.value
    return isinstance(root, ast.Name) and root.id in _SILENT
  if isinstance(node, ast.keyword):
    return node.arg in _CHECKS
  text = isinstance(node, ast.Constant) and isinstance(node.value, str)
  return text or isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr))


def _changes(node: ast.AST) -> Iterator[ast.AST]:
  """Yields the nodes that may stand in place of one."""
  match node:
    case ast.Compare(ops=[op], left=left, comparators=right) if type(op) in _COMPARE:
      yield ast.Compare(left, [_COMPARE[type(op)]()], right)
    case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
      yield ast.BinOp(left, _ARITHMETIC[type(op)](), right)
      if isinstance(op, _ONE_SIDE):
        yield from (left, right)
    case ast.AugAssign(target=target, op=op, value=value):
      yield ast.Pass()
      if type(op) in _ARITHMETIC:
        yield ast.AugAssign(target, _ARITHMETIC[type(op)](), value)
    case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert(), operand=operand):
      yield operand
    case ast.BoolOp(op=op, values=values):
      yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
    case ast.Constant(value=bool(value)):
      yield ast.Constant(not value)
    case ast.Constant(value=int(value)):
      yield from (ast.Constant(value + 1), ast.Constant(value - 1))
    case ast.Constant(value=float(value)):
      yield ast.Constant(2 * value if value else 1.0)
    case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
      changed = copy.copy(node)
      changed.test = ast.UnaryOp(ast.Not(), test)
      yield changed
    case ast.Expr(value=ast.Call()) | ast.Delete():
      yield ast.Pass()
    case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
      yield ast.Pass()
    case ast.Tuple(elts=[ast.Call(), *_] as entries):
      yield from (ast.Tuple(entries[:i] + entries[i + 1 :], node.ctx) for i in range(len(entries)))
    case ast.Call(func=func, args=args, keywords=keywords):
      for i, keyword in enumerate(keywords):
        if keyword.arg not in _CHECKS:
          yield ast.Call(func, args, keywords[:i] + keywords[i + 1 :])
      name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
      if name in _NAMES:
        other = copy.copy(func)
        setattr(other, "attr" if isinstance(func, ast.Attribute) else "id", _NAMES[name])
        yield ast.Call(other, args, keywords)
      if len(args) == 1 and not keywords and not isinstance(args[0], ast.Starred):
        yield args[0]  # as if nothing had been done to it
