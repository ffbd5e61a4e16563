"""Optimizer steps on the matrices of a 1.2B-parameter stack, and bases of a gradient: ours beside the peers.

    python tests/benchmarks/bench_optimizers.py --out book/results/optimizers.json

Part "steps" takes steps of 168 matrices (24 layers, d = 2048, ffn 5461, bf16) whose gradients are set once, with
torch's AdamW, ours, galore-torch, fira, bitsandbytes and torchao; a peer that is not installed is left out. All
optimizers hold the same weights and step in turns. Part "ceilings" measures what the card can do at most: bytes moved
and operations a second. Part "bases" finds the top directions of gradients in several ways,
each with the energy it captures relative to the exact ones.
"""

import gc
import math
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import MIB, arguments, interleaved, milliseconds, peak_mib, reset_peak, save, synchronize
from torch import Tensor, nn

from lowrank_ref.core.accounting import state_bytes
from lowrank_ref.core.linalg import captured_energy, gram_basis, power_basis, subspace_basis, svd_basis
from lowrank_ref.lab.data import english_text
from lowrank_ref.lab.models import GPT
from lowrank_ref.optimizers import GaLoreAdamW

PEERS = ("galore-torch", "fira", "bitsandbytes", "torchao")


def lowrank_basis(G: Tensor, rank: int, *, start: Tensor | None = None) -> Tensor:
    """torch's randomised SVD with one power iteration."""
    return torch.svd_lowrank(G, q=rank, niter=1)[0]


_cosines: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}


def cosines(size: int, like: Tensor) -> Tensor:
    """The orthogonal matrix of the DCT-II, one row a frequency; made once for each size."""
    key = (size, like.device, like.dtype)
    if key not in _cosines:
        k, i = (torch.arange(size, dtype=torch.float64, device=like.device) for _ in range(2))
        D = torch.cos(math.pi / size * k[:, None] * (i + 0.5)) * math.sqrt(2 / size)
        D[0] /= math.sqrt(2)
        _cosines[key] = D.to(like.dtype)
    return _cosines[key]


def cosine_basis(G: Tensor, rank: int, *, start: Tensor | None = None) -> Tensor:
    """The `rank` vectors of the cosine transform in which G has the most energy: one product, no decomposition."""
    D = cosines(len(G), G)
    return D[(D @ G).square().sum(dim=1).topk(rank).indices].T


#: Name -> basis(G, rank, start=...). A name with "warm" gets the exact basis of an older gradient to start from.
BASES: dict[str, Callable[..., Tensor]] = {
    "SVD, exact": svd_basis,
    "eigh of the Gram matrix": gram_basis,
    "torch.svd_lowrank, niter 1": lowrank_basis,
    "power_basis": power_basis,
    "power_basis, 1 iteration": partial(power_basis, iterations=1),
    "power_basis, warm, 1 iteration": partial(power_basis, iterations=1, oversample=0),
    "subspace_basis": subspace_basis,
    "subspace_basis, 2 iterations": partial(subspace_basis, iterations=2),
    "subspace_basis, warm, 1 iteration": partial(subspace_basis, iterations=1),
    "cosines, chosen columns": cosine_basis,
}
#: Name -> basis of our optimizer in part "steps". The exact one takes most of a minute: `--svd`.
OURS: dict[str, Callable[..., Tensor]] = {
    "GaLoreAdamW": gram_basis,
    "GaLoreAdamW, subspace_basis": subspace_basis,
    "GaLoreAdamW, power_basis": power_basis,
    "GaLoreAdamW, svd_basis": svd_basis,
}


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns, float32."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, device=generator.device)).Q


def decaying(shapes: list[tuple[int, int]], generator: torch.Generator) -> list[Tensor]:
    """Matrices with singular values 1/√k, k = 1, 2, ...: a few large directions and a tail that falls slowly.

    One pair of singular bases is drawn for each shape; the next matrix of that shape gets their rows in another order.
    """
    drawn: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    found = []
    for m, n in shapes:
        if (m, n) not in drawn:
            drawn[m, n] = orthonormal(m, min(m, n), generator), orthonormal(n, min(m, n), generator)
        U, V = (F[torch.randperm(len(F), generator=generator, device=F.device)] for F in drawn[m, n])
        s = torch.arange(1, min(m, n) + 1, device=U.device, dtype=U.dtype).rsqrt()
        found.append((U * s) @ V.T)
    return found


# Part "steps".


def official_galore(params: list[nn.Parameter], rank: int) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW as Official

    group = {"params": params, "rank": rank, "update_proj_gap": 10_000, "scale": 0.25, "proj_type": "std"}
    return Official([group], lr=1e-4, no_deprecation_warning=True)


def official_fira(params: list[nn.Parameter], rank: int) -> torch.optim.Optimizer:
    from fira import FiraAdamW

    group = {"params": params, "rank": rank, "update_proj_gap": 10_000, "alpha": 0.25, "proj_type": "std"}
    return FiraAdamW([group], lr=1e-4, no_deprecation_warning=True)


def bitsandbytes_adam(params: list[nn.Parameter], rank: int) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, lr=1e-4)


def torchao_adam(params: list[nn.Parameter], rank: int) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-4)


def our_galore(basis: Callable[..., Tensor], params: list[nn.Parameter], rank: int) -> torch.optim.Optimizer:
    return GaLoreAdamW([{"params": params, "rank": rank}], lr=1e-4, gap=10_000, basis=basis)


def makers(svd: bool) -> dict[str, Callable[[list[nn.Parameter], int], torch.optim.Optimizer]]:
    """Name -> function (parameters, rank) that builds the optimizer. No basis is refreshed after the first step."""
    ours = {name: partial(our_galore, basis) for name, basis in OURS.items() if svd or basis is not svd_basis}
    return {
        "AdamW, fused": lambda params, rank: torch.optim.AdamW(params, lr=1e-4, fused=True),
        "AdamW, foreach": lambda params, rank: torch.optim.AdamW(params, lr=1e-4, foreach=True),
        **ours,
        "galore-torch": official_galore,
        "fira": official_fira,
        "bitsandbytes AdamW8bit": bitsandbytes_adam,
        "torchao AdamW8bit": torchao_adam,
    }


def parameter(W: Tensor, G: Tensor) -> nn.Parameter:
    p = nn.Parameter(W)
    p.grad = G
    return p


def allocated() -> int:
    gc.collect()
    synchronize()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def first_step(
    make: Callable[..., torch.optim.Optimizer], params: list[nn.Parameter], rank: int
) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """Build an optimizer and take its first step: seconds, what it keeps, and the peak above that in the second."""
    small = [parameter(torch.zeros_like(p[:64, :64]), p.grad[:64, :64].clone()) for p in params[:1]]  # type: ignore
    make(small, min(rank, 16)).step()  # libraries load themselves outside the time
    before = allocated()
    optimizer = make(params, rank)
    start = time.perf_counter()
    optimizer.step()
    synchronize()
    seconds = time.perf_counter() - start
    kept = allocated() - before if torch.cuda.is_available() else state_bytes(optimizer)
    reset_peak()
    held = allocated()
    optimizer.step()
    synchronize()
    peak = peak_mib() - held / MIB
    return optimizer, {"first_step_s": seconds, "state_mib": round(kept / MIB, 1), "extra_peak_mib": round(peak, 1)}


def steps(tiny: bool, svd: bool, device: str) -> dict[str, Any]:
    """Take steps of all optimizers in turns; report each with its ratios to galore-torch and to fused AdamW."""
    layers, dim, ffn, rank = (1, 64, 96, 8) if tiny else (24, 2048, 5461, 512)
    shapes = ([(dim, dim)] * 4 + [(ffn, dim)] * 2 + [(dim, ffn)]) * layers
    generator = torch.Generator(device).manual_seed(0)
    gradients = [G.bfloat16() for G in decaying(shapes, generator)]
    weights = [0.02 * torch.randn(s, generator=generator, device=device).bfloat16() for s in shapes]
    params = [parameter(W, G) for W, G in zip(weights, gradients)]
    norms = torch.stack(torch._foreach_norm(gradients))
    rows: dict[str, dict[str, Any]] = {}
    built: dict[str, torch.optim.Optimizer] = {}
    for name, make in makers(svd).items():
        try:
            built[name], rows[name] = first_step(make, params, rank)
            print(name, rows[name], flush=True)
        except ImportError as error:
            print(f"{name}: left out, {error}", flush=True)
        except Exception:
            print(f"{name}: FAILED", flush=True)
            traceback.print_exc()
    times = interleaved({name: optimizer.step for name, optimizer in built.items()}, repeats=3 if tiny else 15)
    unchanged = torch.equal(torch.stack(torch._foreach_norm(gradients)), norms)
    for name, row in rows.items():
        row |= {"method": name, "step": times[name]}
        row["basis_s"] = round(max(0.0, row["first_step_s"] - times[name]["median_ms"] / 1000), 3)
        row["first_step_s"] = round(row["first_step_s"], 3)
        for peer, key in (("galore-torch", "over_galore_torch"), ("AdamW, fused", "over_fused_adamw")):
            if peer in times:
                row[key] = round(times[name]["median_ms"] / times[peer]["median_ms"], 3)
        print(row, flush=True)
    setting = f"{len(shapes)} matrices of {layers} layers, d {dim}, ffn {ffn}, bf16, singular values of the gradients "
    setting += f"1/sqrt(k), r {rank}; steps in turns, median of {3 if tiny else 15}"
    stack = [[*shape, shapes.count(shape)] for shape in dict.fromkeys(shapes)]
    return {
        "setting": setting,
        "rows": list(rows.values()),
        "shapes": stack,  # m, n, how many
        "rank": rank,
        "gradients_unchanged": unchanged,
    }


# Part "ceilings".


def ceilings(tiny: bool, device: str) -> dict[str, Any]:
    """Measure the card's limits: a long copy (read and write), a long sum (read only), large square products."""
    numbers, size = (2**16, 64) if tiny else (2**30, 8192)
    x = torch.ones(numbers, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    A, B = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    C, D = A[: size // 2, : size // 2].float(), B[: size // 2, : size // 2].float()
    runs: dict[str, Callable[[], Any]] = {
        "copy": lambda: y.copy_(x),
        "sum": lambda: x.view(torch.float32).sum(),
        "bf16 product": lambda: A @ B.T,
        "float32 product": lambda: C @ D.T,
    }
    times = interleaved(runs, repeats=2 if tiny else 20, warmup=3)
    seconds = {name: t["median_ms"] / 1000 for name, t in times.items()}
    rates = {
        "copy": 2 * x.nbytes / seconds["copy"],
        "sum": x.nbytes / seconds["sum"],
        "bf16 product": 2 * size**3 / seconds["bf16 product"],
        "float32 product": 2 * (size // 2) ** 3 / seconds["float32 product"],
    }
    units = {name: "B/s" if name in ("copy", "sum") else "FLOP/s" for name in rates}
    rows = [{"what": name, "rate": rates[name], "unit": units[name], **times[name]} for name in rates]
    for row in rows:
        print(row, flush=True)
    return {
        "setting": f"{numbers} bf16 numbers copied or summed; products of {size} cubed, float32 half that",
        "rows": rows,
    }


# Part "bases".


def tokens() -> tuple[Tensor, str]:
    """Bytes of English text; of this repository's own where the package with the text is not installed."""
    try:
        return torch.frombuffer(bytearray(english_text().train.encode()), dtype=torch.uint8).long(), "presidents' words"
    except ImportError:
        root = Path(__file__).parents[2]
        files = sorted([*root.glob("*.md"), *root.glob("lowrank_ref/**/*.py"), *root.glob("tests/**/*.py")])
        text = "".join(path.read_text() for path in files)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long(), "this repository's own files"


def trained_gradients(
    shapes: list[tuple[int, int]], tiny: bool, device: str
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Shape -> (older, newer) gradient of a GPT of two blocks, taken ten steps of training apart.

    Square shapes are the query matrix of the last block, wide ones its down projection.
    """
    stream, _ = tokens()
    length, batch, count = (16, 2, 4) if tiny else (256, 16, 40)
    found = {}
    for dim in sorted({m for m, _ in shapes}):
        mine = [(m, n) for m, n in shapes if m == dim]
        ffn = max(n for _, n in mine) if any(n > dim for _, n in mine) else None
        generator = torch.Generator().manual_seed(0)
        with torch.device(device):
            model = GPT(256, dim=dim, layers=2, heads=max(1, dim // 64), length=length, ffn=ffn)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=device == "cuda")
        last = model.blocks[-1]
        old: dict[tuple[int, int], Tensor] = {}
        for step in range(count):
            at = torch.randint(len(stream) - length - 1, (batch, 1), generator=generator)
            window = stream[at + torch.arange(length + 1)].to(device)
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                model.loss(window[:, :-1], window[:, 1:]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            now = {s: (last.attn.q if s[0] == s[1] else last.mlp.down).weight.grad for s in mine}
            if step == count - 1 - min(10, count - 1):
                old = {s: G.clone() for s, G in now.items()}
            if step == count - 1:
                found |= {s: (old[s], G.clone()) for s, G in now.items()}
            optimizer.step()
    return found


def bases(tiny: bool, device: str) -> dict[str, Any]:
    """Time every basis of every gradient, and measure its energy beside the exact one's."""
    sizes = {(32, 32): 8, (32, 64): 8} if tiny else {
        (1024, 1024): 256,
        (2048, 5461): 512,
        (4096, 4096): 1024,
        (4096, 11008): 1024,
    }  # fmt: skip
    rows = []
    torch.manual_seed(0)
    learned = trained_gradients(list(sizes), tiny, device)
    for shape, rank in sizes.items():
        generator = torch.Generator(device).manual_seed(1)
        G, other = decaying([shape, shape], generator)
        cases = {"singular values 1/sqrt(k)": (G + 0.3 * other, G), "trained GPT": learned.pop(shape)}
        for kind, (older, newer) in cases.items():
            start, exact = svd_basis(older, rank), svd_basis(newer, rank)
            best = captured_energy(newer, exact.double())
            for name, basis in BASES.items():
                call = partial(basis, newer, rank, start=start if "warm" in name else None)
                row: dict[str, Any] = {"gradient": kind, "shape": list(shape), "rank": rank, "method": name}
                try:
                    row["energy"] = round(captured_energy(newer, call().double()) / best, 5)
                    slow = name.startswith("SVD")
                    row |= milliseconds(call, repeats=2 if slow else 7, warmup=0 if slow else 1)
                except Exception:
                    print(f"{name} of {shape}: FAILED", flush=True)
                    traceback.print_exc()
                    continue
                row["exact_energy"] = round(best, 5)
                rows.append(row)
                print(row, flush=True)
        del G, other, cases
        _cosines.clear()
    setting = f"float32 gradients, TF32 off; the GPT has two blocks, reads {tokens()[1]} as bytes and was trained "
    setting += f"{4 if tiny else 40} steps; warm starts are exact bases of an older gradient"
    return {"setting": setting, "rows": rows}


def main() -> None:
    """Run the parts asked for."""
    warnings.simplefilter("ignore")
    flags = {"--svd": "also our optimizer with exact bases, most of a minute"}
    args = arguments(__doc__ or "", ("ceilings", "steps", "bases"), flags)
    torch.set_float32_matmul_precision("highest")
    if "ceilings" in args.part:
        save(args.out, "ceilings", ceilings(args.tiny, args.device))
    if "steps" in args.part:
        save(args.out, "steps", steps(args.tiny, args.svd, args.device), PEERS)
    if "bases" in args.part:
        save(args.out, "bases", bases(args.tiny, args.device))


if __name__ == "__main__":
    main()
