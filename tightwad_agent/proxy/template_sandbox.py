"""Jinja for templates that nobody vouches for: they come out of model files.

jinja2's immutable sandbox keeps a template away from Python's insides; this one also bounds what it may use. Allowed
are the names that chat templates need, and no others. Every loop, call, filter and literal pays into a budget, sizes
are looked at before anything grows, so a template cannot run for long, nor make anything large, whatever it is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from jinja2 import Template, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from tightwad_agent.proxy.template_filters import (
    OPERATORS,
    filled,
    filters,
    joined,
    raise_exception,
    replaced,
    tests,
    written,
)
from tightwad_agent.proxy.template_meter import OPEN_TYPES, STEP, TooMuch, meter

MAX_TEMPLATE = 128 << 10
"""Characters of a template; those of models have a few thousand."""

_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        """capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace
        istitle isupper format join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition
        rsplit rstrip split splitlines startswith strip swapcase title upper""".split()  # noqa: SIM905
    ),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
}


_GROWING: dict[str, Callable[..., str]] = {
    "format": filled,
    "join": lambda text, parts: joined(parts, text),
    "replace": replaced,
}
"""Methods of text whose result may be much longer than the text; `format` has others in place of jinja2's."""
_JINJA_S_OWN = frozenset({"_loop_vars", "_block_vars"})
"""Arguments that compiled templates add to every call."""


class _Generation(Extension):
    """`{% generation %}` marks what was generated, for training; here it is only passed over."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metering(NodeTransformer):
    """Puts a toll before each turn of a loop and each run of a macro, and weighs what literals make."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2 finds it by this name
        return self._tolled(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._tolled(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        return self._tolled(node)

    def _tolled(self, node: Any) -> nodes.Node:
        n_chars = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        toll = nodes.ExprStmt(_filtered(nodes.Const(n_chars), "toll"))
        node.body.insert(0, toll.set_lineno(node.lineno))
        return node  # type: ignore[no-any-return]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes), "concatenated")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _weighing(node.expr)
        for operand in node.ops:
            operand.expr = _weighing(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "weighed") if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "weighed") if node.items else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "weighed") if node.ctx == "load" and node.items else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "weighed") if node.items else node


def _weighing(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filtered(node, "weighed")


def _filtered(node: nodes.Expr, name: str) -> nodes.Expr:
    made = nodes.Filter(node, name, [], [], None, None)
    made.set_lineno(node.lineno)
    return made


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles and renders; every rendering runs inside `metered`."""

    intercepted_binops = frozenset(OPERATORS)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            optimized=False,  # constants would be computed, unmetered, while compiling
            finalize=written,
            cache_size=0,
        )
        self.filters = cast("dict[str, Any]", filters())
        self.tests = cast("dict[str, Any]", tests())
        del self.globals["lipsum"]
        self.globals["raise_exception"] = raise_exception

    def load(self, source: str) -> Template:
        """A template. Raises `TemplateError`, `TooMuch`, or what Python's compiler raises."""
        if len(source) > MAX_TEMPLATE:
            raise TooMuch(f"it is longer than {MAX_TEMPLATE >> 10} KiB")
        tree = _Metering().visit(self.parse(source))
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """What a template calls: macros, methods of values, and the few functions there are."""
        costs = meter()
        costs.pay(STEP)
        bound = getattr(obj, "__self__", None)
        if isinstance(bound, str):
            costs.pay(len(bound))
            own = _GROWING.get(obj.__name__)
            if own is not None:
                return own(bound, *args, **{k: v for k, v in kwargs.items() if k not in _JINJA_S_OWN})
        return costs.weigh(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ARG002
        """The operators that can make something large."""
        meter().pay(STEP)
        return meter().weigh(OPERATORS[operator](left, right))

    def wrap_str_format(self, value: Any) -> None:
        """Not jinja2's way with `str.format`, which does not look at widths."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return isinstance(obj, OPEN_TYPES) and super().is_safe_attribute(obj, attr, value)
