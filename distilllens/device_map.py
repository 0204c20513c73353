"""Where the parts of a teacher lie that is larger than one device."""

import importlib.util
import json
import os

NAMED = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that transformers works out itself."""


def parse_device_map(text: str) -> str | dict[str, str | int]:
    """The device map that transformers takes; ValueError for a text that says none."""
    if text in NAMED:
        return text
    try:
        places = json.loads(text)
    except ValueError:
        places = None
    if not isinstance(places, dict) or not places or not all(isinstance(p, str | int) for p in places.values()):
        raise ValueError(
            f"--device-map {text!r}: expected {', '.join(NAMED)}, or parts of the model with their devices, such as "
            f'{{"model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "disk"}}'
        )
    return places


def require_device_map(text: str) -> None:
    """ValueError where a teacher cannot be spread over devices here."""
    parse_device_map(text)
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("--device-map needs the package accelerate: pip install 'distilllens[large]'")
    # Ranks that don't say how many of them share a machine may all be on one.
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1"))
    if num_here > 1:
        raise ValueError(
            f"--device-map {text}: each of {num_here} ranks on this machine would spread the teacher over the same "
            f"devices. Start one rank on each machine (torchrun --nproc-per-node 1, srun --ntasks-per-node 1; "
            f"LOCAL_WORLD_SIZE=1 says so), or leave out --device-map where the teacher fits on one device"
        )
