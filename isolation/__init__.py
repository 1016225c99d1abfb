"""The machinery of `sandbox.py`: what it needs of Linux to run programs that nobody trusts."""
