# ruff: noqa: E501 (programs are data: one line each is easier to read)
"""Honest programs of the kinds that models write: every one of them must earn all of its tests."""

from __future__ import annotations

from typing import NamedTuple


class Honest(NamedTuple):
    name: str
    source: str
    tests: tuple[str, ...]
    entry_points: tuple[str, ...] = ("f",)
    setup: str = ""


HONEST = [
    Honest("one_line", "f = lambda x: 2 * x", ("assert f(2) == 4", "assert f(-1) == -2")),
    Honest("threads", """
import threading
def f(n):
    total, lock = [0], threading.Lock()
    def add():
        for _ in range(100):
            with lock: total[0] += 1
    threads = [threading.Thread(target=add) for _ in range(n)]
    for t in threads: t.start()
    for t in threads: t.join()
    return total[0]
""", ("assert f(8) == 800",)),
    Honest("thread_pool", "from concurrent.futures import ThreadPoolExecutor\ndef f(xs):\n"
           "    with ThreadPoolExecutor(4) as pool: return list(pool.map(lambda x: x * x, xs))", ("assert f([1, 2, 3]) == [1, 4, 9]",)),
    Honest("asyncio", """
import asyncio
async def work(n):
    await asyncio.sleep(0.01)
    return n * n
def f(n):
    async def main(): return await asyncio.gather(*(work(i) for i in range(n)))
    return asyncio.run(main())
""", ("assert f(4) == [0, 1, 4, 9]",)),
    Honest("sqlite", """
import sqlite3
def f(rows):
    db = sqlite3.connect(':memory:')
    db.execute('create table t (a integer, b text)')
    db.executemany('insert into t values (?, ?)', rows)
    return db.execute('select b, sum(a) from t group by b order by b').fetchall()
""", ("assert f([(1, 'x'), (2, 'y'), (3, 'x')]) == [('x', 4), ('y', 2)]",)),
    Honest("sqlite_file", "import sqlite3\ndef f():\n    for v in (1, 2):\n        with sqlite3.connect('d.db') as db:\n"
           "            db.execute('create table if not exists t (a)'); db.execute('insert into t values (?)', (v,))\n"
           "    return sqlite3.connect('d.db').execute('select sum(a) from t').fetchone()[0]", ("assert f() == 3",)),
    Honest("dataclass", """
from __future__ import annotations
from dataclasses import dataclass, field
@dataclass(order=True)
class Item:
    weight: float
    name: str = field(compare=False, default='')
def f(pairs): return max(Item(w, n) for n, w in pairs).name
""", ("assert f([('a', 1.5), ('b', 2.5)]) == 'b'",)),
    Honest("dataclass_compared", "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int\ndef f(x, y): return P(x, y)",
           ("assert f(1, 2).x == 1", "assert f(1, 2) == P(1, 2)", "assert repr(f(1, 2)) == 'P(x=1, y=2)'"), ("f", "P")),
    Honest("recursion", "def f(n): return 0 if n == 0 else 1 + f(n - 1)", ("assert f(900) == 900",)),
    Honest("deep_recursion", "import sys\nsys.setrecursionlimit(20000)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)",
           ("assert f(10000) == 10000",)),
    Honest("memoised", "from functools import lru_cache\n@lru_cache(None)\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)",
           ("assert f(90) == 2880067194370816120",)),
    Honest("tempfile", "import tempfile, os\ndef f(text):\n    with tempfile.NamedTemporaryFile('w+', delete=False) as t: t.write(text)\n"
           "    try: return open(t.name).read().upper()\n    finally: os.unlink(t.name)", ("assert f('abc') == 'ABC'",)),
    Honest("temporary_folder", "import tempfile, pathlib\ndef f():\n    with tempfile.TemporaryDirectory() as d:\n"
           "        for n in range(50): pathlib.Path(d, str(n)).write_text('x')\n        return len(list(pathlib.Path(d).iterdir()))",
           ("assert f() == 50",)),
    Honest("file_in_the_working_folder", "def f():\n    open('a.txt', 'w').write('hi')\n    return open('a.txt').read()", ("assert f() == 'hi'",)),
    Honest("list_of_100_mb", "def f(n): return sum([1] * n)", ("assert f(13_000_000) == 13_000_000",)),
    Honest("large_argument_and_result", "def f(xs): return sorted(xs)",
           ("assert f(list(range(50000, 0, -1))) == list(range(1, 50001))",)),
    Honest("sorts_in_place", "def f(xs): xs.sort()", ("a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]",)),
    Honest("changes_a_dict", "def f(d, k): d[k] = d.get(k, 0) + 1", ("d = {}\nf(d, 'a')\nf(d, 'a')\nassert d == {'a': 2}",)),
    Honest("changes_a_keyword", "def f(*, xs): xs.append(1)", ("a = []\nf(xs=a)\nassert a == [1]",)),
    Honest("class_with_state", """
class Stack:
    def __init__(self, items=()): self.items = list(items)
    def push(self, item): self.items.append(item)
    def pop(self):
        if not self.items: raise IndexError('pop from empty stack')
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]
""", ("s = Stack([1])\ns.push(2)\nassert len(s) == 2 and list(s) == [1, 2] and 2 in s and s[0] == 1", "assert s.pop() == 2 and s.items == [1]",
      "s.pop()\ntry:\n    s.pop()\n    assert False\nexcept IndexError as e:\n    assert 'empty' in str(e)", "assert isinstance(s, Stack)"),
           ("Stack",)),
    Honest("linked_list", "class Node:\n    def __init__(self, v, n=None): self.v, self.next = v, n\ndef f(h):\n    p = None\n"
           "    while h: h.next, p, h = p, h, h.next\n    return p", ("r = f(Node(1, Node(2, Node(3))))\nassert (r.v, r.next.v, r.next.next.v) == (3, 2, 1)\n"
           "assert r.next.next.next is None",), ("f", "Node")),
    Honest("generator", "def f(n):\n    a, b = 0, 1\n    for _ in range(n):\n        yield a\n        a, b = b, a + b",
           ("assert list(f(8)) == [0, 1, 1, 2, 3, 5, 8, 13]", "g = f(3)\nassert [next(g), next(g), next(g)] == [0, 1, 1]\n"
            "try:\n    next(g)\n    assert False\nexcept StopIteration:\n    pass")),
    Honest("endless_generator", "def f():\n    n = 1\n    while True:\n        yield n\n        n += 1",
           ("assert list(itertools.islice(f(), 5)) == [1, 2, 3, 4, 5]",)),
    Honest("closure_result", "def f(n): return lambda x: x + n", ("assert f(3)(4) == 7",)),
    Honest("callback", "def f(g, xs): return [g(x) for x in xs]", ("assert f(lambda x: x + 1, [1, 2]) == [2, 3]", "assert f(str, [1]) == ['1']",
                                                                 "seen = []\nf(seen.append, [1, 2])\nassert seen == [1, 2]")),
    Honest("decorator", "def f(g):\n    def inner(*a, **k): return ('called', g(*a, **k))\n    return inner",
           ("@f\ndef add(a, b=1): return a + b\nassert add(1, b=2) == ('called', 3)",)),
    Honest("errors", "class Odd(ValueError): pass\ndef f(x):\n    if x % 2: raise Odd(f'{x} is odd')\n    return x // 2",
           ("assert f(4) == 2", "try:\n    f(3)\n    assert False\nexcept ValueError as e:\n    assert str(e) == '3 is odd'")),
    Honest("plain_types", "def f(x): return x", tuple(f"assert f({v}) == {v} and type(f({v})) is type({v})" for v in (
        "1", "-2.5", "True", "None", "'ü\\ud800\\n'", "b'\\x00\\xff'", "(1, (2,))", "[[1], []]", "{1: {'a': (1, 2)}}", "{1, 2}", "frozenset({1})",
        "3 + 4j", "range(1, 9, 2)", "2 ** 80", "-2 ** 53", "bytearray(b'x')", "decimal.Decimal('1.10')", "fractions.Fraction(1, 3)",
        "datetime.datetime(2020, 1, 2, 3)", "datetime.date(2020, 1, 2)", "datetime.time(1, 2)", "datetime.timedelta(1, 2)", "collections.deque([1])"))),
    Honest("subclasses_of_plain_types", "import collections, enum\nclass E(enum.IntEnum):\n    A = 1\nP = collections.namedtuple('P', 'x y')\n"
           "def f(): return [collections.Counter('aab'), collections.OrderedDict(a=1), collections.defaultdict(int, b=2), E.A, P(1, 2)]",
           ("assert f() == [{'a': 2, 'b': 1}, {'a': 1}, {'b': 2}, 1, (1, 2)]",)),
    Honest("nan_and_infinity", "def f(x): return x", ("assert math.isnan(f(float('nan')))", "assert f(float('-inf')) == float('-inf')")),
    Honest("tolerance", "def f(x): return x ** 0.5", ("assert abs(f(2) - 1.41421356) < 1e-6", "assert math.isclose(f(4), 2)")),
    Honest("modules_of_the_solution", "import math, re\ndef f(s): return math.prod(int(x) for x in re.findall(r'\\d+', s))",
           ("assert f('2 and 3') == math.prod([2, 3])",)),
    Honest("setup_helpers", "def f(xs): return sum(xs)", ("assert f(DATA) == EXPECTED",), ("f",), "import statistics\nDATA = [1, 2, 3]\n"
           "EXPECTED = int(statistics.mean(DATA) * 3)"),
    Honest("own_gcd", "def gcd(a, b):\n    while b: a, b = b, a % b\n    return a", ("assert gcd(12, 18) == 6",), ("gcd",)),
    Honest("operators", "class V:\n    def __init__(s, x): s.x = x\n    def __add__(s, o): return V(s.x + o.x)\n    def __eq__(s, o): return s.x == o.x\n"
           "    def __abs__(s): return abs(s.x)", ("assert V(1) + V(2) == V(3)", "assert abs(V(-4)) == 4", "assert (V(1) + V(2)).x == 3"), ("V",)),
    Honest("context_manager", "from contextlib import contextmanager\n@contextmanager\ndef f(log):\n    log.append('in')\n    yield 5\n    log.append('out')",
           ("with f([]) as v:\n    assert v == 5",)),
    Honest("main_block", "def f(x): return 2 * x\nif __name__ == '__main__':\n    print(f(int(input())))", ("assert f(2) == 4",)),
    Honest("prints_a_lot", "def f(x):\n    for n in range(2000): print('step', n)\n    return x", ("assert f(1) == 1",)),
    Honest("input_at_the_end", "def f():\n    try: return input()\n    except EOFError: return 'nothing'", ("assert f() == 'nothing'",)),
    Honest("typing_and_enum", "from typing import Optional, List\nfrom enum import Enum, auto\nclass C(Enum):\n    RED = auto()\n"
           "def f(n: Optional[int]) -> List[str]: return [C(n).name] if n else []", ("assert f(1) == ['RED']", "assert f(None) == []")),
    Honest("json_hash_random", "import json, hashlib, random\ndef f(x):\n    random.seed(3)\n"
           "    return json.dumps({'d': hashlib.md5(str(x).encode()).hexdigest()[:4], 'r': random.randint(0, 0)})",
           ("assert json.loads(f(1)) == {'d': 'c4ca', 'r': 0}",)),
    Honest("sleeps", "import time\ndef f():\n    time.sleep(0.3)\n    return 1", ("assert f() == 1",)),
    Honest("half_a_second_of_work", "def f(n):\n    s = 0\n    for i in range(n): s += i * i % 7\n    return s", ("assert f(1000) == sum(i * i % 7 for i in range(1000))", "assert f(1_000_000) > 0")),
    Honest("sieve", "def f(n):\n    s = bytearray([1]) * n\n    s[:2] = b'\\0\\0'\n    for i in range(2, int(n ** .5) + 1):\n"
           "        if s[i]: s[i * i::i] = bytes(len(range(i * i, n, i)))\n    return sum(s)", ("assert f(1_000_000) == 78498",)),
    Honest("signals_of_its_own", "import signal\ndef f():\n    got = []\n    signal.signal(signal.SIGUSR1, lambda *a: got.append(1))\n"
           "    signal.raise_signal(signal.SIGUSR1)\n    return got", ("assert f() == [1]",)),
    Honest("subprocess_is_imported", "import subprocess, multiprocessing, socket\ndef f(x): return 2 * x", ("assert f(2) == 4",)),
    Honest("big_numbers", "def f(n):\n    r = 1\n    for i in range(1, n + 1): r *= i\n    return r", ("assert f(500) == math.factorial(500)",)),
    Honest("unittest_mock_and_logging", "import logging, unittest\nlogging.basicConfig()\ndef f(x):\n    logging.warning('hm %s', x)\n    return x",
           ("assert f('y') == 'y'",)),
]  # fmt: skip
