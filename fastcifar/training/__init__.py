"""Loops, recipes, checkpoints and logs."""
