"""Structured pruning of vision transformers that people can rely on.

anatomy = secateur.inspect(model)                                   # what can be removed
stats = secateur.calibrate(model, loader)                           # what matters to the output
plan = secateur.plan(model, stats, target=secateur.Target(macs=0.5))
report = secateur.prune(model, plan)                                # in place
secateur.save(model, path)
model = secateur.load(path)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .timm_models import offer

if TYPE_CHECKING:
    from . import core, data
    from .anatomy.anatomy import Anatomy
    from .budgets.target import Target
    from .calibration.calibrate import calibrate
    from .checkpoints.load import load_dense
    from .errors import Error, InvalidArgument, NumericalError, Unsupported
    from .exports.base import ExportReport
    from .exports.export import export
    from .exports.native import load, save
    from .families.registry import inspect
    from .latency.bench import Benchmark, bench
    from .latency.measure import measure_latency
    from .latency.table import LatencyTable
    from .methods.registry import methods
    from .plans.make import plan
    from .plans.plan import Plan
    from .plans.prune import prune
    from .plans.report import Report
    from .reconstruction.reconstruct import Reconstruction, reconstruct
    from .searches.objectives import AccuracyCritical, LatencySensitive, MemoryConstrained
    from .searches.result import SearchResult
    from .searches.search import search
    from .searches.sequential import prune_sequential
    from .statistics.statistics import Statistics
    from .trained.registry import trained_method, trained_methods
    from .training.evaluate import Evaluation, evaluate
    from .training.finetune import FinetuneResult, finetune
    from .training.hooks import LoopHook

# Maps each name to its module, which is imported on first use, so that `secateur --help` does not need torch.
_MODULES = {
    "AccuracyCritical": "searches.objectives",
    "Anatomy": "anatomy.anatomy",
    "Benchmark": "latency.bench",
    "Error": "errors",
    "Evaluation": "training.evaluate",
    "ExportReport": "exports.base",
    "FinetuneResult": "training.finetune",
    "InvalidArgument": "errors",
    "LatencySensitive": "searches.objectives",
    "LatencyTable": "latency.table",
    "LoopHook": "training.hooks",
    "MemoryConstrained": "searches.objectives",
    "NumericalError": "errors",
    "Plan": "plans.plan",
    "Reconstruction": "reconstruction.reconstruct",
    "Report": "plans.report",
    "SearchResult": "searches.result",
    "Statistics": "statistics.statistics",
    "Target": "budgets.target",
    "Unsupported": "errors",
    "bench": "latency.bench",
    "calibrate": "calibration.calibrate",
    "evaluate": "training.evaluate",
    "export": "exports.export",
    "finetune": "training.finetune",
    "inspect": "families.registry",
    "load": "exports.native",
    "load_dense": "checkpoints.load",
    "measure_latency": "latency.measure",
    "methods": "methods.registry",
    "plan": "plans.make",
    "prune": "plans.prune",
    "prune_sequential": "searches.sequential",
    "reconstruct": "reconstruction.reconstruct",
    "save": "exports.native",
    "search": "searches.search",
    "trained_method": "trained.registry",
    "trained_methods": "trained.registry",
}
__all__ = [
    "AccuracyCritical",
    "Anatomy",
    "Benchmark",
    "Error",
    "Evaluation",
    "ExportReport",
    "FinetuneResult",
    "InvalidArgument",
    "LatencySensitive",
    "LatencyTable",
    "LoopHook",
    "MemoryConstrained",
    "NumericalError",
    "Plan",
    "Reconstruction",
    "Report",
    "SearchResult",
    "Statistics",
    "Target",
    "Unsupported",
    "bench",
    "calibrate",
    "core",
    "data",
    "evaluate",
    "export",
    "finetune",
    "inspect",
    "load",
    "load_dense",
    "measure_latency",
    "methods",
    "plan",
    "prune",
    "prune_sequential",
    "reconstruct",
    "save",
    "search",
    "trained_method",
    "trained_methods",
]


# timm.create_model builds pruned models wherever secateur is imported; timm itself is not imported for that.
offer()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("secateur")
    elif name in ("core", "data"):
        value = import_module(f".{name}", __name__)
    elif name in _MODULES:
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
