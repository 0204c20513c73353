"""Run as a script, it writes the golden cache of the codec `packed` and what a reader found in it.

    python tests/golden/make_packed_v1.py

The committed files were made by it once and stay as they are: they stand for caches that users already have.
"""

import json
import runpy
from pathlib import Path
from typing import Any

from distilllens_cache import CacheReader

HERE = Path(__file__).parent
FOLDER = HERE / "packed_v1"
VALUES = HERE / "packed_v1.json"
PARTS = ("counts", "ids", "log_probs", "log_rest")


def source() -> Any:
    """What was packed: rows of up to 6 and 20 ids, some of which are common."""
    tiny_cache = runpy.run_path(str(HERE / "make_cache_v1.py"))["TinyCache"]
    return tiny_cache(codec="packed", num_examples=7, examples_per_shard=6, top_k={2: 6, 4: 20}, store_tail="none")


def contents(folder: Path) -> list[dict[str, Any]]:
    """What a reader finds, as JSON; a float64 holds a float32 exactly."""
    return [
        {
            "id": example.id,
            "targets": {
                str(layer): {part: getattr(targets, part).tolist() for part in PARTS}
                for layer, targets in example.targets.items()
            },
        }
        for example in CacheReader(folder)
    ]


if __name__ == "__main__":
    source().write(FOLDER)
    VALUES.write_text(json.dumps(contents(FOLDER)) + "\n")
