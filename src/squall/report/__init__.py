"""Tables and figures, from run folders alone: nothing here trains or needs a model."""

from squall._process.extras import explain_missing_extra

with explain_missing_extra():
    from squall.report.comparison import Comparison, Group, compare
    from squall.report.figures import comparison_figure, energy_figure, error_figure, field_figure, write_figures
    from squall.report.tables import comparison_table, evaluation_table, markdown

__all__ = [
    "Comparison",
    "Group",
    "compare",
    "comparison_figure",
    "comparison_table",
    "energy_figure",
    "error_figure",
    "evaluation_table",
    "field_figure",
    "markdown",
    "write_figures",
]
