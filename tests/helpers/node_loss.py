"""Run by test_faults in a process of its own: a cluster of three nodes on this machine, one of which is killed.

    python tests/helpers/node_loss.py FOLDER goes_on|waits|in_vain

Prints as JSON {"ended": the loop's outcome or the error, "steps" and "workers": of each logged step, "beside": whether
the worker log lay on the driver's node}. After the loss, `goes_on` may train with two workers, `waits` gets a new node
15 s later, `in_vain` gets none.
"""

import json
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gavamoe.config.schema import RuntimeConfig
from gavamoe.errors import RunError
from helpers.fault_run import count, log_lines


def main(folder: Path, way: str) -> None:
    import ray
    from ray._private.state import actors
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    runtime = RuntimeConfig(
        workers=3, min_workers=2 if way == "goes_on" else 0, max_failures=3, wait_minutes=2 if way == "in_vain" else 5
    )
    # The training has a thread of its own: only the main thread may add a node, since Ray sets signal handlers there.
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(count, folder, runtime, elastic=True, steps=12, pause=0.5)
        wait_for_lines(folder, 4, training)
        [log] = [actor for actor in actors().values() if actor["ActorClassName"] == "WorkerLog"]
        beside = log["Address"]["NodeID"] == ray.get_runtime_context().get_node_id()
        cluster.remove_node(nodes[-1], allow_graceful=False)
        if way == "waits":
            time.sleep(15)
            cluster.add_node(num_cpus=1)
        try:
            ended = training.result()
        except RunError as error:
            ended = str(error)
    lines = log_lines(folder, "count")
    found = {"steps": [x["step"] for x in lines], "workers": [x["workers"] for x in lines]}
    print(json.dumps(found | {"ended": ended, "beside": beside}))
    ray.shutdown()
    cluster.shutdown()


def wait_for_lines(folder: Path, wanted: int, training: "Future[Any]") -> None:
    log = folder / "logs" / "count.jsonl"
    while not training.done() and not (log.is_file() and len(log.read_text().splitlines()) >= wanted):
        time.sleep(0.2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
