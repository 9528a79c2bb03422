"""Run by test_s3_cluster in a process of its own: a cluster of a head and two nodes whose caches are three folders.

    python tests/helpers/s3_cluster.py FOLDER      prints the cluster's address; ends when its standard input does

They share a disk here, but no staging folder: what one writes reaches the others only through the storage.
"""

import sys
from pathlib import Path


def main(folder: Path) -> None:
    from ray.cluster_utils import Cluster

    def cache(name: str) -> dict[str, str]:
        return {"GAVAMOE_CACHE": str(folder / f"cache-{name}")}

    head = {"num_cpus": 0, "include_dashboard": False, "env_vars": cache("head")}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for name in ("one", "two"):
        cluster.add_node(num_cpus=1, env_vars=cache(name))
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
