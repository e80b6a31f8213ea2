"""Serve a model over OpenAI's HTTP API: the engine's token stream in their schemas.

request -> middleware (key, size, host, log) -> api -> schemas (the request, checked)
        -> engine_thread (EngineThread) -> responses (chunks as OpenAI's JSON) -> JSON, or server-sent events
"""
