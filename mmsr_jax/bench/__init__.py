"""Measurements: each says what it compares with, and the ratio."""
