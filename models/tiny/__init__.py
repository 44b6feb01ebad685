"""A model small enough to render on a laptop's CPU in seconds, in the native folder layout."""
