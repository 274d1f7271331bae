"""Plans, the runner that carries them out, and the tables it fills."""
