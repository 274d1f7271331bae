"""Readers, one a format. Every byte they see is untrusted; every complaint names the file it is about."""
