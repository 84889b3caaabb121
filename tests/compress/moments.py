"""Layers and second moments to try compression on: ill-conditioned, of channels of unequal size."""

import torch


def moment(n, vectors=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator) * torch.linspace(0.1, 3, n)
    x = torch.randn(vectors, n, generator=generator) @ mixing
    return x.mT @ x / vectors


def layer(m, n, vectors=200, seed=0):
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(seed + 100))
    return W, moment(n, vectors, seed), moment(m, vectors, seed + 50)
