"""Dense curvature from its definition: Jacobians by `torch.func`, without layers or factors.

Shapes: p = parameters in all, z = outputs of a batch, b = blocks, d = size of a block.
"""

import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev

from matrigami.curvature._passes import Setting, passes


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def jacobian(model, x):
    """Outputs `(N, ...)`, and their derivative `(z, p)`."""
    at = {name: p.detach() for name, p in trainable(model).items()}
    J = jacrev(lambda w: functional_call(model, w, (x,), tie_weights=True).flatten())(at)
    outputs = functional_call(model, at, (x,)).detach()
    return outputs, torch.cat([t.flatten(1) for t in J.values()], 1)


def weights(loss, batches):
    """The share of each batch in the loss over all of them."""
    sizes = [len(y) for _, y in batches]
    return [1.0 if loss.reduction == "sum" else n / sum(sizes) for n in sizes]


def gauss_newton(model, loss, batches):
    """`sum_b weight_b J.T H J`, `(p, p)`."""
    total = 0.0
    for (x, y), weight in zip(batches, weights(loss, batches), strict=True):
        f, J = jacobian(model, x)
        total = total + weight * J.mT @ output_hessian(loss, f, y) @ J
    return total


def output_hessian(loss, f, y):
    return hessian(lambda z: loss(z.view_as(f), y))(f.flatten())


def empirical(model, loss, batches):
    """`sum_n grad_n grad_n.T` with the gradient of the terms of one example, over all terms."""
    total = 0.0
    for (x, y), weight in zip(batches, weights(loss, batches), strict=True):
        f, J = jacobian(model, x)
        classes = f.shape[1] if isinstance(loss, nn.CrossEntropyLoss) else 1
        terms = f.numel() // classes
        terms = terms if loss.reduction == "mean" else 1
        g = grad(lambda z, y=y: loss(z, y))(f).flatten(1)
        rows = (g[:, :, None] * J.unflatten(0, g.shape)).sum(1)
        total = total + weight * terms * rows.mT @ rows
    return total


def places(model, names, stack=1):
    """Where the block of some parameters lies among all, `(b, d)`: `[weight bias]` row by row."""
    start, found = 0, {}
    for name, p in trainable(model).items():
        found[name] = torch.arange(start, start + p.numel()).view(p.shape)
        start += p.numel()
    if len(names) == 1:
        return found[names[0]].reshape(stack, -1)
    m = found[names[-1]].numel()
    return torch.cat([found[name].reshape(m, -1) for name in names], 1).reshape(stack, -1)


def block(F, model, names, stack=1):
    """The block of some parameters in a matrix over all, `(b, d, d)`."""
    at = places(model, names, stack)
    return F[at[:, :, None], at[:, None, :]]


def assembled(F, model, curvature):
    """The matrix over all parameters with nothing but the blocks that a curvature value has."""
    kept = torch.zeros_like(F)
    for names, value in zip(curvature.names, curvature.blocks, strict=True):
        at = places(model, names, value.shape[0])
        kept[at[:, :, None], at[:, None, :]] = 1.0
    return F * kept


def factors(model, loss, batches, layer):
    """K-FAC of a linear layer: `B` from the derivative by its output, `A` its mean input moment."""
    A, B, rows = 0.0, 0.0, 0
    for (x, y), weight in zip(batches, weights(loss, batches), strict=True):
        seen = []
        with layer.register_forward_hook(lambda _m, i, o, seen=seen: seen.extend((i[0], o))):
            f = model(x).detach()
        a, s = (t.detach() for t in seen)

        def output(e, x=x):
            with layer.register_forward_hook(lambda _m, _i, o: o + e):
                return model(x).flatten()

        J = jacrev(output)(torch.zeros_like(s)).reshape(f.numel(), -1, s.shape[-1])
        H = output_hessian(loss, f, y)
        B = B + weight * torch.einsum("ypi,yz,zpj->ij", J, H, J).contiguous()
        A, rows = A + a.reshape(-1, a.shape[-1]).mT @ a.reshape(-1, a.shape[-1]), rows + len(J[0])
    return B, A / rows


def nearest_product(F, m, n):
    """The Kronecker product nearest to one block, by a singular value decomposition."""
    U, s, V = torch.linalg.svd(F.view(m, n, m, n).transpose(1, 2).reshape(m * m, n * n))
    return s[0] * torch.kron(U[:, 0].view(m, m), V[0].view(n, n))


def pair_sums(model, loss, batches, *, labels="exact", joint=True):
    """`sum_nk vec(dW_nk) vec(dW_nk).T` of each block, from what `uses` says of its layers."""
    total = {}
    for blocks in passes(model, loss, batches, Setting(labels, joint, False, 0)):
        for key, (use, *more) in blocks.items():
            if more:
                raise AssertionError(f"{key} has several uses")
            dW = use.gradients.mT @ use.inputs[:, :, None]  # b N K o i
            v = (dW.mT if use.transposed else dW).flatten(3).flatten(1, 2)
            total[key] = total.get(key, 0.0) + v.mT @ v
    return total


def distance(A, B):
    """The Frobenius norm of the difference, relative to the second."""
    return float(torch.linalg.matrix_norm(A - B) / torch.linalg.matrix_norm(B))
