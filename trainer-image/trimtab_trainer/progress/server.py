"""`GET /progress` and `GET /metrics`, served outside the training processes: a hang does not silence them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trimtab_trainer import config as contract
from trimtab_trainer.config import Progress, TrainConfig
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.progress.heartbeat import Heartbeat, read_heartbeat
from trimtab_trainer.progress.metrics_log import HELD_OUT_LOSS

LABELS = ["namespace", "job", "stage"]


def to_progress(heartbeat: Heartbeat) -> Progress:
    """The heartbeat as the operator reads it."""
    remaining, guessed_at = heartbeat.remaining_seconds, heartbeat.remaining_guessed_at
    return Progress(
        step=heartbeat.step,
        total_steps=heartbeat.total_steps,
        epoch=f"{heartbeat.epoch:.2f}",
        tokens_per_second=round(heartbeat.tokens_per_second),
        estimated_remaining_seconds=None if remaining is None else round(remaining),
        guessed_at_tokens_per_second=None if guessed_at is None else round(guessed_at),
        metrics=[
            contract.Metric(name=name, value=f"{value:.6g}")
            for name, value in heartbeat.metrics.items()
            if "/" not in name  # a value for each held-out task would not fit the status
        ],
        checkpoints=heartbeat.checkpoints,
    )


class StageCollector(Collector):
    """The heartbeat as Prometheus metrics; read anew at each scrape."""

    def __init__(self, config: TrainConfig, heartbeat_file: Path) -> None:
        self._labels = [config.job.namespace, config.job.name, config.stage]
        self._file = heartbeat_file

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families; no sample for what is not known yet."""
        beat = read_heartbeat(self._file)
        if beat is None:
            return
        tokens = CounterMetricFamily("trimtab_stage_tokens", "Tokens trained on since the stage began.", labels=LABELS)
        tokens.add_metric(self._labels, beat.tokens)
        yield tokens
        yield self._gauge("step", "Optimiser steps done.", beat.step)
        yield self._gauge("total_steps", "Optimiser steps of the whole stage.", beat.total_steps)
        yield self._gauge(
            "tokens_per_second", "Training tokens per second, over all processes.", beat.tokens_per_second
        )
        yield self._gauge("mfu", "Model FLOP utilisation, 0 to 1; absent where the peak is not known.", beat.mfu)
        helps = {
            "loss": "Training loss of the last step: nats per loss-bearing token, or per pair.",
            "gradient_norm": "Global gradient norm of the last step, before clipping.",
            "learning_rate": "Learning rate of the last step.",
            "validation_loss": "Last validation loss: nats per loss-bearing token, or per pair.",
            "accuracy": "Pairs of the last step whose chosen answer has the larger reward, 0 to 1.",
            "rewards_chosen": "Mean reward of the chosen answers of the last step.",
            "rewards_margin": "Mean difference of the rewards of chosen and rejected in the last step.",
            "validation_accuracy": "As accuracy, of the held-out pairs.",
            "validation_rewards_chosen": "As rewards_chosen, of the held-out pairs.",
            "validation_rewards_margin": "As rewards_margin, of the held-out pairs.",
        }
        for name, text in helps.items():
            yield self._gauge(name, text, beat.metrics.get(name))
        tasks = GaugeMetricFamily(
            f"trimtab_stage_{HELD_OUT_LOSS}",
            "Last loss on a task that is never trained on: nats per loss-bearing token.",
            labels=[*LABELS, "task"],
        )
        for name, value in beat.metrics.items():
            metric, _, task = name.partition("/")
            if metric == HELD_OUT_LOSS and task:
                tasks.add_metric([*self._labels, task], value)
        yield tasks

    def _gauge(self, name: str, text: str, value: float | None) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"trimtab_stage_{name}", text, labels=LABELS)
        if value is not None:
            family.add_metric(self._labels, value)
        return family


class ProgressServer:
    """Binds when made, serves after `start`."""

    def __init__(self, config: TrainConfig, heartbeat_file: Path) -> None:
        registry = CollectorRegistry()
        registry.register(StageCollector(config, heartbeat_file))
        address = os.environ.get(contract.LISTEN_ADDRESS_VARIABLE, "127.0.0.1")
        try:
            self._server = ThreadingHTTPServer((address, config.progress_port), _handler(registry, heartbeat_file))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES):
                raise
            raise BadConfiguration(
                f"{address}:{config.progress_port}: {os.strerror(error.errno)}; the stage serves /progress and "
                "/metrics there: free the port, or give the stage another one (progressPort)",
                stage=config.stage,
            ) from error
        self._server.daemon_threads = True

    @property
    def port(self) -> int:
        """The port that is bound."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Serve in a thread."""
        Thread(target=self._server.serve_forever, name="progress", daemon=True).start()

    def stop(self) -> None:
        """Stop and free the port."""
        self._server.shutdown()
        self._server.server_close()


def _handler(registry: CollectorRegistry, heartbeat_file: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/progress":
                progress = to_progress(read_heartbeat(heartbeat_file) or Heartbeat())
                self._answer(200, "application/json", contract.dump(progress).encode())
            elif self.path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
            else:
                self._answer(404, "text/plain", b"try /progress or /metrics\n")

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a scrape every few seconds is no news."""

    return Handler
