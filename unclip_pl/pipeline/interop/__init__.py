"""Weights of other projects in, ours out: Karlo in diffusers' layout and in its own."""
