"""Which version this is."""

import importlib.metadata


def installed() -> str:
    try:
        return importlib.metadata.version("rushes")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "0+unknown"
