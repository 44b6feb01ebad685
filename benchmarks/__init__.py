"""Measures the networks and the system: docs/performance.md says how and what came out."""
