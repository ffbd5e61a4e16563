"""Wrong solutions made of right ones: each has one small fault of the kind that students make."""

import ast
import copy
from collections.abc import Iterator

#: Operator -> the one it is confused with.
SWAPPED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mod,
}
COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
#: Method or function -> the one it is confused with; "" leaves it out.
CALLED = {
    "sum": "mean",
    "mean": "sum",
    "max": "min",
    "min": "max",
    "amax": "amin",
    "amin": "amax",
    "argmax": "argmin",
    "floor": "ceil",
    "sqrt": "",
    "abs": "",
    "sign": "",
    "exp": "",
    "log": "",
    "square": "",
    "clamp": "",
}


def of_node(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield (kind, what stands there instead)."""
    if isinstance(node, ast.BinOp):
        if other := SWAPPED.get(type(node.op)):
            yield "operator", ast.BinOp(node.left, other(), node.right)
        if isinstance(node.op, ast.Mult | ast.Div | ast.MatMult):
            yield "missing factor", node.left
        if isinstance(node.op, ast.Mult):
            yield "missing factor", node.right
        if isinstance(node.op, ast.MatMult):
            yield "transposed", ast.BinOp(node.right, node.op, node.left)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield "sign", node.operand
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield "off by one", ast.Constant(node.value + 1)
    elif isinstance(node, ast.Constant) and type(node.value) is float:
        yield "constant", ast.Constant(node.value * 1.5 + 0.1)
    elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield "transposed", node.value
    elif isinstance(node, ast.Compare) and (other := COMPARED.get(type(node.ops[0]))):
        yield "off by one", ast.Compare(node.left, [other()], node.comparators)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLED:
        other = CALLED[node.func.attr]
        if other:
            yield "operator", ast.Call(ast.Attribute(node.func.value, other), node.args, node.keywords)
        elif isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
            yield "missing factor", node.args[0]
        else:
            yield "missing factor", node.func.value
    elif isinstance(node, ast.Return) and node.value is not None:
        parts = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        for i, part in enumerate(parts):
            minus = [*parts[:i], ast.UnaryOp(ast.USub(), part), *parts[i + 1 :]]
            value = ast.Tuple(minus, ast.Load()) if isinstance(node.value, ast.Tuple) else minus[0]
            yield "sign", ast.Return(value)


def detached(node: ast.AST) -> ast.AST | None:
    """A return without its gradient, where it may be a tensor."""
    if isinstance(node, ast.Return) and isinstance(node.value, ast.BinOp | ast.Call | ast.Name | ast.Subscript):
        return ast.Return(ast.Call(ast.Attribute(node.value, "detach"), [], []))
    return None


def mutants(source: str, *, gradient: bool) -> Iterator[tuple[str, str]]:
    """Yield (kind and what became of what, source). Annotations, defaults and texts of errors stay.

    Args:
        source: one function or class.
        gradient: whether to detach results.
    """
    tree = ast.parse(source)
    kept = {id(n) for node in ast.walk(tree) for part in _apart(node) for n in ast.walk(part)}
    nodes = list(ast.walk(tree))
    for i, node in enumerate(nodes):
        if id(node) in kept:
            continue
        found = list(of_node(node))
        if gradient and (other := detached(node)):
            found.append(("detach", other))
        for kind, other in found:
            changed = copy.deepcopy(tree)
            target = list(ast.walk(changed))[i]
            _replace(changed, target, copy.deepcopy(other))
            text = ast.unparse(ast.fix_missing_locations(changed))
            yield f"{kind}: {ast.unparse(node)} -> {ast.unparse(ast.fix_missing_locations(other))}", text


def _apart(node: ast.AST) -> list[ast.AST]:
    """Parts that are not mutated."""
    if isinstance(node, ast.FunctionDef):
        return [node.args, *([node.returns] if node.returns else [])]
    if isinstance(node, ast.AnnAssign):
        return [node.annotation]
    return [node] if isinstance(node, ast.Raise) else []


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list):
                value[:] = [new if part is old else part for part in value]
