"""A run directory as the stages leave it, made of drawn numbers: every file the report reads, with
known values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grads_ds.config.config import Config
from grads_ds.run_dir.provenance import resolved_text
from tests.report.synthetic_results import LOSSES, comparison, evaluation, write_curve

KINDS = ["clean", "clean", "clean", "wrong_answer", "near_duplicate", "off_domain"]


HOSTILE = (
    '<script>alert("x")</script><img src="http://example.org/x.png" onerror=alert(1)> \u202e\x07'
    " \ud800 \x00 \u05e9\u05dc\u05d5\u05dd"
)


def make_run(
    tmp_path: Path,
    n: int = 1200,
    variants: bool = True,
    losses: dict[str, tuple[float, float]] | None = None,
) -> Config:
    """Write a whole run of `n` samples under `tmp_path`/run and return its config.
    `variants=False`: the main selection alone.
    """
    run_dir = tmp_path / "run"
    names = {
        "grads_50": {"budget": 0.5},
        "random_5": {"method": "random"},
        "random_50": {"method": "random", "budget": 0.5},
    }
    config = Config.model_validate(
        {
            "run_dir": str(run_dir),
            "model": {"path": "models/base-8M"},
            "data": {
                "train": ["pool.jsonl"],
                "validation": {"domain": "d.jsonl", "general": "g.jsonl"},
                "metadata": ["kind"],
            },
            "select": {"variants": names if variants else {}},
            "sft": {"variants": ["full", *names] if variants else []},
        }
    )
    rng = np.random.default_rng(0)
    length = np.clip(np.exp(rng.normal(4.2, 0.8, n)), 1, 900).astype(np.int32)
    embedding = np.exp(rng.normal(-1.4, 0.4, n)) / np.sqrt(length / 60)
    head = np.exp(rng.normal(1.6, 0.3, n)) / (length / 60) ** 0.25
    status = np.full(n, "ok", dtype=object)
    status[:3] = "no_target"
    length[:3] = 0
    scores = {
        "sample_id": np.arange(n),
        "sample_hash": [f"{i:032x}" for i in range(n)],
        "num_tokens": length + 20,
        "num_target_tokens": length,
        "loss": np.where(status == "ok", 2.5 + 0.3 * np.log(embedding), np.nan).astype(np.float32),
        "embedding_grad_norm": np.where(status == "ok", embedding, np.nan).astype(np.float32),
        "lm_head_grad_norm": np.where(status == "ok", head, np.nan).astype(np.float32),
        "status": status,
    }
    (run_dir / "scores").mkdir(parents=True)
    # as parts arrive
    pq.write_table(
        pa.table(scores).take(pa.array(rng.permutation(n))), run_dir / "scores/table.parquet"
    )
    signal = np.where(status == "ok", np.log(embedding * head), np.nan)
    kinds = np.array(KINDS)[np.arange(n) % len(KINDS)]
    sources = np.where(np.arange(n) % 4 == 0, "wiki.jsonl", "clinic.jsonl")
    write_pool(run_dir / "prepared/pool", n, kinds, sources)
    for name in [None, *config.select.variants]:
        settings = config.select.resolve(name)
        folder = run_dir / "selection" if name is None else run_dir / "selection/variants" / name
        write_selection(
            folder,
            settings.method,
            float(settings.budget),
            signal,
            {"kind": kinds, "source": sources},
            rng,
        )
    write_json(run_dir / "selection/comparison.json", comparison(n))
    write_json(run_dir / "evaluation.json", evaluation(n, losses or LOSSES, config))
    write_json(
        run_dir / "prepared/prepared.json",
        {"pool": {"read": n + 5, "kept": n, "dropped": {"empty": 5}}},
    )
    for i, unit in enumerate(
        ["prepare", "probe/train", "probe/record", "select/selected", "sft/selected"]
    ):
        finished = f"2026-01-0{i + 1}T10:00:00"
        write_json(
            run_dir / f"state/{unit.replace('/', '.')}.json",
            {"unit": unit, "seconds": 12.5 * (i + 1), "finished": finished},
        )
    tree = config.model_dump(mode="json")
    tree["provenance"] = {
        "python": "3.11.9",
        "packages": {"torch": "2.13.0"},
        "source_commit": "abc123+",
    }
    (run_dir / "resolved.yaml").write_text(resolved_text(tree))
    write_curve(run_dir / "tensorboard/probe", 40, 4.0)
    for i, name in enumerate(["selected", *config.sft.variants]):
        write_curve(run_dir / "tensorboard/sft" / name, 30 + 40 * i, 3.2)
    return config


def write_pool(folder: Path, n: int, kinds: np.ndarray, sources: np.ndarray) -> None:
    """A `datasets.save_to_disk` folder's state.json and Arrow streams, two of them."""
    folder.mkdir(parents=True)
    half = n // 2
    for part, (start, stop) in enumerate([(0, half), (half, n)]):
        rows = [
            (
                json.dumps(
                    {
                        "messages": [
                            {
                                "role": "user",
                                "content": f"Question {i}: {'why ' * 200 if i % 2 else HOSTILE}?",
                            },
                            {
                                "role": "assistant",
                                "content": f"Answer {i}. " + "because " * (i % 300),
                            },
                        ]
                    }
                )
                if n <= 5000
                else "{}"
            )
            for i in range(start, stop)
        ]
        table = pa.table(
            {
                "sample_id": np.arange(start, stop),
                "source": pa.array(sources[start:stop]),
                "row": pa.array(rows),
                "metadata": pa.array([json.dumps({"kind": k}) for k in kinds[start:stop]]),
            }
        )
        with pa.ipc.new_stream(folder / f"data-{part}.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    write_json(
        folder / "state.json",
        {"_data_files": [{"filename": f"data-{part}.arrow"} for part in (0, 1)]},
    )


def write_selection(
    folder: Path,
    method: str,
    budget: float,
    signal: np.ndarray,
    fields: dict[str, np.ndarray],
    rng: Any,
) -> None:
    """The nearest to the median signal (or a random draw), with density, ranks and the numbers of
    selection.json.
    """
    n, good = len(signal), np.isfinite(signal)
    k = round(budget * n)
    middle, spread = float(np.median(signal[good])), float(signal[good].std())
    density = np.exp(-0.5 * ((signal - middle) / spread) ** 2) / (spread * np.sqrt(2 * np.pi))
    wanted = np.where(good, rng.random(n) if method == "random" else density, -1)
    order = np.argsort(-wanted, kind="stable")
    selected = np.zeros(n, dtype=bool)
    selected[order[:k]] = True
    rank = np.empty(n, dtype=np.int64)
    rank[order] = np.arange(1, n + 1)
    folder.mkdir(parents=True)
    pq.write_table(
        pa.table(
            {
                "sample_id": np.arange(n),
                "signal": pa.array(signal, from_pandas=True),
                "density": pa.array(density, from_pandas=True),
                "selected": selected,
                "rank": pa.array(rank, mask=~good),
                "reason": np.where(selected, "in: at or above", "out: below"),
                "weight": selected.astype(float),
            }
        ),
        folder / "selection.parquet",
    )
    grid = np.linspace(middle - 3.2 * spread, middle + 3.2 * spread, 256)
    pool = np.exp(-0.5 * ((grid - middle) / spread) ** 2) / (spread * np.sqrt(2 * np.pi))
    composition = {
        field: {
            str(v): {
                "pool": int((values == v).sum()),
                "selected": int((values[selected] == v).sum()),
            }
            for v in np.unique(values)
        }
        for field, values in fields.items()
    }
    write_json(
        folder / "selection.json",
        {
            "method": method,
            "budget": {"rule": f"{budget} of {n} samples", "samples": k},
            "counts": {"pool": n, "selected": k},
            "thresholds": {
                "signal_min": float(signal[selected].min()),
                "signal_max": float(signal[selected].max()),
            },
            "bandwidth": None if method == "random" else 0.0594,
            "curve": {"signal": grid.tolist(), "pool": pool.tolist(), "selected": None},
            "region": (
                None
                if method == "random"
                else [[float(signal[selected].min()), float(signal[selected].max())]]
            ),
            "versus_random": {"samples": k, "overlap": k // 20, "expected_by_chance": k * k / n},
            "composition": composition,
            "settings": {"signal": "product", "groups": ["embedding", "lm_head"], "scale": "log"},
            "warnings": ["3 of the samples can never be chosen: 3 no_target"],
        },
    )


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
