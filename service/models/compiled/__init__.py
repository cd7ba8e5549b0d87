"""The compiled lane: a front cut at the default layer, and the tail behind it."""
