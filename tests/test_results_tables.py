"""The results table as Markdown, LaTeX and CSV, the papers' accuracies beside ours, accuracy by number of signals."""

import csv
import io
import json

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from experiments import results_table
from popi_jax.config import changed, parse
from popi_jax.configs import quickstart
from popi_jax.data.schema import Example, Signal
from popi_jax.errors import UserError
from popi_jax.evaluation import plots, published, report, tables
from popi_jax.modes.evaluate import with_signals

NAN = float("nan")
HOSTILE = "[x](u)_a_ *b* `c` | <d> & 5% #1 ~e~ $f$ {g} ^h \\i\nj"
RESULTS = {
    "config": "my_config",
    "dataset": "a|b & <c>_100%",
    "variant": "DEMO",
    "split": "test",
    "rows": [
        {
            "method": "popi",
            "seed": 0,
            "n": 1200,
            "accuracy": 0.9,
            "accuracy_ci95": [0.88, 0.915],
            "context_tokens_mean": 20.25,
            "summary_tokens_mean": 20.25,
            "loss": None,
        },
        {
            "method": "oracle",
            "seed": 0,
            "n": 1200,
            "accuracy": 0.95,
            "accuracy_ci95": [0.94, NAN],
            "popi_minus_this": -0.05,
            "popi_minus_this_ci95": [-0.072, -0.03],
            "context_tokens_mean": 1043.0,
            "summary_tokens_mean": 0.0,
            "loss": NAN,
        },
        {"method": HOSTILE, "seed": 0, "accuracy": 0.5, "accuracy_ci95": None, "accuracy_by_persona": {"p": 0.5}},
    ],
}
MARKDOWN = r"""Results of my\_config on a\|b \& \<c\>\_100% DEMO, test split.

| method | accuracy | POPI minus this | context tokens | summary tokens | n | seeds |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| popi | 90.0% [88.0%, 91.5%] |  | 20.2 | 20.2 | 1,200 | 1 |
| oracle | 95.0% | -5.0 [-7.2, -3.0] | 1,043.0 |  | 1,200 | 1 |
| \[x\](u)\_a\_ \*b\* \`c\` \| \<d\> \& 5% \#1 \~e\~ \$f\$ {g} ^h \\i j | 50.0% |  |  |  |  | 1 |

Brackets hold 95% bootstrap intervals"""
LATEX = r"""% Needs \usepackage{booktabs}.
Results of my\_config on a\textbar{}b \& \textless{}c\textgreater{}\_100\% DEMO, test split.

\begin{tabular}{lrrrrrr}
    \toprule
    method & accuracy & POPI minus this & context tokens & summary tokens & n & seeds \\
    \midrule
    popi & 90.0\% [88.0\%, 91.5\%] &  & 20.2 & 20.2 & 1,200 & 1 \\
    oracle & 95.0\% & $-$5.0 [$-$7.2, $-$3.0] & 1,043.0 &  & 1,200 & 1 \\
    {}[x](u)\_a\_ *b* `c` \textbar{} \textless{}d\textgreater{} \& 5\% \#1 \textasciitilde{}e\textasciitilde{} \$f\$ \{g\} \textasciicircum{}h \textbackslash{}i j & 50.0\% &  &  &  &  & 1 \\
    \bottomrule
\end{tabular}

{\footnotesize Brackets hold 95\% bootstrap intervals"""  # noqa: E501
PAPER = {"published_accuracy": 80.14, "published_source": "arXiv 2510.17881"}
BY_SIGNALS = [
    {"method": method, "seed": seed, "signals": count, "n": 9, "accuracy": accuracy, "accuracy_ci95": interval}
    for method, seed, count, accuracy, interval in [
        ("popi", 0, 4, 0.8, [0.7, 0.9]),
        ("popi", 1, 4, 0.9, [0.8, 1.0]),
        ("popi", 0, 1, 0.6, [0.5, 0.7]),
        ("popi", 1, 1, 0.6, [0.5, 0.7]),
        ("raw_signals", 0, 4, 0.7, [0.6, None]),
    ]
]


def test_markdown_is_as_written_by_hand():
    assert tables.markdown(RESULTS).startswith(MARKDOWN)


def test_markdown_shows_every_name_unchanged():
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(tables.markdown(RESULTS))
    texts = [token for token in tokens if token.type == "inline"]
    assert texts[0].content and {child.type for token in texts for child in token.children} <= {"text", "text_special"}
    shown = ["".join(child.content for child in token.children) for token in texts]
    assert shown[0] == "Results of my_config on a|b & <c>_100% DEMO, test split."
    assert HOSTILE.replace("\n", " ") in shown and shown[-1] == tables.NOTE
    assert len(texts) == 1 + 4 * 7 + 1


def test_latex_is_as_written_by_hand():
    text = tables.latex(RESULTS)
    assert text.startswith(LATEX)
    assert text.endswith("about the preference.\\par}\n")


def test_csv_has_every_field_of_every_row():
    text = tables.separated(RESULTS["rows"])
    lines = text.split("\r\n")
    assert lines[0] == (
        "method,seed,n,accuracy,accuracy_ci95_low,accuracy_ci95_high,context_tokens_mean,summary_tokens_mean,loss,"
        "popi_minus_this,popi_minus_this_ci95_low,popi_minus_this_ci95_high,accuracy_ci95"
    )
    assert lines[1] == "popi,0,1200,0.9,0.88,0.915,20.25,20.25,,,,,"
    assert lines[2] == "oracle,0,1200,0.95,0.94,,1043.0,0.0,,-0.05,-0.072,-0.03,"
    header, _, _, last = csv.reader(io.StringIO(text, newline=""))
    assert dict(zip(header, last, strict=True))["method"] == HOSTILE
    assert 'quote "q", comma' in next(csv.reader(io.StringIO(tables.separated([{'quote "q", comma': 1}]))))


def test_the_files_are_written_beside_results_json(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS | {"rows": RESULTS["rows"][:1]}))
    tables.write(tmp_path)
    assert "| popi | 90.0% [88.0%, 91.5%] |" in (tmp_path / "results.md").read_text(encoding="utf-8")
    assert r"popi & 90.0\% [88.0\%, 91.5\%] &" in (tmp_path / "results.tex").read_text(encoding="utf-8")
    assert (tmp_path / "results.csv").read_bytes().endswith(b"\r\npopi,0,1200,0.9,0.88,0.915,20.25,20.25,\r\n")


# From the paper of POPI (method popi) and that of AlignX (raw signals, trained on all data), in percent.
POPI = {
    "elix": 80.14,
    "review": 95.76,
    "roleplay": 72.36,
    "alignx/DEMO": 90.44,
    "alignx/arbitrary": 71.12,
    "alignx/PAIR": 58.73,
    "alignx/UGC": 58.54,
}
ALIGNX = {"UGC": 59.63, "PAIR": 58.48, "DEMO": 91.44, "arbitrary": 75.19}


def config_of(name: str, **values):
    dataset, _, variant = name.partition("/")
    data = {"data.dataset": dataset, "data.protocol": "published", "model.path": "owner/name"}
    if variant:
        data["data.variant"] = variant
    return changed(parse(quickstart.get_config("runlocal")), data | values)


@pytest.mark.parametrize("name", POPI)
def test_popi_has_the_accuracy_of_its_paper(name):
    row = {"published_accuracy": POPI[name], "published_source": "arXiv 2510.17881"}
    assert published.figures(config_of(name), "popi") == row
    others = {"base", "population", "raw_signals", "zero_shot_summary", "oracle", "popi_joint", "inference_only"}
    assert not any(published.figures(config_of(name), method) for method in others)
    # Not of the paper's method, or not of its metric.
    assert published.figures(config_of(name, **{"schedule.name": "inference_only"}), "popi") == {}
    assert published.figures(config_of(name, **{"objective.reference_context": "signals"}), "popi") == {}
    # Not of the paper's users, or of a model that is only there to try the command.
    assert published.figures(config_of(name, **{"data.protocol": "disjoint"}), "popi") == {}
    assert published.figures(config_of(name, **{"model.path": "stylebook"}), "popi") == {}


@pytest.mark.parametrize(
    ("name", "accuracy"), [*((f"alignx/{variant}", value) for variant, value in ALIGNX.items()), ("psoups", 63.33)]
)
def test_raw_signals_has_the_accuracy_of_alignx_where_the_reference_reads_the_signals(name, accuracy):
    same = config_of(name, **{"objective.reference_context": "signals"})
    row = {"published_accuracy": accuracy, "published_source": "arXiv 2503.15463, ICA-full"}
    assert published.figures(same, "raw_signals") == row
    assert published.figures(config_of(name), "raw_signals") == {}


@pytest.mark.parametrize("name", ["stylebook", "prefeval", "traits", "users", "psoups"])
def test_other_data_have_no_published_accuracy_of_popi(name):
    values = {"data.path": "x"} if name == "users" else {}
    assert published.figures(config_of(name, **values), "popi") == {}


def test_the_papers_accuracy_has_a_column_of_its_own_and_a_note(tmp_path):
    rows = [RESULTS["rows"][0] | PAPER, RESULTS["rows"][1]]
    results = RESULTS | {"rows": rows}
    columns, lines = tables.cells(plots.summarize(rows))
    assert columns[:3] == ["method", "accuracy", "paper's accuracy"]
    assert [line[:3] for line in lines] == [["popi", "90.0% [88.0%, 91.5%]", "80.14%"], ["oracle", "95.0%", ""]]
    said = (
        "The paper's accuracy is what the paper itself reports (popi: arXiv 2510.17881), with its own data, weights and"
        " hardware. It was not measured here."
    )
    (tmp_path / "results.json").write_text(json.dumps(results))
    report.write(tmp_path)
    out = io.StringIO()
    tables.show(results, Console(file=out))
    page = (tmp_path / "report.html").read_text().replace("&#39;", "'")
    for text in (tables.markdown(results), tables.latex(results), page, " ".join(out.getvalue().split())):
        assert said in text and "paper's accuracy" in text
    assert "<td>80.14%</td>" in page and "a|b &amp; &lt;c&gt;_100% DEMO, test split" in page
    assert tables.separated(rows).splitlines()[1].endswith("80.14,arXiv 2510.17881,,,")


def test_a_table_gives_each_row_the_figure_of_its_own_name(tmp_path):
    rows = [{"method": method, "seed": 0, "accuracy": 0.5} | PAPER for method in ("popi", "popi_joint", "base")]
    results_table._write_table(config_of("alignx/PAIR"), tmp_path, rows, [], [0], data_texts=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["dataset"], results["variant"]) == ("alignx", "PAIR") and "by_signals" not in results
    found = {row["method"]: row.get("published_accuracy") for row in results["rows"]}
    assert found == {"popi": 58.73, "popi_joint": None, "base": None}
    assert all((tmp_path / f"results.{form}").stat().st_size for form in ("md", "tex", "csv"))


def test_no_paper_is_named_where_no_row_has_one(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    report.write(tmp_path)
    out = io.StringIO()
    tables.show(RESULTS, Console(file=out))
    page = (tmp_path / "report.html").read_text()
    for text in (tables.markdown(RESULTS), tables.latex(RESULTS), page, out.getvalue()):
        assert "paper" not in text.replace("--paper", "").lower()


def test_a_damaged_published_field_is_one_line(tmp_path):
    results = RESULTS | {"rows": [RESULTS["rows"][0] | {"published_accuracy": "80.14"}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="results.json: damaged, .*published_accuracy"):
        tables.write(tmp_path)


def test_accuracy_by_number_of_signals_is_a_table_and_a_figure(tmp_path):
    results = RESULTS | {"by_signals": BY_SIGNALS}
    by_count = plots.by_signals(results)
    assert tables.signals_cells(by_count) == (
        ["method", "1 signal", "4 signals"],
        [["popi", "60.0% [50.0%, 70.0%]", "85.0% [75.0%, 95.0%]"], ["raw_signals", "", "70.0%"]],
    )
    (axes,) = plots.signals_figure(by_count).axes
    assert [label.get_text() for label in axes.get_legend().get_texts()] == ["POPI", "Raw signals"]
    (popi, _, (bars,)), _ = axes.containers
    assert popi.get_ydata() == pytest.approx([0.6, 0.85]) and popi.get_xdata() == pytest.approx([1, 4], rel=0.05)
    assert [bar[:, 1] for bar in bars.get_segments()] == [pytest.approx([0.5, 0.7]), pytest.approx([0.75, 0.95])]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    report.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Accuracy by number of signals" in page and "<td>85.0%<small>[75.0%, 95.0%]</small></td>" in page
    assert (tmp_path / "signals.png").exists()
    assert "| popi | 60.0% [50.0%, 70.0%] | 85.0% [75.0%, 95.0%] |" in tables.markdown(results)
    assert r"raw\_signals &  & 70.0\% \\" in tables.latex(results)
    assert plots.signals_figure(plots.by_signals(RESULTS)) is None


def test_the_last_signals_of_a_user_are_kept():
    users = [Example(str(n), "test", tuple(Signal("profile", text=str(i)) for i in range(n)), ()) for n in (1, 2, 5)]
    kept = with_signals(users, 2)
    assert [[signal.text for signal in example.signals] for example in kept] == [["0"], ["0", "1"], ["3", "4"]]
    assert [example.user for example in kept] == ["1", "2", "5"]
