"""Which structure a matrix has."""

from matrigami.studies.analysis._analyze import analyze
from matrigami.studies.analysis._curves import Curve
from matrigami.studies.analysis._families import Family, Place, projected
from matrigami.studies.analysis._result import Analysis, Finding
from matrigami.studies.analysis._table import FAMILIES

__all__ = ["FAMILIES", "Analysis", "Curve", "Family", "Finding", "Place", "analyze", "projected"]
