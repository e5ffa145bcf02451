"""The steps of gpu_first.py, each run as a process, ``gpu_steps.py STEP``; results are printed and recorded at once.

An exception costs the part in which it was raised; what is left of the step goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_first
import torch
from torch import Tensor

BEGUN = time.monotonic()
DRY = "--dry" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")
STEP = sys.argv[1] if len(sys.argv) > 1 else ""
failed = False


def emit(what: str, **values: Any) -> None:
    """Print one line, and append it to the record."""
    global failed
    failed |= values.get("ok") is False
    row = {"step": STEP, "what": what, **values, "after": round(time.monotonic() - BEGUN, 2)}
    if "LFM_TORCH_GPU_RECORD" in os.environ:
        # one write of a whole line: several processes append to the file
        with Path(os.environ["LFM_TORCH_GPU_RECORD"]).open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(gpu_first.described(row), flush=True)


@contextlib.contextmanager
def part(what: str) -> Iterator[None]:
    """What is raised inside is a line of the record, not the end of the step."""
    try:
        yield
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:400]
        emit(what, ok=False, error=text, where=f"{Path(where.filename).name}:{where.lineno}")


def seconds_of(contenders: dict[str, Callable[[], Any]], repeats: int = 3) -> dict[str, float]:
    """Median seconds of a call, taken in turns after a warm-up."""
    import harness

    times = harness.interleaved(contenders, 1 if DRY else repeats, device=DEVICE.type)
    return {name: harness.median(values) for name, values in times.items()}


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers drawn on the device."""
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


# ---- device


def device() -> int:
    """What is there; whether the libraries load, and what the loader says where not."""
    emit("python", python=sys.version.split()[0], torch=torch.__version__, cuda=torch.version.cuda)
    if not DRY and not torch.cuda.is_available():
        emit("torch sees no GPU: nothing else is run", ok=False)
        return gpu_first.NOTHING_TO_RUN
    if not DRY:
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        emit(
            "gpu",
            name=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            gib_free=free / 2**30,
            gib=total / 2**30,
        )
    begun = time.monotonic()
    import lfm_torch
    from lfm_torch.ops._extension import library_problems

    info = lfm_torch.build_info()
    emit("import", seconds=time.monotonic() - begun, version=info.version, simd=info.simd, driver=info.cuda_driver)
    emit("library", cpu_kernels=info.cpu_kernels, cpu_build=info.cpu_build)
    emit("library", cuda_kernels=info.cuda_kernels, cuda_build=info.cuda_build)
    for problem in library_problems():
        emit(f"library: {problem}", ok=DRY)
    for note in info.notes:
        emit(f"note: {note}", ok=DRY or info.cuda_kernels)
    if not info.cuda_kernels and not DRY:
        emit("the CUDA kernels are not live: nothing else is run", ok=False)
        return gpu_first.NOTHING_TO_RUN
    return 0


# ---- operators


def operators(only: str) -> None:
    """One operator on its sample inputs and on fresh ones, by the helpers of the GPU tests."""
    # the helpers draw fresh inputs from this, and call the operator on their device
    import test_cuda_library as cuda

    torch.set_num_threads(2)
    cuda.DEVICE = DEVICE
    seed = int.from_bytes(os.urandom(3), "little")
    begun = time.monotonic()
    with part(only):
        count = sum(1 for _ in checks(only, cuda, torch.Generator().manual_seed(seed)))
        emit(only, ok=True, checks=count, seconds=time.monotonic() - begun, seed=seed)


def checks(name: str, cuda: Any, fresh: torch.Generator) -> Iterator[None]:
    """Run the checks of an operator one by one; a wrong answer raises."""
    single, double = torch.float32, torch.float64

    def points(*shape: int, dtype: torch.dtype = single) -> Tensor:
        return cuda.randn(fresh, *shape, dtype=dtype)

    if name == "sanitized":
        yield from sanitized(cuda, fresh)
        return
    if name.startswith("knn of"):
        # of one sign: products that truncate their factors all err to the same side
        d = int(name.split()[2])
        x = points(1, 300 if DRY else 1500, d).abs()
        for metric in ("euclidean", "inner_product", "angular"):
            yield cuda.check_knn(x[:, :200].contiguous() if d > 500 else x, x if d > 500 else None, 30, metric)
        return
    for dtype in (single, double):
        yield cuda.check_sample_inputs(name, dtype)
    if name == "knn":
        for dtype in (single, double):
            for metric in ("euclidean", "cosine", "angular", "inner_product"):
                yield cuda.check_knn(points(1, 513, 64, dtype=dtype), None, 172, metric)
                yield cuda.check_knn(points(2, 7, 9, dtype=dtype), points(2, 1030, 9, dtype=dtype), 300, metric)
        yield cuda.check_knn(points(1, 60, 6).repeat(1, 10, 1), None, 100, "euclidean")
        yield cuda.check_knn(points(1, 700, 32) * 1e-2 + 1e4, None, 15, "euclidean")
    elif name == "knn_ragged":
        for dtype in (single, double):
            yield cuda.check_ragged(fresh, dtype, "euclidean", (3, 0, 1, 300, 131), 12)
    elif name == "symmetrize_edges":
        for mode in ("mean", "union", "mutual"):
            for b, n, k in ((4, 17, 16), (3, 301, 3), (1, 900, 120)):
                yield cuda.check_graph(fresh, single, mode, b, n, k)
    elif name in ("laplacian_product", "edge_products"):
        for m in (1, 3, 16, 61, 64, 261):
            yield cuda.check_product(fresh, single, 515, 60, m)
            yield cuda.check_product(fresh, double, 300, 33, m)
            for half in (torch.float16, torch.bfloat16):
                yield cuda.check_half_product(fresh, half, 300, 33, m)
    elif name == "geodesics":
        for b, n, k, p in ((3, 70, 2, 5), (1, 900, 3, 40), (2, 300, 90, 17)):
            yield cuda.check_geodesics(fresh, single, b, n, k, p)


def sanitized(cuda: Any, fresh: torch.Generator) -> Iterator[None]:
    """Every kernel once, at sizes that reach the tensor cores: what a sanitizer of memory and of races looks at."""
    from lfm_torch.ops import OPERATORS

    many, few = cuda.randn(fresh, 1, 1500, 40, dtype=torch.float32), cuda.randn(fresh, 1, 300, 40, dtype=torch.float64)
    searches = [("knn", (many, None, 15, "cosine")), ("knn", (few, None, 15, "euclidean"))]
    for name, args in [*cuda.stream_cases(fresh), *searches]:
        moved = cuda.on_device(name, args, DEVICE)
        OPERATORS[name].compiled(*moved)
        if not DRY:
            torch.cuda.synchronize()
        yield


# ---- limits


def limits() -> None:
    """What the card can do: copies, matrix products, and the small eigenproblems that solvers wait for."""
    import harness

    n, size = (256, 2**20) if DRY else (8192, 2**30)
    with part("copy"):
        source = torch.empty(size // 4, device=DEVICE).normal_()
        target = torch.empty_like(source)
        seconds = seconds_of({"copy": lambda: target.copy_(source)})["copy"]
        emit("copy, read and write", gb_per_s=2 * size / seconds / 1e9)
    for name in ("float32", "tf32", "bfloat16", "float16"):
        with part(f"matmul {name}"):
            a, b = (randn(n, n, seed=seed).to(getattr(torch, name, torch.float32)) for seed in (0, 1))
            with harness.tf32(name == "tf32"):
                seconds = seconds_of({"matmul": lambda a=a, b=b: a @ b})["matmul"]
            emit(f"matmul {name}", tflops=2 * n**3 / seconds / 1e12)
    for dtype in (torch.float64, torch.float32):
        for p in (64, 128) if DRY else (64, 128, 256, 512, 513):
            with part(f"eigh {p}"):
                matrices = randn(2 if DRY else 16, p, p).to(dtype)
                matrices = matrices + matrices.mT
                here = matrices.cpu()
                seconds = seconds_of(
                    {
                        "one": lambda m=matrices: torch.linalg.eigh(m[0]),
                        "sixteen": lambda m=matrices: torch.linalg.eigh(m),
                        "one on the CPU": lambda m=here: torch.linalg.eigh(m[0]),
                    },
                    1,
                )
                evals, evecs = torch.linalg.eigh(matrices[0])
                residual = (matrices[0] @ evecs - evecs * evals).norm(dim=0).max() / evals.abs().max()
                found = {f"ms_{name.replace(' ', '_')}": 1e3 * value for name, value in seconds.items()}
                emit(f"eigh {str(dtype)[6:]} {p}", **found, residual=float(residual))


# ---- kernels


def kernels() -> None:
    """The Laplacian product on 33 million edges beside torch's CSR product; map energies."""
    from lfm_torch.ops import OPERATORS, laplacian_product

    with part("product"):
        n, k = (2000, 20) if DRY else (100_000, 330)
        generator = torch.Generator(DEVICE).manual_seed(0)
        col = torch.randint(0, n, (n, k), generator=generator, device=DEVICE).sort(1).values.flatten().int()
        rowptr = torch.arange(0, n * k + 1, k, device=DEVICE)
        weight = torch.rand(n * k, generator=generator, device=DEVICE)
        none, ones = torch.zeros(n, device=DEVICE), torch.ones(n, device=DEVICE)
        minus = -ones
        csr = torch.sparse_csr_tensor(rowptr.int(), col, weight, (n, n), check_invariants=False)
        for m in (16, 61, 64):
            with part(f"product, {m} columns"):
                x = randn(n, m)
                contenders: dict[str, Callable[[], Tensor]] = {
                    "ours": lambda x=x: laplacian_product(rowptr, col, weight, none, minus, ones, x),
                    "csr": lambda x=x: csr @ x,
                }
                ours, peer = (run() for run in contenders.values())
                difference = float((ours - peer).abs().max() / peer.abs().max())
                seconds = seconds_of(contenders)
                moved = n * k * (8 + 4 * m) + 8 * n * m  # every edge gathers a row of x
                emit(
                    f"product, {n} x {k} edges, {m} columns",
                    ok=difference < 1e-5,
                    ms=1e3 * seconds["ours"],
                    ms_csr=1e3 * seconds["csr"],
                    gb_per_s_gathered=moved / seconds["ours"] / 1e9,
                    difference=difference,
                )
    with part("map energies"):
        count, m = (8, 20) if DRY else (128, 50)
        C = randn(count, m, count, m)
        factors = [torch.rand(*shape, device=DEVICE) for shape in ((1, count, m), (count, 1, m)) * 2]
        compiled = OPERATORS["map_energies"].compiled
        seconds = seconds_of({"ours": lambda: compiled(C, *factors, 1)})["ours"]
        emit(f"map energies, {count} x {count} maps of {m}", ms=1e3 * seconds, gb_per_s=C.nbytes / seconds / 1e9)


# ---- neighbors


def neighbors() -> None:
    """Exact neighbours beside matmul and topk, and where many rows are the same."""
    import harness
    from bench_knn import matmul_topk

    import lfm_torch as lfm

    sizes = (
        [(600, 40, 10, 0.0), (600, 40, 10, 0.03)]
        if DRY
        else [
            (20_000, 512, 10, 0.0),
            (20_000, 512, 300, 0.0),
            (20_000, 512, 300, 0.03),
            (50_000, 768, 300, 0.0),
            (54_000, 768, 300, 0.0),
            (100_000, 768, 300, 0.0),
        ]
    )
    for n, d, k, same in sizes:
        what = f"knn {n} x {d}, k = {k}" + (f", {same:.0%} identical rows" if same else "")
        with part(what):
            x = randn(n, d)
            if same:
                x[: int(same * n)] = x[0].clone()
            contenders = {
                "ours": lambda x=x, k=k: lfm.knn(x, n_neighbors=k).distances,
                "peer": lambda x=x, k=k: matmul_topk(x, k, "euclidean"),
            }
            (first, exact), (first_peer, peer) = (harness.once(run) for run in contenders.values())
            # the peer expands the square: what is left of it for equal rows is rounding
            difference = float((exact[:, -1] - peer[:, -1]).abs().max() / exact.max())
            del exact, peer
            # seconds need no second look: this step is short of them
            seconds = {"ours": first, "peer": first_peer} if first + first_peer > 2 else seconds_of(contenders, 1)
            emit(
                what,
                ok=difference < (1e-2 if same else 1e-4),
                seconds=seconds["ours"],
                matmul_topk=seconds["peer"],
                tflops=2 * n * n * d / seconds["ours"] / 1e12,
                difference=difference,
            )


# ---- solvers


def graph_of(n: int, k: int, *batch: int) -> Any:
    """A graph of normal points in 64 dimensions."""
    import lfm_torch as lfm

    return lfm.build_graph(randn(*batch, n, 64), n_neighbors=k)


def solve(what: str, graph: Any, n_basis: int, **options: Any) -> None:
    """Time a solve twice, and say how good its pairs are."""
    import harness

    import lfm_torch as lfm

    with part(what), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", lfm.LFMWarning)
        torch.cuda.reset_peak_memory_stats() if not DRY else None
        first, basis = harness.once(lambda: lfm.spectral_basis(graph, n_basis=n_basis, **options))
        again = first if first > 5 else harness.once(lambda: lfm.spectral_basis(graph, n_basis=n_basis, **options))[0]
        evecs = basis.evecs.double()
        gram = evecs.mT @ evecs - torch.eye(n_basis, dtype=evecs.dtype, device=evecs.device)
        emit(
            what,
            ok=bool(basis.converged.all()) and float(gram.abs().max()) < 1e-4,
            solver=basis.solver,
            seconds=again,
            first=first,
            iterations=basis.iterations,
            residual=float(basis.residuals.max()),
            orthogonality=float(gram.abs().max()),
            gib=0.0 if DRY else torch.cuda.max_memory_allocated() / 2**30,
            warned=str(said[0].message)[:150] if said else "",
        )


def solvers() -> None:
    """The goals: 50 pairs at n = 100,000 with 300 neighbours, and 64 graphs of n = 4,096."""
    import harness

    for n, k in [(1500, 20)] if DRY else [(20_000, 30), (100_000, 300)]:
        with part(f"graph {n}/{k}"):
            seconds, graph = harness.once(lambda n=n, k=k: graph_of(n, k))
            emit(f"graph {n}/{k}", seconds=seconds, edges=graph.col.numel())
            for solver in ("krylov", "lobpcg"):
                solve(f"{n}/{k}/50, {solver}", graph, 50, solver=solver)
            del graph
    count, n = (3, 600) if DRY else (64, 4096)
    with part(f"{count} graphs of {n}"):
        seconds, graph = harness.once(lambda: graph_of(n, 30, count))
        emit(f"{count} graphs of {n}, 30 neighbours", seconds=seconds)
        for solver in ("krylov", "lobpcg"):
            solve(f"{count} x {n}/30/32, {solver}", graph, 32, solver=solver)


# ---- training


def training() -> None:
    """Losses, one step of a monitor, reduced precision, and where the time of a solve goes."""
    import harness

    import lfm_torch as lfm

    n = 128 if DRY else 512
    x, target = randn(n, 128).requires_grad_(), randn(n, 64, seed=1)
    for loss in (lfm.losses.LFMAlignmentLoss(n_basis=32), lfm.losses.DirichletAlignmentLoss(n_basis=32)):
        name = type(loss).__name__
        with part(name):
            basis = loss.target_basis(target)
            seconds = seconds_of({"step": lambda loss=loss, basis=basis: loss(x, basis).backward()})["step"]
            emit(f"{name}, batch {n}, forward and backward", ms=1e3 * seconds, gradient=float(x.grad.norm()))

    graph = graph_of(*((1000, 15) if DRY else (20_000, 30)))
    with part("TF32"), harness.tf32():
        solve("solve with float32 products in TF32 allowed", graph, 50)
    with part("autocast"), torch.autocast(DEVICE.type, torch.bfloat16):
        solve("solve under autocast", graph, 50)

    with part("profile"):
        profile(graph)

    with part("monitor"):
        from bench_training import ResNet18, images

        from lfm_torch.training import Monitor

        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        model = ResNet18(8 if DRY else 64).to(DEVICE)
        probe = images(150 if DRY else 2000, generator)[0].to(DEVICE)
        for background in (False, True):
            # of a network without training, angles see little but the mean
            monitor = Monitor(model, probe, layers="layers.*", background=background, metric="euclidean")
            for step in range(2 if DRY else 3):
                seconds, _ = harness.once(lambda step=step, monitor=monitor: monitor.measure(step=step))
                emit(f"monitor, background={background}, step {step}", seconds=seconds)
            monitor.flush()
            emit("monitor, its parts", **monitor.history[-1].seconds)


def profile(graph: Any) -> None:
    """How often a solve waits for the GPU, and its ten longest operations."""
    import lfm_torch as lfm

    activities = [torch.profiler.ProfilerActivity.CPU] + ([] if DRY else [torch.profiler.ProfilerActivity.CUDA])
    for solver in ("krylov", "lobpcg"):
        run = lambda solver=solver: lfm.spectral_basis(graph, n_basis=50, solver=solver)  # noqa: E731
        if not DRY:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                run()
                torch.cuda.set_sync_debug_mode("default")
            emit(f"profile, {solver}: waits for the GPU", count=sum("synchroniz" in str(w.message) for w in waits))
        with torch.profiler.profile(activities=activities) as found:
            run()
        kind = "self_cpu_time_total" if DRY else "self_device_time_total"
        events = sorted(found.key_averages(), key=lambda event: getattr(event, kind, 0.0), reverse=True)
        calls = {event.key: event.count for event in events if event.key.startswith("cuda")}
        if calls:
            emit(f"profile, {solver}: calls of the runtime", **calls)
        for event in events[:10]:
            emit(
                f"profile, {solver}: {event.key[:90]}",
                calls=event.count,
                ms_device=getattr(event, "self_device_time_total", 0.0) / 1e3,
                ms_cpu=event.self_cpu_time_total / 1e3,
            )


def main() -> int:
    """Run one step; the status is 1 where something in it was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = {run.__name__: run for run in (device, limits, kernels, neighbors, solvers, training)}
    parser.add_argument("step", choices=[*steps, "operators"])
    parser.add_argument("--only", default="", help="one operator")
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    status = operators(arguments.only) if arguments.step == "operators" else steps[arguments.step]()
    return status or int(failed)


if __name__ == "__main__":
    sys.exit(main())
