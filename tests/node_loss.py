"""Run by test_faults in a process of its own: a cluster of three nodes on this machine, one of which is killed.

python tests/node_loss.py FOLDER goes_on|waits      prints {"workers": of each logged step, "steps": ...} as JSON
"""

import json
import sys
import threading
import time
from pathlib import Path

from fault_run import count, log_lines


def main(folder: Path, way: str) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from gavamoe.config import RuntimeConfig

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)

    def lose_a_node() -> None:
        log = folder / "logs" / "count.jsonl"
        while not (log.is_file() and len(log.read_text().splitlines()) >= 4):
            time.sleep(0.2)
        cluster.remove_node(nodes[-1], allow_graceful=False)
        if way == "waits":
            time.sleep(15)
            cluster.add_node(num_cpus=1)

    threading.Thread(target=lose_a_node, daemon=True).start()
    runtime = RuntimeConfig(workers=3, min_workers=2 if way == "goes_on" else 0, max_failures=3, wait_minutes=5)
    ended = count(folder, runtime, elastic=True, steps=12, pause=0.5)
    lines = log_lines(folder, "count")
    print(json.dumps({"ended": ended, "steps": [x["step"] for x in lines], "workers": [x["workers"] for x in lines]}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
