"""Gaussian diffusion in discrete time (DDPM, IDDPM, DDIM): tensors in, tensors out; no network, no Lightning."""
