"""The program of every Python kernel: `python3 kernel.py -f CONNECTION_FILE OPTIONS...`.

Does what `ipykernel_launcher` does, with less work before the first cell, and sets up what a cell
may count on: the environment of a call, and the `e2b/chart` and `e2b/data` forms of figures and
data frames. Imports nothing heavy: the hooks wait until the cell itself has imported matplotlib or
pandas, or the agent warms the kernel to have it saved. Leaves no name behind in the cell's namespace.

What the agent orders comes in the metadata of a cell's message: what to `become` when the kernel goes
on in another sandbox, and the variables to `push` for the cell. Silent cells call `warm` and `settle`
of the module `_mica` before the kernel is saved.
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


def _install(kernel, shell):
    import importlib
    import inspect
    import os
    import traceback
    import types

    # Frames with more cells than this get no `data` form: it would be the whole frame as JSON.
    frame_cells_max = 1_000_000

    saved = {}

    def become(changes):
        """Takes on what the sandbox is now; a value that stays the same may be a cell's own."""
        for name in changes["unset"]:
            os.environ.pop(name, None)
        os.environ.update(changes["set"])
        if changes["reseed"]:
            reseed()

    def reseed():
        """New random state for what keeps it in memory. `secrets`, `uuid.uuid4` and the like ask
        the system each time, and the system knows by itself that it has been restored."""
        for module_name, draw in (
            ("random", lambda module: module.seed()),
            ("numpy.random", lambda module: module.seed()),
            ("torch", lambda module: module.seed()),
            # OpenSSL seeds its own generator anew from the system when anything is added.
            ("ssl", lambda module: module.RAND_add(os.urandom(32), 32.0)),
            # An identifier of the machine that was drawn at random.
            ("uuid", lambda module: setattr(module, "_node", None)),
        ):
            module = sys.modules.get(module_name)
            if module is None:
                continue
            try:
                draw(module)
            except Exception:
                # A module that a cell has changed must not keep the others from their turn.
                traceback.print_exc(file=sys.__stderr__)

    def push(variables):
        """The environment of one call: what was there before is kept for `pop`."""
        saved.update({name: os.environ.get(name) for name in variables})
        os.environ.update(variables)

    def pop():
        while saved:
            name, value = saved.popitem()
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    execute = kernel.shell_handlers["execute_request"]

    async def execute_with_orders(stream, ident, parent):
        orders = parent["metadata"].get("mica") or {}
        try:
            # An interrupt may have kept the last one from its end.
            pop()
            if "become" in orders:
                become(orders["become"])
            if "push" in orders:
                push(orders["push"])
        except Exception:
            # The cell runs all the same, and says what it lacks.
            traceback.print_exc(file=sys.__stderr__)
        try:
            done = execute(stream, ident, parent)
            if inspect.isawaitable(done):
                await done
        finally:
            pop()

    kernel.shell_handlers["execute_request"] = execute_with_orders
    # A pause after each cell, for output that it says is lost on rare occasions. Ours is not: the
    # kernel reports on the same channel, behind the output, that it is idle, and that is awaited.
    kernel._execute_sleep = 0

    def warm():
        """Imports what cells commonly import, and shows a figure and a frame: fonts are looked up,
        caches written, everything is loaded before anyone waits for it."""
        modules = {}
        for name in ("numpy", "pandas", "matplotlib.pyplot", "e2b_charts"):
            try:
                modules[name] = importlib.import_module(name)
            except ImportError:
                # Not in this template.
                pass
        show = shell.display_formatter.format
        if "pandas" in modules:
            show(modules["pandas"].DataFrame({"a": [1], "b": ["x"]}))
        if "matplotlib.pyplot" in modules:
            pyplot = modules["matplotlib.pyplot"]
            figure, axes = pyplot.subplots()
            axes.plot([1, 2], [3, 4])
            axes.set_title("title")
            show(figure)
            pyplot.close(figure)

    def settle():
        """Forgets results, and takes what is there out of the garbage collector's way: it would
        write to every page of it, and a page that is written to is no longer shared."""
        shell.displayhook.flush()
        shell.user_ns.pop("_0", None)
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    module = types.ModuleType("_mica")
    for function in (warm, settle):
        setattr(module, function.__name__, function)
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
        _install(app.kernel, app.shell)
    except Exception:
        # Without the hooks a cell still runs.
        import traceback

        traceback.print_exc(file=sys.__stderr__)
    gc.freeze()
    gc.enable()
    app.start()


_main()
