"""A model behind OpenAI's HTTP interface: the engine's token stream, and nothing that talks of its own.

request -> guard (key, size, host, log) -> api -> fields (what is asked for, in the engine's words)
        -> Desk (the engine's thread) -> answers (pieces in OpenAI's words) -> JSON, or events as they come
"""
