"""Watches a process of a server from inside: what it opens, starts and connects to.

A test puts this folder on `PYTHONPATH`, so that Python runs this file in every process that is
started from then on. It does nothing unless `INSITU_AUDIT` names a folder, and it is only for the
processes that run jobs of strangers or look at them. Each writes a line for each thing that it
touches. On the signal SIGUSR1 an engine writes digests of all weights and buffers that it has.
"""

import os
import signal
import sys

_FOLDER = os.environ.get("INSITU_AUDIT", "")
_MODULES = ("insitu.server.engines.engine", "insitu.server.engines.admission")
_EVENTS = (
    *("open", "exec", "compile", "import", "code.__new__", "marshal.load", "pickle.find_class"),
    *(
        "tempfile.",
        "os.",
        "shutil.",
        "socket.",
        "subprocess.",
        "pty.",
        "ctypes.",
        "glob.",
        "fcntl.",
    ),
    *("urllib.", "http.", "ftplib.", "smtplib.", "sqlite3.", "syslog.", "mmap.", "signal."),
)
_LONGEST = 500


def _install(module):
    number = os.open(
        os.path.join(_FOLDER, "touched"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600
    )
    first = os.getpid()
    quiet = False
    digests = 0

    def line(text):
        os.write(number, f"{text[:_LONGEST]}\n".encode(errors="replace"))

    def hook(event, args):
        if quiet or not event.startswith(_EVENTS):
            return
        source = event == "open" and str(args[0]).endswith(".py")
        if source or event in ("compile", "exec"):  # who does it, and of which file
            frame, callers = sys._getframe(1), []
            while frame is not None and len(callers) < 8:
                callers.append(
                    f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}"
                )
                frame = frame.f_back
            file = args[0] if source else getattr(args[0], "co_filename", args[-1])
            args = (file, *callers)
        elif event == "import":
            args = args[:1]
        what = " ".join(str(one)[:200] for one in args).replace("\n", " ")
        pid = os.getpid()
        name = module if pid == first else f"{module}.worker"
        line(f"{pid} {name} {event} {what}")

    def told(*_):
        nonlocal quiet, digests
        quiet = True
        try:
            digests += 1
            path = os.path.join(_FOLDER, f"digests-{os.getpid()}-{digests}")
            with open(f"{path}.part", "w") as file:
                file.write("\n".join(_digests()))
            os.rename(f"{path}.part", path)
        finally:
            quiet = False

    line(f"{first} {module} started")
    sys.addaudithook(hook)
    if module.endswith("engine"):
        signal.signal(signal.SIGUSR1, told)


def _digests():
    """A line for each weight and buffer, and for what hangs on a module and should not."""
    import gc
    import hashlib

    from torch import nn

    modules = [one for one in gc.get_objects() if isinstance(one, nn.Module)]
    inner = {id(child) for one in modules for child in one.children()}
    (root, *others) = [one for one in modules if id(one) not in inner and [*one.parameters()]]
    yield f"{len(others)} other modules"
    for kind, named in (("weight", root.named_parameters()), ("buffer", root.named_buffers())):
        for name, tensor in named:
            held = tensor.detach().contiguous().cpu().flatten().view(-1).numpy().tobytes()
            shape = (*tensor.shape,)
            yield f"{kind} {name} {tensor.dtype} {shape} {hashlib.sha256(held).hexdigest()}"
            yield f"{name} grad {tensor.grad is not None} {tensor.requires_grad}"
    for name, module in root.named_modules():
        tables = [found for key, found in vars(module).items() if key.endswith("_hooks")]
        hooks = sum(map(len, tables))
        own = "forward" in vars(module)
        yield f"module {name} {type(module).__name__} {module.training} {hooks} {own}"


if _FOLDER and "-m" in sys.orig_argv:
    _named = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    if _named in _MODULES:
        _install(_named.rpartition(".")[2])
