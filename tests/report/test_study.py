"""The study's report: sections, marks, missing data, hostile text and broken study.json files."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from othink_ray.report.axes import level_axis, tick_labels
from othink_ray.report.charts import BOTTOM, HEIGHT, LEFT, TOP, WIDTH
from othink_ray.study.figures import figures, seeds_note
from othink_ray.study.page import run_rows, table_1, transfers, write_study_report
from othink_ray.study.records import RecordedValue, read_study
from tests.report.test_page import Page

METHODS = ("base", "grpo", "sft", "grpo_d")
LISTS = ("runs", "claims", "table1", "fig1", "fig4", "fig5", "fig6", "fig7")


def value(mean: float, *, seeds: int = 3, half: float = 0.05) -> dict[str, Any]:
    return {"mean": mean, "lo": mean - half, "hi": mean + half, "values": [mean] * seeds}


def run(name: str, **changed: Any) -> dict[str, Any]:
    return {
        "name": name,
        "status": "done",
        "reason": None,
        "seconds": 187.2,
        "folder": f"runs/{name}",
        "command": f"python -m othink_ray.main run.dir=runs/{name}",
        "experiments": ["RQ1a", "RQ2"],
        "accuracy": 0.52,
        "has_report": True,
        **changed,
    }


def claim(verdict: str, **changed: Any) -> dict[str, Any]:
    text = {"claim": f"This {verdict}.", "paper": "76.50 > 64.50", "ours": "69.3 > 66.1"}
    return {"experiment": "RQ2", **text, "verdict": verdict, **changed}


def transfer(train: str, test: str, method: str, **changed: Any) -> dict[str, Any]:
    return {
        "train": train,
        "test": test,
        "method": method,
        "accuracy": value(0.6),
        "over_base": 0.2,
        "over_sft": None if method == "sft" else 1.182,
        "paper_over_base": 63.53,
        "paper_over_sft": None if method == "sft" else 61.63,
        "base": value(0.5, seeds=1),
        **changed,
    }


def whole_study() -> dict[str, Any]:
    alphas = (0.0, 0.25, 0.5, 0.75, 1.0)
    return {
        "name": "paper",
        "size": "full",
        "finished": True,
        "seconds": 5012.0,
        "command": "python -m othink_ray.main mode=study",
        "model": "tiny",
        "seeds": [0, 1, 2],
        "steps": 120,
        "questions": 256,
        "tasks": {"VC": "counting", "GR": "geometry"},
        "runs": [run(f"gr-{method}-s{seed}") for method in METHODS for seed in range(3)],
        "table1": [
            {"task": task, "method": method, "ours": value(0.4 + index / 10), "paper": 42.5 + index, "paper_7b": 76.0}
            for task in ("VC", "GR")
            for index, method in enumerate(METHODS)
        ],
        "fig1": [
            {"method": method, "points": [[step, 0.3 + step / 600, 0.25, 0.6] for step in range(0, 121, 20)]}
            for method in ("sft", "grpo")
        ],
        "fig4": [{"alpha": alpha, "accuracy": value(0.5 + alpha / 10), "format": value(0.9)} for alpha in alphas],
        "fig5": [
            {
                "alpha": alpha,
                "accuracy": [[step, 0.5] for step in range(1, 121)],
                "format": [[step, 0.9] for step in range(1, 121)],
            }
            for alpha in alphas
        ],
        "fig6": [{"beta": index / 100, "accuracy": value(0.55 - index / 50)} for index in range(6)],
        "fig7": [
            transfer(*pair, method) for pair in (("GR", "VC"), ("VC", "GR")) for method in ("grpo_d", "grpo", "sft")
        ],
        "claims": [claim("held"), claim("did not hold"), claim("not settled"), claim("not run", ours=None)],
    }


def write_study(folder: Path, **changed: Any) -> Path:
    (folder / "study.json").write_text(json.dumps({**whole_study(), **changed}))
    return folder


def page_of(folder: Path) -> Page:
    return Page(write_study_report(folder))


def part(page: Page, start: str, end: str) -> str:
    return page.text.partition(start)[2].partition(end)[0]


def drawn_labels(page: Page) -> list[str]:
    return [label for label in page.attributes("aria-label") if " against " in label]


def test_a_complete_study_shows_everything_in_the_papers_order(tmp_path: Path) -> None:
    page = page_of(write_study(tmp_path))
    sections = ["The paper’s claims", "Table 1 ", "Fig. 1 ", "Fig. 4 ", "Fig. 5 ", "Fig. 6 ", "Fig. 7 ", "Runs"]
    positions = [page.html.replace("</span>", "").find(f">{section}") for section in sections]
    assert -1 not in positions and positions == sorted(positions)
    for fact in ("tiny", "0, 1, 2", "120", "256", "12 of 12", "1 h 23 min", "python -m othink_ray.main mode=study"):
        assert fact in page.text
    assert "not finished" not in page.text
    assert page.text.count("no run done") == 1  # the claim without our numbers
    assert drawn_labels(page) == [
        "Test accuracy against training step",
        "Accuracy against α",
        "Format accuracy against α",
        "Accuracy reward against training step",
        "Format reward against training step",
        "Accuracy against β",
    ]


def test_every_verdict_is_a_word_and_not_only_a_color(tmp_path: Path) -> None:
    page = page_of(write_study(tmp_path))
    words = re.findall(r'<td><span class="word (\w+)">([^<]+)</span></td>', page.html)
    assert words == [("good", "held"), ("bad", "did not hold"), ("unsure", "not settled"), ("none", "not run")]


def test_table_1_has_our_intervals_and_both_paper_sizes(tmp_path: Path) -> None:
    table = part(page_of(write_study(tmp_path)), "VC (counting)", "GR (geometry)")
    assert "GRPO-D 70.0 (65.0 – 75.0) 45.50 76.00" in table


def test_the_best_method_is_marked_once_all_are_measured(tmp_path: Path) -> None:
    record = whole_study()
    record["table1"][1]["ours"] = None
    rows = table_1(read_study(write_study(tmp_path, table1=record["table1"])))
    assert [row.best_ours for row in rows] == [False] * 4 + [False, False, False, True]
    assert [row.best_paper for row in rows] == [False, False, False, True] * 2
    assert all(row.best_paper_7b for row in rows)  # all equal


def test_an_empty_study_says_no_run_done_in_every_section(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(json.dumps({key: [] if key in LISTS else None for key in whole_study()}))
    page = page_of(tmp_path)
    assert page.text.count("no run done") == 8
    assert "not finished" in page.text
    assert not drawn_labels(page)
    assert "None" not in page.text


def test_an_empty_object_is_a_valid_study(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{}")
    assert page_of(tmp_path).text.count("no run done") == 8


@pytest.mark.parametrize("key", list(whole_study()))
def test_any_key_may_be_null(tmp_path: Path, key: str) -> None:
    page = page_of(write_study(tmp_path, **{key: None}))
    assert "None" not in page.text


@pytest.mark.parametrize("key", LISTS)
def test_any_field_of_any_row_may_be_null(tmp_path: Path, key: str) -> None:
    for field in whole_study()[key][0]:
        record = whole_study()
        for row in record[key]:
            row[field] = None
        page = page_of(write_study(tmp_path, **{key: record[key]}))
        assert "None" not in page.text and "nan" not in page.text.lower()


def test_levels_without_a_run_are_named(tmp_path: Path) -> None:
    record = whole_study()
    for row in record["fig4"][1:3]:
        row |= {"accuracy": None, "format": None}
    page = page_of(write_study(tmp_path, fig4=record["fig4"], fig1=record["fig1"][:1]))
    assert "no run done: α 0.25, α 0.5" in page.text
    assert "no run done: GRPO" in page.text


def test_a_failed_run_has_a_reason_and_no_link(tmp_path: Path) -> None:
    failed = run("vc-sft-s1", status="failed", reason="the rollout died", accuracy=None, has_report=False)
    page = page_of(write_study(tmp_path, runs=[run("gr-grpo-s0"), failed]))
    assert "1 failed" in page.text and "1 of 2" in page.text
    assert "the rollout died" in part(page, "vc-sft-s1 failed", "</main>")
    assert page.attributes("href") == ["runs/gr-grpo-s0/report.html"]


def test_a_failed_run_without_a_reason_says_so(tmp_path: Path) -> None:
    page = page_of(write_study(tmp_path, runs=[run("a", status="failed", reason=None)]))
    assert "no reason recorded" in page.text


@pytest.mark.parametrize(
    "folder", ["javascript:alert(1)//", "https://example.org", "/etc", "../other", "a/../../b", ""]
)
def test_only_folders_inside_the_study_are_linked(tmp_path: Path, folder: str) -> None:
    assert not page_of(write_study(tmp_path, runs=[run("a", folder=folder)])).attributes("href")


@pytest.mark.parametrize("folder", ["runs/alpha 0.25", "runs/gr-grpo_d-s0/", "a..b"])
def test_any_folder_name_inside_the_study_is_linked(tmp_path: Path, folder: str) -> None:
    (row,) = run_rows(read_study(write_study(tmp_path, runs=[run("a", folder=folder)])))
    assert row.link == folder.rstrip("/").replace(" ", "%20") + "/report.html"


@pytest.mark.parametrize("attack", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}"])
def test_text_of_the_study_is_escaped(tmp_path: Path, attack: str) -> None:
    hostile = dict.fromkeys(("name", "size", "command", "model"), attack)
    failed = run(attack, status=attack, reason=attack, command=attack, experiments=[attack], folder=attack)
    claims = [dict.fromkeys(("experiment", "claim", "paper", "ours", "verdict"), attack)]
    fig7 = [transfer(attack, "VC", attack)]
    fig1 = [{"method": attack, "points": [[1, 0.5, 0.4, 0.6]]}]
    page = page_of(
        write_study(tmp_path, **hostile, runs=[failed], claims=claims, fig7=fig7, fig1=fig1, tasks={"VC": attack})
    )
    assert page.text.count(attack) >= 15
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert not page.attributes("onerror") + page.attributes("href") + page.attributes("src")
    assert " 49 " not in page.text


def test_the_page_loads_no_external_resource(tmp_path: Path) -> None:
    page = page_of(write_study(tmp_path))
    assert not page.attributes("src")
    assert all(re.fullmatch(r"runs/[\w-]+/report\.html", link) for link in page.attributes("href"))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"url\(|@import|//[a-z]", page.html)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page.attributes("content")


def test_values_out_of_range_stay_inside_the_drawing(tmp_path: Path) -> None:
    record = whole_study()
    out_of_range = {"mean": 1.4, "lo": -0.8, "hi": 2.6, "values": [0.1, 2.7]}
    record["fig4"][0] |= {"accuracy": out_of_range, "format": {"mean": -0.5, "lo": -3, "hi": 0.1, "values": [-0.5]}}
    record["fig6"] = [{"beta": 0.01, "accuracy": {"mean": 1.05, "lo": 1.0, "hi": 1.1, "values": [1.05]}}]
    record["fig1"][0]["points"] = [[0, 3.0, -2.0, 8.0], [20, 0.5, 0.4, 0.6], [40, "x", None], [None, 0.5], 7]
    record["table1"][0] |= {"ours": out_of_range, "paper": 250.0}
    record["fig7"][0] |= {"over_base": 90.0, "over_sft": -4.0}
    study = read_study(write_study(tmp_path, **{key: record[key] for key in LISTS}))
    charts = [panel for figure in figures(study).values() for panel in figure.panels]
    points = [point for chart in charts for line in chart.lines for point in line.dots]
    ends = [(x, y) for chart in charts for line in chart.lines for x, low, high in line.bars for y in (low, high)]
    paths = [line.path + line.band for chart in charts for line in chart.lines]
    corners = [tuple(map(float, pair)) for path in paths for pair in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path)]
    assert len(points) > 10 and len(ends) > 10
    assert all(LEFT <= x < WIDTH and TOP <= y <= HEIGHT - BOTTOM for x, y in [*points, *ends, *corners])
    page = Page(write_study_report(tmp_path))
    percents = [float(percent) for style in page.attributes("style") for percent in re.findall(r"(-?[\d.]+)%", style)]
    assert percents and all(0 <= percent <= 100 for percent in percents)
    assert "140.0 (0.0 – 100.0)" in page.text and "cut at 0 and 100 %" in page.text


def test_non_finite_numbers_count_as_not_run(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(
        json.dumps(
            whole_study()
            | {
                "fig6": [
                    {"beta": 0.01, "accuracy": value(float("nan"))},
                    {"beta": float("inf"), "accuracy": value(0.5)},
                ]
            }
        )
    )
    page = page_of(tmp_path)
    assert "nan" not in page.text.lower()
    assert "no run done" in part(page, "Fig. 6", "Fig. 7")


def value_of_seeds(count: int, *, cut: bool = False) -> RecordedValue:
    return RecordedValue(mean=0.5, lo=0.4, hi=0.6, by_seed=[0.5] * count, cut=cut)


@pytest.mark.parametrize(
    ("counts", "note"),
    [
        ([], ""),
        ([3, 3], "3 seeds: mean of the seeds, with its 95 % interval"),
        ([2, 3], "2 to 3 seeds: mean of the seeds, with its 95 % interval"),
        ([1, 1], "one seed, with its 95 % interval"),
        (
            [1, 3],
            "3 seeds: mean of the seeds, with its 95 % interval; elsewhere one seed, with its 95 % interval",
        ),
    ],
)
def test_the_note_names_the_seeds_and_their_interval(counts: list[int], note: str) -> None:
    assert seeds_note([None, *map(value_of_seeds, counts)]) == note


def test_our_and_the_papers_changes_share_one_scale(tmp_path: Path) -> None:
    loss = transfer("VC", "GR", "sft", over_base=-0.5, paper_over_base=-77.77)
    gain = transfer("VC", "GR", "grpo_d", over_base=None, over_sft=1.0, paper_over_base=4.25, paper_over_sft=368.99)
    (panel,) = transfers(read_study(write_study(tmp_path, fig7=[loss, gain])))
    assert panel.title == "Trained on VC (counting), tested on GR (geometry)"
    assert [(change.label, change.ours, change.paper) for change in panel.changes] == [
        ("SFT over base", "-50.0 %", "-77.77 %"),
        ("GRPO-D over base", "baseline 0 %", "+4.25 %"),
        ("GRPO-D over SFT", "+100.0 %", "+368.99 %"),
    ]
    missing = transfer("VC", "GR", "sft", accuracy=None, over_base=None, paper_over_base=-77.77)
    [panel_of_missing] = transfers(read_study(write_study(tmp_path, fig7=[missing])))
    assert [change.ours for change in panel_of_missing.changes] == ["no run done"]
    left, absent, right = (change.bar for change in panel.changes)
    assert absent is None and left is not None and right is not None
    assert sum(left) == pytest.approx(panel.zero) and right[0] == pytest.approx(panel.zero)
    assert right[1] == pytest.approx(2 * left[1])
    marks = [change.mark for change in panel.changes]
    assert None not in marks and marks[0] < left[0] < panel.zero < marks[1] < marks[2]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("levels", "labels"),
    [
        ([0.0, 0.25, 0.5, 0.75, 1.0], ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        ([0.0, 0.1, 0.25], ["0.00", "0.10", "0.25"]),
        ([0.02], ["0.02"]),
    ],
)
def test_a_sweep_has_a_tick_at_every_level(levels: list[float], labels: list[str]) -> None:
    axis = level_axis(levels)
    assert list(axis.ticks) == levels and tick_labels(axis) == labels
    assert axis.low < levels[0] and levels[-1] < axis.high


def test_levels_too_close_for_labels_get_round_ticks() -> None:
    levels = [0.0, 0.001, 0.5, 1.0]
    axis = level_axis(levels)
    assert 0.001 not in axis.ticks
    assert axis.low < min(levels) and max(levels) < axis.high


@pytest.mark.parametrize(
    ("content", "message"), [("[1, 2]", "holds a list, not an object"), ('{"name": ', "is not valid JSON")]
)
def test_an_invalid_study_file_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(ValueError, match=rf"study\.json {message}"):
        write_study_report(tmp_path)


def test_a_folder_without_a_study_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"study\.json does not exist: pass the folder of a study"):
        write_study_report(tmp_path)


def test_a_large_study_gives_a_small_page_quickly(tmp_path: Path) -> None:
    record = whole_study()
    for row in record["fig5"]:
        row |= {key: [[step, 0.5] for step in range(1, 3001)] for key in ("accuracy", "format")}
    record["runs"] = [run(f"run-{index}") for index in range(300)]
    write_study(tmp_path, fig5=record["fig5"], runs=record["runs"])
    start = time.process_time()
    path = write_study_report(tmp_path)
    assert time.process_time() - start < 3
    assert path.stat().st_size < 1_000_000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "study.json"]


def test_curves_take_seeds_from_the_values_of_the_same_runs(tmp_path: Path) -> None:
    record = whole_study()
    for row in record["table1"][5:7]:
        row["ours"] = value(0.5, seeds=1)
    for row in record["fig4"]:
        row["accuracy"] = value(0.5, seeds=2)
    drawn = figures(read_study(write_study(tmp_path, table1=record["table1"], fig4=record["fig4"])))
    assert drawn["fig1"].note == "one seed, with its 95 % interval"
    assert drawn["fig5"].note.startswith("2 seeds: mean over the seeds, no interval")


def test_curves_without_values_take_the_seeds_of_the_study(tmp_path: Path) -> None:
    drawn = figures(read_study(write_study(tmp_path, table1=[], fig4=None)))
    assert drawn["fig1"].note == "3 seeds: mean of the seeds, with its 95 % interval"
