"""Helpers that all rooms share: files, images, text from outside, signals, precision, errors."""
