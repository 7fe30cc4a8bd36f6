"""The API for AUTOMATIC1111's clients."""
