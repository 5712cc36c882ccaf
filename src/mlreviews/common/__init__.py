"""What several areas share: checks of arguments, pieces of layers, and least squares."""
