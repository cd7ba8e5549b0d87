"""Admission of requests, worker threads, and dynamic batching."""
