"""From untrusted bytes to upright pixels, and the geometry back to source pixels."""
