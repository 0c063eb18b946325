"""Turn results of ``bench_step.py`` and ``bench_prepare.py`` into Markdown tables.

python -m benchmarks.table benchmarks/results/*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def _ratio(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f}" if name in row else "-"


def step_table(result: dict[str, Any]) -> list[str]:
    """One table a dtype, the fastest first; contenders without a number stay in, with the reason."""
    environment, lines = result["environment"], []
    where = environment["gpu"] or f"{environment['cpu']}, {environment['cores']} cores"
    lines.append(
        f"{result['model']}, vocabulary {result['vocabulary']:,}, {result['data']}, {result['batch']} rows a step, "
        f"{result['rows_a_pass']} a pass; "
        f"{where}; torch {environment['versions']['torch']}; load {environment['load'][0]}; {environment['commit']}\n"
    )
    for dtype, table in result["results"].items():
        lines.append(
            f"| {dtype} | real tokens/s | slowest to fastest step | of stock | of stock, processor time | peak GiB "
            "| of stock |"
        )
        lines.append("|---|---|---|---|---|---|---|")
        for name, row in sorted(table.items(), key=lambda item: -item[1].get("real_tokens_per_s", 0)):
            if "real_tokens_per_s" not in row:
                lines.append(f"| {name} | {row['gate']} | | | | | |")
                continue
            lines.append(
                f"| {name} | {row['real_tokens_per_s']:.0f} | {row['slowest']:.0f} to {row['fastest']:.0f} | "
                f"{_ratio(row, 'speed_of_stock')} | {_ratio(row, 'cpu_speed_of_stock')} | {row['peak_gib']:.2f} | "
                f"{_ratio(row, 'memory_of_stock')} |"
            )
        lines.append("")
    return lines


def prepare_table(result: dict[str, Any]) -> list[str]:
    """Rows a second of both."""
    if "rows_per_s" not in result:
        return [f"Preparation: {result['gate']}\n"]
    speeds = result["rows_per_s"]
    return [
        f"Preparation of {result['rows']:,} rows, {result['processes']} processes each: fsdpsft "
        f"{speeds['ours']:,.0f} rows/s, TRL {speeds['trl']:,.0f} rows/s, ratio {result['ours_over_trl']:.2f}; "
        f"load {result['environment']['load'][0]}\n"
    ]


TABLES = {"training step": step_table, "preparation of data": prepare_table}


def main(paths: list[str]) -> None:
    """Print the tables of the files that have one."""
    for path in paths:
        result = json.loads(Path(path).read_text())
        if result.get("what") in TABLES:
            print(f"### {Path(path).stem}\n")
            print("\n".join(TABLES[result["what"]](result)))


if __name__ == "__main__":
    main(sys.argv[1:])
