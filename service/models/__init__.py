"""The served models: their configuration, loading, replicas and leases."""
