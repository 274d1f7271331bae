"""``python -m untrojan``."""

from untrojan.cli.main import run

run()
