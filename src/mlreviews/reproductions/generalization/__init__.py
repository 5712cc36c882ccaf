"""Reproductions of area generalization."""
