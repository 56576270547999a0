"""Runs inside the sandbox: confines its own process, then runs one program. Standard library only.

`e3rl.environments.sandbox` runs it as ``python -I -S -B jail.py DESCRIPTOR`` with a job as JSON on standard input: ``source``,
``stdin``, ``calls`` (expressions), ``memory``, ``seconds``. What the program prints goes to standard output; the value of each
call goes to the descriptor, one ``repr`` a line. The program can read Python's standard library and nothing else, write no
file, open no socket, and start or signal no process: Landlock guards files, a seccomp filter the rest.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import sysconfig
import traceback

READY, REFUSED = b"\x06", b"\x15"

_LIBC = ctypes.CDLL(None, use_errno=True)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_DENIED = {  # system calls that are refused: (x86_64, aarch64); -1: not there
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "bind": (49, 200), "listen": (50, 201), "accept4": (288, 242),
    "socketpair": (53, 199), "fork": (57, -1), "vfork": (58, -1), "execve": (59, 221), "execveat": (322, 281),
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "ptrace": (101, 117),
    "setpgid": (109, 154), "setsid": (112, 157), "setrlimit": (160, 164), "chmod": (90, -1), "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "chown": (92, -1), "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54), "utime": (132, -1),
    "utimes": (235, -1), "futimesat": (261, -1), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "chroot": (161, 51),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "unshare": (272, 97), "setns": (308, 268),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "perf_event_open": (298, 241), "bpf": (321, 280),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "memfd_create": (319, 279), "userfaultfd": (323, 282),
    "pidfd_send_signal": (424, 424), "io_uring_setup": (425, 425), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "mount_setattr": (442, 442),
    "memfd_secret": (447, 447), "setxattrat": (463, 463), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "flock": (73, 32),
}  # fmt: skip
_CLONE, _CLONE3, _PRLIMIT, _SIGNALS = (56, 220), (435, 435), (302, 261), ((62, 129), (200, 130), (234, 131))
_CLONE_THREAD = 0x10000
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06


class Unavailable(Exception):
    """This kernel can't confine a process."""


def seccomp_filter(machine: str, pid: int) -> list[tuple[int, int, int, int]]:
    """The filter's instructions: (code, jump if true, jump if false, operand)."""
    column, audit = _ARCHITECTURES[machine]
    code = [(_LD, 0, 0, 4), (_JEQ, 1, 0, audit), (_RET, 0, 0, _KILL), (_LD, 0, 0, 0)]
    if machine == "x86_64":  # the x32 calls have numbers of their own
        code += [(_JGE, 0, 1, 0x40000000), (_RET, 0, 0, _EPERM)]
    for numbers in _DENIED.values():
        if numbers[column] >= 0:
            code += [(_JEQ, 0, 1, numbers[column]), (_RET, 0, 0, _EPERM)]
    code += [
        (_JEQ, 0, 1, _CLONE3[column]),
        (_RET, 0, 0, _ENOSYS),
    ]  # its flags can't be read here; libc falls back on clone
    code += [(_JEQ, 0, 4, _CLONE[column]), (_LD, 0, 0, 16), (_JSET, 0, 1, _CLONE_THREAD), (_RET, 0, 0, _ALLOW)]
    code += [(_RET, 0, 0, _EPERM)]
    for signal in _SIGNALS:  # only to itself
        code += [(_JEQ, 0, 4, signal[column]), (_LD, 0, 0, 16), (_JEQ, 0, 1, pid), (_RET, 0, 0, _ALLOW)]
        code += [(_RET, 0, 0, _EPERM)]
    zero = [(16, 0), (32, 0), (36, 0)]  # of itself, and no new limit
    code += [(_JEQ, 0, 2 * len(zero) + 2, _PRLIMIT[column])]
    for n, (offset, value) in enumerate(zero):
        code += [(_LD, 0, 0, offset), (_JEQ, 0, 2 * (len(zero) - n - 1) + 1, value)]
    return [*code, (_RET, 0, 0, _ALLOW), (_RET, 0, 0, _EPERM), (_RET, 0, 0, _ALLOW)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]


def _filter_calls() -> None:
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise Unavailable(f"no system call table for {machine}")
    code = seccomp_filter(machine, os.getpid())
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = _Program(len(code), ctypes.cast(packed, ctypes.c_void_p))
    if _LIBC.prctl(22, 2, ctypes.byref(program), 0, 0):
        raise Unavailable("seccomp filters are switched off")


def _drop_capabilities() -> None:
    header = struct.pack("=Ii", 0x20080522, 0)
    _LIBC.capset(ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))


_READ = (1 << 0) | (1 << 2) | (1 << 3)  # execute, read a file, list a directory


def readable() -> list[str]:
    """What the program may read: Python, the libraries it loads, time zones."""
    paths = {*sysconfig.get_paths().values(), sys.base_prefix + "/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    paths |= {"/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom", "/dev/random"}
    return sorted(path for path in paths if os.path.exists(path) and path != "/")


def _confine_files() -> None:
    version = _LIBC.syscall(444, None, 0, 1)
    if version < 1:
        raise Unavailable("Landlock is switched off (Linux 5.13 or later has it)")
    rights = {1: 1 << 13, 2: 1 << 14}.get(version, 1 << 15) - 1
    handled = ctypes.create_string_buffer(struct.pack("=Q", rights))
    ruleset = _LIBC.syscall(444, handled, 8, 0)
    for path in readable():
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = _READ if os.path.isdir(path) else _READ & ~(1 << 3)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, opened))
        failed = _LIBC.syscall(445, ruleset, 1, rule, 0)
        os.close(opened)
        if failed:
            raise Unavailable(f"Landlock refuses a rule for {path}")
    if _LIBC.syscall(446, ruleset, 0):
        raise Unavailable("Landlock can't be switched on")
    os.close(ruleset)


def _limit(memory: int, seconds: float) -> None:
    processor = int(seconds) + 1
    for what, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, processor),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(what, (value, value))


def _present(text: str) -> None:
    """Make ``text`` the standard input, read-only and in memory."""
    held = os.memfd_create("stdin")
    os.write(held, text.encode()) if text else None
    readonly = os.open(f"/proc/self/fd/{held}", os.O_RDONLY)
    os.close(held)
    os.dup2(readonly, 0)
    os.close(readonly)


def confine(memory: int, seconds: float) -> None:
    """Set all limits, permanently. Raises `Unavailable` if the kernel lacks one."""
    _LIBC.prctl(1, 9, 0, 0, 0)  # end with the parent
    if _LIBC.prctl(38, 1, 0, 0, 0):
        raise Unavailable("no_new_privs can't be set")
    _LIBC.prctl(4, 0, 0, 0, 0)  # not dumpable
    _confine_files()
    _limit(memory, seconds)
    _drop_capabilities()
    _filter_calls()


def _run(source: str, calls: list[str], values: int) -> None:
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(source, "program.py", "exec"), names)
    for call in calls:
        os.write(values, repr(eval(call, names)).replace("\n", " ").encode() + b"\n")


def main(values: int) -> None:
    """Confine this process, say that it is ready, run the program, report the calls' values."""
    job = json.loads(sys.stdin.buffer.read())
    _present(job["stdin"])
    os.chdir("/")
    try:
        confine(job["memory"], job["seconds"])
    except (Unavailable, OSError) as error:
        os.write(values, REFUSED + str(error).encode())
        os._exit(3)
    os.write(values, READY)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = ["program.py"]
    try:
        _run(job["source"], job["calls"], values)
    except Exception as error:
        trace = error.__traceback__.tb_next if error.__traceback__ else None  # without this file's lines
        traceback.print_exception(type(error), error, trace and trace.tb_next)
        sys.exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
