"""Rows of published problem sets as `data.Problem`: one file for each format."""
