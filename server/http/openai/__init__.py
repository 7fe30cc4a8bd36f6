"""The image API for OpenAI's clients."""
