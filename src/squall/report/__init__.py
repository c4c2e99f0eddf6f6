"""Tables, figures and the page, from run folders and packs alone: nothing here trains or needs a model."""

from squall._process.extras import explain_missing_extra, import_matplotlib

with explain_missing_extra():
    import_matplotlib()
    from squall.report import diagnosis
    from squall.report.comparison import Comparison, compare, comparison_note, comparison_table
    from squall.report.figures import (
        animate_forecast,
        check_animation,
        comparison_figure,
        energy_figure,
        error_figure,
        field_figure,
        forecast_animations,
        write_animations,
        write_figures,
    )
    from squall.report.study import write_report
    from squall.report.tables import Table, evaluation_table, markdown, terminal

__all__ = [
    "Comparison",
    "Table",
    "animate_forecast",
    "check_animation",
    "compare",
    "comparison_figure",
    "comparison_note",
    "comparison_table",
    "diagnosis",
    "energy_figure",
    "error_figure",
    "evaluation_table",
    "field_figure",
    "forecast_animations",
    "markdown",
    "terminal",
    "write_animations",
    "write_figures",
    "write_report",
]
