"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the hidden weights of a network.

torch.optim.Muon takes matrices only, and Lightning one optimizer per stage. This one takes
convolution kernels as matrices (C_out, C_in * k * k), and the remaining weights by AdamW.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unclip_pl.networks.layers import Block
from unclip_pl.utils.precision import supports_dtype

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic (Jordan et al.)."""
MOMENTUM = 0.95


def hidden_weights(module: nn.Module) -> list[Tensor]:
    """Kernels and matrices of the linear and convolution layers inside the module's blocks.

    First and last layers, embeddings, norms and biases are left to AdamW.
    """
    blocks = [block for block in module.modules() if isinstance(block, Block)]
    layers = {layer: None for block in blocks for layer in block.modules()}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return [
        layer.weight for layer in layers if isinstance(layer, kinds) and layer.weight.requires_grad
    ]


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximately U V^T of each matrix U S V^T, by Newton-Schulz iterations.

    (N, rows, columns) -> the same shape. Singular values come out between about 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    rows, columns = matrices.shape[1:]
    fast = supports_dtype(torch.bfloat16, matrices.device)
    x = matrices.to(torch.bfloat16 if fast else torch.float32)
    x = x.mT if rows > columns else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if rows > columns else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for groups with `muon: True`, AdamW for the others.

    A step of Muon is the orthogonalised momentum of a weight (rows, columns), times
    sqrt(max(1, rows / columns)), as in torch.optim.Muon. A step with `found_inf` set changes
    nothing; it is looked up on the host, which a GPU waits for once per step.

    Args:
        params: groups, each with "params" and, where Muon is meant, "muon": True and its own "lr".
        lr, betas, eps, weight_decay: of AdamW, as in torch.optim.AdamW; Muon's groups use only lr
            and weight_decay.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"muon": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.found_inf is not None and bool(self.found_inf):
            return loss
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["weight_decay"] and parameters:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            if group["muon"]:
                self._muon(parameters, group)
            else:
                self._adamw(parameters, group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        same_shape = defaultdict(list)
        for parameter in parameters:
            same_shape[parameter.shape].append(parameter)
        for members in same_shape.values():
            updates = torch.stack([self._momentum(p).flatten(1) for p in members])
            rows, columns = updates.shape[1:]
            size = max(1.0, rows / columns) ** 0.5
            for parameter, update in zip(members, orthogonalized(updates)):
                parameter.sub_(update.view(parameter.shape), alpha=group["lr"] * size)

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Nesterov's momentum of the gradient."""
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(grad, 1 - MOMENTUM)
        return grad.lerp(state["momentum"], MOMENTUM)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            grad, state = parameter.grad, self.state[parameter]
            assert grad is not None
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            step = float(state["step"])
            state["exp_avg"].lerp_(grad, 1 - beta1)
            state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2)
            root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
            parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1**step))
