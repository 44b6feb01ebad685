"""Trains a student that needs few steps and no guidance from a teacher that needs many (DMD)."""
