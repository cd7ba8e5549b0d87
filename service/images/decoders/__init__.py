"""Decoders of the kinds that Pillow reads wrong, slowly or in too much memory."""
