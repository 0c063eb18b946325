"""Grade-school problems as chats: a question in words, the sum worked column by column, and the answer."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from typing import Any

NAMES = (
    "Ava",
    "Ben",
    "Chloe",
    "David",
    "Emma",
    "Finn",
    "Grace",
    "Hugo",
    "Iris",
    "Jack",
    "Kira",
    "Leo",
    "Mia",
    "Noah",
    "Zoe",
)
THINGS = ("apples", "books", "coins", "marbles", "stamps", "stickers", "shells", "cards", "pencils", "beads")
COLUMNS = ("Ones", "Tens", "Hundreds")
QUESTIONS = {
    "+": (
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "There are {a} {things} in one box and {b} {things} in another. How many {things} are there in all?",
        "{name} finds {a} {things} on Monday and {b} {things} on Tuesday. How many {things} is that together?",
        "A shop sells {a} {things} in the morning and {b} in the evening. How many {things} does it sell?",
        "What is {a} plus {b}?",
    ),
    "-": (
        "{name} has {a} {things} and gives away {b}. How many {things} are left?",
        "A box holds {a} {things}. {name} takes out {b}. How many {things} are still in the box?",
        "There are {a} {things}, and {b} of them are sold. How many {things} remain?",
        "{name} needs {a} {things} and has {b}. How many {things} are missing?",
        "What is {a} minus {b}?",
    ),
    "*": (
        "There are {a} boxes with {b} {things} in each. How many {things} are there?",
        "{name} buys {a} {things} for {b} cents each. How many cents is that?",
        "What is {a} times {b}?",
    ),
}
FOLLOW_UPS = {
    "+": ("Then {b} more are added. How many is that?", "And with {b} more?", "Now add {b}."),
    "-": ("Then {b} are taken away. How many are left?", "And with {b} fewer?", "Now subtract {b}."),
}
SYSTEM_PROMPTS = ("You are a patient teacher.", "Work the sum out step by step.")
MULTIPLY = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiply two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


@dataclass(frozen=True)
class Problem:
    """``a op b``, where ``op`` is ``+``, ``-`` (never below zero) or ``*``."""

    a: int
    op: str
    b: int

    @property
    def answer(self) -> int:
        """The number asked for."""
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.op]

    @property
    def key(self) -> tuple[str, int, int]:
        """The same for ``a + b`` and ``b + a``: who has seen one has seen the other."""
        return (self.op, self.a, self.b) if self.op == "-" else (self.op, *sorted((self.a, self.b)))


def first_problem(rng: random.Random) -> Problem:
    """Draw a sum or a difference within 1000, all three of its numbers of three digits."""
    total = rng.randint(200, 999)
    part = rng.randint(100, total - 100)
    return Problem(part, "+", total - part) if rng.random() < 0.5 else Problem(total, "-", part)


def next_problem(rng: random.Random, start: int) -> Problem:
    """Draw a problem of that kind which goes on from the answer of the one before."""
    room_above, room_below = start <= 899, start >= 200
    if room_above and (not room_below or rng.random() < 0.5):
        return Problem(start, "+", rng.randint(100, 999 - start))
    return Problem(start, "-", rng.randint(100, start - 100))


def product(rng: random.Random) -> Problem:
    """Draw a product that is not for the head."""
    return Problem(rng.randint(100, 999), "*", rng.randint(100, 999))


def question(rng: random.Random, problem: Problem) -> str:
    """Put the problem in words."""
    text = rng.choice(QUESTIONS[problem.op])
    return text.format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=problem.a, b=problem.b)


def solution(problem: Problem) -> str:
    """Work the problem out as on paper, from the ones up, with carries and borrows; products are the tool's."""
    a, op, b = problem.a, problem.op, problem.b
    if op == "*":
        return f"That is {a} * {b} = {problem.answer}. The answer is {problem.answer}."
    steps, carry = [], 0
    for i, column in enumerate(COLUMNS):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = x + y + carry if op == "+" else x - y - carry
        if op == "-" and total < 0:
            x, total = x + 10, total + 10
            passed_on = ", borrow one"
        else:
            passed_on = ", carry one" if total > 9 else ""
        one_more = f" {op} 1" if carry else ""
        steps.append(f"{column}: {x} {op} {y}{one_more} = {total}, write {total % 10}{passed_on}.")
        carry = 1 if passed_on else 0
    return f"That is {a} {op} {b}. {' '.join(steps)} The answer is {problem.answer}."


def stated_answer(reply: str) -> int | None:
    """The number a reply ends with, or None if it does not end with an answer."""
    found = re.search(r"The answer is (\d+)\.$", reply.strip())
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Chat:
    """A conversation and the problems solved in it, in order; ``kind`` is single, follow-up or tool."""

    kind: str
    problems: tuple[Problem, ...]
    messages: list[dict[str, Any]]

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """The tools on offer."""
        return [MULTIPLY] if self.kind == "tool" else None


def call(problem: Problem) -> dict[str, Any]:
    """The tool call that solves the problem."""
    return {"type": "function", "function": {"name": "multiply", "arguments": {"a": problem.a, "b": problem.b}}}


def result(arguments: dict[str, int]) -> str:
    """What the tool answers to a call.

    Raises:
        KeyError, TypeError: the arguments are not the tool's.
    """
    return json.dumps({"product": int(arguments["a"] * arguments["b"])})


def chat(rng: random.Random, kind: str) -> Chat:
    """Draw a conversation of one kind, complete with the assistant's turns."""
    system = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.2 else []
    if kind == "tool":
        problem = product(rng)
        turns = [
            {"role": "user", "content": question(rng, problem)},
            {"role": "assistant", "content": "", "tool_calls": [call(problem)]},
            {"role": "tool", "content": result({"a": problem.a, "b": problem.b})},
            {"role": "assistant", "content": solution(problem)},
        ]
        return Chat(kind, (problem,), system + turns)
    problems = [first_problem(rng)]
    texts = [question(rng, problems[0])]
    for _ in range(rng.randint(1, 2) if kind == "follow-up" else 0):
        problems.append(next_problem(rng, problems[-1].answer))
        texts.append(rng.choice(FOLLOW_UPS[problems[-1].op]).format(b=problems[-1].b))
    messages = list(system)
    for text, problem in zip(texts, problems, strict=True):
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": solution(problem)}]
    return Chat(kind, tuple(problems), messages)
