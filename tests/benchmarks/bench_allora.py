"""ALLoRA on a GPU: what its row norms cost (10 seconds).

    python tests/benchmarks/bench_allora.py --out book/results/allora_scale.json

steps: forward and backward of one layer of 4096 x 4096, 8192 tokens, bfloat16 with float32 factors under autocast. The
paper's listing makes BA for its norms; here a Gram matrix does.
"""

from collections.abc import Callable
from typing import Any

import torch
from bench_layers import Sink, extra_mib, timed
from common import Runs, arguments
from torch import Tensor, nn

from lowrank_ref.adapters import ALLoRALinear, DoRALinear, LoRALinear
from lowrank_ref.adapters.allora import adaptive_factor


class WholeProduct(ALLoRALinear):
    """ALLoRA whose row norms come from BA itself, an (m, n) matrix a step."""

    @torch.no_grad()
    def gradient_factors(self, x: Tensor | None = None) -> Tensor:
        """Return c."""
        with torch.autocast(self.A.device.type, enabled=False):
            return adaptive_factor((self.B @ self.A).norm(dim=1), self.boost)


LAYER_ARMS: dict[str, Callable[[nn.Linear, int], nn.Module]] = {
    "LoRA": lambda base, r: LoRALinear(base, r, alpha=r, generator=torch.Generator().manual_seed(0)),
    "ALLoRA": lambda base, r: ALLoRALinear(base, r, boost=2.0, generator=torch.Generator().manual_seed(0)),
    "ALLoRA, BA made": lambda base, r: WholeProduct(base, r, boost=2.0, generator=torch.Generator().manual_seed(0)),
    "DoRA": lambda base, r: DoRALinear(base, r, alpha=r, generator=torch.Generator().manual_seed(0)),
}


def layer_times(rank: int, device: str, tiny: bool) -> dict[str, dict[str, float]]:
    """Time all layers in turn, and the memory that a step adds."""
    width, tokens = (64, 96) if tiny else (4096, 8192)
    g = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(tokens, width, generator=g).to(device, torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    runs: dict[str, Callable[[], Any]] = {}
    for name, make in LAYER_ARMS.items():
        torch.manual_seed(0)
        layer: Any = make(nn.Linear(width, width, bias=False).to(torch.bfloat16), rank).to(device)
        layer.B.data.normal_(std=0.01)
        trained = [x, *layer.adapter_parameters().values()]

        def step(layer: nn.Module = layer, trained: list[Tensor] = trained) -> None:
            with torch.autocast(device, torch.bfloat16):
                end = Sink.apply(layer(x), gradient)
            torch.autograd.grad(end, trained)

        runs[name] = step
    memory = {name: extra_mib(run, device) for name, run in runs.items()}
    times = timed(runs, device, 3 if tiny else 30)
    return {name: {**times[name], "extra_mib": memory[name]} for name in runs}


def main() -> None:
    """Run all layers at two ranks."""
    args = arguments(__doc__ or "", ("steps",))
    setting = "one layer of 4096 x 4096, 8192 tokens, bfloat16, factors in float32, autocast; forward and backward"
    runs = Runs(args.out, "steps", setting=setting, seconds=args.seconds)
    for rank in (8, 32):
        if not any(row["rank"] == rank for row in runs.rows):
            found = layer_times(rank, args.device, args.tiny)
            for name, numbers in found.items():
                runs.row({"method": name, "rank": rank}, lambda numbers=numbers: numbers)


if __name__ == "__main__":
    main()
