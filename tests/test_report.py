"""The report of small executed notebooks: complete, offline, without code, and replaced only as a whole."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat.v4 as nb
import pytest

from ctxlm.analysis import report
from ctxlm.analysis.report import build, main
from ctxlm.config import ConfigError

PROGRESS = [nb.new_output("stream", name="stderr", text=f"\r{done} of 3") for done in (1, 2, 3)]
PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


def notebook(*cells) -> str:
    made = nb.new_notebook(cells=list(cells), metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    return json.dumps(made)


def ran(source: str, *outputs, count: int | None = 1):
    return nb.new_code_cell(source, execution_count=count, outputs=list(outputs))


def analysis(words: str = "A is better") -> str:
    return notebook(
        nb.new_markdown_cell("# The runs of a grid", metadata={"tags": ["notebook-only"]}),
        nb.new_markdown_cell("## Findings"),
        ran("secret_call()", nb.new_output("display_data", {"text/markdown": f"**{words}**", "text/plain": "words"})),
        nb.new_markdown_cell("## Main figure"),
        ran("plot();", nb.new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})),
        ran("table", nb.new_output("display_data", {"text/html": "<table><tr><td>554.58</td></tr></table>"})),
    )


@pytest.fixture
def outputs(tmp_path) -> Path:
    home = tmp_path / "outputs" / "mini"
    files = {
        "../../mini.yaml": "title: Wide & shallow?\ndescription: A <small> grid.\n"
        "experiments: {A: {}}\nsweep: {seed: [1, 2]}\n",
        "analysis.ipynb": analysis(),
        "analysis.json": json.dumps(
            {"runs": [{"run": "A_seed-1", "source": "outputs"}, {"run": "B_seed-1", "source": "committed"}]}
        ),
        "A_seed-1/metrics.json": "{}",
        "A_seed-1/experiment.ipynb": notebook(nb.new_markdown_cell("# One experiment"), ran("train(1)", *PROGRESS)),
        "A_seed-2/experiment.ipynb": notebook(nb.new_markdown_cell("# One experiment"), ran("train(2)")),
        "corpus/corpus.ipynb": notebook(nb.new_markdown_cell("# The corpus"), ran("read()")),
    }
    home.mkdir(parents=True)
    for name, text in files.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(text)
    return tmp_path / "outputs"


def make(outputs: Path) -> Path:
    return build(str(outputs.parent / "mini.yaml"), outputs)


class Links(HTMLParser):
    """Everything a page would load, and where its links lead."""

    def __init__(self, path: Path):
        super().__init__()
        self.loaded, self.links, self.tags = [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        if tag == "a":
            self.links.append(values["href"])
        else:
            self.loaded += [values[name] for name in ("src", "href", "data", "srcset", "poster") if name in values]


def test_pages_load_nothing_from_anywhere(outputs):
    pages = [make(outputs), *outputs.glob("mini/report/notebooks/*.html")]
    assert len(pages) == 5
    for page in pages:
        found, text = Links(page), page.read_text(encoding="utf-8")
        assert all(value.startswith("data:") for value in found.loaded)
        assert not {"script", "link", "iframe"} & set(found.tags)
        assert not re.search(r"@import|url\(|https?://", text)
        assert "default-src 'none'" in text


def test_index_has_results_but_no_code(outputs):
    text = make(outputs).read_text(encoding="utf-8")
    assert "<title>Wide &amp; shallow?</title>" in text and "A &lt;small&gt; grid." in text
    assert "<strong>A is better</strong>" in text and f"data:image/png;base64,{PIXEL}" in text and "554.58" in text
    assert "secret_call" not in text and "plot();" not in text and "The runs of a grid</h1>" not in text
    assert "2 finished runs · grid mini · written " in text and "commit " in text
    assert 'alt="Main figure"' in text
    contents = re.findall('<a href="#(section-[0-9]+)">(.*?)</a>', text)
    assert contents and contents == re.findall('<h2 id="(section-[0-9]+)">(.*?)</h2>', text)


def test_index_links_to_every_notebook_with_its_code(outputs):
    index = make(outputs)
    links = [link for link in Links(index).links if link.startswith("notebooks/")]
    names = ["corpus", "A_seed-1", "A_seed-2", "analysis"]
    assert links == [f"notebooks/{name}.html" for name in names]
    pages = [(index.parent / link).read_text(encoding="utf-8") for link in links]
    codes = [re.sub("<[^>]+>", "", page) for page in pages]
    for code, source in zip(codes, ("read()", "train(1)", "train(2)", "secret_call()"), strict=True):
        assert source in code
    assert "<title>One experiment: A_seed-1</title>" in pages[1] and 'href="../index.html"' in pages[1]
    assert "3 of 3" in pages[1] and "2 of 3" not in pages[1]
    text = index.read_text(encoding="utf-8")
    assert "A_seed-2</a> (not finished)" in text and "A_seed-1</a></td>" in text


def test_a_rebuilt_report_replaces_the_old_one_whole(outputs):
    stray = make(outputs).parent / "notebooks" / "gone.html"
    stray.write_text("of an earlier report")
    (outputs / "mini" / "analysis.ipynb").write_text(analysis("B is better"))
    assert "B is better" in make(outputs).read_text(encoding="utf-8")
    assert not stray.exists()
    assert not list(outputs.glob("mini/.report*"))


def broken(home: Path, name: str, text: str | None) -> None:
    (home / name).unlink() if text is None else (home / name).write_text(text)


FAILED = ran("fit()", nb.new_output("error", ename="ValueError", evalue="no sizes", traceback=["…"]))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("analysis.ipynb", None, r"analysis.ipynb is missing: run `make report GRID="),
        ("analysis.ipynb", "{", "not a readable notebook"),
        ("analysis.ipynb", notebook(FAILED), r"ended in ValueError \(no sizes\)"),
        ("analysis.ipynb", notebook(ran("a"), ran("b", count=None)), "not run to its end"),
        ("analysis.json", None, "analysis.json is missing or damaged"),
        ("analysis.json", "{}", "analysis.json is missing or damaged"),
        ("A_seed-1/experiment.ipynb", "not JSON", "experiment.ipynb is not a readable notebook"),
    ],
)
def test_a_failed_build_leaves_the_previous_report(outputs, capsys, name, text, words):
    before = make(outputs).read_bytes()
    broken(outputs / "mini", name, text)
    with pytest.raises(ConfigError, match=words):
        make(outputs)
    assert (outputs / "mini" / "report" / "index.html").read_bytes() == before
    assert not list(outputs.glob("mini/.report*"))
    assert main(["--grid", str(outputs.parent / "mini.yaml"), "--outputs", str(outputs)]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1 and shown.err.startswith("error: ")


def test_a_report_that_cannot_be_moved_in_leaves_the_previous_one(outputs, monkeypatch):
    before = make(outputs).read_bytes()
    rename = Path.rename

    def refuse(self, target):
        if target.name == "report" and not self.name.endswith("-earlier"):
            raise OSError("the disk is full")
        return rename(self, target)

    monkeypatch.setattr(report.Path, "rename", refuse)
    with pytest.raises(OSError, match="disk is full"):
        make(outputs)
    assert (outputs / "mini" / "report" / "index.html").read_bytes() == before


def test_command_prints_the_page_and_refuses_an_unknown_grid(outputs, capsys):
    assert main(["--grid", str(outputs.parent / "mini.yaml"), "--outputs", str(outputs)]) == 0
    assert Path(capsys.readouterr().out.strip()) == outputs / "mini" / "report" / "index.html"
    assert main(["--grid", "quik", "--outputs", str(outputs)]) == 1
    assert "grid 'quik' does not exist" in capsys.readouterr().err
