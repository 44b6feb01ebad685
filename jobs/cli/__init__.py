"""`rushes ...`: each command parses, calls one function and prints."""

from jobs.cli import root

main = root.main
