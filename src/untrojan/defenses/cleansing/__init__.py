"""Defences that inspect and clean a training set."""
