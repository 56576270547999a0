# ruff: noqa: E501
"""Programs that attack whoever runs them. Each is the body of a function; `VARIANTS` says how it is packed."""

from __future__ import annotations

from pathlib import Path

HOME = Path.home()
ATTACKS = {
    "fork": "import os\nos.fork()",
    "fork bomb": "import os\nwhile True: os.fork()",
    "vfork through libc": "import ctypes\nassert ctypes.CDLL(None).vfork() > 0",
    "raw clone": "import ctypes\nassert ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) >= 0",
    "raw clone3": "import ctypes\nassert ctypes.CDLL(None).syscall(435, 0, 0) >= 0",
    "spawn": "import os\nos.posix_spawn('/bin/sh', ['sh', '-c', 'sleep 60'], {})",
    "system": "import os\nassert os.system('sleep 60') == 0",
    "subprocess": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)",
    "exec": "import os\nos.execv('/bin/sh', ['sh', '-c', 'true'])",
    "multiprocessing": "import multiprocessing as m\np = m.Process(target=print)\np.start()",
    "thread bomb": "import threading, time\nfor i in range(10**4): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "tcp": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
    "udp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 53))",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('/run/docker.sock')",
    "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "raw socket": "import ctypes\nassert ctypes.CDLL(None).syscall(41, 2, 1, 0) >= 0",
    "download": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1/', timeout=1)",
    "read passwd": "open('/etc/passwd').read()",
    "read home": f"import os\nos.listdir({str(HOME)!r})",
    "list root": "import os\nos.listdir('/')",
    "read environment of parent": "import os\nopen(f'/proc/{os.getppid()}/environ').read()",
    "read memory of parent": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "read memory of parent by a call": "import ctypes, os\nassert ctypes.CDLL(None).process_vm_readv(os.getppid(), 0, 0, 0, 0, 0) >= 0",
    "trace parent": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "read own command line": "open('/proc/self/cmdline').read()",
    "read the tests": "import glob\nassert glob.glob('/home/**/*.py', recursive=True) or glob.glob('/tmp/*')",
    "write tmp": "open('/tmp/e3rl-hostile', 'w').write('x')",
    "write cwd": "open('hostile', 'w').write('x')",
    "write home": f"open({str(HOME / '.hostile')!r}, 'w').write('x')",
    "append to python": "import os\nopen(os.__file__, 'a').write('x')",
    "write shared memory": "open('/dev/shm/e3rl-hostile', 'w').write('x')",
    "symlink": "import os\nos.symlink('/etc/passwd', '/tmp/e3rl-hostile')",
    "hard link": "import os\nos.link(os.__file__, '/tmp/e3rl-hostile')",
    "directory": "import os\nos.mkdir('/tmp/e3rl-hostile')",
    "fifo": "import os\nos.mkfifo('/tmp/e3rl-hostile')",
    "device": "import os\nos.mknod('/tmp/e3rl-hostile')",
    "remove": "import os\nos.remove(os.__file__)",
    "rename": "import os\nos.rename(os.__file__, os.__file__ + 'x')",
    "chmod": "import os\nos.chmod('/tmp', 0)",
    "chown": "import os\nos.chown('/tmp', 1, 1)",
    "touch": "import os\nos.utime('/tmp', (0, 0))",
    "memfd": "import os\nos.memfd_create('x')",
    "shared memory segment": "import ctypes\nassert ctypes.CDLL(None).shmget(7, 4096, 0o1666) >= 0",
    "semaphores": "import ctypes\nassert ctypes.CDLL(None).semget(7, 1, 0o1666) >= 0",
    "kill parent": "import os\nos.kill(os.getppid(), 9)",
    "kill group": "import os\nos.killpg(0, 9)",
    "kill all": "import os\nos.kill(-1, 9)",
    "leave the group": "import os\nos.setsid()",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0",
    "unshare": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "chroot": "import os\nos.chroot('/tmp')",
    "reboot": "import ctypes\nassert ctypes.CDLL(None).reboot(0x1234567) == 0",
    "hostname": "import socket\nsocket.sethostname('x')",
    "clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)",
    "raise limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "limits of parent": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "io_uring": "import ctypes\nassert ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(120)) >= 0",
    "memory": "x = bytearray(10**10)",
    "memory in steps": "x = []\nwhile True: x.append(bytearray(10**7))",
    "write to standard input": "import os\nos.ftruncate(0, 10**9)",
}
"""Each raises when it is refused; one that returns has got through."""

ENDLESS = {
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "caught for ever": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "stop itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "ignored signals": "import signal\nfor s in (signal.SIGTERM, signal.SIGINT, signal.SIGXCPU): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "one long C call": "9 ** 9 ** 9",
    "catastrophic expression": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
    "read for ever": "import os\nr, w = os.pipe()\nos.read(r, 1)",
}
FLOODS = {
    "output": "while True: print('x' * 1000)",
    "errors": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "all descriptors": "import os\nwhile True:\n    for d in range(1, 64):\n        try: os.write(d, b'x' * 1000)\n        except OSError: pass",
}
EXITS = {
    "exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "abort": "import os\nos.abort()",
    "crash": "import ctypes\nctypes.string_at(0)",
    "stack": "import sys\nsys.setrecursionlimit(10**9)\ndef g(): g()\ng()",
    "kill itself": "import os\nos.kill(os.getpid(), 9)",
    "close all": "import os\nos.closerange(0, 64)",
}
CHEATS = {
    "everything is equal": "class E:\n    __eq__ = lambda s, o: True\n    __repr__ = lambda s: 'E()'\n    __add__ = __radd__ = lambda s, o: s\n",
    "frames": "import sys\nf, found = sys._getframe(), []\nwhile f:\n    found += map(repr, f.f_locals.values())\n    f = f.f_back\nassert any('4817' in x for x in found)",
    "garbage": "import gc\nassert any('4817' in repr(x) for x in gc.get_objects() if isinstance(x, (str, dict)))",
    "standard input": "import sys\nassert '4817' in sys.stdin.read()",
}
"""They look for what the test expects, 4817."""


def _indented(body: str, by: str = "    ") -> str:
    return "\n".join(by + line for line in body.splitlines())


RIGHT = "def f(x):\n    return x + 1\n"
VARIANTS = {
    "bare": lambda body: f"{body}\n",
    "in the call": lambda body: f"def f(x):\n{_indented(body)}\n    return 0\n",
    "caught": lambda body: (
        f"def attack():\n{_indented(body)}\ntry:\n    attack()\nexcept BaseException:\n    pass\ndef f(x): return 0\n"
    ),
    "in a thread": lambda body: (
        f"import threading\ndef attack():\n{_indented(body)}\nt = threading.Thread(target=attack)\nt.start()\nt.join()\n"
        "def f(x): return 0\n"
    ),
}
"""None of these solves the problem, whether the attack works or not."""


def refused(body: str) -> str:
    """The attack, then a right solution if it was refused and a wrong one if it got through."""
    return (
        f"def attack():\n{_indented(body)}\ntry:\n    attack()\n    through = True\nexcept BaseException:\n    through = False\n"
        "def f(x): return 0 if through else x + 1\n"
    )


ACCIDENTS = {
    "ends the process": "import os; os._exit(0)",
    "crashes": "import ctypes; ctypes.string_at(0)",
    "kills itself": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "sleeps": "import time; time.sleep(60)",
    "one long call that no thread gets past": "9 ** 9 ** 9",
    "catches everything": "exec('while True:\\n  try:\\n    while True: pass\\n  except BaseException: pass')",
    "answers without end": "return 'x' * 2 ** 25",
    "closes everything": "import os; os.closerange(3, 256)",
    "writes into the pipe": "import os; [os.write(d, b'\\0' * 64) for d in range(3, 64) if os.path.exists(f'/proc/self/fd/{d}')]",
}
"""What the code of a tool may do, in a process of its own: its trajectory has no reward, all others have theirs."""
