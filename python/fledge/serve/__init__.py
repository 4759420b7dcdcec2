"""The HTTP server: OpenAI's interface over the engine. `fledge serve` starts it."""
