"""Run by test_cluster.py in a process of its own: a cluster of two machines, of which one is lost during a run.

The one that is lost holds a sampler and, in its object store, all embeddings; the encoder has left, and no GPU is free.
"""

import os
import secrets
import sys
from pathlib import Path

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}     # Ray reads them when imported

import ray  # noqa: E402
from fake_stages import calls, fake_stages
from ray.cluster_utils import Cluster

from dailies.jobs.bench.pretend import pretend_request
from dailies.pipeline.scheduler import cluster


def main(folder: Path) -> None:
    head = {"num_cpus": 4, "num_gpus": 2, "include_dashboard": False}
    machines = Cluster(initialize_head=True, connect=False, head_node_args=head)
    other = machines.add_node(num_cpus=1, num_gpus=1)       # the encoder goes where the fewest GPUs are
    try:
        with cluster.connect(machines.address):
            stages = fake_stages(folder, gpus={"encode": 1, "sample": 1}, sleeps_s={"sample": 0.3},
                                 replicas={"publish": 1}, embedding_bytes=1_000_000)
            seeds, attempts, notes = set(), set(), []
            for outcome in cluster.run(stages, map(pretend_request, range(40)),
                                       on_progress=lambda progress: notes.extend(progress.notes)):
                seeds.add(outcome.value.request.seed)
                attempts.add(outcome.attempts)
                if len(seeds) == 12:
                    machines.remove_node(other)
            print(*notes, f"{len(seeds)} clips, attempts {attempts}, {len(calls(folder, 'sample'))} samples begun",
                  sep="\n")
    finally:
        ray.shutdown()
        machines.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
