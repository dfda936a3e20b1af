"""Starts a Ray cluster on 127.0.0.1 and applies the arguments of each line of stdin to the application; a process."""

from __future__ import annotations

import json
import sys

import ray
from ray import serve

from adalink.serving.ray import app


def main() -> None:
    settings = json.loads(sys.argv[1])
    ray.init(
        num_cpus=settings["cpus"],
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        _temp_dir=settings["folder"],
        _node_ip_address="127.0.0.1",
        _metrics_export_port=settings["metrics_port"],
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": settings["port"]})
        print("ready", flush=True)
        for line in sys.stdin:
            serve.run(app(json.loads(line)), logging_config={"enable_access_log": False})
            print("ready", flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
