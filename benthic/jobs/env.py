"""The environment variables that Benthic, or a library under it, reads."""

import os

SECRET = ("BENTHIC_API_KEY",)
VARIABLES = {
    "BENTHIC_API_KEY": "key that clients of `benthic serve` must send",
    "RANK": "number of this process, set by torchrun",
    "LOCAL_RANK": "number of this process on its machine, set by torchrun",
    "WORLD_SIZE": "number of processes, set by torchrun",
    "LOCAL_WORLD_SIZE": "number of processes on this machine, set by torchrun",
    "GLOO_SOCKET_IFNAME": "network interface for messages between processes; one machine alone takes lo",
    "MASTER_ADDR": "host of process 0, set by torchrun",
    "MASTER_PORT": "port of process 0, set by torchrun",
    "CUDA_VISIBLE_DEVICES": "GPUs that may be used",
    "OMP_NUM_THREADS": "CPU threads of one process",
    "GOMP_SPINCOUNT": "how long a waiting CPU thread spins before it sleeps; `benthic demo` sets 1000 if it is not set",
    "NO_COLOR": "any value: no colours",
    "FORCE_COLOR": "any value: colours also where output is not a terminal",
    "COLUMNS": "width of the terminal",
}


def run() -> None:
    """Print each variable with its value (secrets hidden) and what it does."""
    width = max(map(len, VARIABLES))
    for name, meaning in VARIABLES.items():
        print(f"{name:{width}}  {shown(name):12}  {meaning}")


def shown(name: str) -> str:
    """The value as it may be printed."""
    value = os.environ.get(name)
    if value is None:
        return "-"
    return "(set)" if name in SECRET else value
