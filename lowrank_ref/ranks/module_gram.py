r"""The Gram matrices behind DiffoRA's theory: of a wide ReLU layer, and of what each adapter adds at the start.

The paper argues with a wide network of one hidden layer: gradient descent is the faster, and generalises the better,
the larger the smallest eigenvalue of a Gram matrix (bounds of Du et al. 2019, Arora et al. 2019, quoted from memory).
A Gram matrix of several modules is a sum of positive semidefinite ones, so taking a module away cannot raise that
eigenvalue (Weyl); dividing by the number of modules, or spending the same numbers on fewer modules, can.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.adapters.lora import LoRALinear
from lowrank_ref.core.checks import check_matrix
from lowrank_ref.core.layers import adapters

__all__ = ["error_bound", "module_grams", "relu_gram", "smallest_eigenvalue"]


def relu_gram(X: Float[Tensor, "rows n"]) -> Float[Tensor, "rows rows"]:
    """Return H of an infinitely wide ReLU layer, H_ij = x_iᵀx_j (π - arccos ρ_ij) / 2π, ρ_ij the cosine of x_i and x_j.

    It is the mean of x_iᵀx_j·[wᵀx_i >= 0]·[wᵀx_j >= 0] over normal w.

    Raises:
        TypeError, ValueError: X is no finite matrix, or has a row of zeros, which has no angle.

    Example:
        >>> relu_gram(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))[0, 1].item()  # doctest: +ELLIPSIS
        0.2114...
    """
    check_matrix("X", X)
    sizes = X.norm(dim=1)
    if bool((sizes == 0).any()):
        raise ValueError("X: got a row of zeros, wanted rows with a direction")
    products = X @ X.T
    cosines = (products / (sizes[:, None] * sizes)).clamp(-1, 1).fill_diagonal_(1)
    return products * (math.pi - torch.arccos(cosines)) / (2 * math.pi)


def smallest_eigenvalue(H: Float[Tensor, "rows rows"]) -> float:
    """Return λ_min of a symmetric matrix.

    Raises:
        TypeError, ValueError: H is no finite square matrix.
    """
    check_matrix("H", H)
    if H.shape[0] != H.shape[1]:
        raise ValueError(f"H: got shape {tuple(H.shape)}, wanted a square matrix")
    return float(torch.linalg.eigvalsh(H)[0])


def error_bound(H: Float[Tensor, "rows rows"], y: Float[Tensor, " rows"]) -> float:
    """Return √(2 yᵀH⁻¹y / rows), the leading term of the bound on the test error (Arora et al. 2019)."""
    return math.sqrt(2 * float(y @ torch.linalg.solve(H, y)) / len(y))


def module_grams(model: nn.Module, x: Float[Tensor, "rows n"]) -> dict[str, Float[Tensor, "rows rows"]]:
    """Return path -> Gram matrix of what the outputs depend on B of each LoRA layer, as the mean over outputs.

    Entry i, j is the mean over outputs o of ⟨∂f_o(x_i)/∂B, ∂f_o(x_j)/∂B⟩. At the start, with B = 0, B is all that has
    a gradient, so the sum over modules is the tangent kernel of the adapted network.

    Args:
        model: rows -> outputs (rows, d), each row by itself; every LoRA layer in it is called once, with a matrix.
        x: inputs.

    Raises:
        ValueError: no LoRA layer.
    """
    layers = {path: layer for path, layer in adapters(model) if isinstance(layer, LoRALinear)}
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without LoRA layers, wanted at least one")
    inputs, outputs = dict[str, Tensor](), dict[str, Tensor]()

    def note(path: str, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[path], outputs[path] = arguments[0].detach(), output

    hooks = [
        layer.register_forward_hook(lambda _, arguments, output, path=path: note(path, arguments, output))
        for path, layer in layers.items()
    ]
    try:
        with torch.enable_grad():
            y = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    grams = {path: x.new_zeros(len(x), len(x)) for path in layers}
    for o in range(y.shape[1]):
        found = torch.autograd.grad(y[:, o].sum(), list(outputs.values()), retain_graph=True)
        for path, g in zip(outputs, found):
            grams[path] += g @ g.T / y.shape[1]
    for path, layer in layers.items():
        A, _, scale = layer.step_factors()
        h = scale * inputs[path] @ A.detach().T
        grams[path] *= h @ h.T
    return grams
