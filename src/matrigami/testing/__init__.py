"""The law suites: what every matrix and every structure has to obey, for ours and for yours."""

from matrigami.testing._structure_laws import STRUCTURE_LAWS
from matrigami.testing._suite import (
    LAWS,
    OPERATOR_LAWS,
    SIZES,
    Size,
    check_operator,
    check_structure,
)

__all__ = [
    "LAWS",
    "OPERATOR_LAWS",
    "SIZES",
    "STRUCTURE_LAWS",
    "Size",
    "check_operator",
    "check_structure",
]
