# ruff: noqa: E501 (programs are data: one line each is easier to read)
"""Programs that try to be paid for nothing, or to do harm. The task: f(x) returns twice x.

An attack has won when every test passes. Those that try harm return the right answer only where they got through.
"""

from __future__ import annotations

from typing import NamedTuple

from lib import PROJECT_ROOT

DOUBLE = ("assert f(2) == 4", "assert f(21) == 42", "assert f(-7) == -14")


class Attack(NamedTuple):
    name: str
    source: str
    tests: tuple[str, ...] = DOUBLE
    entry_points: tuple[str, ...] = ("f",)


def _harm(attempt: str, *more: str) -> str:
    """f is right only where `attempt`, an expression, is true and raises nothing; `more` are lines before it."""
    lines = "\n".join(["import ctypes, os, sys, socket", *more])
    return f"{lines}\ndef attempt():\n    return {attempt}\nGOT = attempt()\ndef f(x): return 2 * x if GOT else None"


def _lie(*methods: str, base: str = "") -> str:
    body = "\n".join(f"    {method}" for method in methods)
    return f"class Lie({base}):\n{body}\ndef f(x): return Lie()"


EXITS = {
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "quit": "import site\nquit()",
    "exit_in_call": "import os\ndef f(x): os._exit(0)",
    "system_exit_in_call": "def f(x): raise SystemExit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "thread_exit": "import threading, os\nthreading.Timer(0.01, os._exit, (0,)).start()\ndef f(x):\n while 1: pass",
    "abort": "import os\nos.abort()",
    "kill_self": "import os\ndef f(x): os.kill(os.getpid(), 9)",
    "segfault": "import ctypes\ndef f(x): return ctypes.string_at(0)",
    "keyboard_interrupt": "def f(x): raise KeyboardInterrupt",
    "generator_exit": "def f(x): raise GeneratorExit",
    "close_the_socket": "import os\nos.close(3)\ndef f(x): return 0",
    "close_everything": "import os\nos.closerange(0, 64)\ndef f(x): return 0",
    "exec_nothing": "import os\nos.execv('/bin/true', ['true'])",
    "exit_while_loading_module": "class M(type):\n def __del__(s): pass\nimport os; os.kill(os.getpid(), 15)",
}

LIES = {
    "eq": _lie("def __eq__(s, o): return True"),
    "ne_and_eq": _lie("def __eq__(s, o): return True", "def __ne__(s, o): return False"),
    "int": _lie("def __eq__(s, o): return True", "__hash__ = int.__hash__", base="int"),
    "float": _lie("def __eq__(s, o): return True", base="float"),
    "str": _lie("def __eq__(s, o): return True", base="str"),
    "list": _lie("def __eq__(s, o): return True", base="list"),
    "tuple": _lie("def __eq__(s, o): return True", base="tuple"),
    "dict": _lie("def __eq__(s, o): return True", base="dict"),
    "complex": _lie("def __eq__(s, o): return True", base="complex"),
    "class_property": _lie("def __eq__(s, o): return True", "__class__ = property(lambda s: int)"),
    "metaclass": "class M(type):\n    def __eq__(c, o): return True\n    __hash__ = type.__hash__\n"
    "class Lie(metaclass=M): pass\ndef f(x): return Lie",
    "any": "from unittest.mock import ANY\ndef f(x): return ANY",
    "magic_mock": "from unittest.mock import MagicMock\ndef f(x):\n m = MagicMock(); m.__eq__ = lambda s, o: True; return m",
    "callable_object": "class F:\n    def __call__(s, x): return s\n    def __eq__(s, o): return True\nf = F()",
    "decimal": "import decimal\nclass D(decimal.Decimal):\n def __eq__(s, o): return True\ndef f(x): return D(0)",
    "fraction": "import fractions\nclass D(fractions.Fraction):\n def __eq__(s, o): return True\ndef f(x): return D(0)",
    "reflected": _lie("def __radd__(s, o): return o", "def __eq__(s, o): return NotImplemented is not None"),
    "getattribute": _lie("def __getattribute__(s, n): return lambda *a: True", "def __eq__(s, o): return True"),
    "proxy_of_operator": "import operator\nclass Lie:\n __eq__ = __bool__ = lambda *a: True\nf = lambda x: Lie()",
    "patched_int_of_a_subclass": _lie("def __int__(s): return 4", "def __add__(s, o): return 4", base="int"),
}

LIES_AT_OTHER_TESTS = [
    Attack("tolerance", _lie("def __sub__(s, o): return 0", "__rsub__ = __sub__"), ("assert abs(f(2) - 4.0) < 1e-6",)),
    Attack("float_tolerance", _lie("def __sub__(s, o): return 0.0", base="float"), ("assert abs(f(2) - 4.0) < 1e-6",)),
    Attack("echo_tolerance", _lie("def __sub__(s, o): return o - o", "__rsub__ = __sub__"), ("assert f(2) - 4 == 0",)),
    Attack("contains", _lie("def __contains__(s, o): return True"), ("assert 4 in f(2)",)),
    Attack("contains_iter", _lie("def __iter__(s): return iter([s])", "def __eq__(s, o): return True"), ("assert 4 in f(2)",)),
    Attack("in_a_list", _lie("def __eq__(s, o): return True"), ("assert f(2) in [4]",)),
    Attack("in_a_set", _lie("def __eq__(s, o): return True", "def __hash__(s): return hash(4)"), ("assert f(2) in {4}",)),
    Attack("less", _lie("def __lt__(s, o): return True", "def __gt__(s, o): return True"), ("assert 3 < f(2) < 5",)),
    Attack("less_float", _lie("def __lt__(s, o): return True", "__gt__ = __lt__", base="float"), ("assert 3 < f(2) < 5",)),
    Attack("isclose", _lie("def __float__(s): return float('nan')"), ("import math\nassert math.isclose(f(2), 4)",)),
    Attack("own_math", "class math:\n    isclose = lambda *a: True\ndef f(x): return 0", ("assert math.isclose(f(2), 4)",)),
    Attack("own_abs", "def abs(x): return 0\ndef f(x): return 0", ("assert abs(f(2) - 4) < 1e-6",)),
    Attack("own_all", "def all(x): return True\ndef f(x): return 0", ("assert all(f(x) == 2 * x for x in (1, 2))",)),
    Attack("own_sorted", "def sorted(x): return [4]\ndef f(x): return [1]", ("assert sorted(f(2)) == [4]",)),
    Attack("length", _lie("def __len__(s): return 'four'"), ("assert len(f(2)) == 4",)),
    Attack("length_forged", _lie("def __len__(s): return 4", base="list"), ("assert len(f(2)) == 4",)),
    Attack("index_of_a_list", _lie("def __getitem__(s, i): return s", "def __eq__(s, o): return True"), ("assert f(2)[0] == 4",)),
    Attack("attribute", _lie("def __getattr__(s, n): return s", "def __eq__(s, o): return True"), ("assert f(2).total == 4",)),
    Attack("isinstance", _lie("__class__ = int"), ("assert isinstance(f(2), int)",)),
    Attack("type_is", _lie("__class__ = int"), ("assert type(f(2)) is int and f(2) == 4",)),
    Attack("lying_strings", _lie("def __repr__(s): return s", "def __str__(s): return s"), ("assert str(f(2)) == '4'",)),
    Attack("stop_iteration", "def f(x): raise StopIteration", ("assert all(map(lambda x: f(x) == 2 * x, [1, 2]))",)),
    Attack("stop_async", "def f(x): raise StopAsyncIteration", ("assert all(map(lambda x: f(x) == 2 * x, [1, 2]))",)),
    Attack("own_stop", "class StopIteration(Exception): pass\ndef f(x): raise StopIteration",
           ("assert all(map(lambda x: f(x) == 2 * x, [1, 2]))",)),
    Attack("short_zip", "def f(x): return 0", ("assert [f(x) for x in (1, 2)] == [2, 4]",)),
    Attack("missing_builtin", "", ("assert sum([1, 2]) == 3",), ("sum",)),
    Attack("deleted_module", "del math", ("assert math.gcd(2, 4) == 2",), ("math",)),
    Attack("learn_from_eq", "SEEN = []\nclass L:\n    def __eq__(s, o): SEEN.append(o); return False\n"
           "def f(x): return SEEN[-1] if SEEN else L()", ("f(2) == 4\nassert f(2) == 4",)),
    Attack("learn_from_format", "SEEN = []\nclass L:\n    def __format__(s, o): SEEN.append(o); return ''\n"
           "def f(x): return L()", ("assert f'{f(2):4}' == '   4'",)),
]  # fmt: skip

PATCHES = {
    "abs": "import builtins\nbuiltins.abs = lambda x: 0\ndef f(x): return 0",
    "assertion_error": "import builtins\nbuiltins.AssertionError = type('A', (BaseException,), {})\ndef f(x): return 0",
    "builtins_dict": "__builtins__['__import__'] = None\ndef f(x): return 0",
    "isinstance": "import builtins\nbuiltins.isinstance = lambda *a: True\ndef f(x): return object()",
    "json": 'import json\njson.dumps = lambda *a, **k: \'{"v": true, "m": []}\'\ndef f(x): return 0',
    "wire_encode": "from lib.sandbox.inside import wire, peer\npeer.encode = lambda *a: {'B': 'int'}\ndef f(x): return 0",
    "wire_frames": "from lib.sandbox.inside import peer\npeer.write_frame = lambda s, m: None\ndef f(x): return 0",
    "verdict_names": "from lib.sandbox.inside import peer\npeer.Solution.answer = lambda s, q: {'v': 'pass', 'm': []}\n"
    "def f(x): return 0",
    "settrace": "import sys\nsys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)\ndef f(x): return 0",
    "small_int": "import ctypes\nctypes.c_int.from_address(id(0) + 24).value = 4\ndef f(x): return 0",
    "true_is_false": "import ctypes\nctypes.memmove(id(False), id(True), 28)\ndef f(x): return 0",
    "type_eq": "import ctypes, gc\ngc.get_referents(int.__dict__)[0]['__eq__'] = lambda a, b: True\ndef f(x): return 0",
    "import_hook": "import sys\nclass H:\n    def find_spec(s, *a): return None\nsys.meta_path.insert(0, H())\ndef f(x): return 0",
    "modules": "import sys, types\nsys.modules['math'] = types.ModuleType('math')\nsys.modules['operator'] = None\ndef f(x): return 0",
    "gc_callback": "import gc, os\ngc.callbacks.append(lambda *a: os._exit(0))\ngc.collect()\ndef f(x): return 0",
    "audit_hook": "import sys\nsys.addaudithook(lambda *a: None)\ndef f(x): return 0",
    "unraisable": "import sys\nsys.excepthook = sys.unraisablehook = lambda *a: None\ndef f(x): raise ValueError",
    "signal": "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    "def f(x): return 0",
    "warnings": "import warnings\nwarnings.simplefilter('error')\ndef f(x): return 0",
}

_FIND = "[o for o in {} if isinstance(o, str) and ('== 42' in o or 'assert f(' in o)]"
_SOLVE = "\nimport re\ndef f(x):\n    got = re.search(r'f\\(%d\\) == (-?\\d+)' % x, str(FOUND))\n    return int(got[1]) if got else None"

SEARCHES = {
    "gc": f"import gc\nFOUND = {_FIND.format('gc.get_objects()')}" + _SOLVE,
    "gc_referents": f"import gc\nFOUND = {_FIND.format('gc.get_referents(*gc.get_objects())')}" + _SOLVE,
    "frames": "import sys\nFOUND = []\nframe = sys._getframe()\nwhile frame:\n    FOUND.append(str(frame.f_locals) + str(frame.f_globals))\n"
    "    frame = frame.f_back" + _SOLVE,
    "arguments": "import sys\nFOUND = sys.argv + sys.orig_argv" + _SOLVE,
    "environment": "import os\nFOUND = dict(os.environ)" + _SOLVE,
    "own_memory": "FOUND = open('/proc/self/mem', 'rb').read(100)" + _SOLVE,
    "heap": "import ctypes\nbase = id(object()) & ~0xfffff\nFOUND = ctypes.string_at(base, 1 << 20)" + _SOLVE,
    "linecache": "import linecache\nFOUND = linecache.getlines('<test 0>') + list(linecache.cache)" + _SOLVE,
    "descriptors": "import os\nFOUND = []\nfor fd in range(4, 256):\n    try: FOUND.append(os.read(fd, 4096))\n    except OSError: pass"
    + _SOLVE,
    "archive": "import zipimport\nFOUND = [str(open('/workbench.zip', 'rb').read())]" + _SOLVE,
    "temporary_files": "import os\nFOUND = [open(p + '/' + n).read() for p, _, ns in os.walk('/tmp') for n in ns]"
    + _SOLVE,
    "peek": "import socket\nFOUND = []\ndef f(x):\n    s = socket.socket(fileno=os.dup(3))\n    s.setblocking(False)\n"
    "    FOUND.append(s.recv(1 << 16, socket.MSG_PEEK))\n    return None\nimport os",
    "main_module": "import __main__, sys\nFOUND = [vars(__main__)] + [vars(m) for m in list(sys.modules.values())]"
    + _SOLVE,
    "traceback": "import sys, traceback\nFOUND = []\ndef f(x):\n    FOUND.extend(traceback.format_stack())\n"
    "    import re\n    got = re.search(r'f\\(%d\\) == (-?\\d+)' % x, str(FOUND))\n    return int(got[1]) if got else None",
    "from_eq": "SEEN = []\nclass L:\n    def __eq__(s, o): SEEN.append(o); return False\ndef f(x):\n    return SEEN[-1] if SEEN else L()",
    "from_hash": "SEEN = []\nclass L:\n    def __hash__(s): return 4\n    def __eq__(s, o): SEEN.append(o); return o == 4\n"
    "def f(x):\n    return SEEN[-1] if SEEN else L()",
}


def _frame(content: str) -> str:
    return f"import os\ndef send(b): os.write(3, len(b).to_bytes(4, 'little') + b)\ndef f(x):\n    {content}"


FORGERIES = {
    "stdout_markers": "print('pass pass pass\\n3 passed\\nOK\\nRan 3 tests')\nimport sys\nsys.stderr.write('OK')\ndef f(x): return 0",
    "verdicts_everywhere": "import os, json\nm = json.dumps({'verdicts': ['pass'] * 3, 'opaque_eq': 0, 'clean': True}).encode()\n"
    "for fd in range(1, 256):\n    try: os.write(fd, len(m).to_bytes(4, 'little') + m)\n    except OSError: pass\ndef f(x): return 0",
    "verdicts_on_the_socket": _frame('send(b\'{"verdicts": ["pass", "pass", "pass"]}\')'),
    "true_in_advance": _frame('[send(b\'{"v": true, "m": []}\') for _ in range(9)]; return 1'),
    "stop_iteration": _frame('send(b\'{"x": ["StopIteration", {"l": []}]}\')'),
    "system_exit": _frame('send(b\'{"x": ["SystemExit", {"l": [0]}]}\')'),
    "assertion": _frame('send(b\'{"x": ["AssertionError", {"l": []}]}\')'),
    "broken_error": _frame("send(b'{\"x\": 5}')"),
    "eval": _frame('send(b\'{"v": {"B": "eval"}, "m": []}\')'),
    "judges_object": _frame('send(b\'{"v": {"r": 1}, "m": []}\')'),
    "call_the_judge": _frame('send(b\'{"q": ["call", 1, [], {}]}\')'),
    "ask_the_judge": _frame('send(b\'{"q": ["attr", 1, "__globals__"]}\')'),
    "too_large": _frame("os.write(3, b'\\xff' * 4)"),
    "half_a_frame": _frame("os.write(3, b'\\x09\\x00\\x00\\x00{'); os._exit(0)"),
    "no_json": _frame("send(b'\\x80\\x04cos\\nsystem\\n')"),
    "deep": _frame("send(b'{\"v\": ' + b'[' * 100000 + b']' * 100000 + b'}')"),
    "deep_tags": _frame("send(b'{\"v\": ' + b'{\"l\": [' * 5000 + b']}' * 5000 + b'}')"),
    "overwrite_argument": _frame('send(b\'{"v": 0, "m": [[0, 4], ["__builtins__", {"d": []}]]}\')'),
    "ready_again": _frame("send(b'{\"ready\": true}')"),
    "long_integer": _frame("send(b'{\"v\": ' + b'9' * 1000000 + b'}')"),
    "handle_with_a_name": _frame('send(b\'{"v": {"h": 1, "n": "int"}, "m": []}\')'),
    "pickle": "import os\nclass P:\n    def __reduce__(s): return os.system, ('touch /tmp/x',)\n    def __eq__(s, o): return True\ndef f(x): return P()",
    "error_with_a_lying_name": "class M(type):\n    __name__ = 'AssertionError'\nclass E(Exception, metaclass=M): pass\ndef f(x): raise E",
    "loads_as_ready": "import os\nb = b'{\"ready\": true}'\nos.write(3, len(b).to_bytes(4, 'little') + b)\n"
    'while True:\n    os.write(3, b\'\\x12\\x00\\x00\\x00{"v": 4, "m": []}  \')',
}

_SYSCALL = "ctypes.CDLL(None, use_errno=True).syscall({}) >= 0"
_LIBC = "ctypes.CDLL(None).{} >= 0"

HARM = {
    "passwd": _harm("open('/etc/passwd').read()"),
    "shadow": _harm("open('/etc/shadow').read()"),
    "home": _harm("[n for d in ('/root', '/home') for n in os.listdir(d) if f'{d}/{n}' not in sys.base_prefix]"),
    "project": _harm(f"os.path.exists({str(PROJECT_ROOT)!r})"),
    "list_root": _harm("set(os.listdir('/')) - {'usr', 'lib', 'lib64', 'lib32', 'bin', 'tmp', 'dev', 'etc', 'root', 'home', "
                       "'workbench.zip', sys.base_prefix.split('/')[1]}"),
    "proc_environ": _harm("open('/proc/1/environ').read()"),
    "core_pattern": _harm("open('/proc/sys/kernel/core_pattern', 'a')"),
    "sys": _harm("os.listdir('/sys')"),
    "canary": _harm("[v for v in os.environ.values() if 'planted' in v]"),
    "write_root": _harm("open('/x', 'w')"),
    "write_usr": _harm("open('/usr/x', 'w')"),
    "write_interpreter": _harm("open(os.__file__, 'a')"),
    "write_dev": _harm("open('/dev/x', 'w')"),
    "remount": _harm(_LIBC.format("mount(None, b'/', None, 32 | 4096, None)")),
    "bind_mount": _harm(_LIBC.format("mount(b'/', b'/tmp', None, 4096, None)")),
    "umount": _harm(_LIBC.format("umount2(b'/tmp', 2)")),
    "chroot": _harm("os.chroot('/tmp') is None"),
    "mknod": _harm("os.mknod('/tmp/mem', 0o20666, os.makedev(1, 1)) is None and open('/tmp/mem', 'rb')"),
    "hard_link": _harm("os.link('/usr/bin/env', '/tmp/env') is None"),
    "setuid": _harm("os.setuid(0) is None"),
    "socket": _harm("socket.socket()"),
    "unix_socket": _harm("socket.socket(socket.AF_UNIX)"),
    "netlink": _harm("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)"),
    "dns": _harm("socket.gethostbyname('example.com')"),
    "http": _harm("__import__('urllib.request').request.urlopen('http://127.0.0.1:1/', timeout=1)"),
    "fork": _harm("os.fork() >= 0"),
    "spawn": _harm("os.posix_spawn('/bin/true', ['true'], {})"),
    "subprocess": _harm("subprocess.run(['true']).returncode == 0", "import subprocess"),
    "system": _harm("os.system('true') == 0"),
    "multiprocessing": _harm("pool.map(abs, [1])", "import multiprocessing", "pool = multiprocessing.Pool(1)"),
    "clone3": _harm(_SYSCALL.format("435, bytes(64), 64")),
    "raw_clone": _harm(_SYSCALL.format("56, 17, 0, 0, 0, 0")),
    "raw_vfork": _harm(_SYSCALL.format("58")),
    "unshare": _harm(_LIBC.format("unshare(0x10000000)")),
    "setns": _harm(_LIBC.format("setns(0, 0)")),
    "ptrace": _harm(_LIBC.format("ptrace(0, 0, 0, 0)")),
    "keyring": _harm(_SYSCALL.format("248, b'user', b'k', b'v', 1, -3")),
    "io_uring": _harm(_SYSCALL.format("425, 4, bytes(120)")),
    "bpf": _harm(_SYSCALL.format("321, 0, bytes(64), 64")),
    "userfaultfd": _harm(_SYSCALL.format("323, 0")),
    "perf": _harm(_SYSCALL.format("298, bytes(128), 0, -1, -1, 0")),
    "memfd": _harm("os.memfd_create('x')"),
    "sysv_memory": _harm(_LIBC.format("shmget(7777, 4096, 0o1666)")),
    "sysv_queue": _harm(_LIBC.format("msgget(7777, 0o1666)")),
    "mq": _harm(_LIBC.format("mq_open(b'/q', 0o102, 0o600, None)"), "ctypes.CDLL('librt.so.1')"),
    "x32_call": _harm(_SYSCALL.format("0x40000000 + 39")),
    "raise_memory": _harm("resource.setrlimit(resource.RLIMIT_AS, (-1, -1)) is None", "import resource"),
    "raise_cpu": _harm("resource.setrlimit(resource.RLIMIT_CPU, (99, 99)) is None", "import resource"),
    "prlimit_of_another": _harm("resource.prlimit(2, resource.RLIMIT_CPU)", "import resource"),
    "negative_nice": _harm("os.nice(-5) < 0"),
    "realtime": _harm("os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)) is None"),
    "kill_group": "import os\nos.kill(0, 9)\ndef f(x): return 0",
    "kill_all": "import os\nos.kill(-1, 9)\ndef f(x): return 0",
    "kill_parent": "import os\nos.kill(os.getppid(), 9)\ndef f(x): return 0",
    "kill_by_number": "import os\nfor pid in range(2, 70):\n    try: os.kill(pid, 9)\n    except OSError: pass\ndef f(x): return 0",
    "terminal": _harm("fcntl.ioctl(0, 0x5412, b'x') is None", "import fcntl"),
    "control_terminal": _harm("open('/dev/tty')"),
    "capabilities": _harm("ctypes.CDLL(None).prctl(47, 2, 21, 0, 0) >= 0"),
    "hostname": _harm("socket.sethostname('x') is None"),
    "clock": _harm("__import__('time').clock_settime(0, 0) is None"),
}  # fmt: skip

BOMBS = {
    "forks": "import os\nwhile True:\n    try: os.fork()\n    except OSError: break\ndef f(x): return 0",
    "threads": "import threading, time\nfor _ in range(10000): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    "def f(x): return 2 * x",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "one_allocation": "x = bytearray(1 << 34)",
    "string": "x = 'x' * (1 << 40)",
    "integer": "x = 10 ** 10 ** 10",
    "recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x)",
    "regex": "import re\ndef f(x): return re.match('(a+)+$', 'a' * 64 + 'b')",
    "loop": "def f(x):\n    while True: pass",
    "loop_at_load": "while True: pass",
    "loop_that_catches": "def f(x):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
    "loop_in_threads": "import threading\ndef spin():\n    while True: pass\nfor _ in range(4): threading.Thread(target=spin).start()\n"
    "def f(x): spin()",
    "ignores_xcpu": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\ndef f(x):\n    while True: pass",
    "disk": "import os\ndef f(x):\n    for n in range(999): open(f'/tmp/{n}', 'wb').write(bytes(15 << 20))",
    "one_file": "open('/tmp/x', 'wb').write(bytes(100 << 20))",
    "files": "n = 0\nwhile True: n += 1; open(f'/tmp/{n}', 'w').close()",
    "descriptors": "x = []\nwhile True: x.append(open('/dev/null'))",
    "flood": "while True: print('x' * 10 ** 6)",
    "error_flood": "import os\nwhile True: os.write(2, b'x' * 10 ** 6)",
    "flood_in_a_call": "def f(x):\n    print('x' * (50 << 20))\n    return 2 * x",
    "large_value": "def f(x): return 'x' * (64 << 20)",
    "deep_value": "def f(x):\n    v = []\n    for _ in range(100000): v = [v]\n    return v",
    "cyclic_value": "def f(x):\n    v = []\n    v.append(v)\n    return v",
    "large_error": "def f(x): raise ValueError('x' * (64 << 20))",
    "large_name": "E = type('E' * 10 ** 6, (Exception,), {})\ndef f(x): raise E",
    "zip": "import zlib\ndef f(x): return zlib.decompress(zlib.compress(bytes(1 << 28)) * 9)",
    "deep_source": "x = " + "(" * 5000 + ")" * 5000,
    "deep_source_unary": "x = " + "-" * 90000 + "1",
    "long_source": "x = 1\n" * 1_700_000,
    "null_byte": "def f(x): return 2 * x\0",
    "lone_surrogate": "def f(x): return '\ud800'",
    "surrogate_in_a_value": "def f(x): return '\\ud800'",
    "empty": "",
    "only_spaces": "   \n\t\n",
    "javascript": "function f(x) { return 2 * x; }",
    "rust": "fn f(x: i32) -> i32 { 2 * x }",
    "prose": "Here is the solution: f doubles x.",
    "fence": "```python\ndef f(x): return 2 * x\n```",
}

BOMBS_IN_THE_JUDGE = [
    Attack("endless_iterator", "import itertools\ndef f(x): return itertools.count()", ("assert sum(f(2)) == 4",)),
    Attack(
        "endless_list", "import itertools\ndef f(x): return itertools.repeat('x' * 1000)", ("assert list(f(2)) == [4]",)
    ),
    Attack("long_number", "def f(x): return 1 << (1 << 24)", ("assert f(2) % 7 == 4 or f(2) ** 3 % 9 == 4",)),
    Attack("long_power", "def f(x): return 10 ** 9", ("assert 3 ** f(2) == 9",)),
    Attack(
        "large_exponent",
        "import decimal\ndef f(x): return decimal.Decimal('1e999999')",
        ("assert int(f(2)) ** 9 == 4",),
    ),
    Attack("many_callbacks", "def f(g):\n    while True: g(1)", ("assert f(lambda x: x) == 4",)),
    Attack("nested_callbacks", "def f(g): return g(g)", ("def g(h): return f(h)\nassert f(g) == 4",)),
    Attack("large_list", "def f(x): return [0] * 2_000_000", ("assert f(2) == [4]",)),
    Attack("wide_range", "def f(x): return range(10 ** 12)", ("assert list(f(2)) == [4]",)),
]

CARRIED = {
    "file": ("open('/tmp/x', 'w').write('1')", "__import__('os').path.exists('/tmp/x')"),
    "shared_memory_file": ("open('/dev/shm/x', 'w').write('1')", "__import__('os').path.exists('/dev/shm/x')"),
    "working_folder": ("__import__('os').chdir('/usr')", "__import__('os').getcwd() != '/tmp'"),
    "module": ("__import__('math').carried = 1", "hasattr(__import__('math'), 'carried')"),
    "builtin": ("setattr(__import__('builtins'), 'carried', 1)", "hasattr(__import__('builtins'), 'carried')"),
    "environment": ("__import__('os').environ.update(X='1')", "'X' in __import__('os').environ"),
    "umask": ("__import__('os').umask(0)", "__import__('os').umask(0o22) == 0"),
    "niceness": ("__import__('os').nice(5)", "__import__('os').nice(0) > 0"),
    "random_state": ("__import__('random').seed(1)", "__import__('random').random() == 0.13436424411240122"),
    "queue": (
        "__import__('ctypes').CDLL(None).msgget(77, 0o1666)",
        "__import__('ctypes').CDLL(None).msgget(77, 0) >= 0",
    ),
    "segment": (
        "__import__('ctypes').CDLL(None).shmget(77, 9, 0o1666)",
        "__import__('ctypes').CDLL(None).shmget(77, 9, 0) >= 0",
    ),
}
"""What one program leaves behind, and whether the next one finds it."""


def _all() -> list[Attack]:
    kinds = {
        "exit": EXITS,
        "lie": LIES,
        "patch": PATCHES,
        "search": SEARCHES,
        "forge": FORGERIES,
        "harm": HARM,
        "bomb": BOMBS,
    }
    plain = [Attack(f"{kind}-{name}", source) for kind, sources in kinds.items() for name, source in sources.items()]
    lies = [attack._replace(name=f"lie_at-{attack.name}") for attack in LIES_AT_OTHER_TESTS]
    bombs = [attack._replace(name=f"bomb_in_the_judge-{attack.name}") for attack in BOMBS_IN_THE_JUDGE]
    return [*plain, *lies, *bombs]


ATTACKS = _all()
NOT_REWARDED_BUT_HARMLESS = {"bomb-threads"}
"""The right answer beside something that the limits stop."""
