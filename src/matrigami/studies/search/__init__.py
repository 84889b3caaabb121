"""Search of the einsum family: random members under a budget, halved from size to size."""

from matrigami.studies.search._rungs import run_search
from matrigami.studies.search._spec import Search, load_search, sampled
from matrigami.studies.search._taxonomy import NEAR, search_page, taxonomy

__all__ = ["NEAR", "Search", "load_search", "run_search", "sampled", "search_page", "taxonomy"]
