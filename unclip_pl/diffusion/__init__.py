"""Gaussian diffusion in discrete time (DDPM, IDDPM, DDIM): tensors in, tensors out.

No networks and no Lightning.
"""
