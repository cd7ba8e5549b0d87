"""Protocols of other programs, on separate routes with their own error bodies."""
