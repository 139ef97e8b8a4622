"""Plain data between driver and candidate, as lines of JSON. Never pickle, which runs what it reads.

None, bool, float, str and small int are themselves in JSON; everything else is [tag, content]. An object that is none
of these is kept by its owner, and only its number is passed: ["object", number].
"""

from __future__ import annotations

import json
import sys

LONGEST = 2**25  # characters of one message
SMALL = 2**63
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
BYTES = {"bytes": bytes, "bytearray": bytearray}
NUMBERS = {"Fraction": "fractions", "Decimal": "decimal"}  # and their modules


def send(stream, message: list) -> None:
    """Write one message. `stream` is a binary file."""
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def receive(stream) -> list:
    """Read one message. EOFError if there is no more, ValueError if it is too long or no JSON."""
    line = stream.readline(LONGEST)
    if not line:
        raise EOFError("the program ended")
    if not line.endswith(b"\n"):
        raise ValueError("the message is too long, or the program ended within it")
    return json.loads(line)


def encode(value, number):
    """`value` for JSON. An instance of a subclass, such as an IntEnum or a Counter, is passed as its plain base.

    number: a function from any other object to its number, or an exception.
    """
    kind = type(value)  # not isinstance, which believes __class__
    if value is None or kind is bool:
        return value
    if issubclass(kind, str):
        return str.__str__(value)
    if issubclass(kind, float):
        return float.__pos__(value)
    if issubclass(kind, int):
        value = int.__pos__(value)
        return value if -SMALL < value < SMALL else ["int", hex(value)]
    if issubclass(kind, complex):
        return ["complex", [complex.__pos__(value).real, complex.__pos__(value).imag]]
    for tag, base in SEQUENCES.items():
        if issubclass(kind, base):
            return [tag, [encode(item, number) for item in base.__iter__(value)]]
    if issubclass(kind, dict):
        return ["dict", [[encode(key, number), encode(item, number)] for key, item in dict.items(value)]]
    for tag, base in BYTES.items():
        if issubclass(kind, base):
            return [tag, base.hex(value)]
    if kind is range:
        return ["range", [encode(part, number) for part in (value.start, value.stop, value.step)]]
    module = NUMBERS.get(kind.__name__)
    if module in sys.modules and kind is getattr(sys.modules[module], kind.__name__):
        return [kind.__name__, str(value)]
    return ["object", number(value)]


def decode(item, thing):
    """The value, of exact builtin types. thing: from the number of an object to what stands for it here.

    ValueError or TypeError if `item` is not what `encode` returns.
    """
    if not isinstance(item, list):
        if isinstance(item, dict):
            raise ValueError("an object of JSON")
        return item
    tag, content = item
    if tag in SEQUENCES:
        return SEQUENCES[tag](decode(part, thing) for part in content)
    if tag == "dict":
        return {decode(key, thing): decode(value, thing) for key, value in content}
    if tag == "int":
        return int(content, 16)
    if tag == "complex":
        return complex(*content)
    if tag in BYTES:
        return BYTES[tag].fromhex(content)
    if tag == "range":
        return range(*(decode(part, thing) for part in content))
    if tag in NUMBERS:
        return getattr(__import__(NUMBERS[tag]), tag)(content)
    if tag == "object":
        return thing(content)
    raise ValueError(f"an unknown tag {str(tag)[:20]!r}")
