"""Programs that a sandbox must hold: the list of reference/serving.md section 4, and our own.

An attack prints BREACH if it got what it wanted. `try_all` turns a list of expressions into such a
program: each must raise or give -1. The canaries (SECRET, FOLDER, SECRET_FILE, NEW_FILE, PORT,
SOCKET, PID) and MACHINE are set in front of it. What L1 has no module for is an error there,
which is as good.
"""

from __future__ import annotations

HEAD = """
import os, sys
try:
    import ctypes
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_size_t
    syscall = libc.syscall if MACHINE == "x86_64" else None  # the numbers below are its own
except ImportError:
    libc = ctypes = syscall = None
def breach(what):
    print("BREACH", what)
    sys.stdout.flush()
"""


def try_all(*expressions: str) -> str:
    """Each expression must raise or give -1."""
    return HEAD + "".join(
        f"try:\n    if ({expression}) != -1:\n        breach({expression[:60]!r})\n"
        "except (OSError, RuntimeError, MemoryError, ValueError, KeyError, AttributeError, "
        "ImportError, NameError, TypeError, LookupError, StopIteration):\n    pass\n"
        for expression in expressions
    )


# Numbers are those of the list in reference/serving.md, section 4.3.
FLOOR: dict[str, str] = {
    "01 infinite loop": "while True: pass",
    "02 loop that catches everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    ),
    "03 recursion bomb": "def f(n): return f(n + 1) + 1\nf(0)",
    "03 recursion with a raised limit": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)"
    ),
    "04 fork bomb": try_all("os.fork() or os._exit(0)", "libc.fork() or os._exit(0)")
    + "while True: os.fork()",
    "05 thread bomb": HEAD
    + ("import threading\nwhile True:\n    threading.Thread(target=breach, args=('x',)).start()"),
    "06 ten gigabytes": "x = bytearray(10**10)\nprint('BREACH')",
    "06 memory in small pieces": "x = []\nwhile True: x.append(bytearray(10**6))",
    "07 9**9**9": "9**9**9",
    "08 shift": "1 << 10**10",
    "09 long string": "x = 'a' * 10**10\nprint('BREACH')",
    "10 factorial": "import math\nmath.factorial(10**7)",
    "11 int to str": "import sys\nsys.set_int_max_str_digits(0)\nstr(10**(10**6))",
    "12 deeply nested source": "(" * 5000 + ")" * 5000,
    "12 deeply nested lists": "[" * 90 + "]" * 90 + "\n" + "-" * 60_000 + "1",
    "13 large source": "x = 1\n" * 20_000_000,
    "14 json bomb": "import json\njson.loads('[' * 10**5)",
    "15 print flood": "while True: print('spam' * 100)",
    "16 one huge print": "print('a' * (10**8))",
    "17 stderr flood": "import sys\nwhile True: print('spam' * 100, file=sys.stderr)",
    "18 read a file": try_all(
        "open(SECRET_FILE).read()",
        "open('/etc/passwd').read()",
        "os.open(SECRET_FILE, 0)",
        "libc.open(SECRET_FILE.encode(), 0)",
        "__import__('io').FileIO(SECRET_FILE)",
        "__import__('pathlib').Path(SECRET_FILE).read_text()",
        "__import__('linecache').getlines(SECRET_FILE)[0]",
        "__import__('codecs').open(SECRET_FILE)",
        "__import__('mmap').mmap(os.open(SECRET_FILE, 0), 0)",
    ),
    "19 metadata": try_all(
        "os.stat('/etc/shadow')",
        "os.stat(SECRET_FILE)",
        "os.lstat(SECRET_FILE)",
        "os.access('/etc/shadow', 0) or -1",
        "os.readlink('/proc/self/exe')",
        "os.statvfs('/')",
        "os.getxattr(SECRET_FILE, 'user.x')",
        "os.path.exists(SECRET_FILE) or -1",
        "libc.access(SECRET_FILE.encode(), 0)",
    ),
    "20 list folders": try_all(
        "os.listdir('/')",
        "os.scandir(FOLDER)",
        "next(os.walk('/'))",
        "__import__('glob').glob('/*')[0]",
    ),
    "21 proc": try_all(
        "open('/proc/self/environ').read()",
        "open('/proc/1/cmdline').read()",
        "open('/proc/self/maps').read()",
        "open(f'/proc/{PID}/mem', 'rb')",
        "open('/proc/self/mem', 'r+b')",
        "dict(os.environ).popitem()",
        "os.environ['FLEDGE_CANARY']",
    ),
    "22 links": try_all(
        "os.symlink(SECRET_FILE, NEW_FILE)",
        "os.link(SECRET_FILE, NEW_FILE)",
        "os.rename(SECRET_FILE, NEW_FILE)",
        "libc.symlink(SECRET_FILE.encode(), NEW_FILE.encode())",
    ),
    "23 write": try_all(
        "open(NEW_FILE, 'w')",
        "open('fledge-canary', 'w')",
        "os.mkdir(NEW_FILE)",
        "os.remove(SECRET_FILE)",
        "os.truncate(SECRET_FILE, 0)",
        "os.chmod(SECRET_FILE, 0o777)",
        "os.chown(SECRET_FILE, 0, 0)",
        "os.utime(SECRET_FILE)",
        "__import__('tempfile').TemporaryFile()",
    ),
    "24 disk fill": HEAD
    + "f = open('fill', 'wb')\nwhile True: f.write(bytes(10**6)); breach('fill')",
    "25 devices": try_all(
        "os.mkfifo(NEW_FILE)",
        "os.mknod(NEW_FILE)",
        "open('/dev/null', 'w')",
        "open('/dev/tty')",
        "open('/dev/mem', 'rb')",
        "os.openpty()",
    ),
    "26 inherited descriptors": try_all(
        "[fd for fd in range(4, 1024) if libc.read(fd, 0, 0) == 0][0]",
        "[fd for fd in range(4, 1024) if os.write(fd, b'x')][0]",
        "os.dup(1)",
        "libc.dup2(1, 9)",
        "libc.fcntl(1, 0, 20)",
    ),
    "27 sockets": try_all(
        *(
            f"libc.socket({family}, {kind}, 0)"
            for family in (1, 2, 10, 16, 17, 40)
            for kind in (1, 2, 3)
        ),
        "__import__('socket').create_connection(('127.0.0.1', PORT), 1)",
        "__import__('socket').socket(1).connect(SOCKET)",
        "__import__('urllib.request').request.urlopen(f'http://127.0.0.1:{PORT}')",
        "libc.socketpair(1, 1, 0, ctypes.create_string_buffer(8))",
    ),
    "28 dns": try_all(
        "__import__('socket').gethostbyname('localhost')", "libc.gethostbyname(b'x') or -1"
    ),
    "29 programs": try_all(
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.system('true') or 0",
        "__import__('subprocess').run(['true'])",
        "libc.execl(b'/bin/true', b'true', None)",
        "os.popen('true').read()",
        "__import__('pty').spawn('true')",
    ).replace("os.system('true') or 0", "-1 if os.system('true') else 0"),
    "30 libc call": try_all("libc.kill(PID, 9)", "libc.system(b'true') or 0").replace(
        "libc.system(b'true') or 0", "-1 if libc.system(b'true') else 0"
    ),
    "30 segfault": "import ctypes\nctypes.string_at(0)",
    "30 executable memory": try_all(
        "1 if libc.mmap(None, 4096, 7, 34, -1, 0) != 2**64 - 1 else -1",
        "libc.mprotect(ctypes.c_void_p(id(0) & ~4095), 4096, 7)",
        "__import__('mmap').mmap(-1, 4096, prot=7)",
        "ctypes.CFUNCTYPE(ctypes.c_int)(int) and -1",
    ),
    "31 debug another": try_all(
        "libc.ptrace(16, PID, 0, 0)",
        "libc.ptrace(0, 0, 0, 0)",
        "libc.process_vm_readv(PID, 0, 0, 0, 0, 0)",
        "libc.process_vm_writev(PID, 0, 0, 0, 0, 0)",
        "os.pidfd_open(PID)",
        "syscall(312, PID, os.getpid(), 0, 1, 1)",
    ),
    "32 signals": try_all(
        "os.kill(PID, 0)",
        "os.kill(PID, 9)",
        "os.kill(os.getppid(), 19)",
        "os.killpg(0, 19)",
        "os.kill(-1, 9)",
        "libc.kill(-1, 9)",
        "libc.tgkill(PID, PID, 9)",
        "libc.sigqueue(PID, 9, 0)",
        "__import__('signal').pidfd_send_signal(1, 9)",
    ),
    "33 limits": try_all(
        "__import__('resource').setrlimit(0, (10**6, 10**6))",
        "__import__('resource').setrlimit(9, (-1, -1))",
        "__import__('resource').prlimit(PID, 7)",
        "libc.prctl(4, 1, 0, 0, 0)",
        "libc.prctl(38, 0, 0, 0, 0)",
        "libc.prctl(1, 0, 0, 0, 0)",
        "libc.prctl(22, 2, 0, 0, 0)",
        "libc.personality(0x0400000)",
        "os.nice(-20)",
        "os.setuid(0)",
        "os.setgroups([0])",
    ),
    "34 object graph": HEAD
    + """
def found(value):
    text = str(value)
    if SECRET in text or "FLEDGE_CANARY" in text:
        breach("secret")
for c in ().__class__.__bases__[0].__subclasses__():
    found(c)
    g = getattr(getattr(c, "__init__", None), "__globals__", {})
    for name in list(g):
        if name in ("system", "popen"):
            try:
                if g[name]("true") == 0: breach("system")
            except OSError: pass
found("{0.__class__.__init__.__globals__}".format(type("A", (), {"__init__": lambda s: 0})()))
frame = sys._getframe()
while frame:
    found(frame.f_globals); found(frame.f_locals)
    frame = frame.f_back
import gc
for o in gc.get_objects():
    if isinstance(o, (dict, list)) and len(o) < 100: found(o)
""",
    "34 pickle, marshal, code objects": try_all(
        "__import__('pickle').loads(b\"cos\\nlistdir\\n(S'/'\\ntR.\")",
        "__import__('pickle').loads(b\"cposix\\nsystem\\n(S'true'\\ntR.\") and -1",
        "__import__('importlib').import_module('fledge.sandbox.process')",
        "__import__('importlib').machinery.SourceFileLoader('x', SECRET_FILE).get_code('x')",
        "__import__('runpy').run_path(SECRET_FILE)",
    ),
    "34 a made-up code object": (
        "f = (lambda: 0).__code__.replace(co_code=bytes(range(0, 254, 2)) * 4)\nexec(f)"
    ),
    "35 standard input": HEAD
    + "try:\n    breach(input())\nexcept EOFError: pass\nif os.read(0, 10): breach('stdin')",
    "36 leave the session": try_all(
        "os.setsid()", "os.setpgid(0, 0)", "os.fork() or os._exit(0)", "libc.daemon(0, 0)"
    ),
}

_BOMB = "d = {i * (2**61 - 1): 0 for i in range(30000)}\n"  # every key has the same hash

OURS: dict[str, str] = {
    # a value that must not leave the interpreter as an object: building it takes the host seconds
    "bomb behind taken names": "int = float = bool = dict\n" + _BOMB + "d",
    "bomb behind type": "type = lambda x: 5\nint = 5\n" + _BOMB + "d",
    "bomb behind a continuation": _BOMB + "d if 1 else \\",
    "bomb behind our bracket": "0)\n" + _BOMB + "(d",
    "shared memory": try_all("-1 if libc.mmap(None, 4096, 3, 0x21, -1, 0) == 2**64 - 1 else 1"),
    "io_uring": try_all(
        "syscall(425, 8, ctypes.create_string_buffer(256))", "syscall(426, 0, 1, 0, 0, 0)"
    ),
    "bpf, perf and keys": try_all(
        "syscall(321, 0, 0, 0)",
        "syscall(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)",
        "syscall(250, 0, -3, 0)",
        "syscall(248, b'user', b'x', b'y', 1, -3)",
    ),
    "memory files": try_all(
        "os.memfd_create('x')",
        "syscall(447, 0)",
        "libc.shm_open(b'/x', 66, 384)",
        "libc.shmget(0, 4096, 950)",
    ),
    "userfaultfd and process_madvise": try_all(
        "syscall(323, 0)", "syscall(323, 1)", "syscall(440, 1, 0, 0, 4, 0)"
    ),
    "namespaces and mounts": try_all(
        "libc.unshare(0x10000000)",
        "libc.unshare(0x40000000)",
        "libc.setns(0, 0)",
        "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
        "libc.umount2(b'/', 2)",
        "os.chroot('/')",
        "os.chdir('/')",
        "syscall(155, b'/', b'/')",
        "syscall(428, -100, b'/', 1)",
        "syscall(430, b'tmpfs', 0)",
    ),
    "every clone": try_all(
        "syscall(56, 17, 0, 0, 0, 0) or os._exit(0)",
        "syscall(57) or os._exit(0)",
        "syscall(58) or os._exit(0)",
        "syscall(435, ctypes.create_string_buffer(88), 88) or os._exit(0)",
        "syscall(56, 0x50f00, 0, 0, 0, 0)",
    ),
    "other ways to a descriptor": try_all(
        "os.pipe()",
        "os.eventfd(0)",
        "libc.epoll_create1(0)",
        "libc.inotify_init()",
        "libc.signalfd(-1, ctypes.create_string_buffer(128), 0)",
        "libc.timerfd_create(1, 0)",
        "libc.fanotify_init(0, 0)",
        "syscall(437, -100, SECRET_FILE.encode(), ctypes.create_string_buffer(24), 24)",
        "syscall(303, -100, SECRET_FILE.encode(), ctypes.create_string_buffer(64), 0, 0)",
        "syscall(304, -100, 0, 0)",
    ),
    "statx and newfstatat with a path": try_all(
        "syscall(332, -100, SECRET_FILE.encode(), 0, 4095, ctypes.create_string_buffer(256))",
        "syscall(262, -100, SECRET_FILE.encode(), ctypes.create_string_buffer(256), 0)",
        "syscall(262, 1, SECRET_FILE.encode(), ctypes.create_string_buffer(256), 0x1000)",
        "syscall(4, SECRET_FILE.encode(), ctypes.create_string_buffer(256))",
    ),
    "x32 system call": HEAD + "syscall(0x40000000 | 39)\nbreach('x32')",
    "x32 open": HEAD + "syscall(0x40000000 | 2, b'/etc/passwd', 0)\nbreach('x32')",
    "signals by timers": try_all(
        "libc.timer_create(0, 0, ctypes.create_string_buffer(8))",
        "__import__('signal').setitimer(0, 1)",
        "libc.alarm(1)",
        "libc.fcntl(1, 8, PID)",
    ),
    "another process's clock": try_all(
        "libc.clock_gettime((~PID << 3) | 2, ctypes.create_string_buffer(16))",
        "libc.clock_settime(0, ctypes.create_string_buffer(16))",
        "libc.adjtimex(ctypes.create_string_buffer(256))",
    ),
    "priority inheritance futexes": try_all(
        "syscall(202, ctypes.create_string_buffer(4), 6, 0, 0, 0, 0)",
        "syscall(202, ctypes.create_string_buffer(4), 12, 1, 0, 0, 0)",
        "syscall(454, ctypes.create_string_buffer(4), 1, -1, 2)",
    ),
    "terminal injection": try_all(
        "libc.ioctl(0, 0x5412, b'x')", "libc.ioctl(1, 0x5413, bytes(64))", "os.ttyname(1)"
    ),
    "the machine": try_all(
        "os.uname()",
        "os.sysconf('SC_PAGESIZE') and libc.sysinfo(ctypes.create_string_buffer(256))",
        "libc.reboot(0)",
        "libc.sethostname(b'x', 1)",
        "syscall(103, 3, ctypes.create_string_buffer(99), 99)",
        "libc.swapoff(b'/x')",
        "syscall(175, 0, 0, b'')",
        "syscall(246, 0, 0, 0, 0)",
    ),
    "scheduler and pages": try_all(
        "os.sched_setaffinity(0, {0})",
        "libc.setpriority(0, 0, -5)",
        "libc.mlock(ctypes.create_string_buffer(1), 4096)",
        "libc.mlockall(3)",
        "libc.sched_setscheduler(0, 1, bytes(8))",
        "libc.madvise(0, 4096, 100)",
        "syscall(279, PID, 0, 0, 0, 0, 0)",
    ),
    "capabilities and ids": try_all(
        "libc.capset(bytes(8), bytes(24))",
        "os.setresuid(0, 0, 0)",
        "os.setresgid(0, 0, 0)",
        "libc.setfsuid(0) and -1",
        "syscall(157, 24, 1, 0, 0, 0)",
        "syscall(317, 0, 0, 0)",
    ),
    "landlock again": try_all(
        "syscall(444, 0, 0, 1)", "syscall(446, 3, 0)", "syscall(445, 3, 1, 0, 0)"
    ),
    "splice and vmsplice": try_all(
        "syscall(275, 0, 0, 1, 0, 4096, 0)",
        "syscall(276, 1, 2, 4096, 0)",
        "syscall(278, 1, 0, 0, 0)",
        "os.sendfile(1, 0, 0, 1)",
    ),
    "forged result, then death": ("import os\nos.write(3, b'{\"error\": null}' * 3)\nos._exit(0)"),
    "result that is no JSON": "import os\nos.write(3, b'[' * 100000)\nos._exit(0)",
    "result flood": "import os\nwhile True: os.write(3, b'x' * 65536)",
    "result of another run": (
        'import os\nos.write(3, b\'{"run": 1, "status": 0, "timed_out": false}\')\nos._exit(7)'
    ),
    "closed pipes": "import os\nfor fd in (0, 1, 2, 3): os.close(fd)\nwhile True: pass",
    "death by signal": "import ctypes\nctypes.CDLL(None).abort()",
    "hostile error text": (
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\n"
        "    __repr__ = __str__\nraise E"
    ),
    "endless error text": "class E(Exception):\n    def __str__(self): return 'x' * 10**8\nraise E",
    "hostile value": "class V:\n    def __repr__(self):\n        while True: pass\nV()",
    "hostile name of a value": (
        "class V:\n    @property\n    def name(self):\n        while True: pass\nV()"
    ),
    "replaced streams": (
        "import sys, builtins, json\nsys.stdout = sys.stderr = None\n"
        "json.dumps = builtins.print = lambda *a, **k: 1/0\n1"
    ),
    "broken flush": (
        "import sys\nclass S:\n    def flush(self): raise KeyboardInterrupt\nsys.stdout = S()"
    ),
    "exit handlers": "import atexit\natexit.register(lambda: [1 for _ in iter(int, 1)])",
    "signal handlers": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, lambda *a: None)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
    "long sleep": "import time\ntime.sleep(10**6)",
    "regular expression bomb": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "hash collisions": "{i * (2**61 - 1): 0 for i in range(50000)}",
    "huge repr": "x = [0]\nfor _ in range(60): x = [x, x]\nprint(x)",
    "unicode bombs": "print('\\u202e' * 10**6)\nprint('\\ufdfa' * 10**6)\nprint(chr(0xd800))",
    "control sequences": "print('\\x1b]0;x\\x07\\x1b[2J\\x00<|assistant_end|>')",
    "decompression bomb": "import zlib\nd = zlib.decompressobj()\nx = zlib.compress(bytes(10**9))",
    "memory of earlier programs": HEAD
    + "import gc\nfor o in gc.get_objects():\n"
    + "    if isinstance(o, dict) and o is not globals() and SECRET in o.values(): breach('it')",
    "bytes that are not text": (
        "import os\nos.write(1, bytes(range(256)) * 10)\nos.write(2, b'\\xff' * 10)"
    ),
    "switching layers": try_all(
        "sys.modules['fledge.sandbox.lockdown'].lock(0, memory_bytes=1, cpu_seconds=1, parent=1)",
        "sys.modules['fledge.sandbox.lockdown'].prepare()",
        "sys.modules['fledge.sandbox.lockdown'].harden_server()",
    ),
}

# For the calculator: expressions only, all must be refused at once.
CALCULATOR = (
    "'a'.ljust(400000000).count('a')",
    "'a'.center(10**9)",
    "('a' * 10**9).count('a')",
    "'%1000000000d' % 1",
    "f'{1:>1000000000}'",
    "'{:>1000000000}'.format(1)",
    "9**9**9",
    "(2**4000)**(2**4000)",
    "1 << 10**10",
    "1 << (1 << 4000)",
    "0.5 ** -10000",
    "1e308 * 10",
    "round(5, -10**9)",
    "10**10**10 % 7",
    "-(-9)**9**9",
    "__import__('os').system('id')",
    "open('/etc/passwd').read()",
    "().__class__.__bases__[0].__subclasses__()",
    "'{0.__class__}'.format(1)",
    "(lambda: 0)()",
    "[x for x in range(10**9)]",
    "[0] * 10**10",
    "{1: 2}",
    "x := 5",
    "yield 1",
    "await x",
    "eval('1')",
    "exec('1')",
    "getattr(1, 'real')",
    "len([1] * 10**9)",
    "max('a' * 10**9, 'b')",
    "min(*[1] * 10**9)",
    "int('9' * 10**7)",
    "int(1e308 * 10)",
    "abs('x')",
    "'a'.upper.__self__",
    "'\\N{BULLET}'",
    "1if 1else 2",
    "(" * 300 + "1" + ")" * 300,
    "-" * 500 + "1",
    "1" * 600,
    "1+" * 255 + "1",
    "\0",
    "1\n2",
    "",
    "\ud800",
)
