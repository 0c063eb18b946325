"""Rendering chat templates with an account of which message wrote which characters.

A chat template is a program; the text it prints does not say where a turn begins or ends. Instead of guessing from the
text, or keeping altered copies of templates, the template's syntax tree gets one addition: the body of each ``for``
loop first prints a private-use marker when its loop variable *is* one of the conversation's messages, compared by
identity. The markers are taken out again and leave a list of segments, each owned by a message.

Sandbox, filters, extensions and globals are those of transformers: its own environment compiles both forms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from fsdpsft.data.mask.sandbox import LimitedTemplates
from fsdpsft.errors import ModelError, RowError

Message = dict[str, Any]

# The upper end of the last private-use plane is ours. Text that holds such a character is replaced by a placeholder
# before rendering (see ``Hiding``), so that no content can pose as a marker.
_OPEN, _CLOSE = "\U0010f000", "\U0010f001"
_BEGIN, _END = "_fsdpsft_begin", "_fsdpsft_end"
_UNPROVABLE = "loss mask not provable"
_PLACEHOLDERS = range(0x100000, 0x10F000)
RESERVED = "[\U00100000-\U0010ffff]"

# What template code can raise on messages it was not written for; anything else is a bug of ours.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


class Rendered(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: exactly what the plain template prints.
        segments: (message index, start, end) of the characters printed in a message's loop iteration, in order of
            position and joined where they touch; characters that belong to no message are in none.
        blocks: (start, end) of the characters inside ``{% generation %}`` blocks.
    """

    text: str
    segments: tuple[tuple[int, int, int], ...]
    blocks: tuple[tuple[int, int], ...]

    def owned(self, message: int) -> tuple[tuple[int, int], ...]:
        """The (start, end) of the segments that ``message`` owns."""
        return tuple((start, end) for owner, start, end in self.segments if owner == message)


class _Marking(NodeTransformer):
    """Adds the marker calls to a template's syntax tree.

    Attributes:
        captured: numbers of the loops whose output a macro, ``set`` or ``filter`` block catches, where the template
            could look at it; their renders are compared with the plain one.
        has_blocks: whether the template has ``{% generation %}`` blocks.
    """

    def __init__(self) -> None:
        self.captured: set[int] = set()
        self.has_blocks = False
        self._loops = 0
        self._depth = 0

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:  # noqa: N802
        number = self._loops
        self._loops += 1
        if self._depth:
            self.captured.add(number)
        self.generic_visit(node)
        names = [node.target] if isinstance(node.target, nodes.Name) else list(node.target.find_all(nodes.Name))
        variables: list[nodes.Expr] = [nodes.Name(name.name, "load") for name in names]
        node.body.insert(0, _print_call(_BEGIN, [nodes.Const(number), *variables]))
        return [node, _print_call(_END, [nodes.Const(number)])]

    def _visit_catcher(self, node: nodes.Node) -> nodes.Node:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1
        return node

    visit_Macro = visit_AssignBlock = visit_FilterBlock = _visit_catcher  # noqa: N815

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        called = node.call.node
        if not (isinstance(called, nodes.ExtensionAttribute) and called.name == "_generation_support"):
            return self._visit_catcher(node)
        self.has_blocks = True
        self.generic_visit(node)
        begin, end = nodes.TemplateData(f"{_OPEN}+{_CLOSE}"), nodes.TemplateData(f"{_OPEN}-{_CLOSE}")
        # A generation block prints its body as it is; printed here, it takes no call.
        return nodes.Scope([nodes.Output([begin]), *node.body, nodes.Output([end])])


def _print_call(function: str, arguments: list[nodes.Expr]) -> nodes.Output:
    """Print ``function``'s result. It is a filter: the sandbox looks at each call, but not at filters."""
    first, *others = arguments
    return nodes.Output([nodes.Filter(first, function, others, [], None, None)])


class JinjaTemplate:
    """A compiled chat template that renders plainly or with segments.

    Args:
        text: the Jinja source.
        now: the moment ``strftime_now`` reports, the same in each render.

    Attributes:
        prints_date: the template calls ``strftime_now``.
        has_blocks: it has ``{% generation %}`` blocks.

    Raises:
        ModelError: the source is not valid Jinja, or cannot be compiled.
    """

    def __init__(self, text: str, now: datetime, origin: str = "") -> None:
        """Compile both forms; ``origin`` says in errors where the template is from. See the class."""
        self.text, self.origin = text, f" (the template of {origin})" if origin else ""
        self.prints_date = "strftime_now" in text
        marking = _Marking()
        try:
            environment = chat_template_utils._compile_jinja_template("").environment.overlay()  # shared by all
            self._limited = LimitedTemplates(environment)
            plain = self._limited.parse(text)
            marked = marking.visit(self._limited.parse(text))
            marked.set_lineno(1)
            marked.set_environment(environment)
            environment.filters |= {_BEGIN: self._begin, _END: self._end}
            self._plain, self._marked = (environment.from_string(tree) for tree in (plain, marked))
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"The chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
        except (SyntaxError, RecursionError) as error:  # {% break %} outside a loop; nested without end
            raise ModelError(f"The chat template cannot be compiled: {error}") from error
        self.has_blocks = marking.has_blocks
        self._captured = marking.captured
        # One flat dict each: Jinja would walk a chain of them in every render.
        self._plain.globals = {**environment.globals, "strftime_now": now.strftime}
        self._marked.globals = self._plain.globals
        self._messages: Sequence[Message] = ()
        self._index: dict[int, int] = {}
        self._open: set[int] = set()
        self._caught = False

    def plain(self, messages: Sequence[Message], variables: Mapping[str, Any], add_generation_prompt: bool) -> str:
        """Render as ``apply_chat_template(tokenize=False)`` does; ``RowError`` if it rejects them."""
        return self._render(self._plain, messages, variables, add_generation_prompt)

    def marked(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> Rendered:
        """Render without a generation prompt and say which message wrote what.

        Raises:
            RowError: the template rejects the messages, or its output depends on the markers (then nothing is proven).
        """
        self._messages, self._index = messages, {id(message): i for i, message in enumerate(messages)}
        self._open.clear()
        self._caught = False
        raw = self._render(self._marked, messages, variables, False)
        rendered = _parse(raw)
        if self._caught and rendered.text != self.plain(messages, variables, False):
            raise RowError("the chat template prints messages inside a macro or block and changes what it caught there")
        return rendered

    def _render(
        self,
        template: jinja2.Template,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        add_generation_prompt: bool,
    ) -> str:
        self._limited.begin()
        try:
            # What Template.render does, with one dict made instead of three.
            given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
            names = {**template.globals, "tools": None, "documents": None, **variables, **given}
            return "".join(template.root_render_func(template.new_context(names, shared=True)))
        except _TEMPLATE_FAULTS as error:
            raise RowError(
                f"the chat template rejects the conversation: {error or type(error).__name__}{self.origin}",
                "rejected by the template",
            ) from error

    @jinja2.pass_context  # which also keeps the compiler from evaluating it once and for all
    def _begin(self, _: jinja2.runtime.Context, loop: int, *values: Any) -> str:
        """Printed first in each iteration: whose it is, or nobody's (-1) if this loop had a message before."""
        for value in values:
            message = self._index.get(id(value))
            if message is not None and self._messages[message] is value:
                self._open.add(loop)
                self._caught |= loop in self._captured
                return f"{_OPEN}{loop},{message}{_CLOSE}"
        return f"{_OPEN}{loop},-1{_CLOSE}" if loop in self._open else ""

    @jinja2.pass_context
    def _end(self, _: jinja2.runtime.Context, loop: int) -> str:
        """Printed after a loop."""
        if loop not in self._open:
            return ""
        self._open.discard(loop)
        return f"{_OPEN}{loop}{_CLOSE}"


def _parse(raw: str) -> Rendered:
    """Take the markers out of a render. Loops nest: the innermost one that has a message owns the text."""
    plain, *marked = raw.split(_OPEN)
    texts = [plain]
    loops: list[str] = []  # those that are open, outermost first,
    owners: list[int] = []  # and the message of each
    segments: list[tuple[int, int, int]] = []
    blocks: list[tuple[int, int]] = []
    position, block_start = len(plain), 0
    for piece in marked:
        marker, _, text = piece.partition(_CLOSE)
        if marker == "+":
            block_start = position
        elif marker == "-":
            blocks.append((block_start, position))
        else:
            loop, _, message = marker.partition(",")
            if loop in loops:
                depth = loops.index(loop)
                del loops[depth:], owners[depth:]
            if message:
                loops.append(loop)
                owners.append(int(message))
        texts.append(text)
        start, position = position, position + len(text)
        if text and owners and owners[-1] >= 0:
            if segments and segments[-1][0] == owners[-1] and segments[-1][2] == start:
                start = segments.pop()[1]
            segments.append((owners[-1], start, position))
    return Rendered("".join(texts), tuple(segments), tuple(blocks))


class Hiding:
    """Replaces strings in content by single private-use characters while a template renders.

    What is hidden is the text of special tokens, which content must not forge, and characters that markers use.

    Args:
        special: matches the special tokens.
        hidden: matches all that is to be hidden: special tokens, and the characters that markers use.

    Attributes:
        originals: placeholder -> text it stands for.
        count: how many occurrences were replaced.
    """

    def __init__(self, special: re.Pattern[str], hidden: re.Pattern[str]) -> None:
        """Hide nothing yet; see the class."""
        self._search = special.search
        self._hidden = hidden
        self._placeholders: dict[str, str] = {}
        self.originals: dict[str, str] = {}
        self.count = 0

    def _replace(self, match: re.Match[str]) -> str:
        original = match.group()
        if original not in self._placeholders:
            if len(self.originals) == len(_PLACEHOLDERS):
                raise RowError("too many different private-use characters in one conversation", _UNPROVABLE)
            placeholder = chr(_PLACEHOLDERS[len(self.originals)])
            self._placeholders[original] = placeholder
            self.originals[placeholder] = original
        self.count += 1
        return self._placeholders[original]

    def hide(self, value: Any) -> Any:
        """``value`` with the strings inside it replaced; lists and dicts are copied where something changes."""
        if isinstance(value, str):
            if value.isascii() and self._search(value) is None:  # nearly all; quick on text without special tokens
                return value
            return self._hidden.sub(self._replace, value)
        if isinstance(value, dict):
            return {key: self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def restore(self, text: str) -> str:
        """``text`` with the hidden strings back in place."""
        return text.translate(self._table) if self.originals else text

    @property
    def _table(self) -> dict[int, str]:
        return {ord(placeholder): original for placeholder, original in self.originals.items()}
