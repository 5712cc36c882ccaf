"""Reproductions of area ssm."""
