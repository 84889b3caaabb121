"""The topics of the gallery in their order: one file each, found by its name."""

TOPICS: dict[str, tuple[str, str]] = {
    "finite-differences": (
        "Finite differences and A u = f",
        "A derivative is a difference of neighbours, so a differential equation is a system.",
    ),
    "low-rank": ("Low rank", "Few columns times few rows: the best one is a truncated SVD."),
    "monarch": ("Monarch", "Two block-diagonal factors and a shuffle; the FFT is one of them."),
    "shampoo": (
        "Shampoo and Muon",
        "Precondition a gradient matrix from both sides: its singular values become equal.",
    ),
    "quantisation": (
        "Quantisation",
        "Fewer bits for each weight, and how far that is from Shannon's bound.",
    ),
}
"""Each topic: its heading, and one line. Its page is in the file of its name."""

__all__ = ["TOPICS"]
