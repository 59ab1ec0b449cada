"""How a notebook shows a view: with controls where a frontend has them, and texts as what they are.

A view is a plain function that returns a figure, a table or HTML. Texts, of a corpus or out of a model, are data that
may hold anything: they stand in `pre` and `code` elements, escaped, with signs in the place of control characters.
"""

import functools
import inspect
import os
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from html import escape
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython import get_ipython
from IPython.display import HTML, display
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from ctxlm.config import ConfigError
from ctxlm.metrics import NonFiniteLoss

LARGE = {"font.size": 14.5} | dict.fromkeys(
    ("axes.labelsize", "axes.titlesize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 14.5
)
"""Letters that are 9 pixels high and more where a figure is 390 wide."""
INK = "color:#111;font:inherit"
"""Of text on a colour: the same on a light page and on a dark one."""
MOST_NATS = 12
"""A surprise from which on the colour grows no deeper."""
WIDGET = "application/vnd.jupyter.widget-view+json"
MULTILINE = ("text", "change")
"""Controls whose text may have several lines."""
_TELL: ContextVar[Callable[[str], None]] = ContextVar("tell", default=print)
"""Where `tell` says something: below the cell that runs or, after a change, in the place of the view."""


def explore(views: Callable[..., Any] | Sequence[Callable[..., Any]], **controls: Any) -> None:
    """Show views at their controls' first values; where a frontend has widgets, again whenever one is changed.

    What is shown is an ordinary output that is exchanged in place, so that a saved notebook holds no widget's state.
    While a view is computed anew, its place says so.

    Args:
        views: each is given those of the controls that it takes.
        controls: a text, a list of choices, or (least, most, first) for a number.
    """
    views = [views] if callable(views) else views
    place = {list: 0, tuple: 2}  # where the first value stands
    values = {name: c[place[type(c)]] if type(c) in place else c for name, c in controls.items()}
    widgets = {name: widget(name, control) for name, control in controls.items()} if has_widgets() else {}
    if widgets:
        show_widgets(beside(widgets.values()))
    said: set[str] = set()
    handles = [display(shown(view, values, said), display_id=True) for view in views]

    def change(event: Any) -> None:
        values.update({name: own.value for name, own in widgets.items()})
        name = event["owner"].description
        concerned = [own for own in zip(views, handles, strict=True) if name in inspect.signature(own[0]).parameters]
        for _, handle in concerned:
            handle.update(quiet("working…"))
        said = set()
        for view, handle in concerned:
            told = _TELL.set(lambda sentence, handle=handle: handle.update(quiet(sentence)))
            try:
                handle.update(shown(view, values, said))
            except BaseException as error:  # of which a frontend shows nothing: "working…" would stand for ever
                handle.update(quiet(repr(error)))
                raise
            finally:
                _TELL.reset(told)

    for own in widgets.values():
        own.observe(change, "value")


def has_widgets() -> bool:
    """Whether someone sits before this kernel: not under papermill or nbconvert, which would keep widgets' state."""
    shell = get_ipython()
    editor = shell is not None and "__vsc_ipynb_file__" in shell.user_ns  # VS Code's
    return shell is not None and (editor or "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules)


def widget(name: str, control: Any) -> Any:
    """The widget of one of `explore`'s controls."""
    import ipywidgets  # opens channels to a frontend: not where there is none

    look = {"description": name, "style": {"description_width": "initial"}}
    look["layout"] = ipywidgets.Layout(width="28em", max_width="100%", margin="2px 12px 2px 0")
    if isinstance(control, list):
        return ipywidgets.Dropdown(options=control, **look)
    if isinstance(control, tuple):
        least, most, first = control
        slider = ipywidgets.FloatSlider if isinstance(most, float) else ipywidgets.IntSlider
        return slider(min=least, max=most, value=first, continuous_update=False, **look)
    kind = ipywidgets.Textarea if name in MULTILINE else ipywidgets.Text
    return kind(value=control, continuous_update=False, **look)


def beside(widgets: Iterable[Any]) -> Any:
    """Widgets side by side, as far as there is room."""
    import ipywidgets

    return ipywidgets.Box(list(widgets), layout=ipywidgets.Layout(flex_flow="row wrap"))


def show_widgets(box: Any) -> None:
    """Show a widget, of which a saved notebook and its page keep no words."""
    display({"text/plain": "", WIDGET: box._repr_mimebundle_()[WIDGET]}, raw=True)


def tell(sentence: str) -> None:
    """Say what a view waits for, where it will stand."""
    _TELL.get()(sentence)


def quiet(sentence: str) -> HTML:
    return HTML(f'<p style="opacity:.65">{quoted(sentence)}</p>')


def shown(view: Callable[..., Any], values: dict[str, Any], said: set[str] | None = None) -> Any:
    """A view, or the sentence that says why there is none; nothing if that was `said` of a view beside it."""
    wanted, said = inspect.signature(view).parameters, set() if said is None else said
    try:
        return view(**{name: value for name, value in values.items() if name in wanted})
    except (ConfigError, NonFiniteLoss, OSError) as error:
        known = str(error) in said
        said.add(str(error))
        return HTML("" if known else f"<p>{quoted(str(error))}</p>")


def large(view: Callable[..., Figure]) -> Callable[..., Figure]:
    """A figure with letters that can be read on a phone; closed, so that it is shown once."""

    @functools.wraps(view)
    def drawn(*arguments: Any, **options: Any) -> Figure:
        with plt.rc_context(LARGE):
            figure = view(*arguments, **options)
            plt.close(figure)
        return figure

    return drawn


def legend_above(figure: Figure) -> None:
    """Above the figure, of its first panel; in one column, and wrapped, where labels are long."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > 26 else 2
    labels = [wrapped(label) for label in labels]
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False)


def wrapped(text: str) -> str:
    """A text in lines that a figure has room for."""
    return textwrap.fill(text, 58)


# Texts


def visible(text: str, spaces: bool = False) -> str:
    """A text with signs in the place of what cannot be seen: control characters and, if asked for, spaces."""
    known = {"\n": "⏎", "\t": "⇥"} | ({" ": "␣"} if spaces else {})

    def sign(character: str) -> str:
        if character in known:
            return known[character]
        code = ord(character)
        if code < 32:
            return chr(0x2400 + code)
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        return f"⟨U+{code:04X}⟩" if hidden else character

    return "".join(map(sign, text))


def quoted(text: str, spaces: bool = False) -> str:
    """A text as HTML: escaped, and in an element in which nobody looks for formulas."""
    look = "font:inherit;color:inherit;background:none;white-space:pre-wrap"
    return f'<code style="{look}">{escape(visible(text, spaces))}</code>'


def table_of(frame: pd.DataFrame, texts: Sequence[str] = (), formats: Mapping[str, Any] | None = None) -> Styler:
    """A table. The columns `texts` stand on the left, wide where they are long; `formats` are of numbers, by column."""
    shown = dict.fromkeys(frame, lambda value: quoted(str(value))) | (formats or {})
    style = frame.style.hide(axis="index").format(shown).format_index(lambda name: escape(visible(name)), axis=1)
    long = [name for name in texts if frame[name].str.len().max() > 24]
    heads = {name: [{"selector": "th", "props": "text-align:left"}] for name in texts}
    style = style.set_properties(subset=list(texts), **{"text-align": "left"}).set_table_styles(heads)
    return style.set_properties(subset=long, **{"min-width": "13em", "overflow-wrap": "anywhere"})


def coloured(rows: Iterable[tuple[str, str, str, str]], legend: str) -> HTML:
    """Tokens on colours, from rows (text, colour, number below, what a pointer is told)."""
    tokens = []
    for text, colour, number, told in rows:
        small = f'<sub style="font-size:10px;opacity:.75">{escape(number)}</sub>' if number else ""
        look = (
            f"background:{colour};{INK};padding:1px 0;border-radius:3px" if colour else "background:none;font:inherit"
        )
        tokens.append(f'<code title="{escape(visible(told))}" style="{look}">{escape(visible(text))}{small}</code>')
        tokens += ["<br>"] * text.endswith("\n")
    look = "white-space:pre-wrap;overflow-wrap:break-word;word-break:normal;font:15px/2 sans-serif;max-width:60em"
    return HTML(f'<div>{legend}<pre style="{look}">{"".join(tokens)}</pre></div>')


def colour_scale(colours: Sequence[tuple[str, str]], what: str) -> str:
    """A legend: colours with what they stand for."""
    boxes = (f'<span style="background:{c};{INK};padding:2px 8px">{escape(name)}</span>' for c, name in colours)
    return f'<p style="font:14px sans-serif;margin:.3em 0">{escape(what)} {"".join(boxes)}</p>'


def heat(nats: float) -> str:
    """The colour of a surprise, light enough for dark letters."""
    return to_hex(plt.get_cmap("YlOrBr")(0.6 * min(max(nats, 0.0) / MOST_NATS, 1.0)))
