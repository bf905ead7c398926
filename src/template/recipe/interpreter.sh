# Makes the first Python cell of a sandbox fast, and looks whether all kernels are there.
# Arguments: the optional kernels. Runs inside the root file system.

# Only a debugger front end needs it, and importing it doubles the start of a kernel.
python3 -m pip uninstall --break-system-packages --root-user-action=ignore -q -y debugpy
python3 -m pip list --format=freeze

mkdir -p /etc/ipython
cat >/etc/ipython/ipython_kernel_config.py <<'END'
c = get_config()
# No history database: a sandbox has no second session to search it from.
c.HistoryManager.enabled = False
c.IPCompleter.use_jedi = False
END

# Where the agent looks for the interpreter's Python: the system's, so that a `pip install` in a
# command is seen by the next cell.
mkdir -p /opt/mica/python/bin
ln -sf /usr/bin/python3 /opt/mica/python/bin/python3
ln -sf /usr/bin/python3 /opt/mica/python/bin/python

# Start a kernel once for each user that may run one, as a sandbox will. This fills the font cache
# and the profile directories, and proves that the image works.
cat >/run/mica-build/probe.py <<'END'
import sys
from jupyter_client.manager import start_new_kernel

manager, client = start_new_kernel(kernel_name="python3")
code = """
import numpy, pandas, e2b_charts
import matplotlib, matplotlib.pyplot as plt
fig, ax = plt.subplots(); ax.plot([1, 2, 3]); fig.canvas.draw(); plt.close(fig)
repr(pandas.DataFrame({"a": numpy.arange(3)})._repr_html_())
print("interpreter works", numpy.__version__, pandas.__version__, matplotlib.__version__)
"""
seen = []
def output(message):
    kind, content = message["msg_type"], message["content"]
    if kind == "stream":
        seen.append(content["text"])
        print(content["text"], end="", flush=True)
    elif kind == "error":
        print("\n".join(content["traceback"]), flush=True)
reply = client.execute_interactive(code, timeout=300, output_hook=output)
client.stop_channels()
manager.shutdown_kernel(now=True)
sys.exit(0 if reply["content"]["status"] == "ok" and "interpreter works" in "".join(seen) else 1)
END
chmod 644 /run/mica-build/probe.py
chmod 755 /run/mica-build
for user in user root; do
    home=$(getent passwd "$user" | cut -d: -f6)
    echo "probe as $user"
    setpriv --reuid "$user" --regid "$user" --init-groups \
        env -i PATH="$PATH" HOME="$home" LANG=C.UTF-8 MPLBACKEND=agg \
        sh -c 'cd && python3 /run/mica-build/probe.py'
done

# The other kernels of the preset are started when the template is warmed up; optional ones are not.
deno --version
python3 -I -c 'import bash_kernel.kernel'
for kernel in "$@"; do
    case "$kernel" in
    r) R --no-echo --no-save -e 'library(IRkernel)' ;;
    java) javac -version && test -f /usr/local/share/jupyter/kernels/java/jjava.jar ;;
    go) go version ;;
    esac
done
