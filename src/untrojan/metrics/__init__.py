"""Benign accuracy, attack success and how well a defence told poison from clean."""
