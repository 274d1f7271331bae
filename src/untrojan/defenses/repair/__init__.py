"""Repairs: a model without its backdoor, from the model and a few clean images."""
