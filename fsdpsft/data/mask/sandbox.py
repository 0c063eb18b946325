"""Limits on what a chat template may do: it is code from the Hub, and may loop or build text without end.

The sandbox of transformers keeps templates away from files and Python's internals. It does not bound their time and
memory, so that is done here: each loop iteration, call, filter and sum costs work, more for a longer result, and one
render has a budget. Operations that could make a large value at once are looked at before they are carried out.

Nearly all templates do little, so the checks are cheap: a loop is counted once, by the length of what it goes through,
and a short value is only measured.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_WORK = 10_000_000
"""Units of one render, some seconds: one a step, ``_CALL`` a call, and one for each ``_CHARACTERS`` of the result."""

LARGEST = 1 << 25
"""Most characters or items of one value, and the largest number given to a function."""

_CALL = 16
_CHARACTERS = 64
_FEW = 16
_MOST_BITS = 1 << 16
_WIDTH = re.compile(r"%[-#0 +]*(?:\d*\.)?(?:\*|\d{7})|\{[^{}]*\d{7}")
_SIZED = (str, list, tuple)
_OF_DICTS = frozenset(dir(dict))
_GROWING = (int, str, list, tuple)
_JOIN, _SUM, _STEP, _COUNT, _KEEP = (f"_fsdpsft_{name}" for name in ("join", "sum", "step", "count", "keep"))


class LimitedTemplates:
    """Compiles templates whose renders end; not for several threads at a time.

    Args:
        environment: of one's own; its operators, filters and calls are replaced by checked ones.
    """

    def __init__(self, environment: jinja2.Environment) -> None:
        """Put the checks in place."""
        assert isinstance(environment, SandboxedEnvironment)
        self.environment = environment
        self._left = MOST_WORK
        sums = {sign: self._measured(environment.binop_table[sign], check) for sign, check in _OPERATORS.items()}
        environment.binop_table = environment.binop_table | sums
        environment.intercepted_binops = frozenset(sums)
        growing = {name: self._measured(environment.filters[name], check) for name, check in _FILTERS.items()}
        ours = {
            _JOIN: self._measured(_join),
            _SUM: self._measured(operator.add),
            _STEP: self._step,
            _COUNT: self._count,
            _KEEP: self._measure,
        }
        environment.filters = environment.filters | growing | ours
        environment.finalize = self._measure  # of all that is printed
        environment.globals = {name: value for name, value in environment.globals.items() if name != "lipsum"}
        self._call = environment.call
        environment.call = self._checked_call  # type: ignore[method-assign]
        self._getattr = environment.getattr
        environment.getattr = self._attribute  # type: ignore[method-assign]

    def parse(self, text: str) -> nodes.Template:
        """The syntax tree, with its loops counted."""
        return _Stepping().visit(self.environment.parse(text))  # type: ignore[no-any-return]

    def begin(self) -> None:
        """Give the next render its budget."""
        self._left = MOST_WORK

    def _spend(self, work: int) -> None:
        self._left -= work
        if self._left < 0:
            raise SecurityError("it loops too often, or makes too much text")

    def _measure(self, result: Any) -> Any:
        if isinstance(result, _SIZED) and (size := len(result)) > _CHARACTERS:
            self._left -= size // _CHARACTERS
            if self._left < 0 or size > LARGEST:
                _require(size)
                self._spend(0)
        return result

    def _attribute(self, obj: Any, attribute: str) -> Any:
        """``obj.attribute``; of a dict, as nearly all are, without a search for an attribute that it cannot have."""
        if type(obj) is dict and attribute in obj and attribute not in _OF_DICTS:
            return obj[attribute]
        return self._getattr(obj, attribute)

    @jinja2.pass_context  # which also keeps the compiler from evaluating it once
    def _step(self, _: jinja2.runtime.Context, value: str) -> str:
        self._spend(1)
        return value

    @jinja2.pass_context
    def _count(self, _: jinja2.runtime.Context, values: Iterable[Any]) -> Iterable[Any]:
        """What a loop goes through, counted at once, or one by one where the length is not known."""
        try:
            self._spend(len(values))  # type: ignore[arg-type]
        except TypeError:
            return self._each(values)
        return values

    def _each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._spend(1)
            yield value

    def _measured(self, function: Callable[..., Any], check: Callable[..., None] | None = None) -> Callable[..., Any]:
        def plain(*arguments: Any) -> Any:
            return self._measure(function(*arguments))

        def checked(*arguments: Any, **named: Any) -> Any:
            check(*arguments, *named.values())  # type: ignore[misc]
            return self._measure(function(*arguments, **named))

        return functools.wraps(function)(plain if check is None else checked)

    def _checked_call(self, context: jinja2.runtime.Context, called: Any, *arguments: Any, **named: Any) -> Any:
        self._spend(_CALL)
        if getattr(called, "__name__", None) in _METHODS:
            owner = getattr(getattr(called, "__wrapped__", called), "__self__", None)
            if called.__name__.startswith("format"):
                _check_format(owner)
            _check_growth(owner, *arguments, *named.values())
        return self._measure(self._call(context, called, *arguments, **named))


class _Stepping(NodeTransformer):
    """Counts the iterations of loops, and makes sums and ``~`` filters, which can be measured.

    Short sums that are printed stay as they are: printing measures, and most sums of most templates are printed.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _COUNT, [], [], None, None)
        if node.recursive:  # its inner rounds go through something else
            node.body.insert(0, nodes.Output([nodes.Filter(nodes.Const(""), _STEP, [], [], None, None)]))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        node.nodes = [
            self._visit_terms(n) if sum(1 for _ in n.find_all(nodes.Add)) < _FEW else self.visit(n) for n in node.nodes
        ]
        return node

    def _visit_terms(self, node: nodes.Node) -> Any:
        if not isinstance(node, nodes.Add):
            return self.visit(node)
        node.left, node.right = self._visit_terms(node.left), self._visit_terms(node.right)
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return nodes.Filter(node.left, _SUM, [node.right], [], None, None)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.filter = nodes.Filter(node.filter, _KEEP, [], [], None, None)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), _JOIN, [], [], None, None)


def _join(values: Iterable[Any]) -> str:
    return "".join(map(str, values))


def _require(size: int) -> None:
    if size > LARGEST:
        raise SecurityError(f"it asks for {size:,} characters or items")


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            _require(len(value) * times)


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * right)


def _check_bits(bits: int) -> None:
    if bits > _MOST_BITS:
        raise SecurityError("it computes with enormous numbers")


def _check_format(text: Any, *_: Any) -> None:
    if isinstance(text, str) and _WIDTH.search(text):
        raise SecurityError("it formats with an enormous width")


def _check_growth(*given: Any) -> None:
    """Look at what a function is given that pads, repeats, replaces or joins text."""
    if not any(isinstance(value, _GROWING) for value in given):
        return
    numbers = [value for value in given if isinstance(value, int)]
    text, *words = [value for value in given if isinstance(value, str)] or [""]
    lists = [value for value in given if isinstance(value, list | tuple)]
    _require(max(numbers, default=0))
    if len(words) == 2:  # a replacement
        _require(text.count(words[0]) * len(words[1]))
    for number in numbers:
        _require(text.count("\t") * number + text.count("\n") * number)
    for values in lists:
        _require(len(text) * len(values) + sum(len(item) for item in values if isinstance(item, str)))


_OPERATORS: dict[str, Callable[..., None]] = {"*": _check_product, "**": _check_power, "%": _check_format}
_FILTERS: dict[str, Callable[..., None]] = {"format": _check_format} | dict.fromkeys(
    ("batch", "center", "indent", "join", "replace", "round", "slice", "sum", "tojson", "wordwrap"), _check_growth
)
_METHODS = {"center", "expandtabs", "format", "format_map", "join", "ljust", "replace", "rjust", "zfill"}
