"""Small chat templates in the styles of known families, written for these tests, and tokenizers to go with them."""

from __future__ import annotations

import re
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from fsdpsft.data.rows.conversation import Conversation
from fsdpsft.testing import tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "<start_of_turn>{{ role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Thoughts are kept only behind the last question; the last turn always has a thought, if an empty one.
QWEN3 = (
    "{% set last = namespace(question=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > last.question %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Calls are printed as JSON; results of tools in a row share a user turn.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user\n{% endif %}"
    "<tool_response>{{ m.content }}</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The result of a call is printed inside the assistant's own iteration, behind the token that stops generation.
NESTED_TOOLS = (
    "{% for m in messages %}{% if m.role != 'tool' %}"
    "{% set merged = m.role == 'assistant' and loop.index0 > 0 and messages[loop.index0 - 1].role == 'tool' %}"
    "{% if not merged %}<|turn|>{{ m.role }}\n{% endif %}"
    "{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }}{{ c.function.arguments | tojson }}<|result|>"
    "{% endfor %}"
    "{% if m.tool_calls %}{% for k in range(loop.index0 + 1, messages | length) %}{% set follow = messages[k] %}"
    "{% if follow.role == 'tool' %}{{ follow.content }}<|done|>{% endif %}{% endfor %}"
    "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|turn|>assistant\n{% endif %}"
)
# Prints EOS where no generation prompt is asked for.
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# Leaves the end of a turn to the next one's header.
UNCLOSED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Turn markers that are added tokens, but not special ones; calls with text as arguments and null as content.
MARKED = (
    "{% for m in messages %}{% if m.role == 'tool' %}<!Out!>{{ m.content }}<!/Out!>"
    "{% elif m.role == 'assistant' and m.content is none %}<!Assistant!>"
    "{% for c in m.tool_calls %}<!Call!>{{ c.function.name + c.function.arguments }}{% endfor %}<|end|>"
    "{% elif m.role == 'assistant' %}<!Assistant!>{{ m.content }}<|end|>"
    "{% else %}<!User!>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<!Assistant!>{% endif %}"
)

_SPECIAL = re.compile(r"<\|[a-z_0-9]+\|>|<(?:start|end)_of_turn>")
PLAIN_ADDED = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<!User!>", "<!Assistant!>", "<!Call!>", "<!Out!>", "<!/Out!>"
]  # fmt: skip


def tokenizer_for(template: str, special: list[str] | None = None, **names: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which the template's special tokens, and those named, are special tokens."""
    found = sorted({*_SPECIAL.findall(template), *(special or [])})
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in found], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN_ADDED])
    tokenizer.add_special_tokens({"bos_token": "<bos>", **names})
    tokenizer.chat_template = template
    return tokenizer


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def conversation(*messages: dict[str, Any], tools: list[dict[str, Any]] | None = None, **kwargs: Any) -> Conversation:
    """A conversation in which each assistant message is trained with weight 1."""
    train = tuple(m["role"] == "assistant" for m in messages)
    return Conversation(list(messages), tools, train, (1.0,) * len(messages), kwargs)
