"""Training defences: a model without a backdoor, from data that nobody vouches for."""
