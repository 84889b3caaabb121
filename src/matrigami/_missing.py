"""What is said where an optional package is not installed."""

DISTRIBUTIONS = {"PIL": "pillow", "skfem": "scikit-fem", "sklearn": "scikit-learn"}
"""Packages that pip knows by another name."""


def what_is_missing(who: str, error: ModuleNotFoundError) -> str:
    """Which package somebody needs, and how to get it.

    Examples:
        >>> what_is_missing("demo", ModuleNotFoundError(name="skfem.mesh"))
        'demo needs scikit-fem, which is not installed: pip install scikit-fem'
    """
    package = (error.name or "").partition(".")[0]
    known = DISTRIBUTIONS.get(package, package)
    return f"{who} needs {known}, which is not installed: pip install {known}"
