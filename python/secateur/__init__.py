"""Structured pruning of vision transformers that people can rely on.

anatomy = secateur.inspect(model)                  what can be cut
stats   = secateur.calibrate(model, loader)        what is worth keeping
plan    = secateur.plan(model, stats, target=secateur.Target(macs=0.5))
report  = secateur.prune(model, plan)              in place
secateur.save(model, path); secateur.load(path)
"""

from importlib.metadata import version as _version

from . import core, data
from .allocate import Target
from .anatomy import Anatomy
from .bench import Benchmark, bench
from .calibrate import calibrate
from .checkpoint import load, save
from .errors import Error, InvalidArgument, NumericalError, Unsupported
from .evaluate import Evaluation, evaluate
from .families import inspect
from .finetune import FinetuneResult, finetune
from .latency import LatencyTable
from .objectives import AccuracyCritical, LatencySensitive, MemoryConstrained
from .plan import Plan, plan
from .rounds import SearchResult
from .score import methods
from .search import search
from .sequential import prune_sequential
from .statistics import Statistics
from .surgery import Report, prune
from .timing import measure_latency

__all__ = [
    "AccuracyCritical",
    "Anatomy",
    "Benchmark",
    "Error",
    "Evaluation",
    "FinetuneResult",
    "InvalidArgument",
    "LatencySensitive",
    "LatencyTable",
    "MemoryConstrained",
    "NumericalError",
    "Plan",
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
    "finetune",
    "inspect",
    "load",
    "measure_latency",
    "methods",
    "plan",
    "prune",
    "prune_sequential",
    "save",
    "search",
]
__version__ = _version("secateur")
