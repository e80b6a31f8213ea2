"""What is measured, under vLLM's names, so that dashboards made for it work: https://docs.vllm.ai/en/latest/usage/metrics/."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from smolforge import __version__

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """One registry for each server, so that two in one process do not mix."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()

        def measured(kind: type, name: str, said: str, **given: object):
            return kind(f"vllm:{name}", said, ["model_name"], registry=self.registry, **given).labels(model_name=model)

        self.running = measured(Gauge, "num_requests_running", "Sequences in the cache.")
        self.waiting = measured(Gauge, "num_requests_waiting", "Sequences without a slot yet.")
        self.cache = measured(Gauge, "kv_cache_usage_perc", "Tokens in the cache, of those it has room for; 1 is full.")
        self.first_token = measured(Histogram, "time_to_first_token_seconds", "To the first token.", buckets=SECONDS)
        self.between_tokens = measured(Histogram, "inter_token_latency_seconds", "To the next token.", buckets=SECONDS)
        self.whole = measured(Histogram, "e2e_request_latency_seconds", "To the last token.", buckets=SECONDS)
        self.prompt = measured(Counter, "prompt_tokens", "Tokens of prompts.")
        self.generated = measured(Counter, "generation_tokens", "Tokens of answers.")
        ended = Counter(
            "vllm:request_success", "Sequences that ended.", ["model_name", "finished_reason"], registry=self.registry
        )
        self.finished = {why: ended.labels(model, why) for why in ("stop", "length", "abort")}
        self.requests = Counter("http_requests", "Requests.", ["route", "code"], registry=self.registry)
        Info("build", "What runs.", registry=self.registry).info({"version": __version__})
