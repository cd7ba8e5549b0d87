"""Untrusted bytes to upright pixels, and geometry back to source pixels."""
