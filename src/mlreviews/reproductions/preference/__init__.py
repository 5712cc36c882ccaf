"""Reproductions of area preference."""
