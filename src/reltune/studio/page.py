"""The page: components, and what they call. Everything that it shows is read anew from the files, so that a restart loses nothing."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import gradio as gr

from reltune.config.method import METHODS
from reltune.errors import InputError
from reltune.files import read_json
from reltune.names import CHAT_TEMPLATES, GRANULARITIES, TASKS
from reltune.report.figures import SCALES
from reltune.report.record import ComparisonRecord, RunRecord
from reltune.runs.comparison.directory import ComparisonDirectory
from reltune.runs.directory import RunDirectory
from reltune.runs.summary import read_record
from reltune.studio import command_lines, views
from reltune.studio.budget import BUDGETS, BudgetView, Choice, Rule, select_fields
from reltune.studio.data import look_at
from reltune.studio.jobs import Jobs
from reltune.studio.places import DAMAGE, Place, sentence
from reltune.studio.trying import Bench
from reltune.studio.words import Words

SECONDS = 2  # between two looks at the jobs
VIEWS = 2  # runs whose scores are kept in memory
ROLES = 3  # texts that a task may ask for

STYLE = """
.gradio-container main { max-width: 1360px !important; width: 100%; margin: 0 auto !important; }
.reltune .scroll { /* a shade at the right edge while there is more to see */
  overflow-x: auto;
  background:
    linear-gradient(to left, var(--body-background-fill) 12px, transparent) 100% 0 / 24px 100% no-repeat local,
    linear-gradient(to left, var(--border-color-primary), transparent) 100% 0 / 12px 100% no-repeat scroll;
}
.reltune table { border-collapse: collapse; font-size: 14px; min-width: 40%; }
.reltune table th, .reltune table td { text-align: left; padding: 4px 10px; min-width: 4.4em; vertical-align: top; border-bottom: 1px solid var(--border-color-primary); }
.reltune td { max-width: 34em; overflow-wrap: break-word; }
.reltune td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.reltune th { font-weight: 600; white-space: pre-line; word-break: keep-all; }
.reltune th.n { text-align: right; }
.reltune h2 { font-size: 20px; font-weight: 600; margin: 8px 0; overflow-wrap: anywhere; }
.reltune h3 { font-size: 15px; font-weight: 600; margin: 16px 0 6px; }
.reltune p { margin: 6px 0; }
.reltune a { color: #0072B2; text-decoration: underline; }
.dark .reltune a { color: #56B4E9; }
.reltune ul { padding-left: 20px; list-style: disc; }
.reltune li { overflow-wrap: anywhere; }
.reltune summary { cursor: pointer; }
.reltune .facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 8px 0; }
.reltune .fact { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 8px 14px; min-width: 130px; max-width: 100%; box-sizing: border-box; }
.reltune .name { font-size: 13px; color: var(--body-text-color-subdued); }
.reltune .value { font-size: 19px; font-weight: 600; overflow-wrap: break-word; }
.reltune .remark { font-size: 13px; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.reltune .problem { border-left: 4px solid #D55E00; padding: 6px 10px; background: rgba(213,94,0,.1); overflow-wrap: anywhere; }
.reltune pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--background-fill-secondary); padding: 8px 10px; border-radius: 6px; font-family: ui-monospace, monospace; font-size: 13px; }
.reltune pre span { display: inline-block; max-width: 100%; }
.reltune pre.output { min-height: 3em; }
.reltune .bar { display: grid; grid-template-columns: minmax(60px, 30%) 1fr 4em; gap: 8px; align-items: center; margin: 4px 0; }
.reltune .bar span { overflow-wrap: anywhere; }
.reltune .bar div { background: var(--background-fill-secondary); border-radius: 3px; }
.reltune .bar i { display: block; height: 14px; background: #0072B2; border-radius: 3px; }
.reltune .bar b { font-variant-numeric: tabular-nums; }
.reltune .tokens span { border: 1px solid var(--border-color-primary); border-radius: 3px; padding: 0 3px; line-height: 1.8; overflow-wrap: anywhere; }
.reltune .tokens .special { color: var(--body-text-color-subdued); font-style: italic; }
.reltune .tokens .learned { background: #0072B2; color: #fff; border-color: #0072B2; }
.reltune header { display: flex; flex-wrap: wrap; gap: 4px 24px; align-items: baseline; }
.reltune header h1 { font-size: 24px; font-weight: 700; margin: 0; }
.reltune header a { margin-left: auto; }
.scrolling { overflow-x: auto !important; }
.scrolling .js-plotly-plot { min-width: 460px; }
.dark .js-plotly-plot text[style*="fill: rgb(42, 63, 95)"] { fill: var(--body-text-color) !important; } /* Plotly's own, which is dark */
@media (max-width: 640px) {
  .gradio-container .main { padding: 8px 4px !important; }
  .gradio-container main { padding: 8px !important; }
  .reltune .html-container, .reltune.block > .html-container { padding: 8px 4px !important; }
  .reltune table th, .reltune table td { padding: 4px 6px; }
}
#upload .wrap { font-size: 0; }
#upload .wrap .or { display: none; }
#modules .cell-menu-button, #modules .selection-button { display: none; } /* rows and columns are not the user's to add */
#slider .tab-like-container, #slider input[type=number], #slider .min_value, #slider .max_value { display: none; }
"""


# The headings of figures, by the ids of their components.
HEADINGS = {
    "heat": "relevance_map",
    "layers": "layers",
    "budget_layers": "layers",
    "ways": "quality_cost",
    **{f"{tab}{kind}": kind for tab in ("", "job_") for kind in ("loss", "scores")},
}


def head(language: str) -> str:
    """The style of the page, with the headings of its figures."""
    words = Words(language)
    rules = [
        f'#{name}::before {{ content: "{words(key)}"; display: block; position: sticky; left: 0; font-size: 15px; font-weight: 600; '
        "padding: 10px 14px 4px; }"
        for name, key in HEADINGS.items()
    ]
    # Gradio's words for this are in the browser's language, which may be another.
    rules.append(f'#upload .wrap::after {{ content: "{words("drop_file")}"; font-size: 14px; }}')
    return f"<style>{STYLE}{' '.join(rules)}</style>"


def theme() -> Any:
    """Gradio's plain theme with the system's fonts: its own would come from the network."""
    plain = gr.themes.Default(
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        primary_hue="blue",
        neutral_hue="gray",
    )
    blue = dict.fromkeys(("button_primary_background_fill", "button_primary_background_fill_dark"), "#0072B2")
    hover = dict.fromkeys(
        ("button_primary_background_fill_hover", "button_primary_background_fill_hover_dark"), "#005A8C"
    )
    return plain.set(**blue, **hover)


def shows_problems(handler: Callable[..., Any]) -> Callable[..., Any]:
    """An InputError becomes the page's own message, with the sentence as text."""

    @functools.wraps(handler)
    def called(*arguments: Any) -> Any:
        try:
            return handler(*arguments)
        except InputError as error:
            raise gr.Error(views.escape(str(error)), print_exception=False, title="") from error

    return called


class Asked(NamedTuple):
    """The form of a new run, part by part: what is in it, or the parts themselves."""

    file: Any
    model: Any
    name: Any
    task: Any
    command: Any
    method: Any
    granularity: Any
    budget: Any
    epochs: Any
    batch: Any
    rate: Any
    length: Any
    template: Any
    cpu: Any
    skip: Any


class Page:
    """The studio of one directory. Its methods are what the components of every language call."""

    def __init__(self, place: Place, models: Sequence[str] = ()) -> None:
        self.place, self.jobs, self.bench = place, Jobs(place), Bench()
        self.named_models = list(models)
        self._views: dict[str, tuple[Any, BudgetView]] = {}
        self._lock = threading.Lock()

    # -- what there is ------------------------------------------------------------------------------------------------

    def names(self, kind: str = "run") -> list[str]:
        return [one.name for one in self.place.found() if one.kind == kind]

    def run(self, name: str | None) -> RunDirectory:
        return RunDirectory(self.place.inside(name or ""))

    def analyzed(self) -> list[str]:
        return [name for name in self.names() if self.run(name).is_analyzed]

    def tuned(self) -> list[str]:
        return [name for name in self.names() if self.run(name).has_adapter]

    def models(self) -> list[str]:
        return list(dict.fromkeys([*self.named_models, *self.place.models()]))

    def view(self, name: str) -> BudgetView:
        """The budgets of a run, read once for as long as its files are the same."""
        run = self.run(name)
        state = tuple(
            file.stat().st_mtime_ns if file.is_file() else 0
            for file in (run.config_file, run.relevance / "scores.json", run.comparison)
        )
        with self._lock:
            if name not in self._views or self._views[name][0] != state:
                while len(self._views) >= VIEWS:
                    self._views.pop(next(iter(self._views)))
                self._views[name] = (state, BudgetView(run.path))
            return self._views[name][1]

    def record(self, name: str) -> RunRecord | None:
        run = self.run(name)
        try:
            return read_record(RunDirectory.open(run.path)[1], run)
        except DAMAGE:
            return None

    # -- the page -----------------------------------------------------------------------------------------------------

    def build(self, language: str) -> Any:
        words = Words(language)
        with gr.Blocks(title=words("title"), analytics_enabled=False, fill_width=True) as blocks:
            gr.HTML(
                f"<header><h1>{words('title')}</h1><span class='remark'>{words('subtitle')}</span>"
                f"<span class='remark'>{words('runs_in')} {views.escape(str(self.place.path))}</span>"
                f"<a href='/{words.other}/' lang='{words.other}'>{words('other_language')}</a></header>",
                elem_classes="reltune",
                apply_default_css=False,
            )
            with gr.Tabs(overflow_behavior="wrap"):  # on a phone all can be seen
                for key, fill in (
                    ("tab_runs", self._runs),
                    ("tab_budget", self._budget),
                    ("tab_new", self._new),
                    ("tab_jobs", self._jobs),
                    ("tab_try", self._try),
                ):
                    with gr.Tab(words(key), id=key, elem_id=key) as tab:
                        fill(words, blocks, tab)
        return blocks

    def _runs(self, words: Words, blocks: Any, tab: Any) -> None:
        table = gr.HTML(elem_classes="reltune", apply_default_css=False, elem_id="runs")
        with gr.Row():
            chosen = gr.Dropdown(
                [], multiselect=True, label=words("choose_runs"), allow_custom_value=True, scale=4, elem_id="chosen"
            )
            refresh = gr.Button(words("refresh"), scale=1, min_width=120)
        details = gr.HTML(elem_classes="reltune", apply_default_css=False, elem_id="details")
        with gr.Row(visible=False) as shades:
            criterion = gr.Dropdown([], label=words("criterion"), allow_custom_value=True, elem_id="criterion")
            scale = gr.Radio(list(SCALES), value=SCALES[0], label=words("scale"))
        heat = gr.Plot(show_label=False, visible=False, elem_id="heat", elem_classes="scrolling")
        layers = gr.Plot(show_label=False, visible=False, elem_id="layers", elem_classes="scrolling")
        ways = gr.Plot(show_label=False, visible=False, elem_id="ways")
        with gr.Row():
            loss = gr.Plot(show_label=False, visible=False, elem_id="loss", min_width=300)
            scores = gr.Plot(show_label=False, visible=False, elem_id="scores", min_width=300)

        def listed(names: list[str] | None) -> Any:
            found = self.place.found()
            there = [one.name for one in found]
            return views.runs(found, words), _choices(there, names)

        def shown(names: list[str] | None) -> Any:
            return self._shown(list(names or []), words)

        def maps(names: list[str] | None, criterion: str | None, scale: str) -> Any:
            record = self.record(names[0]) if names and len(names) == 1 else None
            if record is None:
                return None, None
            return (
                views.heatmap(record, criterion, scale),
                views.layers(record.heatmaps, criterion, record.selected_by_layer),
            )

        everything = [details, shades, criterion, heat, layers, ways, loss, scores]
        for event in (blocks.load, tab.select, refresh.click):
            event(shows_problems(listed), chosen, [table, chosen], show_progress="hidden", queue=False)
        chosen.change(shows_problems(shown), chosen, everything, show_progress="minimal")
        for part in (criterion, scale):
            part.input(shows_problems(maps), [chosen, criterion, scale], [heat, layers], show_progress="hidden")

    def _shown(self, names: list[str], words: Words) -> Any:
        """One run, one comparison, or several runs side by side."""
        none = gr.update(value=None, visible=False)
        empty = ["", gr.update(visible=False), none, none, none, none, none, none]
        if not names:
            return empty
        found = {one.name: one for one in self.place.found()}
        unknown = [name for name in names if name not in found]
        if unknown:
            raise InputError(f"{unknown[0]!r} is no run in {self.place.path}.")

        def drawn(figure: Any) -> Any:
            return none if figure is None else gr.update(value=figure, visible=True)

        if len(names) == 1:
            one = found[names[0]]
            if one.kind == "damaged":
                return [views.problem(one.problem), *empty[1:]]
            if one.kind == "comparison":
                directory = ComparisonDirectory(self.place.inside(one.name))
                if not directory.record.is_file():
                    return [views.remark(words("next_is", stage=words("stage_comparison"))), *empty[1:]]
                try:
                    compared = ComparisonRecord.from_json(read_json(directory.record))
                    return [
                        views.of_comparison(compared, one.name, words),
                        *empty[1:5],
                        drawn(views.ways(compared)),
                        none,
                        none,
                    ]
                except DAMAGE as error:
                    return [views.problem(f"{directory.record}: {error}"), *empty[1:]]
            run = self.run(one.name)
            html, record = views.of_run(run, one.name, words)
            curves = views.curves({one.name: views.history(run)})
            criteria = [h.criterion for h in record.heatmaps] if record else []
            return [
                html,
                gr.update(visible=bool(criteria)),
                gr.update(choices=criteria, value=criteria[0] if criteria else None),
                drawn(views.heatmap(record, None, SCALES[0])),
                drawn(views.layers(record.heatmaps, None, record.selected_by_layer) if record else None),
                drawn(views.ways(record.ways if record else None)),
                drawn(curves.get("loss")),
                drawn(curves.get("scores")),
            ]
        records = {
            name: record for name in names if found[name].kind == "run" and (record := self.record(name)) is not None
        }
        left_out = [name for name in names if name not in records]
        html = views.side_by_side(records, words) if records else ""
        html += "".join(views.problem(f"{name}: {found[name].problem or found[name].kind}") for name in left_out)
        curves = views.curves({name: views.history(self.run(name)) for name in records})
        return [html, *empty[1:6], drawn(curves.get("loss")), drawn(curves.get("scores"))]

    def _budget(self, words: Words, blocks: Any, tab: Any) -> None:
        with gr.Row():
            run = gr.Dropdown(
                [], label=words("choose_run"), allow_custom_value=True, elem_id="budget_run", min_width=280
            )
            criterion = gr.Dropdown([], label=words("criterion"), allow_custom_value=True, min_width=140)
            granularity = gr.Dropdown(
                [], label=words("granularity"), multiselect=True, allow_custom_value=True, min_width=140
            )
            spread = gr.Dropdown([], label=words("spread"), allow_custom_value=True, min_width=140)
        with gr.Row():
            slider = gr.Slider(
                0,
                len(BUDGETS) - 1,
                value=BUDGETS.index("0.5%"),
                step=1,
                label=words("budget_slider"),
                buttons=[],
                scale=3,
                elem_id="slider",
            )
            budget = gr.Textbox("0.5%", label=words("budget_text"), scale=1, min_width=220, elem_id="budget_text")
        summary = gr.HTML(elem_classes="reltune", apply_default_css=False, elem_id="summary")
        layers = gr.Plot(show_label=False, elem_id="budget_layers", elem_classes="scrolling")
        modules = gr.Dataframe(
            headers=[words(key) for key in ("use", "layer", "module", "units", "of", "parameters")],
            datatype=["bool", "str", "str", "number", "number", "number"],
            static_columns=[1, 2, 3, 4, 5],
            column_count=6,
            row_count=0,
            interactive=True,
            type="array",
            label=words("module_table"),
            max_height=480,
            column_widths=["90px", "200px", "220px", "110px", "110px", "120px"],
            elem_id="modules",
        )
        line = gr.HTML(elem_classes="reltune", apply_default_css=False, elem_id="budget_command")
        with gr.Row():
            replace = gr.Checkbox(label=words("replace_plan"), elem_id="replace_plan", min_width=240)
            save = gr.Button(words("save_plan"), variant="primary", elem_id="save_plan")
        saved = gr.HTML(elem_classes="reltune", apply_default_css=False, elem_id="saved")
        job, timer = gr.State(""), gr.Timer(SECONDS, active=False)  # the last select, and what looks at it
        results = [summary, layers, modules, line]
        rule_of = [criterion, granularity, spread]

        def listed(name: str | None) -> Any:
            names = self.analyzed()
            return _choices(names, name), "" if names else views.remark(words("no_analyzed"))

        def without(rows: list[list[Any]] | None) -> list[str]:
            return [f"{row[1]}.{row[2]}" if row[1] else row[2] for row in rows or [] if row[0] in (False, "false")]

        def given(criterion: Any, granularity: Any, spread: Any) -> Rule:
            return Rule(str(criterion), tuple(granularity or ()), str(spread))

        def told(view: BudgetView, text: str, rule: Rule, left_out: list[str], overwrite: bool) -> tuple[int, Any]:
            """The slider's place, and what is shown below it."""
            found = view.choice(text, rule, left_out)
            words_of = command_lines.further(
                "select", view.run.path, select_fields(view, text, rule, left_out), overwrite
            )
            if view.excluded and not left_out:
                words_of.append("--every_module")
            return _position(view, found.limit), [
                views.choice(found, words),
                views.layers([view.heatmap(rule.criterion)], None, found.by_layer),
                _rows(found),
                views.command(command_lines.shown(words_of), words),
            ]

        def says(before: int, handler: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
            """A handler that says an InputError in the place of the results, which ``before`` other values precede: what is
            raised beside the queue is not shown by Gradio's page."""

            @functools.wraps(handler)
            def called(*arguments: Any) -> list[Any]:
                try:
                    return handler(*arguments)
                except InputError as error:
                    return [*[gr.update()] * before, views.problem(str(error)), None, gr.update(), ""]

            return called

        def opened(name: str | None) -> Iterator[Any]:
            if not name:
                yield [gr.update()] * 9
                return
            yield [*[gr.update()] * 5, views.remark(words("counting")), *[gr.update()] * 3]
            try:
                view = self.view(name)
                rule, text = view.rule, view.config.budget
                position, shown = told(view, text, rule, view.excluded, False)
            except DAMAGE as error:
                yield [*[gr.update()] * 5, views.problem(sentence(error)), None, [], ""]
                return
            yield [
                gr.update(choices=view.criteria, value=rule.criterion),
                gr.update(choices=view.granularities(rule.criterion), value=list(rule.granularity)),
                gr.update(choices=view.spreads(rule.granularity), value=rule.spread),
                position,
                text,
                *shown,
            ]

        def slid(name: str, position: float, rows: Any, overwrite: bool, *rule: Any) -> list[Any]:
            text = BUDGETS[int(position)]
            if not name:
                return [text, *[gr.update()] * 4]
            return [text, *told(self.view(name), text, given(*rule), without(rows), overwrite)[1]]

        def typed(name: str, text: str, rows: Any, overwrite: bool, *rule: Any) -> list[Any]:
            if not name:
                return [gr.update()] * 5
            position, shown = told(self.view(name), text, given(*rule), without(rows), overwrite)
            return [position, *shown]

        def ruled(name: str, text: str, rows: Any, overwrite: bool, *rule: Any) -> list[Any]:
            if not name:
                return [gr.update()] * 6
            view, wanted = self.view(name), given(*rule)
            kinds = view.granularities(wanted.criterion)
            if not set(wanted.granularity) <= set(kinds) or not wanted.granularity:
                wanted = Rule(wanted.criterion, (kinds[0],), wanted.spread)
            spreads = view.spreads(wanted.granularity)
            if wanted.spread not in spreads:
                wanted = Rule(wanted.criterion, wanted.granularity, (spreads or ["global"])[0])
            return [
                gr.update(choices=kinds, value=list(wanted.granularity)),
                gr.update(choices=spreads, value=wanted.spread),
                *told(view, text, wanted, without(rows), overwrite)[1],
            ]

        def saving(before: str, name: str, text: str, rows: Any, overwrite: bool, *rule: Any) -> Any:
            view = self.view(name)
            left_out = without(rows)
            fields = select_fields(view, text, given(*rule), left_out)
            words_of = command_lines.further("select", view.run.path, fields, overwrite)
            if view.excluded and not left_out:
                words_of.append("--every_module")
            while before and self.jobs.get(before).state == "running":  # one at a time
                time.sleep(0.2)
            return self.jobs.start(words_of, name), gr.Timer(active=True)

        def looked(job: str) -> Any:
            """The job's output, until it has ended."""
            state = self.jobs.get(job).state
            said = views.remark(f"{job}: {words(f'state_{state}')}") + views.output(self.jobs.output(job))
            return said, gr.Timer(active=state == "running")

        for event in (blocks.load, tab.select):
            event(shows_problems(listed), run, [run, saved], show_progress="hidden", queue=False)
        # What is touched while an answer is on its way is asked for after it; the queue would only make it later.
        at_once: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "queue": False}
        run.change(
            self._yields(opened),
            run,
            [criterion, granularity, spread, slider, budget, *results],
            show_progress="hidden",
        )
        slider.input(says(1, slid), [run, slider, modules, replace, *rule_of], [budget, *results], **at_once)
        # An answer brings the boxes as they were when it was asked for, so that each click of one asks at once.
        for event, mode in (
            *((event, {}) for event in (budget.submit, budget.blur, replace.input)),
            (modules.input, {"trigger_mode": "multiple"}),
        ):
            event(
                says(1, typed),
                [run, budget, modules, replace, *rule_of],
                [slider, *results],
                **{**at_once, **mode},
            )
        for part in rule_of:
            part.input(
                says(2, ruled),
                [run, budget, modules, replace, *rule_of],
                [granularity, spread, *results],
                **at_once,
            )
        save.click(
            shows_problems(saving),
            [job, run, budget, modules, replace, *rule_of],
            [job, timer],
            show_progress="hidden",
            trigger_mode="always_last",
        )
        timer.tick(shows_problems(looked), job, [saved, timer], show_progress="hidden", queue=False)

    def _yields(self, handler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @functools.wraps(handler)
        def called(*arguments: Any) -> Iterator[Any]:
            try:
                yield from handler(*arguments)
            except InputError as error:
                raise gr.Error(views.escape(str(error)), print_exception=False, title="") from error

        return called

    def _new(self, words: Words, blocks: Any, tab: Any) -> None:
        with gr.Row():
            with gr.Column(min_width=300):
                file = gr.Dropdown([], label=words("data_file"), allow_custom_value=True, elem_id="data_file")
                upload = gr.File(label=words("upload"), type="filepath", height=160, elem_id="upload")
            with gr.Column(min_width=300):
                model = gr.Dropdown([], label=words("model_name"), allow_custom_value=True, elem_id="model")
                name = gr.Textbox(label=words("run_name"), elem_id="run_name")
                task = gr.Dropdown(
                    [(words("as_guessed"), ""), *((one, one) for one in TASKS)], value="", label=words("task")
                )
        shown = gr.HTML(elem_classes="reltune", apply_default_css=False, elem_id="preview")
        with gr.Row():
            command = gr.Radio(list(command_lines.STARTS), value="run", label=words("what_to_start"), min_width=240)
            method = gr.Dropdown(list(METHODS), value="weights", label=words("way"), min_width=140)
            kind = gr.Dropdown(
                [(words("by_recipe"), ""), *((one, one) for one in GRANULARITIES)],
                value="",
                label=words("granularity"),
                min_width=140,
                elem_id="new_granularity",
            )
            budget = gr.Textbox(
                "", label=words("budget"), placeholder=words("by_recipe"), min_width=120, elem_id="new_budget"
            )
        with gr.Row():
            epochs = gr.Number(3, label=words("epochs"), minimum=0, min_width=110, elem_id="epochs")
            batch = gr.Number(8, label=words("batch"), minimum=1, precision=0, min_width=110)
            rate = gr.Textbox("", label=words("rate"), placeholder=words("by_recipe"), min_width=120)
            length = gr.Number(256, label=words("length"), minimum=1, precision=0, min_width=140)
            template = gr.Dropdown(
                [(words("own_template"), ""), *((one, one) for one in CHAT_TEMPLATES)],
                value="",
                label=words("chat_template"),
                min_width=140,
                elem_id="chat_template",
            )
        with gr.Row():
            cpu = gr.Checkbox(label=words("cpu"), min_width=150, elem_id="cpu")
            skip = gr.Checkbox(label=words("skip_bad"), min_width=150, elem_id="skip_bad")
        line = gr.HTML(elem_classes="reltune", apply_default_css=False, elem_id="new_command")
        with gr.Row():
            predict = gr.Button(words("predict_cost"), elem_id="predict_cost")
            start = gr.Button(words("start"), variant="primary", elem_id="start")
        predicted = gr.HTML(elem_classes="reltune", apply_default_css=False, elem_id="predicted")
        form = [
            *Asked(
                file, model, name, task, command, method, kind, budget, epochs, batch, rate, length, template, cpu, skip
            )
        ]

        def listed(file: str | None, model: str | None) -> Any:
            models = self.models()
            first = {} if model or not models else {"value": models[0]}
            return _choices(self.place.data(), file), gr.update(choices=models, **first)

        def kept(path: str | None) -> Any:
            if not path:
                return gr.update(), gr.update()
            name = self.place.keep(path)
            return gr.update(choices=self.place.data(), value=name), None

        def looked_at(
            file: str | None, model: str | None, task: str, length: float | None, template: str, skip: bool
        ) -> str:
            if not file:
                return ""
            try:
                model = self.place.model(str(model), self.models()) if model else None
                seen = look_at(
                    self.place.inside(file),
                    model,
                    task or None,
                    int(length or 1),
                    "skip" if skip else "error",
                    template or None,
                )
                return views.data(seen, words)
            except InputError as error:
                return views.problem(str(error))

        def words_of(*values: Any) -> list[str]:
            return self._new_words(words, Asked(*values))

        def as_line(*values: Any) -> str:
            try:
                return views.command(command_lines.shown(words_of(*values)), words)
            except InputError as error:
                return views.remark(str(error))

        def cost(*values: Any) -> str:
            return views.estimate(self._estimated(words, Asked(*values)), words)

        def started(*values: Any) -> str:
            job = self.jobs.start(words_of(*values), str(Asked(*values).name))
            return views.remark(words("started", job=job))

        for event in (blocks.load, tab.select):
            event(shows_problems(listed), [file, model], [file, model], show_progress="hidden", queue=False)
        upload.upload(shows_problems(kept), upload, [file, upload])
        looks = [file, model, task, length, template, skip]
        for part in looks:
            part.change(looked_at, looks, shown, show_progress="minimal", trigger_mode="always_last")
        for part in form:
            part.change(as_line, form, line, show_progress="hidden", queue=False)
            part.change(lambda: "", None, predicted, show_progress="hidden", queue=False)  # it was of another form
        predict.click(shows_problems(cost), form, predicted)
        start.click(shows_problems(started), form, predicted, show_progress="minimal")

    def _new_words(self, words: Words, asked: Asked) -> list[str]:
        """The words of the command that the form describes."""
        if not asked.file or not asked.model:
            raise InputError(words("nothing_chosen"))
        if not asked.name:
            raise InputError(words("nameless"))
        fields: dict[str, Any] = {
            "model_name_or_path": self.place.model(str(asked.model), self.models()),
            "train_file": self.place.inside(str(asked.file)),
            "task": asked.task,
            "max_length": asked.length,
            "chat_template": asked.template,
        }
        if asked.command == "run":
            fields |= {"method": asked.method, "granularity": asked.granularity, "learning_rate": asked.rate}
        if asked.command != "analyze":
            fields |= {"budget": asked.budget}
        fields |= {
            "num_train_epochs": asked.epochs,
            "per_device_train_batch_size": asked.batch,
            "use_cpu": True if asked.cpu else None,
            "on_bad_rows": "skip" if asked.skip else None,
        }
        return command_lines.new(str(asked.command), self.place.new(str(asked.name)), fields)

    def _estimated(self, words: Words, asked: Asked) -> dict[str, Any]:
        """What ``reltune estimate`` says of the form, by its data."""
        if not asked.model:
            raise InputError(words("nothing_chosen"))
        from reltune.config.run_config import RunConfig
        from reltune.runs.flow import estimate_new

        fields = {
            "train_file": str(self.place.inside(str(asked.file))) if asked.file else None,
            "chat_template": asked.template or None,
            "on_bad_rows": "skip",
            "method": asked.method,
            "granularity": [asked.granularity] if asked.granularity else None,
            "budget": asked.budget or None,
            "max_length": asked.length,
            "task": asked.task or None,
        }
        config = RunConfig(
            self.place.model(str(asked.model), self.models()),
            ".",
            training={"num_train_epochs": asked.epochs, "per_device_train_batch_size": asked.batch},
            **{name: value for name, value in fields.items() if value is not None},
        )
        return estimate_new(config, "cpu" if asked.cpu else None).to_dict()

    def _jobs(self, words: Words, blocks: Any, tab: Any) -> None:
        gr.HTML(f"<h3>{words('go_on')}</h3>", elem_classes="reltune", apply_default_css=False)
        with gr.Row():
            run = gr.Dropdown([], label=words("choose_run"), allow_custom_value=True, elem_id="job_run")
            command = gr.Radio(["tune", "evaluate", "report"], value="tune", label=words("what_to_start"))
            epochs = gr.Textbox("", label=words("epochs"), placeholder="config.yaml", min_width=110)
            rate = gr.Textbox("", label=words("rate"), placeholder="config.yaml", min_width=110)
        with gr.Row():
            overwrite = gr.Checkbox(label=words("overwrite"), min_width=240)
            start = gr.Button(words("start"), variant="primary", elem_id="go_on")
        line = gr.HTML(elem_classes="reltune", apply_default_css=False)
        table = gr.HTML(elem_classes="reltune", apply_default_css=False, elem_id="jobs")
        with gr.Row():
            job = gr.Dropdown([], label=words("job"), allow_custom_value=True, scale=3, elem_id="job")
            stop = gr.Button(words("stop"), variant="stop", scale=1, min_width=120, elem_id="stop")
        output = gr.HTML(elem_classes="reltune", apply_default_css=False, elem_id="output", label=words("output"))
        with gr.Row():
            loss = gr.Plot(show_label=False, visible=False, elem_id="job_loss", min_width=300)
            scores = gr.Plot(show_label=False, visible=False, elem_id="job_scores", min_width=300)
        seen = gr.State("")
        picked = gr.State(None)  # the job that was chosen, and the newest at that time; a newer one is shown instead
        timer = gr.Timer(SECONDS)
        form = [run, command, epochs, rate, overwrite]

        def listed(name: str | None) -> Any:
            return _choices(self.names(), name)

        def words_of(run: Any, command: Any, epochs: Any, rate: Any, overwrite: Any) -> list[str]:
            if not run:
                raise InputError(words("no_run_chosen"))
            fields = {"num_train_epochs": epochs, "learning_rate": rate} if command == "tune" else {}
            return command_lines.further(
                str(command), self.run(run).path, fields, bool(overwrite) and command == "tune"
            )

        def as_line(*values: Any) -> str:
            try:
                return views.command(command_lines.shown(words_of(*values)), words)
            except InputError:
                return ""

        def started(*values: Any) -> None:
            self.jobs.start(words_of(*values), str(values[0]))

        def looked(shown: str | None, picked: tuple[str, str] | None, before: str) -> Any:
            found = self.jobs.all()
            names = [one.name for one in found]
            name = names[0] if names else None
            if picked and picked[0] in names and picked[1] == name:
                name = picked[0]
            html = views.jobs(found, words)
            text = self.jobs.output(name) if name else ""
            history: list[Any] = []
            target = next((one.target for one in found if one.name == name), "")
            with contextlib.suppress(InputError):
                history = views.history(self.run(target)) if target else []
            state = f"{name}\0{html}\0{text}\0{len(history)}"
            if state == before:
                return [gr.skip()] * 6
            curves = views.curves({target: history})
            plots = [gr.update(value=curves.get(kind), visible=kind in curves) for kind in ("loss", "scores")]
            own = {} if shown == name else {"value": name}
            return [html, gr.update(choices=names, **own), views.output(text) if name else "", *plots, state]

        def picking(name: str) -> tuple[str, str]:
            return name, next((one.name for one in self.jobs.all()), "")

        def stopped(name: str | None) -> None:
            self.jobs.stop(name or "")
            gr.Info(words("stopping"))

        for event in (blocks.load, tab.select):
            event(shows_problems(listed), run, run, show_progress="hidden", queue=False)
        watched: dict[str, Any] = {
            "fn": looked,
            "inputs": [job, picked, seen],
            "outputs": [table, job, output, loss, scores, seen],
            "show_progress": "hidden",
            "queue": False,
        }
        for event in (blocks.load, timer.tick):
            event(**watched)
        job.input(picking, job, picked, show_progress="hidden").then(**watched)
        for part in form:
            part.change(as_line, form, line, show_progress="hidden", queue=False)
        start.click(shows_problems(started), form, None, show_progress="minimal").then(**watched)
        stop.click(shows_problems(stopped), job, None)

    def _try(self, words: Words, blocks: Any, tab: Any) -> None:
        with gr.Row():
            run = gr.Dropdown([], label=words("tuned_runs"), allow_custom_value=True, scale=3, elem_id="try_run")
            load = gr.Button(words("load"), variant="primary", scale=1, min_width=160, elem_id="load")
        status = gr.HTML(elem_classes="reltune", apply_default_css=False, elem_id="loaded")
        with gr.Column(visible=False) as asking:
            texts = [
                gr.Textbox(label=words("text"), lines=3, visible=i == 0, elem_id=f"text_{i}") for i in range(ROLES)
            ]
            ask = gr.Button(words("ask"), variant="primary", elem_id="ask")
            with gr.Row():
                answers = []
                for side in ("base", "tuned"):
                    with gr.Column(min_width=280):
                        gr.HTML(f"<h3>{words(side)}</h3>", elem_classes="reltune", apply_default_css=False)
                        answers.append(
                            gr.HTML(elem_classes="reltune", apply_default_css=False, elem_id=f"answer_{side}")
                        )
        with gr.Column(visible=False) as talking:
            with gr.Row():
                bots = [
                    gr.Chatbot(
                        label=words(side),
                        render_markdown=False,
                        height=380,
                        min_width=280,
                        buttons=[],
                        elem_id=f"chat_{side}",
                    )
                    for side in ("base", "tuned")
                ]
            message = gr.Textbox(label=words("message"), submit_btn=True, elem_id="message")
            reset = gr.Button(words("reset"))

        def listed(name: str | None) -> Any:
            names = self.tuned()
            return _choices(names, name), gr.update() if names else views.remark(words("no_tuned"))

        def loading(name: str | None) -> Iterator[Any]:
            hidden = gr.update(visible=False)
            bench, none = self.bench, [hidden, hidden, *[gr.update()] * ROLES, [], []]
            if not name:
                yield [views.problem(words("no_run_chosen")), *none]
                return
            yield [views.remark(words("loading")), *none]
            try:
                bench.load(self.run(name).path)
            except DAMAGE as error:
                yield [views.problem(sentence(error)), *none]
                return
            if "image" in bench.roles:
                yield [views.problem(words("no_images")), *none]
                return
            roles = list(bench.roles)[:ROLES]
            boxes = [
                gr.update(visible=i < len(roles), label=roles[i] if i < len(roles) else "", value="")
                for i in range(ROLES)
            ]
            status = views.remark(words("loaded", run=name, task=bench.task))
            if bench.without_template:
                status += views.remark(words("no_template"))
            yield [status, gr.update(visible=not bench.writes), gr.update(visible=bench.writes), *boxes, [], []]

        def asked(*values: str) -> Any:
            found = self.bench.answers(dict(zip(self.bench.roles, values, strict=False)))
            return [views.answer(found[side]) for side in ("base", "tuned")]

        def talked(question: str) -> Iterator[Any]:
            if not question.strip():
                yield [gr.update()] * 3
                return
            for turns in self.bench.talk(question):
                yield ["", *([*_messages(turns.get(side, []))] for side in ("base", "tuned"))]

        def begun() -> Any:
            self.bench.reset()
            return [], []

        for event in (blocks.load, tab.select):
            event(shows_problems(listed), run, [run, status], show_progress="hidden", queue=False)
        load.click(self._yields(loading), run, [status, asking, talking, *texts, *bots])
        ask.click(shows_problems(asked), texts, answers)
        message.submit(self._yields(talked), message, [message, *bots], show_progress="hidden")
        for event in (reset.click, *(bot.clear for bot in bots)):
            event(begun, None, bots)


def _choices(names: list[str], chosen: str | list[str] | None) -> Any:
    """Of a list what can be chosen. What is chosen stays, also what was chosen while this was on its way, unless it is there no longer."""
    if isinstance(chosen, list):
        there: Any = [name for name in chosen if name in names]
    else:
        there = chosen if chosen in names else None
    return gr.update(choices=names) if there == chosen else gr.update(choices=names, value=there)


def _messages(turns: Sequence[tuple[str, str]]) -> Iterator[dict[str, str]]:
    for question, answer in turns:
        yield {"role": "user", "content": question}
        yield {"role": "assistant", "content": answer}


def _rows(found: Choice) -> list[list[Any]]:
    """The modules' table: a layer's name and the module's within it; outside of layers the name alone."""
    return [
        [
            row.used,
            row.layer if row.name != row.layer else "",
            row.name.removeprefix(f"{row.layer}.") if row.name != row.layer else row.name,
            row.units,
            row.available,
            row.parameters,
        ]
        for row in found.rows
    ]


def _position(view: BudgetView, limit: int) -> int:
    """The slider's place that is nearest to so many parameters."""
    shares = [float(text.removesuffix("%")) / 100 * view.inventory.base_parameters for text in BUDGETS]
    return min(range(len(BUDGETS)), key=lambda i: abs(shares[i] - limit) / shares[i])
