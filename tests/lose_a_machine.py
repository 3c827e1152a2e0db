"""Run by test_cluster.py in a process of its own: a cluster of two machines, of which one is lost in the middle of a run."""

import sys
from pathlib import Path

import ray
from fake_stages import calls, fake_stages
from ray.cluster_utils import Cluster

from jobs.bench_pipeline import pretend_request
from pipeline import cluster


def main(folder: Path) -> None:
    machines = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
    other = machines.add_node(num_cpus=4, num_gpus=3)
    try:
        with cluster.connect(machines.address):
            stages = fake_stages(folder, gpus={"encode": 1, "sample": 1}, sleeps_s={"sample": 0.3})
            outcomes, notes = [], []
            for outcome in cluster.run(stages, map(pretend_request, range(40)), on_progress=lambda progress: notes.extend(progress.notes)):
                outcomes.append(outcome)
                if len(outcomes) == 12:
                    machines.remove_node(other)
            print(*notes, sep="\n")
            print(f"{len({outcome.value.request.seed for outcome in outcomes})} clips, attempts {set(outcome.attempts for outcome in outcomes)}, "
                  f"{len(calls(folder, 'sample'))} samples begun")
    finally:
        ray.shutdown()
        machines.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
