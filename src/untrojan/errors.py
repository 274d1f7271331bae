"""The one exception a user is meant to read."""

from __future__ import annotations


class UntrojanError(Exception):
    """Something the user can put right: bad input, bad options, a full disk.

    The message is one line that names the thing and the way out. The command line prints it without a
    traceback and exits with status 2; library callers can catch it and know that nothing was half-written.
    """
