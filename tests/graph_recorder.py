"""A recorder for model/graphs.py where there is no CUDA."""


class Recorder:
    """Records as CUDA does, without a device: a replay reads from and writes to the places of the recording."""

    def __init__(self):
        self.made = 0

    def __call__(self, run):
        self.made += 1
        result = run()
        return lambda: result.copy_(run()), result
