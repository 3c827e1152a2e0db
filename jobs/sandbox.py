"""Runs a module of this repository where it has little to steal and less to break: python jobs/sandbox.py MODULE SOURCE
FD

A script and not a module: it shuts itself in before anything else is imported, so that no thread is left outside. What
it shuts, where the kernel can (Linux): files but SOURCE, Python and libraries (Landlock); opening any file to write,
sockets, programs, signals to others, mounts, other processes' memory (seccomp); privileges and capabilities; memory,
time and bytes written, measured by SOURCE. FD is open for writing and stays so. What could not be shut is said on
standard output, a line for each. docs/security.md says what that leaves.
"""

import ctypes
import ctypes.util
import os
import platform
import resource
import runpy
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

PR_SET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 3, 4, 22
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
SIGKILL, EPERM, ENOSYS = 9, 1, 38

NO_LANDLOCK = "this kernel has no Landlock (Linux 5.13): a pickle that broke out could read this user's files"
NO_SECCOMP = ("this kernel or processor has no seccomp filter that is known here: a pickle that broke out could open "
              "connections, start programs and write where this user may")

# What Landlock is asked to govern, by its version: every access that it knows is denied but for what `readable` gives.
READ_FILE, READ_DIR = 1 << 2, 1 << 3
FILE_ACCESSES = {1: 13, 2: 14, 3: 15, 5: 16}            # version -> number of accesses to files that it knows
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
TCP = 0b11                                              # bind and connect, from version 4
SCOPES = 0b11                                           # abstract sockets and signals to outside, from version 6

# System calls that no reader of a file needs: name -> number, None where there is none.  x86_64, then aarch64.
DENIED = dict(
    socket=(41, 198), socketpair=(53, 199), connect=(42, 203), bind=(49, 200), listen=(50, 201), accept=(43, 202),
    accept4=(288, 242), sendto=(44, 206), sendmsg=(46, 211), sendmmsg=(307, 269),
    fork=(57, None), vfork=(58, None), execve=(59, 221), execveat=(322, 281), tkill=(200, 130), ptrace=(101, 117),
    process_vm_readv=(310, 270), process_vm_writev=(311, 271), process_madvise=(440, 440), pidfd_open=(434, 434),
    pidfd_send_signal=(424, 424), pidfd_getfd=(438, 438), kcmp=(312, 272), rt_sigqueueinfo=(129, 138),
    rt_tgsigqueueinfo=(297, 240),
    creat=(85, None), rename=(82, None), renameat=(264, 38), renameat2=(316, 276), mkdir=(83, None), mkdirat=(258, 34),
    rmdir=(84, None), link=(86, None), linkat=(265, 37), unlink=(87, None), unlinkat=(263, 35), symlink=(88, None),
    symlinkat=(266, 36), mknod=(133, None), mknodat=(259, 33), chmod=(90, None), fchmod=(91, 52), fchmodat=(268, 53),
    fchmodat2=(452, 452), chown=(92, None), lchown=(94, None), fchown=(93, 55), fchownat=(260, 54), truncate=(76, 45),
    utime=(132, None), utimes=(235, None), futimesat=(261, None), utimensat=(280, 88), setxattr=(188, 5),
    lsetxattr=(189, 6), fsetxattr=(190, 7), removexattr=(197, 14), lremovexattr=(198, 15), fremovexattr=(199, 16),
    mount=(165, 40), umount2=(166, 39), pivot_root=(155, 41), chroot=(161, 51), unshare=(272, 97), setns=(308, 268),
    open_tree=(428, 428), move_mount=(429, 429), fsopen=(430, 430), fsmount=(432, 432), fspick=(433, 433),
    mount_setattr=(442, 442), open_by_handle_at=(304, 265),
    bpf=(321, 280), perf_event_open=(298, 241), io_uring_setup=(425, 425), io_uring_enter=(426, 426),
    io_uring_register=(427, 427), userfaultfd=(323, 282), add_key=(248, 217), request_key=(249, 218), keyctl=(250, 219),
    init_module=(175, 105), finit_module=(313, 273), delete_module=(176, 106), kexec_load=(246, 104),
    kexec_file_load=(320, 294), reboot=(169, 142), swapon=(167, 224), swapoff=(168, 225), sethostname=(170, 161),
    settimeofday=(164, 170), clock_settime=(227, 112), acct=(163, 89), quotactl=(179, 60), syslog=(103, 116),
    shmget=(29, 194), shmat=(30, 196), shmctl=(31, 195), msgget=(68, 186), msgsnd=(69, 189), msgrcv=(70, 188),
    msgctl=(71, 187), semget=(64, 190), semop=(65, 193), semctl=(66, 191), semtimedop=(220, 192), mq_open=(240, 180),
    setpriority=(141, 140), ioprio_set=(251, 30), sched_setparam=(142, 118), sched_setscheduler=(144, 119),
    sched_setattr=(314, 274), migrate_pages=(256, 238), move_pages=(279, 239),
)
UNKNOWN_CALLS = dict(clone3=(435, 435), openat2=(437, 437))  # told to be missing: libraries then use what can be judged
OPENS = dict(open=((2, None), 1), openat=((257, 56), 2))               # and which argument has the flags
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
OWN = dict(kill=(62, 129), tgkill=(234, 131))           # allowed to itself, by its number
SELF = dict(prlimit64=(302, 261), setpgid=(109, 154), sched_setaffinity=(203, 122))       # and by 0
DATA_BYTES = 2**31                                      # torch takes 0.23 GB before it reads, and builds for GPUs more
CLONE, CLONE_THREAD = (56, 220), 0x10000                # a thread, and no process
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}


def enter_sandbox(source: Path, packages: Iterable[Path]) -> list[str]:
    """Shut this process in, for good. packages: folders of Python code that may be read, beside Python's own.

    Returns what could not be shut, in sentences.
    """
    set_limits(source.stat().st_size if source.exists() else 0)
    if sys.platform != "linux":
        return [NO_LANDLOCK, NO_SECCOMP]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    call(libc.prctl, PR_SET_PDEATHSIG, SIGKILL)
    call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    drop_capabilities(libc)
    missing = []
    for shut, sentence in ((lambda: landlock(libc, source, packages), NO_LANDLOCK),
                           (lambda: seccomp(libc), NO_SECCOMP)):
        try:
            shut()
        except OSError as error:
            missing.append(f"{sentence} ({error.strerror})")
    return missing


def set_limits(source_bytes: int) -> None:
    """Of what a pickle of so many bytes can need: its tensors may share memory, and are written one by one."""
    for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 4 * source_bytes + 2**26),
                        (resource.RLIMIT_CPU, 120 + source_bytes // 10**7), (resource.RLIMIT_NOFILE, 256),
                        (resource.RLIMIT_DATA, 4 * source_bytes + DATA_BYTES)):
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))


def drop_capabilities(libc: ctypes.CDLL) -> None:
    """All that root has, but for reading what belongs to others: weights, or Python itself, may."""
    read_search = 2
    for capability in range(64):
        if capability != read_search:
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)    # fails for who has none to drop
    held = 1 << read_search if os.geteuid() == 0 else 0
    header, sets = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", held, held, 0, 0, 0, 0)
    capset = {"x86_64": 126, "aarch64": 91}.get(platform.machine())
    if capset is not None:
        libc.syscall(ctypes.c_long(capset), header, sets)       # fails where even that one is not held


def landlock(libc: ctypes.CDLL, source: Path, packages: Iterable[Path]) -> None:
    """Raises OSError where the kernel cannot."""
    version = call(libc.syscall, CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    known = (1 << FILE_ACCESSES[max(v for v in FILE_ACCESSES if v <= version)]) - 1
    attributes = struct.pack("QQQ", known, TCP, SCOPES)[:8 if version < 4 else 16 if version < 6 else 24]
    ruleset = call(libc.syscall, CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    for path, accesses in readable_paths(source, packages):
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            accesses &= READ_FILE | (READ_DIR if path.is_dir() else 0)
            rule = struct.pack("=Qi", accesses, place)
            call(libc.syscall, ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
        finally:
            os.close(place)
    call(libc.syscall, RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)


def readable_paths(source: Path, packages: Iterable[Path]) -> Iterator[tuple[Path, int]]:
    """What may be read: the source, Python, libraries, what they ask of the machine, and of `packages` the code."""
    everything = READ_FILE | READ_DIR
    yield source, READ_FILE
    for folder in packages:
        yield folder.parent, READ_DIR                   # names alone, by which a package is found
        yield folder, everything
    for prefix in {Path(prefix) for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)}:
        yield from ((prefix / part, everything) for part in ("lib", "lib64", "pyvenv.cfg"))
    yield from ((Path(entry), everything) for entry in sys.path
                if Path(entry).name in ("site-packages", "dist-packages"))
    yield from ((Path(entry), everything) for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":") if entry)
    for name in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/cuda", "/etc/ld.so.cache",
                 "/etc/localtime", "/usr/share/zoneinfo", "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat",
                 "/sys/devices/system", "/sys/fs/cgroup", "/dev/null", "/dev/urandom"):
        yield Path(name), everything


def seccomp(libc: ctypes.CDLL) -> None:
    """Raises OSError where the kernel cannot, or the processor's numbers of system calls are not known here."""
    if platform.machine() not in ARCHITECTURES or sys.byteorder != "little":
        raise OSError(ENOSYS, f"{platform.machine()} is not known")
    architecture, column = ARCHITECTURES[platform.machine()]
    code = b"".join(filter_of(architecture, column))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    call(libc.prctl, PR_SET_SECCOMP, 2, program, 0, 0)


def filter_of(architecture: int, column: int) -> Iterator[bytes]:
    """A BPF program of 8 bytes a step. It reads struct seccomp_data: call at 0, architecture at 4, arguments from
    16."""
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, absent, kill = 0x7FFF0000, 0x00050000 | EPERM, 0x00050000 | ENOSYS, 0x80000000

    def step(operation: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
        return struct.pack("HBBI", operation, then, otherwise, value & 0xFFFFFFFF)

    def argument(number: int) -> bytes:
        return step(load, 16 + 8 * number)

    yield from (step(load, 4), step(equal, architecture, 1, 0), step(answer, kill), step(load, 0))
    yield from (step(at_least, 0x40000000, 0, 1), step(answer, deny))          # x32: the same calls by other numbers
    for calls, said in ((DENIED, deny), (UNKNOWN_CALLS, absent)):
        for numbers in calls.values():
            if (number := numbers[column]) is not None:
                yield from (step(equal, number, 0, 1), step(answer, said))
    for numbers, flags in OPENS.values():
        if (number := numbers[column]) is not None:
            yield from (step(equal, number, 0, 4), argument(flags), step(any_bit, WRITING, 0, 1),
                        step(answer, deny), step(answer, allow))
    for calls, process in ((OWN, os.getpid()), (SELF, 0)):
        for numbers in calls.values():
            yield from (step(equal, numbers[column], 0, 4), argument(0), step(equal, process, 1, 0),
                        step(answer, deny), step(answer, allow))
    yield from (step(equal, CLONE[column], 0, 4), argument(0), step(any_bit, CLONE_THREAD, 1, 0),
                step(answer, deny), step(answer, allow))
    yield step(answer, allow)


def call(function: "ctypes._FuncPointer", *arguments: object) -> int:
    """Raises OSError."""
    first, *rest = arguments
    result = function(ctypes.c_long(first) if isinstance(first, int) else first,
                      *(ctypes.c_ulong(each) if isinstance(each, int) else each for each in rest))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class undumpable:
    """While the child runs, /proc/PID/environ and the memory of this process are closed to this user's other processes,
    and so to it. Not against root. Elsewhere than on Linux nothing happens.
    """

    def __enter__(self) -> None:
        self.libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        if self.libc is not None:
            self.before = self.libc.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0)
            self.libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)

    def __exit__(self, *_: object) -> None:
        if self.libc is not None and self.before == 1:
            self.libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


if __name__ == "__main__":
    module, given_source, target = sys.argv[1:]
    home = Path(os.environ["PYTHONPATH"].partition(os.pathsep)[0])
    names = ("dailies",) if (home / "dailies" / "jobs").is_dir() else ("dailies", "kernels", "model", "jobs")
    for unshut in enter_sandbox(Path(given_source).resolve(), [home / name for name in names]):
        print(unshut)
    sys.stdout.flush()
    if sys.platform == "linux":             # it asks programs, and writes for them; without an answer CUDA's libraries,
        ctypes.util.find_library = lambda name: None                        # which torch loads, take the usual name
    sys.argv = [module, given_source, target]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
