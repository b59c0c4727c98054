"""Files with random damage: deterministic mutations, and trials that must end in an error of the program.

    failures = find_failures(1000, trial)

`trial(number)` writes the mutation of this number and reads it. It may raise any `TrainerError`; every other exception,
a crash or a hang is a failure.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from trainer.core.errors import TrainerError

Trial = Callable[[int], object]

TIMEOUT = 60.0
"""Seconds after which a trial counts as hanging. The slowest take less than a second."""
BYTES = (
    *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80", b"\x80", b"\r", b"\n", b"\n\n", b'"', b"\\", b"'"),
    *(b"{", b"}", b"[", b"]", b",", b";", b":", b"\t", b"null", b"NaN", b"1e999", b"-1", b"0", b"\xff\xff\xff\xff"),
    *(b"\xff\xff\xff\x7f", b"9" * 400, b"../", b"/etc/passwd", b"\\ud800", b"[" * 3000, b'{"a":' * 3000, b"(" * 300),
)
"""Inserted by `mutate`: marks of encodings, structure, extreme numbers, names that lead elsewhere, deep nesting."""


def nested(depth: int) -> list:
    """Returns lists within lists."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -1e308, float("inf"), float("nan")),
    *("", " ", "a", "0", "nan", "../x", "/etc/passwd", "a\0b", "\ud800", "e\u0301", "x" * 20_000, "{0.a}", "%s"),
    *([], {}, [[]], [None], [1, 2], ["a"], {"": ""}, {"a": None}, {"bytes": "aGk=", "path": None}, nested(90)),
)
"""Put in the place of a value by `mutate_json`."""


def mutate(data: bytes, number: int) -> bytes:
    """Returns bytes with one to four random changes, the same for the same number."""
    random_state = random.Random(number)
    for _ in range(random_state.randint(1, 4)):
        start = random_state.randrange(len(data) + 1)
        end = min(len(data), start + random_state.choice((1, 1, 2, 4, 16, 256)))
        kind = random_state.randrange(7)
        if kind == 0:
            data = data[:start]
        elif kind == 1:
            data = data[:start] + data[end:]
        elif kind == 2:
            data = data[:end] + data[start:end] + data[end:]
        elif kind == 3:
            data = data[:start] + random_state.choice(BYTES) + data[end:]
        elif kind == 4:
            data = data[:start] + random_state.choice(BYTES) + data[start:]
        elif kind == 5:
            data = data[:start] + random_state.randbytes(end - start) + data[end:]
        elif start < len(data):
            data = data[:start] + bytes([data[start] ^ 1 << random_state.randrange(8)]) + data[start + 1 :]
    return data


def mutate_json(value: Any, number: int) -> bytes:
    """Returns the JSON of a value in which one to three random parts were replaced, removed, copied or renamed.

    Every fourth mutation damages bytes instead.
    """
    random_state = random.Random(number)
    if number % 4 == 3:
        return mutate(json.dumps(value).encode(), number)
    value = json.loads(json.dumps(value))
    for _ in range(random_state.randint(1, 3)):
        value = _mutate_value(value, random_state)
    return json.dumps(value).encode()


def _mutate_value(value: Any, random_state: random.Random) -> Any:
    """Changes a random part of a value: walks down and stops at each level with probability 1/3."""
    if not isinstance(value, dict | list) or not value or random_state.randrange(3) == 0:
        return copy.deepcopy(random_state.choice(VALUES))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = random_state.choice(keys)
    kind = random_state.randrange(6)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[random_state.choice(["", "x", "../x", "\ud800", *value])] = value.pop(key)
    elif kind == 1:
        value.append(copy.deepcopy(value[key]))
    else:
        value[key] = _mutate_value(value[key], random_state)
    return value


def find_failures(count: int, trial: Trial, first: int = 0) -> list[str]:
    """Runs the trials of these numbers in forked children. Returns a description of each that failed.

    A child runs trial after trial, until one crashes or hangs.
    """
    failures: list[str] = []
    number = first
    while number < first + count:
        number += _run_child(range(number, first + count), trial, failures)
    return failures


def _run_child(numbers: range, trial: Trial, failures: list[str]) -> int:
    """Returns the number of trials that ended, with one that crashed or hung."""
    reader, writer = Pipe(duplex=False)
    child = os.fork()
    if not child:
        _run_trials(numbers, trial, writer)
    writer.close()
    ended, reason = 0, ""
    with reader:
        while ended < len(numbers):
            if not reader.poll(TIMEOUT):
                os.kill(child, signal.SIGKILL)
                reason = f"hangs for {TIMEOUT:g} seconds"
                break
            try:
                failure = reader.recv()
            except EOFError:
                break
            if failure:
                failures.append(f"{numbers[ended]}: {failure}")
            ended += 1
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ended < len(numbers):
        failures.append(f"{numbers[ended]}: {reason or f'ends the process with {status}'}")
        ended += 1
    return ended


def _run_trials(numbers: range, trial: Trial, writer: Connection) -> None:
    """Runs trials in this child, sends how each ended, and exits."""
    try:
        for number in numbers:
            failure = ""
            try:
                trial(number)
            except TrainerError:
                pass
            except BaseException:
                failure = traceback.format_exc()
            writer.send(failure)
    finally:  # The child must never continue as a second pytest.
        os._exit(0)
