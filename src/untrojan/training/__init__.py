"""The one training loop and the recipes it runs."""
