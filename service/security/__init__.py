"""Authentication, quotas, and hosts that images may be fetched from."""
