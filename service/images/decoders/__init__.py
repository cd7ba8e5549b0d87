"""Decoders for files that Pillow decodes wrongly, slowly or with too much memory."""
