"""The candidate: the process that runs the model's program, and answers the driver's requests one by one.

Nothing here has to withstand the program. Whatever it patches, forges or breaks, it can only change the values that it
returns, and the driver compares them elsewhere.
"""

from __future__ import annotations

import os
import sys
import types

from minir1.sandboxed import wire


def run(requests: int, replies: int) -> None:
    """Serve the requests that arrive on one descriptor, and write the replies to another, until there are no more."""
    requests, replies = os.fdopen(requests, "rb"), os.fdopen(replies, "wb")
    sys.argv[:] = ["program.py"]
    sys.dont_write_bytecode = True
    objects: list = []  # those that were passed to the driver as numbers
    namespace = types.ModuleType("program")  # not __main__: a block for it would read the standard input
    sys.modules["program"] = namespace

    def number(value) -> int:
        objects.append(value)
        return len(objects) - 1

    while True:
        try:
            action, *arguments = wire.receive(requests)
        except EOFError:
            return
        try:
            arguments = [wire.decode(item, objects.__getitem__) for item in arguments]
            result = perform(action, arguments, vars(namespace))
            reply = ["value", wire.encode(result, number)]
        except BaseException as error:  # also SystemExit: a program that ends itself returns nothing
            stop = action == "next" and isinstance(error, StopIteration)
            reply = ["stop"] if stop else ["error", type(error).__name__, str(error)[:300]]
        wire.send(replies, reply)


def perform(action: str, arguments: list, namespace: dict):
    """What the driver asks for, on the program's objects."""
    if action == "run":
        return exec(compile(arguments[0], "<program>", "exec"), namespace)
    if action == "name":
        if arguments[0] not in namespace:
            raise NameError(f"the program does not define {arguments[0]}")
        return namespace[arguments[0]]
    if action == "call":
        function, args, named = arguments
        return function(*args, **named)
    if action == "iter":
        return Iterator(iter(arguments[0]))
    actions = {"next": next, "len": len, "bool": bool, "get": getattr, "set": setattr}
    return actions[action](*arguments) if action != "item" else arguments[0][arguments[1]]


class Iterator:
    """Passed as an object even where the iterator is plain data, such as a list's subclass with __next__."""

    def __init__(self, iterator):
        self.iterator = iterator

    def __next__(self):
        return next(self.iterator)
