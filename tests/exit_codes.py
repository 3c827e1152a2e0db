"""How often a command that does nothing wrong ends with another exit code than 0.

python -m tests.exit_codes 2000 status out/     (two at a time)
"""

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

AT_A_TIME = 2


def exit_code(arguments: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", "dailies", *arguments], stdout=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    times, arguments = int(sys.argv[1]), sys.argv[2:]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        codes = Counter(pool.map(lambda _: exit_code(arguments), range(times)))
    print(", ".join(f"{count:,} ended with {code}" for code, count in codes.most_common()))
    sys.exit(set(codes) != {0})
