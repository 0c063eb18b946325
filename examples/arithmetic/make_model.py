"""Build the demo's model: a small Llama with random weights, and a tokenizer trained on the training conversations.

python examples/arithmetic/make_model.py demo/model --data demo/data/train.parquet
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def spoken_text(path: Path, tokenizer: PreTrainedTokenizerFast, count: int = 4000) -> Iterator[str]:
    """What stands between the special tokens in the first ``count`` conversations, as the template renders them."""
    for row in pq.read_table(path).slice(0, count).to_pylist():
        rendered = tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)
        yield from re.split("|".join(map(re.escape, SPECIAL_TOKENS)), rendered)


def make_tokenizer(data: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that spells any text, keeps each digit a token of its own and may merge across words.

    Digits apart is what lets column addition be learned, and a number's first digit is told from the others by the
    space it takes along; phrases as one token keep the sequences short. Lines stay apart too, so that a reply's first
    token never merges with the header before it.
    """
    bpe = Tokenizer(models.BPE())
    lines_and_digits = pre_tokenizers.Split(Regex(r" ?\d|\n"), "isolated")
    bytes_of_phrases = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([lines_and_digits, bytes_of_phrases])
    bpe.decoder = decoders.ByteLevel()
    template = TEMPLATE.read_text(encoding="utf-8")
    renderer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(spoken_text(data, renderer), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )


def main() -> None:
    """Write config, weights, tokenizer and chat template as one Hugging Face folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="parquet file whose text the tokenizer is trained on")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    disable_progress_bar()
    tokenizer = make_tokenizer(args.data, args.vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=args.hidden_size**-0.5,  # the usual 0.02 is for models ten times as wide
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)


if __name__ == "__main__":
    main()
