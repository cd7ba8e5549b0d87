"""The HTTP server: uvicorn with bounds on slow and malformed connections."""
