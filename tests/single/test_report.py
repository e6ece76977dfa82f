"""Rows become tables, plots and a page."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.launching import ROOT
from tests.support import require

sys.path.append(str(ROOT / "benchmarks"))  # its scripts are no package

import page
import plots
import report

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
WITHOUT_IT = "matplotlib is not installed: pip install 'ringps[bench]'"


def all_reduce(backend: str, time_s: float, transport: str = "tcp", n: int = 4) -> report.Row:
    times_s = [time_s, 2 * time_s, time_s / 2]
    return report.all_reduce_row(backend, 1 << 20, "float32", n, times_s, {"transport": transport})


def step(backend: str, time_s: float, **facts: object) -> report.Row:
    return report.row(
        bench="train",
        backend=backend,
        op="train_step",
        size_bytes=4_000_000,
        dtype="float32",
        world_size=2,
        times_s=[time_s],
        facts={"transport": "auto", "model": "gpt", **facts},
    )


def simulated(n: int, efficiency: float) -> report.Row:
    return report.row(
        bench="simulate",
        backend="ring",
        op="train_step",
        size_bytes=1 << 30,
        dtype="float32",
        world_size=n,
        times_s=[0.5],
        facts={"gbit_per_s": 10.0, "efficiency": efficiency, "points": [1, 2]},
    )


BANDWIDTHS = [
    all_reduce("ringps-tcp", 0.002),
    all_reduce("gloo", 0.003),
    all_reduce("ringps-shm", 0.001, "shm"),
    all_reduce("gloo", 0.008, "shm"),
]
STEPS = [
    step("none", 0.100),
    step("ddp", 0.150),
    step("ddp-view", 0.140),
    step("ringps-auto", 0.120, extra_memory_gradients=1.25),
]
SIMULATED = [simulated(n, 1 - n / 10_000) for n in (2, 64, 4096)]


def column(table: report.Table, title: str) -> list[str]:
    place = table.titles.index(title)
    return [line[place] for line in table.lines]


def test_a_row_holds_medians_and_bandwidths() -> None:
    row = BANDWIDTHS[0]
    assert (row.time_us, row.time_us_min, row.time_us_max, row.repeats) == (2000, 1000, 4000, 3)
    assert row.algbw_gbps == pytest.approx(0.524288)
    assert row.busbw_gbps == pytest.approx(0.524288 * 1.5)
    assert row.env["transport"] == "tcp"
    assert "transport" not in report.environment()


def test_json_comes_back(tmp_path: Path) -> None:
    report.write_json(tmp_path / "rows.json", [*BANDWIDTHS, *STEPS])
    assert report.read_json(tmp_path / "rows.json") == [*BANDWIDTHS, *STEPS]


def test_bandwidths_compare_within_a_run() -> None:
    table = report.bandwidths(BANDWIDTHS, "gloo")
    assert column(table, "vs gloo") == ["1.50x", "1.00x", "8.00x", "1.00x"]
    assert column(table, "size") == ["1 MiB"] * 4
    lines = table.text().splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    assert len(lines) == 5


def test_steps_compare_what_communication_adds_with_the_better_ddp() -> None:
    table = report.steps(STEPS)
    assert column(table, "added ms") == ["", "50.0", "40.0", "20.0"]
    assert column(table, "best DDP adds") == ["", "0.80x", "1.00x", "2.00x"]
    assert column(table, "extra memory") == ["", "", "", "1.25"]


@pytest.mark.parametrize("time_s", [0.1, 0.09])
def test_what_adds_nothing_has_no_ratio(time_s: float) -> None:
    rows = [*STEPS[:3], step("ringps-auto", time_s)]
    assert report.ddp_ratio(rows[-1], rows) is None
    assert report.ddp_ratio(rows[-1], rows[-1:]) is None
    assert report.added_us(rows[-1], rows[-1:]) is None


def test_markdown_escapes_what_would_end_a_cell() -> None:
    table = report.Table(("a", "b|c"), [("1", "2"), ("x|y", "z")])
    assert table.markdown() == "| a | b\\|c |\n| ---: | ---: |\n| 1 | 2 |\n| x\\|y | z |"


def test_other_rows_show_whatever_is_particular_to_them() -> None:
    titles, _, *lines = page.facts(SIMULATED).splitlines()
    assert titles == "| op | backend | n | size | time ms | efficiency |"  # a list is no cell
    assert lines[2] == "| train_step | ring | 4096 | 1024 MiB | 500 | 0.5904 |"
    assert lines[3:] == ["", "In all of these: gbit per s 10."]


def test_predictions_leave_out_what_is_neither_a_step_nor_measured() -> None:
    reduced = replace(SIMULATED[0], op="all_reduce")
    measured = replace(reduced, backend="measured", env={**reduced.env, "error": 0.05})
    assert page.predictions([reduced, *SIMULATED]) == page.facts(SIMULATED)
    both = page.predictions([measured, reduced, *SIMULATED])
    assert both == f"{page.facts(SIMULATED)}\n\n{page.facts([measured])}"


def test_the_page_prints_what_is_there_and_names_what_is_not(tmp_path: Path) -> None:
    report.write_json(tmp_path / "train.json", STEPS)
    path = tmp_path / "docs" / "page.md"
    assert page.write(tmp_path, path, draw=False) == [
        "allreduce",
        "hosts",
        "simulate",
        "recovery",
        "goodput",
        "checkpoint",
    ]
    text = path.read_text()
    assert "## Training steps" in text
    assert "## All-reduce" not in text
    assert "| gpt | 2 | ringps-auto | 120.0 | 120.0 | 120.0 | 20.0 | 2.00x | 1.25 |" in text
    assert "no result of `benchmarks/allreduce.py`, `benchmarks/hosts.py`, `benchmarks/simulate.py`" in text
    assert str(report.environment()["cpu"]) in text
    assert "repetitions" not in text.partition("## Training steps")[2]
    assert "![" not in text


def test_the_page_says_how_noisy_it_was() -> None:
    said = page.conditions("allreduce", BANDWIDTHS)
    assert "3 to 3 repetitions, of which the slowest took 4.0 times as long as the fastest" in said
    assert f"commit {report.environment()['commit']}." in said


def test_without_any_result_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no JSON of any benchmark"):
        page.write(tmp_path, tmp_path / "page.md", draw=False)
    assert not (tmp_path / "page.md").exists()


def test_plots_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"ringps\[bench\]"):
        report.load_pyplot()


def test_the_page_shows_its_plots(tmp_path: Path) -> None:
    require(HAS_MATPLOTLIB, WITHOUT_IT)
    for name, rows in (("allreduce", BANDWIDTHS), ("train", STEPS), ("simulate", SIMULATED)):
        report.write_json(tmp_path / f"{name}.json", rows)
    path = tmp_path / "page.md"
    assert page.write(tmp_path, path) == ["hosts", "recovery", "goodput", "checkpoint"]
    for name in ("allreduce", "train", "simulate"):
        assert f"](page/{name}.svg)" in path.read_text()
        ElementTree.parse(tmp_path / "page" / f"{name}.svg")
    assert sorted(one.name for one in (tmp_path / "page").iterdir()) == [
        "allreduce.svg",
        "simulate.svg",
        "train.svg",
    ]
    (tmp_path / "train.json").unlink()
    page.write(tmp_path, path)
    assert not (tmp_path / "page" / "train.svg").exists()


def test_the_same_rows_give_the_same_plot(tmp_path: Path) -> None:
    require(HAS_MATPLOTLIB, WITHOUT_IT)
    for name in ("one.svg", "other.svg"):
        plots.save(plots.bandwidths(BANDWIDTHS), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()


def test_curves_and_bars_hold_the_rows() -> None:
    require(HAS_MATPLOTLIB, WITHOUT_IT)
    (axes,) = plots.bandwidths(BANDWIDTHS).axes
    curves = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
    assert curves == {
        "ringps-tcp": BANDWIDTHS[0].busbw_gbps,
        "gloo (beside tcp)": BANDWIDTHS[1].busbw_gbps,
        "ringps-shm": BANDWIDTHS[2].busbw_gbps,
        "gloo (beside shm)": BANDWIDTHS[3].busbw_gbps,
    }
    (axes,) = plots.added_time(STEPS).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([50, 40, 20])
    (axes,) = plots.efficiency(SIMULATED).axes
    assert list(axes.lines[0].get_ydata()) == [0.9998, 0.9936, 0.5904]
    assert plots.efficiency(BANDWIDTHS) is None
