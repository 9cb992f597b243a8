"""Uses libraries that ask more of the machine than most, of its memory, processors, priorities and kernel.

A function raises whatever its library does when the sandbox of the services refuses something.
"""

import ctypes
import io
import mmap
import multiprocessing
import os
import resource
from multiprocessing import shared_memory

import cffi
import numpy
import pandas
import psutil
import psycopg
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.asymmetric import rsa
from lxml import etree
from PIL import Image
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LinearRegression


def use_numpy() -> None:
    matrix = numpy.arange(40_000.0).reshape(200, 200)
    numpy.linalg.svd(matrix @ matrix)


def use_pandas() -> None:
    frame = pandas.DataFrame({"word": ["a", "b", "a"], "count": [1, 2, 3]})
    assert frame.groupby("word")["count"].sum()["a"] == 4
    assert pandas.read_csv(io.StringIO(frame.to_csv())).shape == (3, 3)


def use_scikit_learn() -> None:
    x = numpy.arange(200.0).reshape(-1, 1)
    assert abs(LinearRegression().fit(x, 2 * x[:, 0]).coef_[0] - 2) < 1e-6
    RandomForestRegressor(n_estimators=4, n_jobs=2).fit(x, x[:, 0])


def use_pillow() -> None:
    file = io.BytesIO()
    Image.new("RGB", (300, 300), "red").resize((100, 100)).save(file, "JPEG")
    assert Image.open(io.BytesIO(file.getvalue())).size == (100, 100)


def use_lxml() -> None:
    root = etree.fromstring("<a><b>x</b></a>")
    transform = etree.XSLT(
        etree.XML('<x:stylesheet version="1.0" xmlns:x="http://www.w3.org/1999/XSL/Transform"/>')
    )
    assert root.xpath("//b/text()") == ["x"] and "x" in str(transform(root))


def use_psycopg() -> None:
    try:
        psycopg.connect("host=127.0.0.1 port=1 user=nobody connect_timeout=2")
    except psycopg.OperationalError as error:
        assert "refused" in str(error), error  # nothing listens there; libpq got as far as to ask
    assert psycopg.pq.__impl__ == "binary"


def use_cryptography() -> None:
    box = Fernet(Fernet.generate_key())
    assert box.decrypt(box.encrypt(b"x")) == b"x"
    rsa.generate_private_key(65537, 2048)


def use_cffi_callbacks() -> None:
    ffi = cffi.FFI()
    ffi.cdef("void qsort(void *, size_t, size_t, int (*)(const void *, const void *));")
    numbers = ffi.new("int[]", [3, 1, 2])

    def compare(one: object, other: object) -> int:
        return ffi.cast("int *", one)[0] - ffi.cast("int *", other)[0]

    called = ffi.callback("int(const void *, const void *)", compare)
    ffi.dlopen(None).qsort(numbers, 3, ffi.sizeof("int"), called)
    assert list(numbers) == [1, 2, 3]


def use_compiled_code() -> None:
    """As a just-in-time compiler does; only on the processor whose code this is."""
    if os.uname().machine == "x86_64":
        memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        memory.write(b"\xb8\x2a\x00\x00\x00\xc3")  # return 42
        assert ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))() == 42


def use_psutil() -> None:
    for figure in (
        psutil.virtual_memory, psutil.swap_memory, psutil.cpu_percent, psutil.cpu_times, psutil.boot_time,
        psutil.cpu_count, psutil.cpu_stats, psutil.disk_partitions, psutil.net_io_counters, psutil.disk_io_counters,
        psutil.getloadavg, psutil.net_if_addrs, psutil.net_if_stats, psutil.net_connections,
    ):  # fmt: skip
        figure()
    psutil.disk_usage("/")
    own = psutil.Process()
    for figure in (own.memory_full_info, own.open_files, own.cpu_affinity, own.num_fds, own.io_counters):
        figure()
    assert own.pid in [process.pid for process in psutil.process_iter(["name", "username"])]


def use_priorities() -> None:
    own = psutil.Process()
    os.nice(0)
    own.nice(own.nice())
    own.ionice(own.ionice().ioclass)
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def use_semaphores_and_shared_memory() -> None:
    context = multiprocessing.get_context("spawn")
    with context.Lock():
        memory = shared_memory.SharedMemory(create=True, size=4096)
    memory.close()
    memory.unlink()


def use_what_is_denied() -> None:
    """The kernel says no to a process without rights, and that is all: such a process is not ended."""
    try:
        os.chroot("/")
    except PermissionError:
        return
    raise AssertionError("chroot was allowed")


def use_all() -> dict[str, str]:
    """Uses each in turn: its name and what it raised, empty if nothing."""
    found = {}
    for name, use in list(globals().items()):
        if name.startswith("use_") and use is not use_all:
            try:
                use()
                found[name.removeprefix("use_")] = ""
            except Exception as error:
                found[name.removeprefix("use_")] = repr(error)
    return found
