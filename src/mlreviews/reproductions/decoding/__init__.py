"""Reproductions of area decoding."""
