"""Whether the study's captured steps on this GPU are those of a plain loop on the CPU, and how long one takes.

python benchmarks/study_check.py [decoder | image]
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

import study_data
import study_training as st
from selection_study import HEADS_OF, PHASES, batches


def main() -> None:
    kind = sys.argv[1] if len(sys.argv) > 1 else "encoder"
    gpu = torch.device("cuda")
    weights, tasks = study_data.load_model(kind), study_data.load_tasks(kind)
    task = tasks[PHASES[kind].tasks[0]]
    heads = {"heads": 9, "kv_heads": 3, "eps": 1e-5} if kind == "decoder" else {"heads": HEADS_OF[kind]}
    bases = {d: st.Base(weights, kind, torch.device(d), **heads) for d in ("cpu", "cuda")}  # type: ignore[arg-type]
    n = bases["cpu"].size["linear"]
    for name, steps in (("chosen", 4), ("LoRA", 4), ("all", 4)):
        results = {}
        for device, base in bases.items():
            options: dict[str, Any] = {"dropout": 0.0}
            generator = torch.Generator().manual_seed(0)
            if name == "chosen":
                options |= {
                    "scope": "linear",
                    "chosen": torch.randint(n, (1, n // 400), generator=generator).sort().values,
                }
                options["chosen"] = options["chosen"].unique(dim=1).to(device)
            elif name == "LoRA":
                options["lora"] = 4
            else:
                options["scope"] = "all"
            data = st.Data(task, torch.device(device))
            head = (
                torch.randn(1, data.outputs * (base.hidden + 1), generator=generator) * 0.02 if data.outputs else None
            )
            order = batches(task, 0, steps, 8, 2).unsqueeze(0)
            replicas = st.Replicas(base, data, order, head, **options)
            replicas.rates.fill_(1e-4 if name == "all" else 2e-3)
            replicas.head_rates.fill_(1e-3)
            replicas.capture()
            replicas.run(steps)
            with torch.no_grad():
                results[device] = replicas.loss(order[:, 0].to(device), False).item()
                start = replicas.base.flat[: replicas.values.shape[1]]
                moved = (
                    replicas.values[0] - start if name != "LoRA" else replicas.factors[0] - replicas.factors_start[0]
                )
                results[f"{device} moved"] = moved.cpu()
        a, b = results["cpu moved"], results["cuda moved"]
        print(
            f"{kind} {name}: loss after {steps} steps {results['cpu']:.5f} on the CPU, {results['cuda']:.5f} on the GPU; "
            f"cosine of what moved {torch.cosine_similarity(a, b, dim=0).item():.4f}",
            flush=True,
        )
        assert torch.cosine_similarity(a, b, dim=0) > 0.9
    data = st.Data(task, gpu)
    for count in (3, 6) if kind == "decoder" else (4, 12):
        order = batches(task, 0, 30, st.BATCH, 2).expand(count, -1, -1)
        head = torch.zeros(count, data.outputs * (bases["cuda"].hidden + 1)) if data.outputs else None
        replicas = st.Replicas(bases["cuda"], data, order, head, scope="linear", chosen=torch.arange(100, device=gpu).expand(count, -1), dropout=0.1 if kind == "encoder" else 0.0)  # fmt: skip
        replicas.capture()
        torch.cuda.synchronize()
        began = time.perf_counter()
        replicas.run(30)
        torch.cuda.synchronize()
        each = (time.perf_counter() - began) / 30
        memory = torch.cuda.max_memory_allocated() / 2**30
        print(f"{kind}: {count} trainings side by side, {1e3 * each:.1f} ms a step, peak {memory:.1f} GiB", flush=True)
        del replicas


if __name__ == "__main__":
    main()
