"""Commands that torchrun may start several times over, once per GPU."""

import os


def is_beside_the_first() -> bool:
    """One of several; the first one talks to the person."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"
