"""Sizes of files and memory, as people read them."""


def words(number: int) -> str:
    """In units of 1000, as disks and graphics cards are sold."""
    value = float(number)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{number} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
