"""Who gets the trigger, and which label."""
