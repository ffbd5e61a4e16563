"""Products with packed ternary weights beside cuBLAS in bfloat16 and gemlite, from one row of activations to 2048.

    python tests/benchmarks/bench_ternary.py --out book/results/ternary_kernel.json

Every product is captured in a CUDA graph over several copies of the weight, more than the L2 cache holds. Results are
compared with float64 in the same run.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import arguments, save
from torch.nn import functional as F

from lowrank_ref.lowbit import fast, pack
from lowrank_ref.lowbit import ternary as definition

SHAPES = [(4096, 4096), (14336, 4096), (8192, 8192), (16384, 16384)]
ROWS = {"decode": (1, 8, 16), "prefill": (64, 256, 2048)}
CACHE = 200_000_000  # bytes, four times the L2 cache of a Hopper card


def microseconds(calls: list[Callable[[], Any]], repeats: int = 9) -> tuple[float, float]:
    """Median and spread of one call, from a graph of all of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for i in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(), graph.replay(), end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(1000 * start.elapsed_time(end) / len(calls))
    return statistics.median(times), max(times) - min(times)


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((y.double() - exact).norm() / exact.norm())


def gemlite(T: torch.Tensor, beta: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Build gemlite's layer with int8 activations and 2-bit weights."""
    from gemlite.helper import A8W158_INT_dynamic

    return A8W158_INT_dynamic(device="cuda", dtype=torch.bfloat16).from_weights(T.bfloat16(), beta)


def measure(m: int, n: int, all_rows: tuple[int, ...]) -> list[dict[str, Any]]:
    """Time all methods on one shape."""
    from lowrank_ref.kernels.ternary import quantise, ternary_matmul

    T = torch.randint(-1, 2, (m, n), device="cuda", dtype=torch.int8)
    beta = torch.tensor(0.02, device="cuda")
    packed = [pack(T) for _ in range(max(2, CACHE // (m * n // 4)))]
    dense = [(beta * T).bfloat16() for _ in range(max(2, CACHE // (2 * m * n)))]
    peers = {}
    try:
        peers["gemlite, int8 activations"] = [gemlite(T, beta) for _ in range(max(2, CACHE // (m * n // 4)))]
    except Exception as problem:  # a peer that does not install or build is left out, and said so
        print("gemlite:", type(problem).__name__, str(problem)[:100], flush=True)
    rows_out = []
    for rows in all_rows:
        x = torch.randn(rows, n, device="cuda", dtype=torch.bfloat16)
        codes, scale, x_sum = quantise(x)
        exact = x.double() @ (beta.double() * T.double()).T
        whole = (codes.double() @ T.double().T) * (beta / scale[:, None]).double()
        int8 = {"scale": scale, "x_sum": x_sum, "dtype": torch.bfloat16}
        methods = {
            "cuBLAS bf16": ([partial(F.linear, x, W) for W in dense], exact),
            "bf16 activations": ([partial(ternary_matmul, x, P, beta) for P in packed], exact),
            "int8 activations": ([partial(ternary_matmul, codes, P, beta, **int8) for P in packed], whole),
            "int8, quantising included": ([partial(fast.packed_linear, x, P, beta) for P in packed], whole),
        }
        methods |= {name: ([partial(layer, x) for layer in built], exact) for name, built in peers.items()}
        base = 0.0
        for name, (calls, wanted) in methods.items():
            try:
                us, spread = microseconds(calls)
                row = {"shape": [m, n], "rows": rows, "method": name, "us": round(us, 2), "spread_us": round(spread, 2)}
                row["error"] = float(f"{error(calls[0](), wanted):.2g}")
            except Exception as problem:
                print(name, type(problem).__name__, str(problem)[:100], flush=True)
                continue
            base = base or us
            row["times_cublas"] = round(base / us, 2)
            row["tb_per_s"] = round(
                (m * n * (2 if name.startswith("cuBLAS") else 0.25) + 4 * rows * (m + n)) / us / 1e6, 2
            )
            row["tflop_per_s"] = round(2 * m * n * rows / us / 1e6, 1)
            rows_out.append(row)
            print(row, flush=True)
    return rows_out


def tiny() -> list[dict[str, Any]]:
    """Check the script on a CPU, with the definitions."""
    T, x = torch.randint(-1, 2, (8, 12), dtype=torch.int8), torch.randn(2, 12)
    y = definition.packed_matmul(x, pack(T), torch.tensor(0.5))
    return [
        {
            "shape": [8, 12],
            "rows": 2,
            "method": "definition",
            "us": 0.0,
            "error": error(y, x.double() @ T.T.double() / 2),
        }
    ]


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", tuple(ROWS))
    for part in args.part:
        rows = tiny() if args.tiny else [row for m, n in SHAPES for row in measure(m, n, ROWS[part])]
        setting = "y = xWᵀ with ternary W (m, n), one scale; median of a CUDA graph over rotating copies of W"
        save(args.out, part, {"setting": setting, "rows": rows}, ("triton", "gemlite"))


if __name__ == "__main__":
    main()
