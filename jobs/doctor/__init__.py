"""Checks each real part of an installation: what was seen, and what to do about it."""
