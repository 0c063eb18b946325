"""Templates that would never end, or take all memory, are refused; those that people use are not slowed or changed."""

from __future__ import annotations

import time
from datetime import datetime

import pytest

from fsdpsft.data.mask import sandbox
from fsdpsft.data.mask.rendering import JinjaTemplate
from fsdpsft.errors import ModelError, RowError

MESSAGES = [{"role": "user", "content": "hi"}]


def render(text: str) -> str:
    return JinjaTemplate(text, datetime(2024, 1, 1)).plain(MESSAGES, {}, False)


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) | list %}{% for i in r %}{% for j in r %}{% set x = 1 %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10 ** 11 }}",
        "{{ [0] * 10 ** 11 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ '%1000000000000d' % 1 }}",
        "{{ '%1000000000000d' | format(1) }}",
        "{{ '{:1000000000000}'.format(1) }}",
        "{{ 'a'.ljust(10 ** 12) }}",
        "{{ 'a' | center(10 ** 12) }}",
        "{{ messages | tojson(indent=10 ** 12) }}",
        "{{ [1] | batch(10 ** 12, 'x') | list }}",
        "{{ lipsum(n=10 ** 12) }}",
        "{{ ('a' * 20000000).replace('a', 'a' * 20000000) }}",
        "{{ ('a' * 20000000) | replace('a', 'a' * 20000000) }}",
        "{{ ('a' * 2000000).join(['b'] * 2000000) }}",
        "{{ ('\t' * 20000000).expandtabs(20000000) }}",
        "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
        "{% set s = 'a' * 30000000 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
        "{% set s = 'a' * 9999999 %}{% macro f() %}{% for i in range(999) %}{{ s }}{% endfor %}{% endmacro %}{{ f() }}",
        *(
            "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = " + double + " %}{% endfor %}"
            for double in ("n.s + n.s", "n.s ~ n.s", "[n.s, n.s] | join", "'{0}{0}'.format(n.s)", "n.s * 2")
        ),
    ],
)
def test_work_without_end_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MOST_WORK", 200_000)
    started = time.process_time()
    with pytest.raises(RowError, match=r"the chat template rejects the conversation: \S"):
        render(text)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("text", ["{% break %}", "{% continue %}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"])
def test_what_cannot_be_compiled_is_named(text: str) -> None:
    with pytest.raises(ModelError, match="cannot be compiled"):
        JinjaTemplate(text, datetime(2024, 1, 1))


def test_what_templates_do_is_as_before() -> None:
    text = (
        "{% for i in range(3) %}{{ i ~ '-' ~ none ~ x.y }}{% if i == 1 %}{% break %}{% endif %}{% endfor %}"
        "{{ 'ab' * 2 + 'c' }} {{ 2 ** 10 }} {{ '%3d|%s' % (7, 'x') }} {{ ['a', 'b'] | join(', ') }}"
        " {{ 'a{}'.format(12345678) }} {{ '* %s' | format('12345678') }} {{ {'a': 1} | tojson(indent=2) | length }}"
    )
    expected = "0-None1-Noneababc 1024   7|x a, b a12345678 * 12345678 12"
    assert render("{% set x = {} %}" + text) == expected


@pytest.mark.parametrize(
    "loop",
    [
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",  # none passes
        "{% for i in r recursive %}{{ loop(r) if loop.depth < 9 }}{% endfor %}",
        "{% for i in r %}{% for j in r | map('upper') %}{% endfor %}{% endfor %}",  # of unknown length
    ],
)
def test_loops_of_all_forms_are_counted(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MOST_WORK", 200_000)
    started = time.process_time()
    with pytest.raises(RowError, match="loops too often"):
        render("{% set r = ['a'] * 999 %}" + loop)
    assert time.process_time() - started < 5


def test_a_key_that_is_also_a_method_of_dicts_is_looked_up_as_jinja_does() -> None:
    text = "{% set d = {'items': 1, 'role': 2, 'x': none} %}{{ d.items is callable }} {{ d.role }} {{ d.x }} {{ d.y }}"
    assert render(text) == "True 2 None "


def test_the_error_names_where_the_template_is_from() -> None:
    template = JinjaTemplate("{% for i in range(10**9) %}x{% endfor %}", datetime(2024, 1, 1), "models/some-model")
    with pytest.raises(RowError, match=r"\(the template of models/some-model\)$"):
        template.plain(MESSAGES, {}, False)
