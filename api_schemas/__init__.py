"""The wire contract: pydantic models only, usable without torch or FastAPI."""
