"""Counts and times for Prometheus: our own names, and vLLM's, so that dashboards made for it work here.

Text format: https://prometheus.io/docs/instrumenting/exposition_formats/ (version 0.0.4).
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number per set of labels that only grows; `kind` "gauge" may be set as well."""

    def __init__(self, name: str, help: str, kind: str = "counter") -> None:
        self.name, self.help, self.kind = name, help, kind
        self.values: dict[Labels, float] = defaultdict(float)

    def add(self, amount: float = 1, **labels: str) -> None:
        self.values[tuple(labels.items())] += amount

    def set(self, value: float, **labels: str) -> None:
        self.values[tuple(labels.items())] = value

    def lines(self) -> Iterator[str]:
        for labels, value in self.values.items():
            yield (
                f"{self.name}{braces(labels)} {value:g}" if value < 1e6 else f"{self.name}{braces(labels)} {value:.0f}"
            )


class Histogram:
    """How often a value fell at or below each bound."""

    kind = "histogram"

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self.name, self.help, self.bounds = name, help, tuple(bounds)
        self.counts: dict[Labels, list[int]] = {}
        self.sums: dict[Labels, float] = defaultdict(float)

    def observe(self, value: float, **labels: str) -> None:
        key = tuple(labels.items())
        counts = self.counts.setdefault(key, [0] * (len(self.bounds) + 1))
        counts[bisect_left(self.bounds, value)] += 1
        self.sums[key] += value

    def lines(self) -> Iterator[str]:
        for labels, counts in self.counts.items():
            total = 0
            for bound, count in zip((*self.bounds, "+Inf"), counts, strict=True):
                total += count
                yield f"{self.name}_bucket{braces((*labels, ('le', str(bound))))} {total}"
            yield f"{self.name}_sum{braces(labels)} {self.sums[labels]!r}"
            yield f"{self.name}_count{braces(labels)} {total}"


def braces(labels: Labels) -> str:
    """The labels as the text format writes them, values escaped."""
    escaped = ((name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels)
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}" if labels else ""


class Metrics:
    """Everything this server counts. Changes on the event loop only."""

    def __init__(self, model: str) -> None:
        self.model = {"model_name": model, "engine": "0"}
        self.requests = Counter("ownlm_requests_total", "Requests answered, by route and HTTP status.")
        self.latency = Histogram("ownlm_request_seconds", "Time from arrival to the last byte.", SECONDS)
        self.tokens = Counter("ownlm_tokens_total", "Tokens read (prompt) and written (completion).")
        self.records_lost = Counter("ownlm_records_lost_total", "Request records that could not be written.")
        self.engine_faults = Counter("ownlm_engine_faults_total", "Steps of the engine that broke.")
        self.records_lost.add(0)
        self.prompt_tokens = Counter("vllm:prompt_tokens_total", "Number of prefill tokens processed.")
        self.generation_tokens = Counter("vllm:generation_tokens_total", "Number of generation tokens processed.")
        self.drafted = Counter("vllm:spec_decode_num_draft_tokens_total", "Number of drafted tokens.")
        self.accepted = Counter(
            "vllm:spec_decode_num_accepted_tokens_total", "Number of drafted tokens that came true."
        )
        self.success = Counter("vllm:request_success_total", "Count of successfully processed requests.")
        self.first_token = Histogram("vllm:time_to_first_token_seconds", "Time to the first token.", SECONDS)
        self.per_token = Histogram("vllm:inter_token_latency_seconds", "Time per token after the first.", SECONDS)
        self.e2e = Histogram("vllm:e2e_request_latency_seconds", "End to end request latency.", SECONDS)
        self.request_prompt = Histogram("vllm:request_prompt_tokens", "Prefill tokens of a request.", TOKENS)
        self.request_generation = Histogram("vllm:request_generation_tokens", "Generated tokens of a request.", TOKENS)
        self.running = Counter("vllm:num_requests_running", "Number of requests in model execution batches.", "gauge")
        self.waiting = Counter("vllm:num_requests_waiting", "Number of requests waiting to be processed.", "gauge")
        self.cache = Counter("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", "gauge")

    def answered(self, route: str, status: int, latency_s: float) -> None:
        """Count a request of any kind."""
        self.requests.add(route=route, status=str(status))
        self.latency.observe(latency_s, route=route)

    def generated(
        self, prompt_tokens: int, completion_tokens: int, first_token_s: float | None, latency_s: float, reason: str
    ) -> None:
        """Count what a finished generation read and wrote."""
        self.tokens.add(prompt_tokens, kind="prompt")
        self.tokens.add(completion_tokens, kind="completion")
        self.prompt_tokens.add(prompt_tokens, **self.model)
        self.generation_tokens.add(completion_tokens, **self.model)
        self.request_prompt.observe(prompt_tokens, **self.model)
        self.request_generation.observe(completion_tokens, **self.model)
        self.e2e.observe(latency_s, **self.model)
        self.success.add(1, **self.model, finished_reason=reason)
        if first_token_s is not None:
            self.first_token.observe(first_token_s, **self.model)
            if completion_tokens > 1:
                self.per_token.observe((latency_s - first_token_s) / (completion_tokens - 1), **self.model)

    def text(
        self, *, running: int, waiting: int, cache_usage: float, faults: int, drafted: int = 0, accepted: int = 0
    ) -> str:
        """The page that Prometheus reads, with the engine's state of this moment."""
        self.running.set(running, **self.model)
        self.waiting.set(waiting, **self.model)
        self.cache.set(cache_usage, **self.model)
        self.engine_faults.set(faults)
        self.drafted.set(drafted, **self.model)
        self.accepted.set(accepted, **self.model)
        lines: list[str] = []
        for metric in vars(self).values():
            if isinstance(metric, Counter | Histogram):
                lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
        return "\n".join(lines) + "\n"
