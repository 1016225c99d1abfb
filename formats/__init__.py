"""Rows of published problem sets, and what they say in our terms: a format a file."""
