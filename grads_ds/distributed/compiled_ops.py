"""What DeepSpeed's ops need to be compiled on the machines they are met on.

workarounds.py has a row for each: what is wrong in which version of which library.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from typing import Any

SHARED_MEMORY_OP = "deepspeed_shm_comm"
VARIABLE = "TORCH_CUDA_ARCH_LIST"


def skip_shared_memory_op(deepspeed: Any) -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives on CPU ranks; training does not
    use them.

    The compiler fails where the environment's path holds a space, and one killed while it compiles
    leaves a lock that every later start waits on without end. The table of usable ops is not a
    public name.
    """
    ops = getattr(deepspeed.ops, "__compatible_ops__", {})
    if SHARED_MEMORY_OP in ops:
        ops[SHARED_MEMORY_OP] = False


def quote_torch_lib_path() -> None:
    """Let DeepSpeed's ops be compiled where torch lies below a folder with a space in its name:
    torch.utils.cpp_extension gives its library folder to the shell unquoted.
    """
    import torch

    if any(character.isspace() for character in torch.__path__[0]):
        from torch.utils import cpp_extension

        cpp_extension.TORCH_LIB_PATH = shlex.quote(os.path.join(torch.__path__[0], "lib"))


def drop_letters() -> None:
    """Write `TORCH_CUDA_ARCH_LIST` without the letters of architectures (`9.0a` -> `9.0`), and say
    so on stderr.

    torch and nvcc know `9.0a` and `10.0f`; DeepSpeed 0.19.8 reads what stands behind the point as a
    number, so that none of its ops compile (ValueError). Its ops use nothing that the letter adds.
    """
    given = os.environ.get(VARIABLE, "")
    plain = re.sub(r"(\d+\.\d+)[a-z]+", r"\1", given)
    if plain != given:
        os.environ[VARIABLE] = plain
        print(
            f"grads-ds: {VARIABLE} is {given}, which DeepSpeed cannot read: its ops are compiled"
            f" for {plain}",
            file=sys.stderr,
            flush=True,
        )
