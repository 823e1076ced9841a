"""``python -m bench report``: tables, plots and the page, from rows with anything in them."""

from __future__ import annotations

import argparse
import builtins
import csv
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from bench import report
from bench.columns import significant
from bench.setups import latest, number, plain, split, timed, usable

HOSTILE = "</script><img src=x onerror=alert(1)> 'q' \"d\" | `b` $\\frac$ \u2028\ud800\x00 ünï"
VOID = {"meta", "img", "input", "br", "link"}


def row(**fields):
    base = {
        "suite": "kernels",
        "name": "separable_conv",
        "case": "d0_heads",
        "direction": "forward",
        "dtype": "fp32",
        "device": "cpu",
        "engine": "cpu",
        "shape": "1x64x64x64",
        "status": "timed",
        "median_s": 0.002,
        "min_s": 0.0019,
        "spread": 0.01,
        "calls": 350,
        "bytes": 10**7,
        "flops": 10**8,
        "gb_s": 5.0,
        "gflop_s": 50.0,
        "floor_s": 0.001,
        "of_roofline": 0.5,
        "bandwidth": 1e10,
        "matrix_rate": 1e11,
        "vs_eager": 3.0,
        "vs_compile": None,
        "peak_bytes": 5 * 10**6,
        "error": 0.25,
        "error_of": "the bound",
        "machine": {"cpu": "Some CPU", "threads": 2, "commit": "abc1234", "torch": "2.13.0"},
        "time": "2025-03-01T10:00:00+00:00",
    }
    return {**base, **fields}


def absent(**fields):
    return {k: v for k, v in row(**fields).items() if k not in ("median_s", "min_s", "spread")} | {
        "status": fields.get("status", "absent"),
        "reason": fields.get("reason", "not built"),
    }


def written(tmp_path, rows, *words):
    """The folder that the command writes for these rows; a torn line follows them."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"suite": "ker')
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    out = tmp_path / "out"
    assert report.run(parser.parse_args([str(path), "--out", str(out), *words])) == 0
    return out


class Page(HTMLParser):
    """The table's cells and every attribute that could load or run something."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.heads, self.tags, self.open, self.attributes = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append((dict(attrs), []))
        elif tag == "th":
            self.heads.append(dict(attrs))
        elif tag == "td":
            self.rows[-1][1].append([dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.rows[-1][1][-1][1] += data


def page_of(out):
    return Page((out / "index.html").read_text(encoding="utf-8"))


def test_tables_hold_every_timed_row_and_the_reasons_of_the_others(tmp_path):
    rows = [
        row(engine="eager", median_s=0.006, vs_eager=1.0),
        row(),
        absent(engine="cuda", reason="no GPU"),
        absent(engine="cuda", reason="no GPU", case="d4_heads"),
        absent(engine="triton", status="wrong", reason="error 7 of the bound"),
    ]
    text = (written(tmp_path, rows) / "tables.md").read_text()
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("| case"))
    assert "× eager" in head and "× compile" not in head  # a column without a value is left out
    first, second = (line for line in lines if line.startswith("| d0_heads"))
    assert "| cpu | **2.00 ms** | 1.0% | 5.00 | 50.0 | 50% | 3.00 | 5.00 | 0.250 |" in first
    assert "| eager | 6.00 ms |" in second
    wrong, gone = (line for line in lines if line.startswith("- **"))
    assert wrong.startswith("- **wrong** triton: error 7 of the bound (d0_heads forward fp32 cpu)")
    assert "no GPU (d0_heads forward fp32 cpu, d4_heads forward fp32 cpu)" in gone
    assert (
        "| A | Some CPU, 2 threads | Some CPU | 2 | abc1234 | torch 2.13.0 | 2025-03-01 |" in text
    )
    assert "Errors are relative to: the bound (cpu, eager)." in lines


def test_machines_and_commits_are_told_apart_and_the_latest_row_counts():
    machine = row()["machine"]
    rows = [
        row(median_s=0.3, time="2025-03-02T00:00:00+00:00"),
        row(median_s=0.1, time="2025-03-01T00:00:00+00:00"),
        row(median_s=0.5, machine={**machine, "commit": "def"}),
        row(median_s=0.6, machine={**machine, "load_1min": 9.0}, time="2025-03-03T00:00:00+00:00"),
    ]
    setups = split(rows)
    assert [(s.label, s.commit, [r["median_s"] for r in s.rows]) for s in setups] == [
        ("A", "abc1234", [0.6]),
        ("B", "def", [0.5]),
    ]
    same_time = [row(median_s=1.0), row(median_s=2.0)]
    assert [r["median_s"] for r in latest(same_time)] == [2.0]
    assert setups[0].machine["load_1min"] == 9.0


def test_rows_that_name_nothing_are_counted(tmp_path, capsys):
    old = {"op": "soft_nms", "backend": "cpu", "median_s": 1.0}
    assert usable([old, None, 3, "x", row()]) == ([row()], 4)
    out = written(tmp_path, [old, row()])
    assert "an older format, or no results): 1." in capsys.readouterr().err
    assert "an older format, or no results): 1." in (out / "tables.md").read_text()
    assert "an older format, or no results): 1." in (out / "index.html").read_text()


def test_the_page_is_self_contained_and_well_formed(tmp_path):
    out = written(tmp_path, [row(), row(engine="eager", median_s=0.004), absent(engine="cuda")])
    page = page_of(out)
    assert page.open == [] and not {"link", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("svg") == 1 and page.tags.count("script") == 1
    loads = [v for k, v in page.attributes if k in ("src", "href", "xlink:href") and v]
    assert all(value.startswith("#") for value in loads)
    policy = next(v for k, v in page.attributes if k == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_columns_can_be_sorted_by_their_numbers(tmp_path):
    rows = [row(), row(engine="eager", median_s=1.5e-7, of_roofline=1.2), absent(engine="cuda")]
    page = page_of(written(tmp_path, rows))
    lines = page.rows[1:]
    assert {tuple(head) for head in page.heads} == {("scope", "data-kind", "aria-sort")}
    kinds = [head["data-kind"] for head in page.heads]
    assert all(len(cells) == len(kinds) for _, cells in lines)
    labels = [cell[0]["data-label"] for cell in lines[0][1]]
    at = labels.index("median")
    assert [float(cells[at][0].get("data-sort", "nan")) for _, cells in lines[:2]] == [2e-3, 1.5e-7]
    assert "data-sort" not in lines[2][1][at][0]  # nothing to sort by: last in either direction
    for (attributes, text), kind in (
        (cell, k) for _, c in lines for cell, k in zip(c, kinds, strict=True)
    ):
        assert kind == "text" or ("data-sort" in attributes) == bool(text)
    assert [dict(a)["data-engine"] for a, _ in lines] == ["cpu", "eager", "cuda"]
    assert "not built" in lines[2][1][labels.index("engine")][1]


def test_every_row_is_in_the_csv_file(tmp_path):
    rows = [row(), absent(engine="openvino", reason='a "quoted", text'), row(floors={"a": 1.0})]
    rows[2]["engine"] = "other"
    out = written(tmp_path, rows, "--no-plot")
    with (out / "rows.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [line["engine"] for line in found] == [r["engine"] for r in rows]
    assert float(found[0]["median_s"]) == rows[0]["median_s"]
    assert found[1]["reason"] == rows[1]["reason"] and json.loads(found[2]["floors"]) == {"a": 1.0}


def test_hostile_text_stays_text(tmp_path):
    machine = {"cpu": HOSTILE, "commit": HOSTILE, HOSTILE: HOSTILE}
    fields = dict.fromkeys(("name", "case", "direction", "dtype", "engine", "shape"), HOSTILE)
    rows = [
        row(**fields, machine=machine, error_of=HOSTILE, floors={HOSTILE: 0.1}),
        absent(**{**fields, "engine": "_x"}, machine=machine, reason=HOSTILE),
    ]
    out = written(tmp_path, rows, "--title", HOSTILE.replace("\x00", "").replace("\ud800", ""))
    page = page_of(out)
    assert page.open == [] and "img" not in page.tags and page.tags.count("script") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert any(plain(HOSTILE) == text for _, cells in page.rows for _, text in cells)
    for file in out.glob("*.svg"):
        tree = ElementTree.parse(file)
        assert plain(HOSTILE) in next(t.text for t in tree.iter() if t.tag.endswith("title"))
    assert len(list(out.glob("*.svg"))) == 1
    markdown = (out / "tables.md").read_text(encoding="utf-8")
    assert "<img" not in markdown
    table = [line for line in markdown.splitlines() if line.startswith("| ")]
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table[3:]}
    assert len(bars) == 1  # no cell was split


def test_missing_and_odd_values_are_blank(tmp_path):
    odd = row(spread=None, gb_s="fast", gflop_s=float("nan"), of_roofline=True, vs_eager=[1])
    odd.pop("shape"), odd.pop("error"), odd.pop("bandwidth"), odd.pop("machine"), odd.pop("time")
    untimed = row(engine="eager", median_s=None)
    out = written(tmp_path, [odd, untimed, row(engine="triton", median_s=float("inf"))])
    text = (out / "tables.md").read_text()
    assert "| **2.00 ms** |" in text and "nan" not in text.lower().replace("engine", "")
    assert text.count("no reason was given") == 2
    assert number(odd, "of_roofline") is None and not timed(untimed)


def test_the_plot_has_a_mark_for_the_best_engine_of_each_case(tmp_path):
    rows = [
        row(),
        row(engine="eager", median_s=0.9),
        row(case="d4_heads", engine="eager"),
        row(direction="backward", bandwidth=2e10),
        row(name="decode_topk", flops=0),
        row(suite="model", name="tf_efficientdet_d0"),
    ]
    out = written(tmp_path, rows)
    tree = ElementTree.parse(out / "roofline-cpu-fp32.svg")
    titles = [t.text for t in tree.iter() if t.tag.endswith("title")]
    assert titles == [
        "1: separable_conv d0_heads forward, cpu, 50% of the roofline",
        "2: separable_conv d4_heads forward, eager, 50% of the roofline",
        "1: separable_conv d0_heads backward, cpu, 50% of the roofline",
    ]
    texts = [t.text for t in tree.iter() if t.tag.endswith("text")]
    assert "measured: copy 10 to 20 GB/s, matrix product 0.1 TFLOP/s" in texts
    assert "Cases without operations, not in it: 1." in (out / "index.html").read_text()


def test_plots_are_told_apart_by_machine_device_and_dtype(tmp_path):
    other = {**row()["machine"], "commit": "def"}
    rows = [row(), row(dtype="bf16"), row(machine=other)]
    names = sorted(p.name for p in written(tmp_path, rows).glob("*.svg"))
    assert names == [
        "roofline-cpu-bf16-a.svg",
        "roofline-cpu-fp32-a.svg",
        "roofline-cpu-fp32-b.svg",
    ]


def test_many_marks_keep_their_numbers_apart(tmp_path):
    cases = [row(case=f"case {i}", flops=10**8 + i * 10**6, median_s=0.002) for i in range(60)]
    svg = (written(tmp_path, cases) / "roofline-cpu-fp32.svg").read_text()
    assert len(re.findall(r"<title>", svg)) == 60
    assert all(f">{i}</text>" in svg for i in range(1, 61))


def test_without_matplotlib_the_error_says_what_to_do(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"plots need matplotlib.*\[plot\].*--no-plot"):
        written(tmp_path, [row()])
    assert not (tmp_path / "out").exists()
    out = written(tmp_path, [row()], "--no-plot")
    assert sorted(p.name for p in out.iterdir()) == ["index.html", "rows.csv", "tables.md"]


def test_no_rows_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no rows of results in .*rows\.jsonl$"):
        written(tmp_path, [])
    with pytest.raises(ValueError, match=r"\(1 lines that do not say what they measured"):
        written(tmp_path, [{"op": "soft_nms"}])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.000"), (1234.6, "1235"), (12.34, "12.3"), (1.234, "1.23"), (2.5e-5, "2.50e-05")],
)
def test_three_digits_are_shown(value, text):
    assert significant(value) == text


def test_that_something_was_absent_later_does_not_replace_its_time():
    first = row(time="2026-01-01T00:00:00")
    absent = row(status="absent", time="2026-01-02T00:00:00")
    wrong = row(status="wrong", time="2026-01-03T00:00:00")
    assert latest([absent, first]) == latest([first, absent]) == [first]
    assert latest([first, wrong, absent]) == [wrong]
