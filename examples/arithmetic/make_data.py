"""Write the demo's conversations: train.parquet and val.parquet to train on, held_out.parquet to be asked afterwards.

python examples/arithmetic/make_data.py demo/data --train 24000
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from problems import Chat, chat

KINDS = {"single": 0.5, "follow-up": 0.3, "tool": 0.2}


def draw(rng: random.Random, count: int, unseen: set[tuple[str, int, int]]) -> list[Chat]:
    """Draw ``count`` conversations, in random order of kind, in none of which a problem of ``unseen`` occurs."""
    chats: list[Chat] = []
    while len(chats) < count:
        drawn = chat(rng, rng.choices(list(KINDS), list(KINDS.values()))[0])
        if not any(problem.key in unseen for problem in drawn.problems):
            chats.append(drawn)
    return chats


def write(path: Path, chats: list[Chat]) -> None:
    """Write conversations as rows with the columns messages, tools, kind and answer (of the last turn)."""
    rows = [{"messages": c.messages, "tools": c.tools, "kind": c.kind, "answer": c.problems[-1].answer} for c in chats]
    pq.write_table(pa.Table.from_pylist(rows), path)


def main() -> None:
    """Draw the held-out conversations first, then training data that shares no problem with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=24_000, help="conversations to train on")
    parser.add_argument("--val", type=int, default=128, help="conversations for the validation loss")
    parser.add_argument("--held-out", type=int, default=256, help="conversations whose last question is asked")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    held_out = draw(rng, args.held_out, set())
    unseen = {problem.key for c in held_out for problem in c.problems}
    val, train = draw(rng, args.val, unseen), draw(rng, args.train, unseen)
    # What the exact match means rests on this: no held-out problem, in any wording or turn, is trained on.
    assert unseen.isdisjoint(problem.key for c in train + val for problem in c.problems)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, chats in (("train", train), ("val", val), ("held_out", held_out)):
        write(args.folder / f"{name}.parquet", chats)


if __name__ == "__main__":
    main()
