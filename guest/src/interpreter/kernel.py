"""Runs once in every Python kernel, before the first cell.

Sets up what a cell may count on: the environment of a call, and the `e2b/chart` and `e2b/data`
forms of figures and data frames. Imports nothing heavy: the hooks wait until the cell itself has
imported matplotlib or pandas. Leaves no name behind in the cell's namespace.
"""


def _mica_install():
    import os
    import sys
    import types

    # Frames with more cells than this get no `data` form: it would be the whole frame as JSON.
    frame_cells_max = 1_000_000

    state = {"base": {}, "saved": None}

    def _set(name, value):
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

    def base(variables):
        """The environment of the sandbox: set for good, until the next call changes it."""
        for name in state["base"]:
            if name not in variables:
                os.environ.pop(name, None)
        for name, value in variables.items():
            os.environ[name] = value
        state["base"] = dict(variables)

    def push(variables):
        """The environment of one call: what was there before is kept for `pop`."""
        pop()
        state["saved"] = {name: os.environ.get(name) for name in variables}
        for name, value in variables.items():
            os.environ[name] = value

    def pop():
        saved, state["saved"] = state["saved"], None
        for name, value in (saved or {}).items():
            _set(name, value)

    module = types.ModuleType("_mica")
    module.base, module.push, module.pop = base, push, pop
    sys.modules["_mica"] = module

    from IPython import get_ipython
    from IPython.core.formatters import BaseFormatter
    from traitlets import ObjectName, Unicode

    shell = get_ipython()

    def frame_data(frame):
        if frame.size > frame_cells_max:
            return None
        columns = {}
        for name, values in frame.to_dict(orient="list").items():
            columns[name if isinstance(name, str) else str(name)] = [
                value.isoformat() if hasattr(value, "isoformat") else value for value in values
            ]
        return columns

    def figure_chart(figure):
        try:
            from e2b_charts import chart_figure_to_dict
        except ImportError:
            return None
        try:
            return chart_figure_to_dict(figure) or None
        except Exception:
            # A figure that the library cannot read still shows as an image.
            return None

    class DataFormatter(BaseFormatter):
        format_type = Unicode("e2b/data")
        print_method = ObjectName("_repr_e2b_data_")
        _return_type = (dict, str)

    class ChartFormatter(BaseFormatter):
        format_type = Unicode("e2b/chart")
        print_method = ObjectName("_repr_e2b_chart_")
        _return_type = (dict, str)

        # Not by type: when matplotlib is first imported, IPython removes figures from the types
        # of every formatter that it finds.
        def __call__(self, value):
            figures = sys.modules.get("matplotlib.figure")
            if figures is not None and isinstance(value, figures.Figure):
                return figure_chart(value)
            return super().__call__(value)

    data = DataFormatter(parent=shell.display_formatter)
    # The module that a frame says it is from differs between pandas 2 and 3.
    data.for_type_by_name("pandas.core.frame", "DataFrame", frame_data)
    data.for_type_by_name("pandas", "DataFrame", frame_data)
    shell.display_formatter.formatters["e2b/data"] = data
    shell.display_formatter.formatters["e2b/chart"] = ChartFormatter(
        parent=shell.display_formatter
    )


try:
    _mica_install()
finally:
    del _mica_install
