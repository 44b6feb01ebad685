"""The HTTP service: our own REST API, those of OpenAI and of LightX2V's server, and the page."""
