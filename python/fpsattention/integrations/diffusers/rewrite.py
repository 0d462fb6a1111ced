"""The code of a host's attention processor, with another function in place of its attention call."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn

ARGUMENT = "fpsattention_call"
"""The keyword by which the rewritten code gets what attends in place of the host's functions."""


def with_attention_call(function: Callable) -> Callable:
    """`function`, a `__call__` in Python, with one more keyword, `fpsattention_call`. Where `function` calls diffusers'
    `dispatch_attention_fn` or torch's `scaled_dot_product_attention`, the result calls `fpsattention_call.dispatch` or
    `fpsattention_call.sdpa` with the same arguments. All else stays: module globals, defaults, line numbers.

    Raises ValueError, with the reason only, when the code has no such call or cannot be rewritten.
    """
    code = getattr(function, "__code__", None)
    if code is None or hasattr(function, "__wrapped__"):
        raise ValueError("it is no plain Python function, so its code cannot be read")
    if code.co_freevars:
        raise ValueError(f"its code uses {', '.join(code.co_freevars)} of the code around it")
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        raise ValueError("its source is not at hand") from None
    tree = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(tree, first - 1)
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise ValueError("it is not defined by def")
    calls = _AttentionCalls(function)
    calls.visit(definition)
    if not calls.found:
        raise ValueError(
            "its code calls neither dispatch_attention_fn of diffusers nor scaled_dot_product_attention of torch"
        )
    _strip_signature(definition)
    definition.args.kwonlyargs.append(ast.arg(ARGUMENT))
    definition.args.kw_defaults.append(None)
    namespace: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(tree), code.co_filename, "exec"), function.__globals__, namespace)
    rewritten = namespace[definition.name]
    rewritten.__defaults__, rewritten.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return rewritten


def _strip_signature(definition: ast.FunctionDef) -> None:
    """Drop what Python evaluates when it defines a function, as names of the class around it are not known here."""
    args = definition.args
    args.defaults = [ast.Constant(None) for _ in args.defaults]
    args.kw_defaults = [x and ast.Constant(None) for x in args.kw_defaults]
    for x in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg):
        if x is not None:
            x.annotation = None
    definition.returns, definition.decorator_list = None, []


class _AttentionCalls(ast.NodeTransformer):
    """Replaces the attention calls in the code of a function, and counts them."""

    def __init__(self, function: Callable):
        self.function = function
        self.found = 0

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        called = self._value(node.func)
        for known, name in ((dispatch_attention_fn, "dispatch"), (F.scaled_dot_product_attention, "sdpa")):
            if called is known:
                self.found += 1
                node.func = ast.Attribute(ast.Name(ARGUMENT, ast.Load()), name, ast.Load())
        return node

    def _value(self, node: ast.expr) -> Any:
        """What a name of the function's module, or of a module in it, stands for; None if it is something else."""
        code = self.function.__code__
        if isinstance(node, ast.Name) and node.id not in code.co_varnames + code.co_cellvars:
            return self.function.__globals__.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._value(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
        return None
