"""Which structure a matrix has."""

from matrigami.studies.analysis._analyze import analyze
from matrigami.studies.analysis._curves import Curve
from matrigami.studies.analysis._families import Family, Place, projected
from matrigami.studies.analysis._folder import Settings, analyze_all, write_gains
from matrigami.studies.analysis._presets import preset_sources
from matrigami.studies.analysis._result import Analysis, Finding
from matrigami.studies.analysis._sources import Source, file_sources, kernel_source
from matrigami.studies.analysis._table import FAMILIES

__all__ = [
    "FAMILIES",
    "Analysis",
    "Curve",
    "Family",
    "Finding",
    "Place",
    "Settings",
    "Source",
    "analyze",
    "analyze_all",
    "file_sources",
    "kernel_source",
    "preset_sources",
    "projected",
    "write_gains",
]
