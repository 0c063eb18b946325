"""Ask a model the held-out questions and count the exactly right answers, with nothing but plain transformers.

python examples/arithmetic/evaluate.py demo/run --data demo/data/held_out.parquet
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from problems import result, stated_answer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

MAX_NEW_TOKENS = 96
CALL = re.compile(r"<tool_call>\n(.*)\n</tool_call>$")


@torch.no_grad()
def replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, chats: list[dict[str, Any]], batch_size: int = 128
) -> list[str]:
    """Let the model write the next turn of each chat (``messages`` and ``tools``), greedily."""
    texts = []
    for start in range(0, len(chats), batch_size):
        prompts = [
            tokenizer.apply_chat_template(c["messages"], tools=c["tools"], tokenize=False, add_generation_prompt=True)
            for c in chats[start : start + batch_size]
        ]
        inputs = tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt",
            return_token_type_ids=False,
        )  # fmt: skip
        written = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        texts += tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def follow_call(reply: str) -> list[dict[str, Any]] | None:
    """The messages of a tool call and its result, if the reply is a well-formed call; None for any other reply."""
    match = CALL.match(reply)
    try:
        function = json.loads(match[1]) if match else {}
        returned = result(function["arguments"])
    except (ValueError, KeyError, TypeError):
        return None
    calls = [{"type": "function", "function": function}]
    return [{"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": returned}]


def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]
) -> dict[str, tuple[int, int]]:
    """Ask the last question of each conversation and return, for each kind, how many were right, of how many.

    The turns before the question are given, as a chat client would; where a tool is on offer, the model has to call
    it, is told the result, and answers in its next turn.
    """
    chats = []
    for row in rows:
        asked = max(i for i, message in enumerate(row["messages"]) if message["role"] == "user")
        chats.append({"messages": row["messages"][: asked + 1], "tools": row["tools"]})
    answers = replies(model, tokenizer, chats)
    waiting = []
    for i, (chat, reply) in enumerate(zip(chats, answers, strict=True)):
        if chat["tools"] and (messages := follow_call(reply)):
            chat["messages"] += messages
            waiting.append(i)
    for i, reply in zip(waiting, replies(model, tokenizer, [chats[i] for i in waiting]), strict=True):
        answers[i] = reply
    asked_by_kind = Counter(row["kind"] for row in rows)
    is_right = [stated_answer(reply) == row["answer"] for row, reply in zip(rows, answers, strict=True)]
    right = Counter(row["kind"] for row, good in zip(rows, is_right, strict=True) if good)
    return {kind: (right[kind], count) for kind, count in sorted(asked_by_kind.items())}


def main() -> None:
    """Print the exact match by kind of question and over all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    counts = exact_match(model, tokenizer, pq.read_table(args.data).to_pylist())
    counts["all"] = tuple(map(sum, zip(*counts.values(), strict=True)))  # type: ignore[assignment]
    for kind, (right, asked) in counts.items():
        print(f"{kind:10} {right:4} of {asked:4}  {right / asked:6.1%}")


if __name__ == "__main__":
    main()
