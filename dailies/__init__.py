"""dailies: render tonight, look tomorrow. Large text-to-video batches, from a manifest of prompts to clips in a store.

What stands in __all__ is for programs, and described in docs/api.md; the command `dailies` is built on it. A name is
imported when it is first asked for: `import dailies` takes no time.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# the checkout, or the site-packages, that dailies is imported from
HOME = Path(__file__).resolve().parent.parent
if (HOME / "kernels" / "__init__.py").is_file() and not (HOME / "dailies" / "kernels").is_dir():
    # a checkout: dailies.kernels is the folder kernels beside this one
    __path__.append(str(HOME))

if TYPE_CHECKING:
    from dailies.actors.messages import Clip as Clip
    from dailies.actors.messages import Failure as Failure
    from dailies.actors.messages import Request as Request
    from dailies.model.card import ModelCard as ModelCard
    from dailies.model.catalog import CATALOG as CATALOG
    from dailies.model.errors import DailiesError as DailiesError
    from dailies.model.weights import locate as locate_weights
    from dailies.pipeline.manifest.manifest import Manifest as Manifest
    from dailies.pipeline.plan import Plan as Plan
    from dailies.pipeline.resolved import Defaults as Defaults
    from dailies.pipeline.run.ledger import Ledger as Ledger
    from dailies.pipeline.run.ledger import read as read_ledger
    from dailies.pipeline.run.run import Run as Run
    from dailies.pipeline.run.run import prepare as prepare
    from dailies.pipeline.scheduler.cluster import connect as connect
    from dailies.pipeline.scheduler.cluster import run as run_cluster
    from dailies.pipeline.stages import Outcome as Outcome
    from dailies.pipeline.stages import Stage as Stage
    from dailies.pipeline.stages import Step as Step
    from dailies.pipeline.stages import run_local as run_local
    from dailies.pipeline.store import Store as Store
    from dailies.pipeline.store import open_store as open_store
    from dailies.pipeline.store import register_store as register_store
    from dailies.pipeline.text_to_video import text_to_video as text_to_video

# the same for who runs: where each name lies, and what it is called there if not the same
_PLACES = {
    "CATALOG": "model.catalog", "Clip": "actors.messages", "DailiesError": "model.errors",
    "Defaults": "pipeline.resolved", "Failure": "actors.messages", "Ledger": "pipeline.run.ledger",
    "Manifest": "pipeline.manifest.manifest", "ModelCard": "model.card", "Outcome": "pipeline.stages",
    "Plan": "pipeline.plan", "Request": "actors.messages", "Run": "pipeline.run.run",
    "Stage": "pipeline.stages", "Step": "pipeline.stages", "Store": "pipeline.store",
    "connect": "pipeline.scheduler.cluster", "locate_weights": "model.weights:locate",
    "open_store": "pipeline.store", "prepare": "pipeline.run.run", "read_ledger": "pipeline.run.ledger:read",
    "register_store": "pipeline.store", "run_cluster": "pipeline.scheduler.cluster:run",
    "run_local": "pipeline.stages", "text_to_video": "pipeline.text_to_video",
}

__all__ = [
    "CATALOG", "Clip", "DailiesError", "Defaults", "Failure", "Ledger", "Manifest", "ModelCard", "Outcome", "Plan",
    "Request", "Run", "Stage", "Step", "Store", "connect", "locate_weights", "open_store", "prepare", "read_ledger",
    "register_store", "run_cluster", "run_local", "text_to_video",
]


if not TYPE_CHECKING:                                   # to a type checker every name would be there, of type Any
    def __getattr__(name: str) -> Any:
        if name not in _PLACES:
            raise AttributeError(f"module 'dailies' has no attribute {name!r}")
        module, _, there = _PLACES[name].partition(":")
        value = getattr(import_module(f"dailies.{module}"), there or name)
        globals()[name] = value                         # asked for once
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
