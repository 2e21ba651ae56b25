"""Function-style judging: the program in one sandbox, its tests in another, plain values between them.

This file is never imported by the judge; both sandboxes run a copy of it. `serve` loads the program
and answers requests; `drive` runs the tests and reports. So a program sees arguments, never an
expected value, and no object of its own decides an `==`: values cross as plain data (numbers,
strings, containers, dates), any other object stays where it is and crosses as a number that names it.
Leaves out: arguments that a program changes in place (the tests keep their own copy).
"""

import ast
import builtins
import collections
import contextlib
import datetime
import decimal
import fractions
import json
import math
import os
import resource
import select
import sys
import types

MESSAGE_CAP = 32 << 20  # bytes of one answer
MAX_DEPTH = 200


# --- values as JSON -----------------------------------------------------------------------------

_SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}
_TEXTUAL = {"decimal": decimal.Decimal, "fraction": fractions.Fraction}
_DICTS = {"counter": collections.Counter, "ordered": collections.OrderedDict}


def encode(value, keep, depth=0):
    """Returns a JSON value; `keep(object)` stores what has no plain form and returns its number."""
    if depth > MAX_DEPTH:
        raise ValueError("value is nested too deeply")
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if -(1 << 60) < value < 1 << 60 else {"int": hex(value)}
    if kind is float:
        return value
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind in (bytes, bytearray):
        return {kind.__name__: list(value)}
    if kind is range:
        return {"range": [hex(part) for part in (value.start, value.stop, value.step)]}
    if kind is list:
        return [encode(part, keep, depth + 1) for part in value]
    for name, sequence in _SEQUENCES.items():
        # A named tuple equals the plain one of its parts.
        if kind is sequence or (sequence is tuple and isinstance(value, tuple)):
            return {name: [encode(part, keep, depth + 1) for part in sequence.__iter__(value)]}
    for name, textual in _TEXTUAL.items():
        if kind is textual:
            return {name: str(value)}
    if kind in (dict, collections.defaultdict, *_DICTS.values()):
        name = next((name for name, known in _DICTS.items() if kind is known), "dict")
        pairs = [[encode(k, keep, depth + 1), encode(v, keep, depth + 1)] for k, v in kind.items(value)]
        return {name: pairs}
    if kind is datetime.datetime:
        return {"datetime": value.isoformat()} if value.tzinfo is None else {"handle": keep(value)}
    if kind is datetime.date:
        return {"date": value.isoformat()}
    if kind is datetime.timedelta:
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    if kind.__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return encode(value.item(), keep, depth + 1)
    if kind is type and getattr(builtins, value.__name__, None) is value:
        return {"type": value.__name__}
    return {"handle": keep(value)}


def decode(value, object_of):
    """The inverse; `object_of(number)` returns what a number names."""
    if isinstance(value, list):
        return [decode(part, object_of) for part in value]
    if not isinstance(value, dict):
        return value
    ((name, content),) = value.items()
    if name == "int":
        return int(content, 16)
    if name == "complex":
        return complex(*content)
    if name in ("bytes", "bytearray"):
        return getattr(builtins, name)(content)
    if name == "range":
        return range(*(int(part, 16) for part in content))
    if name in _SEQUENCES:
        return _SEQUENCES[name](decode(part, object_of) for part in content)
    if name in _TEXTUAL:
        return _TEXTUAL[name](content)
    if name == "dict" or name in _DICTS:
        return _DICTS.get(name, dict)({decode(k, object_of): decode(v, object_of) for k, v in content})
    if name == "datetime":
        return datetime.datetime.fromisoformat(content)
    if name == "date":
        return datetime.date.fromisoformat(content)
    if name == "timedelta":
        return datetime.timedelta(*content)
    if name == "type":
        return getattr(builtins, content)
    if name == "handle":
        return object_of(content)
    raise ValueError(f"unknown form {name!r}")


# --- the program's side ---------------------------------------------------------------------------


def serve(path, seconds):
    """Loads the program, then answers one request a line, each in `seconds` of CPU time. Its own prints
    go to stderr."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    kept = []

    def keep(value):
        kept.append(value)
        return len(kept) - 1

    def answer(message):
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    with open(path, encoding="utf-8", errors="surrogateescape") as source:
        pieces = json.load(source)
    for piece in pieces:  # an exception here ends the process: the program does not load
        exec(compile(piece, "<solution>", "exec"), module.__dict__)

    def look_up(name):
        if name in module.__dict__:
            return module.__dict__[name]
        solver = module.__dict__.get("Solution")
        if isinstance(solver, type) and hasattr(solver, name):
            return getattr(solver(), name)
        raise NameError(f"name {name!r} is not defined")

    actions = {
        "get": look_up,
        "call": lambda function, args, named: function(*args, **named),
        "attribute": getattr,
        "assign": setattr,
        "list": lambda values: list(values),
        "item": lambda values, key: values[key],
        "len": len,
        "bool": bool,
        "text": str,
    }
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for line in requests:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        with contextlib.suppress(ValueError, OSError):
            soft = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
            resource.setrlimit(resource.RLIMIT_CPU, (min(soft, most), most))
        try:
            action, *parts = decode(json.loads(line), kept.__getitem__)
            message = {"value": encode(actions[action](*parts), keep)}
            answer(message)
        except (Exception, SystemExit) as error:
            answer({"error": [type(error).__name__, str(error)[:500]]})


# --- the tests' side ------------------------------------------------------------------------------


class ProgramFailed(BaseException):
    """The program's process ended, answered nonsense or did not answer in time."""


class ProgramError(Exception):
    """The program raised an exception of a kind of its own."""


class Remote:
    """An object that stays with the program. It equals nothing but itself."""

    def __init__(self, link, number):
        self.__dict__.update(_link=link, _number=number)

    def __call__(self, *args, **named):
        return self._link.ask("call", self, list(args), named)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask("attribute", self, name)

    def __setattr__(self, name, value):
        self._link.ask("assign", self, name, value)

    def __iter__(self):
        return iter(self._link.ask("list", self))

    def __getitem__(self, key):
        return self._link.ask("item", self, key)

    def __len__(self):
        return self._link.ask("len", self)

    def __bool__(self):
        return self._link.ask("bool", self)

    def __str__(self):
        return self._link.ask("text", self)


class Link:
    """Requests to the program, each answered within `seconds`."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.answers = os.dup(0)
        self.requests = os.dup(1)
        self.buffer = bytearray()

    def ask(self, *request):
        message = encode(list(request), _number_of)
        data = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while data:
                data = data[os.write(self.requests, data) :]
            answer = json.loads(self._line())
            if "error" in answer:
                kind, text = answer["error"]
            else:
                return decode(answer["value"], lambda number: Remote(self, number))
        except ProgramFailed:
            raise
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            OverflowError,
            ArithmeticError,
            MemoryError,
        ) as error:
            raise ProgramFailed(f"runtime_error: {type(error).__name__}") from None
        known = getattr(builtins, kind, None)
        if isinstance(known, type) and issubclass(known, Exception) and not issubclass(known, UnicodeError):
            raise known(text)
        raise ProgramError(f"{kind}: {text}")

    def _line(self):
        while b"\n" not in self.buffer[-65536:]:
            if not select.select([self.answers], [], [], self.seconds)[0]:
                raise ProgramFailed("time_limit")
            chunk = os.read(self.answers, 65536)
            if not chunk:
                raise ProgramFailed("runtime_error: the program ended")
            self.buffer += chunk
            if len(self.buffer) > MESSAGE_CAP:
                raise ProgramFailed("output_limit")
        line, _, rest = self.buffer.partition(b"\n")
        self.buffer = bytearray(rest)
        return bytes(line)


def _number_of(value):
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"{type(value).__name__} cannot be passed to the program")


def drive(path, mark):
    """Runs the tests of a JSON file against the program; one report a line on stderr, the last "done".

    The file: setup (source), entry (name or ""), tests (sources), cases ([args, expected]),
    seconds (per request), stop_at_first.
    """
    report = os.fdopen(os.dup(2), "w", encoding="utf-8")

    def say(**fields):
        report.write(mark + json.dumps(fields) + "\n")
        report.flush()

    with open(path, encoding="utf-8") as source:
        plan = json.load(source)
    link = Link(plan["seconds"])
    os.dup2(os.open(os.devnull, os.O_RDWR), 2)
    sys.stdout = sys.stderr  # the descriptor of stdout carries the requests
    try:
        # Reference code comes first, so that what the tests call beside the entry is the reference's.
        space = {"__name__": "tests"}
        if plan["reference"]:
            with contextlib.suppress(SyntaxError):
                exec(compile(plan["reference"], "<reference>", "exec"), space)
        compiled = [compile(source, "<test>", "exec") for source in plan["tests"]]
        setup = compile(plan["setup"], "<setup>", "exec")
    except (SyntaxError, ValueError) as error:
        say(bad_tests=f"{type(error).__name__}: {error}")
        return
    names = _free_names([plan["setup"], *plan["tests"]]) - space.keys()
    if plan["entry"]:
        names.add(plan["entry"])

    def prepare():
        for name in sorted(names):
            try:
                space[name] = link.ask("get", name)
            except NameError:
                if name == plan["entry"]:
                    raise
        exec(setup, space)

    failed = _outcome(prepare)
    total = len(plan["tests"]) + len(plan["cases"])
    for number in range(total):
        outcome = failed
        if not outcome and number < len(compiled):
            outcome = _outcome(lambda code=compiled[number]: exec(code, space))
        elif not outcome:
            args, expected = plan["cases"][number - len(compiled)]
            outcome = _outcome(lambda a=args, e=expected: _check_case(space[plan["entry"]], a, e))
        say(test=number, outcome=outcome[0] if outcome else "accepted", detail=outcome[1] if outcome else "")
        if outcome and plan["stop_at_first"]:
            break
        if outcome and outcome[2]:
            failed = outcome
    say(done=True)


def _outcome(action):
    """Returns None, or (outcome, detail, whether the program is gone)."""
    try:
        action()
        return None
    except ProgramFailed as error:
        kind, _, detail = str(error).partition(": ")
        return kind, detail, True
    except AssertionError as error:
        return "wrong_answer", str(error)[:200], False
    except MemoryError as error:
        return "memory", str(error)[:200], False
    except BaseException as error:
        return "runtime_error", f"{type(error).__name__}: {error}"[:200], False


def _check_case(function, args, expected):
    result = function(*args)
    assert _same(result, expected), "another value"


def _same(result, expected):
    """LiveCodeBench's rule (a tuple equals the list of its parts), floats within 1e-6."""
    if isinstance(result, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(result) == len(expected) and all(map(_same, result, expected))
    if isinstance(result, bool) or isinstance(expected, bool):
        return result is expected
    if isinstance(expected, float) and isinstance(result, (int, float)):
        return result == expected or abs(result - expected) <= 1e-6 * max(1.0, abs(expected))
    if isinstance(expected, dict) and isinstance(result, dict):
        plain = {str(key): value for key, value in result.items()}  # JSON's keys are strings
        return plain.keys() == expected.keys() and all(_same(plain[key], expected[key]) for key in plain)
    return result == expected


def _free_names(sources):
    """Names that the tests read and neither they nor Python define."""
    read, defined = set(), set(dir(builtins))
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name):
                (read if isinstance(node.ctx, ast.Load) else defined).add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.arg):
                defined.add(node.arg)
            elif isinstance(node, ast.alias):
                defined.add((node.asname or node.name).split(".")[0])
    return read - defined


if __name__ == "__main__":
    sys.setrecursionlimit(20000)
    with contextlib.suppress(AttributeError):
        sys.set_int_max_str_digits(0)
    serve(sys.argv[2], float(sys.argv[3])) if sys.argv[1] == "serve" else drive(sys.argv[2], sys.argv[3])
