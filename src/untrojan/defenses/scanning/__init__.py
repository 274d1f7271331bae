"""Scanners: is this model backdoored, from the model and a few clean images."""
