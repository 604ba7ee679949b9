"""Faults on purpose: what the system promises under them is checked, and counted."""
