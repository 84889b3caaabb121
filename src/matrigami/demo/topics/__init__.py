"""The topics of the gallery in their order: one file each, found by its name."""

TOPICS: dict[str, tuple[str, str]] = {
    "three-ways": (
        "Three ways to model a system",
        "A mesh, particles, a neural network: three matrices, one solve.",
    ),
    "finite-differences": (
        "Finite differences and A x = b",
        "A derivative is a difference of neighbours, so a differential equation is a system.",
    ),
    "p1-elements": (
        "P1 elements",
        "Piece-wise linear functions on triangles, and the tones of a drum.",
    ),
    "particles": (
        "Particles and the fast multipole method",
        "Every pair counts, and hardly any pair is computed.",
    ),
    "composition": (
        "l = f(g(h(x))) and −log p",
        "A loss is a composition; its gradient is a product of matrices.",
    ),
    "linear-algebra": (
        "Basic linear algebra, one API",
        "The same questions to every structure, with the answers of the dense matrix.",
    ),
    "products": (
        "Products of matrices",
        "Kronecker, Khatri–Rao, face-splitting, Hadamard, outer, sums, and their identities.",
    ),
    "hadamard": (
        "Hadamard",
        "The entry-wise product of two matrices of rank r has rank r².",
    ),
    "low-rank": (
        "Low rank",
        "Few columns times few rows: the best one is a truncated SVD.",
    ),
    "kronecker": (
        "Kronecker",
        "The nearest product of two small matrices; the factors answer for the whole.",
    ),
    "monarch": (
        "Monarch",
        "Two block-diagonal factors and a shuffle; the FFT is one of them.",
    ),
    "tensor-train": (
        "Tensor train",
        "One small core for each digit of the index.",
    ),
    "block-tensor-train": (
        "Block tensor train",
        "Monarch with a rank: from one step of the FFT to any matrix.",
    ),
    "einsums": (
        "The continuous space of einsums",
        "All products of two factors, with the coordinates ω, ψ, ν.",
    ),
    "scaling-laws": (
        "Scaling laws",
        "Error against multiply-adds: which structure buys the most, on CIFAR-100 and digits.",
    ),
    "mixture-of-experts": (
        "BTT mixture of experts",
        "The rank index of a train is the index of an expert; only a few are computed.",
    ),
    "backprop": (
        "Backprop is a Kronecker product",
        "A layer's gradient is g ⊗ a, so its Fisher matrix is a mean of Kronecker products.",
    ),
    "hessian-and-fisher": (
        "Hessian and Fisher",
        "What the two share, and how training brings them together.",
    ),
    "shampoo": (
        "Shampoo",
        "Precondition a gradient from both sides: its singular values become equal (Muon).",
    ),
    "soap": (
        "SOAP",
        "Adam in the eigenbasis of Shampoo.",
    ),
    "quantisation": (
        "Quantisation",
        "Fewer bits for each weight, and how far that is from Shannon's bound.",
    ),
    "pruning": (
        "Pruning",
        "Which weights to remove, and what the others can make good.",
    ),
    "hpc-against-ai": (
        "HPC against AI matrices",
        "Where blocks have low rank, and where all tiles are alike.",
    ),
    "equal-budget": (
        "Changing the architecture is the simplest way",
        "One table: the same bytes spent on width, structure, optimiser, bits, zeros.",
    ),
}
"""Each topic: its heading, and one line. Its page is in the file of its name."""

__all__ = ["TOPICS"]
