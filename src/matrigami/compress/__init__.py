"""Compression: weights rounded, removed or restructured where the loss feels it least."""

from matrigami.compress._allocation import Allocation, allocate, knapsack
from matrigami.compress._drivers import compress_, prune_, quantize_, structure_
from matrigami.compress._evaluation import Evaluation, evaluate
from matrigami.compress._formats import save_compressed_tensors, save_dense, save_gptq
from matrigami.compress._generation import self_calibration
from matrigami.compress._gradients import gradient_moments
from matrigami.compress._grid import Grid, QuantizedMatrix
from matrigami.compress._layers import set_weight, weight
from matrigami.compress._methods import Method
from matrigami.compress._onnx import save_onnx
from matrigami.compress._packing import packed, unpacked
from matrigami.compress._plan import CompressionPlan, Option, plan
from matrigami.compress._removal import Removal, remove
from matrigami.compress._report import LayerReport, Report
from matrigami.compress._rounding import Rounding, round_ldl
from matrigami.compress._shrink import Shrunk, shrink_
from matrigami.compress._store import load, quantized_values, save
from matrigami.compress._supports import (
    Support,
    n_of_m,
    unstructured,
    whole_columns,
    whole_rows,
)
from matrigami.compress._transformers import register_transformers
from matrigami.compress._waterfill import LatticeMatrix, Waterfilling, entropy, round_waterfill

__all__ = [
    "Allocation",
    "CompressionPlan",
    "Evaluation",
    "Grid",
    "LatticeMatrix",
    "LayerReport",
    "Method",
    "Option",
    "QuantizedMatrix",
    "Removal",
    "Report",
    "Rounding",
    "Shrunk",
    "Support",
    "Waterfilling",
    "allocate",
    "compress_",
    "entropy",
    "evaluate",
    "gradient_moments",
    "knapsack",
    "load",
    "n_of_m",
    "packed",
    "plan",
    "prune_",
    "quantize_",
    "quantized_values",
    "register_transformers",
    "remove",
    "round_ldl",
    "round_waterfill",
    "save",
    "save_compressed_tensors",
    "save_dense",
    "save_gptq",
    "save_onnx",
    "self_calibration",
    "set_weight",
    "shrink_",
    "structure_",
    "unpacked",
    "unstructured",
    "weight",
    "whole_columns",
    "whole_rows",
]
