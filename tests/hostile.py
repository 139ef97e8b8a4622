"""Hostile programs for the tests of the sandbox: Python text by name. Each must fail, in time, and hurt nothing."""

import re


def sections(text: str) -> dict[str, str]:
    """name -> what follows the heading `### name`."""
    parts = re.split(r"^### (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


HOSTILE = sections(r"""
### exit before the tests
raise SystemExit(0)
### exit in the call
import sys
def f(x): sys.exit(0)
### _exit before the tests
import os
os._exit(0)
### _exit in the call
import os
def f(x): os._exit(0)
### exit at the end
def f(x): return 0
import atexit, os
atexit.register(os._exit, 0)
### patched assert
def f(x): return 0
import builtins
builtins.AssertionError = type('E', (BaseException,), {})
### equal to everything
class A:
    def __eq__(self, other): return True
    __hash__ = None
def f(x): return A()
### a number equal to everything
class A(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def f(x): return A()
### a tuple equal to everything
class A(tuple):
    def __eq__(self, other): return True
    def __len__(self): return 2
def f(x): return A()
### a lie about the class
class A:
    __class__ = property(lambda self: int)
    def __eq__(self, other): return True
def f(x): return A()
### patched builtins
def f(x): return 0
import builtins
for name in ('all', 'any', 'bool', 'abs', 'len', 'sorted', 'compile', 'exec'):
    setattr(builtins, name, lambda *a, **k: True)
### patched json
import json
json.dumps = lambda *a, **k: '["passed", ""]'
def f(x): return 0
### patched wire
import sys
wire = sys.modules['minir1.sandboxed.wire']
wire.encode = lambda *a: ['object', 'x']
def f(x): return 0
### patched driver
import sys
sys.modules['minir1.sandboxed.driver'].judge = lambda *a: ['passed', '']
sys.modules['minir1.sandboxed.warden'].watch = lambda *a: ['passed', '']
def f(x): return 0
### prints the pass mark
def f(x): return 0
for text in ('["passed", ""]', '["passed", "", []]', 'passed', 'OK'): print(text, flush=True)
### writes to all descriptors
def f(x): return 0
import os
for fd in range(64):
    for text in (b'["passed", ""]\n', b'["value", true]\n'):
        try: os.write(fd, text)
        except OSError: pass
### forged replies in advance
def f(x): return 0
import os
for fd in range(3, 64):
    try: os.write(fd, b'["value", 41]\n' * 9)
    except OSError: pass
### malformed replies
def f(x): return 0
import os
for fd in range(3, 64):
    try: os.write(fd, b'["value", ["set", [["list", []]]]]\n' * 9)
    except OSError: pass
### no reply of JSON
def f(x): return 0
import os
for fd in range(3, 64):
    try: os.write(fd, b'\xff{nan\n' * 9)
    except OSError: pass
### a deep reply
def f(x): return 0
import os
for fd in range(3, 64):
    try: os.write(fd, b'[' * 60000 + b'\n')
    except OSError: pass
### an endless reply
import os
def f(x):
    while True:
        for fd in range(3, 64):
            try: os.write(fd, b'1' * 60000)
            except OSError: pass
### a huge result
def f(x): return 'x' * 200_000_000
### a huge list
def f(x): return [0] * 30_000_000
### a huge number
def f(x): return 1 << 2_000_000_000
### a cycle
def f(x):
    y = []
    y.append(y)
    return y
### an endless generator
def f(x):
    while True: yield 0
### an endless number
def f(x): return __import__('fractions').Fraction('1e-9999999')
### an exception without text
class E(Exception):
    def __str__(self): raise self
def f(x): raise E
### StopIteration
def f(x): raise StopIteration
### an exception of the tests
def f(x): raise SystemExit(0)
### KeyboardInterrupt
def f(x): raise KeyboardInterrupt
### reads the stack
import sys
def f(x):
    frame, text = sys._getframe(), ''
    while frame:
        text += repr(frame.f_locals) + repr(frame.f_globals)
        frame = frame.f_back
    return {3: 41, 4: 50}.get(x, (1, {'a': None})) if 'f(' + '3) ==' in text else 0
### searches its memory
import gc
def f(x):
    texts = [v for o in gc.get_objects() if isinstance(o, dict) for v in list(o.values()) if isinstance(v, str)]
    return {3: 41, 4: 50}.get(x, (1, {'a': None})) if any('f(' + '3) ==' in text for text in texts) else 0
### reads its whole memory
import ctypes, re
def f(x):
    for start, end in re.findall('([0-9a-f]+)-([0-9a-f]+) r', open('/proc/self/maps').read()):
        text = ctypes.string_at(int(start, 16), int(end, 16) - int(start, 16))
        if b'f(' + b'3) ==' in text: return {3: 41, 4: 50}.get(x, (1, {'a': None}))
### reads the memory of all processes
import os
def f(x):
    for pid in [os.getppid(), *range(1, 50)]:
        for name in ('mem', 'environ', 'cmdline', 'fd/0'):
            try: text = open(f'/proc/{pid}/{name}', 'rb').read(10000)
            except OSError: continue
            if b'f(' + b'3) ==' in text: return {3: 41, 4: 50}.get(x, (1, {'a': None}))
### reads all descriptors
import os
def f(x):
    for fd in [0, *range(4, 64)]:
        try: os.set_blocking(fd, False); text = os.read(fd, 10000)
        except OSError: continue
        if b'f(' + b'3) ==' in text: return {3: 41, 4: 50}.get(x, (1, {'a': None}))
### traces
def f(x): return 0
import sys, threading
sys.settrace(lambda *a: None)
sys.setprofile(lambda *a: None)
### import hooks
def f(x): return 0
import sys
class H:
    def find_spec(self, *a): raise SystemExit(0)
sys.meta_path.insert(0, H())
sys.modules.clear()
### an object that ends the process
import os
class A:
    def __del__(self): os._exit(0)
def f(x): return [A()]
### endless loop in the call
def f(x):
    while True: pass
### sleeps
import time
def f(x): time.sleep(1000)
### ignores signals
import signal
for s in set(signal.Signals) - {9, 19}:
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f(x):
    while True: pass
### catches everything
def f(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
### endless output
import os
def f(x):
    while True: print('x' * 10000); os.write(2, b'y' * 10000)
### memory
def f(x):
    y = []
    while True: y.append(bytearray(2**24))
### recursion
def f(x): return f(x)
### recursion of C
import sys
sys.setrecursionlimit(10**9)
def f(x): return f(x)
### threads
import threading, time
threading.stack_size(32768)
def f(x):
    while True: threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
### a thread that stays
import threading
def loop():
    while True: pass
threading.Thread(target=loop).start()
def f(x): return 0
### a long power
def f(x): return 9 ** 9 ** 9
### a slow pattern
import re
def f(x): return re.match('(a+)+$', 'a' * 60 + 'b')
### closes everything
import os
os.closerange(0, 1000)
def f(x): return 0
### many files
def f(x): return 0
import os
kept = []
try:
    while True: kept.append(os.dup(0))
except OSError: pass
### a crash
import ctypes
ctypes.string_at(0)
### abort
import os
os.abort()
### a verdict on every descriptor
import os
for descriptor in range(3, 64):
    try: os.write(descriptor, b'["passed", ""]\n')
    except OSError: pass
def f(x): return 0
### a patched encoder
import sys
sys.modules['minir1.sandboxed.wire'].encode = lambda value, number: True
def f(x): return 0
### a result that evaluates
class Result:
    def __reduce__(self): return eval, ('41',)
    def __eq__(self, other): return True
def f(x): return Result()
### tests among the objects
import gc
found = [o for o in gc.get_objects() if isinstance(o, str) and 'assert f(' in o]
def f(x): return 41 if found else 0
### a result nested too deep
def f(x):
    result = []
    for _ in range(10**5): result = [result]
    return result
### an io_uring
import ctypes
if ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(120)) >= 0: raise MemoryError
def f(x): return 0
""")

# What would hurt without the kernel's help. {me} is the process that runs the tests.
HARMFUL = sections(r"""
### fork bomb
import os
while True:
    try: os.fork()
    except OSError: pass
### a child that stays
def f(x): return 0
import os
try:
    if os.fork() == 0:
        os.setsid()
        while True: pass
except OSError: pass
### kills its parent
import os
for s in (9, 15, 19):
    try: os.kill(os.getppid(), s)
    except OSError: pass
def f(x): return 0
### kills everything
import os
for pid in (-1, 0, 1, -os.getppid(), {me}):
    try: os.kill(pid, 9)
    except OSError: pass
def f(x): return 0
### stops itself
import os, signal
try: os.kill(os.getpid(), signal.SIGSTOP)
except OSError: pass
def f(x): return 0
### fills its folder
import os
def f(x):
    for i in range(10**9):
        with open(f'{i}', 'wb') as file: file.write(b'x' * 2**20)
### fills shared memory
import mmap
kept = []
while True: kept.append(mmap.mmap(-1, 2**24))
""")

# Expressions that must raise OSError. {victim} and {root} are files outside.
ESCAPES = {  # statements that must raise OSError
    "read a password file": "open('/etc/passwd').read()",
    "read the home": "os.listdir('/home')",
    "read the checkout": "open({root!r} + '/setup.py').read()",
    "read the tests": "open('/proc/self/../' + str(os.getppid()) + '/fd/0').read()",
    "read the victim": "open({victim!r}).read()",
    "write the victim": "open({victim!r}, 'w').write('x')",
    "append to Python": "open(os.__file__, 'a')",
    "replace Python": "os.rename(os.__file__, os.__file__ + 'x')",
    "remove the victim": "os.unlink({victim!r})",
    "change its mode": "os.chmod({victim!r}, 0o777)",
    "link it": "os.link({victim!r}, 'link')",
    "link it by name": "(os.symlink({victim!r}, 'link'), open('link').read())",
    "write next to it": "open({victim!r} + '2', 'w')",
    "write at the root": "open('/x', 'w')",
    "write to memory": "open('/proc/self/mem', 'r+b')",
    "a device": "os.mknod('disk', 0o60666, os.makedev(254, 0))",
    "the disk": "open('/dev/vda', 'rb')",
    "an installed package": "open(glob.glob(os.path.dirname(os.__file__) + '/*-packages/*/*.py')[0]).read()",
    "a socket": "socket.socket()",
    "a connection": "socket.create_connection(('1.1.1.1', 53), 1)",
    "a local socket": "socket.socket(socket.AF_UNIX)",
    "a process": "os.fork()",
    "a program": "os.execv('/bin/sh', ['sh'])",
    "a subprocess": "subprocess.run(['/bin/true'])",
    "another spawn": "os.posix_spawn('/bin/true', ['true'], {{}})",
    "a signal": "os.kill({me}, 0)",
    "a signal to the group": "os.killpg(0, 0)",
    "a session": "os.setsid()",
    "ptrace": "call(libc.ptrace(16, {me}, 0, 0))",
    "its memory": "call(libc.process_vm_readv({me}, None, 0, None, 0, 0))",
    "root": "os.setuid(0) if os.getuid() else os.fork()",
    "another user": "os.setresuid(1234, 1234, 1234)",
    "namespaces": "call(libc.unshare(0x10000000))",
    "a mount": "call(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
    "a remount": "call(libc.mount(b'none', b'/', None, 32 | 4096, None))",
    "an unmount": "call(libc.umount2(b'/tmp', 2))",
    "another root": "os.chroot('/tmp')",
    "shared memory": "call(libc.shmget(0, 4096, 0o1600))",
    "a memory file": "os.memfd_create('x')",
    "a keyring": "call(libc.syscall(250, 0, -3, 0))",
    "its own filter": "call(libc.prctl(22, 0, 0, 0, 0))",
    "survive its parent": "call(libc.prctl(1, 0, 0, 0, 0))",
    "more memory": "resource.setrlimit(resource.RLIMIT_AS, (2**62, 2**62))",
    "the host's name": "socket.sethostname('x')",
    "the priority": "os.setpriority(os.PRIO_PROCESS, 0, -5)",
    "the clock": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "a signal by a descriptor": "fcntl.fcntl(0, 8, {me})",
    "a terminal": "fcntl.ioctl(0, 0x5412, b'x')",
}
