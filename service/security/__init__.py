"""Who may ask, and where the service may fetch."""
