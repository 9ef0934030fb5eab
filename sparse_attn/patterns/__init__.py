"""Patterns: masks that outlive the run that found them."""
