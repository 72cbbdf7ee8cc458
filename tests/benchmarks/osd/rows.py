"""A folder of small rows in the shape of the real ones."""

import json
from pathlib import Path


def write_rows(folder: Path, count: int) -> None:
    """Word problems, each with numbers of its own."""
    file = folder / "gsm8k" / "train.jsonl"
    file.parent.mkdir(parents=True)
    rows = [
        {
            "prompt": f"Ann has {number} apples and buys {number + 3}. How many apples has she now?",
            "response": f"{number} + {number + 3} = {2 * number + 3}",
        }
        for number in range(count)
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
