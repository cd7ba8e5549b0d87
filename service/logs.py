"""Structured logs: one line per event, as text or JSON."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection
from typing import Literal

import structlog

LogFormat = Literal["text", "json"]


COMMAND_EVENTS = frozenset({"model_failed"})
"""Events that a command reports itself, in one sentence at its end."""


def configure_command() -> None:
    """Log errors to standard error, without those that a command reports itself."""
    configure("text", logging.ERROR, without=COMMAND_EVENTS)


def configure(
    log_format: LogFormat = "text",
    level: int = logging.INFO,
    *,
    without: Collection[str] = (),
) -> None:
    """Log everything, including the HTTP server, to standard error in one format.

    without: events that are not logged.
    """

    def choose(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if event["event"] in without:
            raise structlog.DropEvent
        return event

    shared: list[structlog.typing.Processor] = [
        choose,
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format == "json":
        logging.captureWarnings(capture=True)  # so that every line is JSON
        shared.append(structlog.processors.format_exc_info)
        last: structlog.typing.Processor = structlog.processors.JSONRenderer()
    else:
        last = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            # The default prints every local variable, tensors and uploads too, and takes seconds.
            exception_formatter=structlog.dev.plain_traceback,
        )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, last],
        )
    )
    # Not in any log, but computed for each record (docs.python.org/3/howto/logging.html).
    logging._srcfile = None  # noqa: SLF001
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
