"""The HTTP service: our own REST API, and those of OpenAI and of LightX2V's server."""
