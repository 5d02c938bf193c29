"""A study is made of configs that load; its differences are paired, its rule weighs forgetting."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from conftest import REPO
from grads_ds.config.frontier_variants import is_frontier
from scripts.study import design, orders, run_configs, tables


@pytest.mark.parametrize(
    "path", sorted((REPO / "configs/study").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_study_is_made_of_configs_that_load(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grads_ds.config.config import Config

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    orders.register(tmp_path)
    described = design.read(path)
    assert "random" in described.methods
    for cell_ in design.cells(described):
        for equal in design.footings(described, cell_):
            given = run_configs.run_config(
                described, tmp_path, cell_, tmp_path / cell_.folder, equal
            )
            config = Config.model_validate(given)
            main, *names = [design.variant(*pair) for pair in design.pairs(described, equal)]
            whole = ["full"] if described.full else []
            footing = described.footings[equal]
            assert config.sft.equal == (footing.equal or equal)
            assert all(getattr(config.sft, key) == value for key, value in footing.sft.items())
            assert set(described.tasks) <= set(config.evaluate.multiple_choice)
            line = [name for name in config.select.variants if is_frontier(name)]
            assert bool(line) == bool(config.sft.frontier)
            assert config.sft.variants == [*whole, *names, *line]
            settings = {main: config.select.resolve(None)} | {
                name: config.select.resolve(name) for name in names
            }
            for method, budget in design.pairs(described, equal):
                found = settings[design.variant(method, budget)].model_dump()
                given_ = run_configs.method_settings(
                    described.methods[method], tmp_path / cell_.folder / equal
                )
                plain = type(config.select)(**given_, budget=budget).model_dump(
                    exclude={"variants"}
                )
                assert {key: found[key] for key in plain} == plain


def test_a_study_like_another_says_only_what_differs(tmp_path: Path) -> None:
    noise, main = (design.read(REPO / f"configs/study/{name}.yaml") for name in ("noise", "main"))
    assert noise.methods == main.methods and noise.domains == main.domains
    assert noise.pool != main.pool and set(noise.footings) != set(main.footings)
    assert noise.run == main.run | {"evaluate": main.run["evaluate"] | {"multiple_choice": {}}}
    (tmp_path / "odd.yaml").write_text(f"like: {REPO}/configs/study/noise.yaml\npools: 3\n")
    with pytest.raises(ValueError, match="pools"):
        design.read(tmp_path / "odd.yaml")


def run(base: float, random_: float, grads: float, general: float = 1.0) -> tables.Run:
    def sets(value: float, other: float = 1.0) -> dict[str, dict[str, float]]:
        losses = {"domain": value, "swapped": value, "general": other}
        return {name: {"loss": loss} for name, loss in losses.items()}

    models = {
        "base": sets(base),
        "full": sets(1.0),
        "random_5": sets(random_),
        "grads_5": sets(grads, general),
    }
    accuracy = {name: {"domain": 0.5} for name in models}
    return {"equal": "epochs", "noise": 0.4, "models": models, "accuracy": accuracy}


def test_a_difference_is_paired_by_run() -> None:
    # the levels differ wildly from run to run, the difference to random hardly does
    lines = tables.table([run(9, 5, 4.9), run(3, 2, 1.9), run(6, 4, 3.9)], 0.05)
    assert any(
        line.startswith("| grads | 3 | +2.433 | **+0.100** (+0.100 to +0.100)") for line in lines
    )
    assert tables.interval([0.5])[1:] == (float("-inf"), float("inf"))


def test_the_rule_puts_out_what_loses_significantly_and_weighs_forgetting() -> None:
    losing = [run(5, 4, 4.1), run(5, 4, 4.11), run(5, 4, 4.12)]
    line = tables.rule(losing, ["grads"])[-1]
    assert line.startswith(
        "| grads | 5 %, 40 % noise, equal epochs | -0.110 (-0.135 to -0.085) | yes |"
    )
    wavering = [
        run(5, 4, 3.9, general=1.2),
        run(5, 4, 4.1, general=1.2),
        run(5, 4, 4.0, general=1.2),
    ]
    line = tables.rule(wavering, ["grads"])[-1]
    assert "| no | -0.200 | -0.200 |" in line  # no gain, and 0.2 nats of general loss
    apart = [run(5, 4, 3.9), {**run(5, 4, 3.0), "equal": "steps"}]
    for name in ("base", "full", "random_5", "grads_5"):
        apart[0]["models"][name.replace("grads", "other")] = apart[0]["models"][name]
    lines = tables.rule(apart, ["grads", "other"])[2:]
    assert [line.split(" | ")[-2:] for line in lines] == [
        ["+0.550", "+0.100 |"],
        ["+0.100", "+0.100 |"],
    ]
