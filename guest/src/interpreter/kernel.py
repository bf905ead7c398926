"""The program of every Python kernel: `python3 kernel.py -f CONNECTION_FILE OPTIONS...`.

Does what `ipykernel_launcher` does, with less work before the first cell, and sets up what a cell
may count on: the environment of a call, and the `e2b/chart` and `e2b/data` forms of figures and
data frames. Imports nothing heavy: the hooks wait until the cell itself has imported matplotlib or
pandas. Leaves no name behind in the cell's namespace.
"""

import gc

# What is made while starting stays: looking through it for garbage again and again is for nothing.
gc.disable()

import sys

# The directory of this file. IPython puts the working directory in its place.
del sys.path[0]


def _defer_jupyter_client():
    """Puts off importing the package `jupyter_client` as a whole until somebody uses it.

    A kernel needs a few of its modules. Its `__init__` imports all that is for clients as well.
    Returns a function to call once the kernel is up.
    """
    import importlib.util

    name = "jupyter_client"
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    starting = True

    def load(attribute):
        if starting and attribute == "BlockingKernelClient":
            # The default of an option that only a client of a kernel reads.
            return object
        if attribute.startswith("__") and attribute not in ("__all__", "__version__"):
            raise AttributeError(attribute)
        module.__dict__.pop("__getattr__", None)
        spec.loader.exec_module(module)
        return getattr(module, attribute)

    def started():
        nonlocal starting
        starting = False

    module.__getattr__ = load
    sys.modules[name] = module
    try:
        connect = importlib.import_module(name + ".connect")
        for exported in connect.__all__:
            setattr(module, exported, getattr(connect, exported))
    except Exception:
        # Another layout of the package: then it is imported as it wants to be.
        for loaded in [key for key in sys.modules if key.split(".")[0] == name]:
            del sys.modules[loaded]
    return started


def _install(shell):
    import os
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

    from IPython.core.formatters import BaseFormatter
    from traitlets import ObjectName, Unicode

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


def _main():
    started = _defer_jupyter_client()
    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance()
    app.initialize()
    started()
    try:
        _install(app.shell)
    except Exception:
        # Without the hooks a cell still runs.
        import traceback

        traceback.print_exc(file=sys.__stderr__)
    gc.freeze()
    gc.enable()
    app.start()


_main()
