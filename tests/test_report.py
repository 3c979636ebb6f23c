"""The report shows the content of its input files and needs no other file. The table shows every method."""

import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from popi_jax.errors import UserError
from popi_jax.evaluation import decomposition, evaluate, plots, report, tables


def row(method: str, seed: int, accuracy: float, **more) -> dict:
    return {
        "method": method,
        "seed": seed,
        "n": 1000,
        "accuracy": accuracy,
        "accuracy_ci95": [accuracy - 0.02, accuracy + 0.01],
        "context_tokens_mean": 20.0 + seed,
        "summary_tokens_mean": 20.0 + seed,
        "raw_signal_tokens_mean": 210.0,
        "loss": 0.25,
        "informativeness_nats": None,
    } | more


ROWS = [
    row("popi", 0, 0.90),
    row("popi", 1, 0.94),
    row("base", 0, 0.50, popi_minus_this=0.40, popi_minus_this_ci95=[0.375, 0.42], summary_tokens_mean=0.0),
    {"method": "bayes_signals", "seed": 0, "n": 1000, "accuracy": 0.97, "accuracy_ci95": [0.96, float("nan")]},
]
SAMPLE = {
    "user": "u1",
    "persona": "likes <script>alert(1)</script> & brevity",
    "signals": "Question: why?",
    "signal_tokens": 212,
    "summary": "The user likes brevity.",
    "prompt": "Why is the sky blue?",
    "response": "Scattering.",
    "chosen": "Blue scatters most.",
    "rejected": "A long story.",
    "logp_chosen": -21.25,
    "logp_rejected": None,
}


def make_workdir(path, rows=ROWS, curves=True):
    results = {"schema": 1, "config": "quickstart", "dataset": "stylebook", "split": "test", "rows": rows}
    (path / "results.json").write_text(json.dumps(results))
    (path / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    if curves:
        lines = [{"step": i, "wall_s": 1.0, "loss": 1 / i, "accuracy": 0.5, "kl": None} for i in range(1, 30)]
        lines.append({"step": 29, "wall_s": 1.0, "eval_accuracy": 0.8})
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Page(HTMLParser):
    """Checks that tags close. Collects the tags, the text and the references of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.references, self.tags = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br", "link", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = make_workdir(tmp_path_factory.mktemp("run"))
    report.write(path)
    return path


def test_page_is_complete_and_has_no_external_reference(workdir):
    raw = (workdir / "report.html").read_text()
    page = Page(raw)
    assert page.open == []
    assert all(reference.startswith("#") for reference in page.references)
    assert "http" not in raw and "@import" not in raw and raw.count("<script") == 1
    assert page.tags.count("svg") == 2
    assert raw.count("<style>") == 1 and "@media print" in raw  # The stylesheet is inside.


def test_page_shows_the_content_of_the_files(workdir):
    text = " ".join(Page((workdir / "report.html").read_text()).text)
    for expected in ("quickstart", "stylebook, test split", "92.0%", "90.0%", "93.0%", "+40.0", "10.2×", "-21.2"):
        assert expected in text, expected
    for field in ("persona", "summary", "prompt", "response", "chosen", "rejected", "signals"):
        assert SAMPLE[field] in text, field
    assert "I(o; z), nats" not in text  # No row has a value for it.


def test_every_test_user_is_shown_with_right_and_wrong(tmp_path):
    make_workdir(tmp_path)
    hs = {"u1": (0.5, -1.5), "u2": (2.0, 0.25)}
    records = [
        evaluate.Record(i, user, "g", f"persona of {user}", "", f"<b>{user}</b> likes tea", 5, True, 9, h, h)
        for user, own in hs.items()
        for i, h in enumerate(own)
    ]
    evaluate.write_records(tmp_path / "eval_records.jsonl", records)
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(SAMPLE | {"h": h}) + "\n" for h in (0.5, -1.5)))
    report.write(tmp_path)
    raw = (tmp_path / "report.html").read_text()
    text = " ".join(" ".join(Page(raw).text).split())
    assert "All 2 test users" in text and "<b>u1</b> likes tea" in text
    assert "1 of 2 -0.50" in text and "2 of 2 +1.12" in text
    assert "✓ ranked right, h = +0.50 nats" in text and "✗ ranked wrong, h = -1.50 nats" in text
    # What the filter reads: a class for mistakes, and the words to find.
    assert re.findall(r'<tr class="(\w+)" data-find="(\w+) persona', raw) == [("wrong", "u1"), ("right", "u2")]
    assert re.findall(r'<article class="sample (\w+)"', raw) == ["right", "wrong"]


def test_plots_are_written_and_not_blank(workdir):
    import matplotlib.image

    for name in ("results", "curves"):
        pixels = matplotlib.image.imread(workdir / f"{name}.png")
        assert pixels.shape[1] > 1000
        assert np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0).shape[0] > 20
    assert not (workdir / "personas.png").exists()


def test_same_files_give_the_same_page(workdir, tmp_path):
    make_workdir(tmp_path)
    report.write(tmp_path)
    assert (tmp_path / "report.html").read_text() == (workdir / "report.html").read_text()


def test_parts_without_a_file_are_left_out(tmp_path):
    report.write(tmp_path)
    assert "no results yet" in (tmp_path / "report.html").read_text()
    make_workdir(tmp_path, rows=ROWS[:1], curves=False)
    report.write(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "svg" not in page.tags and "90.0%" in " ".join(page.text)


def test_every_text_is_escaped_and_shown_unchanged(tmp_path):
    def hostile(name):
        return f"  <i>{name}</i> &amp; \"{name}\" '{{{{ 7 * 7 }}}}'\n\n  {{% raw %}}"

    rows = [row("popi", 0, 0.9, accuracy_by_persona={hostile("shade"): 0.9}), row(hostile("method"), 0, 0.5)]
    results = {name: hostile(name) for name in ("config", "dataset", "split")} | {"rows": rows}
    sample = {name: hostile(name) if isinstance(value, str) else value for name, value in SAMPLE.items()}
    environment = {
        "popi_jax": hostile("popi_jax"),
        "git": "<i>&amp;" + "0" * 40,
        "packages": {name: hostile(name) for name in ("jax", "flax")},
        "devices": {"count": 8, "kind": hostile("kind")},
        "started": hostile("started"),
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    report.write(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    text = "".join(page.text)
    assert page.open == [] and "i" not in page.tags
    shown = [name for name in sample if isinstance(sample[name], str)]
    for name in ("config", "dataset", "split", "method", "popi_jax", "jax", "flax", "kind", "started", *shown):
        assert hostile(name) in text, name
    assert ", commit <i>&amp;0000;" in text


def test_a_sample_may_lack_any_field_but_its_user(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"user": "u7"}\n')
    report.write(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "User u7" in page.text
    assert not {"Inferred summary", "Prompt", "Generated response", "Preferred by the user"} & set(page.text)
    assert "details" not in page.tags


def test_broken_file_is_one_line(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match="results.json:1: not JSON"):
        report.write(tmp_path)


def test_seeds_are_averaged():
    base, popi, bayes = plots.summarize(ROWS)
    assert [s.method for s in (base, popi, bayes)] == ["base", "popi", "bayes_signals"]
    assert (popi.seeds, popi.per_seed) == (2, (0.90, 0.94))
    assert popi.accuracy == pytest.approx(0.92)
    assert popi.interval == pytest.approx((0.90, 0.93))
    assert popi.context_tokens == pytest.approx(20.5)
    assert base.popi_minus_this == (0.40, 0.375, 0.42)
    assert popi.popi_minus_this is None and popi.informativeness is None
    assert bayes.context_tokens is None and bayes.interval is None  # One of its bounds is NaN.


def test_personas_are_drawn_where_rows_have_them():
    assert plots.personas_figure(plots.summarize(ROWS)) is None
    prices = "pays $20, not \\$30%, for $x_{"  # Matplotlib would parse this as mathematics.
    rows = [row("popi", s, 0.9, accuracy_by_persona={"likes " * 50: 0.8 + s / 10, prices: 1.0}) for s in (0, 1)]
    figure = plots.personas_figure(plots.summarize(rows))
    figure.savefig(io.BytesIO())
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["100%", "85%"]
    assert max(len(label.get_text()) for label in figure.axes[0].get_yticklabels()) <= 120


def test_ratios_are_of_moving_means():
    """The mean of single ratios would be 0.5 here, or undefined where a step's estimate is 0."""
    lines = [{"step": i, "reward_noise": 1.0, "reward_variance": v} for i, v in enumerate([4.0, 4.0])]
    lines += [{"step": 2, "loss": 1.0}]
    lines += [{"step": 3, "grad_signal_inference": -1.0, "grad_noise_inference": 2.0}]
    found = plots.with_ratios(lines)
    assert [line.get("reward_share") for line in found] == [0.75, 0.75, None, None]
    assert [line.get("grad_snr") for line in found] == [None, None, None, -0.5]
    noisy = [{"step": i, "grad_signal_inference": v, "grad_noise_inference": 1.0} for i, v in enumerate([3, -1] * 50)]
    ratios = [line["grad_snr"] for line in plots.with_ratios(noisy)][20:]
    assert 0 < min(ratios) and max(ratios) < 2


def test_moving_mean_has_no_start_bias():
    np.testing.assert_allclose(plots.moving_mean(np.full(100, 3.0)), 3.0)
    values = np.arange(50.0)  # The decay is 1/2: the weights are 1/2, 1/4, ...
    assert plots.moving_mean(values)[1] == pytest.approx((0.5 * 1 + 0.25 * 0) / 0.75)
    np.testing.assert_array_equal(plots.moving_mean(values[:10]), values[:10])


def test_table_prints_every_method():
    out = io.StringIO()
    tables.show({"rows": ROWS}, Console(file=out))
    lines = out.getvalue().splitlines()
    header, base, popi, bayes = (re.split(r" {2,}", line.strip()) for line in lines if line.strip())
    assert header[:5] == ["method", "accuracy", "POPI minus this", "context tokens", "summary tokens"]
    assert base[:4] == ["base", "50.0% [48.0%, 51.0%]", "+40.0 [+37.5, +42.0]", "20.0"]
    assert popi == ["popi", "92.0% [90.0%, 93.0%]", "20.5", "20.5", "0.25", "1,000", "2"]
    assert bayes == ["bayes_signals", "97.0%", "1,000", "1"]
    assert "I(o; z), nats" not in header  # No row has a value for it.


DAMAGED = [
    ("results.json", "[]", ": expected an object in braces, found a list; remove the file"),
    ("results.json", "{}", ": damaged, or written by another version (config: Field required"),
    ("results.json", '{"config": "c", "dataset": "d", "split": "s", "rows": []}', ": damaged, or written by another"),
    ("results.json", '{"config": "c", "dataset": "d", "split": "s", "rows": [{"method": "m"}]}', ": damaged"),
    ("results.json", json.dumps({"config": "c", "rows": [row("m", 0, 0.5, loss="x")]}), ": damaged"),
    ("results.json", json.dumps({"config": "c", "rows": [row("m", 0, 0.5, accuracy_ci95=[1])]}), ": damaged"),
    ("results.json", "", ":1: not JSON (Expecting value at column 1); remove the file"),
    ("samples.jsonl", "[]", ":1: expected an object in braces, found a list; remove the file"),
    ("samples.jsonl", "5", ":1: expected an object in braces, found a number; remove the file"),
    ("samples.jsonl", "{}", ":1: damaged, or written by another version (user: Field required); remove"),
    ("samples.jsonl", '{"user": "u", "logp_chosen": "x"}', ":1: damaged"),
    ("metrics.jsonl", '{"step": 1}\n5\n', ":2: expected an object in braces, found a number; remove the line"),
    ("metrics.jsonl", '{"step": "a"}\n', ":1: field 'step' is missing or not an integer; remove the line"),
    ("metrics.jsonl", '{"step": 1, "loss": []}\n', ":1: field 'loss' is not a number; remove the line"),
    ("environment.json", '{"git": 5}', ": damaged, or written by another version (popi_jax: Field required"),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_a_damaged_file_is_one_line_with_the_remedy(tmp_path, name, content, message):
    make_workdir(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        report.write(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / name}{message}") and "remove the" in str(error.value)


def test_a_damaged_record_is_one_line_with_the_remedy(tmp_path):
    path = tmp_path / "eval_records.jsonl"
    record = evaluate.Record(0, "u", "g", "p", "f:1", None, 3, True, 7, 0.5, -0.5)
    evaluate.write_records(path, [record, record])
    assert evaluate.read_records(path) == [record, record]
    path.write_text(path.read_text().replace('"h": 0.5', '"h": [1]', 1))
    with pytest.raises(UserError, match=r"eval_records.jsonl:1: damaged, .*h: Input should be a valid number"):
        evaluate.read_records(path)


@pytest.mark.parametrize("damage", [lambda data: data[:200], lambda data: b"", lambda data: data[:-90] + bytes(90)])
def test_a_damaged_decomposition_is_one_line_with_the_remedy(tmp_path, damage):
    path = tmp_path / "decomposition.npz"
    measured = decomposition.Measured(np.zeros((2, 3), int), np.zeros((1, 4)), np.zeros((2, 4)))
    decomposition.write(path, measured)
    assert decomposition.read(path).log_odds_ZxTr.shape == (1, 4)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        UserError, match="decomposition.npz: damaged, or written by another version .*; remove"
    ) as error:
        decomposition.read(path)
    assert "\n" not in str(error.value)
