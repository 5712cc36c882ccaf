"""Reproductions of area peft."""
