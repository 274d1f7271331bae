"""x -> x': what an attacker does to an image. A trigger knows nothing of labels or victims."""
