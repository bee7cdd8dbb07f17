"""`python -m finetune_operator`: reads the settings, starts the metrics server, and runs Kopf on `handlers`."""

from __future__ import annotations

import logging
import sys
from typing import Any

import kopf
import prometheus_client

from . import handlers
from .settings import Settings, SettingsError, read_settings


def main() -> int:
    """Run the operator until it is told to stop; return the exit code."""
    try:
        settings = read_settings()
    except SettingsError as error:
        print(f"finetune-operator: {error}", file=sys.stderr)
        return 78
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # Kopf says at INFO that it has called a handler; at one line per event that drowns everything else.
    logging.getLogger("kopf").setLevel(logging.WARNING)
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
    prometheus_client.start_http_server(settings.metrics.port)
    kopf.run(**_where(settings), standalone=True, memo=handlers.Operator(settings))
    return 0


def _where(settings: Settings) -> dict[str, Any]:
    if settings.watch_namespaces:
        return {"namespaces": settings.watch_namespaces}
    return {"clusterwide": True}


if __name__ == "__main__":
    sys.exit(main())
