"""Records what PyTorch's optimizers and its plateau rule do, for tests/test_optimizers.py: `python
make_optimizers.py`, with torch."""

import json
import pathlib

import numpy as np
import torch

RATES = [0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.01, 0.01, 0.01]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.05),
    "nesterov": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.8, weight_decay=0.05, nesterov=True
    ),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.999), weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.999), weight_decay=0.05),
    "muon": lambda p: torch.optim.Muon(p, lr=0.1, momentum=0.8, weight_decay=0.05),
}


def trajectory(name):
    """The parameters [in, out] after each of ten steps on the loss sum(sin(3 w) * a), from fixed w
    and a; PyTorch's are [out, in]."""
    generator = np.random.default_rng(0)
    w = torch.nn.Parameter(torch.tensor(generator.normal(size=(6, 4)).astype(np.float32).T.copy()))
    a = torch.tensor(generator.normal(size=(6, 4)).astype(np.float32).T)
    optimizer = OPTIMIZERS[name]([w])
    steps = []
    for rate in RATES:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (torch.sin(3 * w) * a).sum().backward()
        optimizer.step()
        steps.append(w.detach().numpy().T.round(7).tolist())
    return steps


def plateaus():
    """Settings, a sequence of 60 metrics and the learning rate after each."""
    generator = np.random.default_rng(1)
    cases = []
    for case in range(60):
        chosen = {
            "mode": str(generator.choice(["min", "max"])),
            "factor": float(generator.choice([0.1, 0.5, 0.9])),
            "patience": int(generator.integers(0, 6)),
            "threshold": float(generator.choice([0.0, 1e-4, 0.05])),
            "threshold_mode": str(generator.choice(["rel", "abs"])),
            "cooldown": int(generator.integers(0, 4)),
            "min_lr": float(generator.choice([0.0, 0.0, 0.02])),
        }
        fall = np.exp(-np.arange(60) / generator.uniform(3, 40))
        metrics = (fall if chosen["mode"] == "min" else 1 - fall) + generator.normal(0, 0.05, 60)
        metrics = metrics.round(2 if case % 2 else 1)  # ties
        if case % 5 == 0:
            metrics[generator.integers(0, 60, 3)] = np.nan
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.25)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **chosen)
        rates = []
        for metric in metrics:
            schedule.step(float(metric))
            rates.append(optimizer.param_groups[0]["lr"])
        cases.append(
            {
                "settings": chosen,
                "metrics": [None if np.isnan(m) else float(m) for m in metrics],
                "rates": rates,
            }
        )
    return cases


if __name__ == "__main__":
    recorded = {
        "trajectories": {name: trajectory(name) for name in OPTIMIZERS},
        "plateaus": plateaus(),
    }
    (pathlib.Path(__file__).parent / "optimizers.json").write_text(json.dumps(recorded) + "\n")
