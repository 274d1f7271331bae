"""Federated learning under attack, and NONE where the images stay with the clients."""
