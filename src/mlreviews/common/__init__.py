"""What several areas share: checks of arguments, and least squares."""
