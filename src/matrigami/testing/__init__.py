"""The law suites: what structures, layers, curvature, optimisers, tasks and models must obey."""

from matrigami.testing._curvature_laws import CURVATURE_LAWS, check_curvature
from matrigami.testing._layer_laws import LAYER_LAWS, check_layer
from matrigami.testing._optimizer_suite import OPTIMIZER_LAWS, check_optimizer
from matrigami.testing._structure_laws import STRUCTURE_LAWS
from matrigami.testing._study_laws import MODEL_LAWS, TASK_LAWS, check_model, check_task
from matrigami.testing._suite import (
    LAWS,
    OPERATOR_LAWS,
    SIZES,
    Size,
    check_operator,
    check_structure,
)

__all__ = [
    "CURVATURE_LAWS",
    "LAWS",
    "LAYER_LAWS",
    "MODEL_LAWS",
    "OPERATOR_LAWS",
    "OPTIMIZER_LAWS",
    "SIZES",
    "STRUCTURE_LAWS",
    "TASK_LAWS",
    "Size",
    "check_curvature",
    "check_layer",
    "check_model",
    "check_operator",
    "check_optimizer",
    "check_structure",
    "check_task",
]
