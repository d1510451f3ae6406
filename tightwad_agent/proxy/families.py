"""The page of `/metrics`: names, help texts and values for prometheus-client, which is loaded with this module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tightwad_agent.proxy.metrics import MetricsView
from tightwad_agent.proxy.tally import Tally

Family = CounterMetricFamily | GaugeMetricFamily


class _Of(Collector):
    """Shows one view, once."""

    def __init__(self, view: MetricsView) -> None:
        self._view = view

    def collect(self) -> Iterable[Family]:
        return _families(self._view)


def page(view: MetricsView) -> bytes:
    """The text form. Nothing is kept between two calls."""
    registry = CollectorRegistry()
    registry.register(_Of(view))
    ProcessCollector(registry=registry)  # CPU, memory and files of the agent itself, where the system tells
    return generate_latest(registry)


def _families(view: MetricsView) -> Iterator[Family]:
    tally = view.tally
    yield _labelled_gauge(
        "tightwad_build_info",
        "Which program this is; always 1.",
        ("version", "llama_cpp"),
        [((view.version, view.llama_cpp), 1)],
    )
    serving = [((view.engine, view.model), 1)] if view.engine else []
    yield _labelled_gauge(
        "tightwad_serving_info", "What answers, and with which model; always 1.", ("engine", "model"), serving
    )
    yield _gauge("tightwad_ready", "1 if a request would be answered now.", view.is_ready)
    yield _gauge("tightwad_coordinating", "1 on the node that serves for the cluster.", view.coordinating)
    yield _gauge("tightwad_requests_in_flight", "Requests that run now.", view.in_flight)
    yield _labelled("tightwad_requests", "Requests answered, by class of status.", "status", tally.requests)
    by_key = {name: used.requests for name, used in view.keys.items()}
    yield _labelled("tightwad_key_requests", "Requests answered, by name of the API key.", "key", by_key)
    by_key = {name: used.tokens for name, used in view.keys.items()}
    yield _labelled("tightwad_key_tokens", "Tokens of answers, by name of the API key.", "key", by_key)
    yield _counter("tightwad_prompt_tokens", "Tokens of prompts.", tally.n_prompt)
    yield _counter("tightwad_prompt_tokens_cached", "Tokens of prompts that needed no evaluation.", tally.n_cached)
    yield _counter("tightwad_generated_tokens", "Tokens of answers.", tally.n_generated)
    yield _counter("tightwad_prompt_seconds", "Time spent on prompts.", tally.prompt_ms / 1000)
    yield _counter("tightwad_generate_seconds", "Time spent on answers, prompts left out.", tally.generate_ms / 1000)
    yield from _speculation(tally)
    yield _counter("tightwad_resumed_answers", "Times that an answer whose engine was lost went on.", tally.n_resumed)
    yield _counter("tightwad_paused_seconds", "Time that clients waited for that.", tally.paused_s)
    yield _gauge("tightwad_longest_pause_seconds", "The longest of these waits.", tally.longest_pause_s)
    yield _counter("tightwad_pool_restarts", "Times that the pool was started again.", view.pool_restarts)
    sent, received = Counter[str](), Counter[str]()
    for worker in view.workers:  # two may have one name
        sent[worker.name] += worker.bytes_up
        received[worker.name] += worker.bytes_down
    yield _labelled("tightwad_worker_sent_bytes", "Bytes sent to workers.", "worker", sent)
    yield _labelled("tightwad_worker_received_bytes", "Bytes received from workers.", "worker", received)
    peers = [((state,), n) for state, n in sorted(view.peers.items())]
    yield _labelled_gauge("tightwad_peers", "Nodes of the cluster, this one among them, by state.", ("state",), peers)
    moving = [((state,), n) for state, n in sorted(view.transfers.items())]
    yield _labelled_gauge("tightwad_transfers", "Model files in transfer, by state.", ("state",), moving)


def _speculation(tally: Tally) -> Iterator[CounterMetricFamily]:
    yield _counter("tightwad_rounds", "Forward passes after the prompt.", tally.rounds)
    yield _counter("tightwad_draft_tokens", "Draft tokens that were checked.", tally.drafted)
    yield _counter("tightwad_draft_tokens_accepted", "Draft tokens that were right.", tally.accepted)
    tried = {str(at): n for at, n in enumerate(tally.tried_at, 1)}
    right = {str(at): n for at, n in enumerate(tally.accepted_at, 1)}
    yield _labelled(
        "tightwad_draft_position_tokens", "Draft tokens checked, by position in the draft.", "position", tried
    )
    yield _labelled(
        "tightwad_draft_position_tokens_accepted", "Draft tokens right, by position in the draft.", "position", right
    )
    yield _counter("tightwad_verify_seconds", "Time in forward passes that check drafts.", tally.verify_ms / 1000)
    yield _counter("tightwad_draft_seconds", "Time that drafters took for tokens used.", tally.draft_ms / 1000)
    yield _counter("tightwad_draft_wait_seconds", "Time without a pass, for want of drafts.", tally.waited_ms / 1000)
    yield _labelled("tightwad_drafter_tokens", "Draft tokens checked, by drafter.", "drafter", tally.drafters)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)


def _labelled(name: str, text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
    """A counter for each value of one label."""
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _labelled_gauge(
    name: str, text: str, labels: Sequence[str], rows: Iterable[tuple[Sequence[str], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family
