"""Studies: which structure learns best at equal computation, and which one a matrix has."""

from matrigami.studies._config import RunConfig
from matrigami.studies._environment import environment
from matrigami.studies._fit import (
    METRICS,
    PowerLaw,
    fit_power_law,
    fit_results,
    fit_tables,
    frontier,
    write_fit,
)
from matrigami.studies._load import LoadedRun, load_run
from matrigami.studies._optimizers import (
    canonical_optimizer,
    parse_optimizer,
)
from matrigami.studies._progress import Snapshot, duration
from matrigami.studies._record import (
    COLUMNS,
    file_hash,
    labelled,
    read_results,
    write_atomic,
    write_results,
)
from matrigami.studies._run import (
    Outcome,
    Plan,
    load_plan,
    plan_study,
    run_states,
    run_study,
    update_results,
)
from matrigami.studies._single import plan_run, single_run, train_single
from matrigami.studies._size import RunSize, check_data, run_size
from matrigami.studies._spec import (
    Study,
    canonical_structure,
    load_preset,
    load_spec,
    parse_spec,
    preset_names,
)
from matrigami.studies._team import Team, joined
from matrigami.studies._train import Interrupted, train_run
from matrigami.studies.analysis import (
    FAMILIES,
    Analysis,
    Curve,
    Family,
    Finding,
    Place,
    Settings,
    Source,
    analyze,
    analyze_all,
    file_sources,
    kernel_source,
    preset_sources,
    projected,
    write_gains,
)

__all__ = [
    "COLUMNS",
    "FAMILIES",
    "METRICS",
    "Analysis",
    "Curve",
    "Family",
    "Finding",
    "Interrupted",
    "LoadedRun",
    "Outcome",
    "Place",
    "Plan",
    "PowerLaw",
    "RunConfig",
    "RunSize",
    "Settings",
    "Snapshot",
    "Source",
    "Study",
    "Team",
    "analyze",
    "analyze_all",
    "canonical_optimizer",
    "canonical_structure",
    "check_data",
    "duration",
    "environment",
    "file_hash",
    "file_sources",
    "fit_power_law",
    "fit_results",
    "fit_tables",
    "frontier",
    "joined",
    "kernel_source",
    "labelled",
    "load_plan",
    "load_preset",
    "load_run",
    "load_spec",
    "parse_optimizer",
    "parse_spec",
    "plan_run",
    "plan_study",
    "preset_names",
    "preset_sources",
    "projected",
    "read_results",
    "run_size",
    "run_states",
    "run_study",
    "single_run",
    "train_run",
    "train_single",
    "update_results",
    "write_atomic",
    "write_fit",
    "write_gains",
    "write_results",
]
