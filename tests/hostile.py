"""Programs that attack the judge, with the verdict each must get; run as a script it judges them.

    TOKEN=SECRET python tests/hostile.py [unsafe] < names (JSON list) > report (JSON)

As a script it needs nothing but Python, so that it can run as root and as an ordinary user. It reports
the verdicts, and whether anything outside changed, any process was left, or the judge's memory grew.
"""

import dataclasses
import json
import os
import resource
import secrets
import socket
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

ONE = [{"input": "41\n", "output": "42\n"}]
CLEAN = [{"input": "", "output": "clean\n"}]
ADD = {"test_list": ["assert add(1, 2) == 3", "assert add(4, 5) == 9"]}
CPP_ADD = {
    "declaration": "int add(int a,int b){\n",
    "prompt": "int add(int a,int b){\n",
    "test": "#undef NDEBUG\n#include<assert.h>\nint main(){\n assert (add(1,2)==3);\n}\n",
}
ANSWER = "print(int(input()) + 1, flush=True)\n"


def py(code):
    return f"Here it is.\n```python\n{code}\n```\n"


def cpp(code, close="```"):
    return f"Here it is.\n```c++\n{code}\n{close}"


# name -> (response, tests, wanted detail or outcome). CANARY, PORT and SECRET are filled in when run.
PROGRAMS = {
    # the list of the authors' judge
    "hard_coded": (py("print(42)"), [*ONE, {"input": "1\n", "output": "2\n"}], "wrong_answer"),
    "no_tests": (py("print(42)"), {"inputs": [], "outputs": []}, "gold_unparseable"),
    "malformed_tests": (py("print(42)"), {"inputs": ["1", "2"], "outputs": ["1"]}, "gold_unparseable"),
    "test_without_assert": (py("def add(a, b): return 0"), {"test_list": ["add(1, 2)"]}, "gold_unparseable"),
    "kill_parent": (
        py(
            "import os\nfor pid in (os.getppid(), 1, -1):\n try: os.kill(pid, 9)\n except OSError: pass\nprint('clean')"
        ),
        CLEAN,
        "correct",
    ),
    "read_environ": (
        py(
            "import glob\nseen = ''\nfor p in glob.glob('/proc/*/environ'):\n"
            " try: seen += open(p).read()\n except OSError: pass\n"
            "print('leak' if 'SECRET' in seen else 'clean')"
        ),
        CLEAN,
        "correct",
    ),
    "write_outside": (
        py(
            "import os\ndone = []\nfor f in ('CANARY', '/', '/etc', '/usr', '/box', '/root', '/home', '/var/tmp'):\n"
            " try: open(f + '/PWNED', 'w').write('x'); done.append(f)\n except OSError: pass\n"
            "print(done or 'clean')"
        ),
        CLEAN,
        "correct",
    ),
    "output_flood": (py("while True: print('x' * 100000)"), ONE, "output_limit"),
    "child_outlives": (
        py(ANSWER + "import os, time\nif not os.fork():\n os.setsid(); os.close(1); os.close(2); time.sleep(60)"),
        ONE,
        "correct",
    ),
    "child_holds_stdout": (py(ANSWER + "import os, time\nif not os.fork(): time.sleep(60)"), ONE, "correct"),
    "state_file": (
        py(
            "import os\nspots = ('state', '/tmp/state', '/dev/shm/state', '/var/tmp/state')\n"
            "print('seen' if any(map(os.path.exists, spots)) else 'clean')\n"
            "for s in spots:\n try: open(s, 'w').write('1')\n except OSError: pass"
        ),
        CLEAN * 2,
        "correct",
    ),
    "network": (
        py(
            "import socket\nopen_to = []\nfor host in (('127.0.0.1', PORT), ('1.1.1.1', 53)):\n"
            " try: socket.create_connection(host, 0.5); open_to.append(host)\n except OSError: pass\n"
            "print(open_to or 'clean')"
        ),
        CLEAN,
        "correct",
    ),
    "not_utf8": (py("import sys\nsys.stdout.buffer.write(b'4\\xff2\\n')"), ONE, "wrong_answer"),
    "right_then_exit_1": (py(ANSWER + "raise SystemExit(1)"), ONE, "runtime_error"),
    "cpp_is_not_c": (
        cpp(
            "#include <iostream>\nclass A{public:int f(int n){return n+1;}};\n"
            "int main(){int n;std::cin>>n;std::cout<<A().f(n);}"
        ),
        ONE,
        "correct",
    ),
    "unclosed_cpp_fence": (
        cpp('#include <cstdio>\nint main(){int n;scanf("%d",&n);printf("%d",n+1);}', close=""),
        ONE,
        "correct",
    ),
    "compile_bomb": (
        cpp(
            "template<int n> struct A{A<n-1> a; A<n-2> b;};\n#define R(x) x x x x x x x x\n"
            "int main(){ static int big[1<<28]={1}; return big[0]; }\nint z[1u<<29]={2};"
        ),
        ONE,
        "compile_error",
    ),
    "fork_bomb": (py("import os\nwhile True:\n try: os.fork()\n except OSError: pass"), ONE, "time_limit"),
    "huge_allocation": (py("x = bytearray(100 << 30)\n" + ANSWER), ONE, "memory"),
    "full_disk": (
        py("n = 0\nwhile True:\n open(str(n), 'wb').write(b'x' * (1 << 20)); n += 1"),
        ONE,
        "runtime_error",
    ),
    "symlinks": (
        py(
            "import os\ndone = []\nfor f in ('/etc/passwd', '/etc/shadow', '/etc/hostname', 'CANARY/kept'):\n"
            " os.symlink(f, 'link')\n"
            " try: open('link').read(); done.append('read ' + f)\n except OSError: pass\n"
            " try: open('link', 'a').write('x'); done.append('wrote ' + f)\n except OSError: pass\n"
            " os.remove('link')\nprint(done or 'clean')"
        ),
        CLEAN,
        "correct",
    ),
    "include_passwd": (cpp('#include "/etc/passwd"\nint main(){}'), ONE, "compile_error"),
    "ignores_sigterm": (
        py(
            "import signal, time\nfor s in range(1, 32):\n try: signal.signal(s, signal.SIG_IGN)\n"
            " except OSError: pass\nwhile True: time.sleep(1)"
        ),
        ONE,
        "time_limit",
    ),
    "never_reads": (py("print(42)"), [{"input": "x" * (20 << 20), "output": "42"}], "correct"),
    # our own
    "include_device": (cpp('#include "/dev/zero"\nint main(){}'), ONE, "compile_error"),
    "incbin": (
        cpp('asm(".incbin \\"/etc/passwd\\"");\nint main(){}'),
        ONE,
        "compile_error",
    ),
    "daemon": (
        py(
            ANSWER + "import os, signal, time\nif not os.fork():\n os.setsid()\n"
            " if not os.fork():\n  for s in range(1, 32):\n   try: signal.signal(s, signal.SIG_IGN)\n"
            "   except OSError: pass\n  while True: pass"
        ),
        ONE,
        "correct",
    ),
    "memory_by_children": (
        py(
            "import os, time\nfor i in range(12):\n"
            " if not os.fork():\n  x = bytearray(60 << 20)\n"
            "  for j in range(0, len(x), 4096): x[j] = 1\n  time.sleep(9)\n"
            "time.sleep(9)"
        ),
        ONE,
        "memory",
    ),
    "memory_by_files": (
        py(
            "import mmap, os\nkeep = []\nfor i in range(99):\n f = os.open(f'/dev/shm/{i}', os.O_RDWR | os.O_CREAT)\n"
            " os.write(f, b'x' * (1 << 20)); keep.append(f)"
        ),
        ONE,
        "runtime_error",
    ),
    "stops_itself": (py("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"), ONE, "time_limit"),
    "silent_sleeper": (py("import os, time\nos.closerange(0, 64)\ntime.sleep(60)"), ONE, "time_limit"),
    "stderr_flood": (py("import os\nwhile True: os.write(2, b'x' * 65536)"), ONE, "output_limit"),
    "endless_recursion": (
        cpp("int f(int n){volatile char a[4096]; a[n%4096]=n; return f(n+1)+a[7];}\nint main(){return f(0);}"),
        ONE,
        "runtime_error",
    ),
    "thread_bomb": (
        py(
            "import threading, time\nfor i in range(999):\n"
            " threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
        ),
        ONE,
        "runtime_error",
    ),
    "new_namespace": (
        py("import ctypes\nc = ctypes.CDLL(None)\nprint('clean' if c.unshare(0x10000000) else 'made a namespace')"),
        CLEAN,
        "correct",
    ),
    "raises_its_limits": (
        py(
            "import resource as r\ntry:\n r.setrlimit(r.RLIMIT_AS, (1 << 60, 1 << 60)); print('raised')\n"
            "except (ValueError, OSError): print('clean')"
        ),
        CLEAN,
        "correct",
    ),
    "poses_as_sandbox": (
        py("import os\nos.write(2, b'bwrap: cannot start\\n')\nos._exit(1)"),
        ONE,
        "runtime_error",
    ),
    "always_equal": (
        py(
            "class Yes:\n def __eq__(self, other): return True\n def __bool__(self): return True\n"
            "def add(a, b): return Yes()"
        ),
        ADD,
        "wrong_answer",
    ),
    "always_equal_number": (
        py(
            "class Yes(int):\n def __eq__(self, other): return True\n __hash__ = int.__hash__\n"
            "def add(a, b): return Yes(0)"
        ),
        ADD,
        "wrong_answer",
    ),
    "leaves_before_tests": (py("import os\ndef add(a, b): return 0\nos._exit(0)"), ADD, "runtime_error"),
    "leaves_in_test": (py("import os\ndef add(a, b): os._exit(0)"), ADD, "runtime_error"),
    "patches_the_judge": (
        py(
            "import builtins, json, sys\nbuiltins.AssertionError = ValueError\njson.loads = lambda s: ['get', 'add']\n"
            "sys.modules['__main__'].encode = lambda *a: True\ndef add(a, b): return 0"
        ),
        ADD,
        "wrong",
    ),
    "forges_answers": (
        py(
            'import os\nfor fd in range(3, 20):\n try: os.write(fd, b\'{"done": true, "value": 3}\\n\' * 9)\n'
            " except OSError: pass\ndef add(a, b): return 0"
        ),
        ADD,
        "wrong",
    ),
    "reads_the_tests": (
        py(
            "import glob, os\nseen = ''\nfor root in ('/box', '/tmp', '/tmp/*/box', '/proc/self', '/proc/1'):\n"
            " for p in glob.glob(root + '/*'):\n"
            "  try: seen += open(p, errors='replace').read(1 << 20) if os.path.isfile(p) else ''\n  except OSError: pass\n"
            "def add(a, b): return a + b if 'assert ' + 'add' not in seen else 'leak'"
        ),
        ADD,
        "correct",
    ),
    "huge_answer": (py("def add(a, b): return [0] * (50 << 20)"), ADD, "wrong"),
    "hangs_in_function": (py("def add(a, b):\n while True: pass"), ADD, "time_limit"),
    "cpp_leaves_early": (
        cpp("#include <unistd.h>\nstruct S{S(){_exit(0);}} s;\nint add(int a,int b){return 0;}"),
        CPP_ADD,
        "runtime_error",
    ),
    "cpp_redefines_assert": (
        cpp("#define assert(x)\n#undef NDEBUG\nint add(int a,int b){return 0;}"),
        CPP_ADD,
        "wrong_answer",
    ),
}

# What needs bubblewrap: limits alone, under the unsafe switch, do not stop these. Everything else they do.
NEEDS_SANDBOX = {
    "kill_parent": "signals reach other processes of the same user, the judge among them",
    "read_environ": "an ordinary user's programs read the judge's environment (as root they run as another user)",
    "write_outside": "whatever the user may write can be written",
    "state_file": "files in shared folders pass from test to test",
    "reads_the_tests": "a program can search /tmp for the tests of its function",
    "network": "connections are open",
    "full_disk": "each file is limited, their number is not",
    "memory_by_files": "files in /dev/shm take memory that no limit counts",
    "symlinks": "whatever the user may read can be read",
    "include_passwd": "the compiler reads what the user may read",
    "incbin": "so does the assembler",
    "new_namespace": "a program may make namespaces where the system allows it",
}
COVERED_WITHOUT_SANDBOX = tuple(name for name in PROGRAMS if name not in NEEDS_SANDBOX)


def marked_processes(mark):
    """Process ids whose environment holds the mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                pass
    return found


def main():
    from sdzero_jax.verifiers import sandbox
    from sdzero_jax.verifiers.code import Limits, judge_code, judge_report

    names = json.load(sys.stdin)
    unsafe = "unsafe" in sys.argv
    if unsafe:
        sandbox._VARIANTS = ()  # as if bubblewrap were not installed
    mark = secrets.token_hex(16)
    sandbox.ENVIRONMENT["MARK"] = mark
    limits = Limits(
        time_s=1.0,
        wall_factor=1.0,
        memory_mb=256,
        output_bytes=4 << 20,
        file_bytes=8 << 20,
        compile_s=10.0,
        compile_memory_mb=1024,
        processes=32,
        unsafe_without_sandbox=unsafe,
    )
    # Programs that a busy machine must not stop by time: filling memory takes a while there, and so may starting.
    patient = dataclasses.replace(limits, time_s=5.0, wall_factor=3.0)
    canary = Path.cwd()
    kept = sorted((p.name, p.read_bytes()) for p in canary.iterdir())
    listener = socket.create_server(("127.0.0.1", 0))
    port = str(listener.getsockname()[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = {"uid": os.getuid(), "verdicts": {}}

    # A positive control: the search for left processes does see one that runs.
    used = sandbox.get_sandbox(unsafe=unsafe)
    bounds = sandbox.Bounds(5, 5, 256, 16, 64, 1000, 1000)
    waiting = time.monotonic() + 5
    with used.start(["/bin/sleep", "5"], bounds):
        out["control"] = 0
        while not out["control"] and time.monotonic() < waiting:
            out["control"] = len(marked_processes(mark.encode()))
    for name in names:
        response, tests, wanted = PROGRAMS[name]
        for old, new in (("CANARY", str(canary)), ("PORT", port)):
            response = response.replace(old, new)
        started = time.monotonic()
        report = judge_report(response, tests, limits=patient if wanted == "memory" else limits)
        seconds = time.monotonic() - started
        left = marked_processes(mark.encode())
        good = judge_code(py(ANSWER), ONE, limits=patient).outcome
        now = sorted((p.name, p.read_bytes()) for p in canary.iterdir())
        verdict = report.verdict
        out["verdicts"][name] = {
            "outcome": verdict.outcome,
            "detail": verdict.detail,
            "message": report.message,
            "left": left,
            "unchanged": now == kept,
            "next": good,
            "seconds": seconds,
        }
        kept = now  # each program answers for itself
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps(out | {"grown_kib": grown, "folders": used.options is None}))


if __name__ == "__main__":
    main()
