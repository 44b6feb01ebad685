"""How the tables came to be: one additive change a file, applied by `rushes migrate`."""

from pathlib import Path

FOLDER = Path(__file__).parent
